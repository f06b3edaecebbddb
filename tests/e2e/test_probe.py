"""Capabilities in booted guests: `vzrepro vm probe` as a user runs it, and the recipe's runner without its sandbox."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PROJECT, Cli
from vzrepro import metadata

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="QEMU for arm64 is not installed")

COMMON = "btrfs_snapshots device_mapper dm_crypt ext4_root hvc0_serial io_uring netns overlayfs seccomp virtiofs vsock"
CONTAINER = {*COMMON.split(), "container_sandbox", "nfsd"}


def rows(printed: str) -> dict[str, dict[str, Any]]:
    documents = map(json.loads, printed.splitlines())
    return {document["capability"]: document for document in documents if "capability" in document}


def test_a_bundle_shows_in_its_guest_what_it_declares(project: Cli, bundle: Path) -> None:
    found = rows(project.run("vm", "probe", "container-bundle", "--timeout-secs", "600", "--json").stdout)
    declared = {name for name, row in found.items() if row["declared"] == "yes"}
    assert declared == CONTAINER == set(metadata.read(bundle).capabilities)
    assert {row["guest"] for row in found.values()} == {"PROVEN"}
    assert {row["config"] for name, row in found.items() if name in declared} <= {"yes", None}
    assert {"absent:tun", "absent:kvm", "absent:ikconfig", "absent:9p"} <= set(found)


def test_a_bundle_that_declares_too_much_is_found_out(project: Cli, bundle: Path, tmp_path: Path) -> None:
    liar = tmp_path / "liar"
    shutil.copytree(bundle, liar)
    version = json.loads((liar / "version.json").read_text())
    version["capabilities"] = ["flying", "nested_virt", "tun", "vsock"]
    (liar / "version.json").chmod(0o644)
    (liar / "version.json").write_text(json.dumps(version))
    found = rows(project.run("vm", "probe", str(liar), "--timeout-secs", "600", "--json", code=1).stdout)
    assert {name: row["guest"] for name, row in found.items() if row["declared"] == "yes"} == {
        "flying": "INCONCLUSIVE",
        "nested_virt": "FAILED",
        "tun": "FAILED",
        "vsock": "PROVEN",
    }
    assert found["tun"]["detail"] == "/dev/net/tun: No such file or directory (os error 2)"
    # What the profile is known for is shown as well.
    assert (found["dm_crypt"]["declared"], found["dm_crypt"]["guest"]) == ("no", "PROVEN")


def test_a_directory_that_is_no_bundle_is_refused(project: Cli, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").touch()
    assert "is not a boot bundle" in project.run("vm", "probe", str(tmp_path), code=2).stderr


@pytest.fixture(scope="module")
def inputs(project: Cli) -> dict[str, Path]:
    """What the recipe `container-probes` sees below /in, but for what is wanted of it."""
    names = ("kernel-container", "initramfs", "youki", "probes", "vhost-device-vsock", "virtiofsd")
    return dict(zip(("kernel", *names[1:]), project.realize(*names), strict=True))


def run(inputs: dict[str, Path], place: Path, capabilities: dict[str, str], absent: list[str]) -> Any:
    for name in ("in", "out", "build"):
        (place / name).mkdir()
    for name, path in inputs.items():
        (place / "in" / name).symlink_to(path)
    wanted = {"profile": "container", "capabilities": capabilities, "absent": absent}
    (place / "in/wanted.json").write_text(json.dumps(wanted))
    return subprocess.run(
        [sys.executable, PROJECT / "recipes/probes/run.py"],
        cwd=place / "build",
        env={**os.environ, "VZ_IN": str(place / "in"), "VZ_OUT": str(place / "out")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_qemu_gives_the_report_of_the_build(project: Cli, inputs: dict[str, Path], tmp_path: Path) -> None:
    built = (project.realize("container-probes")[0] / "probes.json").read_text()
    profile = json.loads((inputs["probes"] / "profiles.json").read_text())["container"]
    done = run(inputs, tmp_path, profile["capabilities"], profile["absent"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out/probes.json").read_text() == built


def test_a_capability_that_fails_fails_the_build(inputs: dict[str, Path], tmp_path: Path) -> None:
    done = run(inputs, tmp_path, {"tun": "tun", "vsock": "vsock"}, ["tun"])
    assert done.returncode == 1
    assert "probes: tun: FAILED: /dev/net/tun: No such file or directory" in done.stderr
    assert "vsock: FAILED" not in done.stderr
    assert not (tmp_path / "out/probes.json").exists()


def test_a_guest_that_never_comes_up_fails_the_build_with_its_console(inputs: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "initramfs.img").touch()  # vz-probe alone, no /init
    done = run({**inputs, "initramfs": empty}, tmp_path, {"vsock": "vsock"}, [])
    assert done.returncode == 1
    assert "probes: waited for the agent to listen: QEMU ended" in done.stderr
    assert "Kernel panic - not syncing: Attempted to kill init!" in done.stdout
