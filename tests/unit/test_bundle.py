"""What a bundle is checked for, where one is looked for, and in which order."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.bundles import CONTAINER, CONTENT, DEVELOPER, FOUR, find, make_bundle, make_surroundings, names
from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.guest import bundle as bundles
from vzrepro.guest.bundle import (
    BundleRequirements,
    HostSurroundings,
    Installation,
    KernelBundleOptions,
    KernelProfile,
    Resolution,
    examine,
    resolve,
    verify,
)
from vzrepro.guest.metadata import AGENT_VERSION

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


def test_a_checksum_in_capitals_is_the_same(tmp_path: Path) -> None:
    capitals = {f"sha256_{name}": hashlib.sha256(CONTENT[name]).hexdigest().upper() for name in ("vmlinux", "youki")}
    assert len(examine(make_bundle(tmp_path / "b", **capitals)).digests) == 4


def test_a_checksum_that_is_none_is_a_mismatch(tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match=r"expected: sha256 abc\n") as caught:
        examine(make_bundle(tmp_path / "b", sha256_youki="abc"))
    assert caught.value.exit_code == 102


def test_what_a_caller_asks_for(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b", "container", agent="9.9.9", agent_protocol_revision=2))
    BundleRequirements().check(found)
    BundleRequirements(CONTAINER, frozenset({"nfsd"})).check(found)
    with pytest.raises(VzreproError, match=r"is of another profile\n  reason: wanted: developer; found: container"):
        BundleRequirements(DEVELOPER).check(found)
    with pytest.raises(VzreproError, match=r"does not declare nested_virt, tun\n  reason: declared: btrfs_snapshots, "):
        BundleRequirements(capabilities=frozenset({"tun", "nested_virt", "vsock"})).check(found)
    with pytest.raises(VzreproError, match=r"has another guest agent\n  reason: wanted: 0.*; found: 9\.9\.9"):
        BundleRequirements(exact_agent=True).check(found)
    found = examine(make_bundle(tmp_path / "c", "container", agent_protocol_revision=2))
    with pytest.raises(VzreproError, match=r"another revision of the agent's protocol\n  reason: wanted: 1; found: 2"):
        BundleRequirements(exact_agent=True).check(found)


@pytest.mark.parametrize("agent", [AGENT_VERSION, "9.9.9"])
def test_old_hosts_and_new_bundles_are_told_the_revision(tmp_path: Path, agent: str) -> None:
    for revision in (0, 2):
        found = examine(make_bundle(tmp_path / "b", agent=agent, agent_protocol_revision=revision))
        with pytest.raises(VzreproError) as caught:
            BundleRequirements(exact_agent=True).check(found)
        assert f"needs a host that speaks revision {revision}, and this one speaks 1;" in (caught.value.hint or "")


def test_a_missing_revision_passes_when_the_agent_need_not_be_exact(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b", agent_protocol_revision=None))
    BundleRequirements(DEVELOPER).check(found)
    with pytest.raises(VzreproError, match=r"wanted: 1; found: none that is declared"):
        BundleRequirements(exact_agent=True).check(found)


def test_a_profile_that_is_asked_for_must_be_declared(tmp_path: Path) -> None:
    found = examine(make_bundle(tmp_path / "b", profile=None, security_profile=None))
    BundleRequirements(exact_agent=True).check(found)
    with pytest.raises(VzreproError, match=r"wanted: container; found: none that is declared"):
        BundleRequirements(CONTAINER).check(found)


# --- looking for one


@pytest.fixture
def around(tmp_path: Path) -> HostSurroundings:
    return make_surroundings(tmp_path)


def test_the_order_of_the_search(tmp_path: Path, around: HostSurroundings) -> None:
    """Every place has another kernel; the places are taken away one by one, the first one first."""
    home = Path(around.environ["HOME"])
    bundle = {name: make_bundle(tmp_path / name, kernel=name) for name in ("argument", "own", "generic")}
    workspace = make_bundle(around.start.parent / "linux/out", kernel="workspace")
    make_bundle(around.start / "linux/out", kernel="below the workspace")
    make_bundle(around.start / "linux/out/container", "container")
    variables = {"VZ_LINUX_DEVELOPER_BUNDLE_DIR": bundle["own"], "VZ_LINUX_BUNDLE_DIR": bundle["generic"]}
    other = {"VZ_LINUX_CONTAINER_BUNDLE_DIR": tmp_path / "not looked at"}

    def found(argument: Path | None, **environ: Path | str) -> tuple[str, str]:
        result = find(around, KernelBundleOptions(DEVELOPER, bundle_dir=argument), **environ, **other)
        assert result.paths.directory == home / ".vz/linux/developer"
        return result.paths.version.kernel, result.source

    assert found(bundle["argument"], **variables) == ("argument", "argument")
    assert found(None, **variables) == ("own", "env")
    assert found(None, VZ_LINUX_BUNDLE_DIR=bundle["generic"]) == ("generic", "env")
    assert found(None, VZ_LINUX_DEVELOPER_BUNDLE_DIR="") == ("workspace", "workspace")
    for path in workspace.iterdir():
        path.unlink()
    assert found(None) == ("workspace", "installed")

    options = KernelBundleOptions(DEVELOPER)
    (home / ".vz/linux/developer").chmod(0o755)
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


def test_with_an_install_directory_the_workspace_is_not_looked_at(tmp_path: Path, around: HostSurroundings) -> None:
    make_bundle(around.start.parent / "linux/out", kernel="workspace")
    own = make_bundle(tmp_path / "own", kernel="own")
    options = KernelBundleOptions(DEVELOPER, install_dir=own)
    assert [place.source for place in bundles.places(options, around)] == ["installed"]
    assert (find(around, options).source, find(around, options).paths.version.kernel) == ("installed", "own")
    with pytest.raises(VzreproError, match="there is no developer bundle") as caught:
        find(around, KernelBundleOptions(DEVELOPER, install_dir=tmp_path / "nothing"))
    assert "linux/out is not looked at with an install directory" in (caught.value.reason or "")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("missing", FOUR)
def test_what_is_incomplete_is_passed_over(around: HostSurroundings, missing: str) -> None:
    """In the workspace, and where profiles are installed; what is whole further on is taken."""
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    for place in (around.start.parent / "linux/out", linux / "developer"):
        (make_bundle(place, kernel="half") / missing).unlink()
    make_bundle(linux, kernel="legacy")
    for profile in (DEVELOPER, None):
        found = find(around, KernelBundleOptions(profile))
        assert (found.source, found.paths.directory, found.done) == ("installed", linux, Installation.PRESENT)
    (linux / missing).unlink()
    with pytest.raises(UsageError, match=f"{linux}/developer is not a boot bundle\n  reason: it lacks {missing}"):
        find(around, KernelBundleOptions(DEVELOPER))


def test_what_is_complete_and_damaged_is_not_passed_over(around: HostSurroundings) -> None:
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    make_bundle(linux, kernel="legacy")
    for place in (linux / "developer", around.start.parent / "linux/out"):
        (make_bundle(place) / "youki").write_bytes(b"damaged")
        with pytest.raises(HashMismatch, match=str(place)):
            find(around, KernelBundleOptions(DEVELOPER))


def test_no_workspace_is_the_start_directory_alone(around: HostSurroundings) -> None:
    (around.start.parent / "recipes").rmdir()
    make_bundle(around.start.parent / "linux/out")
    with pytest.raises(VzreproError, match="there is no developer bundle"):
        find(around, KernelBundleOptions(DEVELOPER))
    make_bundle(around.start / "linux/out")
    assert find(around, KernelBundleOptions(DEVELOPER)).source == "workspace"


def test_without_a_profile_a_named_directory_may_hold_any(tmp_path: Path, around: HostSurroundings) -> None:
    place = make_bundle(tmp_path / "b", "container")
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    found = find(around, KernelBundleOptions(), VZ_LINUX_BUNDLE_DIR=place)
    assert (found.source, found.paths.directory) == ("env", linux / "container")
    assert names(linux) == ["container"]
    assert find(around, KernelBundleOptions(bundle_dir=place)).done is Installation.PRESENT
    assert find(around, KernelBundleOptions(install_dir=place)).paths.version.profile == "container"
    with pytest.raises(VzreproError, match=r"is of another profile\n  reason: wanted: developer; found: container"):
        find(around, KernelBundleOptions(DEVELOPER), VZ_LINUX_BUNDLE_DIR=place)
    # A place that is named after a profile holds no other.
    with pytest.raises(VzreproError, match="is of another profile"):
        find(around, KernelBundleOptions(), VZ_LINUX_DEVELOPER_BUNDLE_DIR=place)
    make_bundle(linux / "developer", "container")
    with pytest.raises(VzreproError, match="is of another profile"):
        find(around, KernelBundleOptions())


def test_a_bundle_older_than_profiles(tmp_path: Path, around: HostSurroundings) -> None:
    """It is accepted where no profile is asked for, and goes where the developer's go."""
    old = make_bundle(tmp_path / "old", profile=None, security_profile=None, capabilities=None)
    linux = Path(around.environ["HOME"]) / ".vz/linux"
    found = find(around, KernelBundleOptions(), VZ_LINUX_BUNDLE_DIR=old)
    assert found.paths.directory == linux / "developer"
    assert found.paths.version.profile is None
    assert find(around, KernelBundleOptions()).source == "installed"
    with pytest.raises(VzreproError, match="wanted: developer; found: none that is declared"):
        find(around, KernelBundleOptions(DEVELOPER))


def test_the_container_profile_has_no_legacy_directory(around: HostSurroundings) -> None:
    home = Path(around.environ["HOME"])
    make_bundle(home / ".vz/linux", "container")
    with pytest.raises(VzreproError, match="there is no container bundle"):
        find(around, KernelBundleOptions(CONTAINER))


def test_the_workspaces_container_bundle(around: HostSurroundings) -> None:
    make_bundle(around.start.parent / "linux/out/container", "container")
    result = find(around, KernelBundleOptions(CONTAINER))
    assert result.source == "workspace"
    assert result.paths.directory == Path(around.environ["HOME"]) / ".vz/linux/container"


def test_a_broken_bundle_is_an_error_even_when_a_good_one_is_installed(
    tmp_path: Path, around: HostSurroundings
) -> None:
    options = KernelBundleOptions(CONTAINER)
    find(around, KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "container")))
    (tmp_path / "b/vmlinux").write_bytes(b"")
    with pytest.raises(HashMismatch, match="VZ_LINUX_BUNDLE_DIR names this directory"):
        find(around, options, VZ_LINUX_BUNDLE_DIR=tmp_path / "b")
    assert find(around, options).source == "installed"
    with pytest.raises(UsageError, match="VZ_LINUX_CONTAINER_BUNDLE_DIR names this directory"):
        find(around, options, VZ_LINUX_CONTAINER_BUNDLE_DIR=tmp_path / "nowhere")


def test_a_bundle_of_another_profile_is_not_installed(tmp_path: Path, around: HostSurroundings) -> None:
    options = KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "developer"))
    with pytest.raises(VzreproError, match="is of another profile"):
        find(around, options)
    assert list(Path(around.environ["HOME"]).iterdir()) == []


def test_a_profile_asks_for_its_defaults_and_no_profile_for_the_oldest_four(
    tmp_path: Path, around: HostSurroundings
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


def test_the_agent_must_be_exact_unless_any_will_do(tmp_path: Path, around: HostSurroundings) -> None:
    place = make_bundle(tmp_path / "b", agent_protocol_revision=2)
    with pytest.raises(VzreproError, match="speaks another revision"):
        find(around, KernelBundleOptions(DEVELOPER, bundle_dir=place))
    options = KernelBundleOptions(DEVELOPER, bundle_dir=place, require_exact_agent_version=False)
    assert find(around, options).paths.version.agent_protocol_revision == 2


def test_a_tampered_install_is_healed_from_the_bundle_or_is_an_error(tmp_path: Path, around: HostSurroundings) -> None:
    options = KernelBundleOptions(CONTAINER, bundle_dir=make_bundle(tmp_path / "b", "container"))
    assert find(around, options).done is Installation.NEW
    assert find(around, options).done is Installation.PRESENT
    installed = Path(around.environ["HOME"]) / ".vz/linux/container"
    (installed / "youki").unlink()
    (installed / "youki").write_bytes(b"somebody else's")
    with pytest.raises(HashMismatch, match=str(installed / "youki")):
        find(around, KernelBundleOptions(CONTAINER))
    assert find(around, options).done is Installation.HEALED
    assert find(around, KernelBundleOptions(CONTAINER)).done is Installation.PRESENT


@pytest.mark.parametrize("wrong", ["half", "no json", "other profile"])
def test_an_install_that_is_none(tmp_path: Path, around: HostSurroundings, wrong: str) -> None:
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
    assert find(around, options).done is (Installation.REPLACED if wrong == "other profile" else Installation.HEALED)
    assert names(installed) == FOUR


def test_realizing_is_the_last_resort(tmp_path: Path, around: HostSurroundings) -> None:
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
    assert (healed.source, healed.done) == ("realized", Installation.HEALED)
    again = run(accept_installed=False)
    assert (again.source, again.done, len(calls)) == ("realized", Installation.PRESENT, 3)


def test_verify_changes_nothing(tmp_path: Path, around: HostSurroundings) -> None:
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
