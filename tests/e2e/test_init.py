"""The guest's `init` when things are missing, broken or hang: a line on the console each, and an agent that answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.guests import LIMIT_SECS, Console, archive, shell
from vzrepro.errors import VzreproError
from vzrepro.vm import boot, qemu

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="QEMU for arm64 is not installed")

INITRAMFS = Path(__file__).parents[2] / "recipes/initramfs"


class Lab:
    """Boots guests of the bundle that are made a little wrong."""

    def __init__(self, bundle: Path, programs: boot.HostPrograms, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guest = boot.of_bundle(bundle)
        self.programs = programs
        self.monkeypatch = monkeypatch
        self.console = Console()

    def network(self, netdev: str | None) -> None:
        """Put another network behind the card, or take the card away."""
        real = qemu.arguments

        def arguments(*given: object, **named: object) -> list[str]:
            words = real(*given, **named)  # type: ignore[arg-type]
            at = words.index("-netdev")
            return [*words[:at], *(["-netdev", netdev, *words[at + 2 : at + 4]] if netdev else []), *words[at + 4 :]]

        self.monkeypatch.setattr(qemu, "arguments", arguments)

    @contextlib.contextmanager
    def running(self, command_line: str = "", **changes: object) -> Iterator[boot.Vm]:
        guest = replace(self.guest, command_line=f"{self.guest.command_line} {command_line}", **changes)
        options = {"programs": self.programs, "timeout_secs": LIMIT_SECS, "on_console": self.console}
        with boot.running(guest, **options) as vm:
            vm.agent.ping(LIMIT_SECS)
            yield vm
            vm.power_off()


@pytest.fixture
def lab(bundle: Path, programs: boot.HostPrograms, monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(bundle, programs, monkeypatch)


def test_what_is_not_there_is_said(lab: Lab, tmp_path: Path) -> None:
    lab.network(None)
    fstab = (INITRAMFS / "fstab").read_text() + "none /nowhere nosuchfs defaults 0 0\n"
    extra = archive(tmp_path / "fstab.cpio", {"/etc/fstab": fstab, "/etc/sysctl.conf": "kernel.nonsense = 1\n"})
    share = qemu.Share("vz-mount-5", tmp_path)
    words = "vz.mount.3=/x vz.mount.5=/a/../b vz.disk=/mnt/disk"
    with lab.running(words, extra_initramfs=(extra,), shares=(share,)) as vm:
        assert "lo" in shell(vm.agent, "ip addr")
    said = [line for line in lab.console.lines if line.startswith("vz-init: ")]
    assert said[:-2] == [
        "vz-init: start",
        "vz-init: not everything in /etc/fstab could be mounted",
        "vz-init: network: no network card; there is only lo",
        "vz-init: share vz-mount-3: on the command line, but not offered by the host",
        "vz-init: share vz-mount-5: target '/a/../b' is not an absolute path without '..'",
        "vz-init: disk could not be mounted on /mnt/disk",
    ]
    assert said[-2].startswith("vz-init: agent start at ")
    assert any("kernel.nonsense" in line for line in lab.console.lines)


def test_a_guest_without_any_mount_still_has_an_agent(lab: Lab, tmp_path: Path) -> None:
    extra = archive(tmp_path / "fstab.cpio", {"/etc/fstab": "# nothing\n"})
    with lab.running(extra_initramfs=(extra,)) as vm:
        assert shell(vm.agent, "echo /proc/*") == "/proc/*\n"
    assert "vz-init: the kernel command line could not be read" in lab.console.lines


def test_dhcp_that_never_answers_holds_nothing(lab: Lab) -> None:
    lab.network("hubport,id=net,hubid=0")
    with lab.running():
        lab.console.wait_for("vz-init: network: no DHCP lease on eth0; trying on")


def test_a_lease_gives_address_route_and_name_servers(lab: Lab) -> None:
    with lab.running() as vm:
        lab.console.wait_for("vz-init: network: eth0 has 10.0.2.15/")
        assert "default via 10.0.2.2 dev eth0" in shell(vm.agent, "ip route")
        assert "nameserver 10.0.2.3" in shell(vm.agent, "cat /etc/resolv.conf")


def test_shares_that_nobody_serves_are_given_up(lab: Lab, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("rootfs", "hangs", "fine")]
    for folder in folders:
        folder.mkdir()
    (folders[2] / "file").write_text("there\n")
    servers: list[int] = []
    real = qemu.wait_for_socket

    def wait_for_socket(path: Path, child: qemu.Child) -> None:
        real(path, child)
        if path.name.startswith("share"):
            servers.append(child.pid)

    lab.monkeypatch.setattr(qemu, "wait_for_socket", wait_for_socket)

    class Stops(Console):
        def __call__(self, line: str) -> None:
            if line == "vz-init: start":
                for pid in servers[:2]:
                    os.kill(pid, signal.SIGSTOP)
            super().__call__(line)

    lab.console = Stops()
    tags = ("rootfs", "vz-mount-0", "vz-mount-1")
    shares = tuple(qemu.Share(tag, folder) for tag, folder in zip(tags, folders, strict=True))
    with lab.running("vz.mount.0=/hangs vz.mount.1=/fine", shares=shares) as vm:
        assert shell(vm.agent, "cat /fine/file") == "there\n"
        for pid in servers[:2]:
            os.kill(pid, signal.SIGCONT)
    for line in (
        "vz-init: rootfs: could not be set up (nothing within 10 s); the agent runs in the initramfs",
        "vz-init: share vz-mount-0 could not be mounted on /hangs (nothing within 10 s)",
    ):
        assert line in lab.console.lines


def test_a_host_that_stops_serving_does_not_hold_the_power_off(lab: Lab, tmp_path: Path) -> None:
    servers: list[int] = []
    real = qemu.wait_for_socket

    def wait_for_socket(path: Path, child: qemu.Child) -> None:
        real(path, child)
        servers.append(child.pid)

    lab.monkeypatch.setattr(qemu, "wait_for_socket", wait_for_socket)
    lab.monkeypatch.setattr(boot, "_POWER_OFF_SECS", LIMIT_SECS)

    class Resumes(Console):
        def __call__(self, line: str) -> None:
            super().__call__(line)
            if "reboot: Power down" in line:  # QEMU itself waits for virtiofsd
                os.kill(servers[-1], signal.SIGCONT)

    lab.console = Resumes()
    with lab.running(shares=(qemu.Share("vz-mount-0", tmp_path),)) as vm:
        shell(vm.agent, "dd if=/dev/zero of=/mnt/vz-mount-0/big bs=1M count=4 2>&1")
        os.kill(servers[-1], signal.SIGSTOP)
        vm.agent.exec("/bin/busybox", ["touch", "/mnt/vz-mount-0/late"])
    assert "vz-init: sync failed (nothing within 10 s)" in lab.console.lines


def test_an_agent_that_crashes_in_a_loop(lab: Lab, tmp_path: Path) -> None:
    script = "#!/bin/sh\necho >> /run/starts\n[ $(wc -l < /run/starts) -lt 4 ] || kill -USR2 1\nexit 3\n"
    extra = archive(tmp_path / "agent.cpio", {"/sbin/vz-guest-agent": script})
    with (
        pytest.raises(VzreproError, match="ended with exit code 0 before the guest's agent was ready") as error,
        lab.running(extra_initramfs=(extra,)),
    ):
        pass
    assert "waited for: the agent to listen on its vsock port" in str(error.value)
    ended = [line for line in lab.console.lines if "agent ended" in line]
    assert ended[:3] == [f"vz-init: agent ended with status 3; next start in {secs} s" for secs in (0, 1, 2)]


def test_a_hosts_root_file_system_is_overlaid_and_never_changes(lab: Lab, tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/hostname").write_text("from the host\n")
    with lab.running(
        "vz.mount.0=/work", shares=(qemu.Share("rootfs", rootfs), qemu.Share("vz-mount-0", tmp_path))
    ) as vm:
        program = "/run/vz/busybox"  # this root has no program of its own; it can be powered off all the same
        said = shell(vm.agent, f"for c in cat touch ls; do {program} $c /etc/hostname; done", program)
        assert said == "from the host\n/etc/hostname\n"
        assert "rootfs" in shell(vm.agent, f"{program} ls /work; {program} touch /etc/new /work/new", program)
    assert sorted(path.name for path in rootfs.rglob("*")) == ["etc", "hostname"]
    assert (tmp_path / "new").exists()
