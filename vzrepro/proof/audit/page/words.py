"""What the audit page calls things: verdicts with their signs, cells, times."""

from __future__ import annotations

import re

from vzrepro.base.words import duration
from vzrepro.proof.audit.model import WORST_FIRST, AuditedNode, AxisInfo, Cell, PastAudit, Verdict

WORDS = {
    Verdict.REPRODUCED: "reproduced",
    Verdict.DIFFERS: "differs",
    Verdict.BUILD_FAILED: "build failed",
    Verdict.INCONCLUSIVE: "inconclusive",
    Verdict.UNTESTED: "untested",
}
MEANINGS = {
    Verdict.REPRODUCED: "rebuilt, and every byte is the same",
    Verdict.DIFFERS: "rebuilt, and other bytes came out",
    Verdict.BUILD_FAILED: "the rebuild did not succeed",
    Verdict.INCONCLUSIVE: "could not be judged; the reason is given",
    Verdict.UNTESTED: "not tried",
}
TITLES = {
    Verdict.REPRODUCED: "Reproducible",
    Verdict.DIFFERS: "Not reproducible",
    Verdict.BUILD_FAILED: "Does not build again",
    Verdict.INCONCLUSIVE: "Not proven",
    Verdict.UNTESTED: "Not fully tested",
}
KEY = (Verdict.REPRODUCED, *WORST_FIRST[:-1])
"""Verdicts in the order in which counts and signs are explained."""

BAR = 160  # px that all nodes of an audit, or the largest image, take
HELD = "held"
"""The sixth kind of cell: UNTESTED since the recipe keeps the axis constant."""

_CLASSES = {
    Verdict.REPRODUCED: "ok",
    Verdict.DIFFERS: "differs",
    Verdict.BUILD_FAILED: "failed",
    Verdict.INCONCLUSIVE: "unsure",
    Verdict.UNTESTED: "untested",
}
# Strokes in a square of 16, so that no font decides how a verdict looks.
STROKES = {
    "ok": "M3 8.5 6.5 12 13 4.5",
    "differs": "M3 6h10M3 10h10M10.5 2.5l-5 11",
    "failed": "M8 2.5v7M8 12.6v.8",
    "unsure": "M5.2 5.6a2.8 2.8 0 1 1 4.3 2.4Q8 8.9 8 10M8 12.9v.6",
    "untested": "M4.5 8h7",
    HELD: "M4 7.5h8v6H4zM5.7 7.5V5a2.3 2.3 0 0 1 4.6 0v2.5",
}


def style_class(verdict: Verdict) -> str:
    """The CSS class that colours a verdict, and the name of its sign."""
    return _CLASSES[verdict]


def is_held(cell: Cell) -> bool:
    """Whether the axis was not tried because the recipe keeps it constant. One that differs all the same is not."""
    return cell.held is not None and cell.verdict is Verdict.UNTESTED


def cell_class(cell: Cell | None) -> str:
    """As `style_class`, for a cell of the matrix."""
    if cell is None:
        return _CLASSES[Verdict.UNTESTED]
    return HELD if is_held(cell) else _CLASSES[cell.verdict]


def cell_word(cell: Cell | None) -> str:
    """What a cell says, in words."""
    if cell is None:
        return WORDS[Verdict.UNTESTED]
    return "held constant" if is_held(cell) else WORDS[cell.verdict]


def cell_label(node: AuditedNode, axis: AxisInfo, cell: Cell) -> str:
    """All that a cell of the matrix says, for who points at it or has it read aloud."""
    marks = [cell_word(cell)]
    marks += [f"with {cell.together} axes at once"] if cell.together > 1 else []
    marks += ["from an earlier audit"] if cell.reused else []
    label = f"{node.target}, {axis.name}: {', '.join(marks)}"
    if cell.reason and cell.verdict is not Verdict.REPRODUCED:
        label += f". {cell.held or cell.reason}"
    return label


def spent(*nodes: AuditedNode) -> str:
    """How long the nodes' rebuilds took; nothing without any."""
    found = sum(rebuild.milliseconds for node in nodes for rebuild in node.rebuilds)
    return duration(found / 1000) if found else ""


def nodes_of(past: PastAudit) -> list[tuple[Verdict, int]]:
    """How many nodes of a past audit got which verdict, reproduced ones first."""
    return [(verdict, past.nodes[verdict]) for verdict in reversed(WORST_FIRST) if past.nodes.get(verdict)]


def bar(past: PastAudit) -> list[tuple[Verdict, float, float]]:
    """The same as a bar of `BAR` pixels: verdict, left edge, width."""
    found = nodes_of(past)
    total = sum(count for _, count in found) or 1
    bars, at = [], 0.0
    for verdict, count in found:
        width = count / total * BAR
        bars.append((verdict, round(at, 1), round(max(width - 1, 1), 1)))
        at += width
    return bars


def minute(value: str) -> str | None:
    """A time of day in UTC, to the minute; None for something else."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)\S*", value)
    return f"{found[1]} {found[2]} UTC" if found else None
