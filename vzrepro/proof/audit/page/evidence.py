"""What stands behind each verdict, as the page's templates need it: which rebuilds, which differences, what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from vzrepro.base.words import plural
from vzrepro.proof.audit.model import REPEAT, AuditedNode, AxisInfo, Cause, Cell, Detail, Explanation, Rebuild, Verdict
from vzrepro.proof.audit.page.view import View
from vzrepro.proof.audit.page.words import cell_class, cell_word, style_class

NAMED = 5
"""Nodes that a sentence names before it counts."""

SHOWN = 8
"""Things to do before the rest is folded."""


def few(nodes: Sequence[AuditedNode]) -> list[AuditedNode | str]:
    """The nodes that a sentence names, then how many more there are."""
    return [*nodes[:NAMED], *([f"{len(nodes) - NAMED} more"] if len(nodes) > NAMED else [])]


def brief(view: View, node: AuditedNode) -> str:
    """What is said of a node while its evidence is folded."""
    if node.verdict is Verdict.DIFFERS:
        axes = view.blamed_axes(node)
        return f"with {', '.join(axes)}" if axes and axes != (REPEAT,) else "with nothing varied" if axes else ""
    if node.verdict is Verdict.REPRODUCED:
        others = Counter(
            cell_word(cell) for _, cell in view.cells(node) if cell_class(cell) != style_class(Verdict.REPRODUCED)
        )
        return f"but {', '.join(f'{count} {word}' for word, count in others.items())}" if others else "on every axis"
    worst = [(axis.name, cell) for axis, cell in view.cells(node) if cell.verdict is node.verdict]
    return f"{worst[0][0]}: {worst[0][1].reason or ''}" if worst and len(worst) < 4 else ""


# --- differences --------------------------------------------------------------------------------------------------


def differences(view: View, node: AuditedNode) -> list[tuple[Cause | None, Explanation | None, bool]]:
    """The node's causes, then its explanations that belong to none; of each, whether it is told the first time."""
    known = view.report.explanations
    told: set[str] = set()
    found: list[tuple[Cause | None, Explanation | None, bool]] = []
    for cause in node.causes:
        explanation = known.get(cause.explanation or "")
        found.append((cause, explanation, explanation is not None and explanation.id not in told))
        told |= {explanation.id} if explanation is not None else set()
    for name in dict.fromkeys(rebuild.explanation for rebuild in node.rebuilds if rebuild.explanation):
        if name in known and name not in told:
            found.append((None, known[name], True))
            told.add(known[name].id)
    return found


def by_file(explanation: Explanation) -> list[tuple[str, list[Detail]]]:
    """The places that differ, file by file."""
    files = dict.fromkeys(detail.file for detail in explanation.details)
    return [(name, [detail for detail in explanation.details if detail.file == name]) for name in files]


def extent(detail: Detail) -> str:
    """How much differs, and from where on, as far as that is known."""
    much = None if detail.count is None else plural(detail.count, "byte")
    start = None if detail.offset is None else f"at 0x{detail.offset:x}"
    return " ".join(part for part in (much, start) if part)


def diff_lines(excerpt: str) -> list[tuple[str | None, str]]:
    """The lines of a unified diff, each with its CSS class."""
    return [(_diff_class(line), line) for line in excerpt.rstrip("\n").split("\n")]


def _diff_class(line: str) -> str | None:
    if line.startswith(("--- ", "+++ ", "@@")):
        return "hunk"
    return {"+": "new", "-": "old"}.get(line[:1])


# --- rebuilds -----------------------------------------------------------------------------------------------------


def shared_rebuilds(node: AuditedNode) -> list[Rebuild]:
    """Rebuilds that are not the evidence of exactly one cell; they stand below all cells."""
    uses = Counter(name for cell in node.cells.values() for name in cell.rebuilds)
    return [rebuild for rebuild in node.rebuilds if uses[rebuild.id] != 1]


def rebuilds_of(node: AuditedNode, cell: Cell) -> tuple[list[Rebuild], list[Rebuild]]:
    """Those that a cell rests on: its own, and those that others rest on, too."""
    found, shared = _rebuilds(node, cell), shared_rebuilds(node)
    return [each for each in found if each not in shared], [each for each in found if each in shared]


def observed(node: AuditedNode, cell: Cell, axis: AxisInfo) -> tuple[str, str] | None:
    """What the sandbox saw without and with the axis."""
    return next((each.observed[axis.name] for each in _rebuilds(node, cell) if axis.name in each.observed), None)


def _rebuilds(node: AuditedNode, cell: Cell) -> list[Rebuild]:
    known = {rebuild.id: rebuild for rebuild in node.rebuilds}
    return [known[name] for name in cell.rebuilds if name in known]


# --- what is to be done -------------------------------------------------------------------------------------------


def remedy(view: View, node: AuditedNode) -> tuple[list[tuple[str, str, list[str]]], list[str], list[str] | None]:
    """What is to be done about a node that differs: fixes (cause, fix, what was seen); without any, the reasons of its
    cells; and the options of an audit that tells more, None when there is nothing more to find out."""
    axes = view.blamed_axes(node)
    fixes: dict[tuple[str, str], dict[str, None]] = {}
    explanations = view.report.explanations
    if node.causes:
        guesses = [cause.guess for cause in node.causes if cause.guess is not None]
    else:
        # While no axis is known as the cause, guesses about the differences have to do.
        names = dict.fromkeys(rebuild.explanation for rebuild in node.rebuilds if rebuild.explanation)
        guesses = [guess for name in names if name in explanations for guess in explanations[name].guesses]
    for guess in guesses:
        fixes.setdefault((guess.cause, guess.fix), {})[guess.evidence] = None
    # Without an axis there is still something to find out, whatever the bytes look like.
    again = None
    if not fixes or not axes:
        varied = [axis for axis in axes if axis != REPEAT]
        again = ["--axes", ",".join(varied), "--fresh"] if varied else ["--fresh"] if axes else []
    reasons = dict.fromkeys(node.cells[axis].reason for axis in axes if axis in node.cells and not fixes)
    return (
        [(cause, fix, list(seen)) for (cause, fix), seen in fixes.items()],
        [reason for reason in reasons if reason],
        again,
    )


def obstacle(view: View, node: AuditedNode) -> tuple[str, str | None]:
    """The axis, or `REPEAT`, that a node could not be judged on, and why."""
    cells = [(axis, cell) for axis, cell in view.cells(node) if cell.verdict is node.verdict and cell.reason]
    return (cells[0][0].name, cells[0][1].reason) if cells else (REPEAT, None)
