"""Speaks to the agent in a guest: reaches its vsock port from the host, and calls `vz.agent.v1` on it.

`agent_pb2.py` and `.pyi` beside this module are generated from the agent's own .proto (tests/unit/test_vm_proto.py
has the command); the calls below name the methods themselves, so that no generated service code is needed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from vzrepro.errors import VzreproError
from vzrepro.vm import agent_pb2 as pb

AGENT_PORT = 7424
"""The guest's vsock port that the agent serves gRPC on."""

READY_PORT = 7425
"""The host's vsock port that the agent dials as soon as it listens, to write `ready <version> <revision>\\n`."""

_SERVICE = "/vz.agent.v1.AgentService"
_CHUNK = 65_536
# gRPC's own pause after a failed attempt is a second, longer than a guest takes to boot.
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
    # Else the socket's path, percent-encoded, which the agent's HTTP/2 library refuses as malformed.
    ("grpc.default_authority", "localhost"),
)

Dial = Callable[[], socket.socket]
"""Opens one stream to a port of the guest. Raises OSError when nobody answers there."""


def dial_streams(streams: Path, port: int, timeout_secs: float = 5.0) -> socket.socket:
    """A stream to the guest's `port` by way of vhost-device-vsock's socket: `CONNECT <port>\\n`, `OK <port>\\n`.

    Raises OSError; ConnectionError when the guest does not listen (the device then closes the stream).
    """
    stream = socket.socket(socket.AF_UNIX)
    try:
        stream.settimeout(timeout_secs)
        stream.connect(str(streams))
        stream.sendall(f"CONNECT {port}\n".encode())
        answer = read_line(stream)
        if not answer.startswith("OK "):
            raise ConnectionRefusedError(f"guest port {port} answered {answer!r}, not OK")
        stream.settimeout(None)
    except BaseException:
        stream.close()
        raise
    return stream


def dial_vsock(cid: int, port: int, timeout_secs: float = 5.0) -> socket.socket:
    """A stream to the guest's `port` by way of the host's kernel. Raises OSError."""
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        stream.settimeout(timeout_secs)
        stream.connect((cid, port))
        stream.settimeout(None)
    except BaseException:
        stream.close()
        raise
    return stream


def read_line(stream: socket.socket, limit: int = 256) -> str:
    """One line without its end, not a byte more: what follows belongs to somebody else. Raises ConnectionError."""
    line = bytearray()
    while len(line) <= limit:
        byte = stream.recv(1)
        if not byte:
            raise ConnectionResetError(f"the stream ended after {bytes(line)!r}, before a whole line")
        if byte == b"\n":
            return line.decode("utf-8", "replace")
        line += byte
    raise ConnectionAbortedError(f"no end of line within {limit} bytes")


class Proxy:
    """A local Unix socket in front of `dial`, since gRPC for Python neither dials for itself nor takes a socket."""

    def __init__(self, path: Path, dial: Dial) -> None:
        self._dial = dial
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            self._listener.bind(str(path))
            self._listener.listen()
        except OSError:
            self._listener.close()
            raise
        self.target = f"unix:{path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End every stream and take no new ones."""
        with self._lock:
            self._closed = True
            streams = [self._listener, *self._open]
        for stream in streams:
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                guest = self._dial()
            except OSError:
                return  # gRPC sees the stream end, and tries again
            with guest:
                with self._lock:
                    if self._closed:
                        return
                    self._open |= {client, guest}
                back = threading.Thread(target=_copy, args=(guest, client), daemon=True)
                back.start()
                _copy(client, guest)
                back.join()
                with self._lock:
                    self._open -= {client, guest}


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, slots=True)
class SystemInfo:
    """What the guest says it is; sizes in bytes."""

    cpu_count: int
    memory_bytes: int
    disk_free_bytes: int
    os_version: str
    agent_protocol_revision: int


class AgentClient:
    """Calls on the agent behind a gRPC `target`. Every method raises VzreproError with the agent's own sentence."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all calls and the connection."""
        self._channel.close()

    def ping(self, timeout_secs: float) -> None:
        """Return as soon as the agent answers; waits for a connection."""
        self._call("Ping", pb.PingRequest(), pb.PingResponse, timeout_secs)

    def system_info(self, timeout_secs: float = 10.0) -> SystemInfo:
        """What the guest is."""
        answer = self._call("SystemInfo", pb.SystemInfoRequest(), pb.SystemInfoResponse, timeout_secs)
        return SystemInfo(
            cpu_count=answer.cpu_count,
            memory_bytes=answer.memory_bytes,
            disk_free_bytes=answer.disk_free_bytes,
            os_version=answer.os_version,
            agent_protocol_revision=answer.agent_protocol_revision,
        )

    def exec(
        self,
        command: str,
        arguments: Sequence[str] = (),
        *,
        working_dir: str = "",
        env: Mapping[str, str] | None = None,
        user: str = "",
        timeout_secs: float | None = None,
    ) -> Iterator[pb.ExecEvent]:
        """Run a command in the guest; its events as they come, the last one `exit_code` or `error`."""
        request = pb.ExecRequest(
            command=command, args=list(arguments), working_dir=working_dir, env=dict(env or {}), user=user
        )
        call = self._channel.unary_stream(
            f"{_SERVICE}/Exec",
            request_serializer=pb.ExecRequest.SerializeToString,
            response_deserializer=pb.ExecEvent.FromString,
        )(request, timeout=timeout_secs, wait_for_ready=True)
        try:
            yield from call
        except grpc.RpcError as error:
            raise _failed("Exec", error) from error
        finally:
            call.cancel()

    def _call(self, method: str, request: Any, response: Any, timeout_secs: float) -> Any:
        call = self._channel.unary_unary(
            f"{_SERVICE}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        try:
            return call(request, timeout=timeout_secs, wait_for_ready=True)
        except grpc.RpcError as error:
            raise _failed(method, error) from error


def _failed(method: str, error: grpc.RpcError) -> VzreproError:
    return VzreproError(
        f"the guest agent's {method} failed: {error.code().name.lower().replace('_', ' ')}", reason=error.details()
    )


def private_socket(directory: Path, name: str) -> Path:
    """`directory/name`, checked to fit a socket address (107 bytes on Linux, 103 on macOS).

    Raises VzreproError when the directory's name is too long.
    """
    path = directory / name
    if len(os.fsencode(path)) > 103:
        raise VzreproError(
            f"{path} is too long a name for a socket",
            reason="the directory for temporary files has a very long name",
            hint="TMPDIR=/tmp vzrepro vm boot …",
        )
    return path
