"""Run a plan's steps in parallel, inputs first and the longest chain foremost: one state machine, one transition
function.

Every step is in one `StepState`, and `Schedule.move` is the only place that changes it. A schedule knows no threads and
no clock, so that `run` acts on it, `expected_secs` counts with it, and `bench/schedule` replays recorded times with it.
What a step does is not known here.
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import itertools
import queue
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from vzrepro.base.errors import Interrupted
from vzrepro.base.events import Planned
from vzrepro.base.model import DrvHash, ObjectInfo
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import MADE, Plan, Step

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
    """The state machine of one plan: which steps wait, run, are done or failed. `jobs` builds run at once.

    Of what could begin, the most urgent step does; of equal ones, the first of the plan.
    """

    def __init__(self, plan: Plan, jobs: int) -> None:
        self._steps = {step.node.drv_hash: step for step in plan.steps}
        self._state = {
            drv: StepState.DONE if step.verb == "have" else StepState.WAITING for drv, step in self._steps.items()
        }
        self._needs = {drv: self._missing(step) for drv, step in self._steps.items()}
        self._needed_by: dict[DrvHash, list[DrvHash]] = {}
        for drv, needs in self._needs.items():
            for need in needs:
                self._needed_by.setdefault(need, []).append(drv)
        todo = enumerate(plan.todo())
        self._turn = {step.node.drv_hash: (-step.urgency, place) for place, step in todo}
        # By whether it is made: how many may run, how many more may, and the heap of those that could.
        self._places = {True: jobs, False: _TRANSFERS}
        self._free = dict(self._places)
        self._ready: dict[bool, list[tuple[tuple[float, int], DrvHash]]] = {True: [], False: []}
        self._failed = False
        for drv in self._turn:
            self._queue(drv)

    def _missing(self, step: Step) -> set[DrvHash]:
        """The inputs that must be done first: only what is made from inputs waits for them."""
        if step.verb not in MADE:
            return set()
        return {drv for drv in step.node.drv.dependencies() if self._state[drv] is not StepState.DONE}

    def _queue(self, drv: DrvHash) -> None:
        if not self._needs[drv]:
            heapq.heappush(self._ready[self._steps[drv].verb in MADE], (self._turn[drv], drv))

    @property
    def running(self) -> bool:
        """Whether any step is."""
        return self._free != self._places

    def begin(self) -> list[Step]:
        """The steps that run from here on, in the order of their turns: as many as there are places for. After a
        failure none does."""
        begun = []
        for made, ready in self._ready.items():
            while ready and self._free[made] and not self._failed:
                _, drv = heapq.heappop(ready)
                self.move(drv, StepState.RUNNING)
                begun.append(self._steps[drv])
        return begun

    def move(self, drv: DrvHash, to: StepState) -> None:
        """The one transition function: WAITING → RUNNING → DONE or FAILED."""
        self._state[drv] = to
        self._free[self._steps[drv].verb in MADE] += -1 if to is StepState.RUNNING else 1
        if to is StepState.FAILED:
            self._failed = True
        if to is StepState.DONE:
            for waiting in self._needed_by.get(drv, ()):
                self._needs[waiting].discard(drv)
                self._queue(waiting)


def expected_secs(plan: Plan, jobs: int) -> float | None:
    """How long a plan takes with `jobs` builds at once, when the time of every build and image is known; else None."""
    if any(step.expected_secs is None for step in plan.todo() if step.verb in MADE):
        return None
    schedule = Schedule(plan, jobs)
    now = 0.0
    count = itertools.count()
    running: list[tuple[float, int, DrvHash]] = []
    while True:
        for step in schedule.begin():
            heapq.heappush(running, (now + (step.expected_secs or 0.0), next(count), step.node.drv_hash))
        if not running:
            return now or None
        now, _, drv = heapq.heappop(running)
        schedule.move(drv, StepState.DONE)


def planned(plan: Plan, jobs: int | None) -> Planned:
    """What is told of a plan before it is run with `jobs` builds at once, None where nobody knows how many."""
    expected = None if jobs is None else expected_secs(plan, jobs)
    return Planned(plan.actions(), plan.download_bytes() or None, expected)


def run(plan: Plan, work: StepWork, jobs: int) -> None:
    """Do a plan's steps until none can begin or is running; raise the first failure. `jobs` builds run at once."""
    schedule = Schedule(plan, jobs)
    ended: queue.SimpleQueue[tuple[Step, Future[ObjectInfo]]] = queue.SimpleQueue()
    infos = {step.node.drv_hash: step.info for step in plan.steps if step.verb == "have" and step.info}
    errors: list[BaseException] = []
    with (
        ThreadPoolExecutor(jobs) as builds,
        ThreadPoolExecutor(_TRANSFERS) as transfers,
        ThreadPoolExecutor(_PUSHES) as pushes,
    ):

        def begin(step: Step) -> None:
            inputs = {dep: infos[dep] for dep in step.node.drv.dependencies() if dep in infos}
            pool = builds if step.verb in MADE else transfers
            future = pool.submit(work.perform, step, inputs)
            future.add_done_callback(lambda done: ended.put((step, done)))

        try:
            while True:
                for step in schedule.begin():
                    begin(step)
                if not schedule.running:
                    break
                step, future = take(ended)
                drv = step.node.drv_hash
                if (error := future.exception()) is not None:
                    errors.append(error)
                    schedule.move(drv, StepState.FAILED)
                    continue
                infos[drv] = future.result()
                schedule.move(drv, StepState.DONE)
                if step.verb not in ("substitute", "import"):
                    pushes.submit(work.push, step.node, infos[drv])
        except KeyboardInterrupt as error:
            # Leaving the pools waits for what runs, and that ends soon: containers and downloads watch `stop`.
            work.stop.set()
            raise Interrupted("interrupted; what was finished is kept in the store") from error
    if errors:
        # An interrupt of a step tells less than the failure that caused it.
        raise min(errors, key=lambda error: isinstance(error, Interrupted | Gone))
