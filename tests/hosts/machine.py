"""A virtual machine as hosts of the `vz` family make it, under QEMU: their devices, share tags and command line.

Written for itself, not taken from vzrepro.guest.vm: a device that our own command line forgot would be missing here as
well. Shared with it is only what runs beside QEMU (child processes that never outlive us, the vsock device's socket).
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guests import Console
from vzrepro.guest.vm import dial, qemu
from vzrepro.guest.vm.boot import HostPrograms

LIMIT_SECS = 300.0
"""Only a broken guest meets it: an emulated one on a busy host is very slow."""

COMMAND_LINE = "console=hvc0 quiet"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a host gives a guest. `shares` are tag → directory; `targets` are where the shares vz-mount-0, 1 … are to
    be in the guest, as words of the command line; `words` follow them. Without an initramfs the kernel's root is the
    first of `disks`, which are raw files."""

    kernel: Path
    initramfs: Path | None
    shares: Mapping[str, Path] = field(default_factory=dict)
    read_only: Sequence[str] = ()
    targets: Sequence[str] = ()
    words: str = ""
    disks: Sequence[Path] = ()
    memory_mib: int = 512
    cpus: int = 1
    network: bool = True


@dataclass(slots=True)
class Machine:
    """A running machine. `servers` are the shares' virtiofsd by tag, `dial` opens a stream to the agent's port."""

    console: Console
    qemu: qemu.Child
    servers: dict[str, qemu.Child]
    dial: dial.Dial
    qmp: Qmp

    def resident_bytes(self) -> int:
        """What of the guest's memory (QEMU's shared memory) this host really has."""
        for line in Path(f"/proc/{self.qemu.pid}/status").read_text().splitlines():
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) << 10
        raise AssertionError("the kernel tells no RssShmem")


class Qmp:
    """QEMU's control socket: one command, one answer."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_SECS)
        deadline = time.monotonic() + LIMIT_SECS
        while self._socket.connect_ex(str(path)):  # QEMU binds first, and listens a little later
            assert time.monotonic() < deadline, "QEMU's control socket never listened"
            time.sleep(0.01)
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Execute a command; what it returns."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()


def eventually(done: Callable[[], bool], what: str) -> None:
    """Wait until `done()`."""
    deadline = time.monotonic() + LIMIT_SECS
    while not done():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.05)


@contextlib.contextmanager
def powered(
    hardware: Hardware, programs: HostPrograms, say: Callable[[str], object] = lambda _line: None
) -> Iterator[Machine]:
    """The machine, switched on; it ends with the context. Nothing is known of what runs in it."""
    program = qemu.find_qemu(programs.qemu)
    accelerator = qemu.accelerator(program)
    console = Console()
    cid = random.SystemRandom().randrange(3, 2**31)

    def on_line(line: str) -> None:
        say(f"guest  {line}")
        console(line)

    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vz-", ignore_cleanup_errors=True)))
        vsock = [f"vhost-vsock-pci,guest-cid={cid}"]
        if not qemu.kernel_vsock_usable():
            assert programs.vhost_device_vsock is not None
            device, streams = place / "device", place / "vsock"
            words = qemu.vsock_device_arguments(qemu.Vsock(cid, device), streams)
            child = stack.enter_context(qemu.Child(str(programs.vhost_device_vsock), words))
            qemu.wait_for_socket(device, child)
            vsock = ["vhost-user-vsock-pci,chardev=vsock", "-chardev", f"socket,id=vsock,path={device}"]

            def dial_agent() -> socket.socket:
                return dial.dial_streams(streams, dial.AGENT_PORT)
        else:

            def dial_agent() -> socket.socket:
                return dial.dial_vsock(cid, dial.AGENT_PORT)

        devices = ["-device", *vsock]
        servers = {}
        for tag, folder in hardware.shares.items():
            path = place / tag
            share = qemu.Share(tag, folder, tag in hardware.read_only)
            servers[tag] = stack.enter_context(
                qemu.Child(str(programs.virtiofsd), qemu.share_server_arguments(share, path))
            )
            qemu.wait_for_socket(path, servers[tag])
            devices += ["-chardev", f"socket,id={tag},path={path}"]
            devices += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag}"]
        for number, disk in enumerate(hardware.disks):
            devices += ["-drive", f"if=none,id=disk{number},format=raw,file={disk}"]
            devices += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        if hardware.network:
            devices += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="]

        targets = [f"vz.mount.{number}={target}" for number, target in enumerate(hardware.targets)]
        command_line = " ".join([COMMAND_LINE, *targets, *hardware.words.split()])
        say(f"host   boots {hardware.kernel} with {command_line!r}, shares {', '.join(servers) or 'none'}")
        words = [
            *("-M", "virt,gic-version=3,memory-backend=mem"),
            # Signing return addresses is a fifth of an emulated boot.
            *(["-accel", "kvm", "-cpu", "host"] if accelerator == "kvm" else ["-cpu", "max,pauth=off"]),
            *("-smp", str(hardware.cpus), "-m", f"{hardware.memory_mib}M"),
            *("-object", f"memory-backend-memfd,id=mem,size={hardware.memory_mib}M,share=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(hardware.kernel), "-append", command_line),
            *(["-initrd", str(hardware.initramfs)] if hardware.initramfs else []),
            *("-chardev", "stdio,id=console,signal=off"),
            *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"),
            *("-device", "virtio-rng-pci"),
            *("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"),
            *("-qmp", f"unix:{place}/qmp,server=on,wait=off"),
            *devices,
        ]
        child = stack.enter_context(qemu.Child(program, words, on_line=on_line))
        qemu.wait_for_socket(place / "qmp", child)
        qmp = Qmp(place / "qmp")
        stack.callback(qmp.close)
        yield Machine(console, child, servers, dial_agent, qmp)


@contextlib.contextmanager
def booted(
    hardware: Hardware, programs: HostPrograms, say: Callable[[str], object] = lambda _line: None
) -> Iterator[Machine]:
    """The machine once something listens on the agent's port: hosts know no other sign, so they dial until it does."""
    with powered(hardware, programs, say) as machine:
        # vhost-device-vsock may never answer again when it is dialled at the very moment at which the guest's driver
        # comes up; hypervisors that serve the vsock themselves have no such moment.
        machine.console.wait_for("vz-init: start")
        deadline = time.monotonic() + LIMIT_SECS
        while True:
            try:
                machine.dial().close()
                break
            except OSError:
                code = machine.qemu.wait(0.05)
                lines = "\n".join(machine.console.lines)
                assert code is None, f"QEMU ended with {code}:\n{lines}"
                assert time.monotonic() < deadline, f"no agent:\n{lines}"
        yield machine
