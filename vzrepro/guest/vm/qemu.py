"""Starts QEMU and the devices of one guest that are programs of their own (vsock, shares): the command lines, and
child processes that never outlive us.

The command line is the one that was measured to work for arm64 guests under QEMU 7.2 and 10.0; docs/guest.md says
what each part is for.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import loopback
from vzrepro.guest.vm.dial import vsock_socket

Accelerator = Literal["kvm", "tcg"]

MAX_PACKET_BYTES = 28_672
"""Largest packet vhost-device-vsock takes from a Linux 6.12 guest; bigger ones, its default, stall for ever."""

VHOST_VSOCK = Path("/dev/vhost-vsock")
_PROGRAM = "qemu-system-aarch64"
_SOCKET_SECS = 10.0
_LINE_BYTES = 1 << 16

# PSCI SYSTEM_OFF, the smallest guest there is: movz w0, #8; movk w0, #0x8400, lsl #16; hvc #0 (or smc #0, which is how
# a guest that is a hypervisor itself calls); b .
_CALL = {False: 0xD4000002, True: 0xD4000003}
_PROBE_SECS = 5.0


@dataclass(frozen=True, slots=True)
class Share:
    """A directory of the host that the guest may mount over virtiofs by its `tag`."""

    tag: str
    path: Path
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw image file, the guest's /dev/vda, /dev/vdb … in order."""

    path: Path
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Guest:
    """What is booted: the kernel's raw `Image`, its initramfs, the kernel command line, and the machine.

    `extra_initramfs` are further cpio archives, unpacked over the initramfs in order. `nested` lets the guest run
    guests of its own where the host can do that. `host_loopback` lets it reach what listens at the host's loopback, as
    10.0.2.2.
    """

    kernel: Path
    initramfs: Path
    command_line: str = "console=hvc0 quiet panic=-1 page_alloc.shuffle=1"
    cpus: int = 1
    memory_mib: int = 512
    shares: tuple[Share, ...] = ()
    disks: tuple[Disk, ...] = ()
    extra_initramfs: tuple[Path, ...] = ()
    nested: bool = False
    host_loopback: bool = False


@dataclass(frozen=True, slots=True)
class Vsock:
    """The guest's vsock address and, when a vhost-device-vsock serves it, the socket QEMU meets that at."""

    cid: int
    device_socket: Path | None = None


def find_qemu(given: Path | None = None) -> str:
    """The path of QEMU for arm64: `given`, else the host's own. Raises VzreproError with the line that installs it."""
    if found := given or shutil.which(_PROGRAM):
        return str(found)
    raise VzreproError(
        f"{_PROGRAM} is not installed",
        reason="booting a bundle needs QEMU with the arm64 system emulator, from the host's distribution",
        hint="apt-get install -y --no-install-recommends qemu-system-arm",
    )


def join_initramfs(guest: Guest, directory: Path) -> Guest:
    """`guest` with everything it unpacks in one file, made in `directory` when there is more than the initramfs."""
    if not guest.extra_initramfs:
        return guest
    joined = directory / "initramfs"
    with joined.open("wb") as file:
        for part in (guest.initramfs, *guest.extra_initramfs):
            file.write(part.read_bytes())
            file.write(b"\0" * (-file.tell() % 4))  # where the kernel looks for the next archive
    return replace(guest, initramfs=joined, extra_initramfs=())


def arguments(guest: Guest, accelerator: Accelerator, vsock: Vsock, share_sockets: Sequence[Path] = ()) -> list[str]:
    """QEMU's arguments (without the program) for `guest`, whose initramfs is joined; its console on standard output.

    `share_sockets` are where the servers of its shares listen, in the same order.
    """
    assert not guest.extra_initramfs
    return [
        *("-M", _machine(guest.nested) + ",memory-backend=mem"),
        *_cpu(accelerator),
        *("-smp", str(guest.cpus)),
        *("-m", f"{guest.memory_mib}M"),
        # Shared memory: a vhost-user device reads the guest's queues in its own process.
        *("-object", f"memory-backend-memfd,id=mem,size={guest.memory_mib}M,share=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(guest.kernel), "-initrd", str(guest.initramfs), "-append", guest.command_line),
        *("-chardev", "stdio,id=console,signal=off"),
        *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=console"),
        *("-netdev", "user,id=net", "-device", "virtio-net-pci,romfile=,netdev=net"),
        *("-device", "virtio-rng-pci"),
        *_vsock_arguments(vsock),
        *_share_arguments(guest.shares, share_sockets),
        *_disk_arguments(guest.disks),
    ]


def machine_arguments(accelerator: Accelerator) -> list[str]:
    """QEMU's arguments for the machine itself, whose memory is the object `mem`."""
    return ["-M", _machine(False) + ",memory-backend=mem", *_cpu(accelerator)]


def _machine(nested: bool) -> str:
    return "virt,gic-version=3" + (",virtualization=on" if nested else "")


def _cpu(accelerator: Accelerator) -> list[str]:
    if accelerator == "kvm":
        return ["-accel", "kvm", "-cpu", "host"]
    # Signing every return address is a fifth of an emulated boot; recipes/probes boots each kernel with it.
    return ["-accel", "tcg,thread=multi", "-cpu", "max,pauth=off"]


def _vsock_arguments(vsock: Vsock) -> list[str]:
    if vsock.device_socket is None:
        return ["-device", f"vhost-vsock-pci,guest-cid={vsock.cid}"]
    return [
        *("-chardev", f"socket,id=vsock,path={_option(vsock.device_socket)}"),
        *("-device", "vhost-user-vsock-pci,chardev=vsock"),
    ]


def _share_arguments(shares: Sequence[Share], sockets: Sequence[Path]) -> Iterator[str]:
    for number, (share, path) in enumerate(zip(shares, sockets, strict=True)):
        yield from ("-chardev", f"socket,id=share{number},path={_option(path)}")
        yield from ("-device", f"vhost-user-fs-pci,queue-size=1024,chardev=share{number},tag={share.tag}")


def _disk_arguments(disks: Sequence[Disk]) -> Iterator[str]:
    for number, disk in enumerate(disks):
        read_only = ",read-only=on" if disk.read_only else ""
        yield from (
            "-drive",
            f"if=none,id=disk{number},format=raw,discard=unmap{read_only},file={_option(disk.path)}",
        )
        yield from ("-device", f"virtio-blk-pci,drive=disk{number}")


def vsock_device_arguments(vsock: Vsock, streams: Path) -> list[str]:
    """vhost-device-vsock's arguments. The host connects to `streams` to reach a guest port, and listens on
    `<streams>_<port>` for a guest that dials out."""
    pairs = f"guest-cid={vsock.cid},socket={vsock.device_socket},uds-path={streams}"
    return ["--vm", f"{pairs},tx-buffer-size={MAX_PACKET_BYTES}"]


def share_server_arguments(share: Share, socket_path: Path) -> list[str]:
    """virtiofsd's arguments for one share."""
    # `namespace`, its strictest, needs more than a container's root may, and a process more that could be left behind.
    sandbox = "chroot" if os.geteuid() == 0 else "none"
    return [
        f"--socket-path={socket_path}",
        f"--shared-dir={share.path}",
        f"--sandbox={sandbox}",
        # As many files as this user may open; its own default asks for more, and complains.
        f"--rlimit-nofile={resource.getrlimit(resource.RLIMIT_NOFILE)[1]}",
        "--log-level=warn",
        *(["--modcaps=-mknod"] if os.geteuid() == 0 else []),  # no devices of the host, whoever asks in the guest
        *(["--readonly"] if share.read_only else []),
    ]


def _option(path: Path) -> str:
    """`path` inside a QEMU option, where a comma ends a value unless it is doubled."""
    return str(path).replace(",", ",,")


def require_linux() -> None:
    """Raise VzreproError where no guest can be booted: its memory and devices need Linux (memfd, vhost-user)."""
    if platform.system() != "Linux":
        raise VzreproError(
            f"no guest can be booted on {platform.system()}",
            reason="QEMU serves its shares and vsock over vhost-user, which needs Linux",
            hint="boot the bundle with this system's own host program, from the place that vzrepro realize prints",
        )


def kernel_vsock_usable() -> bool:
    """Whether this host's kernel can serve a guest's vsock, and may be asked by us."""
    try:
        os.close(os.open(VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC))
        vsock_socket().close()
    except OSError:
        return False
    return True


def accelerator(qemu: str, *, nested: bool = False) -> Accelerator:
    """KVM where a tiny guest (for `nested`: a tiny hypervisor) proves that it works, else TCG. An openable /dev/kvm may
    still hang its guests."""
    if platform.machine() not in ("aarch64", "arm64") or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    return "kvm" if _powers_off(qemu, "kvm", nested=nested, timeout_secs=_PROBE_SECS) else "tcg"


def _powers_off(qemu: str, accelerator: Accelerator, *, nested: bool = False, timeout_secs: float) -> bool:
    """Whether a guest of four instructions boots and switches itself off within the time."""
    with tempfile.TemporaryDirectory(prefix="vz-") as directory:
        kernel = Path(directory, "off")
        kernel.write_bytes(struct.pack("<4I", 0x52800100, 0x72B08000, _CALL[nested], 0x14000000))
        machine = ["-M", _machine(nested), *_cpu(accelerator), "-m", "64M", "-nodefaults", "-no-user-config"]
        with Child(qemu, [*machine, "-display", "none", "-no-reboot", "-kernel", str(kernel)]) as child:
            return child.wait(timeout_secs) == 0


class Child:
    """A child process in a session of its own (Ctrl-C reaches only us), which dies with us, however we end.

    `on_line` gets each line of its output, standard error included, and `on_end`, last, its exit code (negative: the
    signal); both are called from another thread. Unless `host_loopback`, it reaches nothing at the host's loopback
    (`loopback.kept_from`). Leaving the context ends the process.
    """

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        on_line: Callable[[str], object] = lambda _line: None,
        on_end: Callable[[int], object] = lambda _code: None,
        host_loopback: bool = True,
    ) -> None:
        self.name = Path(program).name
        self._ended = threading.Event()
        if shutil.which(program) is None:
            raise VzreproError(f"{program} could not be started", reason="there is no such program")

        def start() -> subprocess.Popen[bytes]:
            # setpriv and not a preexec_fn: that one needs a fork, and gRPC's fork handlers may abort the child when
            # calls are under way, as they are when a second guest is started. Without one Python uses vfork. Linux
            # alone has such a signal, and guests are booted on Linux alone (`require_linux`).
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", program, *arguments],
                # A pipe that stays open: at the end of its input QEMU would close the guest's console.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

        try:
            self._process = start() if host_loopback else loopback.kept_from(start, on_line)
        except OSError as error:
            raise VzreproError(f"{program} could not be started", reason=str(error)) from error

        def follow() -> None:
            with self._process:  # closes the pipes, waits for the end
                assert self._process.stdout is not None
                # Bounded: a guest that never ends a line must not fill our memory.
                while line := self._process.stdout.readline(_LINE_BYTES):
                    on_line(line.decode("utf-8", "replace").rstrip("\r\n"))
            self._ended.set()
            on_end(self._process.returncode)

        threading.Thread(target=follow, daemon=True).start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait(self, timeout_secs: float) -> int | None:
        """The exit code (negative: the signal), or None when the process still runs after the time."""
        return self._process.returncode if self._ended.wait(timeout_secs) else None

    def end(self) -> None:
        """Terminate the process and wait for it; kill it when it does not go within two seconds."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._ended.is_set():
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)
            self._ended.wait(2)


def wait_for_socket(path: Path, child: Child) -> None:
    """Return once `child` has made the socket `path`. Raises VzreproError when it ends or takes too long."""
    deadline = time.monotonic() + _SOCKET_SECS
    while not path.exists():
        if (code := child.wait(0.005)) is not None:
            raise VzreproError(f"{child.name} ended with exit code {code} before it served {path.name}")
        if time.monotonic() > deadline:
            raise VzreproError(f"{child.name} did not serve {path.name} within {_SOCKET_SECS:.0f} s")
