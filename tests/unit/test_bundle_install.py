"""What installing a bundle does to what is there, and to the directory that the profiles' directories lie in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tests.bundles import CONTAINER, DEVELOPER, FOUR, find, make_bundle, make_surroundings, names
from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.guest import bundle as bundles
from vzrepro.guest.bundle import (
    HostSurroundings,
    Installation,
    KernelBundleOptions,
    examine,
    install,
)


@pytest.fixture
def around(tmp_path: Path) -> HostSurroundings:
    return make_surroundings(tmp_path)


@pytest.fixture
def source(tmp_path: Path) -> bundles.Bundle:
    return examine(make_bundle(tmp_path / "source", "container"))


def test_what_is_installed_is_the_bundle_and_read_only(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "a/b/container"
    assert install(source, target) is Installation.NEW
    assert examine(target).digests == source.digests
    modes = {name: stat.S_IMODE((target / name).stat().st_mode) for name in names(target)}
    assert modes == {"initramfs.img": 0o444, "version.json": 0o444, "vmlinux": 0o444, "youki": 0o555}
    assert names(target.parent) == ["container"]


def test_the_same_bundle_is_not_installed_twice(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "target"
    install(source, target)
    before = target.stat().st_ino
    assert install(source, target) is Installation.PRESENT
    assert target.stat().st_ino == before
    other = examine(make_bundle(tmp_path / "other", "container", extra="a new key"))
    assert install(other, target) is Installation.REPLACED
    assert names(tmp_path) == ["other", "source", "target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, source: bundles.Bundle, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr("vzrepro.base.disk.exchange", lambda one, other: False)
    target = tmp_path / "target"
    make_bundle(target, "container", kernel="older")
    target.chmod(0o555)
    assert install(source, target) is Installation.REPLACED
    assert examine(target).digests == source.digests
    assert names(tmp_path) == ["source", "target"]


def test_an_empty_directory_is_nothing(tmp_path: Path, source: bundles.Bundle) -> None:
    (tmp_path / "target").mkdir()
    assert install(source, tmp_path / "target") is Installation.NEW
    assert names(tmp_path / "target") == FOUR


def test_a_link_stays_one(tmp_path: Path, source: bundles.Bundle) -> None:
    (tmp_path / "link").symlink_to("disk/place")
    install(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk/place") == FOUR


def test_files_of_somebody_else_are_not_lost(tmp_path: Path, source: bundles.Bundle) -> None:
    target = make_bundle(tmp_path / "linux", kernel="legacy")
    (target / "mine").write_text("precious")
    with pytest.raises(UsageError, match="has more than a bundle's files: mine") as caught:
        install(source, target)
    assert f"--install-dir {target}/container" in (caught.value.hint or "")
    assert names(target) == sorted(["mine", *FOUR])
    assert examine(target).metadata.kernel == "legacy"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is not a directory"):
        install(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


# --- the legacy directory, in which the profiles' directories lie


def test_the_developer_bundle_is_also_where_hosts_without_profiles_look(
    tmp_path: Path, around: HostSurroundings
) -> None:
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    find(around, KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "c", "container")))
    assert names(linux) == ["container"]
    (linux / "mine").write_text("precious")
    new = KernelBundleOptions(DEVELOPER, bundle_dir=make_bundle(tmp_path / "d"))
    assert find(around, new).done is Installation.NEW
    assert names(linux) == sorted(["container", "developer", "mine", *FOUR])
    assert examine(linux).digests == examine(linux / "developer").digests == examine(tmp_path / "d").digests
    # Plain files, no links: there are hosts that look (lstat), and users who copy the directory.
    assert all(stat.S_ISREG((linux / name).lstat().st_mode) and (linux / name).stat().st_nlink == 1 for name in FOUR)
    assert find(around, new).done is Installation.PRESENT
    before = examine(linux / "container").digests
    newer = KernelBundleOptions(DEVELOPER, bundle_dir=make_bundle(tmp_path / "e", kernel="newer"))
    assert find(around, newer).done is Installation.REPLACED
    assert examine(linux).metadata.kernel == examine(linux / "developer").metadata.kernel == "newer"
    assert find(around, new).done is Installation.REPLACED  # an older one is as good as a newer one
    assert examine(linux / "container").digests == before
    assert (linux / "mine").read_text() == "precious"


def test_the_legacy_directory_alone_is_brought_up_to_date(tmp_path: Path, around: HostSurroundings) -> None:
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    new = KernelBundleOptions(DEVELOPER, bundle_dir=make_bundle(tmp_path / "d"))
    find(around, new)
    inode = (linux / "developer").stat().st_ino
    (linux / "youki").unlink()
    assert find(around, new).done is Installation.HEALED
    make_bundle(linux, "container")
    assert find(around, new).done is Installation.REPLACED
    assert examine(linux).metadata.profile == "developer"
    assert (linux / "developer").stat().st_ino == inode


def test_installing_into_the_legacy_directory_by_name(tmp_path: Path, source: bundles.Bundle) -> None:
    target = make_bundle(tmp_path / "linux", kernel="legacy")
    make_bundle(target / "developer", kernel="other")
    assert install(source, target) is Installation.REPLACED
    assert names(target) == ["developer", *FOUR]
    assert examine(target).digests == source.digests
    assert examine(target / "developer").metadata.kernel == "other"


def test_links_in_the_legacy_directory_are_replaced_and_not_followed(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "linux"
    (target / "developer").mkdir(parents=True)
    (tmp_path / "mine").write_bytes(b"precious")
    (target / "vmlinux").symlink_to(tmp_path / "mine")
    assert install(source, target) is Installation.HEALED
    assert examine(target).digests == source.digests
    assert (tmp_path / "mine").read_bytes() == b"precious"


def test_a_directory_with_the_name_of_a_file_is_nobodys_to_remove(tmp_path: Path, around: HostSurroundings) -> None:
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    (linux / "vmlinux").mkdir(parents=True)
    (linux / "vmlinux/mine").write_text("precious")
    with pytest.raises(UsageError, match="has more than a bundle's files: vmlinux"):
        find(around, KernelBundleOptions(DEVELOPER, bundle_dir=make_bundle(tmp_path / "d")))
    assert names(linux) == ["vmlinux"]


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("way", ["out", "in"])
def test_a_file_that_cannot_be_put_there_leaves_the_old_ones(
    tmp_path: Path, source: bundles.Bundle, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_bundle(tmp_path / "linux", kernel="legacy")
    (target / "developer").mkdir()
    rename = Path.rename

    def refuse(path: Path, other: Path) -> Path:
        if path.name == name and (path.parent == target) == (way == "out") and other.parent != path.parent:
            monkeypatch.undo()
            raise PermissionError(1, "not this one", str(path))
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(VzreproError, match="not this one"):
        install(source, target)
    assert names(target) == ["developer", *FOUR]
    assert examine(target).metadata.kernel == "legacy"


def test_a_bundle_that_changes_while_it_is_copied(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "target"
    (source.directory / "initramfs.img").write_bytes(b"another")
    with pytest.raises(HashMismatch, match="initramfs"):
        install(source, target)
    assert names(tmp_path) == ["source"]
