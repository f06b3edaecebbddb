"""HTTP with the system's trust and proxies, and files, behind one small type of answer.

`http` is the client, which is loaded when there is somebody to talk to; `engine` goes on when an attempt fails. Here is
what everything else needs to know.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

if TYPE_CHECKING:
    import socket

JOBS = 6
"""Downloads at once, and so connections to one host."""

PIECE = 1 << 18
"""Bytes read at once."""

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""What HTTP servers answer that may answer otherwise in a while."""

_SHOWN = 300  # characters of what a server says that a message may hold

CONNECTED: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""The sockets that `Stop` hangs up."""


class Stop(threading.Event):
    """Set when all work is to end: the process then hangs up on every server, so that none that is silent is waited
    for."""

    def set(self) -> None:
        import socket

        super().set()
        for sock in list(CONNECTED):
            with contextlib.suppress(OSError):
                # The plain socket's: TLS would want to say goodbye, in the middle of somebody else's reading.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


class AttemptFailed(Exception):
    """An attempt at one URL came to nothing. `again` says whether another attempt at it may do better, `hint` what a
    person can do, `status` what an HTTP server answered, `unreachable` that there was not even a connection, `advanced`
    that it has brought bytes which the next attempt goes on from."""

    def __init__(
        self,
        why: str,
        *,
        again: bool,
        after: float = 0.0,
        missing: bool = False,
        found: str | None = None,
        stale: bool = False,
        hint: str | None = None,
        status: int | None = None,
        unreachable: bool = False,
        advanced: bool = False,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.again = again
        self.after = after
        self.missing = missing
        self.found = found
        self.stale = stale
        self.hint = hint
        self.status = status
        self.unreachable = unreachable
        self.advanced = advanced


@dataclass(frozen=True, slots=True)
class Body:
    """An answer: from which byte on it is, how long the whole file is if that is known, its strong ETag, its bytes,
    whether it is the answer to a range, and, if only the head was asked for and tells it, when the file was last
    changed (seconds since the epoch)."""

    start: int
    total: int | None
    etag: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]
    partial: bool = False
    modified: float | None = None


def open_file(url: str, offset: int) -> Body:
    """The body of a `file:` URL, which never comes from a redirect."""
    try:
        parsed = urlsplit(url)
    except ValueError as error:
        raise AttemptFailed(str(error), again=False) from error
    path = Path(unquote(parsed.path))
    if parsed.netloc not in ("", "localhost") or not path.is_absolute() or "\0" in str(path):
        raise AttemptFailed("is not a file on this machine", again=False)
    try:
        # Never waits for who writes into a fifo.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise AttemptFailed("is no regular file", again=False)
        source, size = os.fdopen(fd, "rb"), found.st_size
        start = offset if offset <= size else 0
        source.seek(start)
    except FileNotFoundError as error:
        raise AttemptFailed("does not exist", again=False, missing=True) from error
    except OSError as error:
        raise AttemptFailed(refusal(error), again=False) from error

    def read() -> bytes:
        try:
            return source.read(PIECE)
        except OSError as error:
            raise AttemptFailed(refusal(error), again=False) from error

    return Body(start, size, None, read, source.close)


def without_auth(url: str) -> tuple[str, str | None]:
    """The URL without user and password, and these, unquoted."""
    parsed = urlsplit(url)
    auth, at, host = parsed.netloc.rpartition("@")
    return (urlunsplit(parsed._replace(netloc=host)), unquote(auth)) if at else (url, None)


def shown(url: str) -> str:
    """The URL without user and password, also of what is no URL."""
    try:
        return without_auth(url)[0]
    except ValueError:
        return url.rpartition("@")[2]


def scheme_of(url: str) -> str | None:
    """The URL's scheme, empty when it has none; None for what cannot be taken apart (`http://[`)."""
    try:
        return urlsplit(url).scheme
    except ValueError:
        return None


def printable(text: str) -> str:
    """What a server says, fit for one line on a terminal: no control characters, not too long."""
    return "".join(letter if letter.isprintable() else "�" for letter in text[:_SHOWN])


def refusal(error: BaseException) -> str:
    """One line saying why the system refused."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(re.sub(r"^.*\[Errno \d+\] ", "", str(error))) or type(error).__name__
