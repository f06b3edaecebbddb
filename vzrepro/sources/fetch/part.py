"""Where a download's bytes go: memory, or a file that is incomplete, and locked, until its hash was checked."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Protocol

from vzrepro.base import disk
from vzrepro.base.errors import Interrupted, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.net import PIECE, AttemptFailed

PART = ".part"
"""What is added to a file's name while it is incomplete."""


class Sink(Protocol):
    """Takes a download's bytes. `size` is how many it holds; a new attempt goes on from there if it `resumes`."""

    size: int
    resumes: bool

    def restart(self) -> None:
        """Forget what is there."""

    def write(self, piece: bytes) -> None:
        """Append."""

    def verify(self) -> None:
        """Raise AttemptFailed when what is there is not what was asked for."""


class Memory:
    """Bytes whose hash nobody knows beforehand: an attempt never goes on where another one ended."""

    resumes = False

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def restart(self) -> None:
        self.size, self._pieces = 0, []

    def write(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.size += len(piece)

    def verify(self) -> None:
        return

    def bytes(self) -> bytes:
        return b"".join(self._pieces)


class Part:
    """The open, locked `.part` file of a download. It is not buffered: what is counted is there. An attempt at a file
    whose hash nobody knows never goes on where another one ended."""

    def __init__(self, file: FileIO, path: Path, wanted: FileHash | None, cap: int) -> None:
        self.resumes = wanted is not None
        self._file = file
        self._path = path
        self._wanted = wanted
        self._digest = hashlib.sha256()
        self.size = 0
        with local_file(path):
            if os.fstat(file.fileno()).st_size > cap:
                file.truncate(0)
            while piece := file.read(PIECE):
                self._digest.update(piece)
                self.size += len(piece)

    def restart(self) -> None:
        with local_file(self._path):
            self._file.seek(0)
            self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        left = memoryview(piece)
        with local_file(self._path):
            while left:
                left = left[self._file.write(left) :]
        self._digest.update(piece)
        self.size += len(piece)

    def verify(self) -> None:
        found = self._digest.hexdigest()
        if self._wanted is not None and found != self._wanted.hex:
            raise AttemptFailed(f"has other content, sha256 {found}", again=False, stale=True, found=f"sha256 {found}")

    @property
    def digest(self) -> FileHash:
        """The hash of what is there."""
        return FileHash(self._digest.hexdigest())

    def commit(self, dest: Path) -> None:
        """Give the verified file its name, durably."""
        with local_file(dest):
            disk.publish(self._path, dest)


@contextmanager
def local_file(path: Path) -> Iterator[None]:
    """Turn the local file system's refusals into errors a person can act on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise VzreproError(
            f"the disk is full while downloading to {path}" if full else f"cannot write the download {path}",
            reason=error.strerror or str(error),
            hint=f"df -h {path.parent}" if full else f"ls -ld {path.parent}",
        ) from error


@contextmanager
def locked(part: Path, cancel: threading.Event) -> Iterator[FileIO]:
    """The part file, opened and locked against other processes and threads; the kernel undoes the lock with us."""
    while (fd := _try_lock(part)) is None:
        if cancel.wait(0.1):
            raise Interrupted("the download was stopped while another process downloads the same file")
    with FileIO(fd, "r+") as file:
        yield file


def _try_lock(part: Path) -> int | None:
    with local_file(part):
        return disk.try_lock(part)
