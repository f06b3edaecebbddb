"""The narrow seam below a binary cache: named byte strings somewhere, nothing known about what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import FileHash

CACHE_INFO = "nix-cache-info"
"""The entry by which Nix clients know a cache and its store."""

PROBED = "vzrepro.json"
"""The entry that keeps what a place's server was found to do."""

NARS = "nar/"
"""Below which keys NARs are, and with them all that is large."""

FRESH_SECS = 24 * 3600.0
"""A push refreshes what it finds in the place and relies on when it is older than this, so that who collects garbage
may go by age: nothing that is this young is anybody's garbage."""

_PART = re.compile(r"[A-Za-z0-9+\-_?=][A-Za-z0-9+\-._?=]{0,254}")


class Damaged(RemoteError):
    """An entry of a cache is not what it should be; the others may be fine."""


class Stream(Protocol):
    """What an entry is read from: `read` gives at most so many bytes, none only at the end."""

    def read(self, size: int, /) -> bytes: ...


Sent = Callable[[int], object]
"""Told how many bytes of an entry the place has by now, from one thread."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: its key, its size in bytes, when it was last written or used (seconds since the epoch).

    `sha256` is what the place itself says of the content, when it was told on writing and `head` asks; nobody vouches
    for it, so it can show damage but prove nothing.
    """

    key: str
    size: int
    mtime: float
    sha256: FileHash | None = None


class Backend(Protocol):
    """A place for entries. `tests/contract/test_cache_backend.py` holds what every implementation does.

    Keys are relative, `/` separates their parts (`check_key`). An entry appears whole or not at all. Every method
    raises RemoteError when the place cannot be reached, refuses or breaks off, reading included; waiting, retrying and
    giving up are the implementation's own affair.
    """

    @property
    def url(self) -> str:
        """What a person calls the place."""

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        """The entry, open from its first byte, or None when there is none. Counts as use."""

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        sha256: FileHash | None = None,
        progress: Sent | None = None,
    ) -> bool:
        """Write an entry from bytes or from a file, which must not change any more.

        With `if_absent`, an entry that is there stays, also when two write at once. Says whether this one was written.
        `sha256`, the content's, is kept beside the entry where the place can. `progress` is told about large ones.
        """

    def head(self, key: str) -> Entry | None:
        """What the place says of the entry without sending it, or None when there is none."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """All entries whose key starts with `prefix`, in no order; what others left in the place may be among them."""

    def delete(self, keys: Collection[str]) -> None:
        """Remove the entries; it is fine if some are not there."""

    def refresh(self, key: str) -> bool:
        """Have the entry's `mtime` say now, its content as it was; False when there is no such entry."""

    def now(self) -> float:
        """The time by the clock that `mtime` is told by, in seconds since the epoch."""

    def spool(self) -> AbstractContextManager[Path]:
        """The name of a file on this machine's disk to make a big entry ready in, for `put`; gone in the end."""

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        """Held, not exclusively, while entries that refer to each other are written, so that nothing trims the place
        meanwhile. Where whole machines share a place there is no such lock, and it is always granted."""


def is_key(text: str) -> bool:
    """Whether `text` may name an entry.

    Its parts consist of the characters of store names and do not start with a dot, so no key leads out of a
    directory or to an implementation's own files.
    """
    return all(_PART.fullmatch(part) for part in text.split("/"))


def check_key(key: str) -> str:
    """Return `key` if it may name an entry (`is_key`), else raise UsageError."""
    if not is_key(key):
        raise UsageError(f"{key!r} is not a valid key of a cache entry")
    return key


def content_type(key: str) -> str:
    """What browsers and Nix clients are told that an entry is."""
    if key.endswith(".narinfo"):
        return "text/x-nix-narinfo"
    if key.startswith("log/") or key == CACHE_INFO:
        return "text/plain; charset=utf-8"
    return "application/json" if key.endswith(".json") else "application/octet-stream"


def read_whole(opened: AbstractContextManager[Stream], limit: int, what: str) -> bytes:
    """All of an entry that is open. Raises Damaged, saying `what` it is, when there are more than `limit` bytes."""
    pieces, size = [], 0
    with opened as stream:
        while size <= limit and (piece := stream.read(limit + 1 - size)):
            pieces.append(piece)
            size += len(piece)
    if size > limit:
        raise Damaged(f"{what} is larger than {limit} bytes")
    return b"".join(pieces)
