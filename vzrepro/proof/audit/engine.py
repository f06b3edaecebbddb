"""An audit from start to end: which rebuilds to make, all of them under one core budget, and the report of them.

`blame` says what a node still needs, `rebuild` makes it, `records` keeps it; here it is decided when. As many rebuilds
run at once as `realize` would run builds, the longest first, and what an earlier audit by the same key has found for
the same node, inputs and axis is not made again.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vzrepro.base import events
from vzrepro.base.errors import Interrupted, VzreproError
from vzrepro.base.model import BuildKey, ObjectInfo, StorePath
from vzrepro.proof.audit import blame
from vzrepro.proof.audit.axes import Axis
from vzrepro.proof.audit.blame import AxisPlan, Case, Ending, Experiment, Judgement
from vzrepro.proof.audit.model import Verdict
from vzrepro.proof.audit.observed import Observed
from vzrepro.proof.audit.rebuild import Compare
from vzrepro.proof.audit.records import RebuildRequest, Record, Records, expected_secs
from vzrepro.realize.realizer import Realizer
from vzrepro.realize.schedule import take
from vzrepro.recipe.graph import Node

_APART_SECS = 2.0
"""The same experiment is begun again only after this time, so that two time stamps in seconds are two."""

_UNKNOWN_SECS = 60.0  # what a rebuild is taken to last, to order them, when nothing is known
_LONG_SECS = 60.0
_PATIENCE, _MORE_PATIENCE = 5, 12  # of builds that are long, and that are not: see blame.Case

_EXPLAINED = 8  # differences of one node that are looked into

Explain = Callable[[Path, Path, Path, Mapping[str, tuple[str, str]]], str | None]
"""Compare the registered with the rebuilt output, with a directory for work, and what was seen without and with each
axis: keeps an explanation, returns its id."""

Sign = Callable[["AuditSubject", Record], str | None]
"""Sign a rebuild's statement, and keep and share it: returns its sha256."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be audited and how. `rounds` is how many values each axis gets."""

    targets: tuple[Node, ...]
    axes: tuple[Axis, ...]
    quick: bool = False
    deep: bool = False
    rounds: int = 1
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("there is no audit without a round")


@dataclass(slots=True)
class AuditSubject:
    """One node under audit: what is registered, what is asked of it, and the rebuilds there are so far.

    `earlier` is all that earlier audits, by whomever, have kept; `reused` are those of `records` that come from there.
    """

    node: Node
    info: ObjectInfo
    key: BuildKey
    case: Case
    expected_secs: float | None
    earlier: tuple[Record, ...]
    records: dict[Experiment, Record] = field(default_factory=dict)
    reused: set[Experiment] = field(default_factory=set)
    under_way: set[Experiment] = field(default_factory=set)
    judgement: Judgement | None = None
    explained: int = 0

    @property
    def without(self) -> Record | None:
        """The record that tells what the sandbox is like with nothing varied."""
        return self.records.get(blame.LOOK)


@dataclass(frozen=True, slots=True)
class AuditOutcome:
    """What an audit came to. `error` is what ended it early, if something did; all that was found until then counts.
    `infos` are what was audited and its inputs, as they are registered."""

    subjects: tuple[AuditSubject, ...]
    error: VzreproError | None
    infos: Mapping[StorePath, ObjectInfo] = field(default_factory=dict)


class Rebuilds(Protocol):
    """Who makes the rebuilds: this machine (`rebuild.Rebuilder`), or others (`afar.RemoteRebuilds`)."""

    @property
    def realizer(self) -> Realizer:
        """The graph, the store and who is told of what happens."""

    @property
    def axes(self) -> Mapping[str, Axis]:
        """All there are, by name."""

    @property
    def jobs(self) -> int:
        """How many rebuilds run at once."""

    @property
    def tools(self) -> str:
        """Names what looks; of looks by another name none is taken over."""

    def prepare(self, nodes: Sequence[Node]) -> Mapping[StorePath, ObjectInfo]:
        """Have these nodes and what they are made from where rebuilds find them; what is registered of all of them."""

    def excuse(self, axis: Axis, node: Node) -> str | None:
        """Why the node cannot have the axis; None when it can, as far as is known before anybody has looked."""

    def verify(self, node: Node, infos: Sequence[ObjectInfo]) -> None:
        """Before the node is blamed: these objects are what is registered. Raises HashMismatch."""

    def build(
        self,
        node: Node,
        asked: RebuildRequest,
        *,
        say: Callable[[str], None],
        keep_log: Callable[[str, Path], None],
        compare: Compare,
    ) -> Record:
        """Make a rebuild (`Rebuilder.build`); with a `statement` it is signed already."""


@dataclass(slots=True)
class Audit:
    """One run. `builder` is the id of the key that signs, `others` those of further keys whose rebuilds count as well;
    `explain` and `sign` are called in worker threads."""

    request: Request
    rebuilds: Rebuilds
    records: Records
    builder: str
    explain: Explain
    sign: Sign
    others: frozenset[str] = frozenset()
    _ended: queue.SimpleQueue[tuple[AuditSubject, Experiment, Future[Record]]] = field(
        default_factory=queue.SimpleQueue
    )
    _waiting: list[tuple[float, int, AuditSubject, Experiment]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _running: int = 0
    _next_start: dict[tuple[StorePath, Experiment], float] = field(default_factory=dict)
    _infos: Mapping[StorePath, ObjectInfo] = field(default_factory=dict)

    def run(self) -> AuditOutcome:
        """Realize what is needed, then audit. Raises VzreproError for what keeps it from beginning."""
        realizer = self.rebuilds.realizer
        audited = self._audited()
        self._infos = self.rebuilds.prepare(audited)
        subjects = [self._subject(node) for node in audited]
        for subject in subjects:
            self._remember(subject)
        self._announce(subjects)
        errors: list[BaseException] = []
        with ThreadPoolExecutor(self.rebuilds.jobs, thread_name_prefix="audit") as pool:
            try:
                for subject in subjects:
                    self._advance(subject)
                while self._running or self._waiting:
                    while self._waiting and self._running < self.rebuilds.jobs and not errors:
                        self._start(pool)
                    if not self._running:
                        break
                    self._take(errors)
            except BaseException as error:
                realizer.stop.set()  # leaving the pool waits for what runs, and that ends soon
                if not isinstance(error, KeyboardInterrupt):
                    raise
                errors.append(Interrupted("interrupted; what was found until then is kept"))
                errors[-1].__cause__ = error
        while not self._ended.empty():  # what had ended before it could be interrupted
            self._take(errors)
        return AuditOutcome(tuple(subjects), _worst(errors), self._infos)

    def _take(self, errors: list[BaseException]) -> None:
        """Wait for a rebuild to end, and go on from what came of it."""
        subject, experiment, future = take(self._ended)
        self._running -= 1
        subject.under_way.discard(experiment)
        error = future.exception()
        if error is not None:
            errors.append(error)
            return
        subject.records[experiment] = future.result()
        if experiment == blame.LOOK:
            self._excuse(subject)
            self._doubt(subject)
        self._advance(subject)

    # --- before ---------------------------------------------------------------------------------------------------

    def _audited(self) -> list[Node]:
        """The nodes that are rebuilt, inputs before what needs them."""
        kinds = ("sandbox", "image", "fetch") if self.request.deep else ("sandbox",)
        closure = self.rebuilds.realizer.graph.closure(self.request.targets)
        return [node for node in closure if node.drv.builder in kinds]

    def _subject(self, node: Node) -> AuditSubject:
        realizer = self.rebuilds.realizer
        needed = realizer.graph.inputs(node)
        infos = self._infos
        inputs = {each.drv_hash: infos[each.path].nar_hash for each in needed}
        earlier = tuple(self.records.rebuilds(node.drv_hash.hex))
        expected = expected_secs(earlier)
        if expected is None:
            verb = {"sandbox": "build", "image": "image"}.get(node.drv.builder, "fetch")
            expected = realizer.inventory.expected_secs(node.target, verb)
        plans = tuple(self._plan(axis, node) for axis in self.request.axes) if node.drv.builder == "sandbox" else ()
        key = node.drv.build_key(inputs)
        case = Case(
            infos[node.path].nar_hash.hex,
            plans,
            self._proof,
            self.request.quick and node.drv.builder == "sandbox",
            self.request.rounds if node.drv.builder == "sandbox" else 1,
            _PATIENCE if expected is None or expected > _LONG_SECS else _MORE_PATIENCE,
            infos[node.path].build_key not in (None, key),
        )
        return AuditSubject(node, infos[node.path], key, case, expected, earlier)

    def _plan(self, axis: Axis, node: Node) -> AxisPlan:
        return AxisPlan(
            axis.name,
            excuse=self.rebuilds.excuse(axis, node),
            held=node.constant.get(axis.name),
            varies=axis.vary is not None,
            holds=axis.hold is not None,
        )

    def _proof(self, name: str, without: Observed, seen: Observed) -> str | None:
        axis = self.rebuilds.axes[name]
        if axis.took_effect(without, seen):
            return None
        before, after = axis.seen(without), axis.seen(seen)
        return f"{axis.proof}: {before} without, {after} with it"

    def _remember(self, subject: AuditSubject) -> None:
        """Take over what is known from earlier audits."""
        if self.request.fresh:
            return
        for record in subject.earlier:
            experiment = record.asked.experiment
            if self._current(subject, record) and record.ending is not Ending.LOST:
                subject.records[experiment] = record
                subject.reused.add(experiment)
        self._doubt(subject)

    def _excuse(self, subject: AuditSubject) -> None:
        """Leave out the axes that, as was seen on another machine, cannot be had there."""
        look = subject.records[blame.LOOK]
        if look.excuses:
            plans = [replace(plan, excuse=plan.excuse or look.excuses.get(plan.name)) for plan in subject.case.axes]
            subject.case = replace(subject.case, axes=tuple(plans))

    def _doubt(self, subject: AuditSubject) -> None:
        """Have what is known of an axis made again if other tools did not see it take effect: these may."""
        look = subject.records.get(blame.LOOK)
        if look is None or look.observed is None:
            return
        for experiment in list(subject.reused):
            record = subject.records[experiment]
            if (
                not experiment.builds
                or len(experiment.axes) != 1
                or record.tools == look.tools
                or verdict_of(record) is not Verdict.REPRODUCED
            ):
                continue
            if self._proof(experiment.axes[0], look.observed, record.observed or {}) is not None:
                del subject.records[experiment]
                subject.reused.discard(experiment)

    def _current(self, subject: AuditSubject, record: Record) -> bool:
        builder = record.asked.builder
        try:
            asked = self._asked(subject, record.asked.experiment)
            return record.asked == (replace(asked, builder=builder) if builder in self.others else asked)
        except KeyError:  # of an axis that is no more
            return False

    def _asked(self, subject: AuditSubject, experiment: Experiment) -> RebuildRequest:
        versions = {name: axis.version for name, axis in self.rebuilds.axes.items()}
        return RebuildRequest(
            drv_hash=subject.node.drv_hash.hex,
            build_key=subject.key.hex,
            registered=subject.info.nar_hash.hex,
            builder=self.builder,
            axes={name: versions[name] for name in experiment.axes},
            held={name: versions[name] for name in experiment.held},
            round=experiment.round,
            attempt=experiment.attempt,
            builds=experiment.builds,
            tools="" if experiment.builds else self.rebuilds.tools,
        )

    def _announce(self, subjects: Sequence[AuditSubject]) -> None:
        count, secs = 0, 0.0
        for subject in subjects:
            missing = sum(experiment not in subject.records for experiment in blame.first_experiments(subject.case))
            count += missing
            secs += missing * (subject.expected_secs or 0.0)
        at_once = max(1, min(count, self.rebuilds.jobs))
        known = all(subject.expected_secs is not None for subject in subjects)
        report = self.rebuilds.realizer.report
        if subjects and not count:
            report(events.Notice("info", "every rebuild is known from earlier audits; --fresh makes them again"))
            return
        report(events.Planned({"audit": count}, None, secs / at_once if known and secs else None))

    # --- while it runs --------------------------------------------------------------------------------------------

    def _advance(self, subject: AuditSubject) -> None:
        """Judge the node, or have what that needs made."""
        done = {experiment: record.result for experiment, record in subject.records.items()}
        answer = blame.judge(subject.case, done)
        if isinstance(answer, Judgement):
            subject.judgement = answer
            return
        for experiment in answer:
            if experiment not in subject.under_way:
                subject.under_way.add(experiment)
                expected = _UNKNOWN_SECS if subject.expected_secs is None else subject.expected_secs
                heapq.heappush(self._waiting, (-expected, next(self._count), subject, experiment))

    def _start(self, pool: ThreadPoolExecutor) -> None:
        _, _, subject, experiment = heapq.heappop(self._waiting)
        same = (subject.node.path, replace(experiment, attempt=0))
        start = max(time.monotonic(), self._next_start.get(same, 0.0))
        self._next_start[same] = start + _APART_SECS
        self._running += 1
        future = pool.submit(self._make, subject, experiment, start)
        future.add_done_callback(lambda done: self._ended.put((subject, experiment, done)))

    def _make(self, subject: AuditSubject, experiment: Experiment, start: float) -> Record:
        """One rebuild, in a worker thread: made, signed, kept."""
        realizer = self.rebuilds.realizer
        realizer.stop.wait(start - time.monotonic())
        if realizer.stop.is_set():
            raise Interrupted(f"interrupted before {subject.node.target} was rebuilt")
        node = subject.node
        path = f"{node.path}#{experiment.label}"
        expected = subject.expected_secs if experiment.builds else None
        with events.working(realizer.report, events.Started(node.target, path, "audit", expected)) as work:
            record = self._rebuilt(subject, experiment, path)
            work.outcome, work.nar_size = self._outcome(record), record.nar_size
        return record

    def _rebuilt(self, subject: AuditSubject, experiment: Experiment, path: str) -> Record:
        asked = self._asked(subject, experiment)
        node = subject.node

        def compare(tree: Path, scratch: Path, seen: Observed | None, without: Observed | None) -> str | None:
            self._verify(subject)
            if experiment.attempt or experiment.held or subject.explained >= _EXPLAINED:
                return None
            subject.explained += 1
            pairs = observed(experiment.axes, without or seen_in(subject.without), seen, self.rebuilds.axes)
            return self.explain(self.rebuilds.realizer.store.location(node.path), tree, scratch, pairs)

        record = self.rebuilds.build(
            node,
            asked,
            say=lambda line: self.rebuilds.realizer.report(events.LogLine(node.target, path, line)),
            keep_log=self.records.keep_log,
            compare=compare,
        )
        if record.ending is Ending.FAILED:
            self._verify(subject)
        if asked.builds and record.statement is None:
            record = replace(record, statement=self.sign(subject, record))
        self.records.save(record)
        return record

    def _verify(self, subject: AuditSubject) -> None:
        """Before the node is blamed: its inputs and its output are what is registered. Raises HashMismatch."""
        paths = [*(each.path for each in self.rebuilds.realizer.graph.inputs(subject.node)), subject.info.path]
        self.rebuilds.verify(subject.node, [self._infos[path] for path in paths])

    @staticmethod
    def _outcome(record: Record) -> str:
        return "seen" if not record.asked.builds else verdict_of(record).value


def verdict_of(record: Record) -> Verdict:
    """What one rebuild shows, compared with the registered output."""
    match record.ending:
        case Ending.BUILT:
            return Verdict.REPRODUCED if record.nar_hash == record.asked.registered else Verdict.DIFFERS
        case Ending.FAILED:
            return Verdict.BUILD_FAILED
    return Verdict.INCONCLUSIVE


def seen_in(record: Record | None) -> Observed | None:
    """What a rebuild, or a look, has seen; None without one."""
    return None if record is None else record.observed


def observed(
    varied: Iterable[str], without: Observed | None, within: Observed | None, axes: Mapping[str, Axis]
) -> dict[str, tuple[str, str]]:
    """For each axis varied in a rebuild: what was seen of it without and with it; nothing where nothing was seen."""
    if within is None or without is None:
        return {}
    pairs = {name: (axes[name].seen(without), axes[name].seen(within)) for name in varied}
    return {
        name: (before, after) for name, (before, after) in pairs.items() if before is not None and after is not None
    }


def _worst(errors: Sequence[BaseException]) -> VzreproError | None:
    """The error to end with: an interrupt of a rebuild tells less than the failure that caused it."""
    if not errors:
        return None
    error = min(errors, key=lambda each: isinstance(each, Interrupted))
    if isinstance(error, VzreproError):
        return error
    if isinstance(error, OSError):
        what = f"{error.filename}: " if error.filename else ""
        return VzreproError(
            f"{what}{error.strerror or error}", hint="check the disk and the rights with: vzrepro doctor"
        )
    raise error
