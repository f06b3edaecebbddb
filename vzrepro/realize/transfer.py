"""Objects on their way from the store to caches: one, in the background of a build, or many, in the right order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from vzrepro.base import events
from vzrepro.base.errors import Interrupted
from vzrepro.base.model import ObjectInfo, StorePath
from vzrepro.cache.push import Attest, PushOutcome, PushResult
from vzrepro.cache.writer import CacheWriter
from vzrepro.store import LocalStore

_PROGRESS_SECS = 0.1
_MANY = 200  # objects for which a listing of the place is cheaper than two questions about each


@dataclass(frozen=True, slots=True)
class PushSummary:
    """How a push of several objects ended: the objects per outcome, and the bytes that were written."""

    kept: dict[PushOutcome, tuple[StorePath, ...]]
    written_bytes: int


ProvenanceSource = Callable[[ObjectInfo], Attest | None]
"""What is stated of an object that was made here, where anything is."""


def nothing_stated(_info: ObjectInfo) -> None:
    """A `ProvenanceSource` of nobody."""


@dataclass(slots=True)
class Pusher:
    """Pushes valid objects of `store`; setting `stop` ends it with Interrupted. `provenance` gives what is stated of an
    object that was made here, and pushed along with it."""

    store: LocalStore
    report: events.Report
    stop: threading.Event
    provenance: ProvenanceSource = nothing_stated

    def push(self, cache: CacheWriter, target: str, info: ObjectInfo) -> PushResult:
        """Push one object with its derivation and log; `target` is its name for people.

        Raises what `CacheWriter.push` does, and Interrupted.
        """
        path = str(info.path)
        with events.working(self.report, events.Started(target, path, "push", None, info.nar_size)) as work:
            work.nar_size = info.nar_size
            log = self.store.log_path(info.path)
            pushed = cache.push(
                info,
                self.store.location(info.path),
                derivation=None if info.drv_hash is None else self.store.derivation(info.drv_hash),
                log=log if log.is_file() else None,
                attest=self.provenance(info),
                progress=self._progress(target, path),
            )
            work.outcome = pushed.kept.value
        return pushed

    def push_all(self, cache: CacheWriter, infos: Sequence[ObjectInfo], jobs: int) -> PushSummary:
        """Push `infos`, `jobs` at once: the largest first, but nothing before what it refers to.

        So a reader never finds an object whose references are missing. Raises the first failure; what was pushed
        until then stays, and the next push goes on from there.
        """
        kept: dict[PushOutcome, list[StorePath]] = {each: [] for each in PushOutcome}
        written = 0
        listing = cache.surveyed() if len(infos) >= _MANY else nullcontext()
        with ThreadPoolExecutor(jobs, thread_name_prefix="push") as pool, self._stopping(), listing:
            for wave in waves(infos):
                futures = [(info, pool.submit(self._unless_stopped, cache, info)) for info in wave]
                for info, future in futures:
                    pushed = future.result()
                    kept[pushed.kept].append(info.path)
                    written += pushed.written_bytes
        return PushSummary({each: tuple(paths) for each, paths in kept.items()}, written)

    def _unless_stopped(self, cache: CacheWriter, info: ObjectInfo) -> PushResult:
        if self.stop.is_set():
            raise Interrupted(f"interrupted before {info.path.name} was pushed")
        return self.push(cache, info.path.name, info)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Whatever ends the block early also ends what still runs, which the pool waits for."""
        try:
            yield
        except KeyboardInterrupt as error:
            self.stop.set()
            raise Interrupted("interrupted; what was pushed stays, the same command goes on from there") from error
        except BaseException:
            self.stop.set()
            raise

    def _progress(self, target: str, path: str) -> Callable[[int, int | None], None]:
        said = time.monotonic()

        def progress(done: int, total: int | None) -> None:
            nonlocal said
            if self.stop.is_set():
                raise Interrupted("interrupted")
            now = time.monotonic()
            if now - said >= _PROGRESS_SECS:
                said = now
                self.report(events.Progress(target, path, done, total))

        return progress


def waves(infos: Sequence[ObjectInfo]) -> list[list[ObjectInfo]]:
    """The objects in groups, each after all that it refers to (but for itself); the largest of a group first."""
    waiting = {info.path: info for info in infos}
    found: list[list[ObjectInfo]] = []
    while waiting:
        ready = [
            info
            for info in waiting.values()
            if not any(reference in waiting and reference != info.path for reference in info.references)
        ]
        # Objects that refer to each other in a circle come at once: there is no right order for them.
        ready = ready or list(waiting.values())
        for info in ready:
            del waiting[info.path]
        found.append(sorted(ready, key=lambda info: (-info.nar_size, info.path)))
    return found
