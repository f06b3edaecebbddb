"""What archives are read through: raw streams that say how to take bytes, and xz with a limit to its memory."""

from __future__ import annotations

import io
import lzma
from collections.abc import Callable

_PACKED = 1 << 17


class Raw(io.RawIOBase):
    """A readable raw stream; subclasses give `take(n)`: 1 to n bytes, or none at the end."""

    def readable(self) -> bool:
        return True

    def take(self, count: int) -> bytes:
        raise NotImplementedError

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self.take(len(view))
        view[: len(data)] = data
        return len(data)


class Xz(Raw):
    """xz with a limit to its memory, which `lzma.LZMAFile` does not have. `read(n)` gives 1 to n packed bytes, or none
    at their end. One stream only, unless a subclass lets others follow. Raises lzma.LZMAError, EOFError."""

    def __init__(self, read: Callable[[int], bytes], memory: int) -> None:
        self._read, self._memory = read, memory
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=memory)

    def take(self, count: int) -> bytes:
        while True:
            if self._xz.eof:
                packed = self.following(self._xz.unused_data)
                if not packed:
                    return b""
                self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=self._memory)
            else:
                packed = self._read(_PACKED) if self._xz.needs_input else b""
                if self._xz.needs_input and not packed:
                    raise EOFError("the xz stream has no end")
            if data := self._xz.decompress(packed, count):
                return data

    def following(self, unused: bytes) -> bytes:
        """Where the next stream begins, among the `unused` bytes that were read, or after them; none at the end."""
        if unused or self._read(1):
            raise lzma.LZMAError("bytes follow the xz stream")
        return b""


class XzStreams(Xz):
    """Several streams, as xz(1) reads them."""

    def following(self, unused: bytes) -> bytes:
        while not (unused := unused.lstrip(b"\0")):  # what may stand between streams, and after the last
            unused = self._read(_PACKED)
            if not unused:
                return b""
        return unused
