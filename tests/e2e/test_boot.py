"""`vzrepro vm boot`, as a user runs it: the realized bundle boots under the host's QEMU and answers."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guests import LIMIT_SECS, archive, descendants, needs_qemu
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import boot

ROOT = Path(__file__).parents[2]
BOOT = [sys.executable, "-m", "vzrepro", "vm", "boot", "container-bundle"]

pytestmark = needs_qemu


def guests() -> set[int]:
    """The processes of QEMU and the vsock device on this machine."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().startswith(("qemu-system-aar", "vhost-device-vs")):
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def test_the_bundle_boots_and_its_agent_answers() -> None:
    done = subprocess.run([*BOOT, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    phases = [line["name"] for line in lines if line.get("event") == "phase"]
    assert phases == ["init", "agent", "ready", "answer", "off"]
    secs = [line["secs"] for line in lines if line.get("event") == "phase"]
    assert secs == sorted(secs)
    # On a busy host the agent may answer a question before its own message has come; only that tells its version.
    assert (lines[-1]["agent_version"] is not None) == lines[-1]["pushed"]
    assert lines[-1]["system"]["agent_protocol_revision"] == 1


def test_a_guest_that_is_given_no_time_fails_with_its_console() -> None:
    done = subprocess.run([*BOOT, "--timeout-secs", "0.1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 101
    assert "waited for: the kernel to start /init" in done.stderr
    assert "--timeout-secs" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_guest_outlives_us(number: signal.Signals) -> None:
    command = subprocess.Popen(BOOT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + LIMIT_SECS
        while len(ours := descendants(command.pid).keys() & guests()) < 2:
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(command.pid, number)
        command.communicate(timeout=LIMIT_SECS)
    finally:
        command.kill()
        command.communicate()
    deadline = time.monotonic() + LIMIT_SECS
    while left := ours & guests():
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert command.returncode == 130


def test_a_panic_is_shown_with_its_trace(bundle: Path, programs: boot.HostPrograms, tmp_path: Path) -> None:
    extra = archive(tmp_path / "init.cpio", {"/init": "#!/bin/sh\necho going\nexit 3\n"})
    guest = replace(boot.of_bundle(bundle), extra_initramfs=(extra,))
    with (
        pytest.raises(VzreproError, match="the guest's kernel panicked: Attempted to kill init!") as error,
        boot.running(guest, programs=programs, timeout_secs=LIMIT_SECS),
    ):
        pass
    assert error.value.reason is not None
    lines = [line.strip() for line in error.value.reason.splitlines()]
    assert "going" in lines
    trace = lines.index(next(line for line in lines if line.endswith("Call trace:")))
    assert len([line for line in lines[trace:] if "] " in line]) > 5


def test_a_panic_in_use_is_shown_as_well(bundle: Path, programs: boot.HostPrograms, tmp_path: Path) -> None:
    # PID 1 cannot be killed from inside; one that ends when it is asked to panics the kernel.
    with (bundle / "initramfs.img").open("rb") as file:
        assert b"trap 'power halt' USR1" in file.read()
    script = (Path(__file__).parents[2] / "recipes/initramfs/init").read_text()
    changed = script.replace("trap 'power halt' USR1", "trap 'exit 4' USR1")
    assert changed != script
    extra = archive(tmp_path / "init.cpio", {"/init": changed})
    guest = replace(boot.of_bundle(bundle), extra_initramfs=(extra,))
    with (
        pytest.raises(VzreproError, match="the guest's kernel panicked: Attempted to kill init!") as error,
        boot.running(guest, programs=programs, timeout_secs=LIMIT_SECS) as vm,
    ):
        for _event in vm.agent.exec("/bin/sh", ["-c", "kill -USR1 1; sleep 600"]):
            pass
    assert "Call trace:" in str(error.value)


def test_another_protocol_revision_is_refused(
    bundle: Path, programs: boot.HostPrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot, "AGENT_PROTOCOL_REVISION", 2)
    with (
        pytest.raises(VzreproError, match="agent speaks protocol revision 1, this host 2"),
        boot.running(boot.of_bundle(bundle), programs=programs, timeout_secs=LIMIT_SECS),
    ):
        pass


def test_two_guests_at_once(bundle: Path, programs: boot.HostPrograms) -> None:
    guest, options = boot.of_bundle(bundle), {"programs": programs, "timeout_secs": LIMIT_SECS}
    with boot.running(guest, **options) as one, boot.running(guest, **options) as two:
        assert one.vsock.cid != two.vsock.cid
        for vm in (one, two):
            vm.agent.ping(LIMIT_SECS)
        one.power_off()
        two.agent.ping(LIMIT_SECS)
        two.power_off()
