"""A VM's directory: what its configuration means, and that making one again loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.vm import directory, qemu
from vzrepro.guest.vm.spec import Mount

SETTINGS = directory.Settings(disk_mib=0)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    place = tmp_path / "bundle"
    place.mkdir()
    for name in ("vmlinux", "initramfs.img", "youki", "version.json"):
        (place / name).write_text(name)
    return place


def test_what_is_written_is_what_is_read(tmp_path: Path, bundle: Path) -> None:
    place = tmp_path / 'a "new" place' / "vm"
    source = tmp_path / 'with "quotes" and\ttabs\x7f'
    mounts = (Mount(source, "/work", read_only=True), Mount(tmp_path, "/srv/www"))
    directory.create(place, bundle, replace(SETTINGS, cpus=3, memory_mib=700, mounts=mounts))
    assert directory.is_one(place)
    guest = directory.load(place)
    assert (guest.cpus, guest.memory_mib, guest.disks) == (3, 700, ())
    assert guest.shares == (qemu.Share("vz-mount-0", source, True), qemu.Share("vz-mount-1", tmp_path))
    assert guest.command_line.endswith(" vz.mount.0=/work vz.mount.1=/srv/www")
    assert guest.kernel.read_text() == "vmlinux"
    assert guest.initramfs.read_text() == "initramfs.img"


def test_the_configuration_is_the_users(tmp_path: Path, bundle: Path) -> None:
    (bundle / "vm.toml").write_text(
        'format = 1\nkernel = "version.json"\ncommand-line = "loglevel=7"\n'
        '[disk]\npath = "/dev/disk"\ntarget = "/data"\n[[mount]]\nsource = "below"\ntarget = "/x"\n'
    )
    guest = directory.load(bundle)
    assert guest.kernel == bundle / "version.json"
    assert guest.disks == (qemu.Disk(Path("/dev/disk")),)
    assert guest.shares == (qemu.Share("vz-mount-0", bundle / "below"),)
    assert guest.command_line.split()[-3:] == ["loglevel=7", "vz.disk=/data", "vz.mount.0=/x"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("format =", "is not TOML"),
        ("format = " + "9" * 5000, "is not TOML"),
        ("format = " + "[" * 5000, "is not TOML"),
        ("", "vm.toml: format: Field required"),
        ("format = 2", "vm.toml: format: "),
        ("format = 1\nmemory = 5", "vm.toml: memory: "),
        ("format = 1\ncpus = 0", "vm.toml: cpus: "),
        ('format = 1\ncpus = "2"', "vm.toml: cpus: "),
        ('format = 1\nkernel = "nothing"', "nothing is not there"),
        ('format = 1\n[disk]\ntarget = "mnt"', "'mnt' cannot be where the guest mounts something"),
        ('format = 1\n[disk]\ntarget = "/a/../b"', "cannot be where the guest mounts something"),
        ('format = 1\n[[mount]]\nsource = "."\ntarget = "/a b"', "cannot be where the guest mounts something"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_named(bundle: Path, text: str, said: str) -> None:
    (bundle / "vm.toml").write_text(text)
    with pytest.raises(UsageError) as error:
        directory.load(bundle)
    assert said in error.value.message


def test_what_is_there_is_not_touched(tmp_path: Path, bundle: Path) -> None:
    place = tmp_path / "vm"
    place.mkdir()
    (place / "disk.img").write_text("precious")
    (place / "notes").write_text("mine")
    with pytest.raises(UsageError, match="is not empty") as error:
        directory.create(place, bundle, SETTINGS)
    assert error.value.reason == "it has disk.img and 1 more"
    assert len(list(place.iterdir())) == 2

    directory.create(place, bundle, replace(SETTINGS, disk_mib=64), force=True)
    assert (place / "disk.img").read_text() == "precious"
    assert (place / "notes").read_text() == "mine"
    assert (place / "vmlinux").read_text() == "vmlinux"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_empty_directory_is_taken_and_a_file_is_not(tmp_path: Path, bundle: Path) -> None:
    place = tmp_path / "vm"
    place.mkdir()
    directory.create(place, bundle, SETTINGS)
    assert directory.is_one(place)
    with pytest.raises(UsageError, match="is not a directory"):
        directory.create(place / "vmlinux", bundle, SETTINGS, force=True)


def test_what_fails_halfway_leaves_nothing(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.shutil, "which", lambda *_words, **_options: None)
    with pytest.raises(VzreproError, match="mke2fs is not installed") as error:
        directory.create(tmp_path / "vm", bundle, replace(SETTINGS, disk_mib=64))
    assert error.value.hint is not None
    assert "e2fsprogs" in error.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
