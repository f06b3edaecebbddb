"""NAR, the archive form of a store object: pack, hash, unpack and copy trees; and the zstd frames it travels in.

The NAR format is Nix's ("Nix Archive (NAR) format" in the Nix manual): one tree has exactly one byte form, so its
SHA-256 names its content. The compressed form is a row of independent zstd frames (RFC 8878), which any Nix ≥ 2.4
reads and which are made and undone in parallel here. Memory is bounded whatever the object's size.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from vzrepro.errors import VzreproError
from vzrepro.model import NarHash

Read = Callable[[int], bytes]
"""Like a binary file's `read`: at most so many bytes, fewer is fine, none only at the end."""

MAX_DEPTH = 200
"""Directories inside directories; deeper trees are refused, because each level holds a file descriptor."""

COMPRESSION_LEVEL = 3
_WINDOW_LOG_MAX = 27  # what libzstd, and so every Nix client, accepts without being told otherwise

_PIECE = 1 << 20  # bytes read at once, and about what one chunk of a stream holds
_SMALL = 1 << 16  # pieces below this are gathered into chunks, larger ones pass through uncopied
_NAME_MAX = 255
_TARGET_MAX = 4095

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OPEN_DIR = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TIMES = (1_000_000_000, 1_000_000_000)  # ns: one second after the epoch, as in every Nix store


class MalformedNar(VzreproError):
    """Bytes that are not a NAR in its one canonical form, or not the zstd frames of one."""


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def _tokens(*words: bytes) -> bytes:
    return b"".join(map(_string, words))


_MAGIC = _tokens(b"nix-archive-1")
_REGULAR = _tokens(b"(", b"type", b"regular", b"contents")
_EXECUTABLE = _tokens(b"(", b"type", b"regular", b"executable", b"", b"contents")
_SYMLINK = _tokens(b"(", b"type", b"symlink", b"target")
_DIRECTORY = _tokens(b"(", b"type", b"directory")
_ENTRY = _tokens(b"entry", b"(", b"name")
_NODE = _tokens(b"node")
_CLOSE = _tokens(b")")
_PADDING = tuple(bytes(-size % 8) for size in range(8))

_Kind = int
_FILE, _DIR, _LINK, _OTHER = range(4)
_Open = tuple[int, Iterator[tuple[bytes, _Kind]], bytes]
"""A directory being packed: its descriptor, what is left in it, its name."""


# --- packing ---------------------------------------------------------------------------------------------------


def pack(path: Path) -> Iterator[bytes]:
    """The NAR of the file, directory or symlink at `path`, in chunks of about 1 MiB.

    Links are never followed, entries are opened relative to their directory's descriptor. Raises VzreproError for
    nodes a NAR cannot hold (sockets, devices, fifos), for files that change while they are read and for trees
    deeper than `MAX_DEPTH`; OSError when something cannot be read.
    """
    small: list[bytes] = [_MAGIC]
    small_size = len(_MAGIC)
    stack: list[_Open] = []
    dir_fd: int | None = None
    name, kind = os.fsencode(path), _kind_of(path.lstat().st_mode)
    end = _CLOSE
    try:
        while True:
            if kind == _FILE:
                fd = os.open(name, _OPEN_FILE, dir_fd=dir_fd)
                try:
                    status = os.fstat(fd)
                    if not stat.S_ISREG(status.st_mode):
                        raise _unpackable(path, stack, name)
                    size = left = status.st_size
                    small.append(_EXECUTABLE if status.st_mode & stat.S_IXUSR else _REGULAR)
                    small.append(size.to_bytes(8, "little"))
                    while left:
                        piece = os.read(fd, min(left, _PIECE))
                        if not piece:
                            raise _changed(path, stack, name)
                        left -= len(piece)
                        if len(piece) >= _SMALL:
                            yield b"".join(small)
                            small, small_size = [], 0
                            yield piece
                        else:
                            small.append(piece)
                            small_size += len(piece)
                    if size >= _SMALL and os.read(fd, 1):
                        raise _changed(path, stack, name)
                finally:
                    os.close(fd)
                small.append(_PADDING[size % 8])
                small.append(end)
                small_size += 160
            elif kind == _LINK:
                small += (_SYMLINK, _string(os.readlink(name, dir_fd=dir_fd)), end)
                small_size += 200
            elif kind == _DIR:
                if len(stack) >= MAX_DEPTH:
                    raise VzreproError(
                        f"{_shown(path, stack, name)} is nested too deeply",
                        reason=f"a store object may nest {MAX_DEPTH} directories",
                    )
                fd = os.open(name, _OPEN_DIR, dir_fd=dir_fd)
                stack.append((fd, iter(()), name))
                stack[-1] = (fd, iter(_entries(fd)), name)
                small.append(_DIRECTORY)
                small_size += len(_DIRECTORY)
            else:
                raise _unpackable(path, stack, name)

            # On to the next entry, leaving the directories that have none left.
            while stack:
                dir_fd, entries, _ = stack[-1]
                following = next(entries, None)
                if following is not None:
                    name, kind = following
                    small += (_ENTRY, _string(name), _NODE)
                    end = _CLOSE + _CLOSE
                    break
                os.close(dir_fd)
                stack.pop()
                small.append(_CLOSE + _CLOSE if stack else _CLOSE)
            else:
                break
            if small_size >= _PIECE // 4:
                yield b"".join(small)
                small, small_size = [], 0
    finally:
        for fd, _, _ in stack:
            os.close(fd)
    yield b"".join(small)


def nar_hash(path: Path) -> tuple[NarHash, int]:
    """The SHA-256 of the NAR of `path`, and the NAR's size in bytes. Raises what `pack` raises."""
    digest = hashlib.sha256()
    size = 0
    for chunk in _ahead(pack(path)):
        digest.update(chunk)
        size += len(chunk)
    return NarHash(digest.hexdigest()), size


def hash_of_file(data: bytes) -> NarHash:
    """The hash of the NAR of a plain, non-executable file that holds `data`."""
    return NarHash.of(b"".join((_MAGIC, _REGULAR, _string(data), _CLOSE)))


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
            found.append((os.fsencode(entry.name), kind))
    found.sort()
    return found


def _shown(path: Path, stack: list[_Open], name: bytes) -> str:
    return os.fsdecode(b"/".join([*(entry[2] for entry in stack), name]) if stack else os.fsencode(path))


def _unpackable(path: Path, stack: list[_Open], name: bytes) -> VzreproError:
    return VzreproError(
        f"{_shown(path, stack, name)} cannot be part of a store object",
        reason="it is a socket, a device or a fifo; only files, directories and symbolic links can",
    )


def _changed(path: Path, stack: list[_Open], name: bytes) -> VzreproError:
    return VzreproError(f"{_shown(path, stack, name)} changed while it was read")


# --- unpacking -------------------------------------------------------------------------------------------------


class _Nar:
    """The incoming bytes of a NAR: buffered, and hashed, counted and bounded as they arrive."""

    def __init__(self, read: Read, max_size: int | None) -> None:
        self._read = read
        self._max_size = max_size
        self._digest = hashlib.sha256()
        self._buffer = b""
        self._at = 0
        self.size = 0

    @property
    def digest(self) -> NarHash:
        return NarHash(self._digest.hexdigest())

    def _pull(self) -> bytes:
        chunk = self._read(_PIECE)
        self._digest.update(chunk)
        self.size += len(chunk)
        if self._max_size is not None and self.size > self._max_size:
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
            raise MalformedNar("the NAR is truncated", reason=f"it ends after {self.size} bytes")

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
        if not self.skip(_PADDING[size % 8]):
            raise self.malformed("padding that is not zero")

    def contents(self, fd: int, size: int) -> None:
        """Write the next `size` bytes to `fd`."""
        left = size
        while left:
            if self._at == len(self._buffer):
                self._buffer, self._at = b"", 0
                self._need(1)
            if self._at == 0 and len(self._buffer) <= left:
                piece: bytes | memoryview = self._buffer
            else:
                piece = memoryview(self._buffer)[self._at : self._at + left]
            written = os.write(fd, piece)
            self._at += written
            left -= written

    def end(self) -> None:
        if self._at < len(self._buffer) or self._pull():
            raise self.malformed("data after its end")

    def malformed(self, what: str) -> MalformedNar:
        at = self.size - len(self._buffer) + self._at
        return MalformedNar("the NAR is malformed", reason=f"{what}, before byte {at}")


def unpack(read: Read | BinaryIO, dest: Path, *, max_size: int | None = None) -> tuple[NarHash, int]:
    """Write the NAR that `read` gives as the canonical tree `dest`; returns its hash and size in bytes.

    `dest` must not exist and its directory must be private to the caller, who also removes what a failed call
    leaves behind. Files get mode 0444 or 0555, directories 0555, everything modification time 1. The caller
    compares the returned hash with the one wanted *before* using the tree.

    Raises MalformedNar for anything but the canonical form of one NAR (order, names, padding, trailing bytes,
    depth beyond `MAX_DEPTH`) and for one larger than `max_size` bytes; OSError when writing fails.
    """
    nar = _Nar(read if callable(read) else read.read, max_size)
    nar.expect(_MAGIC, "the magic string")
    stack: list[tuple[int, bytes]] = []  # open directories: descriptor, last name in it
    dir_fd: int | None = None
    name = os.fsencode(dest)
    try:
        while True:
            nested = _make_node(nar, name, dir_fd)
            if nested is not None:
                stack.append((nested, b""))
                if len(stack) > MAX_DEPTH:
                    raise nar.malformed(f"more than {MAX_DEPTH} nested directories")
            elif stack:
                nar.expect(_CLOSE, "the end of an entry")

            while stack:
                dir_fd, last = stack[-1]
                if nar.skip(_CLOSE):
                    os.fchmod(dir_fd, 0o555)
                    os.utime(dir_fd, ns=_TIMES)
                    os.close(dir_fd)
                    stack.pop()
                    if stack:
                        nar.expect(_CLOSE, "the end of an entry")
                    continue
                nar.expect(_ENTRY, "a directory entry")
                name = nar.string(_NAME_MAX, "name")
                if name in (b".", b"..") or b"/" in name:
                    raise nar.malformed(f"the name {os.fsdecode(name)!r}")
                if name <= last:
                    raise nar.malformed(f"the name {os.fsdecode(name)!r} out of order")
                stack[-1] = (dir_fd, name)
                nar.expect(_NODE, "a node")
                break
            else:
                break
    finally:
        for fd, _ in stack:
            os.close(fd)
    nar.end()
    return nar.digest, nar.size


def _make_node(nar: _Nar, name: bytes, dir_fd: int | None) -> int | None:
    """Create what comes next as `name`; a directory's descriptor is returned, for its entries to be read."""
    try:
        executable = False
        if nar.skip(_REGULAR) or (executable := nar.skip(_EXECUTABLE)):
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
            nar.expect(_CLOSE, "the end of a file")
        elif nar.skip(_SYMLINK):
            os.symlink(nar.string(_TARGET_MAX, "link target"), name, dir_fd=dir_fd)
            os.utime(name, ns=_TIMES, dir_fd=dir_fd, follow_symlinks=False)
            nar.expect(_CLOSE, "the end of a link")
        elif nar.skip(_DIRECTORY):
            os.mkdir(name, 0o700, dir_fd=dir_fd)
            return os.open(name, _OPEN_DIR, dir_fd=dir_fd)
        else:
            raise nar.malformed("a file, link or directory expected")
    except FileExistsError as error:
        raise VzreproError(
            f"{os.fsdecode(name)} exists already",
            reason="the names in this object differ only in case, or in Unicode form, which the file system ignores"
            if dir_fd is not None
            else None,
        ) from error
    return None


def canonical_copy(src: Path, dst: Path, *, needles: Collection[str] = ()) -> tuple[NarHash, int, frozenset[str]]:
    """Copy an untrusted tree to `dst` in canonical form; returns NAR hash, NAR size and the needles found in it.

    Every file becomes a fresh inode of its own (hard links are separated, set-id bits, extended attributes and
    times do not survive), under the same terms as `unpack`; no link is followed. Needles are ASCII strings, the
    hash parts of store paths; contents, link targets and names are searched.
    Raises VzreproError as `pack` does, OSError when reading or writing fails.
    """
    scan = _Scan(needles)
    nar, size = unpack(reader(scan.through(pack(src))), dst)
    return nar, size, scan.found


class _Scan:
    """Looks for needles in a stream, also where they lie across two chunks."""

    def __init__(self, needles: Collection[str]) -> None:
        self._missing = {needle.encode(): needle for needle in needles}
        self._overlap = max(map(len, self._missing), default=1) - 1
        self._found: set[str] = set()

    @property
    def found(self) -> frozenset[str]:
        return frozenset(self._found)

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        tail = b""
        for chunk in chunks:
            if self._missing:
                seam = tail + chunk[: self._overlap]
                for needle in [each for each in self._missing if each in chunk or each in seam]:
                    self._found.add(self._missing.pop(needle))
                tail = (tail + chunk[-self._overlap :])[-self._overlap :] if self._overlap else b""
            yield chunk


# --- streams ---------------------------------------------------------------------------------------------------


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


def _ahead(chunks: Iterator[bytes], depth: int = 4) -> Iterator[bytes]:
    """The same chunks, made in another thread, up to `depth` ahead: reading overlaps with what the caller does."""
    ready: deque[bytes | BaseException | None] = deque()
    changed = threading.Condition()
    stopped = False

    def put(item: bytes | BaseException | None) -> None:
        with changed:
            while len(ready) >= depth and not stopped:
                changed.wait()
            ready.append(item)
            changed.notify()

    def produce() -> None:
        try:
            for chunk in chunks:
                put(chunk)
                if stopped:
                    break
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=produce, name="nar-read", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                while not ready:
                    changed.wait()
                item = ready.popleft()
                changed.notify()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        with changed:
            stopped = True
            changed.notify()
        thread.join()


# --- zstd frames -----------------------------------------------------------------------------------------------


def _threads() -> int:
    return min(os.cpu_count() or 1, 8)


def _ordered(tasks: Iterator[Callable[[], bytes]], workers: int) -> Iterator[bytes]:
    """Results of the tasks in their order, computed by `workers` threads, never more than that + 1 at a time."""
    pending: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="zstd")
    try:
        for task in tasks:
            pending.append(pool.submit(task))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown()


def compress(chunks: Iterable[bytes], *, frame: int = 4 << 20) -> Iterator[bytes]:
    """The stream as independent zstd frames of `frame` decoded bytes each, made in parallel.

    The bytes depend on the stream alone, not on how it is cut into chunks nor on the number of threads; at most
    about (threads + 2) · 2 · `frame` bytes are held, with up to 8 threads.
    """
    local = threading.local()

    def task(data: bytes) -> bytes:
        if not hasattr(local, "zstd"):
            local.zstd = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_content_size=True)
        compressed: bytes = local.zstd.compress(data)
        return compressed

    return _ordered((partial(task, data) for data in _cut(chunks, frame)), _threads())


def _cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The stream in pieces of exactly `size` bytes, the last one shorter; one empty piece for an empty stream."""
    parts: list[bytes | memoryview] = []
    held, cut_any = 0, False
    for chunk in chunks:
        view = memoryview(chunk)
        while held + len(view) >= size:
            take = size - held
            yield b"".join([*parts, view[:take]])
            cut_any = True
            view, parts, held = view[take:], [], 0
        if view:
            parts.append(view)
            held += len(view)
    if held or not cut_any:
        yield b"".join(parts)


def decompress(read: Read | BinaryIO, *, max_size: int) -> Read:
    """A `Read` of what the zstd frames that `read` gives decode to, at most `max_size` bytes.

    Small frames are decoded in parallel, large ones as a stream, skippable and empty ones are fine.
    The returned `Read` raises MalformedNar for truncation, trailing bytes, a window above 2^27 bytes, a
    corrupt frame, or more than `max_size` decoded bytes. Drop it to end its threads early.
    """
    return reader(_bounded(_decoded(read if callable(read) else read.read), max_size))


def _bounded(chunks: Iterator[bytes], max_size: int) -> Iterator[bytes]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_size:
            raise MalformedNar(f"the zstd data decodes to more than the {max_size} bytes announced for it")
        yield chunk


_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_MAX = 1 << 17  # bytes a block decodes to at most (RFC 8878, 3.1.1.2.4)
_RUN = 64  # blocks handed to the decoder at once: at most 8 MiB decoded
_FCS_SIZES = (0, 2, 4, 8)
_DICT_SIZES = (0, 1, 2, 4)


class _Frames:
    """Splits a zstd stream at its block boundaries, without decoding: what makes bounded parallel decoding work."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._buffer = b""
        self._at = 0

    def _take(self, count: int) -> bytes:
        while len(self._buffer) - self._at < count:
            chunk = self._read(_PIECE)
            if not chunk:
                raise MalformedNar("the zstd data is truncated")
            self._buffer = self._buffer[self._at :] + chunk
            self._at = 0
        self._at += count
        return self._buffer[self._at - count : self._at]

    def _more(self) -> bool:
        if self._at == len(self._buffer):
            self._buffer, self._at = self._read(_PIECE), 0
        return bool(self._buffer)

    def runs(self) -> Iterator[tuple[bytes, bool]]:
        """Parts of frames, each of at most `_RUN` blocks, and whether the frame ends with this part."""
        any_frame = False
        while self._more():
            any_frame = True
            magic = self._take(4)
            if magic == _ZSTD_MAGIC:
                yield from self._frame()
            elif magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5:  # a skippable frame
                left = int.from_bytes(self._take(4), "little")
                while left:
                    left -= len(self._take(min(left, _PIECE)))
            else:
                raise MalformedNar("the zstd data is malformed", reason="something else than a frame was found")
        if not any_frame:
            raise MalformedNar("the zstd data is empty")

    def _frame(self) -> Iterator[tuple[bytes, bool]]:
        """One frame after its magic: header, blocks, checksum (RFC 8878, 3.1.1)."""
        descriptor = self._take(1)
        flags = descriptor[0]
        single = bool(flags & 0x20)
        window = b"" if single else self._take(1)
        if window and 10 + (window[0] >> 3) > _WINDOW_LOG_MAX:
            raise MalformedNar("the zstd data needs too much memory", reason=f"window above 2^{_WINDOW_LOG_MAX} bytes")
        size = _FCS_SIZES[flags >> 6] or int(single)
        run = [_ZSTD_MAGIC, descriptor, window, self._take(_DICT_SIZES[flags & 3] + size)]
        blocks, last = 0, False
        while not last:
            if blocks == _RUN:
                yield b"".join(run), False
                run, blocks = [], 0
            header = self._take(3)
            number = int.from_bytes(header, "little")
            last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
            if kind == 3 or size > _BLOCK_MAX:
                raise MalformedNar("the zstd data is malformed", reason="an impossible block")
            run += (header, self._take(1 if kind == 1 else size))
            blocks += 1
        if flags & 4:
            run.append(self._take(4))
        yield b"".join(run), True


def _decoded(read: Read) -> Iterator[bytes]:
    def tasks() -> Iterator[Callable[[], bytes]]:
        stream: _Stream | None = None
        for run, ends in _Frames(read).runs():
            if stream is None and ends:
                yield partial(_decoded_frame, run)
                continue
            # A frame of several parts: they depend on each other, so decode each before the next is looked at.
            stream = stream or _Stream()
            yield partial(bytes, stream.feed(run, ends))
            if ends:
                stream = None

    return _ordered(tasks(), max(1, _threads() // 2))


def _decoded_frame(frame: bytes) -> bytes:
    return _Stream().feed(frame, True)


class _Stream:
    """The decoder of one frame."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG_MAX).decompressobj()

    def feed(self, run: bytes, ends: bool) -> bytes:
        try:
            piece = self._zstd.decompress(run)
        except zstandard.ZstdError as error:
            raise MalformedNar("the zstd data is malformed", reason=str(error)) from error
        if self._zstd.eof != ends:
            raise MalformedNar("the zstd data is malformed", reason="a frame does not end where its blocks do")
        return piece
