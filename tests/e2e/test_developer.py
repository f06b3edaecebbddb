"""The developer profile beside the container profile: both distributed together, and its guest can be a host itself."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from tests.e2e.test_probe import COMMON, rows
from tests.guests import needs_qemu
from vzrepro.guest import metadata

DEVELOPER = {*COMMON.split(), "nested_virt", "tun"}

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def bundles(project: Cli, bundle_of: Callable[[str], Path]) -> Path:
    """The realized `bundles`, where the developer kernel is here or in a cache."""
    bundle_of("developer")
    return project.realize("bundles")[0]


def test_both_profiles_are_whole(bundles: Path) -> None:
    assert sorted(path.name for path in bundles.iterdir()) == ["container", "developer"]
    developer = metadata.read(bundles / "developer")
    assert (developer.profile, developer.security_profile) == ("developer", "developer-nested-virt")
    assert set(developer.capabilities) == DEVELOPER
    # One initramfs and one youki serve both.
    container = metadata.read(bundles / "container")
    assert (developer.sha256_initramfs, developer.sha256_youki) == (container.sha256_initramfs, container.sha256_youki)
    assert developer.sha256_vmlinux != container.sha256_vmlinux


def test_its_guest_shows_what_it_declares(project: Cli, bundles: Path) -> None:
    probed = project.run("vm", "probe", str(bundles / "developer"), "--timeout-secs", "600", "--json")
    declared = {name: row["guest"] for name, row in rows(probed.stdout).items() if row["declared"] == "yes"}
    assert declared == dict.fromkeys(DEVELOPER, "PROVEN")


def test_it_boots_without_a_hypervisor_below_it(project: Cli, bundles: Path) -> None:
    words = ["--timeout-secs", "600", "--", "sh", "-c", "uname -r; test -c /dev/net/tun"]
    ran = project.run("vm", "exec", str(bundles / "developer"), *words)
    assert ran.stdout.strip() == metadata.read(bundles / "developer").kernel + "-vz-developer"


def test_the_archives_that_installers_know(project: Cli, bundles: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        project.run("bundle", "export", "bundles", "--version", "1.2.3", "--out", str(tmp_path / out))
    attested = {path.name for path in (tmp_path / "one").glob("*.intoto.jsonl")}  # as far as anybody has signed
    names = sorted({path.name for path in (tmp_path / "one").iterdir()} - attested)
    archives = ["vz-linux-container-v1.2.3-arm64.tar.gz", "vz-linux-developer-v1.2.3-arm64.tar.gz"]
    archives.append("vz-linux-v1.2.3-arm64.tar.gz")
    assert names == sorted([*archives, *(f"{name}.sha256" for name in archives)])
    assert attested <= {name.replace(".tar.gz", ".intoto.jsonl") for name in archives}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with tarfile.open(tmp_path / "one" / archives[2]) as archive:
        assert sorted(archive.getnames()) == ["initramfs.img", "version.json", "vmlinux", "youki"]
        inside = archive.extractfile("version.json")
        assert inside is not None
        assert json.load(inside)["profile"] == "developer"
