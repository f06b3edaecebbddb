"""Bundles for hosts that do not know every capability: exported, installed, and found again by vzrepro."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import CONTAINER, CONTENT, DEVELOPER, FOUR, find, make_bundle, make_surroundings, names
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.bundle import HostSurroundings, Installation, KernelBundleOptions, KernelProfile, examine, export
from vzrepro.guest.metadata import KNOWN_SINCE, OLDEST_HOST
from vzrepro.proof.attest.statement import files_named

NEW = ["device_mapper", "dm_crypt", "memory_reclaim", "snapshot_safe"]
HOST = "v0.3.15"


@pytest.fixture
def around(tmp_path: Path) -> HostSurroundings:
    return make_surroundings(tmp_path)


def make_new(place: Path, profile: KernelProfile = CONTAINER, **changes: Any) -> Path:
    """A bundle that declares everything, and a key that nobody knows yet."""
    capabilities = sorted({*profile.default_capabilities, *NEW})
    return make_bundle(place, profile, capabilities=capabilities, to_come={"b": 1, "a": [2]}, **changes)


def document(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "version.json").read_text())
    return found


def unpacked(archive: Path, place: Path) -> Path:
    with tarfile.open(archive) as packed:
        packed.extractall(place, filter="data")
    return place


@pytest.mark.parametrize("profile", KernelProfile)
def test_an_export_leaves_out_what_the_host_does_not_know(tmp_path: Path, profile: KernelProfile) -> None:
    source = make_new(tmp_path / "b", profile)
    whole, *_ = export(source, "1", tmp_path / "whole")
    made, *_ = export(source, "1", tmp_path / "out", host_version=HOST)
    assert (list(whole.unknown), whole.left_out) == (NEW, ())
    assert (made.unknown, list(made.left_out)) == ((), NEW)
    found = unpacked(made.path, tmp_path / "unpacked")
    before = document(source)
    assert document(found) == {**before, "capabilities": [name for name in before["capabilities"] if name not in NEW]}
    assert list(document(found)) == list(before)
    assert {name: (found / name).read_bytes() for name in CONTENT} == CONTENT
    assert (tmp_path / "whole" / made.path.name).read_bytes() != made.path.read_bytes()
    assert document(source) == before


def test_a_host_that_knows_all_gets_the_very_same_bytes(tmp_path: Path) -> None:
    """What only older names are declared of is packed as it lies there."""
    source = make_bundle(tmp_path / "b", "container")
    (source / "version.json").write_text(json.dumps(document(source)))  # not as we would write it
    [whole], [made] = export(source, "1", tmp_path / "whole"), export(source, "1", tmp_path / "out", host_version=HOST)
    assert whole.path.read_bytes() == made.path.read_bytes()
    assert (made.unknown, made.left_out) == ((), ())


@pytest.mark.parametrize("version", ["0.3.15", "0.4.0", "7.0"])
def test_newer_hosts_count_as_the_newest_that_is_known(tmp_path: Path, version: str) -> None:
    [made] = export(make_new(tmp_path / "b"), "1", tmp_path / "out", host_version=version)
    assert list(made.left_out) == NEW


@pytest.mark.parametrize("version", ["0.3.14", "latest"])
def test_a_wrong_host_writes_nothing(tmp_path: Path, version: str, around: HostSurroundings) -> None:
    source = make_new(tmp_path / "b")
    with pytest.raises(UsageError, match=r"nothing is known|is not the version"):
        export(source, "1", tmp_path / "out", host_version=version)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"nothing is known|is not the version"):
        find(around, KernelBundleOptions(CONTAINER, bundle_dir=source, host_version=version))
    assert names(tmp_path / "home") == []


@pytest.mark.parametrize("profile", KernelProfile)
def test_vzrepro_takes_what_it_exported_for_the_oldest_host(
    tmp_path: Path, profile: KernelProfile, around: HostSurroundings
) -> None:
    """And what it made before there were these names."""
    made, *_ = export(make_new(tmp_path / "b", profile), "1", tmp_path / "out", host_version=HOST)
    found = unpacked(made.path, tmp_path / "unpacked")
    assert find(around, KernelBundleOptions(profile, bundle_dir=found)).paths.version.profile == profile
    assert find(around, KernelBundleOptions(profile)).source == "installed"
    with pytest.raises(VzreproError, match="does not declare dm_crypt"):
        find(around, KernelBundleOptions(profile, required_capabilities=["dm_crypt"]))


def test_nothing_is_demanded_that_the_oldest_host_does_not_know() -> None:
    for profile in KernelProfile:
        assert not profile.default_capabilities & {name for name, since in KNOWN_SINCE.items() if since is None}


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text().partition("## Which hosts")[2]
    rows = re.findall(r"^\| `([a-z0-9_ ]+)` \| (v0\.3\.15|none)\b", page, re.MULTILINE)
    told = {name: None if since == "none" else OLDEST_HOST for names, since in rows for name in names.split()}
    assert told == KNOWN_SINCE


def test_what_is_installed_is_what_the_host_can_read(tmp_path: Path, around: HostSurroundings) -> None:
    linux = tmp_path / "home/.vz/linux"
    source = make_new(tmp_path / "b", DEVELOPER)
    options = KernelBundleOptions(DEVELOPER, bundle_dir=source, host_version=HOST)
    assert find(around, options).done is Installation.NEW
    assert names(linux) == ["developer", *FOUR]
    for place in (linux, linux / "developer"):
        assert set(document(place)["capabilities"]) == DEVELOPER.default_capabilities
        assert document(place)["to_come"] == {"b": 1, "a": [2]}
        assert (
            examine(place).digests["version.json"] == hashlib.sha256((place / "version.json").read_bytes()).hexdigest()
        )
    assert find(around, options).done is Installation.PRESENT
    whole = KernelBundleOptions(DEVELOPER, bundle_dir=source)
    assert find(around, whole).done is Installation.REPLACED
    assert document(linux) == document(linux / "developer") == document(source)


def test_what_is_installed_is_made_fit_for_the_host(tmp_path: Path, around: HostSurroundings) -> None:
    """Nothing is needed for that but what is installed."""
    linux = tmp_path / "home/.vz/linux"
    find(around, KernelBundleOptions(DEVELOPER, bundle_dir=make_new(tmp_path / "b", DEVELOPER)))
    options = KernelBundleOptions(DEVELOPER, host_version=HOST)
    found = find(around, options)
    assert (found.source, found.done) == ("installed", Installation.REPLACED)
    for place in (linux, linux / "developer"):
        assert set(examine(place).metadata.capabilities) == DEVELOPER.default_capabilities
    assert set(found.paths.version.capabilities) == DEVELOPER.default_capabilities
    assert find(around, options).done is Installation.PRESENT
    make_new(tmp_path / "own", CONTAINER)
    own = KernelBundleOptions(CONTAINER, install_dir=tmp_path / "own", host_version=HOST)
    assert find(around, own).done is Installation.REPLACED
    assert set(examine(tmp_path / "own").metadata.capabilities) == CONTAINER.default_capabilities


def test_what_is_required_cannot_be_left_out(tmp_path: Path, around: HostSurroundings) -> None:
    options = KernelBundleOptions(
        CONTAINER, ["nfsd", "dm_crypt"], bundle_dir=make_new(tmp_path / "b"), host_version="0.3.15"
    )
    with pytest.raises(UsageError, match=r"a host of version 0\.3\.15 does not know dm_crypt"):
        find(around, options)


def test_attestations_of_another_version_json_do_not_lie_beside(tmp_path: Path) -> None:
    """They would say that version.json is not the one that was attested."""
    from tests.unit.test_bundle_export import attestation

    source = make_new(tmp_path / "b")
    made = export(source, "1", tmp_path / "out", [attestation(source)], HOST, files_named)
    assert [archive.attestations for archive in made] == [0]
    assert not list((tmp_path / "out").glob("*.jsonl"))
    whole = export(source, "1", tmp_path / "whole", [attestation(source)], files_of=files_named)
    assert [archive.attestations for archive in whole] == [1]
