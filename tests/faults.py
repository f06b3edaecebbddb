"""An HTTP proxy that breaks what passes through it, in the ways of networks, other proxies and attackers.

Real sockets, one thread per connection. `FaultyProxy.on` says what happens to requests whose path matches a pattern.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import re
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

ENOUGH = 32 << 20
"""Bytes of an endless body that a client may have asked for, in vain, and the sockets' buffers besides."""


@dataclass(frozen=True)
class Answer:
    """What the server says; `headers` in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def but(self, *, body: bytes | None = None, **headers: str | None) -> Answer:
        """The same with another body, whose length the head tells, and with other headers (None: without)."""
        changed: dict[str, str | None] = {**self.headers}
        if body is not None:
            changed["content-length"] = str(len(body))
        changed |= {name.replace("_", "-"): value for name, value in headers.items()}
        kept = {name: value for name, value in changed.items() if value is not None}
        return replace(self, headers=kept, body=self.body if body is None else body)

    @property
    def head(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Whatever", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@dataclass
class Exchange:
    """One request, before it is answered. A fault ends the connection unless it sets `keep`."""

    proxy: FaultyProxy
    sock: socket.socket
    method: str
    path: str
    headers: Mapping[str, str]
    keep: bool = False

    def ask(self, path: str | None = None, *, drop: Iterable[str] = ()) -> Answer:
        """What the server behind answers, to another path or without some of the request's headers if so told."""
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=30)
        with contextlib.closing(upstream):
            headers = {name: value for name, value in self.headers.items() if name not in drop}
            upstream.request(self.method, path or self.path, headers={**headers, "connection": "close"})
            answer = upstream.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders() if name.lower() != "connection"}
            return Answer(answer.status, told, answer.read())

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def give(self, answer: Answer) -> None:
        """Answer as a good server does."""
        # Not joined: a test counts the memory of its process, and a body may be large.
        self.send(answer.head, b"" if self.method == "HEAD" else answer.body)
        self.keep = True

    def drip(self, data: bytes, secs: float, count: int = 1) -> None:
        """Send a byte, or `count`, each `secs`, until the test is over."""
        for at in range(0, len(data), count):
            self.send(data[at : at + count])
            if self.proxy.over.wait(secs):
                return

    def reset(self) -> None:
        """End the connection the hard way."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


Fault = Callable[[Exchange], None]


# --- faults -----------------------------------------------------------------------------------------------------------


def passes(exchange: Exchange) -> None:
    """No fault."""
    exchange.give(exchange.ask())


def status(code: int, **headers: str) -> Fault:
    """An answer without use."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda exchange: exchange.give(Answer(code, {"content-length": "5", **told}, b"nope\n"))


def serves(data: bytes, etag: str | None = None) -> Fault:
    """No fault, and no server behind: these bytes, and ranges of them, as a good server gives them."""

    def fault(exchange: Exchange) -> None:
        tags = {} if etag is None else {"etag": etag}
        match = re.fullmatch(r"bytes=(\d+)-", exchange.headers.get("range", ""))
        if match is None or exchange.headers.get("if-range", etag) != etag:
            exchange.give(Answer(200, {"content-length": str(len(data)), **tags}, data))
            return
        start = int(match[1])
        if start >= len(data):
            exchange.give(Answer(416, {"content-length": "0"}, b""))
            return
        told = {"content-length": str(len(data) - start), "content-range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        exchange.give(Answer(206, told | tags, data[start:]))

    return fault


def refuses(exchange: Exchange) -> None:
    """The connection is reset before an answer."""
    exchange.reset()


def hangs_up(exchange: Exchange) -> None:
    """The connection ends without an answer."""


def resets_after(count: int) -> Fault:
    """The connection is reset when `count` bytes of the body have been sent."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send(answer.head, answer.body[:count])
        exchange.reset()

    return fault


def cuts(count: int) -> Fault:
    """The connection ends when `count` bytes of the body have been sent, fewer than announced."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send(answer.head, answer.body[:count])

    return fault


def shortens(count: int) -> Fault:
    """Only `count` bytes are announced and sent, as if that were all."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask(drop=["range"])
        exchange.give(answer.but(body=answer.body[:count], etag=None))

    return fault


def changes(change: Callable[[bytes], bytes]) -> Fault:
    """Another body, of a length that fits."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask(drop=["range"])
        exchange.give(answer.but(body=change(answer.body), etag=None))

    return fault


def endless(piece: bytes) -> Fault:
    """A body that begins with what it should be and never ends; who takes in more than `ENOUGH` of it is noted."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask(drop=["range"])
        exchange.send(answer.but(content_length=None, etag=None, transfer_encoding="chunked").head)
        sent = 0
        for data in itertools.chain([answer.body], itertools.repeat(piece)):
            exchange.send(b"%x\r\n" % len(data), data, b"\r\n")
            sent += len(data)
            if sent > ENOUGH:
                exchange.proxy.swallowed = True
            if exchange.proxy.swallowed or exchange.proxy.over.is_set():
                return

    return fault


def drips(secs: float, count: int = 1) -> Fault:
    """The body comes a byte at a time, or so many."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send(answer.head)
        exchange.drip(answer.body, secs, count)

    return fault


def drips_head(secs: float) -> Fault:
    """Even the head comes a byte at a time."""
    return lambda exchange: exchange.drip(exchange.ask().head, secs)


def stalls(exchange: Exchange) -> None:
    """Nothing comes, for ever."""
    exchange.proxy.over.wait()


def stalls_after(count: int) -> Fault:
    """Nothing more comes, for ever, after `count` bytes of the body."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.ask()
        exchange.send(answer.head, answer.body[:count])
        exchange.proxy.over.wait()

    return fault


def ignores_ranges(exchange: Exchange) -> None:
    """All of it, whatever was asked for."""
    answer = exchange.ask(drop=["range", "if-range"])
    exchange.give(answer.but(accept_ranges=None, etag=None))


def without_lengths(exchange: Exchange) -> None:
    """All of it in chunks of odd sizes, without a length, whatever was asked for."""
    answer = exchange.ask(drop=["range", "if-range"])
    exchange.send(answer.but(content_length=None, etag=None, transfer_encoding="chunked").head)
    for at in range(0, len(answer.body), 60_001):
        piece = answer.body[at : at + 60_001]
        exchange.send(b"%x\r\n" % len(piece), piece, b"\r\n")
    exchange.send(b"0\r\n\r\n")
    exchange.keep = True


def shifts_ranges(exchange: Exchange) -> None:
    """Another part than was asked for."""
    answer = exchange.ask()
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
    if match is None:
        exchange.give(answer)
        return
    first, last, total = map(int, match.groups())
    exchange.give(answer.but(content_range=f"bytes {first + 1}-{last + 1}/{total}"))


def headers(**told: str | None) -> Fault:
    """The right body under other headers (None: without)."""
    return lambda exchange: exchange.give(exchange.ask().but(**told))


def redirects(location: str) -> Fault:
    """Sends the client elsewhere."""
    return status(302, location=location)


def loops(exchange: Exchange) -> None:
    """Sends the client to the same place again."""
    status(302, location=exchange.path)(exchange)


def says(data: bytes, *, again: bool = False) -> Fault:
    """Raw bytes instead of an answer, over and over with `again`."""

    def fault(exchange: Exchange) -> None:
        exchange.send(data)
        while again and not exchange.proxy.over.is_set():
            exchange.send(data)

    return fault


def compresses(exchange: Exchange) -> None:
    """A content encoding nobody asked for."""
    answer = exchange.ask(drop=["range"])
    exchange.give(answer.but(body=gzip.compress(answer.body), content_encoding="gzip", etag=None))


def swaps(path: str) -> Fault:
    """What belongs to another path."""
    return lambda exchange: exchange.give(exchange.ask(path))


def replays(answer: Answer) -> Fault:
    """What was right at another time."""
    return lambda exchange: exchange.give(answer)


# --- the proxy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A request that has arrived."""

    method: str
    path: str
    range: str | None
    if_range: str | None


@dataclass
class FaultyProxy:
    """A proxy in front of the server at `behind`, until the end of the `with`; without one, a server whose faults need
    none. Paths are as in the request."""

    behind: str = ""
    requests: list[Seen] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    swallowed: bool = False
    _rules: list[tuple[str, list[Fault]]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> FaultyProxy:
        kind = type("_ProxyHandler", (_Handler,), {"proxy": self})
        self._tcp = _Tcp(("127.0.0.1", 0), kind)
        self._thread = threading.Thread(target=self._tcp.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.over.set()
        self._tcp.shutdown()
        self._tcp.server_close()
        self._thread.join()

    @property
    def upstream(self) -> str:
        return urlsplit(self.behind).netloc

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._tcp.server_address[1]}"

    def on(self, pattern: str, *faults: Fault) -> None:
        """The n-th request whose path matches (`fnmatch`) gets the n-th fault, later ones the last. The first pattern
        that matches counts."""
        self._rules.append((pattern, list(faults)))

    def serve_at(self, name: str, *faults: Fault) -> str:
        """The URL of a place of its own, where these faults happen, as `on` says."""
        self.on(f"/{name}", *faults)
        return f"{self.url}/{name}"

    def heal(self) -> None:
        """No faults from now on."""
        self._rules.clear()

    def of(self, pattern: str) -> list[Seen]:
        """The requests whose path matches."""
        return [seen for seen in self.requests if fnmatchcase(seen.path, pattern)]

    def serve(self, exchange: Exchange) -> None:
        told = exchange.headers
        with self._lock:
            self.requests.append(Seen(exchange.method, exchange.path, told.get("range"), told.get("if-range")))
            faults = next((faults for pattern, faults in self._rules if fnmatchcase(exchange.path, pattern)), [passes])
            fault = faults.pop(0) if len(faults) > 1 else faults[0]
        fault(exchange)


class _Tcp(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class _Handler(socketserver.StreamRequestHandler):
    proxy: FaultyProxy
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # clients leave, and so do we
            while self._one():
                pass

    def _one(self) -> bool:
        line = self.rfile.readline(65536).decode("latin-1").split()
        if len(line) != 3:
            return False
        told: dict[str, Any] = {}
        while (each := self.rfile.readline(65536).decode("latin-1").strip()) != "":
            name, _, value = each.partition(":")
            told[name.lower()] = value.strip()
        exchange = Exchange(self.proxy, self.connection, line[0], line[1], told)
        self.proxy.serve(exchange)
        return exchange.keep
