"""A NAR on its way in from a cache: bounded while it arrives, compared in the end with all that its narinfo says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from vzrepro import nar
from vzrepro.base.model import FileHash, NarHash
from vzrepro.cache.backend import Damaged, Stream
from vzrepro.cache.narinfo import NarInfo

TransferProgress = Callable[[int, int | None], None]
"""Bytes of the compressed NAR that have arrived, and how many there are if that is known."""

_PIECE = 1 << 20


def take(
    stream: Stream,
    info: NarInfo,
    place: str,
    consume: Callable[[nar.Read], tuple[NarHash, int]],
    progress: TransferProgress,
) -> None:
    """Have `consume` read the NAR, not compressed any more, that arrives as `info` describes; it returns what it found:
    hash and size.

    Never more bytes than announced are read or decoded. Raises Damaged unless both sizes and both hashes are right and
    nothing follows; what `stream` and `consume` raise. `place` is what a person calls the cache.
    """
    source = _Counted(stream, info, progress)
    read: nar.Read = source.read
    try:
        if info.compression == "zstd":
            read = nar.decompress(source.read, max_size=info.nar_size)
        nar_hash, nar_size = consume(read)
    except nar.MalformedNar as error:
        raise Damaged(f"{place} has a malformed {info.path}", reason=error.in_a_line) from error
    source.finish()
    if (nar_hash, nar_size) != (info.nar_hash, info.nar_size):
        raise Damaged(
            f"{place} has another {info.path} than it promises",
            reason=f"wanted NAR {info.nar_hash.nix} of {info.nar_size} bytes, found {nar_hash.nix} of {nar_size} bytes",
        )


def hashed(read: nar.Read, limit: int) -> tuple[NarHash, int]:
    """For `take`: only hash what arrives, at most `limit` bytes. Raises MalformedNar when there are more."""
    digest, size = hashlib.sha256(), 0
    while piece := read(_PIECE):
        digest.update(piece)
        size += len(piece)
        if size > limit:
            raise nar.MalformedNar(f"the NAR is larger than the {limit} bytes announced for it")
    return NarHash(digest.hexdigest()), size


class _Counted:
    """A compressed NAR on its way in: its size is bounded, its size and hash are compared in the end."""

    def __init__(self, stream: Stream, info: NarInfo, progress: TransferProgress) -> None:
        self._stream = stream
        self._info = info
        self._progress = progress
        self._digest = hashlib.sha256()
        self._size = 0
        # The announced file size is not signed, and what does not decode to anything could go on for ever.
        most = info.nar_size + info.nar_size // 64 + _PIECE
        self._limit = most if info.file_size is None else min(most, info.file_size)

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._digest.update(piece)
        self._size += len(piece)
        if self._size > self._limit:
            raise self._mismatch("more")
        if piece:
            self._progress(self._size, self._info.file_size)
        return piece

    def finish(self) -> None:
        """Raise Damaged unless exactly what the narinfo announces has been read."""
        while self.read(_PIECE):
            pass  # the decoder need not have looked for the end
        if self._info.file_size is not None and self._size != self._info.file_size:
            raise self._mismatch(f"{self._size} bytes")
        found = FileHash(self._digest.hexdigest())
        if self._info.file_hash is not None and found != self._info.file_hash:
            raise self._mismatch(found.nix)

    def _mismatch(self, found: str) -> Damaged:
        info = self._info
        wanted = (
            f"{info.file_size} bytes" if info.file_hash is None else f"{info.file_hash.nix}, {info.file_size} bytes"
        )
        return Damaged(f"{info.url} is not what its narinfo says: wanted {wanted}, found {found}")
