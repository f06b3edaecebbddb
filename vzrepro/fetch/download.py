"""Downloads: from candidate URLs to a file whose sha256 and size were checked, resumed and retried on the way.

A download is written to `<dest>.part`, which survives interruption and which the next attempt goes on from; only
bytes with the right hash ever get the name `dest`. TLS trusts what the system trusts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Protocol

from vzrepro.errors import HashMismatch, Interrupted, RemoteError, VzreproError
from vzrepro.model import FileHash
from vzrepro.wire import JOBS, Body, Failed, Http, open_file, shown

PART = ".part"
"""What is added to a file's name while it is incomplete."""

MAX_UNKNOWN_SIZE = 2 << 30
"""Bytes: where a download without known size is cut off."""

_PIECE = 1 << 18  # bytes read at once
_GRACE_SECS = 0.5  # how long an interrupted crew may take to notice

Report = Callable[[int, int | None], None]
"""Called with bytes that are there and bytes in all (None: not known); from any thread, also with fewer than before
when a download starts over."""


def _quiet(_done: int, _total: int | None) -> None:
    return


class NotFound(RemoteError):
    """Every place answered that it does not have the file."""


@dataclass(frozen=True, slots=True)
class Download:
    """One file to get: candidate URLs, best first; where to; its hash and, if known, its size in bytes."""

    urls: tuple[str, ...]
    dest: Path
    sha256: FileHash
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try; seconds. Tests replace the clock and the dice.

    An attempt that brought bytes starts the count of `tries` and the backoff anew; what ends a download that crawls
    is `total_secs`, to which a file of known size adds its transfer time at `min_speed` (bytes per second), and
    `min_speed` itself, measured over `slow_secs`.
    """

    tries: int = 4
    backoff_secs: float = 0.5
    backoff_max_secs: float = 20.0
    connect_secs: float = 15.0
    read_secs: float = 30.0
    total_secs: float = 600.0
    slow_secs: float = 30.0
    min_speed: int = 16 << 10
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] | None = None
    jitter: Callable[[float, float], float] = random.uniform

    def deadline(self, size: int | None) -> float:
        """When to give up, on `clock`."""
        return self.clock() + self.total_secs + (size or 0) / self.min_speed

    def delay(self, failures: int) -> float:
        """Full jitter: anything up to an exponentially growing bound."""
        return self.jitter(0.0, min(self.backoff_max_secs, self.backoff_secs * 2.0**failures))


@cache
def _shared_http() -> Http:
    return Http()


# --- where bytes go ---------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    """Takes a download's bytes. `size` is how many it holds; a new attempt goes on from there if it `resumes`."""

    size: int
    resumes: bool

    def restart(self) -> None:
        """Forget what is there."""

    def write(self, piece: bytes) -> None:
        """Append."""

    def verify(self) -> None:
        """Raise Failed when what is there is not what was asked for."""


class _Memory:
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


class _Part:
    """The open, locked `.part` file of a download with a known hash. It is not buffered: what is counted is there."""

    resumes = True

    def __init__(self, file: FileIO, path: Path, wanted: FileHash, cap: int) -> None:
        self._file = file
        self._path = path
        self._wanted = wanted
        self._digest = hashlib.sha256()
        self.size = 0
        with _local(path):
            if os.fstat(file.fileno()).st_size > cap:
                file.truncate(0)
            while piece := file.read(_PIECE):
                self._digest.update(piece)
                self.size += len(piece)

    def restart(self) -> None:
        with _local(self._path):
            self._file.seek(0)
            self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        left = memoryview(piece)
        with _local(self._path):
            while left:
                left = left[self._file.write(left) :]
        self._digest.update(piece)
        self.size += len(piece)

    def verify(self) -> None:
        found = self._digest.hexdigest()
        if found != self._wanted.hex:
            raise Failed(f"has other content, sha256 {found}", again=False, stale=True, found=f"sha256 {found}")

    def commit(self, dest: Path) -> None:
        """Give the verified file its name, durably."""
        with _local(dest):
            os.fsync(self._file.fileno())
            self._path.replace(dest)
            directory = os.open(dest.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


@contextmanager
def _local(path: Path) -> Iterator[None]:
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


# --- attempts ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Source:
    """What became of one candidate URL so far."""

    url: str
    tries: int = 0
    etag: str | None = None
    failure: Failed | None = None
    alive: bool = True


class _Transfer:
    """Tries candidate URLs in rounds until the sink is content: the next one at once, the same one after a pause."""

    def __init__(
        self,
        urls: Sequence[str],
        sink: _Sink,
        *,
        size: int | None,
        cap: int,
        report: Report,
        cancel: threading.Event,
        patience: Patience,
        http: Http,
    ) -> None:
        self._sources = [_Source(url) for url in dict.fromkeys(urls)]
        self._sink = sink
        self._size = size
        self._cap = cap
        self._report = report
        self._cancel = cancel
        self._patience = patience
        self._http = http
        self._deadline = patience.deadline(size)
        self._failures = 0

    def run(self) -> list[_Source] | None:
        """None when the sink has what was asked for, else every source with its failure."""
        while True:
            pause = 0.0
            for source in self._sources:
                if not source.alive:
                    continue
                before = self._sink.size
                try:
                    self._once_or_afresh(source)
                except Failed as failure:
                    source.failure = failure
                    if self._sink.size > before:
                        source.tries = self._failures = 0
                    source.tries += 1
                    source.alive = failure.again and source.tries < self._patience.tries
                    pause = max(pause, failure.after) if source.alive else pause
                else:
                    return None
            if not any(source.alive for source in self._sources):
                return self._sources
            pause = max(pause, self._patience.delay(self._failures))
            self._failures += 1
            if self._patience.clock() + pause >= self._deadline:
                return self._sources
            self._sleep(pause)

    def _once_or_afresh(self, source: _Source) -> None:
        """One attempt; if what was there before it may be to blame for its failure, one more from the first byte."""
        resumed = self._sink.size > 0
        try:
            self._once(source)
        except Failed as failure:
            if not failure.stale:
                raise
            self._sink.restart()
            if not resumed:
                raise
            try:
                self._once(source)
            except Failed as second:
                if second.stale:
                    self._sink.restart()
                raise

    def _once(self, source: _Source) -> None:
        self._check_cancel()
        sink = self._sink
        if not sink.resumes:
            sink.restart()
        if self._size is not None and sink.size == self._size and sink.size:
            sink.verify()
            return
        if source.url.startswith("file:"):
            body = open_file(source.url, sink.size)
        else:
            body = self._http.open(
                source.url, sink.size, source.etag, self._patience.connect_secs, self._patience.read_secs
            )
        with closing(body):
            source.etag = body.etag
            if self._size is not None and body.total is not None and body.total != self._size:
                raise Failed(
                    f"has {body.total} bytes instead of {self._size}", again=False, found=f"{body.total} bytes"
                )
            if body.start != sink.size:
                sink.restart()
            self._copy(body)
        if self._size is not None and sink.size < self._size:
            raise Failed(f"ends after {sink.size} of {self._size} bytes", again=True)
        sink.verify()

    def _copy(self, body: Body) -> None:
        sink, patience = self._sink, self._patience
        total = self._size if self._size is not None else body.total
        self._report(sink.size, total)
        window_end, window_size = patience.clock() + patience.slow_secs, sink.size
        while piece := body.read():
            if sink.size + len(piece) > self._cap:
                found = None if self._size is None else "more"
                raise Failed(f"has more than {self._cap} bytes", again=False, stale=True, found=found)
            sink.write(piece)
            self._check_cancel()
            self._report(sink.size, total)
            now = patience.clock()
            if now > self._deadline:
                raise Failed("takes too long", again=False)
            if now >= window_end:
                if sink.size - window_size < patience.min_speed * patience.slow_secs:
                    raise Failed(f"sends fewer than {patience.min_speed} bytes per second", again=True)
                window_end, window_size = now + patience.slow_secs, sink.size

    def _sleep(self, secs: float) -> None:
        if self._patience.sleep is not None:
            self._patience.sleep(secs)
        else:
            self._cancel.wait(secs)
        self._check_cancel()

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise Interrupted("the download was stopped", hint="run the same command again: it goes on where it was")


def _explained(sources: Sequence[_Source], name: str, wanted: FileHash | None, size: int | None) -> VzreproError:
    """The error for a download that no source could satisfy."""
    tried = [(source, source.failure) for source in sources if source.failure is not None]
    reason = "\n".join(f"{shown(source.url)} {failure.why}" for source, failure in tried)
    for source, failure in tried:
        if failure.found is not None and wanted is not None:
            pinned = f"sha256 {wanted}" if failure.found.startswith("sha256") else f"{size} bytes"
            return HashMismatch(
                f"{shown(source.url)} is not the file that is pinned: wanted {pinned}, found {failure.found}",
                reason=reason,
                hint="name a mirror that has the right file in VZREPRO_MIRRORS, or, if the file was meant to change, "
                "run: vzrepro lock --update",
            )
    if tried and all(failure.missing for _, failure in tried):
        return NotFound(
            f"no place has {name}", reason=reason, hint="export VZREPRO_MIRRORS='<name>=https://…' with one that has it"
        )
    return RemoteError(
        f"cannot download {name}",
        reason=reason or "no place to download it from is known",
        hint="check the network, or name a mirror that can be reached: export VZREPRO_MIRRORS='<name>=https://…'",
    )


# --- the public functions ---------------------------------------------------------------------------------------------


def get(
    urls: Sequence[str],
    max_size: int,
    *,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> bytes:
    """The content of the first of `urls` that has it: for indexes, whose hash nobody knows beforehand.

    Raises NotFound when every place says that it has no such file, RemoteError when none of them gives it in at most
    `max_size` bytes, Interrupted when `cancel` is set.
    """
    sink = _Memory()
    failed = _Transfer(
        urls,
        sink,
        size=None,
        cap=max_size,
        report=_quiet,
        cancel=cancel or threading.Event(),
        patience=patience or Patience(),
        http=http or _shared_http(),
    ).run()
    if failed is not None:
        raise _explained(failed, shown(urls[0]) if urls else "a file", None, None)
    return sink.bytes()


def served(urls: Sequence[str], *, patience: Patience | None = None, http: Http | None = None) -> bool:
    """Whether one of `urls` has its file; nothing of it is read. A mirror's index may be ahead of its files.

    False only when every place says that it has none: a place that cannot be asked may have it.
    """
    patience, http = patience or Patience(), http or _shared_http()
    missing = []
    for url in urls:
        try:
            if url.startswith("file:"):
                body = open_file(url, 0)
            else:
                body = http.open(url, 0, None, patience.connect_secs, patience.read_secs)
        except Failed as failure:
            missing.append(failure.missing)
        else:
            body.close()
            return True
    return not all(missing)


def download(
    urls: Sequence[str],
    dest: Path,
    *,
    sha256: FileHash,
    size: int | None = None,
    report: Report = _quiet,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> None:
    """Have the file with this hash (and size in bytes, if known) at `dest`, from the first of `urls` that gives it.

    A file that is there is verified, not trusted; a wrong one is replaced once the right one is complete. What is
    there of `<dest>.part` is used. Processes that want the same `dest` wait for each other.

    Raises HashMismatch when a place has other content and none has the right one; NotFound, RemoteError as `get`;
    Interrupted when `cancel` is set (the part is kept); VzreproError when the disk is full or cannot be written.
    """
    if _is_there(dest, sha256, report):
        return
    with _local(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
    cancel = cancel or threading.Event()
    part = dest.with_name(dest.name + PART)
    cap = MAX_UNKNOWN_SIZE if size is None else size
    with _locked(part, cancel) as file:
        if _is_there(dest, sha256, report):
            part.unlink()
            return
        sink = _Part(file, part, sha256, cap)
        failed = _Transfer(
            urls,
            sink,
            size=size,
            cap=cap,
            report=report,
            cancel=cancel,
            patience=patience or Patience(),
            http=http or _shared_http(),
        ).run()
        if failed is not None:
            if not sink.size:
                part.unlink()
            raise _explained(failed, shown(urls[0]) if urls else dest.name, sha256, size)
        sink.commit(dest)


def _is_there(dest: Path, sha256: FileHash, report: Report) -> bool:
    try:
        with dest.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256.hex:
                return False
            report(file.tell(), file.tell())
            return True
    except OSError:
        return False


@contextmanager
def _locked(part: Path, cancel: threading.Event) -> Iterator[FileIO]:
    """The part file, opened and locked against other processes and threads; the kernel undoes the lock with us."""
    while True:
        with _local(part):
            file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")
        with file:
            while not _try_lock(file, part):
                if cancel.wait(0.1):
                    raise Interrupted("the download was stopped while another process downloads the same file")
            if _is_same(file, part):
                yield file
                return
        # Whoever had the lock has renamed or removed the file that we waited for.


def _try_lock(file: FileIO, part: Path) -> bool:
    with _local(part):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_same(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def download_all(
    items: Sequence[Download],
    *,
    jobs: int = JOBS,
    report: Report = _quiet,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> None:
    """`download` every item, `jobs` at once; `report` gets sums over all of them.

    The first error stops the others, which keep their parts, and is raised. Raises as `download` does; an interrupt
    of the calling thread stops all of them too, and does not wait for a server that is silent.
    """
    _Crew(items, jobs, report, cancel or threading.Event(), patience, http).run()


@dataclass(slots=True)
class _Crew:
    """The threads of one `download_all`."""

    items: Sequence[Download]
    jobs: int
    report: Report
    cancel: threading.Event
    patience: Patience | None
    http: Http | None
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: BaseException | None = None
    running: int = 0
    unfinished: int = 0

    def run(self) -> None:
        waiting = deque(enumerate(self.items))
        done = [0] * len(self.items)
        sizes = [item.size for item in self.items]
        self.running = min(self.jobs, len(self.items))
        self.unfinished = len(self.items)
        # Daemons: one that waits for a silent server must not keep the process from ending.
        for number in range(self.running):
            threading.Thread(
                target=self._work, args=(waiting, done, sizes), name=f"fetch-{number}", daemon=True
            ).start()
        try:
            with self.changed:
                while self.running and self.error is None and not self.cancel.is_set():
                    self.changed.wait(0.1)
        finally:
            self.stop.set()
            with self.changed:
                self.changed.wait_for(lambda: not self.running, timeout=_GRACE_SECS)
        if self.error is not None:
            raise self.error
        if self.unfinished:
            raise Interrupted("the downloads were stopped", hint="run the same command again: it goes on where it was")

    def _work(self, waiting: deque[tuple[int, Download]], done: list[int], sizes: list[int | None]) -> None:
        try:
            while not self.stop.is_set():
                try:
                    number, item = waiting.popleft()
                except IndexError:
                    return
                download(
                    item.urls,
                    item.dest,
                    sha256=item.sha256,
                    size=item.size,
                    report=self._reporter(number, done, sizes),
                    cancel=self.stop,
                    patience=self.patience,
                    http=self.http,
                )
                with self.changed:
                    self.unfinished -= 1
        except BaseException as error:
            with self.changed:
                self.error = self.error or (None if self.stop.is_set() else error)
                self.stop.set()
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def _reporter(self, number: int, done: list[int], sizes: list[int | None]) -> Report:
        def report(item_done: int, item_total: int | None) -> None:
            with self.changed:
                done[number] = item_done
                sizes[number] = item_total
                known = [size for size in sizes if size is not None]
                sum_done, sum_total = sum(done), sum(known) if len(known) == len(sizes) else None
            self.report(sum_done, sum_total)

        return report
