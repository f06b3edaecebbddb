"""Keeps what a container prints on the host, bounded, and reads it: while it comes, after its end, after its guest's.

In the guest the agent keeps a container's output in a file that it rotates; `vz-oci-run follow` passes that on as
pieces (recipes/oci-runner/src/follow.rs has their format), and `OutputLog` puts them into `output` in the container's
directory, `output.1` being what was before. Beside it a file without content says by its name how things stand:
renaming and removing need no room on a full disk. Who reads needs nobody's help for it.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vzrepro.base.errors import VzreproError

LIMIT = 4 << 20
"""Bytes of a kept file; with the one before it, twice as many are kept."""

_OUTPUT = "output"
_PIECE = struct.Struct("<QQI")
_MOST_PIECE = 1 << 20  # bytes; agents send 16 KiB
_READ_BYTES = 1 << 16
_POLL_SECS = 0.1


class OutputStanding(StrEnum):
    """How an output stands; all but ENDED are the end of a file's name."""

    OPEN = "open"  # more may come, as long as there is somebody to keep it
    FULL = "full"  # more may come, but what came last could not be written
    CUT = "cut"  # it is over, and its end is missing
    ENDED = "ended"


class BoundedFile:
    """A file that stays within `limit` bytes: what would be more begins it anew, and `<name>.1` is what was before.

    It is written through `descriptor`, which is closed by nobody here; without one it is opened, and emptied.
    """

    def __init__(self, path: Path, *, limit: int = LIMIT, descriptor: int | None = None) -> None:
        self._path, self._limit = path, limit
        self._descriptor = _opened(path) if descriptor is None else descriptor
        self._size = os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> int:
        """How many bytes were written. Raises OSError when that is none."""
        if self._size and self._size + len(data) > self._limit:
            with contextlib.suppress(FileNotFoundError):  # renamed already, and then it could not be made anew
                self._path.rename(f"{self._path}.1")
            new = _opened(self._path)
            os.dup2(new, self._descriptor, inheritable=self._descriptor <= 2)
            os.close(new)
            self._size = 0
        written = os.write(self._descriptor, data)
        self._size += written
        return written


def _opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@dataclass(frozen=True, slots=True)
class LogPosition:
    """A place in the guest's log: a file's inode and an offset in bytes."""

    inode: int
    offset: int


class OutputLog:
    """Writes what a container prints into its `directory`. What cannot be written is counted, and told as soon as
    something can be again; nobody waits for that."""

    def __init__(self, directory: Path, *, limit: int = LIMIT) -> None:
        self._directory = directory
        self._file = BoundedFile(directory / _OUTPUT, limit=limit)
        self._standing = OutputStanding.OPEN
        _mark(directory, self._standing).touch(mode=0o600)
        self._pending = bytearray()
        self._lost = 0
        self._why = ""
        self._line_ended = True
        self.place: LogPosition | None = None
        """Where in the guest's log the next piece begins; None at its beginning."""

    def begin(self) -> None:
        """Pieces come from a new start: what is left of one that was cut off is dropped."""
        self._pending.clear()

    def take(self, data: bytes) -> None:
        """Take the next bytes of the pieces. Raises VzreproError for one that is larger than any agent's."""
        self._pending += data
        while len(self._pending) >= _PIECE.size:
            inode, offset, length = _PIECE.unpack_from(self._pending)
            if length > _MOST_PIECE:  # it would be waited for in memory
                raise VzreproError(
                    "what the guest says of a container's output is not what it should be",
                    reason=f"a piece of {length} bytes; no agent sends more than {_MOST_PIECE}",
                )
            end = _PIECE.size + length
            if len(self._pending) < end:
                return
            piece = bytes(self._pending[_PIECE.size : end])
            del self._pending[:end]
            if length:
                self.place = LogPosition(inode, offset + length)
                self._keep(piece)
            else:
                self._keep(self._note("output is missing here: it came faster than it could be taken"))

    def give_up(self) -> None:
        """More may come, but it cannot be had."""
        self._keep(self._note("what comes from here on is missing"))
        self._stands(OutputStanding.CUT)

    def end(self) -> None:
        """Nothing more comes."""
        if self._lost:
            self._keep(b"")
        if self._lost:
            self._stands(OutputStanding.CUT)
        else:
            with contextlib.suppress(FileNotFoundError):  # the container was deleted
                _mark(self._directory, self._standing).unlink()

    def _keep(self, data: bytes) -> None:
        if self._lost:
            note = self._note(f"{self._lost} bytes are missing here: {self._why}")
            if self._written(note) < len(note):
                self._lost += len(data)
                return
            self._lost = 0
        self._lost = len(data) - self._written(data)
        self._stands(OutputStanding.FULL if self._lost else OutputStanding.OPEN)

    def _note(self, text: str) -> bytes:
        return (b"" if self._line_ended else b"\n") + f"[vzrepro: {text}]\n".encode()

    def _written(self, data: bytes) -> int:
        done = 0
        try:
            while done < len(data):
                done += self._file.write(data[done:])
        except OSError as error:
            self._why = error.strerror or str(error)
        if done:
            self._line_ended = data[done - 1 : done] == b"\n"
        return done

    def _stands(self, standing: OutputStanding) -> None:
        if standing != self._standing:
            with contextlib.suppress(OSError):
                _mark(self._directory, self._standing).rename(_mark(self._directory, standing))
                self._standing = standing


def _mark(directory: Path, standing: OutputStanding) -> Path:
    return directory / f"{_OUTPUT}.{standing}"


def standing(directory: Path) -> OutputStanding:
    """How the output in a container's directory stands."""
    for _ in range(2):  # a mark may be renamed while we look for it under its new name
        for one in (OutputStanding.OPEN, OutputStanding.FULL, OutputStanding.CUT):
            if _mark(directory, one).exists():
                return one
    return OutputStanding.ENDED


def is_kept(directory: Path) -> bool:
    """Whether there is an output in a container's directory."""
    return (directory / _OUTPUT).exists()


def read(directory: Path, *, follow: bool, is_alive: Callable[[], bool]) -> Iterator[bytes]:
    """What is kept of an output, oldest first; with `follow` also what still comes, to its end.

    `is_alive` says whether there is somebody who keeps more of it. Reading that is slower than the files are rotated
    misses some.
    """
    part: int | None = None
    try:
        while True:
            # Known before the rest is read: nothing comes after that.
            last = not (follow and standing(directory) in (OutputStanding.OPEN, OutputStanding.FULL) and is_alive())
            while True:
                if part is None:
                    part = _first(directory)
                if part is None:
                    break
                newest = _reading(directory / _OUTPUT)
                try:
                    # A file that is no longer the newest gets nothing more, and is read to its end.
                    yield from _rest(part)
                    if newest is None or os.path.samestat(os.fstat(newest), os.fstat(part)):
                        break
                    os.close(part)
                    part, newest = newest, None
                finally:
                    if newest is not None:
                        os.close(newest)
            if last:
                return
            time.sleep(_POLL_SECS)
    finally:
        if part is not None:
            os.close(part)


def _first(directory: Path) -> int | None:
    older = _reading(directory / f"{_OUTPUT}.1")
    return _reading(directory / _OUTPUT) if older is None else older


def _reading(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    return None


def _rest(descriptor: int) -> Iterator[bytes]:
    while data := os.read(descriptor, _READ_BYTES):
        yield data
