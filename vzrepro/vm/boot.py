"""Boots a bundle under QEMU, waits for its agent, and powers it off: `running` for those who use the guest, `boot` for
those who want to know that it works.

What the guest's `init` prints is part of the contract (docs/guest.md): its lines mark the phases.
"""

from __future__ import annotations

import contextlib
import json
import queue
import random
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vzrepro import events
from vzrepro.errors import TimedOut, UsageError, VzreproError
from vzrepro.vm import agent, qemu
from vzrepro.vm.agent import AgentClient, Dial, SystemInfo

TAIL_LINES = 30
"""How much of the guest's console an error shows."""

_INIT_LINE = "vz-init: start"
_AGENT_LINE = "vz-init: agent start"
_PANIC = "Kernel panic - not syncing:"
_POWER_OFF_SECS = 20.0
_CONSOLE_LAG_SECS = 2.0
# Ready is pushed. Where the push does not come (an agent that pushes nothing, a host port that is taken), asking finds
# out as well, late enough not to disturb: seconds, doubled up to the second number.
_ASK_AFTER_SECS = (1.0, 4.0)
_ASK_AT_ONCE_SECS = (0.05, 1.0)


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


@dataclass(frozen=True, slots=True)
class _Line:
    """Something was printed: the guest on its console, or QEMU or the vsock device on its own account."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class _Ended:
    """A process ended. `code` is its exit code, negative for a signal."""

    at: float
    name: str
    code: int


@dataclass(frozen=True, slots=True)
class _Ready:
    """The agent listens. `line` is what it said, or None when it had to be asked."""

    at: float
    line: str | None


@dataclass(slots=True)
class Vm:
    """A guest whose agent listens. `agent` is connected to it; `phases` grow until it is off."""

    agent: AgentClient
    accelerator: qemu.Accelerator
    vsock: qemu.Vsock
    agent_version: str | None
    pushed: bool
    _watch: _Watch

    @property
    def phases(self) -> tuple[events.Phase, ...]:
        """The phases reached so far."""
        return tuple(self._watch.phases)

    @property
    def console(self) -> tuple[str, ...]:
        """The last lines of the guest's console."""
        return tuple(self._watch.tail)

    def reached(self, phase: str) -> None:
        """Note that a phase is reached now."""
        self._watch.reached(phase, time.monotonic())

    def power_off(self) -> None:
        """Have the guest switch itself off, cleanly, and wait until it is off. Raises VzreproError."""
        # init knows the signal that busybox's poweroff sends; the agent may live in a rootfs without that program.
        # The stream may break before the exit code: the guest is going down.
        with contextlib.suppress(VzreproError):
            for _event in self.agent.exec("/bin/sh", ["-c", "kill -USR2 1"], timeout_secs=_POWER_OFF_SECS):
                pass
        self._watch.wait_until_off(_POWER_OFF_SECS)


@dataclass(slots=True)
class _Watch:
    """What is known of a booting guest, fed by a queue that other threads fill."""

    report: events.Report
    started: float
    messages: queue.SimpleQueue[_Line | _Ended | _Ready] = field(default_factory=queue.SimpleQueue)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    phases: list[events.Phase] = field(default_factory=list)
    panic: str | None = None

    def line(self, text: str) -> None:
        self.messages.put(_Line(time.monotonic(), text))

    def reached(self, name: str, at: float) -> None:
        if all(phase.name != name for phase in self.phases):
            phase = events.Phase(name, at - self.started)
            self.phases.append(phase)
            self.report(phase)

    def wait_until_ready(self, timeout_secs: float) -> _Ready:
        """Raises TimedOut, or VzreproError when a process ends first."""
        deadline = self.started + timeout_secs
        while True:
            match self._next(deadline):
                case None:
                    raise TimedOut(
                        f"the guest's agent was not ready within {timeout_secs:g} s",
                        reason=self._story(),
                        hint="a slow or busy host needs longer: vzrepro vm boot … --timeout-secs "
                        f"{max(60, round(2 * timeout_secs))}",
                    )
                case _Ready() as ready:
                    self._catch_up(ready.at)
                    self.reached("ready", ready.at)
                    return ready
                case _Ended() as ended:
                    what = f"{ended.name} ended with {_exit(ended.code)} before the guest's agent was ready"
                    if self.panic is not None:
                        what = f"the guest's kernel panicked: {self.panic}"
                    raise VzreproError(what, reason=self._story())

    def wait_until_off(self, timeout_secs: float) -> None:
        """Raises TimedOut, or VzreproError when QEMU fails."""
        deadline = time.monotonic() + timeout_secs
        while True:
            match self._next(deadline):
                case None:
                    raise TimedOut(f"the guest did not power off within {timeout_secs:g} s", reason=self._story(_OFF))
                case _Ended(at, name, code) if name.startswith("qemu"):
                    if code:
                        raise VzreproError(f"{name} ended with {_exit(code)}", reason=self._story(_OFF))
                    self.reached("off", at)
                    return

    def _next(self, deadline: float) -> _Ended | _Ready | None:
        """The next message that is not a line, or None when the deadline passes."""
        while True:
            try:
                message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return None
            if not isinstance(message, _Line):
                return message
            self._note(message)

    def _catch_up(self, ready_at: float) -> None:
        """Take in the console up to the agent's start: it and the vsock are not in step with each other."""
        deadline = time.monotonic() + _CONSOLE_LAG_SECS
        while all(phase.name != "agent" for phase in self.phases):
            try:
                message = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return
            if not isinstance(message, _Line):
                self.messages.put(message)
                return
            # However late we learn of it: it was before the agent listened.
            self._note(_Line(min(message.at, ready_at), message.text))

    def _note(self, line: _Line) -> None:
        self.tail.append(line.text)
        if line.text.startswith(_INIT_LINE):
            self.reached("init", line.at)
        elif line.text.startswith(_AGENT_LINE):
            self.reached("agent", line.at)
        elif _PANIC in line.text and self.panic is None:
            self.panic = line.text.partition(_PANIC)[2].strip()

    def _story(self, waited: str | None = None) -> str:
        reached = ", ".join(f"{phase.name} at {phase.secs:.2f} s" for phase in self.phases) or "nothing"
        if waited is None:
            names = [phase.name for phase in self.phases]
            waited = next(what for name, what in _WAITED_FOR.items() if name not in names)
        console = "\n".join(f"    {line}" for line in self.tail) or "    (empty)"
        return f"reached: {reached}; waited for: {waited}\n  last lines of the console:\n{console}"


# What each phase up to `ready` stands for.
_WAITED_FOR = {
    "init": f"the kernel to start /init, which prints {_INIT_LINE!r}",
    "agent": f"init to start the agent, which it announces with {_AGENT_LINE!r}",
    "ready": f"the agent to listen on vsock port {agent.AGENT_PORT}",
}
_OFF = "the guest to switch itself off"


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def running(
    bundle: Path,
    *,
    vhost_device_vsock: Path,
    timeout_secs: float,
    report: events.Report = events.ignore,
    command_line: str = "",
) -> Iterator[Vm]:
    """A booted guest of `bundle` (a directory with `vmlinux` and `initramfs.img`), ready to be used.

    `vhost_device_vsock` is the program that serves the guest's vsock where the host's kernel does not. `timeout_secs`
    is how long the agent may take from QEMU's start; `command_line` is added to the kernel's. QEMU and the vsock device
    end with the context, whatever happens. Raises UsageError when files are missing, TimedOut, VzreproError.
    """
    guest = _guest(bundle, command_line)
    program = qemu.find_qemu()
    accelerator = qemu.accelerator(program)
    cid = random.SystemRandom().randrange(3, 2**31)

    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vz-", ignore_cleanup_errors=True)))
        streams = agent.private_socket(directory, "vsock")
        proxy_path = agent.private_socket(directory, "agent")
        watch = _Watch(report, time.monotonic())
        listener: socket.socket | None
        dial: Dial
        if qemu.kernel_vsock_usable():
            vsock = qemu.Vsock(cid)
            listener = _listen_vsock(agent.READY_PORT)

            def dial() -> socket.socket:
                return agent.dial_vsock(cid, agent.AGENT_PORT)
        else:
            vsock = qemu.Vsock(cid, agent.private_socket(directory, "device"))
            listener = _listen_unix(Path(f"{streams}_{agent.READY_PORT}"))
            device_arguments = qemu.vsock_device_arguments(vsock, streams)
            device = stack.enter_context(
                qemu.Child(
                    str(vhost_device_vsock),
                    device_arguments,
                    on_line=watch.line,
                    on_end=_ended(watch, "vhost-device-vsock"),
                )
            )
            assert vsock.device_socket is not None
            qemu.wait_for_socket(vsock.device_socket, device)

            def dial() -> socket.socket:
                return agent.dial_streams(streams, agent.AGENT_PORT)

        stop = threading.Event()
        stack.callback(stop.set)
        if listener is not None:
            stack.callback(_shut, listener)

        watch.started = time.monotonic()
        stack.enter_context(
            qemu.Child(
                program,
                qemu.arguments(guest, accelerator, vsock),
                on_line=watch.line,
                on_end=_ended(watch, "qemu-system-aarch64"),
            )
        )
        threading.Thread(target=_await_agent, args=(watch, listener, cid, dial, stop), daemon=True).start()
        ready = watch.wait_until_ready(timeout_secs)

        proxy = agent.Proxy(proxy_path, dial)
        stack.callback(proxy.close)
        client = stack.enter_context(AgentClient(proxy.target))
        version = None if ready.line is None else ready.line.split()[1]
        yield Vm(client, accelerator, vsock, version, ready.line is not None, watch)


def boot(
    bundle: Path, *, vhost_device_vsock: Path, timeout_secs: float, report: events.Report = events.ignore
) -> BootReport:
    """Boot `bundle`, call Ping and SystemInfo, power off. `timeout_secs` is the limit for the agent's first answer.

    Raises as `running` does, and VzreproError when the agent is not the one that version.json declares.
    """
    declared = _declared(bundle)
    started = time.monotonic()
    with running(bundle, vhost_device_vsock=vhost_device_vsock, timeout_secs=timeout_secs, report=report) as vm:
        vm.agent.ping(max(1.0, started + timeout_secs - time.monotonic()))
        vm.reached("answer")
        system = vm.agent.system_info()
        for what, wanted, found in (
            ("agent version", declared.get("agent"), vm.agent_version),
            ("agent protocol revision", declared.get("agent_protocol_revision"), system.agent_protocol_revision),
        ):
            if wanted is not None and found is not None and wanted != found:
                raise VzreproError(
                    f"{bundle}: the guest's {what} is {found}, but version.json declares {wanted}",
                    hint="realize the bundle again: vzrepro realize container-bundle",
                )
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


def _guest(bundle: Path, command_line: str) -> qemu.Guest:
    guest = qemu.Guest(bundle / "vmlinux", bundle / "initramfs.img")
    for path in (guest.kernel, guest.initramfs):
        if not path.is_file():
            raise UsageError(
                f"{bundle} is not a boot bundle",
                reason=f"it has no {path.name}",
                hint="name a bundle's directory or its target: vzrepro vm boot container-bundle",
            )
    if command_line:
        guest = qemu.Guest(guest.kernel, guest.initramfs, f"{guest.command_line} {command_line}")
    return guest


def _declared(bundle: Path) -> Mapping[str, Any]:
    """What the bundle's version.json says; nothing when it has none."""
    path = bundle / "version.json"
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON", reason=str(error)) from error
    if not isinstance(document, dict):
        raise UsageError(f"{path} is not a JSON object")
    return document


def _ended(watch: _Watch, name: str) -> Any:
    return lambda code: watch.messages.put(_Ended(time.monotonic(), name, code))


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def _listen_vsock(port: int) -> socket.socket | None:
    """A listener for every guest of this host, or None when another process has it: then the agent is asked."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen()
    except OSError:
        listener.close()
        return None
    return listener


def _shut(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def _await_agent(watch: _Watch, listener: socket.socket | None, cid: int, dial: Dial, stop: threading.Event) -> None:
    """Wait for the agent to say that it listens, and now and then ask whether it does."""
    pause, longest = _ASK_AT_ONCE_SECS if listener is None else _ASK_AFTER_SECS
    while not stop.is_set():
        if listener is None:
            stop.wait(pause)
        else:
            try:
                listener.settimeout(pause)
                stream, peer = listener.accept()
                with stream:
                    stream.settimeout(pause)
                    line = agent.read_line(stream)
                # The kernel's vsock is one for all guests of the host: another guest's line is not ours.
                ours = isinstance(peer, str) or peer[0] == cid
                if ours and len(line.split()) == 3 and line.startswith("ready "):
                    watch.messages.put(_Ready(time.monotonic(), line))
                    return
            except OSError:
                pass
        if stop.is_set():
            return
        try:
            dial().close()
        except OSError:
            pause = min(2 * pause, longest)
        else:
            watch.messages.put(_Ready(time.monotonic(), None))
            return
