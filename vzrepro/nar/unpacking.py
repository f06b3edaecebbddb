"""Making trees of NARs, strictly; and copying a tree by way of one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import NarHash
from vzrepro.nar import tokens
from vzrepro.nar.packing import PackingProgress, pack
from vzrepro.nar.stream import Hasher, MalformedNar, Read, reader

_PIECE = 1 << 22  # bytes asked for at once: a frame that `compress` makes arrives uncut
_SMALL = 1 << 16  # files below this are taken out of the buffer whole
_ZEROS = bytes(_PIECE)

_OPEN_DIR = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TIMES = (1_000_000_000, 1_000_000_000)  # ns: one second after the epoch, as in every Nix store


class _Nar:
    """The incoming bytes of a NAR: buffered, and hashed, counted and bounded as they arrive."""

    def __init__(self, read: Read, hasher: Hasher, max_size: int | None) -> None:
        self._read = read
        self._hasher = hasher
        self._max_size = max_size
        self._buffer = b""
        self._at = 0

    def _pull(self) -> bytes:
        wanted = _PIECE if self._max_size is None else min(_PIECE, self._max_size - self._hasher.size + 1)
        chunk = self._read(wanted)
        self._hasher.update(chunk)
        if self._max_size is not None and self._hasher.size > self._max_size:
            raise MalformedNar(f"the NAR is larger than the {self._max_size} bytes announced for it")
        return chunk

    def _fill(self, count: int) -> bool:
        """Have `count` bytes in the buffer; False when the stream ends before."""
        while len(self._buffer) - self._at < count:
            chunk = self._pull()
            if not chunk:
                return False
            self._buffer = self._buffer[self._at :] + chunk
            self._at = 0
        return True

    def _need(self, count: int) -> None:
        if not self._fill(count):
            raise MalformedNar("the NAR is truncated", reason=f"it ends after {self._hasher.size} bytes")

    def skip(self, token: bytes) -> bool:
        """Whether `token` comes next; if so, it is consumed."""
        if self._fill(len(token)) and self._buffer.startswith(token, self._at):
            self._at += len(token)
            return True
        return False

    def expect(self, token: bytes, what: str) -> None:
        if not self.skip(token):
            self._need(len(token))
            raise self.malformed(f"{what} expected")

    def number(self) -> int:
        self._need(8)
        self._at += 8
        return int.from_bytes(self._buffer[self._at - 8 : self._at], "little")

    def string(self, limit: int, what: str) -> bytes:
        size = self.number()
        if not 0 < size <= limit:
            raise self.malformed(f"a {what} of {size} bytes")
        self._need(size + 8)  # a token follows every string, so more than the padding is there
        text = self._buffer[self._at : self._at + size]
        self._at += size
        self.padding(size)
        if b"\0" in text:
            raise self.malformed(f"a {what} with a zero byte")
        return text

    def padding(self, size: int) -> None:
        if not self.skip(tokens.PADDING[size % 8]):
            raise self.malformed("padding that is not zero")

    def small_file(self, last: bytes) -> tuple[bytes, int, bytes] | None:
        """Name, mode and contents of the next entry; None, with nothing consumed, unless all is plain and good.

        That is to say: the entry is a file, the buffer holds all of it, its name is allowed and comes after `last`.
        Anything else is for the other methods to take apart, word by word.
        """
        buffer, at = self._buffer, self._at
        if not buffer.startswith(tokens.ENTRY, at):
            return None
        at += len(tokens.ENTRY) + 8
        size = int.from_bytes(buffer[at - 8 : at], "little")
        if size > tokens.NAME_MAX:
            return None
        name = buffer[at : at + size]
        at += size
        if not last < name or b"/" in name or b"\0" in name or name in (b".", b".."):
            return None
        if buffer.startswith(tokens.THEN_REGULAR[size % 8], at):
            mode = 0o444
            at += len(tokens.THEN_REGULAR[size % 8]) + 8
        elif buffer.startswith(tokens.THEN_EXECUTABLE[size % 8], at):
            mode = 0o555
            at += len(tokens.THEN_EXECUTABLE[size % 8]) + 8
        else:
            return None
        size = int.from_bytes(buffer[at - 8 : at], "little")
        ending = tokens.THEN_CLOSE_ENTRY[size % 8]
        if size > _SMALL or not buffer.startswith(ending, at + size):
            return None
        self._at = at + size + len(ending)
        return name, mode, buffer[at : at + size]

    def contents(self, fd: int, size: int) -> None:
        """Write the next `size` bytes to `fd`; long runs of zeros become holes."""
        left = size
        while left:
            if self._at == len(self._buffer):
                self._buffer, self._at = b"", 0
                self._need(1)
            if self._at == 0 and len(self._buffer) <= left:
                piece: bytes | memoryview = self._buffer
            else:
                piece = memoryview(self._buffer)[self._at : self._at + left]
            if len(piece) >= _SMALL and piece == _ZEROS[: len(piece)]:
                written = len(piece)
                os.lseek(fd, written, os.SEEK_CUR)
            else:
                written = os.write(fd, piece)
            self._at += written
            left -= written
        os.ftruncate(fd, size)  # what ends with a hole has its size only now

    def end(self) -> None:
        if self._at < len(self._buffer) or self._pull():
            raise self.malformed("data after its end")

    def malformed(self, what: str) -> MalformedNar:
        at = self._hasher.size - len(self._buffer) + self._at
        return MalformedNar("the NAR is malformed", reason=f"{what}, before byte {at}")


def unpack(read: Read | BinaryIO, dest: Path, *, max_size: int | None = None) -> tuple[NarHash, int]:
    """Write the NAR that `read` gives as the canonical tree `dest`; returns its hash and size in bytes.

    `dest` must not exist and its directory must be private to the caller, who also removes what a failed call
    leaves behind. Files get mode 0444 or 0555, directories 0555, everything modification time 1. The caller
    compares the returned hash with the one wanted *before* using the tree.

    Raises MalformedNar for anything but the canonical form of one NAR (order, names, padding, trailing bytes,
    depth beyond `MAX_DEPTH`) and for one larger than `max_size` bytes; VzreproError when the file system takes two of
    its names for one, or changes a name; OSError when writing fails.
    """
    with Hasher() as hasher:
        nar = _Nar(read if callable(read) else read.read, hasher, max_size)
        _make_tree(nar, os.fsencode(dest))
        nar.end()
        return hasher.finish(), hasher.size


def _make_tree(nar: _Nar, dest: bytes) -> None:
    nar.expect(tokens.MAGIC, "the magic string")
    # Open directories: descriptor, last name in it, those of its names that are not ASCII.
    stack: list[tuple[int, bytes, set[bytes]]] = []
    dir_fd: int | None = None
    name = dest
    try:
        while True:
            nested = _make_node(nar, name, dir_fd)
            if nested is not None:
                stack.append((nested, b"", set()))
                if len(stack) > tokens.MAX_DEPTH:
                    raise nar.malformed(f"more than {tokens.MAX_DEPTH} nested directories")
            elif stack:
                nar.expect(tokens.CLOSE, "the end of an entry")

            while stack:
                dir_fd, last, foreign = stack[-1]
                while (small := nar.small_file(last)) is not None:
                    last, mode, data = small
                    if not last.isascii():
                        foreign.add(last)
                    _write(last, dir_fd, mode, data)
                if nar.skip(tokens.CLOSE):
                    _check_names(dir_fd, foreign)
                    os.fchmod(dir_fd, 0o555)
                    os.utime(dir_fd, ns=_TIMES)
                    os.close(dir_fd)
                    stack.pop()
                    if stack:
                        nar.expect(tokens.CLOSE, "the end of an entry")
                    continue
                nar.expect(tokens.ENTRY, "a directory entry")
                name = nar.string(tokens.NAME_MAX, "name")
                if name in (b".", b"..") or b"/" in name:
                    raise nar.malformed(f"the name {os.fsdecode(name)!r}")
                if name <= last:
                    raise nar.malformed(f"the name {os.fsdecode(name)!r} out of order")
                if not name.isascii():
                    foreign.add(name)
                stack[-1] = (dir_fd, name, foreign)
                nar.expect(tokens.NODE, "a node")
                break
            else:
                break
    finally:
        for fd, _, _ in stack:
            os.close(fd)


def _make_node(nar: _Nar, name: bytes, dir_fd: int | None) -> int | None:
    """Create what comes next as `name`; a directory's descriptor is returned, for its entries to be read."""
    try:
        executable = False
        if nar.skip(tokens.REGULAR) or (executable := nar.skip(tokens.EXECUTABLE)):
            mode = 0o555 if executable else 0o444
            size = nar.number()
            if size >= 1 << 63:
                raise nar.malformed(f"a file of {size} bytes")
            fd = os.open(name, _CREATE, mode, dir_fd=dir_fd)
            try:
                nar.contents(fd, size)
                os.fchmod(fd, mode)  # whatever the umask took away
                os.utime(fd, ns=_TIMES)
            finally:
                os.close(fd)
            nar.padding(size)
            nar.expect(tokens.CLOSE, "the end of a file")
        elif nar.skip(tokens.SYMLINK):
            os.symlink(nar.string(tokens.TARGET_MAX, "link target"), name, dir_fd=dir_fd)
            os.utime(name, ns=_TIMES, dir_fd=dir_fd, follow_symlinks=False)
            nar.expect(tokens.CLOSE, "the end of a link")
        elif nar.skip(tokens.DIRECTORY):
            os.mkdir(name, 0o700, dir_fd=dir_fd)
            return os.open(name, _OPEN_DIR, dir_fd=dir_fd)
        else:
            raise nar.malformed("a file, link or directory expected")
    except FileExistsError as error:
        raise _exists(name, dir_fd) from error
    return None


def _write(name: bytes, dir_fd: int, mode: int, data: bytes) -> None:
    try:
        fd = os.open(name, _CREATE, mode, dir_fd=dir_fd)
    except FileExistsError as error:
        raise _exists(name, dir_fd) from error
    try:
        while data:
            data = data[os.write(fd, data) :]
        os.fchmod(fd, mode)  # whatever the umask took away
        os.utime(fd, ns=_TIMES)
    finally:
        os.close(fd)


def _exists(name: bytes, dir_fd: int | None) -> VzreproError:
    return VzreproError(f"{os.fsdecode(name)} exists already") if dir_fd is None else disk.merged(os.fsdecode(name))


def _check_names(dir_fd: int, names: set[bytes]) -> None:
    """Raise VzreproError unless the directory has entries of just these names: some file systems write other ones."""
    changed = names.difference(map(os.fsencode, os.listdir(dir_fd))) if names else None
    if changed:
        raise VzreproError(
            f"{os.fsdecode(min(changed))} cannot be kept under its name",
            reason="the file system writes it in another Unicode form",
            hint="use a store on a disk that keeps names as they are: export VZREPRO_STORE=DIR",
        )


def canonical_copy(
    src: Path, dst: Path, *, needles: Collection[str] = (), progress: PackingProgress | None = None
) -> tuple[NarHash, int, frozenset[str]]:
    """Copy an untrusted tree to `dst` in canonical form; returns NAR hash, NAR size and the needles found in it.

    Every file becomes a fresh inode of its own (hard links are separated, set-id bits, extended attributes and
    times do not survive), under the same terms as `unpack`; no link is followed. Needles are ASCII strings, the
    hash parts of store paths; contents, link targets and names are searched. `progress` is called with the bytes that
    have been read, before they are written; what it raises ends this.
    Raises VzreproError as `pack` does, OSError when reading or writing fails.
    """
    scan = _Scan(needles, progress)
    nar, size = unpack(reader(scan.through(pack(src))), dst)
    return nar, size, scan.found


class _Scan:
    """Looks for needles in a stream, also where they lie across two chunks."""

    def __init__(self, needles: Collection[str], progress: PackingProgress | None) -> None:
        self._progress = progress
        self._missing = {needle.encode(): needle for needle in needles}
        self._overlap = max(map(len, self._missing), default=1) - 1
        self._found: set[str] = set()

    @property
    def found(self) -> frozenset[str]:
        return frozenset(self._found)

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        tail, size = b"", 0
        for chunk in chunks:
            size += len(chunk)
            if self._progress is not None:
                self._progress(size)
            if self._missing:
                seam = tail + chunk[: self._overlap]
                for needle in [each for each in self._missing if each in chunk or each in seam]:
                    self._found.add(self._missing.pop(needle))
                tail = (tail + chunk[-self._overlap :])[-self._overlap :] if self._overlap else b""
            yield chunk
