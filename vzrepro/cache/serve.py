"""A read-only HTTP server for a cache in a directory: `vzrepro cache serve`.

Small enough to be our own: `http.server` waits for a dripping head for as long as bytes come, bounds no number of
connections, and knows neither ranges nor ETags, which is most of what is here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import socketserver
import stat
import threading
import time
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from vzrepro.base.errors import UsageError
from vzrepro.cache.backend import content_type, is_key

_MAX_HEAD = 16 << 10  # bytes of a request line and its headers
_IDLE_SECS = 60.0  # between requests, and for each piece of an answer to get on
_HEAD_SECS = 10.0  # for a whole head, once it has begun
_MAX_CONNECTIONS = 512  # each costs a thread
_SMALL = 64 << 10  # bytes of an entry that is sent in one go, with an ETag made from its content

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_BUSY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


class Server:
    """A server that listens; `serve_forever` answers until `close`, which any thread may call. A context manager that
    closes it."""

    def __init__(self, tcp: _Tcp) -> None:
        self._tcp = tcp
        self._lock = threading.Lock()
        self._serving = False
        self._closed = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where the cache is: with the address listened on, or `localhost` if that is every address."""
        host, port = str(self._tcp.server_address[0]), self._tcp.server_address[1]
        name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        return f"http://{name}:{port}"

    def serve_forever(self) -> None:
        """Answer until `close` is called."""
        with self._lock:
            if self._closed:
                return
            self._serving = True
        try:
            self._tcp.serve_forever(poll_interval=0.05)
        finally:
            self._serving = False

    def close(self) -> None:
        """Stop, give the address back and end every connection."""
        with self._lock:
            self._closed = True
        if self._serving:
            self._tcp.shutdown()
        self._tcp.server_close()


def serve(directory: Path, host: str, port: int) -> Server:
    """Listen on `host` (a name or address) and `port` (0: any free one) to serve the cache in `directory`.

    Serves what `DirectoryBackend` has written and nothing else: GET and HEAD of regular files below the directory whose
    names are keys, without following links. Raises UsageError when there is no such directory or it cannot listen.
    """
    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory} to serve", hint="give the directory of a cache")
    try:
        if not 0 <= port < 1 << 16:
            raise OSError(errno.EINVAL, "there is no such port")
        return Server(_Tcp(directory.absolute(), host, port))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(
            f"cannot listen on {host}, port {port}", reason=reason, hint="choose another with --port or --host"
        ) from error


class _Tcp(socketserver.ThreadingTCPServer):
    """One thread per connection, so a slow client holds up nobody else."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, directory: Path, host: str, port: int) -> None:
        self.directory = directory
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family, address = found[0][0], found[0][4]
        super().__init__((str(address[0]), int(address[1])), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= _MAX_CONNECTIONS
            if not full:
                self._open.add(request)
        if not full:
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.sendall(_head(HTTPStatus.SERVICE_UNAVAILABLE, "Content-Length: 0", "Retry-After: 1", keep=False))
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            for request in self._open:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True, slots=True)
class _Request:
    """A request that can be answered; header names are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    keep: bool


class _Refused(Exception):
    """A request that ends in an answer without a body of its own."""

    def __init__(self, status: HTTPStatus, *headers: str, close: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.close = close


class _Connection(socketserver.BaseRequestHandler):
    """Answers one client's requests, one after the other."""

    request: socket.socket
    server: _Tcp

    def handle(self) -> None:
        # A client that vanishes or dawdles ends its own connection and nothing else.
        with contextlib.suppress(OSError):
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._buffer = b""
            while self._one():
                pass

    def _one(self) -> bool:
        """Answer the next request; whether another may come."""
        keep, method = False, ""
        try:
            head = self._next_head()
            if head is None:
                return False
            request = _parsed(head)
            keep, method = request.keep, request.method
            return self._answer(request)
        except _Refused as refused:
            keep = keep and not refused.close
            body = b"" if refused.status == HTTPStatus.NOT_MODIFIED else f"{refused.status.phrase}\n".encode()
            lines = refused.headers
            if body:
                lines = (*lines, "Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body)}")
            self.request.sendall(_head(refused.status, *lines, keep=keep) + (b"" if method == "HEAD" else body))
            if not keep:
                self._linger()
            return keep

    def _next_head(self) -> str | None:
        """The next request's line and headers; None when the client has ended. Raises _Refused, OSError."""
        until: float | None = None
        while True:
            self._buffer = self._buffer.lstrip(b"\r\n")
            end = self._buffer.find(b"\r\n\r\n")
            if 0 <= end <= _MAX_HEAD:
                head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
                return head.decode("latin-1")
            if len(self._buffer) > _MAX_HEAD:
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, close=True)
            if self._buffer and until is None:
                until = time.monotonic() + _HEAD_SECS
            # A time that has run out is an OSError, and so the connection's end.
            self.request.settimeout(_IDLE_SECS if until is None else max(0.001, until - time.monotonic()))
            piece = self.request.recv(_MAX_HEAD)
            if not piece:
                return None
            self._buffer += piece

    def _answer(self, request: _Request) -> bool:
        self.request.settimeout(_IDLE_SECS)
        key = _key(request.target)
        with self._opened(key) as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            whole = _read(file.fileno(), size) if size <= _SMALL else None
            if whole is not None:
                size = len(whole)
                etag = f'"{hashlib.sha256(whole).hexdigest()[:32]}"'
            else:
                # Files are replaced by renaming, so another content is another inode. A large one is a NAR named by
                # its hash, or a log.
                etag = f'"{status.st_ino:x}-{size:x}"'
            if _matches(request.headers.get("if-none-match"), etag):
                raise _Refused(HTTPStatus.NOT_MODIFIED, f"ETag: {etag}")
            span = _span(request.headers, etag, size)
            start, end = span or (0, size)
            head = _head(
                HTTPStatus.OK if span is None else HTTPStatus.PARTIAL_CONTENT,
                f"Content-Type: {content_type(key)}",
                f"Content-Length: {end - start}",
                *(() if span is None else (f"Content-Range: bytes {start}-{end - 1}/{size}",)),
                f"ETag: {etag}",
                f"Last-Modified: {formatdate(status.st_mtime, usegmt=True)}",
                "Accept-Ranges: bytes",
                "X-Content-Type-Options: nosniff",
                keep=request.keep,
            )
            if request.method == "HEAD":
                self.request.sendall(head)
                return request.keep
            if start == 0:
                # On a medium that cannot be written, what is used is not known.
                with contextlib.suppress(OSError):
                    os.utime(file.fileno())
            if whole is not None:
                self.request.sendall(head + whole[start:end])
                return request.keep
            self.request.sendall(head)
            sent = self.request.sendfile(file, start, end - start)
            return request.keep and sent == end - start  # a file that has become shorter can only end in a break

    def _opened(self, key: str) -> FileIO:
        """The entry's file, reached without following a link. Raises _Refused."""
        *directories, name = key.split("/")
        try:
            at = os.open(self.server.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for part in directories:
                    inner = os.open(part, _OPEN_DIR, dir_fd=at)
                    os.close(at)
                    at = inner
                fd = os.open(name, _OPEN_FILE, dir_fd=at)
            finally:
                os.close(at)
        except OSError as error:
            if error.errno in _ABSENT:
                raise _Refused(HTTPStatus.NOT_FOUND) from error
            if error.errno in _BUSY:
                raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "Retry-After: 1") from error
            raise _Refused(HTTPStatus.INTERNAL_SERVER_ERROR) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise _Refused(HTTPStatus.NOT_FOUND)
        return FileIO(fd)

    def _linger(self) -> None:
        """Take in what the client is still sending, for a while: closing at once could destroy the answer underway."""
        self.request.shutdown(socket.SHUT_WR)
        self.request.settimeout(1.0)
        for _ in range(64):
            if not self.request.recv(1 << 16):
                break


def _parsed(head: str) -> _Request:
    """A head that is well-formed HTTP/1. Raises _Refused."""
    line, *lines = head.split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not re.fullmatch(r"HTTP/1\.\d", words[2]):
        raise _Refused(HTTPStatus.BAD_REQUEST, close=True)
    method, target, version = words
    headers: dict[str, str] = {}
    for each in lines:
        name, colon, value = each.partition(":")
        if not colon or not name or name != name.strip() or "\n" in each or "\0" in each:
            raise _Refused(HTTPStatus.BAD_REQUEST, close=True)
        headers[name.lower()] = value.strip()
    if method not in ("GET", "HEAD"):
        raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD", close=True)
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        raise _Refused(HTTPStatus.BAD_REQUEST, close=True)  # where the next request begins would be a guess
    connection = headers.get("connection", "").lower()
    return _Request(method, target, headers, version != "HTTP/1.0" and "close" not in connection)


def _key(target: str) -> str:
    """The key that a request is for. Raises _Refused."""
    path = re.sub(r"^https?://[^/]*", "", target, flags=re.IGNORECASE).partition("?")[0]
    try:
        key = unquote(path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError as error:
        raise _Refused(HTTPStatus.NOT_FOUND) from error
    if not path.startswith("/") or not is_key(key):
        raise _Refused(HTTPStatus.NOT_FOUND)
    return key


def _matches(wanted: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names the ETag, by weak comparison (RFC 9110, 13.1.2)."""
    return wanted is not None and (
        wanted == "*" or etag in (each.strip().removeprefix("W/") for each in wanted.split(","))
    )


def _span(headers: dict[str, str], etag: str, size: int) -> tuple[int, int] | None:
    """First byte and end of the part to send; None for all of it. Raises _Refused for a range outside the file.

    What is not one range of bytes, or one of another version, is ignored, as RFC 9110 (14.2) allows.
    """
    match = _RANGE.fullmatch(headers.get("range", ""))
    if match is None or match[0] == "bytes=-" or headers.get("if-range", etag) != etag:
        return None
    first, last = match.groups()
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1 if last else size)
        if last and int(last) < start:
            return None
    if start >= end:
        raise _Refused(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, f"Content-Range: bytes */{size}")
    return start, end


def _head(status: HTTPStatus, *lines: str, keep: bool) -> bytes:
    connection = "keep-alive" if keep else "close"
    start = f"HTTP/1.1 {status.value} {status.phrase}"
    date = f"Date: {formatdate(usegmt=True)}"
    return "\r\n".join((start, date, *lines, f"Connection: {connection}", "", "")).encode("latin-1")


def _read(fd: int, size: int) -> bytes:
    """Up to `size` bytes from the file's begin."""
    pieces = []
    while size and (piece := os.read(fd, size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
