"""A report arranged for its page: which nodes are rows, what each is called, what is built with what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vzrepro.base.words import plural
from vzrepro.proof.audit.model import (
    REPEAT,
    WORST_FIRST,
    Against,
    AuditedNode,
    AuditReport,
    AxisInfo,
    Cell,
    PastAudit,
    Rebuild,
    Verdict,
    worst,
)
from vzrepro.proof.audit.page.words import is_held

_REPEAT_INFO = AxisInfo(REPEAT, "nothing: built once more", "as it was built before", "nothing to prove")


@dataclass(frozen=True, slots=True)
class View:
    """`built` are the nodes that a rebuild judges, worst first; `given` those taken as they are: images, downloads,
    local files. `columns` are the axes in the order of the matrix. Mappings are by drv hash: `anchors` are names for
    URL fragments, `users` what is built directly with a node."""

    report: AuditReport
    built: tuple[AuditedNode, ...]
    given: tuple[AuditedNode, ...]
    columns: tuple[AxisInfo, ...]
    anchors: Mapping[str, str]
    nodes: Mapping[str, AuditedNode]
    users: Mapping[str, tuple[str, ...]]
    carriers: frozenset[str]
    """Origins, and everything that is built with their output, directly or not."""

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """How many of the built nodes got each verdict."""
        return Counter(node.verdict for node in self.built)

    @property
    def origins(self) -> tuple[AuditedNode, ...]:
        """The nodes that are to blame."""
        return tuple(node for node in (*self.built, *self.given) if node.origin)

    @property
    def disagreements(self) -> tuple[Against, ...]:
        """What other caches have otherwise."""
        return tuple(each for each in self.report.against if each.agrees is False)

    @property
    def made(self) -> tuple[Rebuild, ...]:
        """The rebuilds that were made for this audit: all but those of an earlier one."""
        return tuple(
            rebuild
            for node in self.report.nodes
            for rebuild in node.rebuilds
            if not any(cell.reused for cell in node.cells.values() if rebuild.id in cell.rebuilds)
        )

    @property
    def verdict(self) -> Verdict:
        """The report's verdict over what was to be judged: what is given counts only where it was tried, too."""
        return Verdict.DIFFERS if self.disagreements else worst(self.counts)

    @property
    def reused(self) -> int:
        """How many rebuilds are an earlier audit's."""
        return sum(len(node.rebuilds) for node in self.report.nodes) - len(self.made)

    @property
    def tainted(self) -> list[AuditedNode]:
        """The targets that are built with what differs."""
        targets = [node for node in self.nodes.values() if node.target in self.report.targets]
        return [node for node in targets if node.drv_hash in self.carriers and not node.origin]

    @property
    def carries(self) -> bool:
        """Whether anything is built with an origin's output."""
        return any(self.users[node.drv_hash] for node in self.origins)

    @property
    def tested(self) -> set[str]:
        """The axes on which something reproduced."""
        cells = [each for node in self.built for each in self.cells(node)]
        return {axis.name for axis, cell in cells if cell.verdict is Verdict.REPRODUCED} - {REPEAT}

    @property
    def untested(self) -> list[str]:
        """The other axes."""
        return [axis.name for axis in self.columns if axis.name != REPEAT and axis.name not in self.tested]

    @property
    def other_caches(self) -> list[str]:
        """The caches with other bytes."""
        return sorted({each.cache for each in self.disagreements})

    @property
    def disputed(self) -> list[str]:
        """The targets of which caches have other bytes."""
        return list(dict.fromkeys(each.target for each in self.disagreements))

    @property
    def given_counts(self) -> str:
        """What is given, as in `6 images, 17 downloads`."""
        kinds = Counter(node.kind for node in self.given)
        named = {"image": "image", "fetch": "download", "local": "local tree"}
        return ", ".join(plural(kinds[kind], word) for kind, word in named.items() if kinds[kind])

    @property
    def to_do(self) -> list[AuditedNode | None]:
        """What did not come out well, what differs first. None, before all, is what other caches have otherwise."""
        look_at = [
            node
            for verdict in (Verdict.BUILD_FAILED, Verdict.INCONCLUSIVE, Verdict.UNTESTED)
            for node in self.of(verdict)
        ]
        return [*([None] if self.disagreements else []), *self.origins, *look_at]

    @property
    def past(self) -> list[PastAudit]:
        """Earlier audits, newest first."""
        return sorted(self.report.history, key=lambda past: (past.finished, past.id), reverse=True)

    @property
    def nar_hashes(self) -> dict[str, str]:
        """What we have, by target."""
        return {node.target: node.nar_hash for node in self.report.nodes}

    def has_cell(self, meets: Callable[[Cell], object]) -> bool:
        """Whether any cell meets a condition."""
        return any(meets(cell) for node in (*self.built, *self.given) for cell in node.cells.values())

    @property
    def has_held(self) -> bool:
        """Whether a cell was held constant."""
        return self.has_cell(is_held)

    @property
    def has_together(self) -> bool:
        """Whether a cell's axis was varied with others."""
        return self.has_cell(lambda cell: cell.together > 1)

    @property
    def has_reused(self) -> bool:
        """Whether a cell is an earlier audit's."""
        return self.has_cell(lambda cell: cell.reused)

    def of(self, verdict: Verdict) -> list[AuditedNode]:
        """The built nodes with this verdict."""
        return [node for node in self.built if node.verdict is verdict]

    def verdicts_on(self, axis: AxisInfo) -> list[Verdict]:
        """The built nodes' verdicts on an axis."""
        return [node.cells[axis.name].verdict for node in self.built if axis.name in node.cells]

    def inputs(self, node: AuditedNode) -> list[tuple[str, AuditedNode]]:
        """What the node is built from, by the inputs' names."""
        return [(name, self.nodes[drv]) for name, drv in sorted(node.inputs.items()) if drv in self.nodes]

    def cell_anchor(self, node: AuditedNode, axis: str) -> str:
        """The fragment of a cell's evidence."""
        return f"{self.anchors[node.drv_hash]}/{_slug(axis)}"

    def cells(self, node: AuditedNode) -> list[tuple[AxisInfo, Cell]]:
        """The node's cells in the order of the columns."""
        return [(axis, node.cells[axis.name]) for axis in self.columns if axis.name in node.cells]

    def blamed_axes(self, node: AuditedNode) -> tuple[str, ...]:
        """The axes that change the node's output; REPEAT only when it is all that is known."""
        found = tuple(cause.axis for cause in node.causes)
        differing = tuple(axis.name for axis, cell in self.cells(node) if cell.verdict is Verdict.DIFFERS)
        return found or tuple(name for name in differing if name != REPEAT) or differing


def arrange(report: AuditReport) -> View:
    """Arrange `report`; the order of its nodes decides between equal ones."""
    rank = {verdict: number for number, verdict in enumerate(WORST_FIRST)}
    tried = [node for node in report.nodes if _is_judged(node)]
    nodes = {node.drv_hash: node for node in report.nodes}
    users: dict[str, list[str]] = {drv: [] for drv in nodes}
    for node in report.nodes:
        for drv in dict.fromkeys(node.inputs.values()):
            if drv in users:
                users[drv].append(node.drv_hash)
    return View(
        report=report,
        built=tuple(sorted(tried, key=lambda node: rank[node.verdict])),
        given=tuple(node for node in report.nodes if not _is_judged(node)),
        columns=_columns(report),
        anchors=_anchors(report.nodes),
        nodes=nodes,
        users={drv: tuple(found) for drv, found in users.items()},
        carriers=_reached([node.drv_hash for node in report.nodes if node.origin], users),
    )


def _is_judged(node: AuditedNode) -> bool:
    return node.kind == "sandbox" or node.verdict is not Verdict.UNTESTED


def _columns(report: AuditReport) -> tuple[AxisInfo, ...]:
    known = {REPEAT: _REPEAT_INFO, **{axis.name: axis for axis in report.axes}}
    for node in report.nodes:
        for name in node.cells:
            known.setdefault(name, AxisInfo(name, "", "", ""))
    return tuple(known.values())


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:80] or "-"


def _anchors(nodes: Sequence[AuditedNode]) -> dict[str, str]:
    """Targets as fragments, numbered where several nodes have the same."""
    given: Counter[str] = Counter()
    found = {}
    for node in nodes:
        slug = _slug(node.target)
        given[slug] += 1
        # No target has a `~`, so that a numbered name is nobody's own.
        found[node.drv_hash] = f"node/{slug}" if given[slug] == 1 else f"node/{slug}~{given[slug]}"
    return found


def _reached(starts: Sequence[str], users: Mapping[str, Sequence[str]]) -> frozenset[str]:
    reached: set[str] = set()
    pending = list(starts)
    while pending:
        drv = pending.pop()
        if drv not in reached:
            reached.add(drv)
            pending += users[drv]
    return frozenset(reached)
