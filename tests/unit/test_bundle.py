"""What a bundle is checked for, where one is looked for and in which order, what installing does to what is there."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vzrepro
from tests.bundles import CONTENT, make_bundle
from vzrepro import bundle as bundles
from vzrepro.bundle import (
    Installed,
    KernelBundleOptions,
    KernelPaths,
    KernelProfile,
    Resolution,
    RuntimeConfig,
    Surroundings,
    Wanted,
    examine,
    install,
    resolve,
    verify,
)
from vzrepro.errors import HashMismatch, UsageError, VzreproError

DEVELOPER, CONTAINER = KernelProfile.DEVELOPER, KernelProfile.CONTAINER
FOUR = ["initramfs.img", "version.json", "vmlinux", "youki"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- checking one


def test_a_bundle_is_read_whole(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b", "container"))
    assert found.metadata.profile == "container"
    assert found.digests["vmlinux"] == hashlib.sha256(CONTENT["vmlinux"]).hexdigest()
    assert sorted(found.digests) == FOUR


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.parametrize("how", ["truncated", "swapped", "changed", "emptied"])
def test_a_file_that_is_another_one(tmp_path: Path, name: str, how: str) -> None:
    place = make_bundle(tmp_path / "b")
    data = {
        "truncated": CONTENT[name][:-1],
        "swapped": next(data for other, data in CONTENT.items() if other != name),
        "changed": b"A" + CONTENT[name][1:],
        "emptied": b"",
    }[how]
    (place / name).write_bytes(data)
    with pytest.raises(HashMismatch) as caught:
        examine(place)
    told = str(caught.value)
    assert f"{place / name}" in told
    assert f"expected: sha256 {hashlib.sha256(CONTENT[name]).hexdigest()}" in told
    assert f"found:    sha256 {hashlib.sha256(data).hexdigest()}" in told
    assert "vzrepro bundle install --kernel-profile developer" in told
    assert caught.value.exit_code == 102


@pytest.mark.parametrize("name", FOUR)
def test_a_file_that_is_missing_or_none(tmp_path: Path, name: str) -> None:
    place = make_bundle(tmp_path / "b")
    (place / name).unlink()
    with pytest.raises(UsageError, match="is not a boot bundle\n  reason: it lacks " + name.replace(".", r"\.")):
        examine(place)
    os.mkfifo(place / name)  # which must not be waited for
    with pytest.raises(UsageError, match="is not a regular file"):
        examine(place)
    (place / name).unlink()
    (place / name).mkdir()
    with pytest.raises(UsageError, match="is not a regular file"):
        examine(place)


def test_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(UsageError, match="is not a boot bundle"):
            examine(place)


def test_all_that_is_missing_is_named(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b")
    (place / "youki").unlink()
    (place / "vmlinux").unlink()
    with pytest.raises(UsageError, match="it lacks vmlinux, youki"):
        examine(place)


def test_files_without_a_declared_checksum_are_taken_as_they_are(tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "b", sha256_youki=None)
    (place / "youki").write_bytes(b"any")
    assert examine(place).digests["youki"] == hashlib.sha256(b"any").hexdigest()


def test_what_a_caller_asks_for(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b", "container", agent="9.9.9", agent_protocol_revision=2))
    Wanted().check(found)
    Wanted(CONTAINER, frozenset({"nfsd"})).check(found)
    with pytest.raises(VzreproError, match=r"is of another profile\n  reason: wanted: developer; found: container"):
        Wanted(DEVELOPER).check(found)
    with pytest.raises(VzreproError, match=r"does not declare nested_virt, tun\n  reason: declared: btrfs_snapshots, "):
        Wanted(capabilities=frozenset({"tun", "nested_virt", "vsock"})).check(found)
    with pytest.raises(VzreproError, match=r"has another guest agent\n  reason: wanted: 0.*; found: 9\.9\.9"):
        Wanted(exact_agent=True).check(found)
    found = examine(make_bundle(tmp_path / "c", "container", agent_protocol_revision=2))
    with pytest.raises(VzreproError, match=r"another revision of the agent's protocol\n  reason: wanted: 1; found: 2"):
        Wanted(exact_agent=True).check(found)


# --- looking for one


@pytest.fixture
def around(tmp_path: Path) -> Surroundings:
    """A home and a workspace with nothing in them."""
    start = tmp_path / "workspace" / "below"
    start.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    return Surroundings({"HOME": str(tmp_path / "home")}, start)


def find(around: Surroundings, options: KernelBundleOptions, **environ: Path | str) -> Resolution:
    named = {name: str(value) for name, value in environ.items()}
    return resolve(options, surroundings=Surroundings({**around.environ, **named}, around.start))


def test_the_order_of_the_search(tmp_path: Path, around: Surroundings) -> None:
    """Every place has another kernel; the places are taken away one by one, the first one first."""
    home = Path(around.environ["HOME"])
    bundle = {name: make_bundle(tmp_path / name, kernel=name) for name in ("argument", "own", "generic")}
    workspace = make_bundle(around.start.parent / "linux/out", kernel="workspace")
    make_bundle(home / ".vz/linux", kernel="legacy")
    make_bundle(home / ".vz/linux/developer", kernel="installed")
    make_bundle(around.start / "linux/out/container", "container")
    variables = {"VZ_LINUX_DEVELOPER_BUNDLE_DIR": bundle["own"], "VZ_LINUX_BUNDLE_DIR": bundle["generic"]}
    other = {"VZ_LINUX_CONTAINER_BUNDLE_DIR": tmp_path / "not looked at"}

    def found(argument: Path | None, **environ: Path | str) -> tuple[str, str]:
        options = KernelBundleOptions(DEVELOPER, bundle_dir=argument, install_dir=tmp_path / "target")
        result = find(around, options, **environ, **other)
        assert result.paths.directory == tmp_path / "target"
        return result.paths.version.kernel, result.source

    assert found(bundle["argument"], **variables) == ("argument", "argument")
    assert found(None, **variables) == ("own", "env")
    assert found(None, VZ_LINUX_BUNDLE_DIR=bundle["generic"]) == ("generic", "env")
    assert found(None, VZ_LINUX_DEVELOPER_BUNDLE_DIR="") == ("workspace", "workspace")
    for path in workspace.iterdir():
        path.unlink()
    assert found(None) == ("workspace", "installed")

    options = KernelBundleOptions(DEVELOPER)
    result = find(around, options)
    assert (result.paths.version.kernel, result.source) == ("installed", "installed")
    for path in (home / ".vz/linux/developer").iterdir():
        path.unlink()
    assert find(around, options).paths.directory == home / ".vz/linux"
    assert find(around, options).source == "installed"
    (home / ".vz/linux/version.json").unlink()
    with pytest.raises(UsageError, match="it lacks version"):
        find(around, options)
    for name in CONTENT:
        (home / ".vz/linux" / name).unlink()
    with pytest.raises(VzreproError, match="there is no developer bundle") as caught:
        find(around, options)
    assert str(home / ".vz/linux/developer") in str(caught.value)
    assert caught.value.exit_code == 1


def test_the_container_profile_has_no_legacy_directory(around: Surroundings) -> None:
    home = Path(around.environ["HOME"])
    make_bundle(home / ".vz/linux", "container")
    with pytest.raises(VzreproError, match="there is no container bundle"):
        find(around, KernelBundleOptions(CONTAINER))


def test_the_workspaces_container_bundle(around: Surroundings) -> None:
    make_bundle(around.start.parent / "linux/out/container", "container")
    result = find(around, KernelBundleOptions(CONTAINER))
    assert result.source == "workspace"
    assert result.paths.directory == Path(around.environ["HOME"]) / ".vz/linux/container"


def test_a_broken_bundle_is_an_error_even_when_a_good_one_is_installed(tmp_path: Path, around: Surroundings) -> None:
    options = KernelBundleOptions(CONTAINER)
    find(around, KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "container")))
    (tmp_path / "b/vmlinux").write_bytes(b"")
    with pytest.raises(HashMismatch, match="VZ_LINUX_BUNDLE_DIR names this directory"):
        find(around, options, VZ_LINUX_BUNDLE_DIR=tmp_path / "b")
    assert find(around, options).source == "installed"
    with pytest.raises(UsageError, match="VZ_LINUX_CONTAINER_BUNDLE_DIR names this directory"):
        find(around, options, VZ_LINUX_CONTAINER_BUNDLE_DIR=tmp_path / "nowhere")


def test_a_bundle_of_another_profile_is_not_installed(tmp_path: Path, around: Surroundings) -> None:
    options = KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "developer"))
    with pytest.raises(VzreproError, match="is of another profile"):
        find(around, options)
    assert list(Path(around.environ["HOME"]).iterdir()) == []


def test_a_profile_asks_for_its_defaults_and_no_profile_for_the_oldest_four(
    tmp_path: Path, around: Surroundings
) -> None:
    old = make_bundle(tmp_path / "old", capabilities=None)
    assert find(around, KernelBundleOptions(bundle_dir=old)).paths.version.profile == "developer"
    with pytest.raises(VzreproError, match="does not declare btrfs_snapshots, "):
        find(around, KernelBundleOptions(DEVELOPER, bundle_dir=old))
    with pytest.raises(VzreproError, match="does not declare netns"):
        find(around, KernelBundleOptions(bundle_dir=old, required_capabilities=["netns", "vsock"]))
    less = make_bundle(tmp_path / "less", capabilities=["vsock"])
    with pytest.raises(VzreproError, match="does not declare ext4_root, hvc0_serial, virtiofs"):
        find(around, KernelBundleOptions(bundle_dir=less))


def test_the_agent_must_be_exact_unless_any_will_do(tmp_path: Path, around: Surroundings) -> None:
    place = make_bundle(tmp_path / "b", agent_protocol_revision=2)
    with pytest.raises(VzreproError, match="speaks another revision"):
        find(around, KernelBundleOptions(DEVELOPER, bundle_dir=place))
    options = KernelBundleOptions(DEVELOPER, bundle_dir=place, require_exact_agent_version=False)
    assert find(around, options).paths.version.agent_protocol_revision == 2


def test_a_tampered_install_is_healed_from_the_bundle_or_is_an_error(tmp_path: Path, around: Surroundings) -> None:
    options = KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "container"))
    assert find(around, options).done is Installed.NEW
    assert find(around, options).done is Installed.PRESENT
    installed = Path(around.environ["HOME"]) / ".vz/linux/container"
    (installed / "youki").unlink()
    (installed / "youki").write_bytes(b"somebody else's")
    with pytest.raises(HashMismatch, match=str(installed / "youki")):
        find(around, KernelBundleOptions(CONTAINER))
    assert find(around, options).done is Installed.HEALED
    assert find(around, KernelBundleOptions(CONTAINER)).done is Installed.PRESENT


@pytest.mark.parametrize("wrong", ["half", "no json", "other profile"])
def test_an_install_that_is_none(tmp_path: Path, around: Surroundings, wrong: str) -> None:
    installed = make_bundle(Path(around.environ["HOME"]) / ".vz/linux/container", "container")
    expected: type[VzreproError] = UsageError
    if wrong == "half":
        (installed / "version.json").unlink()
        (installed / "vmlinux").write_bytes(CONTENT["vmlinux"][:100])
    elif wrong == "no json":
        (installed / "version.json").write_text("{")
    else:
        make_bundle(installed, "developer")
        expected = VzreproError
    with pytest.raises(expected):
        find(around, KernelBundleOptions(CONTAINER))
    options = KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "container"))
    assert find(around, options).done is (Installed.REPLACED if wrong == "other profile" else Installed.HEALED)
    assert names(installed) == FOUR


def test_realizing_is_the_last_resort(tmp_path: Path, around: Surroundings) -> None:
    calls: list[KernelProfile] = []

    def realize(profile: KernelProfile) -> Path:
        calls.append(profile)
        return make_bundle(tmp_path / "store", profile)

    def run(**options: object) -> Resolution:
        return resolve(KernelBundleOptions(CONTAINER), surroundings=around, realize=realize, **options)  # type: ignore[arg-type]

    assert (run().source, run().source) == ("realized", "installed")
    assert calls == [CONTAINER]
    (Path(around.environ["HOME"]) / ".vz/linux/container/vmlinux").unlink()
    healed = run()
    assert (healed.source, healed.done) == ("realized", Installed.HEALED)
    again = run(accept_installed=False)
    assert (again.source, again.done, len(calls)) == ("realized", Installed.PRESENT, 3)


def test_verify_changes_nothing(tmp_path: Path, around: Surroundings) -> None:
    place = make_bundle(tmp_path / "b", "container")
    assert verify(KernelBundleOptions(bundle_dir=place), surroundings=around).metadata.profile == "container"
    assert verify(KernelBundleOptions(CONTAINER, install_dir=place), surroundings=around).directory == place
    with pytest.raises(VzreproError, match="is of another profile"):
        verify(KernelBundleOptions(DEVELOPER, bundle_dir=place), surroundings=around)
    with pytest.raises(VzreproError, match="does not declare tun"):
        verify(KernelBundleOptions(bundle_dir=place, required_capabilities={"tun"}), surroundings=around)
    with pytest.raises(VzreproError, match="there is no container bundle"):
        verify(KernelBundleOptions(CONTAINER), surroundings=around)
    assert list(Path(around.environ["HOME"]).iterdir()) == []


# --- installing


@pytest.fixture
def source(tmp_path: Path) -> bundles.Bundle:
    return examine(make_bundle(tmp_path / "source", "container"))


def test_what_is_installed_is_the_bundle_and_read_only(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "a/b/container"
    assert install(source, target) is Installed.NEW
    assert examine(target).digests == source.digests
    modes = {name: stat.S_IMODE((target / name).stat().st_mode) for name in names(target)}
    assert modes == {"initramfs.img": 0o444, "version.json": 0o444, "vmlinux": 0o444, "youki": 0o555}
    assert names(target.parent) == ["container"]


def test_the_same_bundle_is_not_installed_twice(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "target"
    install(source, target)
    before = target.stat().st_ino
    assert install(source, target) is Installed.PRESENT
    assert target.stat().st_ino == before
    other = examine(make_bundle(tmp_path / "other", "container", extra="a new key"))
    assert install(other, target) is Installed.REPLACED
    assert names(tmp_path) == ["other", "source", "target"]


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing(tmp_path: Path, source: bundles.Bundle, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr("vzrepro.disk.exchange", lambda one, other: False)
    target = tmp_path / "target"
    make_bundle(target, "container", kernel="older")
    target.chmod(0o555)
    assert install(source, target) is Installed.REPLACED
    assert examine(target).digests == source.digests
    assert names(tmp_path) == ["source", "target"]


def test_an_empty_directory_is_nothing(tmp_path: Path, source: bundles.Bundle) -> None:
    (tmp_path / "target").mkdir()
    assert install(source, tmp_path / "target") is Installed.NEW
    assert names(tmp_path / "target") == FOUR


def test_a_link_stays_one(tmp_path: Path, source: bundles.Bundle) -> None:
    (tmp_path / "link").symlink_to("disk/place")
    install(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk/place") == FOUR


def test_files_of_somebody_else_are_not_lost(tmp_path: Path, source: bundles.Bundle) -> None:
    target = make_bundle(tmp_path / "linux", kernel="legacy")
    make_bundle(target / "developer")
    with pytest.raises(UsageError, match="has more than a bundle's files: developer") as caught:
        install(source, target)
    assert f"--install-dir {target}/container" in (caught.value.hint or "")
    assert names(target) == ["developer", *FOUR]
    assert examine(target).metadata.kernel == "legacy"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is not a directory"):
        install(source, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_bundle_that_changes_while_it_is_copied(tmp_path: Path, source: bundles.Bundle) -> None:
    target = tmp_path / "target"
    (source.directory / "initramfs.img").write_bytes(b"another")
    with pytest.raises(HashMismatch, match="initramfs"):
        install(source, target)
    assert names(tmp_path) == ["source"]


# --- the Python interface


def test_the_names_hosts_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("DEVELOPER_BUNDLE_DIR", "CONTAINER_BUNDLE_DIR", "BUNDLE_DIR"):
        monkeypatch.delenv(f"VZ_LINUX_{variable}", raising=False)
    monkeypatch.setenv("VZ_LINUX_CONTAINER_BUNDLE_DIR", str(make_bundle(tmp_path / "c", "container")))
    monkeypatch.setenv("VZ_LINUX_DEVELOPER_BUNDLE_DIR", str(make_bundle(tmp_path / "d")))
    calls: dict[str, Callable[[], KernelPaths]] = {
        "developer": vzrepro.ensure_kernel,
        "container": lambda: vzrepro.ensure_kernel_profile(vzrepro.KernelProfile.CONTAINER),
    }
    for profile, call in calls.items():
        paths = call()
        assert isinstance(paths, vzrepro.KernelPaths)
        assert paths.directory == tmp_path / ".vz/linux" / profile
        assert paths.kernel.read_bytes() == CONTENT["vmlinux"]
        assert paths.initramfs.read_bytes() == CONTENT["initramfs.img"]
        assert paths.youki.read_bytes() == CONTENT["youki"]
        assert paths.version.profile == profile
    options = vzrepro.KernelBundleOptions(
        profile=vzrepro.KernelProfile.CONTAINER,
        required_capabilities={"nfsd"},
        install_dir=tmp_path / "own",
        bundle_dir=tmp_path / "c",
        require_exact_agent_version=True,
    )
    assert vzrepro.ensure_kernel_bundle(options).directory == tmp_path / "own"
    assert vzrepro.RuntimeConfig is RuntimeConfig
    assert RuntimeConfig(linux_profile=DEVELOPER).ensure_kernel().version.profile == "developer"
    assert RuntimeConfig().ensure_kernel().version.profile == "container"


def test_importing_vzrepro_loads_nothing_else() -> None:
    script = "import sys, vzrepro; print([name for name in sys.modules if name.startswith('vzrepro.')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_documented_and_none_is_a_recipes() -> None:
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text()
    for name in vzrepro.API:
        assert name in page
        assert getattr(vzrepro, name) is getattr(bundles, name)
    assert not set(vzrepro.API) & set(vzrepro.DSL)
