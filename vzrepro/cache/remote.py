"""What caches behind a network share: how long failures may cost in all, and entries that arrive in parallel pieces.

A place is asked through `Open`, which gives one answer (`net.Body`) and raises `net.AttemptFailed`; `net.engine` tries
again.
"""

from __future__ import annotations

import itertools
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

from vzrepro import nar
from vzrepro.base.errors import Interrupted, RemoteError
from vzrepro.cache.backend import CACHE_INFO
from vzrepro.net import AttemptFailed, Body
from vzrepro.net.engine import MIN_SPEED, Backoff, Pace, persist, starting_at

PIECE = 4 << 20
"""Bytes asked for at once; an entry that is not larger is one request."""

_AHEAD = 4  # pieces of one entry on their way, so at most about 5 · PIECE are held
_CRAWL = 4 << 10  # bytes per second of one body; several may share what comes
_ANSWER_SECS = 1.0  # how long an answer may take for nothing
_BACKOFF_SECS = 0.4
_BACKOFF_MAX_SECS = 5.0
_THROTTLING = frozenset({429, 503})  # who answers so wants fewer questions, whoever asks them

T = TypeVar("T")
Open = Callable[[int, int | None, str | None], Body | None]
"""Ask for the entry's bytes from the first number up to, without, the second (None: the end), of the version with this
ETag (None: any). A place that knows no ranges answers with all of it. None: there is no such entry. Raises
AttemptFailed."""


class Patience:
    """How many seconds in all, in this process, one place's failures may cost before it is given up; a fifth of that
    while not even a connection has been made, as on a machine that is off line.

    Time counts from an attempt's begin, or the last time that one succeeded or a body brought bytes, while attempts
    fail, however many threads try. Requests time out after a third of it, and a body that brings less than 4 KiB/s for
    that long is a failed attempt as well. What succeeds slowly costs patience, too: all the time in which somebody
    waits for answers and bodies, but for a second for each answer and for each 16 KiB. Setting `stop` ends waiting with
    Interrupted. `clock` and `jitter` are for tests. It is an `engine.AttemptPolicy`.
    """

    def __init__(
        self,
        secs: float = 30.0,
        *,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self.secs = secs
        self.backoff = Backoff(_BACKOFF_SECS, _BACKOFF_MAX_SECS, jitter)
        self._stop = stop or threading.Event()
        self._clock = clock
        self._pace = Pace(self.timeout_secs, clock, _CRAWL)
        self._lock = threading.Lock()
        self._lost = 0.0  # until `_counted`
        self._counted = -math.inf
        self._failing_since: float | None = None
        self._waiting = 0  # for answers and bodies, in all threads
        self._waited = -math.inf  # until when that is in `_owed`
        self._owed = 0.0  # what they took longer than they may for nothing
        self._answered = False
        self._not_before = -math.inf

    @property
    def timeout_secs(self) -> float:
        """How long to wait for a connection, for an answer and for the next bytes of a body."""
        return self.secs / 3

    def attempt(self, place: str, act: Callable[[], T]) -> T:
        """Do `act` until it does not raise AttemptFailed, as long as trying again may help and patience lasts.

        Raises RemoteError naming `place` with the last attempt's reason, Interrupted when `stop` is set.
        """
        try:
            return persist(self, act)
        except AttemptFailed as failure:
            raise RemoteError(f"{place} {failure.why}", hint=failure.hint) from failure

    def check(self) -> None:
        """Raise Interrupted once `stop` is set."""
        if self._stop.is_set():
            raise Interrupted("interrupted")

    def answer(self, ask: Callable[[], T]) -> T:
        """What `ask` gives, an answer without its body. Raises AttemptFailed, also when patience with a slow place has
        ended: before anything is asked, so that no answer is left open."""
        self._judge()
        with self._waits():
            answer = ask()
            self._came(_ANSWER_SECS)
        return answer

    def pieces(self, body: Body) -> Generator[bytes]:
        """The pieces of a body. Raises AttemptFailed when it breaks off or crawls, or patience with a slow place
        ends."""
        with self._waits():
            for piece in self._pace.pieces(body, self.check):
                self._came(len(piece) / MIN_SPEED)
                self._judge()
                yield piece

    def read_into(self, held: bytearray, body: Body, limit: int) -> bool:
        """Append a body's next bytes to `held` until that has `limit` bytes, or a few more, since none are dropped;
        False when the body ends before.

        What has arrived stays in `held` when AttemptFailed is raised: the body breaks off, or crawls.
        """
        with closing(self.pieces(body)) as pieces:
            for piece in pieces:
                held += piece
                if len(held) >= limit:
                    return True
        return False

    @contextmanager
    def _waits(self) -> Iterator[None]:
        with self._lock:
            if not self._waiting:
                self._waited = self._clock()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1

    def _came(self, worth: float) -> None:
        """Something has come that may take so many seconds."""
        with self._lock:
            now = self._sum_up()
            self._owed = max(0.0, self._owed + now - self._waited - worth)
            self._waited = now

    def _judge(self) -> None:
        """Raise AttemptFailed when patience is at its end because of what came slowly."""
        if self._owed and self._lost + self._owed > self.secs:
            raise AttemptFailed(f"is too slow: it sends fewer than {MIN_SPEED} bytes per second", again=False)

    # --- what the engine asks -----------------------------------------------------------------------------------------

    def begin(self) -> float:
        """See `AttemptPolicy.begin`: not before a server that was asked too often wants to be asked again."""
        early = self._not_before - self._clock()
        if early > 0:
            self._stop.wait(early)
        self.check()
        return self._clock()

    def grants(self, failure: AttemptFailed, begun: float, pause: float) -> bool:
        """See `AttemptPolicy.grants`."""
        limit = self.secs / 5 if failure.unreachable and not self._answered else self.secs
        if not failure.again or self._lost_since(begun) + pause > limit:
            self._count()  # nobody waits here any more
            return False
        if failure.status in _THROTTLING:
            self._not_before = max(self._not_before, self._clock() + pause)  # for all who ask
        return True

    def sleep(self, secs: float) -> None:
        """See `AttemptPolicy.sleep`."""
        self._stop.wait(secs)

    def succeed(self) -> None:
        """See `AttemptPolicy.succeed`."""
        self._answered = True
        self._count()

    def _lost_since(self, begun: float) -> float:
        """What failures have cost in all, the attempt that began at `begun` and has just failed included."""
        with self._lock:
            begun = max(begun, self._counted)
            self._failing_since = begun if self._failing_since is None else min(begun, self._failing_since)
            return self._lost + self._clock() - self._failing_since

    def _count(self) -> None:
        """Something has succeeded, or been given up."""
        with self._lock:
            self._sum_up()

    def _sum_up(self) -> float:
        """What was lost until now is a sum, and counted once; the time. The lock is held."""
        now = self._counted = self._clock()
        if self._failing_since is not None:
            self._lost += now - self._failing_since
            # Of what is lost, nothing is owed as well.
            self._owed += max(0.0, self._failing_since - self._waited) if self._waiting else 0.0
            self._waited = now
            self._failing_since = None
        return now


class Concealment:
    """Whether a place answers 403 where there is no such entry, as S3 does to those who may not list the bucket.

    They may read what is there, and that is seen from nix-cache-info: who is refused that one too is refused
    everything, and should know. `ask` says whether it can be read; it raises AttemptFailed.
    """

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._readable: bool | None = None

    def was_read(self, key: str) -> None:
        """An entry has been read."""
        if key == CACHE_INFO:
            self._readable = True

    def hides(self, key: str) -> bool:
        """Whether 403 for this key may mean that there is no such entry. Raises AttemptFailed."""
        if key == CACHE_INFO:
            return False
        if self._readable is None:
            try:
                self._readable = self._ask()
            except AttemptFailed as failure:
                if failure.again:
                    raise
                self._readable = False
        return self._readable


class EntryStream:
    """An entry on its way from a remote place: a `Stream`, and a context manager that gives its connections back.

    The first piece is here before anything is read. If there are more and the place serves ranges, `pool` fetches them
    ahead, in parallel; else one body is read in order. Either goes on where it broke off. `read` raises RemoteError.
    """

    @classmethod
    def open(cls, place: str, patience: Patience, pool: ThreadPoolExecutor, ask: Open) -> EntryStream | None:
        """The entry behind `ask`; None when there is none. Raises RemoteError."""
        stream = cls(place, patience, pool, ask)
        return stream if stream._begin() else None

    def __init__(self, place: str, patience: Patience, pool: ThreadPoolExecutor, ask: Open) -> None:
        self._place = place
        self._patience = patience
        self._pool = pool
        self._ask = ask
        self._etag: str | None = None
        self._total: int | None = None
        self._body: Body | None = None
        self._read: nar.Read = nar.reader(())
        self._chunks: Generator[bytes] | None = None
        self._left = False

    def __enter__(self) -> EntryStream:
        return self

    def __exit__(self, *_error: object) -> None:
        self._left = True
        if self._chunks is not None:
            self._chunks.close()
        self._close()

    def read(self, size: int, /) -> bytes:
        return self._read(size)

    def _begin(self) -> bool:
        first = bytearray()

        def once() -> bool | None:
            """Whether there is more than the first piece; None: there is no entry."""
            if not self._reopen(len(first), PIECE):
                return None
            assert self._body is not None
            if self._body.partial and self._total is None:
                self._close()
                raise AttemptFailed("does not say how long an entry is", again=False)
            return self._fill(first, 0)

        more = self._patience.attempt(self._place, once)
        if more is None:
            return False
        self._chunks = self._all(bytes(first), more)
        self._read = nar.reader(self._chunks)
        return True

    def _all(self, first: bytes, more: bool) -> Generator[bytes]:
        ranged = self._body is not None and self._body.partial
        if ranged or not more:
            self._close()
        offset = len(first)
        yield first
        del first
        if more:
            yield from self._ahead(offset) if ranged else self._in_order(offset)

    def _in_order(self, offset: int) -> Iterator[bytes]:
        """The rest of the one body that is open."""
        more = True
        while more:
            held = bytearray()

            def once(held: bytearray = held, offset: int = offset) -> bool:
                if self._body is None and not self._reopen(offset + len(held), None):
                    raise AttemptFailed("has lost an entry while it was read", again=False)
                return self._fill(held, offset)

            more = self._patience.attempt(self._place, once)
            offset += len(held)
            yield bytes(held)

    def _fill(self, held: bytearray, offset: int) -> bool:
        """Read from the open body until `held`, which starts at `offset`, is about a piece; whether there is more."""
        assert self._body is not None
        try:
            ended = not self._patience.read_into(held, self._body, PIECE)
            if ended and self._total is not None and offset + len(held) < self._total:
                # The end of a range, or of a connection.
                raise AttemptFailed("breaks off in the middle", again=True)
        except BaseException:
            self._close()
            raise
        return not ended and (self._total is None or offset + len(held) < self._total)

    def _reopen(self, start: int, end: int | None) -> bool:
        """Have `_body` open at exactly `start`; False when there is no entry. Raises AttemptFailed."""
        self._close()
        body = self._opened(start, end)
        if body is None:
            return False
        try:
            self._body = body if body.start == start else starting_at(body, start, self._patience.pieces)
        except BaseException:
            body.close()
            raise
        self._etag, self._total = body.etag or self._etag, self._total if body.total is None else body.total
        return True

    def _close(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None

    def _ahead(self, offset: int) -> Iterator[bytes]:
        """The pieces from `offset` on, several on their way at any time."""
        assert self._total is not None
        starts = iter(range(offset, self._total, PIECE))
        coming: deque[Future[bytes]] = deque()
        try:
            while True:
                for start in itertools.islice(starts, _AHEAD - len(coming)):
                    coming.append(self._pool.submit(self._piece, start, min(start + PIECE, self._total)))
                if not coming:
                    return
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()

    def _piece(self, start: int, end: int) -> bytes:
        held = bytearray()

        def once() -> bytes:
            if self._left:
                raise AttemptFailed("is not read any further", again=False)
            body = self._opened(start + len(held), end)
            if body is None:
                raise AttemptFailed("has lost an entry while it was read", again=False)
            with closing(body):
                if not body.partial:
                    # Reading all that comes before, for every piece, would cost more than it is worth.
                    raise AttemptFailed("sends a whole entry where it has sent parts before", again=True)
                if not self._patience.read_into(held, body, end - start):
                    raise AttemptFailed("breaks off in the middle", again=True)
            with memoryview(held) as view:
                return bytes(view[: end - start])

        return self._patience.attempt(self._place, once)

    def _opened(self, start: int, end: int | None) -> Body | None:
        """A body from `start` on, or from an earlier byte, of the same version as those before it. Raises
        AttemptFailed."""
        body = self._ask(start, end, self._etag)
        if body is not None:
            changed = self._etag is not None and body.etag not in (None, self._etag)
            if changed or (self._total is not None and body.total not in (None, self._total)):
                body.close()
                raise AttemptFailed("has changed an entry while it was read", again=False)
        return body
