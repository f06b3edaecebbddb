"""Proves on a machine of its own what needs the host's hand: that it can take a guest's memory and give it back, and
that a guest can be saved and restored, more than once from one state.

One argument, a JSON object:

    qemu            QEMU and the arguments that say which machine: accelerator, processor
    kernel          the kernel's image
    initramfs       files that are unpacked in order, `probes.cpio` among them
    vsock-device    vhost-device-vsock
    preload         the library of `vhost.c`
    names           which of `memory_reclaim` and `snapshot_safe` to prove
    limit-secs      how long all of it may take
    place           a directory to work in, with a short name

Out: `verdicts` in that directory, a line of JSON for each name as `vz-probe` writes them; on standard output the
guest's console. Exit code 1 when the guest was lost. Runs with the standard library alone, in the build's sandbox
(`run.py`) and for `vzrepro vm probe`.

QEMU saves no guest that has a vhost-user device, so the vsock is QEMU's vhost-vsock, whose state is saved, on a
connection to vhost-device-vsock (`vhost.c`); there are no shares.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

AGENT_PORT, READY_PORT = 7424, 7425
MEMORY_MIB = 512
SQUEEZED_MIB = 1
"""Less than any guest needs: what a balloon must survive to be asked for."""
FILLED_MIB = 64
DRAWS = 64
"""Random numbers that are compared. Right after a restore two guests share all but a few, until the first reseeds."""
PROOF_SECS = 180
"""How long each thing that is to be shown may take: moments, but the guest may be emulated on a busy machine."""
AWAY_SECS = 5
"""How long a saved guest is away at least: a clock that stood still is off by more than it may be."""
COMMAND = ("/bin/busybox", "sleep", "86399")


class LostError(Exception):
    """The guest was lost, or did not do what was waited for; the text says what that was."""


class NotProvenError(Exception):
    """The sentence of a verdict FAILED."""


class Deadline:
    """The time that is left. Everything that is waited for ends with it, in an error that says what it was."""

    def __init__(self, limit_secs: float) -> None:
        self._end = time.monotonic() + limit_secs

    @property
    def left(self) -> float:
        return max(0.1, self._end - time.monotonic())

    def until(self, what: str, holds: Callable[[], Any], machine: "Machine") -> Any:
        """What `holds` gives, once that is true. Raises LostError."""
        while not (found := holds()):
            if machine.ended or time.monotonic() > self._end:
                raise LostError(f"waited for {what}: {'the machine ended' if machine.ended else 'out of time'}")
            time.sleep(0.05)
        return found


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


class Machine:
    """A running QEMU: `qmp` commands it, `ask` asks the guest's vz-probe, `call` calls its agent."""

    def __init__(self, config: dict[str, Any], place: Path, deadline: Deadline, *, state: bytes | None = None) -> None:
        self.deadline = deadline
        self.ready = threading.Event()
        self.held: list[socket.socket] = []
        self._children: list[subprocess.Popen[bytes]] = []
        self._stack = contextlib.ExitStack()
        self._streams = place / "vsock"
        place.mkdir()
        try:
            self._start(config, place, state)
        except BaseException:
            self.close()
            raise

    def _start(self, config: dict[str, Any], place: Path, state: bytes | None) -> None:
        ready = self._stack.enter_context(listen(Path(f"{self._streams}_{READY_PORT}")))
        threading.Thread(target=self._listen, args=(ready,), daemon=True).start()
        monitor = self._stack.enter_context(listen(place / "qmp"))
        console = self._stack.enter_context(listen(place / "probes"))
        served = place / "device"
        pairs = f"guest-cid=3,socket={served},uds-path={self._streams},tx-buffer-size=28672"
        self._child([config["vsock-device"], "--vm", pairs], stdin=subprocess.DEVNULL)
        device = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        self.deadline.until("vhost-device-vsock to serve", lambda: not device.connect_ex(str(served)), self)
        arguments: list[str | Path] = [
            *config["qemu"],
            *("-m", f"{MEMORY_MIB}M", "-object", f"memory-backend-memfd,id=mem,size={MEMORY_MIB}M,share=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", config["kernel"], "-initrd", "state-initramfs"),
            *("-append", "console=hvc0 panic=-1 rdinit=/sbin/vz-probe"),
            *("-device", "virtio-serial-pci", "-chardev", "stdio,id=console,signal=off"),
            *("-device", "virtconsole,chardev=console", "-chardev", f"socket,id=probes,path={place / 'probes'}"),
            *("-device", "virtconsole,chardev=probes"),
            *("-device", "virtio-rng-pci", "-device", "virtio-balloon-pci,free-page-reporting=on"),
            # vhost-device-vsock takes no indirect descriptors.
            *("-device", f"vhost-vsock-pci,guest-cid=3,vhostfd={device.fileno()},indirect_desc=off"),
            *("-chardev", f"socket,id=qmp,path={place / 'qmp'}", "-mon", "chardev=qmp,mode=control"),
            *(() if state is None else ("-incoming", f"unix:{place / 'state'}")),
        ]
        environment = {**os.environ, "LD_PRELOAD": config["preload"]}
        self.qemu = self._child(arguments, stdin=subprocess.PIPE, pass_fds=[device.fileno()], env=environment)
        self._monitor = self._accept(monitor)
        self._read_monitor()
        self.qmp("qmp_capabilities")
        self._console = self._accept(console)
        if state is not None:
            with socket.socket(socket.AF_UNIX) as feed:
                self.deadline.until("QEMU to take a state", lambda: not feed.connect_ex(str(place / "state")), self)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # whoever waits for it learns why
                    feed.sendall(state)

    def _child(self, arguments: list[str | Path], **how: Any) -> "subprocess.Popen[bytes]":
        # However this program ends; the sandbox has no setpriv, and ends as a whole.
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        process = subprocess.Popen([*dies_with_us, *arguments], **how)
        self._children.append(process)
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process

    def _accept(self, listener: socket.socket) -> socket.SocketIO:
        listener.settimeout(0)

        def accepted() -> socket.socket | None:
            with contextlib.suppress(BlockingIOError):
                return listener.accept()[0]
            return None

        stream: socket.socket = self._stack.enter_context(self.deadline.until("QEMU to start", accepted, self))
        stream.settimeout(self.deadline.left)
        return stream.makefile("rwb", buffering=0)

    def _listen(self, listener: socket.socket) -> None:
        """Takes the agent's ready line, and keeps what else the guest opens."""
        while True:
            try:
                stream, _ = listener.accept()
                said = stream.makefile("rb").readline()
                if said.startswith(b"ready "):
                    self.ready.set()
                    stream.sendall(f"time {time.time():.3f}\n".encode())
                    stream.close()
                else:
                    self.held.append(stream)
            except OSError:
                return

    @property
    def ended(self) -> bool:
        return any(child.poll() is not None for child in self._children)

    def close(self) -> None:
        """End it."""
        self._stack.close()

    def qmp(self, command: str, **arguments: Any) -> Any:
        """What QEMU answers. Raises LostError with its error."""
        with contextlib.suppress(BrokenPipeError):  # it ended, and the answer is an end
            self._monitor.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            said = self._read_monitor()
            if "error" in said:
                raise LostError(f"QEMU's answer to {command}: {said['error']['desc']}")
            if "return" in said:
                return said["return"]

    def _read_monitor(self) -> dict[str, Any]:
        line = b""
        with contextlib.suppress(ConnectionResetError):
            line = self._monitor.readline()
        if not line:
            raise LostError("QEMU ended")
        said: dict[str, Any] = json.loads(line)
        return said

    def line(self, what: str) -> str:
        """The next line of vz-probe's."""
        try:
            line = self._console.readline()
        except OSError as error:
            raise LostError(f"waited for {what}: {error}") from error
        if not line.endswith(b"\n"):
            raise LostError(f"waited for {what}: the guest's console ended")
        return line.decode("utf-8", "replace").rstrip("\r\n")

    def ask(self, question: str) -> list[str]:
        """The words of vz-probe's answer. Raises LostError when it has none."""
        self._console.write(f"ask {question}\n".encode())
        answer = self.line(f"an answer to {question}")
        if answer.startswith("error: "):
            raise LostError(f"the guest, asked {question}: {answer}")
        return answer.split()

    def call(self, method: str, message: bytes = b"") -> "Call":
        """A call of the agent on a connection of its own. Raises OSError when that cannot be made."""
        stream = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        stream.settimeout(min(30, self.deadline.left))
        stream.connect(str(self._streams))
        stream.sendall(f"CONNECT {AGENT_PORT}\n".encode())
        file = stream.makefile("rwb")
        if not file.readline().startswith(b"OK "):
            raise ConnectionRefusedError("the agent's port answers nothing")
        return Call(file, method, message)

    def shows(self, what: str, holds: Callable[[], Any]) -> None:
        """Waits for what a proof is about. Raises NotProvenError, and LostError when the machine ends before."""
        limit = time.monotonic() + PROOF_SECS

        def holds_or_never() -> bool:
            if holds():
                return True
            if time.monotonic() > limit:
                raise NotProvenError(f"waited {PROOF_SECS} s for {what}")
            return False

        self.deadline.until(what, holds_or_never, self)

    def resident_mib(self) -> int:
        """How much of the host's memory QEMU has for the guest."""
        status = Path(f"/proc/{self.qemu.pid}/status").read_text(encoding="ascii")
        return int(status.partition("RssShmem:")[2].split()[0]) // 1024


class Call:
    """One gRPC call on an HTTP/2 connection (RFC 9113) that is used for it alone; enough of both to ask our agent.
    Iterating gives the messages that are answered."""

    def __init__(self, stream: "io.BufferedRWPair", method: str, message: bytes) -> None:
        self._stream = stream
        fields = {":method": "POST", ":scheme": "http", ":path": f"/vz.agent.v1.AgentService/{method}"}
        fields |= {":authority": "guest", "content-type": "application/grpc", "te": "trailers"}
        # HPACK (RFC 7541): literals that are not indexed, by name.
        block = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in fields.items()
        )
        body = b"\0" + struct.pack(">I", len(message)) + message
        stream.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(4, 0, 0, b""))
        stream.write(self._frame(1, 4, 1, block) + self._frame(0, 1, 1, body))
        stream.flush()

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    def __iter__(self) -> Iterator[bytes]:
        data = b""
        while True:
            head = self._stream.read(9)
            if len(head) < 9:
                return
            payload = self._stream.read(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind == 0:
                data += payload
                while len(data) >= 5 and len(data) >= (size := 5 + int.from_bytes(data[1:5], "big")):
                    yield data[5:size]
                    data = data[size:]
            if kind in (0, 1) and flags & 1:
                return


def field(number: int, value: str) -> bytes:
    """A field of a protobuf message that is a short string."""
    return bytes([number << 3 | 2, len(value)]) + value.encode()


def answers(machine: Machine) -> bool:
    """Whether the agent answers a Ping on a new connection."""
    with contextlib.suppress(OSError):
        return any(True for _ in machine.call("Ping"))
    return False


def execute(machine: Machine, command: tuple[str, ...]) -> None:
    """Have the agent run a command, on a stream that stays open."""
    message = field(1, command[0]) + b"".join(field(2, word) for word in command[1:])
    next(iter(machine.call("Exec", message)))


def started(config: dict[str, Any], deadline: Deadline) -> Machine:
    """A machine whose guest and agent answer."""
    archives = map(Path, config["initramfs"])
    Path("state-initramfs").write_bytes(b"".join(archive.read_bytes() for archive in archives))
    machine = Machine(config, Path.cwd() / "guest", deadline)
    try:
        # Not earlier: a call of a device whose rings do not run ends vhost-device-vsock's service.
        deadline.until("the agent to listen", machine.ready.is_set, machine)
        deadline.until("the agent to answer", lambda: answers(machine), machine)
        while machine.line("vz-probe to say hello") != "hello":
            pass
    except BaseException:
        machine.close()
        raise
    return machine


def memory_reclaim(_config: dict[str, Any], machine: Machine) -> str:
    """Take half of the memory, all that can be spared, and what is free."""

    def total() -> int:
        return int(machine.ask("memory")[0]) // 1024

    if machine.ask("balloon") != ["true"]:
        raise NotProvenError("the guest has no driver for the machine's balloon")
    whole = total()

    def target(mib: int) -> None:
        machine.qmp("balloon", value=mib << 20)

    half = MEMORY_MIB // 2
    target(half)
    machine.shows("the guest's memory to shrink by half", lambda: total() <= whole - half)
    target(MEMORY_MIB)
    machine.shows("the guest's memory to grow again", lambda: total() == whole)

    target(SQUEEZED_MIB)
    machine.shows("the guest's memory to shrink to what it needs", lambda: total() < half // 2)
    machine.shows("the agent to answer", lambda: answers(machine))
    target(MEMORY_MIB)
    machine.shows("the guest's memory to grow again", lambda: total() == whole)

    machine.ask(f"fill {FILLED_MIB}")
    filled = machine.resident_mib()
    machine.ask("free")
    wanted = filled - FILLED_MIB // 2  # it is reported in parts, two seconds between them
    machine.shows("freed memory to be the host's again", lambda: machine.resident_mib() <= wanted)
    return (
        "the host takes half of the guest's memory and gives it back; the guest keeps what it needs when more is asked "
        "for; memory that the guest frees is the host's again"
    )


def is_right(machine: Machine) -> bool:
    """Whether the guest's clock is right within a second."""
    before = time.time()
    clock = float(machine.ask("clock")[0])
    return before - 1 <= clock <= time.time() + 1


def has_changed(machine: Machine, question: str, answer: str) -> bool:
    """Whether the guest answers something else."""
    return machine.ask(question) != [answer]


def save(machine: Machine) -> bytes:
    """The state of the machine, which then stands still."""
    machine.qmp("stop")
    with listen(Path("state-out")) as listener:
        machine.qmp("migrate", uri="unix:state-out")
        listener.settimeout(machine.deadline.left)
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(machine.deadline.left)
            state = b"".join(iter(lambda: stream.recv(1 << 20), b""))

    def done() -> bool:
        found = machine.qmp("query-migrate")
        if found["status"] == "failed":
            raise LostError(f"the machine could not be saved: {found.get('error-desc', 'QEMU does not say why')}")
        return bool(found["status"] == "completed")

    machine.deadline.until("the machine to be saved", done, machine)
    Path("state-out").unlink()
    return state


def restored(config: dict[str, Any], name: str, deadline: Deadline, state: bytes) -> Machine:
    """A machine that goes on from `state`."""
    machine = Machine(config, Path.cwd() / name, deadline, state=state)
    try:
        deadline.until("a state to be read", lambda: machine.qmp("query-status")["status"] == "paused", machine)
        machine.qmp("cont")
    except BaseException:
        machine.close()
        raise
    return machine


def snapshot_safe(config: dict[str, Any], machine: Machine) -> str:
    """Save the machine, which ends; restore it twice."""
    execute(machine, COMMAND)
    runs = f"runs {' '.join(COMMAND)}"
    machine.deadline.until("a command to run", lambda: machine.ask(runs) == ["1"], machine)
    machine.ask("connect")
    machine.deadline.until("the guest's stream", lambda: machine.held, machine)
    state = save(machine)
    saved = time.time()
    machine.close()
    drawn: list[set[str]] = []
    for name in ("first", "second"):
        time.sleep(max(0, saved + AWAY_SECS - time.time()))
        with contextlib.closing(restored(config, name, machine.deadline, state)) as again:
            again.shows("the agent to answer on a new connection", partial(answers, again))
            drawn.append(set(again.ask(f"random {DRAWS}")))
            if not is_right(again):
                raise NotProvenError("the clock of a restored guest is wrong by more than a second")
            for question, open_, what in (
                ("stream", "open", "the guest's stream to end"),
                (runs, "1", "a command without a host to end"),
            ):
                again.shows(what, partial(has_changed, again, question, open_))
    if drawn[0] & drawn[1]:
        raise NotProvenError("two guests restored from one state draw the same random numbers")
    return (
        "two guests restored from one state draw different random numbers, their clocks are right within a second, "
        "the agent answers on a new connection, streams have ended"
    )


PROOFS: dict[str, Callable[[dict[str, Any], Machine], str]] = {
    "memory_reclaim": memory_reclaim,
    "snapshot_safe": snapshot_safe,
}
"""Name → what gives the sentence of the verdict PROVEN; the last one ends the machine."""


def verdicts(config: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The verdict on each name, in order. Raises LostError."""
    with contextlib.closing(started(config, Deadline(config["limit-secs"]))) as machine:
        for name in config["names"]:
            try:
                verdict, detail = "PROVEN", PROOFS[name](config, machine)
            except NotProvenError as error:
                verdict, detail = "FAILED", str(error)
            yield {"capability": name, "verdict": verdict, "detail": detail}


def main() -> int:
    """The exit code."""
    try:
        config = json.loads(sys.argv[1])
        os.chdir(config["place"])
        Path("verdicts").write_text("".join(json.dumps(one) + "\n" for one in verdicts(config)), encoding="utf-8")
    except (LostError, OSError) as error:
        print(f"state: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
