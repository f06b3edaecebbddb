"""Reaches a guest's vsock port from the host: through the host's kernel, or the socket of vhost-device-vsock; and puts
a local socket in front of it for a library that dials for itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from vzrepro.base.errors import VzreproError

AGENT_PORT = 7424
"""The guest's vsock port that the agent serves gRPC on."""

READY_PORT = 7425
"""The host's vsock port that the agent dials as soon as it listens, to write `ready <version> <revision>\\n`."""

_CHUNK = 65_536

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


def vsock_socket() -> socket.socket:
    """A stream socket of the host kernel's vsock. Raises OSError, also where the system has none."""
    if sys.platform != "linux":
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)


def dial_vsock(cid: int, port: int, timeout_secs: float = 5.0) -> socket.socket:
    """A stream to the guest's `port` by way of the host's kernel. Raises OSError."""
    stream = vsock_socket()
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


def private_socket(directory: Path, name: str) -> Path:
    """`directory/name`, checked to fit a socket address (107 bytes on Linux, 103 on macOS).

    Raises VzreproError when the directory's name is too long.
    """
    path = directory / name
    if len(os.fsencode(path)) > 103:
        raise VzreproError(
            f"{path} is too long a name for a socket",
            reason="the directory where it would be has a very long name, and an address of a socket is short",
            hint="set TMPDIR for vm, XDG_RUNTIME_DIR for oci, to a directory with a shorter name",
        )
    return path
