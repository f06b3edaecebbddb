"""A guest's command as if it were here, a guest's port on the host: `attach` over both agents, as a process with pipes,
signals and a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.contract.agents import LIMIT_SECS, Side, eventually
from tests.e2e.conftest import PROJECT
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import attach

PIPE = subprocess.PIPE


def start(
    agent: Side,
    script: str,
    kind: str = "pipes",
    *,
    stdin: int = PIPE,
    stdout: int = PIPE,
    stderr: int = PIPE,
) -> subprocess.Popen[bytes]:
    """A process that runs a shell script where the agent is."""
    command = [sys.executable, "-m", "tests.contract.attached", agent.target, kind, "/bin/sh", "-c", script]
    if stdin not in (PIPE, subprocess.DEVNULL) and os.isatty(stdin):
        command = ["setsid", "--ctty", *command]
    return subprocess.Popen(command, cwd=PROJECT, stdin=stdin, stdout=stdout, stderr=stderr)


def run(agent: Side, script: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of a script."""
    with start(agent, script) as process:
        out, err = process.communicate(data, timeout=LIMIT_SECS)
    return process.returncode, out, err


def line(process: subprocess.Popen[bytes]) -> bytes:
    """The next line of a process's stdout."""
    assert process.stdout is not None
    found = process.stdout.readline()
    assert found, process.communicate(timeout=LIMIT_SECS)
    return found


# --- Pipes -------------------------------------------------------------------------------------------------------


def test_streams_and_exit_code_are_the_commands(agent: Side) -> None:
    assert run(agent, "cat; echo err >&2; exit 3", b"in\0put") == (3, b"in\0put", b"err\n")
    assert run(agent, "kill -KILL $$") == (137, b"", b"")


def test_much_goes_in_and_comes_out(agent: Side) -> None:
    data = os.urandom(2_000_000)
    assert run(agent, "cat", data) == (0, data, b"")


def test_a_command_need_not_read_its_input(agent: Side) -> None:
    assert run(agent, "exit 5", bytes(1_000_000)) == (5, b"", b"")
    assert run(agent, "head -c 3; exit 6", b"x" * 1_000_000) == (6, b"xxx", b"")


def test_an_input_that_stays_open_holds_nobody_up_and_keeps_what_comes_later(agent: Side) -> None:
    reading, writing = os.pipe()
    with start(agent, "read line; echo got $line", stdin=reading) as process:
        os.write(writing, b"one\n")
        assert process.communicate(timeout=LIMIT_SECS) == (b"got one\n", b"")
    os.write(writing, b"two\n")
    assert os.read(reading, 100) == b"two\n"
    os.close(reading)
    os.close(writing)


def test_a_command_that_cannot_start_is_an_error(agent: Side) -> None:
    command = [sys.executable, "-m", "tests.contract.attached", agent.target, "pipes", "/no/such/command"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"/no/such/command") >= 2, "what and why"


def test_output_that_nobody_reads_any_more_ends_the_command(agent: Side) -> None:
    with start(agent, "echo $$; exec yes") as process:
        pid = int(line(process))
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LIMIT_SECS) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""
    eventually(lambda: not agent.alive(pid), "the command's end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_reach_the_command(agent: Side, number: signal.Signals) -> None:
    with start(agent, f"trap 'echo caught; exit 9' {number.name[3:]}; echo up; while :; do sleep 0.1; done") as process:
        assert line(process) == b"up\n"
        process.send_signal(number)
        # On stderr the shell may say what became of its `sleep`.
        assert process.communicate(timeout=LIMIT_SECS)[0] == b"caught\n"
        assert process.returncode == 9
    with start(agent, "echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        process.send_signal(number)
        assert process.wait(LIMIT_SECS) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_command_that_does_not_mind_the_first(agent: Side, number: signal.Signals) -> None:
    script = f"trap 'echo no' {number.name[3:]}; echo $$; while :; do sleep 0.1; done"
    with start(agent, script) as process:
        pid = int(line(process))
        process.send_signal(number)
        assert line(process) == b"no\n"
        process.send_signal(number)
        assert process.wait(LIMIT_SECS) == 130
    eventually(lambda: not agent.alive(pid), "the command's end")


def test_a_command_ends_with_its_host_process(agent: Side) -> None:
    with start(agent, "echo $$; exec sleep 1000") as process:
        pid = int(line(process))
        process.kill()
    eventually(lambda: not agent.alive(pid), "the command's end")


def test_an_agent_that_goes_away_is_an_error(agent: Side) -> None:
    with start(agent, "echo up; exec sleep 1000") as process:
        assert line(process) == b"up\n"
        agent.kill_agent()
        _, err = process.communicate(timeout=LIMIT_SECS)
        assert process.returncode == 1
        assert b"the guest agent's Exec failed" in err


# --- Terminals ---------------------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """A terminal of ours: `keys` is the user's side, `device` the one that a process has."""

    keys: int
    device: int
    shown: bytearray = field(default_factory=bytearray)

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.keys, termios.TIOCSWINSZ, struct.pack("4H", rows, cols, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.keys, data)

    def until(self, wanted: bytes) -> None:
        """Read until `wanted` is shown; what came before is dropped."""
        while wanted not in self.shown:
            assert select.select([self.keys], [], [], LIMIT_SECS)[0], f"never showed {wanted!r}, but {self.shown!r}"
            self.shown += os.read(self.keys, 65536)
        del self.shown[: self.shown.index(wanted) + len(wanted)]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    keys, device = pty.openpty()
    terminal = Terminal(keys, device)
    terminal.resize(40, 100)
    yield terminal
    os.close(keys)
    os.close(device)


@pytest.fixture
def on_terminal(agent: Side, terminal: Terminal) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes on the terminal: afterwards they have ended and the terminal is as it was."""
    before = termios.tcgetattr(terminal.device)
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.wait(LIMIT_SECS)
    assert termios.tcgetattr(terminal.device) == before


def show(agent: Side, terminal: Terminal, script: str) -> subprocess.Popen[bytes]:
    return start(agent, script, "pty", stdin=terminal.device, stdout=terminal.device, stderr=terminal.device)


def test_a_terminal_passes_every_key_and_its_size(
    agent: Side, terminal: Terminal, on_terminal: list[subprocess.Popen[bytes]]
) -> None:
    traps = "trap 'stty size' WINCH; trap 'echo caught; exit 4' INT"
    script = f'{traps}; stty size; echo up; read line; echo "<$line>"; while :; do sleep 0.1; done'
    process = show(agent, terminal, script)
    on_terminal.append(process)
    terminal.until(b"40 100\r\n")
    terminal.until(b"up\r\n")
    assert not termios.tcgetattr(terminal.device)[3] & (termios.ECHO | termios.ICANON)
    terminal.type(b"hello\r")
    terminal.until(b"hello\r\n<hello>\r\n")
    terminal.resize(50, 132)
    terminal.until(b"50 132\r\n")
    terminal.type(b"\x03")
    terminal.until(b"caught\r\n")
    assert process.wait(LIMIT_SECS) == 4


@pytest.mark.parametrize("how", ["the command", "SIGTERM", "the agent", "two SIGTERM"])
def test_a_terminal_is_put_right_however_it_ends(
    agent: Side, terminal: Terminal, on_terminal: list[subprocess.Popen[bytes]], how: str
) -> None:
    trap = "trap 'echo trapped' TERM" if how == "two SIGTERM" else ":"
    process = show(agent, terminal, f'{trap}; echo up; read line; while :; do sleep 0.1; [ "$line" ] && exit 2; done')
    on_terminal.append(process)
    terminal.until(b"up\r\n")
    match how:
        case "the command":
            terminal.type(b"go\r")
            assert process.wait(LIMIT_SECS) == 2
        case "SIGTERM":
            process.terminate()
            assert process.wait(LIMIT_SECS) == 128 + signal.SIGTERM
        case "the agent":
            agent.kill_agent()
            assert process.wait(LIMIT_SECS) == 1
        case "two SIGTERM":
            process.terminate()
            terminal.until(b"trapped")
            process.terminate()
            assert process.wait(LIMIT_SECS) == 130


def test_a_terminal_there_needs_none_here(agent: Side) -> None:
    with start(agent, "stty -echo; [ -t 0 ] && stty size; cat", "pty", stdin=subprocess.DEVNULL) as process:
        out, err = process.communicate(timeout=LIMIT_SECS)
    assert (out, err, process.returncode) == (b"24 80\r\n", b"", 0)


# --- Ports -------------------------------------------------------------------------------------------------------


def connect(port: int) -> socket.socket:
    stream = socket.create_connection(("127.0.0.1", port), timeout=LIMIT_SECS)
    stream.settimeout(LIMIT_SECS)
    return stream


def all_of(stream: socket.socket) -> bytes:
    received = bytearray()
    while data := stream.recv(65536):
        received += data
    return bytes(received)


@pytest.fixture
def tcp_echo(agent: Side) -> Iterator[int]:
    """A TCP port where the agent is: what is sent there comes back, connection by connection."""
    if agent.name == "guest":
        server = agent.shell("echo up; while :; do nc -l -p 4000 -e cat; done").until(b"up")
        yield 4000
        server.execution.close()
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    stream, _ = listener.accept()
                except OSError:
                    return
                with stream, contextlib.suppress(OSError):
                    while data := stream.recv(65536):
                        stream.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_published_port_carries_both_ways_to_the_end(agent: Side, tcp_echo: int) -> None:
    data = os.urandom(3_000_000)
    with attach.publish(agent.client, 0, tcp_echo) as port:
        for _ in range(3):
            with patient(port) as stream:
                writer = threading.Thread(target=stream.sendall, args=(data,))
                writer.start()
                received = b""
                while len(received) < len(data):
                    received += stream.recv(65536)
                writer.join()
                assert received == data
                stream.shutdown(socket.SHUT_WR)
                assert all_of(stream) == b""
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def patient(port: int) -> socket.socket:
    """A connection whose first byte came back: the guest's server takes one at a time, and is not always there."""
    deadline = time.monotonic() + LIMIT_SECS
    while True:
        stream = connect(port)
        try:
            stream.sendall(b"?")
            if stream.recv(1) == b"?":
                return stream
        except ConnectionError:
            pass
        stream.close()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_many_connections_of_a_published_port_at_once(agent: Side) -> None:
    if agent.name == "guest":
        pytest.skip("the guest's server takes one connection at a time")
    with (
        socket.create_server(("127.0.0.1", 0), backlog=200) as listener,
        attach.publish(agent.client, 0, listener.getsockname()[1]) as port,
    ):
        streams = [connect(port) for _ in range(100)]
        for number, stream in enumerate(streams):
            stream.sendall(b"%d\n" % number)
        for _ in streams:
            server, _ = listener.accept()
            with server, server.makefile("rwb") as lines:
                lines.write(b"hello " + lines.readline())
        for number, stream in enumerate(streams):
            with stream:
                assert all_of(stream) == b"hello %d\n" % number


def test_a_port_where_nobody_listens_resets_the_connection(agent: Side) -> None:
    with attach.publish(agent.client, 0, 1) as port, connect(port) as stream, pytest.raises(ConnectionResetError):
        stream.recv(1)
        pytest.fail("an ordinary end")


def test_a_published_ports_connections_end_with_it(agent: Side, tcp_echo: int) -> None:
    with attach.publish(agent.client, 0, tcp_echo) as port:
        stream = patient(port)
    with stream, contextlib.suppress(ConnectionResetError):
        assert stream.recv(1) == b""


def test_a_port_that_is_taken_is_an_error(agent: Side) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(VzreproError, match="cannot be published") as error,
        attach.publish(agent.client, taken.getsockname()[1], 80),
    ):
        pass
    assert "in use" in (error.value.reason or "")
    for protocol in ("tcp", "udp"):
        with pytest.raises(VzreproError), attach.publish(agent.client, 70_000, 80, protocol=protocol):
            pass


@pytest.fixture
def udp_echo(agent: Side) -> Iterator[int]:
    """A UDP port where the agent is, whose answers are the datagrams themselves."""
    if agent.name == "guest":
        pytest.skip("nothing in the guest serves UDP")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.1)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    data, peer = server.recvfrom(65536)
                    server.sendto(b"echo " + data, peer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        stop.set()
        thread.join()


def test_a_published_udp_port_keeps_its_peers_apart(agent: Side, udp_echo: int) -> None:
    with attach.publish(agent.client, 0, udp_echo, protocol="udp") as port:
        peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(5)]
        for number, peer in enumerate(peers):
            peer.settimeout(LIMIT_SECS)
            peer.connect(("127.0.0.1", port))
            peer.send(b"%d" % number)
        for number, peer in enumerate(peers):
            assert peer.recv(100) == b"echo %d" % number
            peer.send(b"")
            assert peer.recv(100) == b"echo "
            peer.send(bytes(9000))
            assert peer.recv(65536) == b"echo " + bytes(9000)
            peer.close()


def test_a_udp_peer_that_is_silent_is_forgotten_and_may_come_again(
    agent: Side, udp_echo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    with (
        attach.publish(agent.client, 0, udp_echo, protocol="udp") as port,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        peer.settimeout(LIMIT_SECS)
        peer.connect(("127.0.0.1", port))
        peer.send(b"one")
        assert peer.recv(100) == b"echo one"
        monkeypatch.setattr(attach, "UDP_IDLE_SECS", 0.0)
        eventually(lambda: threading.active_count() <= before + 1, "the end of the peer's threads")
        monkeypatch.undo()
        peer.send(b"two")
        assert peer.recv(100) == b"echo two"
