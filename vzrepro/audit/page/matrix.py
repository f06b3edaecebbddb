"""The table of nodes × axes: each cell a sign that leads to its evidence."""

from __future__ import annotations

from collections.abc import Sequence

from vzrepro.audit.model import AuditedNode, AxisInfo, Cell, Verdict
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import (
    HELD,
    MEANINGS,
    ORDER,
    WORDS,
    cell_class,
    cell_word,
    duration,
    glyph,
    style_class,
)


def matrix(view: View) -> Markup:
    """The section with the table and its legend."""
    head = tag(
        "tr",
        tag("th", "Node", scope="col", class_="corner"),
        *(_column(axis) for axis in view.columns),
        tag("th", "Time", scope="col", class_="time"),
    )
    bodies = [tag("tbody", *_rows(view, view.built))]
    if view.given:
        bodies.append(tag("tbody", *_rows(view, view.given), class_="given"))
    table = tag(
        "table",
        tag("caption", "Every node on every axis", class_="hidden"),
        tag("thead", head),
        *bodies,
        tag("tfoot", _sums(view)),
        class_="matrix",
    )
    return tag(
        "section",
        tag("h2", "Every node on every axis"),
        tag(
            "p",
            "A column is one thing that was made different in the rebuild. A cell leads to its evidence",
            tag("span", "; arrow keys move, Enter opens", class_="with-script"),
            ".",
            class_="soft",
        ),
        tag("div", table, class_="scroll tall", id="cells"),
        _legend(view),
        id="matrix",
        aria_label="Every node on every axis",
    )


def _column(axis: AxisInfo) -> Markup:
    link = tag("a", tag("span", axis.name), href="#axes", title=axis.about or None)
    return tag("th", link, scope="col", class_="axis")


def _rows(view: View, nodes: Sequence[AuditedNode]) -> list[Markup]:
    return [
        join(
            tag(
                "tr",
                tag(
                    "th",
                    glyph(style_class(node.verdict)),
                    view.link(node),
                    tag("span", WORDS[node.verdict], class_="hidden"),
                    scope="row",
                    class_=f"{style_class(node.verdict)}",
                ),
                *(_cell(view, node, axis, node.cells.get(axis.name)) for axis in view.columns),
                tag("td", _spent(node), class_="time"),
            ),
            "\n",
        )
        for node in nodes
    ]


def _cell(view: View, node: AuditedNode, axis: AxisInfo, cell: Cell | None) -> Markup:
    if cell is None:
        return tag("td", tag("span", cell_word(cell), class_="hidden"), class_="cell empty")
    word = cell_word(cell)
    marks = [word]
    marks += [f"with {cell.together} axes at once"] if cell.together > 1 else []
    marks += ["from an earlier audit"] if cell.reused else []
    label = f"{node.target}, {axis.name}: {', '.join(marks)}"
    if cell.reason and cell.verdict is not Verdict.REPRODUCED:
        label += f". {cell.held or cell.reason}"
    classes = ["cell", cell_class(cell)]
    classes += ["together"] if cell.together > 1 else []
    classes += ["reused"] if cell.reused else []
    link = tag(
        "a", glyph(cell_class(cell)), href=f"#{view.cell_anchor(node, axis.name)}", aria_label=label, title=label
    )
    return tag("td", link, class_=" ".join(classes))


def _spent(node: AuditedNode) -> str:
    spent = sum(rebuild.milliseconds for rebuild in node.rebuilds)
    return duration(spent) if spent else ""


def _sums(view: View) -> Markup:
    """How many of the built nodes came out the same on each axis."""
    cells = []
    for axis in view.columns:
        found = [node.cells[axis.name].verdict for node in view.built if axis.name in node.cells]
        count = found.count(Verdict.REPRODUCED)
        label = f"{axis.name}: {count} of {len(found)} reproduced"
        classes = "sum differs-sum" if Verdict.DIFFERS in found else "sum"
        cells.append(tag("td", tag("span", str(count), title=label), class_=classes))
    total = sum(rebuild.milliseconds for node in view.report.nodes for rebuild in node.rebuilds)
    return tag(
        "tr",
        tag("th", f"reproduced, of {len(view.built)}", scope="row"),
        *cells,
        tag("td", duration(total) if total else "", class_="time"),
    )


def _legend(view: View) -> Markup:
    cells = [cell for node in (*view.built, *view.given) for cell in node.cells.values()]
    kinds = [(style_class(verdict), WORDS[verdict], MEANINGS[verdict]) for verdict in (Verdict.REPRODUCED, *ORDER[:-1])]
    if any(cell_class(cell) == HELD for cell in cells):
        kinds.append((HELD, "held constant", "kept the same by the recipe, so not tested; never counted as passed"))
    items = [_key(name, word, meaning) for name, word, meaning in kinds]
    if any(cell.together > 1 for cell in cells):
        items.append(_key("ok", "together", "several axes varied in one rebuild", "together"))
    if any(cell.reused for cell in cells):
        items.append(_key("ok", "reused", "found by an earlier audit of this builder", "reused"))
    return tag("ul", *items, class_="legend", aria_label="What the signs mean")


def _key(name: str, word: str, meaning: str, mark: str = "") -> Markup:
    sign = tag("span", glyph(name), class_=f"cell key {name} {mark}".rstrip())
    return tag("li", sign, tag("span", tag("b", word), f" {meaning}"))
