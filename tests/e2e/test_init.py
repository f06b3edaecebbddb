"""The guest's `init` when things are missing, broken or hang: a line on the console each, and an agent that answers."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.guests import LIMIT_SECS, Console, archive, needs_qemu, shell
from tests.programs import PATH, USES
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import boot, qemu

pytestmark = needs_qemu

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

    def servers(self) -> list[int]:
        """The processes that serve a guest's devices, shares last, as they are started."""
        servers: list[int] = []
        real = qemu.wait_for_socket

        def wait_for_socket(path: Path, child: qemu.Child) -> None:
            real(path, child)
            servers.append(child.pid)

        self.monkeypatch.setattr(qemu, "wait_for_socket", wait_for_socket)
        return servers

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
        "vz-init: of /etc/sysctl.conf could not be set: kernel.nonsense",
        "vz-init: network: no network card; there is only lo",
        "vz-init: share vz-mount-5: target '/a/../b' is not an absolute path without '..'",
        "vz-init: share vz-mount-3: on the command line, but not offered by the host",
        "vz-init: disk could not be mounted on /mnt/disk",
    ]
    assert said[-2].startswith("vz-init: agent start at ")


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


@contextlib.contextmanager
def hanging_up(name: str) -> Iterator[int]:
    """A server that ends each connection at once: its port."""
    with socketserver.ThreadingTCPServer((name, 0), socketserver.BaseRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_host_s_loopback_is_out_of_reach_and_its_other_addresses_are_not(lab: Lab) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent: it only says which address the host has
        own = probe.getsockname()[0]
    with hanging_up("127.0.0.1") as local, hanging_up(own) as public, lab.running() as vm:
        lab.console.wait_for("vz-init: network: eth0 has 10.0.2.15/")
        for place, port, what in (("10.0.2.2", local, "refused"), (own, public, "reached")):
            said = shell(vm.agent, f"nc {place} {port} < /dev/null && echo reached || echo refused")
            assert said == f"{what}\n"


def test_shares_that_nobody_serves_are_given_up(lab: Lab, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("rootfs", "hangs", "fine")]
    for folder in folders:
        folder.mkdir()
    (folders[2] / "file").write_text("there\n")
    servers = lab.servers()

    class Stops(Console):
        def __call__(self, line: str) -> None:
            if line == "vz-init: start":
                for pid in servers[-3:-1]:
                    os.kill(pid, signal.SIGSTOP)
            super().__call__(line)

    lab.console = Stops()
    tags = ("rootfs", "vz-mount-0", "vz-mount-1")
    shares = tuple(qemu.Share(tag, folder) for tag, folder in zip(tags, folders, strict=True))
    with lab.running("vz.mount.0=/hangs vz.mount.1=/fine", shares=shares) as vm:
        assert shell(vm.agent, "cat /fine/file") == "there\n"
        for pid in servers[-3:-1]:
            os.kill(pid, signal.SIGCONT)
    for line in (
        "vz-init: rootfs: could not be set up (nothing within 10 s); the agent runs in the initramfs",
        "vz-init: share vz-mount-0 could not be mounted on /mnt/vz-mount-0 /hangs (nothing within 10 s)",
    ):
        assert line in lab.console.lines


def test_a_host_that_stops_serving_does_not_hold_the_power_off(lab: Lab, tmp_path: Path) -> None:
    servers = lab.servers()
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
    extra = archive(tmp_path / "agent.cpio", {"/layers/base/usr/lib/vz/vz-guest-agent": script})
    with (
        pytest.raises(VzreproError, match="ended with exit code 0 before the guest's agent was ready") as error,
        lab.running(extra_initramfs=(extra,)),
    ):
        pass
    assert "waited for: the agent to listen on its vsock port" in str(error.value)
    ended = [line for line in lab.console.lines if "agent ended" in line]
    assert ended[:3] == [f"vz-init: agent ended with status 3; next start in {secs} s" for secs in (0, 1, 2)]


IMAGES: dict[str, dict[str, Any]] = {
    # Debian and its like, shared by a host that lets nobody write.
    "merged": {
        "links": {"bin": "usr/bin", "sbin": "usr/sbin"},
        "own": ["usr/bin/ls", "usr/bin/ip", "usr/sbin/mke2fs"],
        "read_only": True,
    },
    "merged by absolute links": {
        "links": {"bin": "/usr/bin", "sbin": "/usr/sbin"},
        "own": ["usr/bin/ls", "usr/bin/ip", "usr/sbin/mke2fs"],
    },
    # A program in any directory of PATH wins over the applet in any other.
    "split": {"own": ["bin/ls", "bin/ip", "sbin/mke2fs", "usr/bin/less", "usr/sbin/vi", "usr/local/bin/du"]},
    # Its busybox is one of few applets: what links to it finds ours, and no more is missing.
    "with a busybox": {"links": {"bin/cat": "/bin/busybox"}, "own": ["bin/busybox", "usr/bin/less"]},
    "with its programs elsewhere": {"links": {"bin": "/system/bin"}, "own": ["system/bin/ls"]},
}


@pytest.mark.parametrize("kind", IMAGES)
def test_what_the_image_has_wins_and_what_it_lacks_is_there(lab: Lab, tmp_path: Path, kind: str) -> None:
    image = IMAGES[kind]
    rootfs = tmp_path / "rootfs"
    for name in image["own"]:
        program = rootfs / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/busybox sh\necho own $0\n")
        program.chmod(0o755)
    for name, target in image.get("links", {}).items():
        (rootfs / name).parent.mkdir(parents=True, exist_ok=True)
        (rootfs / name).symlink_to(target)
    before = sorted(rootfs.rglob("*"))
    with lab.running(shares=(qemu.Share("rootfs", rootfs, image.get("read_only", False)),)) as vm:
        own = {Path(name).name for name in image["own"]} - {"busybox"}
        for name in own:
            assert shell(vm.agent, f"export PATH={PATH}; {name}").startswith("own /"), name
        ours = sorted({*USES, "wget"} - own - {"ls", "cat"})
        which = f"export PATH={PATH}; for a in {' '.join(ours)}; do readlink -f $(which $a); done | sort -u"
        assert shell(vm.agent, which) == "/usr/lib/vz/busybox\n"
        script = "/bin/busybox echo ours; cat /dev/null && /bin/awk 'BEGIN { print 6 * 7 }'"
        assert shell(vm.agent, f"/bin/sh -c {shlex.quote(script)}") == "ours\n42\n"
    assert sorted(rootfs.rglob("*")) == before
    assert not [line for line in lab.console.lines if line.startswith("vz-init: rootfs")]


@pytest.mark.parametrize(
    ("given", "expected"),
    [("nameserver 192.0.2.1\n", "192.0.2.1"), ("", "10.0.2.3"), (None, "10.0.2.3"), ("link", "10.0.2.3")],
)
def test_name_servers_of_the_image(lab: Lab, tmp_path: Path, given: str | None, expected: str) -> None:
    file = tmp_path / "rootfs/etc/resolv.conf"
    file.parent.mkdir(parents=True)
    if given == "link":
        file.symlink_to("../run/systemd/resolve/stub-resolv.conf")
    elif given is not None:
        file.write_text(given)
    with lab.running(shares=(qemu.Share("rootfs", tmp_path / "rootfs"),)) as vm:
        lab.console.wait_for("vz-init: network: eth0 has")
        assert shell(vm.agent, "cat /etc/resolv.conf") == f"nameserver {expected}\n"


def test_an_image_that_cannot_be_the_root(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs/run").symlink_to("/elsewhere")
    with lab.running(shares=(qemu.Share("rootfs", tmp_path / "rootfs"),)) as vm:
        assert shell(vm.agent, "ls -d /vz-rootfs 2> /dev/null || ls /init") == "/init\n"
    assert [line for line in lab.console.lines if line.startswith("vz-init: rootfs")] == [
        "vz-init: rootfs: /run is not a directory",
        "vz-init: rootfs: could not be set up; the agent runs in the initramfs",
    ]


def test_a_root_file_system_that_is_not_served_for_a_while(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    servers = lab.servers()
    with lab.running(shares=(qemu.Share("rootfs", tmp_path),)) as vm:
        os.kill(servers[-1], signal.SIGSTOP)
        try:
            vm.agent.ping(LIMIT_SECS)
            waiting = vm.agent.exec("/bin/busybox", ["cat", "/vz-rootfs/file"])
        finally:
            os.kill(servers[-1], signal.SIGCONT)
        assert b"".join(event.stdout for event in waiting) == b"of the host\n"


def test_memory_is_taken_when_asked_for(lab: Lab) -> None:
    with lab.running("memhog_mb=64 memhog_mb=64m memhog_mb=4096") as vm:
        lab.console.wait_for("vz-init: memhog_mb: 64 MB taken")
        lab.console.wait_for("vz-init: memhog_mb: '64m' is not a number of MB")
        lab.console.wait_for("vz-init: memhog_mb: only ")
        shared = "sed -n 's/^Shmem: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
        assert int(shell(vm.agent, shared)) >= 64 << 10


def test_a_guest_without_an_agent_shows_its_devices_and_memory(lab: Lab) -> None:
    guest = replace(lab.guest, command_line=f"{lab.guest.command_line} vz_idle=1")
    program = qemu.find_qemu(lab.programs.qemu)
    words = qemu.arguments(guest, qemu.accelerator(program), qemu.Vsock(3))
    at = next(number for number, word in enumerate(words) if word.startswith("vhost-vsock-pci"))
    with qemu.Child(program, [*words[: at - 1], *words[at + 1 :]], on_line=lab.console):
        lab.console.wait_for("vz-init: idle")
    said = "\n".join(lab.console.lines)
    assert re.search(r"^[0-9a-f]+-[0-9a-f]+ : System RAM$", said, re.MULTILINE)
    assert re.search(r"^MemTotal: +[0-9]+ kB$", said, re.MULTILINE)
    assert re.search(r"^virtio_net/virtio[0-9]+$", said, re.MULTILINE)
    assert "agent start" not in said


def test_a_hosts_root_file_system_is_overlaid_and_never_changes(lab: Lab, tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/hostname").write_text("from the host\n")
    with lab.running(
        "vz.mount.0=/work", shares=(qemu.Share("rootfs", rootfs), qemu.Share("vz-mount-0", tmp_path))
    ) as vm:
        said = shell(vm.agent, "for c in cat touch ls; do $c /etc/hostname; done")
        assert said == "from the host\n/etc/hostname\n"
        assert "rootfs" in shell(vm.agent, "ls /work; touch /etc/new /work/new")
    assert sorted(path.name for path in rootfs.rglob("*")) == ["etc", "hostname"]
    assert (tmp_path / "new").exists()
