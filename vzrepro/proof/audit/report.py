"""From what an audit found to its report: nodes, cells, rebuilds, causes, the seed, and what other caches have."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import vzrepro
from vzrepro.base.errors import RemoteError
from vzrepro.base.model import NarHash, ObjectInfo, StorePath
from vzrepro.base.signing import PublicKey
from vzrepro.cache.reader import CacheReader
from vzrepro.proof.audit.axes import AXES, Axis
from vzrepro.proof.audit.blame import CellFinding, Experiment
from vzrepro.proof.audit.causes import FIXES
from vzrepro.proof.audit.engine import AuditOutcome, AuditSubject, Request, observed, seen_in, verdict_of
from vzrepro.proof.audit.model import (
    REPEAT,
    Against,
    AuditedNode,
    AuditReport,
    AxisInfo,
    Cause,
    Cell,
    Explanation,
    Guess,
    PastAudit,
    Rebuild,
    Verdict,
)
from vzrepro.proof.audit.records import Record
from vzrepro.proof.sbom.seed import seed
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.sandbox import Runtime

_CAUSES = {axis.name: axis.cause for axis in AXES}

HISTORY = 50
"""Past audits that a report repeats."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a report says besides its nodes."""

    id: str
    started: str
    finished: str
    builder: Mapping[str, str]
    history: tuple[PastAudit, ...]
    against: tuple[Against, ...]
    explanation: Callable[[str], Explanation | None]


def builder(key: PublicKey, runtime: Runtime, cores: int) -> dict[str, str]:
    """Who audits, and on what."""
    return {
        "key": str(key),
        "keyId": key.id,
        "program": f"vzrepro {vzrepro.__version__}",
        "engine": f"{runtime.engine} {runtime.server_version}, {runtime.storage_driver}",
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(cores),
    }


def make_report(
    request: Request, found: AuditOutcome, graph: DrvGraph, infos: Mapping[StorePath, ObjectInfo], around: Around
) -> AuditReport:
    """The report of an audit, whether it came to its end or not. `infos` are the objects that are known."""
    closure = graph.closure(request.targets)
    subjects = {subject.node.drv_hash: subject for subject in found.subjects}
    nodes = []
    for node in closure:
        subject = subjects.get(node.drv_hash)
        info = infos.get(node.path)
        named = {name: drv.hex for name, drv in node.drv.inputs.items()}
        if node.drv.image is not None:
            named["image"] = node.drv.image.hex
        common = AuditedNode(
            target=node.target,
            kind=node.drv.builder,
            drv_hash=node.drv_hash.hex,
            path=str(node.path),
            build_key=None if subject is None else subject.key.hex,
            nar_hash="" if info is None else info.nar_hash.hex,
            nar_size=0 if info is None else info.nar_size,
            inputs=named,
            verdict=Verdict.UNTESTED,
        )
        nodes.append(_untested(common) if subject is None else _audited(common, subject, request.axes))
    explanations = {
        each: explained
        for each in sorted({run.explanation for node in nodes for run in node.rebuilds if run.explanation})
        if (explained := around.explanation(each)) is not None
    }
    return AuditReport(
        id=around.id,
        targets=tuple(node.target for node in request.targets),
        mode="together" if request.quick else "alone",
        deep=request.deep,
        rounds=request.rounds,
        started=around.started,
        finished=around.finished,
        complete=found.error is None,
        builder=around.builder,
        axes=tuple(AxisInfo(axis.name, axis.about, axis.applied, axis.proof) for axis in request.axes),
        nodes=tuple(_with_guesses(node, explanations) for node in nodes),
        seed=seed(graph, request.targets),
        against=around.against,
        explanations=explanations,
        history=around.history[-HISTORY:],
    )


def _untested(node: AuditedNode) -> AuditedNode:
    reason = {
        "image": "written from pinned .debs; --deep writes it again",
        "fetch": "a download, pinned by its hash; --deep fetches it again",
        "local": "files of the workspace, hashed at every evaluation",
    }[node.kind]
    return replace(node, cells={REPEAT: Cell(Verdict.UNTESTED, reason)})


def _audited(node: AuditedNode, subject: AuditSubject, axes: Sequence[Axis]) -> AuditedNode:
    rebuilds = _rebuilds(subject, {axis.name: axis for axis in axes})
    if subject.judgement is None:
        reason = "the audit was ended before enough was known"
        names = [REPEAT, *(plan.name for plan in subject.case.axes)]
        return replace(node, cells={name: Cell(Verdict.UNTESTED, reason) for name in names}, rebuilds=rebuilds)
    cells = {name: _cell(subject, finding) for name, finding in subject.judgement.findings.items()}
    by_id = {run.id: run for run in rebuilds}
    causes = []
    for name in subject.judgement.causes:
        # What is never the same twice is explained where it was first met: with nothing varied.
        runs = [by_id[each] for each in (*cells[name].rebuilds, *cells[REPEAT].rebuilds)]
        causes.append(Cause(name, None, next((run.explanation for run in runs if run.explanation), None)))
    return replace(node, verdict=subject.judgement.verdict, cells=cells, rebuilds=rebuilds, causes=tuple(causes))


def _cell(subject: AuditSubject, finding: CellFinding) -> Cell:
    records = [subject.records[experiment] for experiment in finding.experiments]
    return Cell(
        finding.verdict,
        finding.reason,
        tuple(record.asked.id for record in records),
        finding.together,
        finding.held,
        bool(records) and all(experiment in subject.reused for experiment in finding.experiments),
        sum(record.milliseconds for record in records),
    )


def _rebuilds(subject: AuditSubject, axes: Mapping[str, Axis]) -> tuple[Rebuild, ...]:
    """Those that the judgement rests on, or all there are without one, in the order of the experiments."""
    if subject.judgement is None:
        wanted = set(subject.records)
    else:
        wanted = {each for finding in subject.judgement.findings.values() for each in finding.experiments}
    without = subject.without
    return tuple(
        _rebuild(experiment, subject.records[experiment], without, axes)
        for experiment in sorted(wanted)
        if experiment.builds
    )


def _rebuild(experiment: Experiment, record: Record, look: Record | None, axes: Mapping[str, Axis]) -> Rebuild:
    return Rebuild(
        id=record.asked.id,
        axes=experiment.axes,
        held=experiment.held,
        round=experiment.round,
        verdict=verdict_of(record),
        nar_hash=record.nar_hash,
        nar_size=record.nar_size,
        started=record.started,
        milliseconds=record.milliseconds,
        observed=observed(experiment.axes, record.without or seen_in(look), record.observed, axes),
        reason=record.reason,
        log=record.log,
        statement=record.statement,
        explanation=record.explanation,
    )


def _with_guesses(node: AuditedNode, explanations: Mapping[str, Explanation]) -> AuditedNode:
    causes = []
    for cause in node.causes:
        explained = explanations.get(cause.explanation or "")
        guess = explained.guesses[0] if explained is not None and explained.guesses else None
        known = _CAUSES.get(cause.axis)
        if guess is not None and guess.cause == "unknown" and known is not None:
            guess = Guess(known, guess.evidence, FIXES[known])
        causes.append(Cause(cause.axis, guess, cause.explanation))
    return replace(node, causes=tuple(causes))


def compare_with_caches(
    nodes: Sequence[Node],
    caches: Sequence[CacheReader],
    infos: Mapping[StorePath, ObjectInfo],
    warn: Callable[[str], None],
) -> tuple[Against, ...]:
    """What these caches have for each node beside `infos`, trusted or not: to compare is not to take."""
    rows = []
    for cache in caches:
        for node in nodes:
            try:
                there, damaged = cache.access.look(node.path)
            except RemoteError as error:
                warn(f"{cache.url} cannot be compared with: {error.message}")
                break
            if damaged:
                warn(f"{cache.url}: what it has for {node.target} is damaged")
            mine = infos.get(node.path)
            theirs: NarHash | None = None if there is None else there.nar_hash
            agrees = None if theirs is None or mine is None else theirs == mine.nar_hash
            signers = () if there is None else tuple(sorted(_signers((*there.signatures, *there.own_signatures))))
            rows.append(Against(cache.url, node.target, None if theirs is None else theirs.hex, signers, agrees))
    return tuple(rows)


def _signers(signatures: Sequence[str]) -> set[str]:
    return {signature.partition(":")[0] for signature in signatures}
