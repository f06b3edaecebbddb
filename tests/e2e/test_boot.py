"""`vzrepro vm boot`, as a user runs it: the realized bundle boots under the host's QEMU and answers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BOOT = [sys.executable, "-m", "vzrepro", "vm", "boot", "container-bundle"]

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="QEMU for arm64 is not installed")


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


def descendants(pid: int) -> set[int]:
    """The children, grandchildren … of a process."""
    children: dict[int, set[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, set()).add(int(path.parent.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = set().union(*(children.get(one, set()) for one in new)) - found
        found |= new
    return found


def test_the_bundle_boots_and_its_agent_answers() -> None:
    done = subprocess.run([*BOOT, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    phases = [line["name"] for line in lines if line.get("event") == "phase"]
    assert phases == ["init", "agent", "ready", "answer", "off"]
    secs = [line["secs"] for line in lines if line.get("event") == "phase"]
    assert secs == sorted(secs)
    assert lines[-1]["agent_version"] is not None
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
        deadline = time.monotonic() + 120
        while len(ours := descendants(command.pid) & guests()) < 2:
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(command.pid, number)
        command.communicate(timeout=60)
    finally:
        command.kill()
        command.communicate()
    deadline = time.monotonic() + 30
    while left := ours & guests():
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)
    if number == signal.SIGINT:
        assert command.returncode == 130
