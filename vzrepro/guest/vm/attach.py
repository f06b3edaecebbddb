"""Joins this process to a guest: `run` makes a command there look like one here, `publish` a guest's port."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import struct
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import BinaryIO

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm.agent import AgentClient, AgentError, Execution, Forward, Protocol

_INPUT_BYTES = 16_384
_FORWARD_BYTES = 65_536
BROKEN_PIPE_CODE = 128 + signal.SIGPIPE
"""The exit code of what ended because nobody read its output any more."""

_DEFAULT_SIZE = (24, 80)
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_QUITTING = (signal.SIGINT, signal.SIGTERM)
_LAST_READ_SECS = 2.0
UDP_IDLE_SECS = 60.0
"""How long a peer of a published UDP port is remembered after the last datagram either way."""


def run(
    client: AgentClient,
    command: str,
    arguments: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    working_dir: str = "",
    user: str = "",
    pty: bool = False,
    stdin: BinaryIO | None,
    stdout: BinaryIO,
    stderr: BinaryIO,
) -> int:
    """Run a command in the guest as if it were here, and return its exit code (128+N after signal N).

    `stdin` needs a file descriptor; None is an empty input. With `pty` the command has a terminal as large as the one
    behind stdin or stdout, a terminal behind stdin is raw meanwhile, and all output comes on `stdout`. SIGINT, SIGTERM
    and SIGHUP go to the command, when this is the main thread; the second SIGINT or SIGTERM raises KeyboardInterrupt.
    Whatever is raised ends the command. When nobody reads the output any more the command ends, as by SIGPIPE.

    Raises AgentError, and VzreproError when the command could not start.
    """
    size = _size(stdin, stdout) if pty else None
    with contextlib.ExitStack() as stack:
        wishes: _Wishes = queue.SimpleQueue()
        stack.callback(wishes.put, None)
        stack.enter_context(_signals_become(wishes, (*_FORWARDED, signal.SIGWINCH) if pty else _FORWARDED))
        if pty and stdin is not None and stdin.isatty():
            stack.enter_context(_raw(stdin.fileno()))
        events = stack.enter_context(
            client.exec(command, arguments, env=env, working_dir=working_dir, user=user, pty=size)
        )
        try:
            return _follow(client, command, events, stack, wishes, stdin, stdout, stderr)
        except BrokenPipeError:
            return BROKEN_PIPE_CODE


# Signal numbers to be passed on; SIGWINCH stands for the terminal's new size, None for the end.
_Wishes = queue.SimpleQueue[int | None]


def _follow(
    client: AgentClient,
    command: str,
    events: Execution,
    stack: contextlib.ExitStack,
    wishes: _Wishes,
    stdin: BinaryIO | None,
    stdout: BinaryIO,
    stderr: BinaryIO,
) -> int:
    for event in events:
        if event.exec_id:
            stack.enter_context(_input(client, event.exec_id, stdin))
            grant = (client, event.exec_id, wishes, stdin, stdout)
            threading.Thread(target=_grant, args=grant, daemon=True).start()
        match event.WhichOneof("event"):
            case "stdout":
                write(stdout, event.stdout)
            case "stderr":
                write(stderr, event.stderr)
            case "exit_code":
                return event.exit_code
            case "error":
                raise VzreproError(f"{command} could not start in the guest", reason=event.error)
    raise VzreproError(f"the guest agent did not say how {command} ended")


def write(stream: BinaryIO, data: bytes) -> None:
    """Write past the buffer: what a broken pipe did not take must not be tried again when the process ends."""
    raw = getattr(stream, "raw", stream)
    if raw is not stream:
        stream.flush()
    view = memoryview(data)
    while view:
        view = view[raw.write(view) or 0 :]


def _size(*streams: BinaryIO | None) -> tuple[int, int]:
    """Rows and columns of the first stream that is a terminal."""
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # ValueError: a stream without a descriptor
            if stream is not None:
                found = os.get_terminal_size(stream.fileno())
                if found.lines and found.columns:
                    return found.lines, found.columns
    return _DEFAULT_SIZE


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Have the terminal pass every key on as it is."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _signals_become(wishes: _Wishes, numbers: Sequence[signal.Signals]) -> Iterator[None]:
    """Turn these signals into wishes; only the main thread gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: set[int] = set()

    def handle(number: int, _frame: FrameType | None) -> None:
        if number in _QUITTING and number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        wishes.put(number)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _grant(client: AgentClient, exec_id: int, wishes: _Wishes, stdin: BinaryIO | None, stdout: BinaryIO) -> None:
    for number in iter(wishes.get, None):
        # A lost connection shows in the events.
        with contextlib.suppress(AgentError):
            if number == signal.SIGWINCH:
                client.resize(exec_id, *_size(stdin, stdout))
            else:
                client.signal(exec_id, number)


@contextlib.contextmanager
def _input(client: AgentClient, exec_id: int, stdin: BinaryIO | None) -> Iterator[None]:
    """Forward `stdin` meanwhile; not a byte of it is taken afterwards."""
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_feed, args=(client, exec_id, stdin, theirs), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ours.close()
        thread.join(_LAST_READ_SECS)


def _feed(client: AgentClient, exec_id: int, stdin: BinaryIO | None, stop: socket.socket) -> None:
    # The command may end, or close its input, before all of ours is read.
    with stop, contextlib.suppress(AgentError):
        if stdin is not None:
            source = stdin.fileno()
            poll = select.poll()
            poll.register(source, select.POLLIN)
            poll.register(stop, select.POLLIN)
            while True:
                if stop.fileno() in dict(poll.poll()):
                    return
                try:
                    data = os.read(source, _INPUT_BYTES)
                except OSError:  # a terminal that is gone
                    break
                if not data:
                    break
                client.stdin_write(exec_id, data)
        client.stdin_close(exec_id)


@contextlib.contextmanager
def publish(
    client: AgentClient,
    host_port: int,
    guest_port: int,
    *,
    protocol: Protocol = "tcp",
    host: str = "127.0.0.1",
    guest_host: str = "",
) -> Iterator[int]:
    """Let whoever connects to `host_port` of this host's address `host` reach `guest_port` as seen from the guest.

    Gives the host's port, chosen by the system when `host_port` is 0. A TCP connection that the guest's side refuses is
    reset. Raises VzreproError when the port cannot be had. Every connection ends with the context.
    """
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, kind)
    with listener:
        try:
            if protocol == "tcp":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, host_port))
            if protocol == "tcp":
                listener.listen()
        except (OSError, OverflowError) as error:
            raise VzreproError(
                f"{protocol} port {host_port} of {host} cannot be published",
                reason=getattr(error, "strerror", None) or str(error),
                hint="choose another port of the host, or 0 for any that is free",
            ) from error
        target = _Target(client, guest_port, protocol, guest_host)
        listening = _Streams(listener, target) if protocol == "tcp" else _Datagrams(listener, target)
        thread = threading.Thread(target=listening.serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listening.close()
            thread.join()


@dataclass(frozen=True, slots=True)
class _Target:
    client: AgentClient
    port: int
    protocol: Protocol
    host: str

    def connect(self) -> Forward:
        return self.client.port_forward(self.port, self.protocol, self.host)


@dataclass(slots=True)
class _Streams:
    """A thread for each connection and each way."""

    listener: socket.socket
    target: _Target
    lock: threading.Lock = field(default_factory=threading.Lock)
    open: set[Forward] = field(default_factory=set)
    closed: bool = False

    def serve(self) -> None:
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(stream,), daemon=True).start()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            forwards = list(self.open)
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        for forward in forwards:
            forward.close()

    def _carry(self, stream: socket.socket) -> None:
        with stream:
            try:
                with self.target.connect() as forward:
                    self._carry_through(stream, forward)
            except AgentError:
                # As if the guest's port itself had been connected to: this is no ordinary end.
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except OSError:
                pass  # whoever connected is gone

    def _carry_through(self, stream: socket.socket, forward: Forward) -> None:
        with self.lock:
            if self.closed:
                return
            self.open.add(forward)
        up = threading.Thread(target=_send, args=(stream, forward), daemon=True)
        up.start()
        try:
            while (data := forward.recv()) is not None:
                stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
        finally:
            forward.close()
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RD)
            up.join()
            with self.lock:
                self.open.discard(forward)


def _send(stream: socket.socket, forward: Forward) -> None:
    with contextlib.suppress(OSError):
        while data := stream.recv(_FORWARD_BYTES):
            forward.send(data)
    forward.send_end()


_Address = tuple[str | int, ...]


@dataclass(slots=True)
class _Peer:
    forward: Forward
    used: float


@dataclass(slots=True)
class _Datagrams:
    """A forward, and a thread for what comes back, for each peer."""

    socket: socket.socket
    target: _Target
    lock: threading.Lock = field(default_factory=threading.Lock)
    peers: dict[_Address, _Peer] = field(default_factory=dict)
    closed: bool = False

    def serve(self) -> None:
        self.socket.settimeout(0.5)
        while not self.closed:
            try:
                data, address = self.socket.recvfrom(_FORWARD_BYTES)
            except TimeoutError:
                self._forget_idle()
                continue
            except OSError:
                return
            with contextlib.suppress(AgentError):
                self._peer(address).forward.send(data)
            self._forget_idle()

    def close(self) -> None:
        self.closed = True
        with self.lock:
            peers = list(self.peers.values())
        for peer in peers:
            peer.forward.close()

    def _peer(self, address: _Address) -> _Peer:
        with self.lock:
            if peer := self.peers.get(address):
                peer.used = time.monotonic()
                return peer
            peer = self.peers[address] = _Peer(self.target.connect(), time.monotonic())
        threading.Thread(target=self._answer, args=(address, peer), daemon=True).start()
        return peer

    def _answer(self, address: _Address, peer: _Peer) -> None:
        # The guest's end may be gone or never have been; the next datagram tries anew.
        with peer.forward, contextlib.suppress(AgentError, OSError):
            while (data := peer.forward.recv()) is not None:
                peer.used = time.monotonic()
                self.socket.sendto(data, address)
        with self.lock:
            if self.peers.get(address) is peer:
                del self.peers[address]

    def _forget_idle(self) -> None:
        now = time.monotonic()
        with self.lock:
            idle = [peer for peer in self.peers.values() if now - peer.used > UDP_IDLE_SECS]
        for peer in idle:
            peer.forward.close()
