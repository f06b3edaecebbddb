"""The zstd frames a NAR travels in: made and undone in parallel, within bounded memory, and refused if odd."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from itertools import chain, islice
from mmap import mmap
from typing import BinaryIO

import zstandard

from vzrepro.nar.stream import MalformedNar, Read, reader

COMPRESSION_LEVEL = 3
_WINDOW_LOG_MAX = 27  # what libzstd, and so every Nix client, accepts without being told otherwise
_PIECE = 1 << 20  # bytes read at once


@cache
def _threads() -> int:
    return min(os.cpu_count() or 1, 8)


def _ordered(tasks: Iterator[Callable[[], bytes]], workers: int) -> Iterator[bytes]:
    """Results of the tasks in their order, computed by `workers` threads, never more than that + 1 at a time."""
    some = list(islice(tasks, 2))
    if len(some) == 1:  # as for most objects: not worth a thread
        yield some[0]()
        return
    pending: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="zstd")
    try:
        for task in chain(some, tasks):
            pending.append(pool.submit(task))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown()


class _Codec(threading.local):
    """Each thread's own compressor and decompressor, which are costly to make."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL, write_content_size=True)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG_MAX)


_codec = _Codec()


def compress(chunks: Iterable[bytes], *, frame: int = 4 << 20) -> Iterator[bytes]:
    """The stream as independent zstd frames of `frame` decoded bytes each, made in parallel.

    The bytes depend on the stream alone, not on how it is cut into chunks nor on the number of threads; at most
    about (threads + 2) · 2 · `frame` bytes are held, with up to 8 threads.
    """
    spare: list[mmap] = []

    def compressed(data: bytes | mmap) -> bytes:
        done: bytes = _codec.compressor.compress(memoryview(data))
        if isinstance(data, mmap):
            spare.append(data)
        return done

    return _ordered((partial(compressed, data) for data in _cut(chunks, frame, spare)), _threads())


def _cut(chunks: Iterable[bytes], size: int, spare: list[mmap]) -> Iterator[bytes | mmap]:
    """The stream in pieces of exactly `size` bytes, the last one shorter; one empty piece for an empty stream.

    Whole pieces are put into buffers taken from `spare`, where they come back to when they are done with: having
    fresh memory mapped for each costs more than filling it.
    """
    parts: list[bytes | memoryview] = []
    held, cut_any = 0, False
    for chunk in chunks:
        view = memoryview(chunk)
        while held + len(view) >= size:
            take = size - held
            buffer = spare.pop() if spare else mmap(-1, size)
            buffer.seek(0)
            for part in (*parts, view[:take]):
                buffer.write(part)
            yield buffer
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
            stream = stream or _Stream()
            yield stream.task(run, ends)
            if ends:
                stream = None

    return _ordered(tasks(), max(1, _threads() // 2))


def _decoded_frame(frame: bytes) -> bytes:
    """What a frame of at most `_RUN` blocks decodes to."""
    try:
        if 0 < zstandard.frame_content_size(frame) <= _RUN * _BLOCK_MAX:
            decoded: bytes = _codec.decompressor.decompress(frame, allow_extra_data=False)
            return decoded
    except zstandard.ZstdError as error:
        raise MalformedNar("the zstd data is malformed", reason=str(error)) from error
    return _Stream().task(frame, True)()


class _Stream:
    """The decoder of one frame in several parts, each of which waits for the one before it."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG_MAX).decompressobj()
        self._tasks = self._fed = 0
        self._turn = threading.Condition()

    def task(self, run: bytes, ends: bool) -> Callable[[], bytes]:
        """What decodes the next part; tasks that are not called in their order need a thread for each."""
        self._tasks += 1
        return partial(self._feed, self._tasks - 1, run, ends)

    def _feed(self, number: int, run: bytes, ends: bool) -> bytes:
        with self._turn:
            self._turn.wait_for(lambda: self._fed == number)
            try:
                piece = self._zstd.decompress(run)
            except zstandard.ZstdError as error:
                raise MalformedNar("the zstd data is malformed", reason=str(error)) from error
            finally:
                self._fed += 1
                self._turn.notify_all()
            if self._zstd.eof != ends:
                raise MalformedNar("the zstd data is malformed", reason="a frame does not end where its blocks do")
            return piece
