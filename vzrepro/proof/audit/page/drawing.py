"""The graph of nodes as boxes and lines to be drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vzrepro.base.html import elide
from vzrepro.proof.audit.model import AuditedNode, Verdict
from vzrepro.proof.audit.page.layout import Box, Segment, layered
from vzrepro.proof.audit.page.view import View
from vzrepro.proof.audit.page.words import WORDS, style_class

LEFT = 34
"""Pixels before the words of a box."""

_LETTER = 7.3  # px that a letter of a name takes: 12 px of a fixed-width font
_SMALL_LETTER = 6.2
_LONGEST = 28
_BUILT, _GIVEN = 46, 26  # px of height
_NARROWEST = 128
_MARGIN = 12
_KINDS = {"image": "toolchain image", "fetch": "download", "local": "local files"}


@dataclass(frozen=True, slots=True)
class NodeBox:
    """A node's box, in pixels: `note` stands below the `name` and is missing for what is given; `label` is read aloud,
    `style` its CSS classes."""

    node: AuditedNode
    x: float
    y: float
    width: int
    height: int
    name: str
    note: str | None
    label: str
    style: str


@dataclass(frozen=True, slots=True)
class Line:
    """A part of an edge, as an SVG path; `carried` when what differs goes along it."""

    path: str
    carried: bool


@dataclass(frozen=True, slots=True)
class Drawing:
    """All of it, in pixels; what is carried comes last, to lie on top."""

    width: int
    height: int
    view_box: str
    lines: tuple[Line, ...]
    boxes: tuple[NodeBox, ...]


def draw(view: View, among: Sequence[AuditedNode]) -> Drawing:
    """Draw the nodes that are `among` these."""
    nodes = [node for node in view.report.nodes if node in among]
    boxes = [Box(node.drv_hash, _width(view, node), _GIVEN if node in view.given else _BUILT) for node in nodes]
    layout = layered(boxes, [(drv, node.drv_hash) for node in nodes for drv in node.inputs.values()])
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    lines = [Line(_path(segment), segment.source in view.carriers) for segment in layout.segments]
    placed = [_box(view, node, box, layout.corners[box.key]) for node, box in zip(nodes, boxes, strict=True)]
    return Drawing(
        width,
        height,
        f"{-_MARGIN} {-_MARGIN} {width} {height}",
        tuple(sorted(lines, key=lambda line: line.carried)),
        tuple(placed),
    )


def _width(view: View, node: AuditedNode) -> int:
    name = len(elide(node.target, _LONGEST)) * _LETTER
    note = 0.0 if node in view.given else len(_note(view, node)) * _SMALL_LETTER
    return max(round(max(name, note)) + LEFT + 12, 0 if node in view.given else _NARROWEST)


def _note(view: View, node: AuditedNode) -> str:
    """What stands below a name: the verdict, or what the node differs with."""
    if node.verdict is not Verdict.DIFFERS:
        return WORDS[node.verdict]
    return elide(", ".join(view.blamed_axes(node)) or WORDS[node.verdict], _LONGEST)


def _path(segment: Segment) -> str:
    bend = (segment.x2 - segment.x1) / 2
    path = (
        f"M{segment.x1:g} {segment.y1:g}C{segment.x1 + bend:g} {segment.y1:g} {segment.x2 - bend:g} {segment.y2:g} "
        f"{segment.x2:g} {segment.y2:g}"
    )
    return path if segment.until == segment.x2 else f"{path}H{segment.until:g}"


def _box(view: View, node: AuditedNode, box: Box, corner: tuple[float, float]) -> NodeBox:
    given = node in view.given
    said = _KINDS.get(node.kind, node.kind) if given else WORDS[node.verdict]
    if not given and node.verdict is Verdict.DIFFERS:
        said = f"differs: {', '.join(view.blamed_axes(node)) or 'cause unknown'}"
    return NodeBox(
        node,
        *corner,
        box.width,
        box.height,
        elide(node.target, _LONGEST),
        None if given else _note(view, node),
        f"{node.target}: {said}{', to blame' if node.origin else ''}",
        f"box {'taken' if given else style_class(node.verdict)}{' origin' if node.origin else ''}",
    )
