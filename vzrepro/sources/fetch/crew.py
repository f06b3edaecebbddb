"""Many downloads at once: the first error stops them all."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from vzrepro.base.errors import Interrupted
from vzrepro.base.model import FileHash
from vzrepro.net import JOBS
from vzrepro.sources.fetch.download import MAX_UNKNOWN_SIZE, download
from vzrepro.sources.fetch.mirroring import DownloadProgress, RetryPolicy, quiet

if TYPE_CHECKING:
    from vzrepro.net.http import Http

_GRACE_SECS = 0.5  # how long an interrupted crew may take to notice


@dataclass(frozen=True, slots=True)
class Download:
    """One file to get: candidate URLs, best first; where to; its hash and, if known, its size in bytes."""

    urls: tuple[str, ...]
    dest: Path
    sha256: FileHash
    size: int | None = None


def download_all(
    items: Sequence[Download],
    *,
    jobs: int = JOBS,
    report: DownloadProgress = quiet,
    max_size: int = MAX_UNKNOWN_SIZE,
    cancel: threading.Event | None = None,
    policy: RetryPolicy | None = None,
    http: Http | None = None,
) -> None:
    """`download` every item, `jobs` at once; `report` gets sums over all of them.

    The first error stops the others, which keep their parts, and is raised. Raises as `download` does; an interrupt
    of the calling thread stops all of them too, and does not wait for a server that is silent.
    """
    _Crew(items, jobs, report, max_size, cancel or threading.Event(), policy, http).run()


@dataclass(slots=True)
class _Crew:
    """The threads of one `download_all`."""

    items: Sequence[Download]
    jobs: int
    report: DownloadProgress
    max_size: int
    cancel: threading.Event
    policy: RetryPolicy | None
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
                    max_size=self.max_size,
                    report=self._reporter(number, done, sizes),
                    cancel=self.stop,
                    policy=self.policy,
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

    def _reporter(self, number: int, done: list[int], sizes: list[int | None]) -> DownloadProgress:
        def report(item_done: int, item_total: int | None) -> None:
            with self.changed:
                done[number] = item_done
                sizes[number] = item_total
                known = [size for size in sizes if size is not None]
                sum_done, sum_total = sum(done), sum(known) if len(known) == len(sizes) else None
            self.report(sum_done, sum_total)

        return report
