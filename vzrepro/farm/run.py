"""A client's side: a run whose builds are ordered. What is between the sources and the targets stays in the cache.

The client brings what derivations pin (local files, downloads) and the derivations themselves; what it has built
itself is never an input of a worker. Of an answer only the signed narinfo counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from vzrepro.base import events
from vzrepro.base.errors import (
    BuildFailed,
    Interrupted,
    NotDeterministic,
    RemoteError,
    TimedOut,
    Untrusted,
    UsageError,
    VzreproError,
)
from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, ObjectInfo, StorePath, canonical_json, store_path
from vzrepro.base.signing import SigningKey
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.reader import MAX_LOG
from vzrepro.cache.writer import CacheWriter
from vzrepro.farm.livelog import LogReader, report_key
from vzrepro.farm.order import MAX_APART, Order, OrderAnswer, worker_name
from vzrepro.farm.workshop import FIXED, given
from vzrepro.realize import schedule
from vzrepro.realize.inventory import Inventory
from vzrepro.realize.realizer import Realizer
from vzrepro.realize.schedule import Gone
from vzrepro.realize.transfer import Pusher
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import Offer, Plan, Step, make_plan

JOBS = 64
"""Orders that a client follows at once, unless it is told otherwise."""


class Watcher(Protocol):
    """Who is told of an order while it is under way; call from one thread at a time."""

    def waits(self, why: str) -> None:
        """Nobody builds it, for this reason."""

    def works(self, worker: str, phase: str) -> None:
        """This worker does something for it."""

    def log(self, stream: str, pieces: int) -> None:
        """So many entries of a live log (`livelog`) are there."""

    def line(self, text: str) -> None:
        """A line of its log."""


class Queue(Protocol):
    """Carries orders to workers."""

    def place(self, order: Order, watcher: Watcher, stop: threading.Event, urgency: float = 1.0) -> OrderAnswer | None:
        """Have it built, and wait; None where nobody answers but by the cache. Of orders that wait, the most urgent one
        (`plan.Step`) is to be taken first. Raises how the build failed; Interrupted when `stop` is set."""

    def farewell(self, orders: Sequence[Order]) -> str | None:
        """What becomes of these orders now that nobody waits for them, and what can be done about it."""

    def close(self) -> None:
        """Nothing more is ordered."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What builders have signed of one node: the `result` that as many have got as must, None until then; how many
    `voters` there are, and the ids of the `keys` that are theirs."""

    result: NarHash | None
    voters: int
    keys: tuple[str, ...]


Count = Callable[[Node], Standing]
"""Counts what is signed of a node. Raises NotDeterministic when two have got different results, RemoteError."""


@dataclass(slots=True)
class FarmRun:
    """A run like the `realizer`'s, but what it would build goes through `queue`; `cache` is the one that clients and
    workers share, `jobs` how many orders are out at once. With a `signer`, orders are signed. With a `count`, several
    builders must have got the same of everything that is built, one after the other."""

    realizer: Realizer
    cache: CacheWriter
    queue: Queue
    signer: SigningKey | None = None
    jobs: int = JOBS
    count: Count | None = None
    _targets: frozenset[StorePath] = frozenset()
    _found: dict[StorePath, ObjectInfo] = field(default_factory=dict)
    _shared: set[StorePath] = field(default_factory=set)
    _ordered: list[Order] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stop(self) -> threading.Event:
        """Ends all that runs here when it is set; not what others build."""
        return self.realizer.stop

    def plan(self, targets: Sequence[Node]) -> Plan:
        """What is to be done; `build` and `image` are done by workers."""
        here = self.realizer.inventory.have([node.path for node in targets])
        here = {node.path: here[node.path] for node in targets if node.path in here and self._is_agreed(node)}
        missing = [node for node in targets if node.path not in here]
        plan = make_plan(self.realizer.graph, missing, _Facts(self, frozenset(node.path for node in missing)))
        have = [Step(node, "have", "it is in the store", here[node.path]) for node in targets if node.path in here]
        planned = {step.node.drv_hash for step in plan.steps}
        return Plan(tuple(targets), (*(step for step in have if step.node.drv_hash not in planned), *plan.steps))

    def realize(self, targets: Sequence[Node]) -> list[ObjectInfo]:
        """As `Realizer.realize`. Interrupted, it says what becomes of what was ordered."""
        self._targets = frozenset(node.path for node in targets)
        try:
            return self.realizer.reach(
                targets, lambda: self.plan(targets), lambda plan: schedule.run(plan, self, self.jobs), None
            )
        except Interrupted as error:
            raise Interrupted(error.message, hint=self.queue.farewell(self._ordered)) from error
        finally:
            self.queue.close()

    # --- for audits

    def supply(self, nodes: Sequence[Node]) -> dict[StorePath, ObjectInfo]:
        """Have all of these in the cache, built by workers where they are not, and nothing of them here but sources;
        what is registered of them."""
        self._targets = frozenset()
        self._found.clear()
        self.realizer.store.sweep()
        self.realizer.store.hold([node.path for node in self.realizer.graph.closure(nodes)])
        while True:
            plan = make_plan(self.realizer.graph, nodes, _Facts(self, self._targets))
            self._found |= {step.node.path: step.info for step in plan.steps if step.info is not None}
            if plan.todo():
                self.realizer.report(schedule.planned(plan, None))
            try:
                schedule.run(plan, self, self.jobs)
            except Gone:
                continue
            return dict(self._found)

    def rebuild(
        self, node: Node, infos: Mapping[StorePath, ObjectInfo], question: str, watcher: Watcher
    ) -> tuple[str, bytes]:
        """Have a node built again as an audit's question says: the worker's name, and what it has signed."""
        inputs = {each.drv_hash: infos[each.path] for each in self.realizer.graph.inputs(node)}
        key = self._offer(node, inputs)
        answer = self._place(Order.of(node, key, question=question), watcher, 1.0)
        report = None if answer is None or answer.report is None else self.kept(node, answer.report)
        if answer is None or report is None:
            raise RemoteError(f"{self.cache.url} has no report of the rebuild of {node.target}")
        return answer.worker, report

    def kept(self, node: Node, sha256: str) -> bytes | None:
        """What a worker has kept of a rebuild."""
        return self.cache.access.read(report_key(node.drv_hash, node.path.name, sha256), MAX_LOG)

    # --- one step

    def perform(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        """Do what one step says (`schedule.StepWork`): what is no target stays in the cache, and is only looked up.

        Raises NotDeterministic for other bytes than several builders have agreed on, where they must.
        """
        info, node = self._performed(step, inputs), step.node
        self._found[node.path] = info
        if self.count is not None and node.drv.builder not in FIXED and info.nar_hash != self.count(node).result:
            raise NotDeterministic(
                f"{node.target} has other bytes than its builders have signed",
                reason=f"it has NAR {info.nar_hash.nix}",
                hint=f"vzrepro challenge {node.target}",
            )
        return info

    def _performed(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        node = step.node
        if step.verb in ("import", "fetch"):
            return self.realizer.perform(step, inputs)
        if step.verb == "substitute" and node.path not in self._targets:
            known = self.cache.reader.query(node.path)
            if known is not None:
                return _as_object(known)
            if node.drv.builder not in FIXED:
                raise Gone
            # Another cache has it: it comes here, and goes to the shared one when a worker needs it.
            return self.realizer.perform(step, {})
        if step.verb != "substitute":
            known = self._order(node, inputs, step.urgency)
            if node.path not in self._targets:
                return _as_object(known)
        return self.realizer.perform(Step(node, "substitute", "a target of the run"), {})

    def push(self, node: Node, info: ObjectInfo) -> None:
        """Nothing: what workers need was pushed before they were asked, and what they build they push."""

    def _is_agreed(self, node: Node) -> bool:
        """Whether as many builders have got the same of it as must; of what a derivation pins, none need."""
        return self.count is None or node.drv.builder in FIXED or self.count(node).result is not None

    def _order(self, node: Node, inputs: Mapping[DrvHash, ObjectInfo], urgency: float) -> NarInfo:
        key = self._offer(node, inputs)
        with following(self.realizer.report, self.cache, node) as display:
            if self.count is None:
                answer = self._place(Order.of(node, key), display, urgency)
            else:
                answer = self._place_with_several(node, key, display, urgency, self.count)
            found = self.cache.reader.ask(node.path)
            if found is None:
                raise RemoteError(
                    f"{node.target} was built, but {self.cache.url} does not have it",
                    reason=None if answer is None else f"{answer.worker} says that it has pushed {answer.path}",
                    hint="clients and workers must have the same cache: compare their push-to and caches",
                )
            if answer is not None and answer.nar_hash != found.nar_hash:
                message = f"{answer.worker} speaks of another {node.target} than the cache has; its word does not count"
                self.realizer.report(events.Notice("warning", message))
            display.done(found.nar_size, answer)
            return found

    def _offer(self, node: Node, inputs: Mapping[DrvHash, ObjectInfo]) -> BuildKey:
        """Have all that a worker needs for this node in the cache; its build key."""
        for each in self.realizer.graph.inputs(node):
            self._share(each, inputs[each.drv_hash])
        self.cache.put_derivation(node.drv_hash, canonical_json(node.drv.document()))
        if self.stop.is_set():
            raise Interrupted(f"interrupted before {node.target} was ordered")
        return node.drv.build_key({drv: inputs[drv].nar_hash for drv in node.drv.dependencies()})

    def _place(self, order: Order, watcher: Watcher, urgency: float) -> OrderAnswer | None:
        if self.signer is not None:
            order = order.signed(self.signer)
        with self._lock:
            self._ordered.append(order)
        answer = self.queue.place(order, watcher, self.stop, urgency)
        with self._lock:
            self._ordered.remove(order)
        return answer

    def _place_with_several(
        self, node: Node, key: BuildKey, display: Display, urgency: float, count: Count
    ) -> OrderAnswer | None:
        """Have it built by one builder after the other until enough have got the same."""
        answer: OrderAnswer | None = None
        standing = count(node)
        while standing.result is None:
            before = standing
            if len(before.keys) > MAX_APART:
                raise UsageError(
                    f"{node.target}: an order cannot leave out more than {MAX_APART} keys",
                    reason=f"{len(before.keys)} are of those that have built it, or of their machines",
                    hint="revoke in the policy those that are out of use",
                )
            order = Order.of(node, key, turn=before.voters + 1, apart_from=before.keys)
            answer = self._place(order, display, urgency)
            display.answered(answer)
            display.goes_on()
            standing = count(node)
            if standing.voters <= before.voters:
                raise Untrusted(
                    f"{node.target} was built, but no builder that counts has signed it in addition",
                    reason=f"{answer.worker if answer else 'whoever built it'} has none of this machine's trusted-keys",
                    hint="name the public keys of all workers in trusted-keys",
                )
        return answer

    def _share(self, node: Node, info: ObjectInfo) -> None:
        """Have what a worker needs for this input in the cache: its derivation and, of what that pins, the object."""
        with self._lock:
            if node.path in self._shared:
                return
        self.cache.put_derivation(node.drv_hash, canonical_json(node.drv.document()))
        if node.drv.builder in FIXED:
            source, needed = given(node), self.realizer.store.query(node.path) is not None
            if source.path != node.path:
                needed = self.cache.reader.query(node.path) is None
                if needed:
                    info = self.realizer.perform(Step(source, "fetch", "a worker unpacks it"), {})
            if needed:
                Pusher(self.realizer.store, self.realizer.report, self.stop).push(self.cache, node.target, info)
        with self._lock:
            self._shared.add(node.path)


@dataclass(frozen=True, slots=True)
class _Facts:
    """What planning may know (`plan.PlanningFacts`): of what was built here, only the targets count."""

    run: FarmRun
    targets: frozenset[StorePath]

    def have(self, paths: Sequence[StorePath]) -> Mapping[StorePath, ObjectInfo]:
        graph = self.run.realizer.graph
        nodes = {path: graph.at(path.base) for path in paths}
        return self.run.realizer.inventory.have([p for p, node in nodes.items() if node and node.drv.builder in FIXED])

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        return self.run.realizer.inventory.origin_known(path, origin)

    def offers(self, nodes: Sequence[Node]) -> Mapping[StorePath, Offer]:
        inventory = self.run.realizer.inventory
        shared = Inventory(inventory.store, [self.run.cache.reader], "all", self.run.stop)
        nodes = [node for node in nodes if self.run._is_agreed(node)]
        here = [node for node in nodes if node.path in self.targets or node.drv.builder in FIXED]
        # What is built must be where workers find it.
        return {**inventory.offers(here), **shared.offers([node for node in nodes if node not in here])}

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        return None

    def expected_secs(self, target: str, verb: str) -> float | None:
        return self.run.realizer.inventory.expected_secs(target, verb)


def _as_object(info: NarInfo) -> ObjectInfo:
    """What the cache has, as if it were here: nothing of it is downloaded."""
    return info.as_object(info.render())


class Display:
    """Shows an order as work like any other (`Watcher`)."""

    def __init__(self, report: events.Report, cache: CacheWriter, target: str, path: StorePath, drv: DrvHash) -> None:
        self._report, self._target, self._path = report, target, str(path)
        self._log = LogReader(cache.access, drv, path.name)
        self._worker = ""
        self._waits = ""
        self._went_on = False
        self._begun = time.monotonic()
        self._lines = 0
        self.failed = False

    def waits(self, why: str) -> None:
        """Nobody builds it; said once for each reason."""
        if why != self._waits:
            self._waits = why
            self._report(events.Notice("info", f"{self._target} waits: {why}"))

    def works(self, worker: str, phase: str) -> None:
        """This worker does; another one than before is told of."""
        try:
            worker_name(worker)
        except UsageError:
            return
        if worker != self._worker:
            if self._worker:
                self._report(events.Notice("warning", f"{self._target} has gone from {self._worker} to {worker}"))
            self._worker, self._waits = worker, ""
            self._report(events.Started(self._target, self._path, "build", worker=worker))
        if phase != "builds":
            self.line(f"({worker} {phase})", counts=False)

    def answered(self, answer: OrderAnswer | None) -> None:
        """A worker is done, perhaps so quickly that nobody has looked meanwhile."""
        if answer is not None and not self._worker:
            self.works(answer.worker, "builds")

    def goes_on(self) -> None:
        """The next worker that does something does not take its predecessor's place."""
        self._worker = self._waits = ""
        self._went_on = True

    def log(self, stream: str, pieces: int) -> None:
        """Show what is new in the live log."""
        for text in self._log.live(stream, pieces):
            self.line(text)

    def line(self, text: str, *, counts: bool = True) -> None:
        """Show a line."""
        self._lines += counts
        self._report(events.LogLine(self._target, self._path, text[:2000]))

    def done(self, nar_size: int | None, answer: OrderAnswer | None) -> None:
        """It is in the cache."""
        outcome = "built" if answer is None else answer.outcome
        if not self._went_on:
            self.answered(answer)
        if outcome == "built" and answer is not None:
            for text in self._log.rest(failed=False):
                self.line(text)
        self._finish(outcome, nar_size)

    def ended(self, outcome: str) -> None:
        """It is not, or nobody knows."""
        if outcome == "failed":
            for text in self._log.rest(failed=True):
                self.line(text)
        self._finish(outcome, None)

    def _finish(self, outcome: str, nar_size: int | None) -> None:
        secs = time.monotonic() - self._begun
        self._report(events.Finished(self._target, self._path, "build", outcome, secs, nar_size))


class Lines:
    """Tells in lines how a rebuild is (`Watcher`)."""

    def __init__(self, say: Callable[[str], None], cache: CacheWriter, node: Node) -> None:
        self._say = say
        self._log = LogReader(cache.access, node.drv_hash, node.path.name)
        self._said = ""

    def waits(self, why: str) -> None:
        """Nobody makes it; said once for each reason."""
        self._once(f"waits: {why}")

    def works(self, worker: str, phase: str) -> None:
        """This worker does."""
        self._once(f"{worker} {phase}")

    def log(self, stream: str, pieces: int) -> None:
        """Show what is new in the live log."""
        for text in self._log.live(stream, pieces):
            self.line(text)

    def line(self, text: str) -> None:
        """Show a line."""
        self._say(text[:2000])

    def _once(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self._say(f"({what[:300]})")


@contextmanager
def following(report: events.Report, cache: CacheWriter, node: Node) -> Iterator[Display]:
    """Show the block as work on a node that is ordered."""
    with _shown(Display(report, cache, node.target, node.path, node.drv_hash)) as display:
        try:
            yield display
        except (BuildFailed, TimedOut) as error:
            raise _with_hint(error, node) from error


@contextmanager
def following_build(report: events.Report, cache: CacheWriter, order: Order) -> Iterator[Display]:
    """Show the block as work on an order of which nothing is known here but that."""
    with _shown(Display(report, cache, order.name, store_path(order.drv, order.name), order.drv)) as display:
        yield display


@contextmanager
def _shown(display: Display) -> Iterator[Display]:
    """Show how the block ends, where it does not end well."""
    try:
        yield display
    except (Interrupted, KeyboardInterrupt):
        display.ended("interrupted")
        raise
    except BaseException:
        display.ended("failed")
        raise


def _with_hint(error: VzreproError, node: Node) -> VzreproError:
    """The error with what can be done about it here, where the recipe has another name than on the worker."""
    hint = (error.hint or "").replace(f"vzrepro shell {node.drv.name}", f"vzrepro shell {node.target}")
    log = f"its whole log: vzrepro log {node.target}"
    return type(error)(error.message, reason=error.reason, hint=f"{hint}\n{log}" if hint else log)
