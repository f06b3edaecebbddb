"""Boots a guest under QEMU, waits for its agent, and powers it off: `running` for those who use the guest, `boot` for
those who want to know that it works."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vzrepro.base import events
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest import metadata
from vzrepro.guest.metadata import AGENT_PROTOCOL_REVISION, VERSION_FILE, Metadata
from vzrepro.guest.vm import dial as dials
from vzrepro.guest.vm import qemu, watch
from vzrepro.guest.vm.agent import AgentClient, AgentError, SystemInfo
from vzrepro.guest.vm.dial import Dial

_READY_LINE = re.compile(r"ready (?P<version>\S+) (?P<revision>\d{1,9})")
_POWER_OFF_SECS = 20.0
_ANY_CID = 0xFFFFFFFF  # VMADDR_CID_ANY
# Ready is pushed. Where the push does not come (an agent that pushes nothing, a host port that is taken), asking finds
# out as well, late enough not to disturb: seconds, doubled up to the second number.
_ASK_AFTER_SECS = (1.0, 4.0)
_ASK_AT_ONCE_SECS = (0.05, 1.0)
_READY_LINE_SECS = 2.0
# A guest that has said nothing for this long has an init that is not ours.
_SILENT_SECS = 20.0
# A guest's connections may break a little before its machine ends.
_LOSS_SECS = 3.0


@dataclass(frozen=True, slots=True)
class HostPrograms:
    """The programs that a guest needs on its host. `vhost_device_vsock` is needed where the host's kernel serves no
    vsock, `virtiofsd` for shares; without `qemu` the host's own is taken."""

    vhost_device_vsock: Path | None = None
    virtiofsd: Path | None = None
    qemu: Path | None = None


@dataclass(frozen=True, slots=True)
class BootReport:
    """A boot that succeeded. `phases` are in order, each with the seconds since QEMU was started."""

    accelerator: qemu.Accelerator
    vsock: str
    cid: int
    pushed: bool
    agent_version: str | None
    system: SystemInfo
    phases: tuple[events.Phase, ...]

    def document(self) -> dict[str, Any]:
        """The report as plain data for JSON: the fields, phases as `{name: secs}` rounded to the millisecond."""
        return {
            "accelerator": self.accelerator,
            "vsock": self.vsock,
            "cid": self.cid,
            "pushed": self.pushed,
            "agent_version": self.agent_version,
            "system": asdict(self.system),
            "phases": {phase.name: round(phase.secs, 3) for phase in self.phases},
        }


@dataclass(slots=True)
class Vm:
    """A guest whose agent listens. `agent` is connected to it; `phases` grow until it is off. `dial` opens a further
    connection to it, a bare stream."""

    agent: AgentClient
    dial: dials.Dial
    accelerator: qemu.Accelerator
    vsock: qemu.Vsock
    agent_version: str | None
    pushed: bool
    _watch: watch.Watch

    @property
    def phases(self) -> tuple[events.Phase, ...]:
        """The phases reached so far."""
        return self._watch.phases

    @property
    def console(self) -> tuple[str, ...]:
        """The last lines of the guest's console."""
        return self._watch.tail

    def reached(self, phase: str) -> None:
        """Note that a phase is reached now."""
        self._watch.reached(phase)

    def power_off(self) -> None:
        """Have the guest switch itself off, cleanly, and wait until it is off. Raises VzreproError."""
        self._watch.release()
        # init knows the signal that busybox's poweroff sends, and puts busybox into every root file system. The stream
        # may break before the exit code: the guest goes.
        with contextlib.suppress(VzreproError):
            for _event in self.agent.exec("/bin/busybox", ["kill", "-USR2", "1"], timeout_secs=_POWER_OFF_SECS):
                pass
        self._watch.wait_until_off(_POWER_OFF_SECS)


def of_bundle(bundle: Path) -> qemu.Guest:
    """The guest that a bundle (a directory with `vmlinux` and `initramfs.img`) is, on the smallest machine.

    `dataclasses.replace` makes more of it. Raises UsageError when a file is missing.
    """
    guest = qemu.Guest(bundle / "vmlinux", bundle / "initramfs.img")
    for path in (guest.kernel, guest.initramfs):
        if not path.is_file():
            raise UsageError(
                f"{bundle} is not a boot bundle",
                reason=f"it has no {path.name}",
                hint="name a bundle's directory or its target: vzrepro vm boot container-bundle",
            )
    return guest


@contextlib.contextmanager
def running(
    guest: qemu.Guest,
    *,
    programs: HostPrograms,
    timeout_secs: float,
    report: events.Report = events.ignore,
    on_console: Callable[[str], object] = lambda _line: None,
    directory: Path | None = None,
) -> Iterator[Vm]:
    """`guest`, booted and ready to be used.

    `timeout_secs` is how long the agent may take from QEMU's start; `on_console` gets each line of the guest's console,
    from another thread; sockets are made below `directory`, by default where temporary files are. QEMU and the servers
    of its devices end with the context, whatever happens; when one of them ends before that, calls to the agent fail
    and the context raises why. Raises UsageError for a share or disk that is not there, TimedOut, VzreproError.
    """
    _check_files(guest)
    program = qemu.find_qemu(programs.qemu)
    accelerator = qemu.accelerator(program, nested=guest.nested)
    cid = random.SystemRandom().randrange(3, 2**31)

    with contextlib.ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vz-", dir=directory, ignore_cleanup_errors=True))
        )
        seen = watch.Watch(report, on_console)

        def start(name: str, program: Path | str, arguments: list[str]) -> qemu.Child:
            child = qemu.Child(
                str(program),
                arguments,
                on_line=seen.console if name == watch.QEMU else seen.line,
                on_end=lambda code: seen.ended(name, code),
                host_loopback=guest.host_loopback or name != watch.QEMU,
            )
            return stack.enter_context(child)

        streams = dials.private_socket(directory, "vsock")
        proxy_path = dials.private_socket(directory, "agent")
        listener: socket.socket | None
        dial: Dial
        if qemu.kernel_vsock_usable():
            vsock = qemu.Vsock(cid)
            listener = _listen_vsock(dials.READY_PORT)

            def dial() -> socket.socket:
                return dials.dial_vsock(cid, dials.AGENT_PORT)
        else:
            if programs.vhost_device_vsock is None:
                raise VzreproError("this host's kernel serves no vsock, and there is no vhost-device-vsock either")
            device_socket = dials.private_socket(directory, "device")
            vsock = qemu.Vsock(cid, device_socket)
            listener = _listen_unix(Path(f"{streams}_{dials.READY_PORT}"))
            arguments = qemu.vsock_device_arguments(vsock, streams)
            device = start("vhost-device-vsock", programs.vhost_device_vsock, arguments)
            qemu.wait_for_socket(device_socket, device)

            def dial() -> socket.socket:
                return dials.dial_streams(streams, dials.AGENT_PORT)

        stop = threading.Event()
        stack.callback(stop.set)
        if listener is not None:
            stack.callback(_shut, listener)

        share_sockets = []
        for number, share in enumerate(guest.shares):
            if programs.virtiofsd is None:
                raise VzreproError(f"no virtiofsd to serve the share {share.tag}")
            share_sockets.append(dials.private_socket(directory, f"share{number}"))
            arguments = qemu.share_server_arguments(share, share_sockets[-1])
            server = start(f"virtiofsd of the share {share.tag}", programs.virtiofsd, arguments)
            qemu.wait_for_socket(share_sockets[-1], server)

        whole = qemu.join_initramfs(guest, directory)
        seen.started = time.monotonic()
        start(watch.QEMU, program, qemu.arguments(whole, accelerator, vsock, share_sockets))
        if listener is not None:
            threading.Thread(target=_listen_to_agent, args=(seen, listener, cid), daemon=True).start()
        pauses = _ASK_AT_ONCE_SECS if listener is None else _ASK_AFTER_SECS
        threading.Thread(target=_ask_agent, args=(seen, dial, *pauses, stop), daemon=True).start()
        ready = seen.wait_until_ready(timeout_secs)

        proxy = dials.Proxy(proxy_path, dial)
        stack.callback(proxy.close)
        client = stack.enter_context(AgentClient(proxy.target))
        stack.callback(seen.release)
        said = _READY_LINE.fullmatch(ready.line or "")
        seen.use(client.close)
        try:
            if said is None:
                left = max(1.0, seen.started + timeout_secs - time.monotonic())
                _check_revision(client.system_info(left).agent_protocol_revision)
            else:
                _check_revision(int(said["revision"]))
            yield Vm(client, dial, accelerator, vsock, said and said["version"], said is not None, seen)
        except Exception as error:
            broken = isinstance(error, AgentError) and error.status == "unavailable"
            if (loss := seen.loss(_LOSS_SECS if broken else 0)) is not None:
                raise loss from error
            raise


def boot(
    guest: qemu.Guest,
    *,
    programs: HostPrograms,
    timeout_secs: float,
    report: events.Report = events.ignore,
    on_console: Callable[[str], object] = lambda _line: None,
) -> BootReport:
    """Boot `guest`, call Ping and SystemInfo, power off. `timeout_secs` is the limit for the agent's first answer.

    Raises as `running` does, and VzreproError when the agent is not the one that the version.json beside the guest's
    kernel declares.
    """
    bundle = guest.kernel.parent
    declared = metadata.read(bundle) if (bundle / VERSION_FILE).exists() else None
    started = time.monotonic()
    with running(guest, programs=programs, timeout_secs=timeout_secs, report=report, on_console=on_console) as vm:
        vm.agent.ping(max(1.0, started + timeout_secs - time.monotonic()))
        vm.reached("answer")
        system = vm.agent.system_info()
        if declared is not None:
            _check_agent(bundle, declared, vm.agent_version, system.agent_protocol_revision)
        vm.power_off()
        return BootReport(
            accelerator=vm.accelerator,
            vsock="vhost-vsock" if vm.vsock.device_socket is None else "vhost-device-vsock",
            cid=vm.vsock.cid,
            pushed=vm.pushed,
            agent_version=vm.agent_version,
            system=system,
            phases=vm.phases,
        )


def _check_files(guest: qemu.Guest) -> None:
    for share in guest.shares:
        if not share.path.is_dir():
            raise UsageError(f"{share.path} cannot be shared with the guest", reason="it is not a directory")
    for path in (*(disk.path for disk in guest.disks), *guest.extra_initramfs):
        if not path.is_file():
            raise UsageError(f"{path} cannot be given to the guest", reason="it is not a file")


def _check_agent(bundle: Path, declared: Metadata, version: str | None, revision: int) -> None:
    for what, wanted, found in (
        ("version", declared.agent, version),
        ("protocol revision", declared.agent_protocol_revision, revision),
    ):
        if None not in (wanted, found) and wanted != found:
            raise VzreproError(
                f"{bundle}: the guest's agent {what} is {found}, but {VERSION_FILE} declares {wanted}",
                hint=f"realize the bundle again: vzrepro realize {declared.kind}-bundle",
            )


def _check_revision(found: int) -> None:
    if found != AGENT_PROTOCOL_REVISION:
        raise VzreproError(
            f"the guest's agent speaks protocol revision {found}, this host {AGENT_PROTOCOL_REVISION}",
            hint="boot a bundle that was built with this vzrepro, or use the vzrepro that the bundle was built with",
        )


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def _listen_vsock(port: int) -> socket.socket | None:
    """A listener for every guest of this host, or None when another process has it: then the agent is asked."""
    listener = dials.vsock_socket()
    try:
        listener.bind((_ANY_CID, port))
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _shut(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _listen_to_agent(seen: watch.Watch, listener: socket.socket, cid: int) -> None:
    """Take what the agent says when it listens, and tell it the time; until the listener is shut.

    An agent that was started again says it again.
    """
    while True:
        try:
            stream, peer = listener.accept()
        except OSError:
            return
        # The kernel's vsock is one for all guests of the host: another guest's line is not ours.
        if not isinstance(peer, str) and peer[0] != cid:
            stream.close()
            continue
        with stream, contextlib.suppress(OSError):
            stream.settimeout(_READY_LINE_SECS)
            line = dials.read_line(stream)
            if _READY_LINE.fullmatch(line):
                seen.is_ready(line)
                stream.sendall(f"time {time.time():.3f}\n".encode())


def _ask_agent(seen: watch.Watch, dial: Dial, pause: float, longest: float, stop: threading.Event) -> None:
    """Ask now and then whether the agent listens, until it is known to.

    Not before init speaks: vhost-device-vsock that is called while the guest's driver sets up its queues may serve
    nobody any more, the agent's own line included.
    """
    while not stop.wait(pause) and not seen.known_ready:
        if not seen.phases and time.monotonic() < seen.started + _SILENT_SECS:
            continue
        try:
            dial().close()
        except OSError:
            pause = min(2 * pause, longest)
        else:
            seen.is_ready(None)
            return
