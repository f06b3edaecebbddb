"""A binary cache behind an http(s) prefix, which can only be read: from `vzrepro cache serve`, a web server, a CDN."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from vzrepro.base.errors import UsageError
from vzrepro.base.model import FileHash
from vzrepro.cache.backend import CACHE_INFO, NARS, Entry, Sent, check_key
from vzrepro.cache.remote import Concealment, EntryStream, Patience
from vzrepro.net import AttemptFailed, Body, shown
from vzrepro.net.http import Http

CONNECTIONS = 32
"""Connections to one cache that are kept open."""

_PIECES = 8  # pieces of NARs that are on their way at once, in all


class HttpBackend:
    """The reading half of a `Backend` over the entries below `url`, from as many threads as one likes.

    `user:password@` in the URL is sent as basic authentication, to the URL's own host alone, and never shown. What
    writes raises UsageError, and so does `list`, which plain HTTP has no way to ask for. Raises UsageError when `url`
    is no prefix.
    """

    def __init__(self, url: str, patience: Patience, *, http: Http | None = None) -> None:
        self._prefix = _prefix(url)
        self._place = shown(self._prefix)
        self._patience = patience
        self._http = http or Http(connections=CONNECTIONS)
        self._pool = ThreadPoolExecutor(_PIECES, thread_name_prefix="cache-http")
        self._concealment = Concealment(self._reads_info)

    @property
    def url(self) -> str:
        """The prefix, without user and password."""
        return self._place

    def get(self, key: str) -> AbstractContextManager[EntryStream] | None:
        """See `Backend.get`. A NAR is asked for in pieces, anything else with one plain request."""
        url = self._url(key)
        pieces = key.startswith(NARS)

        def ask(start: int, end: int | None, etag: str | None) -> Body | None:
            # Proxies keep whole answers more readily than ranges, and small entries gain nothing by one.
            return self._asked(key, url, start, end if pieces else None, etag)

        return EntryStream.open(self._place, self._patience, self._pool, ask)

    def head(self, key: str) -> Entry | None:
        """See `Backend.head`; the entry's `mtime` is 0 where the server does not tell it."""
        url = self._url(key)

        def once() -> Entry | None:
            body = self._asked(key, url, 0, None, None, head=True)
            if body is None:
                return None
            with closing(body):
                if body.total is None:
                    raise AttemptFailed(f"does not say how large {key} is", again=False)
                return Entry(key, body.total, body.modified or 0.0)

        return self._patience.attempt(self._place, once)

    def now(self) -> float:
        """This machine's clock: nothing is written here, so no age depends on it."""
        return time.time()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Raises UsageError."""
        raise UsageError(
            f"the entries of {self._place} cannot be listed",
            reason="HTTP has no way to ask for that",
            hint="name the cache by its s3:// or file:// URL",
        )

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        sha256: FileHash | None = None,
        progress: Sent | None = None,
    ) -> bool:
        """Raises UsageError, as all that writes does."""
        check_key(key)
        self._refuse()

    def delete(self, keys: Collection[str]) -> None:
        """Raises UsageError."""
        self._refuse()

    def refresh(self, key: str) -> bool:
        """Raises UsageError."""
        check_key(key)
        self._refuse()

    def spool(self) -> AbstractContextManager[Path]:
        """Raises UsageError."""
        self._refuse()

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        """Raises UsageError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(f"{self._place} is read-only", hint="push to s3:// or file://")

    def _url(self, key: str) -> str:
        # The URL of a NAR is one: harmonia and others need its query. In our own keys `?` is a letter like any other.
        path, mark, query = check_key(key).partition("?") if key.startswith(NARS) else (key, "", "")
        # `+` is a letter like any other in a path, but some S3 servers take it for a blank.
        return f"{self._prefix}/{quote(check_key(path), safe='/')}{mark}{quote(query, safe='=?')}"

    def _asked(
        self, key: str, url: str, start: int, end: int | None, etag: str | None, *, head: bool = False
    ) -> Body | None:
        """One answer, None for a missing entry. Raises AttemptFailed."""
        timeout = self._patience.timeout_secs
        try:
            body = self._patience.answer(
                lambda: self._http.open(url, start, etag, timeout, timeout, end=end, head=head)
            )
        except AttemptFailed as failure:
            # A NAR that a narinfo promises is not missing in a sound cache, so being refused one is worth telling.
            hidden = failure.status == 403 and not key.startswith(NARS)
            if failure.missing or (hidden and self._concealment.hides(key)):
                return None
            if failure.status in (401, 403):
                failure.hint = "check user and password in the cache's URL, and what the server allows to read"
            raise
        self._concealment.was_read(key)
        return body

    def _reads_info(self) -> bool:
        """For `Concealment`."""
        body = self._asked(CACHE_INFO, self._url(CACHE_INFO), 0, None, None)
        if body is not None:
            body.close()
        return body is not None


def _prefix(url: str) -> str:
    """The URL without a slash at its end. Raises UsageError."""
    try:
        parsed = urlsplit(url)
        sound = parsed.scheme in ("http", "https") and bool(parsed.hostname) and (parsed.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or parsed.query or parsed.fragment:
        raise UsageError(
            f"{_bare(url)} is not the address of a cache", hint="it looks like https://cache.example.org/prefix"
        )
    return urlunsplit(parsed._replace(path=parsed.path.rstrip("/")))


def _bare(url: str) -> str:
    """Whatever it is, without what may be a password."""
    return url.rpartition("@")[2]
