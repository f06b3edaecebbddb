"""The agents that the contract suite runs against: one on this host over a Unix socket, one in a booted guest over
vsock. Both are restarted when they end, as a guest's init does it, and everything is asked of them through the contract
itself, so that a test does not know which one it talks to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.crates import HAS_CARGO, built
from tests.e2e.conftest import PROJECT, Cli
from tests.guests import host_programs, skip_without_qemu
from vzrepro.guest.vm import agent_pb2 as pb
from vzrepro.guest.vm import boot
from vzrepro.guest.vm.agent import AgentClient, AgentError, Execution
from vzrepro.guest.vm.dial import Dial, Proxy, private_socket

LIMIT_SECS = 600.0
"""Only a broken agent meets it: an emulated guest on a busy host is very slow."""


_ENVIRONMENT = {**os.environ, "AGENTS_OWN": "1"}
"""What the host's agent is started with; its commands must not see it."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole stream of events; what holds for every stream was asserted while it was read. `end` is the exit code, or
    the sentence that says why the command could not start."""

    exec_id: int
    stdout: bytes
    stderr: bytes
    end: int | str

    @property
    def text(self) -> str:
        return self.stdout.decode()


@dataclass(slots=True)
class Follower:
    """Reads a stream piece by piece, and asserts what holds for every stream."""

    execution: Execution
    request_id: str = ""
    exec_id: int = 0
    sequence: int = 0
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    end: int | str | None = None

    def step(self) -> pb.ExecEvent | None:
        """The next event; None at the end of the stream."""
        event = next(self.execution, None)
        if event is None:
            assert self.end is not None, "a stream ends with exit_code or error"
            return None
        assert self.end is None, f"{event} follows the last event"
        self.sequence += 1
        assert event.sequence == self.sequence
        assert event.request_id == self.request_id
        if self.sequence == 1:
            assert event.exec_id, "the first event carries the exec_id"
            self.exec_id = event.exec_id
        assert event.exec_id in (0, self.exec_id)
        match event.WhichOneof("event"):
            case "stdout":
                self.stdout += event.stdout
            case "stderr":
                self.stderr += event.stderr
            case "exit_code":
                self.end = event.exit_code
            case "error":
                assert event.error, "an error is a sentence"
                self.end = event.error
            case nothing:
                raise AssertionError(f"an event without {nothing}")
        return event

    def until(self, wanted: bytes) -> Follower:
        """Read on until stdout has `wanted`."""
        while wanted not in self.stdout:
            assert self.step() is not None, f"ended with {self.end!r} and without {wanted!r}: {bytes(self.stdout)!r}"
        return self

    def started(self) -> Follower:
        """Read on until the exec_id is known."""
        while not self.exec_id:
            assert self.step() is not None
        return self

    def whole(self) -> Transcript:
        """Read to the end."""
        while self.step() is not None:
            pass
        assert self.end is not None
        return Transcript(self.exec_id, bytes(self.stdout), bytes(self.stderr), self.end)


@dataclass(slots=True)
class Side:
    """A running agent: `name` is `host` or `guest`, `dial` opens a bare stream to it, `target` is gRPC's name of it."""

    name: str
    client: AgentClient
    target: str
    dial: Dial

    def connect(self) -> AgentClient:
        """One more client, with a connection of its own."""
        return AgentClient(self.target)

    @property
    def is_root(self) -> bool:
        """Whether the agent may become other users."""
        return self.name == "guest" or os.geteuid() == 0

    def exec(
        self,
        command: str,
        arguments: Sequence[str] = (),
        *,
        client: AgentClient | None = None,
        env: Mapping[str, str] | None = None,
        working_dir: str = "",
        user: str = "",
        pty: tuple[int, int] | None = None,
        request_id: str = "",
        key: str = "",
    ) -> Follower:
        """Start a command."""
        execution = (client or self.client).exec(
            command,
            arguments,
            env=env,
            working_dir=working_dir,
            user=user,
            pty=pty,
            request_id=request_id,
            idempotency_key=key,
            timeout_secs=LIMIT_SECS,
        )
        return Follower(execution, request_id)

    def shell(
        self,
        script: str,
        *,
        client: AgentClient | None = None,
        env: Mapping[str, str] | None = None,
        user: str = "",
        pty: tuple[int, int] | None = None,
        key: str = "",
    ) -> Follower:
        """Start a shell script."""
        return self.exec("/bin/sh", ["-c", script], client=client, env=env, user=user, pty=pty, key=key)

    def text(self, script: str) -> str:
        """What a shell script prints that succeeds."""
        done = self.shell(script).whole()
        assert done.end == 0, (script, done)
        return done.text.strip()

    def pid(self) -> int:
        """The agent's process id."""
        return int(self.text("echo $PPID"))

    def kill_agent(self) -> None:
        """Kill the agent, see that it is gone, and wait until it is back."""
        with pytest.raises(AgentError):
            self.shell("kill -KILL $PPID").whole()
        self.client.ping(LIMIT_SECS)

    def resident_kib(self) -> int:
        """The agent's resident memory."""
        return int(self.text("sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/$PPID/status"))

    def alive(self, *pids: int) -> list[int]:
        """Those of the processes that are there, zombies not counted."""
        show = "sed -n 's/^State:[^A-Z]*\\([A-Z]\\).*/'$p' \\1/p' /proc/$p/status"
        script = f"for p in {' '.join(map(str, pids))}; do {show}; done 2>/dev/null; :"
        pairs = [line.split() for line in self.text(script).splitlines()]
        return [int(pid) for pid, state in pairs if state not in "ZX"]

    def zombies(self) -> list[str]:
        """The agent's children that ended and were not reaped: the lines of their /proc/PID/stat."""
        script = 'for f in /proc/[0-9]*/stat; do IFS= read -r l < $f && echo "$PPID $l"; done 2>/dev/null; :'
        found = []
        for line in self.text(script).splitlines():
            agent, _, stat = line.partition(" ")
            state, parent = stat.rpartition(") ")[2].split()[:2]
            if state == "Z" and parent == agent:
                found.append(stat)
        return found


@contextlib.contextmanager
def refused(*statuses: str) -> Iterator[None]:
    """The block makes a call that the agent refuses, with one of the statuses and a sentence."""
    with pytest.raises(AgentError) as refusal:
        yield
    assert refusal.value.status in statuses, refusal.value
    assert " " in (refusal.value.reason or ""), "a failing call says why in a sentence"


def eventually(done: Callable[[], bool], what: str) -> None:
    """Wait until `done()`."""
    deadline = time.monotonic() + LIMIT_SECS
    while not done():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def realized() -> Callable[[str], Path]:
    """Realize a target in the project's own workspace and store: `realized("guest-agent")`."""
    project = Cli(PROJECT, PROJECT / "store")
    return lambda target: project.realize(target)[0]


@pytest.fixture(scope="session")
def agent_program(realized: Callable[[str], Path]) -> Path:
    """The agent for this machine: as its crate's tests build it where there is cargo, else as its recipe does, and that
    takes minutes more."""
    if HAS_CARGO:
        return built("guest-agent", "vz-guest-agent")
    return realized("guest-agent-host") / "vz-guest-agent"


@pytest.fixture(scope="session")
def host_side(agent_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """The agent on this host."""
    with host_agent(agent_program, tmp_path_factory.mktemp("a") / "agent") as side:
        yield side


@pytest.fixture(scope="session")
def guest_side(realized: Callable[[str], Path]) -> Iterator[Side]:
    """The agent in a guest."""
    skip_without_qemu()
    with guest_agent(realized) as side:
        yield side


@pytest.fixture(scope="session", params=["host", pytest.param("guest", marks=pytest.mark.thorough)])
def side(request: pytest.FixtureRequest) -> Side:
    """Each of the two agents; all tests of a session share them, whatever the order of their files. `tests/hosts` plays
    with the one in a guest, too."""
    side: Side = request.getfixturevalue(f"{request.param}_side")
    return side


@pytest.fixture
def agent(side: Side) -> Side:
    """The agent, answering: an earlier test may have killed it."""
    side.client.ping(LIMIT_SECS)
    return side


@contextlib.contextmanager
def host_agent(program: Path, socket_path: Path, *options: str) -> Iterator[Side]:
    """The agent as a process of this machine, on a Unix socket."""

    def dial() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(str(socket_path))
        except OSError:
            stream.close()
            raise
        return stream

    target = f"unix:{socket_path}"
    with _kept_alive([str(program), "--listen", target, *options]), AgentClient(target) as client:
        client.ping(LIMIT_SECS)
        yield Side("host", client, target, dial)


@contextlib.contextmanager
def _kept_alive(command: Sequence[str]) -> Iterator[None]:
    """Run `command`, and again when it ends. It dies with this process."""
    # As the guest's init starts it: a shell has what runs in its background ignore these two.
    shell = ["sh", "-c", 'ulimit -c 0; trap "" INT QUIT; exec "$0" "$@"', *command]
    dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"] if sys.platform == "linux" else []
    stop = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []

    # One thread, that lives as long: the kernel takes the end of the thread that started a process for our end.
    def keep() -> None:
        while not stop.is_set():
            with subprocess.Popen([*dies_with_us, *shell], start_new_session=True, env=_ENVIRONMENT) as process:
                processes.append(process)
                while process.poll() is None:
                    if stop.wait(0.02):
                        process.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def guest_agent(realized: Callable[[str], Path]) -> Iterator[Side]:
    """The agent in a booted guest of the container profile, over vsock."""
    guest = boot.of_bundle(realized("container-bundle"))
    programs = host_programs(lambda *names: [realized(name) for name in names])
    with (
        boot.running(guest, programs=programs, timeout_secs=LIMIT_SECS) as vm,
        tempfile.TemporaryDirectory(prefix="vz-") as directory,
    ):
        proxy = Proxy(private_socket(Path(directory), "agent"), vm.dial)
        yield Side("guest", vm.agent, proxy.target, vm.dial)
        proxy.close()
