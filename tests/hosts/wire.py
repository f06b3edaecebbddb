"""The agent's protocol as a host speaks it: stubs generated from the .proto, plain channels, requests numbered per
connection.

A host starts to count at 1 in every connection and makes its idempotency keys of that, so two connections use the same
keys for different requests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

# Children of ours only ever become other programs; read when gRPC is loaded.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc

from vzrepro.guest.vm.dial import Dial, Proxy

PROTO = Path(__file__).parents[2] / "recipes/guest-agent/proto/vz/agent/v1"
PATIENCE_SECS = 300.0
"""Only a broken guest meets it: an emulated one on a busy host is very slow."""

Say = Callable[[str], object]


@functools.cache
def stubs() -> tuple[ModuleType, ModuleType]:
    """The messages and the service stubs that protoc makes of the agent's .proto now."""
    with tempfile.TemporaryDirectory() as folder:
        out = (f"--python_out={folder}", f"--grpc_python_out={folder}")
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *out, "agent.proto"]
        subprocess.run(command, check=True)
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("agent_pb2"), importlib.import_module("agent_pb2_grpc")
        finally:
            sys.path.remove(folder)


class Refused(Exception):
    """The agent refused a call, or is gone: gRPC's name of the reason, in lower case, and the sentence."""

    def __init__(self, call: str, error: grpc.RpcError) -> None:
        self.status: str = error.code().name.lower()
        self.sentence: str = error.details() or ""
        super().__init__(f"{call}: {self.status}: {self.sentence}")


@dataclass(slots=True)
class Output:
    """What a command wrote and how it ended: its exit code, or the sentence that says why it could not start."""

    stdout: bytes = b""
    stderr: bytes = b""
    end: int | str = "no last event"

    @property
    def text(self) -> str:
        """Both streams, as text."""
        return (self.stdout + self.stderr).decode()


@dataclass(slots=True)
class Running:
    """A command that runs in the guest, and the stream of its events."""

    connection: Connection
    call: Any
    words: str
    exec_id: int = 0
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    end: int | str | None = None
    sequence: int = 0

    def step(self) -> bool:
        """Take one event; False at the end of the stream."""
        try:
            event = next(self.call, None)
        except grpc.RpcError as error:
            raise Refused(f"Exec {self.words}", error) from None
        if event is None:
            return False
        assert self.end is None, f"{event} follows the last event"
        assert event.sequence > self.sequence
        self.sequence = event.sequence
        self.exec_id = self.exec_id or event.exec_id
        match event.WhichOneof("event"):
            case "stdout":
                self.stdout += event.stdout
            case "stderr":
                self.stderr += event.stderr
            case "exit_code":
                self.end = event.exit_code
            case "error":
                self.end = event.error
        return True

    def until(self, wanted: str) -> Running:
        """Read on until standard output has `wanted`."""
        while wanted.encode() not in self.stdout:
            assert self.step(), f"{self.words}: ended with {self.end!r}: {bytes(self.stdout + self.stderr)!r}"
        return self

    def started(self) -> Running:
        """Read on until the command's id is known."""
        while not self.exec_id:
            assert self.step()
        return self

    def output(self) -> Output:
        """Read to the end."""
        while self.step():
            pass
        assert self.end is not None, "a stream ends with exit_code or error"
        return Output(bytes(self.stdout), bytes(self.stderr), self.end)

    def write(self, data: bytes) -> None:
        """Give it input; hosts send their own pieces of at most 32 KiB."""
        pb, _ = stubs()
        for at in range(0, len(data), 32 << 10):
            piece = data[at : at + (32 << 10)]
            request = pb.StdinWriteRequest(exec_id=self.exec_id, data=piece, metadata=self.connection.metadata())
            self.connection.call("StdinWrite", self.connection.agent.StdinWrite, request)

    def close_stdin(self) -> None:
        """End its input."""
        pb, _ = stubs()
        request = pb.StdinCloseRequest(exec_id=self.exec_id, metadata=self.connection.metadata())
        self.connection.call("StdinClose", self.connection.agent.StdinClose, request)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        pb, _ = stubs()
        request = pb.SignalRequest(exec_id=self.exec_id, signal=number, metadata=self.connection.metadata())
        self.connection.call(f"Signal {number}", self.connection.agent.Signal, request)

    def resize(self, rows: int, cols: int) -> None:
        """Give its terminal another size."""
        pb, _ = stubs()
        metadata = self.connection.metadata()
        request = pb.ResizeExecPtyRequest(exec_id=self.exec_id, rows=rows, cols=cols, metadata=metadata)
        self.connection.call("ResizeExecPty", self.connection.agent.ResizeExecPty, request)


class Connection:
    """One connection of a host to the agent, by way of a Unix socket in `folder`, which a plain channel without any
    option is given; `name` is the socket's and what `say` calls it."""

    def __init__(self, dial: Dial, folder: Path, name: str, say: Say) -> None:
        _, services = stubs()
        self.name = name
        self._say = say
        self._proxy = Proxy(folder / name, dial)
        self.channel = grpc.insecure_channel(self._proxy.target)
        self._count = 0
        self.agent = services.AgentServiceStub(self.channel)
        self.oci = services.OciServiceStub(self.channel)
        self.network = services.NetworkServiceStub(self.channel)

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self.channel.close()
        self._proxy.close()

    def cut(self) -> None:
        """Break the connection without a word of HTTP/2, as the end of a host's process does."""
        self._proxy.close()

    def metadata(self, operation: str = "") -> Any:
        """The next request's metadata. What changes something has a key, `operation:req_…`."""
        pb, _ = stubs()
        self._count += 1
        request_id = f"req_{self._count:016x}"
        return pb.TransportMetadata(
            request_id=request_id, idempotency_key=f"{operation}:{request_id}" if operation else ""
        )

    def say(self, what: str) -> None:
        """A line of the log."""
        self._say(f"{self.name:<6} {what}")

    def call(self, what: str, method: Any, request: Any, secs: float = PATIENCE_SECS) -> Any:
        """Make a call that has one answer. Raises Refused."""
        metadata = getattr(request, "metadata", None)
        number = (metadata.idempotency_key or metadata.request_id) if metadata is not None else ""
        try:
            answer = method(request, timeout=secs, wait_for_ready=True)
        except grpc.RpcError as error:
            self.say(f"{what}  [{number}]  {error.code().name}: {error.details()}")
            raise Refused(what, error) from None
        said = " ".join(str(answer).split())
        self.say(f"{what}  [{number}]  ok {said}".rstrip())
        return answer

    # --- AgentService ---

    def ping(self, secs: float = PATIENCE_SECS) -> None:
        """Is the agent there?"""
        pb, _ = stubs()
        self.call("Ping", self.agent.Ping, pb.PingRequest(), secs)

    def system_info(self) -> Any:
        """What the guest is."""
        pb, _ = stubs()
        return self.call("SystemInfo", self.agent.SystemInfo, pb.SystemInfoRequest())

    def resource_stats(self) -> Any:
        """What the guest uses."""
        pb, _ = stubs()
        return self.call("ResourceStats", self.agent.ResourceStats, pb.ResourceStatsRequest())

    def exec(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        working_dir: str = "",
        user: str = "",
        pty: tuple[int, int] | None = None,
        secs: float = PATIENCE_SECS,
    ) -> Running:
        """Start a command."""
        pb, _ = stubs()
        rows, cols = pty or (0, 0)
        request = pb.ExecRequest(
            command=words[0],
            args=words[1:],
            working_dir=working_dir,
            env=env or {},
            user=user,
            metadata=self.metadata("exec_container"),
            allocate_pty=pty is not None,
            term_rows=rows,
            term_cols=cols,
        )
        self.say(f"Exec {' '.join(' '.join(words).split())}  [{request.metadata.idempotency_key}]")
        return Running(self, self.agent.Exec(request, timeout=secs, wait_for_ready=True), words[0])

    def run(self, *words: str, **options: Any) -> Output:
        """Run a command to its end."""
        output = self.exec(*words, **options).output()
        self.say(f"  → {output.end}  {' '.join(output.text.split())[:160]}".rstrip())
        return output

    def text(self, *words: str, **options: Any) -> str:
        """What a command prints, both streams, that ends with 0."""
        output = self.run(*words, **options)
        assert output.end == 0, f"{' '.join(words)}: {output}"
        return output.text

    def shell(self, script: str, **options: Any) -> str:
        """What a script prints, both streams, that ends with 0."""
        return self.text("/bin/sh", "-c", script, **options)

    @contextlib.contextmanager
    def forward(self, port: int, host: str = "", protocol: str = "tcp") -> Iterator[Forward]:
        """A connection to a port that the guest reaches."""
        pb, _ = stubs()
        opening = pb.PortForwardOpen(
            target_port=port, protocol=protocol, target_host=host, metadata=self.metadata("port_forward")
        )
        self.say(f"PortForward {host or '127.0.0.1'}:{port}")
        forward = Forward(self.agent, pb.PortForwardFrame(open=opening))
        try:
            yield forward
        finally:
            forward.call.cancel()

    # --- OciService ---

    def oci_create(self, container_id: str, bundle: str) -> None:
        """Make a container of a bundle in the guest."""
        pb, _ = stubs()
        metadata = self.metadata("create_container")
        request = pb.OciCreateRequest(container_id=container_id, bundle_path=bundle, metadata=metadata)
        self.call(f"Create {container_id} {bundle}", self.oci.Create, request)

    def oci_start(self, container_id: str) -> None:
        """Let it run."""
        pb, _ = stubs()
        request = pb.OciStartRequest(container_id=container_id, metadata=self.metadata("start_container"))
        self.call(f"Start {container_id}", self.oci.Start, request)

    def oci_state(self, container_id: str) -> Any:
        """What it is doing."""
        pb, _ = stubs()
        request = pb.OciStateRequest(container_id=container_id, metadata=self.metadata())
        return self.call(f"State {container_id}", self.oci.State, request)

    def oci_exec(self, container_id: str, *words: str, **options: Any) -> Any:
        """Run a command in it to its end."""
        pb, _ = stubs()
        metadata = self.metadata("exec_container")
        request = pb.OciExecRequest(
            container_id=container_id, command=words[0], args=words[1:], metadata=metadata, **options
        )
        return self.call(f"Exec in {container_id}: {' '.join(words)}", self.oci.Exec, request)

    def oci_kill(self, container_id: str, signal: str) -> None:
        """Send its first process a signal."""
        pb, _ = stubs()
        metadata = self.metadata("stop_container")
        request = pb.OciKillRequest(container_id=container_id, signal=signal, metadata=metadata)
        self.call(f"Kill {container_id} {signal}", self.oci.Kill, request)

    def oci_delete(self, container_id: str, *, force: bool = True) -> None:
        """Remove it."""
        pb, _ = stubs()
        metadata = self.metadata("remove_container")
        request = pb.OciDeleteRequest(container_id=container_id, force=force, metadata=metadata)
        self.call(f"Delete {container_id}{' force' if force else ''}", self.oci.Delete, request)

    # --- NetworkService ---

    def network_setup(self, stack: str, services: Sequence[tuple[str, str, str]]) -> None:
        """Give services networks: (name, address as CIDR, network), a service once for each network that it is on."""
        pb, _ = stubs()
        configs = [pb.NetworkServiceConfig(name=name, addr=addr, network_name=net) for name, addr, net in services]
        request = pb.NetworkSetupRequest(stack_id=stack, services=configs, metadata=self.metadata("setup_network"))
        shown = ", ".join(" ".join(service) for service in services)
        self.call(f"Setup {stack}: {shown}", self.network.Setup, request)

    def network_teardown(self, stack: str, *services: str) -> None:
        """Take services off their networks."""
        pb, _ = stubs()
        metadata = self.metadata("teardown_network")
        request = pb.NetworkTeardownRequest(stack_id=stack, service_names=services, metadata=metadata)
        self.call(f"Teardown {stack}: {', '.join(services)}", self.network.Teardown, request)


class Forward:
    """A forwarded connection. Hosts send a frame, or more, and read what comes until the stream ends."""

    def __init__(self, agent: Any, opening: Any) -> None:
        self._frames: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._frames.put(opening)
        self.call = agent.PortForward(iter(self._frames.get, None), timeout=PATIENCE_SECS, wait_for_ready=True)

    def send(self, data: bytes) -> None:
        """Pass bytes on."""
        pb, _ = stubs()
        self._frames.put(pb.PortForwardFrame(data=data))

    def end(self) -> None:
        """Send no more."""
        self._frames.put(None)

    def received(self) -> bytes:
        """Everything that comes until the end. Raises Refused."""
        try:
            return b"".join(frame.data for frame in self.call)
        except grpc.RpcError as error:
            raise Refused("PortForward", error) from None
