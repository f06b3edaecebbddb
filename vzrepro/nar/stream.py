"""Streams of bytes: reading them piece by piece, and hashing them on their way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from vzrepro.base.errors import VzreproError
from vzrepro.base.model import NarHash

Read = Callable[[int], bytes]
"""Like a binary file's `read`: at most so many bytes, fewer is fine, none only at the end."""

_BATCH = 1 << 20  # bytes handed to the thread at once; fewer are not worth one


class MalformedNar(VzreproError):
    """Bytes that are not a NAR in its one canonical form, or not the zstd frames of one."""


def reader(chunks: Iterable[bytes]) -> Read:
    """A `Read` over chunks; each call gives at most one chunk's rest."""
    source = iter(chunks)
    rest = memoryview(b"")

    def read(size: int) -> bytes:
        nonlocal rest
        if not rest:
            for chunk in source:
                if len(chunk) > size:
                    rest = memoryview(chunk)
                    break
                if chunk:
                    return chunk
            else:
                return b""
        piece, rest = bytes(rest[:size]), rest[size:]
        return piece

    return read


class Hasher:
    """SHA-256 and size in bytes of a stream. What is long is hashed in a thread of its own, beside the caller's work.

    Use it as a context manager, which ends the thread. At most two batches, each of 1 MiB and one chunk more, are held.
    """

    def __init__(self) -> None:
        self.size = 0
        self._digest = hashlib.sha256()
        self._held: list[bytes] = []
        self._held_size = 0
        self._thread: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown()

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._held.append(chunk)
        self._held_size += len(chunk)
        if self._held_size < _BATCH:
            return
        if self._running is not None:
            self._running.result()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="nar-hash")
        self._running = self._thread.submit(self._hash, self._held)
        self._held, self._held_size = [], 0

    def finish(self) -> NarHash:
        """The hash of all that came; nothing may come afterwards."""
        if self._running is not None:
            self._running.result()
        self._hash(self._held)
        return NarHash(self._digest.hexdigest())

    def _hash(self, batch: list[bytes]) -> None:
        for chunk in batch:
            self._digest.update(chunk)
