"""One file from several mirrors: the next at once, the same one after a pause, until it is whole or all have failed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vzrepro.base.errors import Interrupted
from vzrepro.net import AttemptFailed, Body, open_file
from vzrepro.net.engine import MIN_SPEED, Backoff, Pace, persist
from vzrepro.sources.fetch.part import Sink

if TYPE_CHECKING:
    from vzrepro.net.http import Http

DownloadProgress = Callable[[int, int | None], None]
"""Called with bytes that are there and bytes in all (None: not known); from any thread, also with fewer than before
when a download starts over."""


_RAISE = "allow more, if this is what you want: export VZREPRO_DOWNLOAD_GIB=…, or download-gib in [tool.vzrepro]"


def quiet(_done: int, _total: int | None) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
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
    min_speed: int = MIN_SPEED
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] | None = None
    jitter: Callable[[float, float], float] = random.uniform


@dataclass(slots=True)
class Mirror:
    """What became of one candidate URL so far."""

    url: str
    tries: int = 0
    etag: str | None = None
    failure: AttemptFailed | None = None
    alive: bool = True


class Transfer:
    """Has a sink filled from the first of `urls` that can. It is the `engine.AttemptPolicy` of that: an attempt is a
    round over all mirrors that may still have the file.

    `size` is the file's in bytes, if known, and `cap` how many bytes are taken in any case; `accept` names the media
    types that servers are asked for.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sink: Sink,
        *,
        size: int | None,
        cap: int,
        report: DownloadProgress,
        cancel: threading.Event,
        policy: RetryPolicy,
        http: Http,
        accept: str | None = None,
    ) -> None:
        self.backoff = Backoff(policy.backoff_secs, policy.backoff_max_secs, policy.jitter)
        self._mirrors = [Mirror(url) for url in dict.fromkeys(urls)]
        self._sink = sink
        self._size = size
        self._cap = cap
        self._report = report
        self._cancel = cancel
        self._policy = policy
        self._http = http
        self._accept = accept
        self._pace = Pace(policy.slow_secs, policy.clock, policy.min_speed)
        self._deadline = policy.clock() + policy.total_secs + (size or 0) / policy.min_speed

    def run(self) -> list[Mirror] | None:
        """None when the sink has what was asked for, else every mirror with its failure. Raises Interrupted."""
        try:
            persist(self, self._round)
        except AttemptFailed:
            return self._mirrors
        return None

    # --- what the engine asks -----------------------------------------------------------------------------------------

    def begin(self) -> float:
        """See `AttemptPolicy.begin`."""
        self._check_cancel()
        return self._policy.clock()

    def grants(self, failure: AttemptFailed, begun: float, pause: float) -> bool:
        """See `AttemptPolicy.grants`."""
        return failure.again and self._policy.clock() + pause < self._deadline

    def sleep(self, secs: float) -> None:
        """See `AttemptPolicy.sleep`."""
        (self._policy.sleep or self._cancel.wait)(secs)

    def succeed(self) -> None:
        """See `AttemptPolicy.succeed`."""

    # --- attempts -----------------------------------------------------------------------------------------------------

    def _round(self) -> None:
        """Ask each mirror that is not given up, until one has filled the sink. Raises AttemptFailed when none has."""
        after, advanced = 0.0, False
        for mirror in self._mirrors:
            if not mirror.alive:
                continue
            before = self._sink.size
            try:
                self._once_or_afresh(mirror)
            except AttemptFailed as failure:
                mirror.failure = failure
                if self._sink.size > before:
                    mirror.tries, advanced = 0, True
                mirror.tries += 1
                mirror.alive = failure.again and mirror.tries < self._policy.tries
                after = max(after, failure.after) if mirror.alive else after
            else:
                return
        again = any(mirror.alive for mirror in self._mirrors)
        raise AttemptFailed("is nowhere", again=again, after=after, advanced=advanced)

    def _once_or_afresh(self, mirror: Mirror) -> None:
        """One attempt; if what was there before it may be to blame for its failure, one more from the first byte."""
        resumed = self._sink.size > 0
        try:
            self._once(mirror)
        except AttemptFailed as failure:
            if not failure.stale:
                raise
            self._sink.restart()
            if not resumed:
                raise
            try:
                self._once(mirror)
            except AttemptFailed as second:
                if second.stale:
                    self._sink.restart()
                raise

    def _once(self, mirror: Mirror) -> None:
        self._check_cancel()
        sink = self._sink
        if not sink.resumes:
            sink.restart()
        if self._size is not None and sink.size == self._size and sink.size:
            sink.verify()
            return
        if mirror.url.startswith("file:"):
            body = open_file(mirror.url, sink.size)
        else:
            policy = self._policy
            body = self._http.open(
                mirror.url, sink.size, mirror.etag, policy.connect_secs, policy.read_secs, accept=self._accept
            )
        with closing(body):
            mirror.etag = body.etag
            if self._size is not None and body.total is not None and body.total != self._size:
                raise AttemptFailed(
                    f"has {body.total} bytes instead of {self._size}", again=False, found=f"{body.total} bytes"
                )
            if body.start != sink.size:
                sink.restart()
            self._copy(body)
        if self._size is not None and sink.size < self._size:
            raise AttemptFailed(f"ends after {sink.size} of {self._size} bytes", again=True)
        sink.verify()

    def _copy(self, body: Body) -> None:
        sink = self._sink
        total = self._size if self._size is not None else body.total
        self._report(sink.size, total)
        for piece in self._pace.pieces(body, self._check):
            if sink.size + len(piece) > self._cap:
                found = None if self._size is None else "more"
                hint = None if self._size is not None else _RAISE
                raise AttemptFailed(f"has more than {self._cap} bytes", again=False, stale=True, found=found, hint=hint)
            sink.write(piece)
            self._report(sink.size, total)

    def _check(self) -> None:
        self._check_cancel()
        if self._policy.clock() > self._deadline:
            raise AttemptFailed("takes too long", again=False)

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise Interrupted("the download was stopped", hint="run the same command again: it goes on where it was")
