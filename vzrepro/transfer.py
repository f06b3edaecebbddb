"""Objects on their way from the store to caches: one, in the background of a build, or many, in the right order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from vzrepro import events
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.push import Attest, Kept, Pushed
from vzrepro.errors import Interrupted
from vzrepro.model import ObjectInfo, Outcome, StorePath
from vzrepro.store import LocalStore

_PROGRESS_SECS = 0.1
_MANY = 200  # objects for which a listing of the place is cheaper than two questions about each


@dataclass(frozen=True, slots=True)
class PushSummary:
    """How a push of several objects ended: the objects per outcome, and the bytes that were written."""

    kept: dict[Kept, tuple[StorePath, ...]]
    written_bytes: int


def _nothing(_info: ObjectInfo) -> None:
    return


@dataclass(slots=True)
class Pusher:
    """Pushes valid objects of `store`; setting `stop` ends it with Interrupted. `provenance` gives what is stated of an
    object that was made here, and pushed along with it."""

    store: LocalStore
    report: events.Report
    stop: threading.Event
    provenance: Callable[[ObjectInfo], Attest | None] = _nothing

    def push(self, cache: BinaryCache, target: str, info: ObjectInfo) -> Pushed:
        """Push one object with its derivation and log; `target` is its name for people.

        Raises what `BinaryCache.push` does, and Interrupted.
        """
        begun = time.monotonic()
        path = str(info.path)
        self.report(events.Started(target, path, "push", None, info.nar_size))
        outcome = "failed"
        try:
            log = self.store.log_path(info.path)
            pushed = cache.push(
                info,
                self.store.location(info.path),
                derivation=None if info.drv_hash is None else self.store.derivation(info.drv_hash),
                log=log if log.is_file() else None,
                attest=self.provenance(info),
                progress=self._progress(target, path),
            )
            outcome = pushed.kept.value
        except (Interrupted, KeyboardInterrupt):
            outcome = Outcome.INTERRUPTED.value
            raise
        finally:
            secs = time.monotonic() - begun
            self.report(events.Finished(target, path, "push", outcome, secs, info.nar_size))
        return pushed

    def push_all(self, cache: BinaryCache, infos: Sequence[ObjectInfo], jobs: int) -> PushSummary:
        """Push `infos`, `jobs` at once: the largest first, but nothing before what it refers to.

        So a reader never finds an object whose references are missing. Raises the first failure; what was pushed
        until then stays, and the next push goes on from there.
        """
        kept: dict[Kept, list[StorePath]] = {each: [] for each in Kept}
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

    def _unless_stopped(self, cache: BinaryCache, info: ObjectInfo) -> Pushed:
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
