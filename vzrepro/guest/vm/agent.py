"""Calls `vz.agent.v1` on the agent of a guest: one method of `AgentClient` for each method of the contract.

`agent_pb2.py` and `.pyi` beside this module are generated from the agent's own .proto (tests/unit/test_vm_proto.py
has the command); the calls below name the methods themselves, so that no generated service code is needed.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

# Children of ours only ever become other programs. gRPC's handlers would work on its descriptors between fork and exec,
# and print errors into the child's output, or abort it. Read when gRPC is loaded.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
import grpc

from vzrepro.base.errors import TimedOut, VzreproError
from vzrepro.guest.vm import agent_pb2 as pb

Protocol = Literal["tcp", "udp"]

_PATIENCE_SECS = 60.0
"""How long a call without a limit of its own may take: an emulated guest on a busy host is slow, not dead."""

# gRPC's own pause after a failed attempt is a second, longer than a guest takes to boot.
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Despite its name: how long one attempt may take.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
    # Clients of two guests in one process share nothing, else one guest's end would disturb the other's calls.
    ("grpc.use_local_subchannel_pool", 1),
    # Else the socket's path, percent-encoded, which agents before 0.2.0 refuse.
    ("grpc.default_authority", "localhost"),
)
# Frames of a forwarded stream that wait for the network; then `Forward.send` waits.
_FRAMES = 4
# Bytes of a command's output that are held; what our own commands say is a few thousand.
_MOST_SAID = 16 << 20


class AgentError(VzreproError):
    """The agent refused a call, or could not be reached. `status` is gRPC's name of the reason, in lower case:
    `not_found`, `already_exists`, `failed_precondition`, `invalid_argument`, `unavailable` …"""

    def __init__(self, method: str, status: str, sentence: str | None) -> None:
        super().__init__(f"the guest agent's {method} failed: {status.replace('_', ' ')}", reason=sentence)
        self.status = status
        if status == "deadline_exceeded":
            self.exit_code = TimedOut.exit_code


@dataclass(frozen=True, slots=True)
class SystemInfo:
    """What the guest says it is; sizes in bytes."""

    cpu_count: int
    memory_bytes: int
    disk_free_bytes: int
    os_version: str
    agent_protocol_revision: int


@dataclass(frozen=True, slots=True)
class ResourceStats:
    """What the guest uses; sizes in bytes, `load_average` over 1, 5 and 15 minutes."""

    cpu_usage_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    process_count: int
    load_average: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ContainerState:
    """A container: `status` is `created`, `running` or `stopped`, `pid` None when it has no process."""

    container_id: str
    status: str
    pid: int | None
    bundle_path: str


@dataclass(frozen=True, slots=True)
class ExecResult:
    """A command that ran in a container to its end."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class NetworkService:
    """A service of a stack's network: its name, its address as CIDR, the name of the network it is on."""

    name: str
    addr: str
    network_name: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: its exit code, or the `error` that kept it from having one. `said` is all it said, both
    streams as they came."""

    code: int | None
    error: str | None
    stdout: bytes
    stderr: bytes
    said: bytes

    @property
    def text(self) -> str:
        """What it said, or why it could not."""
        return self.error or self.said.decode("utf-8", "replace").strip()


class Execution:
    """The events of a command that runs in the guest: iterate over it. The last is `exit_code` or `error`.

    Iterating raises AgentError. Closing it early, as the end of its context does, ends the command.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[pb.ExecEvent]:
        return self

    def __next__(self) -> pb.ExecEvent:
        try:
            event: pb.ExecEvent = next(self._call)
        except grpc.RpcError as error:
            raise _failed("Exec", error) from error
        return event

    def finish(self, on_stdout: Callable[[bytes], object] | None = None) -> Ended:
        """Wait for the end. Standard output goes to `on_stdout` as it comes, if given, and else into the result.

        Raises AgentError; VzreproError when the result would be larger than any command's of ours.
        """
        out, err, said = bytearray(), bytearray(), bytearray()
        code, error = None, "the guest agent did not say how the command ended"
        for event in self:
            match event.WhichOneof("event"):
                case "stdout" if on_stdout is not None:
                    on_stdout(event.stdout)
                case "stdout" | "stderr":
                    out += event.stdout
                    err += event.stderr
                    said += event.stdout + event.stderr
                    if len(said) > _MOST_SAID:
                        raise VzreproError(f"a command in the guest says more than {_MOST_SAID >> 20} MiB")
                case "exit_code":
                    code = event.exit_code
                    break
                case "error":
                    error = event.error
                    break
        return Ended(code, error if code is None else None, bytes(out), bytes(err), bytes(said))

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Read no more. A command that still runs is killed by the agent."""
        self._call.cancel()


class Forward:
    """A connection to a port in the guest, to be closed. One thread may send while another receives.

    Whether the guest's port could be reached shows when something is received.
    """

    def __init__(self, multi_callable: Any, first: pb.PortForwardFrame) -> None:
        self._frames: queue.Queue[pb.PortForwardFrame | None] = queue.Queue(_FRAMES)
        self._frames.put(first)
        self._call = multi_callable(iter(self._frames.get, None), wait_for_ready=False)

    def send(self, data: bytes) -> None:
        """Pass bytes on (udp: one datagram); waits while the guest takes none. After the end they are dropped."""
        self._put(pb.PortForwardFrame(data=data))

    def send_end(self) -> None:
        """Say that no more is sent; receiving goes on."""
        self._put(None)

    def recv(self) -> bytes | None:
        """The next bytes (udp: one datagram), or None at the end. Raises AgentError."""
        try:
            for frame in self._call:
                return bytes(frame.data)
        except grpc.RpcError as error:
            raise _failed("PortForward", error) from error
        return None

    def close(self) -> None:
        """End the connection both ways."""
        self._call.cancel()
        # gRPC's thread may wait for a frame. When there are some it does not, and sees that the call is over.
        with contextlib.suppress(queue.Full):
            self._frames.put_nowait(None)

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, frame: pb.PortForwardFrame | None) -> None:
        # gRPC stops taking frames when the call ends, so nobody may wait for it for ever.
        while self._call.is_active():
            try:
                return self._frames.put(frame, timeout=0.2)
            except queue.Full:
                continue
        return None


class AgentClient:
    """Calls on the agent behind a gRPC `target`. Every method raises AgentError with the agent's own sentence.

    A call that is repeated with its `idempotency_key`, on the same connection, gets the first one's answer, and nothing
    is done again. A call with a time limit waits that long for a connection too; one without fails at once when there
    is none.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        self._closed = False

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls and the connection."""
        self._closed = True
        self._channel.close()

    def ping(self, timeout_secs: float) -> None:
        """Return as soon as the agent answers; waits for a connection, and for a next one when it breaks."""
        deadline = time.monotonic() + timeout_secs
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                self._call("AgentService/Ping", pb.PingRequest(), pb.PingResponse, left)
                return
            except AgentError as error:
                # The connection of an agent that ended may be used once more before that is noticed.
                if error.status != "unavailable" or self._closed or not left:
                    raise

    def system_info(self, timeout_secs: float = 10.0) -> SystemInfo:
        """What the guest is."""
        answer = self._call("AgentService/SystemInfo", pb.SystemInfoRequest(), pb.SystemInfoResponse, timeout_secs)
        return SystemInfo(
            cpu_count=answer.cpu_count,
            memory_bytes=answer.memory_bytes,
            disk_free_bytes=answer.disk_free_bytes,
            os_version=answer.os_version,
            agent_protocol_revision=answer.agent_protocol_revision,
        )

    def resource_stats(self, timeout_secs: float = _PATIENCE_SECS) -> ResourceStats:
        """What the guest uses now."""
        request = pb.ResourceStatsRequest()
        answer = self._call("AgentService/ResourceStats", request, pb.ResourceStatsResponse, timeout_secs)
        return ResourceStats(
            cpu_usage_percent=answer.cpu_usage_percent,
            memory_used_bytes=answer.memory_used_bytes,
            memory_total_bytes=answer.memory_total_bytes,
            disk_used_bytes=answer.disk_used_bytes,
            disk_total_bytes=answer.disk_total_bytes,
            process_count=answer.process_count,
            load_average=tuple(answer.load_average),
        )

    def exec(
        self,
        command: str,
        arguments: Sequence[str] = (),
        *,
        working_dir: str = "",
        env: Mapping[str, str] | None = None,
        user: str = "",
        pty: tuple[int, int] | None = None,
        request_id: str = "",
        idempotency_key: str = "",
        timeout_secs: float | None = None,
    ) -> Execution:
        """Run a command in the guest, on a terminal of `pty` rows and columns if they are given, and follow it.

        `user` is a name or a number of the guest's, root when empty. An empty `working_dir` is the user's home, or the
        agent's directory when neither is given.
        """
        rows, cols = pty or (0, 0)
        request = pb.ExecRequest(
            command=command,
            args=list(arguments),
            working_dir=working_dir,
            env=dict(env or {}),
            user=user,
            metadata=pb.TransportMetadata(request_id=request_id, idempotency_key=idempotency_key),
            allocate_pty=pty is not None,
            term_rows=rows,
            term_cols=cols,
        )
        call = self._channel.unary_stream(
            _path("AgentService/Exec"),
            request_serializer=pb.ExecRequest.SerializeToString,
            response_deserializer=pb.ExecEvent.FromString,
        )
        with _open("Exec"):
            return Execution(call(request, timeout=timeout_secs, wait_for_ready=timeout_secs is not None))

    def stdin_write(
        self, exec_id: int, data: bytes, *, idempotency_key: str = "", timeout_secs: float | None = None
    ) -> None:
        """Give a command input. Returns when the agent has taken it: it waits for a command that does not read."""
        request = pb.StdinWriteRequest(exec_id=exec_id, data=data, metadata=_keyed(idempotency_key))
        self._call("AgentService/StdinWrite", request, pb.StdinWriteResponse, timeout_secs)

    def stdin_close(
        self, exec_id: int, *, idempotency_key: str = "", timeout_secs: float | None = _PATIENCE_SECS
    ) -> None:
        """End a command's input."""
        request = pb.StdinCloseRequest(exec_id=exec_id, metadata=_keyed(idempotency_key))
        self._call("AgentService/StdinClose", request, pb.StdinCloseResponse, timeout_secs)

    def signal(
        self, exec_id: int, number: int, *, idempotency_key: str = "", timeout_secs: float | None = _PATIENCE_SECS
    ) -> None:
        """Send a command a signal, by the guest's (Linux's) number."""
        request = pb.SignalRequest(exec_id=exec_id, signal=number, metadata=_keyed(idempotency_key))
        self._call("AgentService/Signal", request, pb.SignalResponse, timeout_secs)

    def resize(
        self,
        exec_id: int,
        rows: int,
        cols: int,
        *,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Give a command's terminal another size."""
        request = pb.ResizeExecPtyRequest(exec_id=exec_id, rows=rows, cols=cols, metadata=_keyed(idempotency_key))
        self._call("AgentService/ResizeExecPty", request, pb.ResizeExecPtyResponse, timeout_secs)

    def port_forward(self, port: int, protocol: Protocol = "tcp", host: str = "") -> Forward:
        """Connect to a port as seen from the guest; `host` is the guest itself (127.0.0.1) when empty.

        The guest waits up to 5 s for somebody to listen on a TCP port.
        """
        call = self._channel.stream_stream(
            _path("AgentService/PortForward"),
            request_serializer=pb.PortForwardFrame.SerializeToString,
            response_deserializer=pb.PortForwardFrame.FromString,
        )
        opening = pb.PortForwardOpen(target_port=port, protocol=protocol, target_host=host)
        with _open("PortForward"):
            return Forward(call, pb.PortForwardFrame(open=opening))

    def oci_create(
        self,
        container_id: str,
        bundle_path: str,
        *,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Make a container of the OCI bundle in the guest's directory `bundle_path`; it does not run yet."""
        request = pb.OciCreateRequest(
            container_id=container_id, bundle_path=bundle_path, metadata=_keyed(idempotency_key)
        )
        self._call("OciService/Create", request, pb.OciCreateResponse, timeout_secs)

    def oci_start(
        self, container_id: str, *, idempotency_key: str = "", timeout_secs: float | None = _PATIENCE_SECS
    ) -> None:
        """Have a created container run its process."""
        request = pb.OciStartRequest(container_id=container_id, metadata=_keyed(idempotency_key))
        self._call("OciService/Start", request, pb.OciStartResponse, timeout_secs)

    def oci_state(self, container_id: str, *, timeout_secs: float | None = _PATIENCE_SECS) -> ContainerState:
        """What has become of a container."""
        request = pb.OciStateRequest(container_id=container_id)
        answer = self._call("OciService/State", request, pb.OciStateResponse, timeout_secs)
        return ContainerState(answer.container_id, answer.status, answer.pid or None, answer.bundle_path)

    def oci_exec(
        self,
        container_id: str,
        command: str,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        working_dir: str = "",
        user: str = "",
        idempotency_key: str = "",
        timeout_secs: float | None = None,
    ) -> ExecResult:
        """Run a command in a running container to its end. One that is no program there ends with 127 or 126."""
        request = pb.OciExecRequest(
            container_id=container_id,
            command=command,
            args=list(arguments),
            env=dict(env or {}),
            working_dir=working_dir,
            user=user,
            metadata=_keyed(idempotency_key),
        )
        answer = self._call("OciService/Exec", request, pb.OciExecResponse, timeout_secs)
        return ExecResult(answer.exit_code, answer.stdout, answer.stderr)

    def oci_kill(
        self,
        container_id: str,
        signal: str,
        *,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Send a container's process a signal by its name, `SIGTERM` say."""
        request = pb.OciKillRequest(container_id=container_id, signal=signal, metadata=_keyed(idempotency_key))
        self._call("OciService/Kill", request, pb.OciKillResponse, timeout_secs)

    def oci_delete(
        self,
        container_id: str,
        *,
        force: bool = False,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Remove a stopped container, or with `force` any."""
        request = pb.OciDeleteRequest(container_id=container_id, force=force, metadata=_keyed(idempotency_key))
        self._call("OciService/Delete", request, pb.OciDeleteResponse, timeout_secs)

    def network_setup(
        self,
        stack_id: str,
        services: Sequence[NetworkService],
        *,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Make the network of a stack: a bridge for each network, and each service's end of it. One service may be
        named several times, once for each of its networks."""
        configs = [
            pb.NetworkServiceConfig(name=service.name, addr=service.addr, network_name=service.network_name)
            for service in services
        ]
        request = pb.NetworkSetupRequest(stack_id=stack_id, services=configs, metadata=_keyed(idempotency_key))
        self._call("NetworkService/Setup", request, pb.NetworkSetupResponse, timeout_secs)

    def network_teardown(
        self,
        stack_id: str,
        service_names: Sequence[str],
        *,
        idempotency_key: str = "",
        timeout_secs: float | None = _PATIENCE_SECS,
    ) -> None:
        """Take the named services off a stack's network."""
        request = pb.NetworkTeardownRequest(
            stack_id=stack_id, service_names=list(service_names), metadata=_keyed(idempotency_key)
        )
        self._call("NetworkService/Teardown", request, pb.NetworkTeardownResponse, timeout_secs)

    def _call(self, method: str, request: Any, response: Any, timeout_secs: float | None) -> Any:
        call = self._channel.unary_unary(
            _path(method),
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        name = method.removeprefix("AgentService/").replace("/", ".")
        try:
            with _open(name):
                return call(request, timeout=timeout_secs, wait_for_ready=timeout_secs is not None)
        except grpc.RpcError as error:
            raise _failed(name, error) from error


@contextlib.contextmanager
def _open(method: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # what gRPC raises for a channel that was closed
        raise AgentError(method, "unavailable", "the connection to the guest is closed") from error


def _path(method: str) -> str:
    return f"/vz.agent.v1.{method}"


def _keyed(idempotency_key: str) -> pb.TransportMetadata | None:
    return pb.TransportMetadata(idempotency_key=idempotency_key) if idempotency_key else None


def _failed(method: str, error: grpc.RpcError) -> AgentError:
    return AgentError(method, error.code().name.lower(), error.details())
