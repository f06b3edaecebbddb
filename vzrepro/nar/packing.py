"""Making NARs of trees, and hashing them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vzrepro.base.errors import VzreproError
from vzrepro.base.model import NarHash
from vzrepro.nar import tokens

Inspect = Callable[[os.stat_result, int | None, Callable[[], str]], None]
"""Is shown a node: its status, its open descriptor (None for a symlink), and what tells its path when called."""

PackingProgress = Callable[[int], None]
"""Is told how many bytes of a NAR there were until now."""

_PIECE = 1 << 20  # bytes read at once, and the most that one chunk holds
_SMALL = 1 << 16  # pieces below this are gathered into chunks, larger ones pass through uncopied
_ZEROS = bytes(_PIECE)
_CHUNK = 1 << 18  # about what is gathered into one
_ENTRY_SIZE = 300  # bytes, about, of an entry without contents

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OPEN_DIR = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC

_ENCODING, _ENCODE_ERRORS = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()

_Kind = int
_FILE, _DIR, _LINK, _OTHER = range(4)
_Open = tuple[int, Iterator[tuple[bytes, _Kind]], bytes]
"""A directory being packed: its descriptor, what is left in it, its name."""


def pack(
    path: Path, *, inspect: Inspect | None = None, without: Callable[[bytes], bool] | None = None
) -> Iterator[bytes]:
    """The NAR of the file, directory or symlink at `path`, in chunks of at most about 1 MiB.

    Links are never followed, entries are opened relative to their directory's descriptor. `inspect` is called for
    every node, directories before what is in them. Entries of `path` itself for whose name `without` is true are left
    out. Holes of a file are zeros, and not read. Raises VzreproError for nodes a NAR cannot hold (sockets, devices,
    fifos), for files that change while they are read and for trees deeper than `MAX_DEPTH`; OSError when something
    cannot be read.
    """
    small: list[bytes] = [tokens.MAGIC]
    small_size = 0
    stack: list[_Open] = []
    dir_fd: int | None = None
    name, kind = os.fsencode(path), _kind_of(path.lstat().st_mode)
    ends = tokens.THEN_CLOSE

    def shown() -> str:
        return os.fsdecode(b"/".join([*(entry[2] for entry in stack), name]))

    def opened() -> str:
        return os.fsdecode(b"/".join(entry[2] for entry in stack))

    try:
        while True:
            if kind == _FILE:
                fd = os.open(name, _OPEN_FILE, dir_fd=dir_fd)
                try:
                    status = os.fstat(fd)
                    if not stat.S_ISREG(status.st_mode):
                        raise _unpackable(shown())
                    if inspect is not None:
                        inspect(status, fd, shown)
                    size = status.st_size
                    small += (
                        tokens.EXECUTABLE if status.st_mode & stat.S_IXUSR else tokens.REGULAR,
                        size.to_bytes(8, "little"),
                    )
                    left = size
                    has_holes = size >= _SMALL and status.st_blocks * 512 < size
                    while left >= _SMALL:
                        if has_holes and (hole := _hole(fd, size - left)):
                            piece = _ZEROS[: min(left, hole)]
                            os.lseek(fd, len(piece), os.SEEK_CUR)
                        else:
                            piece = os.read(fd, min(left, _PIECE))
                        if not piece:
                            raise _changed(shown())
                        left -= len(piece)
                        if small:
                            yield b"".join(small)
                            small, small_size = [], 0
                        yield piece
                    piece = os.read(fd, left + 1)  # a byte more than there should be
                    while len(piece) < left and (more := os.read(fd, left + 1 - len(piece))):
                        piece += more
                    if len(piece) != left:
                        raise _changed(shown())
                finally:
                    os.close(fd)
                small += (piece, ends[size % 8])
                small_size += left
            elif kind == _DIR:
                if len(stack) >= tokens.MAX_DEPTH:
                    raise VzreproError(
                        f"{shown()} is nested too deeply",
                        reason=f"a store object may nest {tokens.MAX_DEPTH} directories",
                    )
                fd = os.open(name, _OPEN_DIR, dir_fd=dir_fd)
                stack.append((fd, iter(()), name))
                if inspect is not None:
                    inspect(os.fstat(fd), fd, opened)
                entries = _entries(fd)
                if without is not None and len(stack) == 1:
                    entries = [entry for entry in entries if not without(entry[0])]
                stack[-1] = (fd, iter(entries), name)
                small.append(tokens.DIRECTORY)
            elif kind == _LINK:
                if inspect is not None:
                    inspect(os.lstat(name, dir_fd=dir_fd), None, shown)
                small += (tokens.SYMLINK, tokens.string(os.readlink(name, dir_fd=dir_fd)), ends[0])
            else:
                raise _unpackable(shown())

            # On to the next entry, leaving the directories that have none left.
            while stack:
                dir_fd, left_there, _ = stack[-1]
                following = next(left_there, None)
                if following is not None:
                    name, kind = following
                    small += (tokens.ENTRY, len(name).to_bytes(8, "little"), name, tokens.THEN_NODE[len(name) % 8])
                    small_size += _ENTRY_SIZE
                    ends = tokens.THEN_CLOSE_ENTRY
                    break
                os.close(dir_fd)
                stack.pop()
                small.append(ends[0] if stack else tokens.CLOSE)
            else:
                break
            if small_size >= _CHUNK:
                yield b"".join(small)
                small, small_size = [], 0
    finally:
        for fd, _, _ in stack:
            os.close(fd)
    yield b"".join(small)


def nar_hash(
    path: Path,
    *,
    inspect: Inspect | None = None,
    without: Callable[[bytes], bool] | None = None,
    progress: PackingProgress | None = None,
) -> tuple[NarHash, int]:
    """The SHA-256 of the NAR of `path`, and the NAR's size in bytes. Takes and raises what `pack` does.

    `progress` is called with the bytes that have been read, every MiB or so; what it raises ends this.
    """
    digest, size = hashlib.sha256(), 0  # in this thread: another one took 7 % more CPU time, for trees in memory
    for chunk in pack(path, inspect=inspect, without=without):
        digest.update(chunk)
        size += len(chunk)
        if progress is not None:
            progress(size)
    return NarHash(digest.hexdigest()), size


def hash_of_file(data: bytes) -> NarHash:
    """The hash of the NAR of a plain, non-executable file that holds `data`."""
    return NarHash.of(b"".join((tokens.MAGIC, tokens.REGULAR, tokens.string(data), tokens.CLOSE)))


def _kind_of(mode: int) -> _Kind:
    if stat.S_ISREG(mode):
        return _FILE
    if stat.S_ISDIR(mode):
        return _DIR
    return _LINK if stat.S_ISLNK(mode) else _OTHER


def _entries(fd: int) -> list[tuple[bytes, _Kind]]:
    """Names and kinds in the directory, in the order of the names' bytes."""
    found = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                kind = _FILE
            elif entry.is_dir(follow_symlinks=False):
                kind = _DIR
            else:
                kind = _LINK if entry.is_symlink() else _OTHER
            found.append((entry.name.encode(_ENCODING, _ENCODE_ERRORS), kind))
    found.sort()
    return found


def _hole(fd: int, offset: int) -> int:
    """Bytes from `offset` to the next ones that are really there, or to the file's end; the position stays."""
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a file system without holes
            return 0
        data = os.fstat(fd).st_size
    os.lseek(fd, offset, os.SEEK_SET)
    return max(0, data - offset)


def _unpackable(shown: str) -> VzreproError:
    return VzreproError(
        f"{shown} cannot be part of a store object",
        reason="it is a socket, a device or a fifo; only files, directories and symbolic links can",
    )


def _changed(shown: str) -> VzreproError:
    return VzreproError(f"{shown} changed while it was read")
