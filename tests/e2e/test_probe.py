"""Capabilities in booted guests: `vzrepro vm probe` as a user runs it, and the recipe's runner without its sandbox."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PROJECT, Cli
from tests.guests import needs_qemu
from vzrepro.guest import metadata
from vzrepro.guest.vm import qemu

pytestmark = needs_qemu

COMMON = (
    "btrfs_snapshots device_mapper dm_crypt ext4_root hvc0_serial io_uring memory_reclaim netns overlayfs seccomp "
    "snapshot_safe virtiofs vsock"
)
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


@pytest.mark.thorough
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
    names = ("kernel-container", "initramfs", "youki", "probes", "vhost-device-vsock", "virtiofsd", "qemu")
    return dict(zip(("kernel", *names[1:]), project.realize(*names), strict=True))


def run(
    inputs: dict[str, Path], place: Path, capabilities: dict[str, str], absent: list[str], qemu: Path | None = None
) -> Any:
    """Under the QEMU in the directory `qemu`, by default the store's."""
    for name in ("in", "out", "build"):
        (place / name).mkdir()
    for name, path in inputs.items():
        (place / "in" / name).symlink_to(path)
    wanted = {"profile": "container", "capabilities": capabilities, "absent": absent}
    (place / "in/wanted.json").write_text(json.dumps(wanted))
    return subprocess.run(
        [sys.executable, PROJECT / "recipes/probes/run.py"],
        cwd=place / "build",
        env={
            **os.environ,
            "PATH": f"{qemu or inputs['qemu']}:{os.environ['PATH']}",
            "VZ_IN": str(place / "in"),
            "VZ_OUT": str(place / "out"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="this machine has no QEMU of its own")
def test_another_qemu_gives_the_report_of_the_build(project: Cli, inputs: dict[str, Path], tmp_path: Path) -> None:
    built = (project.realize("container-probes")[0] / "probes.json").read_text()
    profile = json.loads((inputs["probes"] / "profiles.json").read_text())["container"]
    own = Path(shutil.which("qemu-system-aarch64") or "").parent
    done = run(inputs, tmp_path, profile["capabilities"], profile["absent"], own)
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
    (empty / "initramfs.img").touch()  # nothing to start
    done = run({**inputs, "initramfs": empty}, tmp_path, {"vsock": "vsock"}, [])
    assert done.returncode == 1
    assert "probes: waited for the agent to listen: QEMU ended" in done.stderr
    assert "Kernel panic - not syncing: " in done.stdout


@pytest.fixture(scope="module")
def state() -> Any:
    """The module `state.py`."""
    spec = importlib.util.spec_from_file_location("probes_state", PROJECT / "recipes/probes/state.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(inputs: dict[str, Path]) -> dict[str, Any]:
    """What `state.py` is told of a machine."""
    program = qemu.find_qemu(inputs["qemu"] / "qemu-system-aarch64")
    return {
        "qemu": [program, *qemu.machine_arguments(qemu.accelerator(program))],
        "kernel": str(inputs["kernel"] / "vmlinux"),
        "initramfs": [str(inputs["initramfs"] / "initramfs.img"), str(inputs["probes"] / "probes.cpio")],
        "vsock-device": str(inputs["vhost-device-vsock"] / "vhost-device-vsock"),
        "preload": str(inputs["probes"] / "vhost.so"),
    }


def saved(state: Any, config: dict[str, Any], command: tuple[str, ...]) -> bytes:
    """A machine's state, saved when its agent had started a command."""
    with contextlib.closing(state.started(config, state.Deadline(600))) as machine:
        state.execute(machine, command)
        return bytes(state.save(machine))


def drawn_at_once(state: Any, config: dict[str, Any], name: str, data: bytes) -> set[str]:
    """What a restored guest draws: it is asked before it runs again, so that it answers in its first moments."""
    deadline = state.Deadline(600)
    with contextlib.closing(state.Machine(config, Path.cwd() / name, deadline, state=data)) as machine:
        deadline.until("a state to be read", lambda: machine.qmp("query-status")["status"] == "paused", machine)
        machine._console.write(f"ask random {state.DRAWS}\n".encode())
        machine.qmp("cont")
        return set(machine.line("random numbers").split())


@pytest.mark.thorough
def test_guests_of_one_state_draw_alike_without_the_agent(
    state: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So what `snapshot_safe` compares is the agent's work."""
    # By itself, a kernel draws a new key each time that its uptime has grown by half, and each minute later on
    # (crng_reseed in its drivers/char/random.c). All guests of a state do so at the same moment; when that is the first
    # one after the restore, they draw nothing in common, and another state must be saved.
    for number in range(5):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        data = saved(state, config, ("/bin/busybox", "killall", "-STOP", "vz-guest-agent"))
        one, other = (drawn_at_once(state, config, name, data) for name in "ab")
        assert len(one) == len(other) == state.DRAWS
        if one & other:
            return
    raise AssertionError("no two guests of one state drew anything in common, of five states")


def test_a_restored_guest_sets_its_clock_uncalled_and_needs_its_memory(
    state: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    data = saved(state, config, state.COMMAND)
    end = time.monotonic() + state.AWAY_SECS
    with monkeypatch.context() as patch:
        patch.setattr(state, "MEMORY_MIB", state.MEMORY_MIB // 2)
        with pytest.raises(state.LostError, match="ended"):
            state.restored(config, "smaller", state.Deadline(600), data)
    assert "mem: 0x20000000 != 0x10000000" in capfd.readouterr().err
    time.sleep(max(0, end - time.monotonic()))
    with contextlib.closing(state.restored(config, "again", state.Deadline(600), data)) as machine:
        machine.shows("its clock to be right", lambda: state.is_right(machine))
