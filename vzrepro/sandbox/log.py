"""A build's log: everything up to a bound, beyond it the beginning and the end and a line that says what is missing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from vzrepro.base.errors import VzreproError

LOG_HEAD_BYTES = 16 << 20
LOG_TAIL_BYTES = 16 << 20
"""What a log keeps of its beginning, and at least of its end (at most twice as much): 48 MiB in all."""

_PIECE = 1 << 20
_LINE_BYTES = 1 << 16  # a line that is longer may be cut


class Log:
    """The file `path`, made or written anew: the log of what came until now, with at most `head` + 2 · `tail` bytes.

    Raises VzreproError when it cannot be written.
    """

    def __init__(self, path: Path, *, head: int = LOG_HEAD_BYTES, tail: int = LOG_TAIL_BYTES) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._head, self._tail = head, tail
        self._size = 0  # of the file
        self._kept = 0  # bytes of the beginning that stay; 0 until something is left out
        self._line = 0  # size of the line that says what is left out
        self._left_out = 0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, chunk: bytes) -> None:
        """Append the bytes."""
        try:
            self._write(chunk, self._size)
            self._size += len(chunk)
            if self._size > self._head + self._line + 2 * self._tail:
                self._shorten()
        except OSError as error:
            raise VzreproError(
                f"the build log {self._path} cannot be written",
                reason=os.strerror(error.errno or 0),
                hint=f"look at the space left with: df -h {shlex.quote(str(self._path.parent))}",
            ) from error

    def _shorten(self) -> None:
        """Leave out what is between the beginning and the end, whole lines where they are not very long."""
        if not self._kept:
            look = min(self._head, _LINE_BYTES)
            self._kept = self._head - look
            self._kept += os.pread(self._fd, look, self._kept).rfind(b"\n") + 1 or look
        first = self._size - self._tail
        first += os.pread(self._fd, min(self._tail, _LINE_BYTES), first).find(b"\n") + 1
        self._left_out += first - self._kept - self._line
        line = f"[vzrepro: {self._left_out} bytes of the log are left out here]\n".encode()
        if os.pread(self._fd, 1, self._kept - 1) != b"\n":
            line = b"\n" + line
        self._write(line, self._kept)
        target = self._kept + len(line)
        while piece := os.pread(self._fd, _PIECE, first):
            self._write(piece, target)
            first, target = first + len(piece), target + len(piece)
        os.ftruncate(self._fd, target)
        self._size, self._line = target, len(line)

    def _write(self, data: bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, at)
            view, at = view[done:], at + done
