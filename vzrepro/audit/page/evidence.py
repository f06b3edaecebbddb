"""What stands behind each verdict: a node's causes and differences, its cells, its rebuilds and their logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from vzrepro.audit.model import (
    REPEAT,
    AuditedNode,
    AxisInfo,
    Cause,
    Cell,
    Detail,
    Explanation,
    Rebuild,
    Verdict,
)
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import (
    WORDS,
    badge,
    cell_class,
    cell_word,
    duration,
    glyph,
    is_held,
    listed,
    moment,
    plural,
    short,
    size,
    style_class,
)

Rows = Sequence[tuple[str, str | None]]


def nodes(view: View) -> Markup:
    """The section with every node, folded; what is given comes with the page's switch."""
    given = tag("div", *(_node(view, node) for node in view.given), class_="given") if view.given else None
    return tag(
        "section",
        tag("h2", "Evidence"),
        tag("p", "Each node with its rebuilds, worst first.", class_="soft"),
        *(_node(view, node) for node in view.built),
        given,
        id="evidence",
        aria_label="Evidence",
    )


def facts(rows: Rows) -> Markup:
    """Names and values; rows without a value are left out."""
    shown = [tag("div", tag("dt", name), tag("dd", value)) for name, value in rows if value]
    return tag("dl", *shown, class_="facts")


@dataclass(slots=True)
class _Sheet:
    """One node's evidence while it is written. What was shown once is only linked to afterwards."""

    view: View
    node: AuditedNode
    shown: set[str] = field(default_factory=set)

    @property
    def anchor(self) -> str:
        return self.view.anchors[self.node.drv_hash]


def _node(view: View, node: AuditedNode) -> Markup:
    sheet = _Sheet(view, node)
    spent = sum(rebuild.milliseconds for rebuild in node.rebuilds)
    brief = _brief(view, node)
    summary = tag(
        "summary",
        glyph(style_class(node.verdict), size=18),
        tag("span", node.target, class_="name"),
        tag("span", WORDS[node.verdict], class_="word"),
        tag("span", brief, class_="brief"),
        tag("span", duration(spent) if spent else "", class_="time"),
    )
    # The fragment's target is inside, so that a browser without the script opens the details as well.
    body = tag(
        "div",
        *_causes(sheet),
        *_cells(sheet),
        _shared_rebuilds(sheet),
        _identity(sheet),
        id=sheet.anchor,
        class_="inside",
    )
    return join(tag("details", summary, body, class_=f"node {style_class(node.verdict)}"), "\n")


def _brief(view: View, node: AuditedNode) -> str:
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


# --- causes and differences ---------------------------------------------------------------------------------------


def _causes(sheet: _Sheet) -> list[Markup]:
    found = [_cause(sheet, cause) for cause in sheet.node.causes]
    explained = dict.fromkeys(rebuild.explanation for rebuild in sheet.node.rebuilds if rebuild.explanation)
    for name in explained:
        explanation = sheet.view.report.explanations.get(name)
        if explanation is not None and name not in sheet.shown:
            found.append(
                tag("div", tag("h4", "A difference of unknown cause"), _explanation(sheet, explanation), class_="cause")
            )
    return [tag("h3", "Why it differs"), *found] if found else []


def _cause(sheet: _Sheet, cause: Cause) -> Markup:
    guess = cause.guess
    explanation = sheet.view.report.explanations.get(cause.explanation or "")
    link = tag("a", cause.axis, href=f"#{sheet.view.cell_anchor(sheet.node, cause.axis)}")
    rows: Rows = []
    if guess is not None:
        rows = [
            ("probable cause", tag("span", guess.cause, class_="chip")),
            ("seen", guess.evidence),
            ("fix", tag("strong", guess.fix)),
        ]
    return tag(
        "div",
        tag("h4", "It changes with " if cause.axis != REPEAT else "It changes by itself: ", link),
        facts(rows),
        _explanation(sheet, explanation) if explanation is not None else None,
        class_="cause",
    )


def _explanation(sheet: _Sheet, explanation: Explanation) -> Markup:
    anchor = f"{sheet.anchor}/difference/{explanation.id}"
    if explanation.id in sheet.shown:
        return tag("p", tag("a", "The same difference as above", href=f"#{anchor}"))
    sheet.shown.add(explanation.id)
    files = dict.fromkeys(detail.file for detail in explanation.details)
    parts = [
        _file(name, [detail for detail in explanation.details if detail.file == name], number == 0)
        for number, name in enumerate(files)
    ]
    return tag(
        "div",
        *parts,
        *(
            tag("p", tag("span", guess.cause, class_="chip"), f" {guess.evidence}: ", tag("strong", guess.fix))
            for guess in explanation.guesses
            if guess not in [cause.guess for cause in sheet.node.causes]
        ),
        tag("p", glyph("unsure"), f"There is more: {explanation.truncated}", class_="more")
        if explanation.truncated
        else None,
        tag("p", f"Compared by {explanation.tool}", class_="soft small"),
        id=anchor,
    )


def _file(name: str, details: Sequence[Detail], open_: bool) -> Markup:
    summary = tag("summary", tag("code", name), tag("span", plural(len(details), "place"), class_="soft"))
    return tag("details", summary, *map(_detail, details), class_="file", open=open_)


def _detail(detail: Detail) -> Markup:
    where = join(*(tag("code", member) for member in detail.member), by=" › ") if detail.member else None
    much = None if detail.count is None else plural(detail.count, "byte")
    start = None if detail.offset is None else f"at 0x{detail.offset:x}"
    extent = " ".join(part for part in (much, start) if part)
    return tag(
        "div",
        tag(
            "p",
            where,
            tag("span", detail.kind, class_="chip"),
            tag("span", extent, class_="soft") if extent else None,
            class_="place",
        ),
        _diff(detail.excerpt, f"Difference in {detail.file}") if detail.excerpt.strip() else None,
        class_="detail",
    )


def _diff(excerpt: str, label: str) -> Markup:
    return _preformatted(
        [tag("span", line or " ", class_=_diff_class(line)) for line in excerpt.rstrip("\n").split("\n")], label
    )


def _diff_class(line: str) -> str | None:
    if line.startswith(("--- ", "+++ ", "@@")):
        return "hunk"
    return {"+": "new", "-": "old"}.get(line[:1])


def _preformatted(lines: Sequence[str | Markup], label: str) -> Markup:
    """Lines that scroll in their own box, also by keyboard."""
    return tag("pre", tag("code", join(*lines, by="\n")), tabindex=0, role="region", aria_label=label)


# --- cells and rebuilds -------------------------------------------------------------------------------------------


def _cells(sheet: _Sheet) -> list[Markup]:
    cells = sheet.view.cells(sheet.node)
    return [tag("h3", "On each axis"), *(_cell(sheet, axis, cell) for axis, cell in cells)] if cells else []


def _cell(sheet: _Sheet, axis: AxisInfo, cell: Cell) -> Markup:
    rebuilds = _rebuilds_of(sheet.node, cell)
    shared = _shared(sheet.node)
    own = [rebuild for rebuild in rebuilds if rebuild.id not in shared]
    elsewhere = [
        tag("a", f"rebuild {rebuild.id}", href=f"#{sheet.anchor}/rebuild/{rebuild.id}")
        for rebuild in rebuilds
        if rebuild.id in shared
    ]
    seen = next((rebuild.observed[axis.name] for rebuild in rebuilds if axis.name in rebuild.observed), None)
    # What was seen tells most about a comparison; where there was none, why.
    told = cell.verdict in {Verdict.REPRODUCED, Verdict.DIFFERS}
    summary = tag(
        "summary",
        glyph(cell_class(cell)),
        tag("span", axis.name, class_="axis-name"),
        tag("span", cell_word(cell), class_="word"),
        tag("span", _seen(seen) if seen and told else cell.held or cell.reason, class_="brief"),
        tag("span", duration(cell.milliseconds) if cell.milliseconds else "", class_="time"),
    )
    body = tag(
        "div",
        facts(
            [
                ("verdict", _verdict_words(cell)),
                ("seen inside", _seen(seen) if seen else None),
                ("varied", tag("a", axis.about, href="#axes") if axis.about else None),
                ("rests on", listed(elsewhere) if elsewhere else None),
            ]
        ),
        *(_rebuild(sheet, rebuild, axis.name) for rebuild in own),
        tag("p", tag("a", "Back to all nodes and axes", href="#matrix"), class_="small"),
        id=sheet.view.cell_anchor(sheet.node, axis.name),
        class_="inside",
    )
    return tag("details", summary, body, class_=f"axis {cell_class(cell)}")


def _verdict_words(cell: Cell) -> Markup:
    parts: list[str] = [WORDS[cell.verdict]]
    if is_held(cell):
        parts.append(f"held constant by the recipe: {cell.held}")
    elif cell.reason:
        parts.append(cell.reason)
    if cell.together > 1:
        parts.append(f"{cell.together} axes were varied at once")
    if cell.reused:
        parts.append("taken from an earlier audit by this builder")
    return join(*parts, by="; ")


def _seen(values: tuple[str, str]) -> Markup:
    before, after = values
    return join(tag("code", before), tag("span", " → ", aria_label=" became "), tag("code", after))


def _rebuilds_of(node: AuditedNode, cell: Cell) -> list[Rebuild]:
    known = {rebuild.id: rebuild for rebuild in node.rebuilds}
    return [known[name] for name in cell.rebuilds if name in known]


def _shared(node: AuditedNode) -> frozenset[str]:
    """Rebuilds that are not the evidence of exactly one cell; they stand below all cells."""
    uses = Counter(name for cell in node.cells.values() for name in cell.rebuilds)
    return frozenset(rebuild.id for rebuild in node.rebuilds if uses[rebuild.id] != 1)


def _shared_rebuilds(sheet: _Sheet) -> Markup | None:
    shared = _shared(sheet.node)
    found = [_rebuild(sheet, rebuild) for rebuild in sheet.node.rebuilds if rebuild.id in shared]
    return tag("div", tag("h3", "Rebuilds that several axes rest on"), *found) if found else None


def _rebuild(sheet: _Sheet, rebuild: Rebuild, axis: str | None = None) -> Markup:
    """One rebuild; `axis` is that of the cell it stands in."""
    said = axis is not None and rebuild.verdict is Verdict.REPRODUCED  # by its cell
    same = rebuild.nar_hash == sheet.node.nar_hash
    alone = axis is not None and rebuild.axes in {(axis,), ()} and not rebuild.held
    explanation = rebuild.explanation if rebuild.explanation in sheet.view.report.explanations else None
    link = tag("a", "where and why", href=f"#{sheet.anchor}/difference/{explanation}") if explanation else None
    rows: Rows = [
        (
            "result",
            None if said else join(badge(rebuild.verdict), join(" ", rebuild.reason) if rebuild.reason else None),
        ),
        ("difference", link),
        ("varied", None if alone else ", ".join(rebuild.axes) or "nothing"),
        ("held constant", ", ".join(rebuild.held)),
        ("output", _output(rebuild.nar_hash, rebuild.nar_size, "as registered" if same else "")),
        ("registered", None if same else _output(sheet.node.nar_hash, sheet.node.nar_size)),
        ("started", join(moment(rebuild.started), f", took {duration(rebuild.milliseconds)}")),
        ("round", f"{rebuild.round + 1} of {sheet.view.report.rounds}" if sheet.view.report.rounds > 1 else None),
        ("statement", short(rebuild.statement) if rebuild.statement else None),
    ]
    log = None
    if rebuild.log:
        title = f"Last {plural(len(rebuild.log), 'line')} of the log" if len(rebuild.log) > 1 else "The log's last line"
        log = tag(
            "details",
            tag("summary", title),
            _preformatted(list(rebuild.log), f"Log of rebuild {rebuild.id}"),
            class_="log",
            open=rebuild.verdict is not Verdict.REPRODUCED,
        )
    return tag(
        "div",
        tag("h4", "Rebuild ", tag("code", rebuild.id)),
        facts(rows),
        log,
        id=f"{sheet.anchor}/rebuild/{rebuild.id}",
        class_="rebuild",
    )


def _output(nar_hash: str | None, nar_size: int | None, note: str = "") -> str:
    if nar_hash is None:
        return "none"
    return join(short(nar_hash), None if nar_size is None else f" {size(nar_size)}", note and f", {note}")


def _identity(sheet: _Sheet) -> Markup:
    view, node = sheet.view, sheet.node
    inputs = [
        join(view.link(view.nodes[drv]), f" as {name}" if name != view.nodes[drv].target else None)
        for name, drv in sorted(node.inputs.items())
        if drv in view.nodes
    ]
    users = [view.link(view.nodes[drv]) for drv in view.users[node.drv_hash]]
    rows: Rows = [
        ("store path", tag("code", node.path)),
        ("drv hash", tag("code", node.drv_hash)),
        ("build key", tag("code", node.build_key) if node.build_key else None),
        ("NAR hash", tag("code", node.nar_hash) if node.nar_hash else "not in the store"),
        ("size", size(node.nar_size) if node.nar_hash else None),
        ("built from", listed(inputs) if inputs else None),
        ("used by", listed(users) if users else None),
    ]
    return tag("div", tag("h3", "What was asked and registered"), facts(rows))
