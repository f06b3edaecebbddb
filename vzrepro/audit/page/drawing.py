"""Draws the graph as SVG: one box per node, coloured and signed by its verdict, each leading to its evidence."""

from __future__ import annotations

from collections.abc import Sequence

from vzrepro.audit.model import AuditedNode, Verdict
from vzrepro.audit.page.layout import Box, Layout, Segment, layered
from vzrepro.audit.page.markup import Markup, elide, join, tag
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import WORDS, glyph, plural, style_class

_LETTER = 7.3  # px that a letter of a name takes: 12 px of a fixed-width font
_SMALL_LETTER = 6.2
_LONGEST = 28
_BUILT, _GIVEN = 46, 26  # px of height
_NARROWEST = 128
_LEFT = 34  # px before the words of a box
_MARGIN = 12
_KINDS = {"image": "toolchain image", "fetch": "download", "local": "local files"}


def graph(view: View) -> Markup:
    """The section with the graph of what is built, and behind a switch that of everything."""
    shown = [node for node in view.report.nodes if node in view.built]
    parts = [
        tag("div", _svg(view, shown, "Graph of what is built"), class_="scroll only-built", tabindex=0, role="group")
    ]
    if view.given:
        everything = _svg(view, view.report.nodes, "Graph with images, downloads and local files")
        parts.append(tag("div", everything, class_="scroll only-all", tabindex=0, role="group"))
    return tag(
        "section",
        tag("h2", "Graph"),
        tag(
            "p",
            "Built from left to right. Every node is rebuilt on the registered outputs of its inputs, so a node that "
            "differs is itself to blame. ",
            tag("span", "Red lines lead to what is built with its output.", class_="carried")
            if any(view.users[node.drv_hash] for node in view.origins)
            else None,
            class_="soft",
        ),
        *parts,
        id="graph",
        aria_label="Graph",
    )


def switch(view: View) -> Markup | None:
    """The switch that shows what is taken as it is, in the graph and everywhere else; it needs no script."""
    if not view.given:
        return None
    counts = [
        plural(count, word, many)
        for kind, word, many in (
            ("image", "image", None),
            ("fetch", "download", None),
            ("local", "local tree", None),
        )
        if (count := sum(node.kind == kind for node in view.given))
    ]
    label = f"Show what is taken as it is: {', '.join(counts)}"
    return tag("p", tag("label", tag("input", type="checkbox", id="all"), label), class_="switch")


def _svg(view: View, nodes: Sequence[AuditedNode], name: str) -> Markup:
    boxes = [Box(node.drv_hash, _width(view, node), _GIVEN if node in view.given else _BUILT) for node in nodes]
    edges = [(drv, node.drv_hash) for node in nodes for drv in node.inputs.values()]
    layout = layered(boxes, edges)
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    return tag(
        "svg",
        # What is carried lies on top.
        *(_line(view, segment) for segment in sorted(layout.segments, key=lambda each: each.source in view.carriers)),
        *(_box(view, node, box, layout) for node, box in zip(nodes, boxes, strict=True)),
        class_="graph",
        role="list",
        aria_label=name,
        width=width,
        height=height,
        viewBox=f"{-_MARGIN} {-_MARGIN} {width} {height}",
    )


def _width(view: View, node: AuditedNode) -> int:
    name = len(elide(node.target, _LONGEST)) * _LETTER
    note = 0.0 if node in view.given else len(_note(view, node)) * _SMALL_LETTER
    return max(round(max(name, note)) + _LEFT + 12, 0 if node in view.given else _NARROWEST)


def _note(view: View, node: AuditedNode) -> str:
    """What stands below a name: the verdict, or what the node differs with."""
    if node.verdict is not Verdict.DIFFERS:
        return WORDS[node.verdict]
    return elide(", ".join(view.blamed_axes(node)) or WORDS[node.verdict], _LONGEST)


def _line(view: View, segment: Segment) -> Markup:
    bend = (segment.x2 - segment.x1) / 2
    path = (
        f"M{segment.x1:g} {segment.y1:g}C{segment.x1 + bend:g} {segment.y1:g} {segment.x2 - bend:g} {segment.y2:g} "
        f"{segment.x2:g} {segment.y2:g}"
    )
    if segment.until != segment.x2:
        path += f"H{segment.until:g}"
    carried = segment.source in view.carriers
    return tag("path", d=path, class_="line carried" if carried else "line")


def _box(view: View, node: AuditedNode, box: Box, layout: Layout) -> Markup:
    x, y = layout.corners[box.key]
    given = node in view.given
    name = elide(node.target, _LONGEST)
    small = box.height == _GIVEN
    said = _KINDS.get(node.kind, node.kind) if given else WORDS[node.verdict]
    if not given and node.verdict is Verdict.DIFFERS:
        said = f"differs: {', '.join(view.blamed_axes(node)) or 'cause unknown'}"
    label = f"{node.target}: {said}{', to blame' if node.origin else ''}"
    classes = f"box {'taken' if given else style_class(node.verdict)}{' origin' if node.origin else ''}"
    return tag(
        "a",
        tag("title", label),
        tag("rect", x=x, y=y, width=box.width, height=box.height, rx=13 if small else 8),
        glyph(style_class(node.verdict), x=x + 10, y=y + (box.height - 16) / 2),
        tag("text", name, x=x + _LEFT, y=y + (17 if small else 20), class_="label"),
        None if small else tag("text", _note(view, node), x=x + _LEFT, y=y + 36, class_="note"),
        _flag(x + box.width, y) if node.origin else None,
        href=f"#{view.anchors[node.drv_hash]}",
        class_=classes,
        role="listitem",
        aria_label=label,
    )


def _flag(right: float, top: float) -> Markup:
    """The mark of an origin, on the upper edge of its box."""
    return join(
        tag("rect", x=right - 66, y=top - 9, width=60, height=16, rx=8, class_="flag"),
        tag("text", "to blame", x=right - 36, y=top + 3, class_="flag-word", text_anchor="middle"),
    )
