"""Run a plan's steps in parallel, inputs first: one state machine, one transition function.

Every step is in one `StepState`, and `Schedule.move` is the only place that changes it. What a step does is not known
here.
"""

from __future__ import annotations

import contextlib
import enum
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from vzrepro.base.errors import Interrupted
from vzrepro.base.model import DrvHash, ObjectInfo
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import Plan, Step

_TRANSFERS = 8
"""Downloads and substitutions that run at once, besides builds."""
_PUSHES = 4
_BLIND_SECS = 0.5

T = TypeVar("T")


def take(ended: queue.SimpleQueue[T]) -> T:
    """Wait for the next one of what ends. The kernel may give Ctrl-C to another thread than the main one, and Python
    acts on it in the main one, which does not see it while it waits: so it waits for a moment at a time."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=_BLIND_SECS)


class Gone(Exception):
    """A cache did not give what it had offered, or an object is not what it was: plan again without it."""


class StepWork(Protocol):
    """What is done for a step, in whatever thread; setting `stop` ends what runs."""

    @property
    def stop(self) -> threading.Event: ...

    def perform(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        """Do what the step says and return the valid object. Raises VzreproError, or Gone."""

    def push(self, node: Node, info: ObjectInfo) -> None:
        """Share a new object, in the background. Never raises."""


class StepState(enum.Enum):
    """Where a step stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Schedule:
    """The state machine of one plan: which steps wait, run, are done or failed. `jobs` builds run at once."""

    def __init__(self, plan: Plan, work: StepWork, jobs: int) -> None:
        self._work = work
        self._jobs = jobs
        self._steps = {step.node.drv_hash: step for step in plan.steps}
        self._state = {
            drv: StepState.DONE if step.verb == "have" else StepState.WAITING for drv, step in self._steps.items()
        }
        self._infos = {drv: step.info for drv, step in self._steps.items() if step.verb == "have" and step.info}
        self._needs = {drv: self._missing(step) for drv, step in self._steps.items()}
        self._needed_by: dict[DrvHash, list[DrvHash]] = {}
        for drv, needs in self._needs.items():
            for need in needs:
                self._needed_by.setdefault(need, []).append(drv)
        self._ended: queue.SimpleQueue[tuple[DrvHash, Future[ObjectInfo]]] = queue.SimpleQueue()
        self._futures: dict[DrvHash, Future[ObjectInfo]] = {}
        self._errors: list[BaseException] = []
        self._running = 0

    def _missing(self, step: Step) -> set[DrvHash]:
        """The inputs that must be done first: only what is made from inputs waits for them."""
        if step.verb not in ("build", "image"):
            return set()
        return {drv for drv in step.node.drv.dependencies() if self._state[drv] is not StepState.DONE}

    def run(self) -> None:
        """Run until no step can start or is running; raise the first failure."""
        with (
            ThreadPoolExecutor(self._jobs) as builds,
            ThreadPoolExecutor(_TRANSFERS) as transfers,
            ThreadPoolExecutor(_PUSHES) as pushes,
        ):
            self._pools = (builds, transfers, pushes)
            try:
                for drv in [drv for drv, state in self._state.items() if state is StepState.WAITING]:
                    if not self._needs[drv]:
                        self.move(drv, StepState.RUNNING)
                while self._running:
                    drv, future = take(self._ended)
                    if future.cancelled():
                        self.move(drv, StepState.WAITING)
                    elif (error := future.exception()) is not None:
                        self._errors.append(error)
                        self.move(drv, StepState.FAILED)
                    else:
                        self._infos[drv] = future.result()
                        self.move(drv, StepState.DONE)
            except KeyboardInterrupt as error:
                # Leaving the pools waits for what runs, and that ends soon: containers and downloads watch `stop`.
                self._work.stop.set()
                self._cancel_queued()
                raise Interrupted("interrupted; what was finished is kept in the store") from error
        if self._errors:
            # An interrupt of a step tells less than the failure that caused it.
            raise min(self._errors, key=lambda error: isinstance(error, Interrupted | Gone))

    def _cancel_queued(self) -> None:
        """What a pool has not begun goes back to WAITING, for good: nothing is started after a failure."""
        for future in self._futures.values():
            future.cancel()

    def move(self, drv: DrvHash, to: StepState) -> None:
        """The one transition function: WAITING → RUNNING → DONE or FAILED (or WAITING, cancelled before it began)."""
        builds, transfers, pushes = self._pools
        step = self._steps[drv]
        self._state[drv] = to
        if to is StepState.RUNNING:
            self._running += 1
            pool = builds if step.verb in ("build", "image") else transfers
            inputs = {dep: self._infos[dep] for dep in step.node.drv.dependencies() if dep in self._infos}
            future = pool.submit(self._work.perform, step, inputs)
            self._futures[drv] = future
            future.add_done_callback(lambda done: self._ended.put((drv, done)))
            return
        self._running -= 1
        if to is StepState.FAILED:
            self._cancel_queued()
        if to is StepState.DONE:
            if step.verb not in ("substitute", "import"):
                pushes.submit(self._work.push, step.node, self._infos[drv])
            if not self._errors:
                for waiting in self._needed_by.get(drv, ()):
                    self._needs[waiting].discard(drv)
                    if not self._needs[waiting] and self._state[waiting] is StepState.WAITING:
                        self.move(waiting, StepState.RUNNING)
