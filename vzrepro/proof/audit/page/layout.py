"""Places a graph in columns: what is built first on the left, targets on the right, few crossings, no overlaps.

The way of Sugiyama, Tagawa and Toda (1981): columns by longest path, order in a column by barycentres, positions by
least squares. All of an input's edges share one rail, so that a node that many use does not fan out over the drawing.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter

_SWEEPS = 16
_RAIL_WEIGHT = 4.0  # a rail's wish to be straight, beside a box's


@dataclass(frozen=True, slots=True)
class Box:
    """A node to be placed; `width` and `height` in pixels."""

    key: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of `source`'s rail between two columns, in pixels. `target` is the box it ends at, None between."""

    source: str
    target: str | None
    x1: float
    y1: float
    x2: float
    y2: float
    until: float
    """How far it goes on level after x2: through a column that it only passes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawing of `width` × `height` pixels: each box's top left corner by key, and the edges' segments."""

    width: int
    height: int
    corners: Mapping[str, tuple[float, float]]
    segments: tuple[Segment, ...]


@dataclass(eq=False, slots=True)
class _Item:
    """A box, or the place where a rail passes a column."""

    source: str
    column: int
    height: int
    box: bool
    y: float = 0.0
    befores: tuple[_Item, ...] = ()
    afters: tuple[_Item, ...] = ()


def layered(boxes: Sequence[Box], edges: Iterable[tuple[str, str]], *, across: int = 48, down: int = 12) -> Layout:
    """Place `boxes`; an edge goes from an input to what is built with it. `across` and `down` are the gaps in pixels.

    Equal arguments give equal drawings; the order of `boxes` decides between equally good ones. Edges to or from
    what is no box are left out. Raises graphlib.CycleError when the graph has a cycle.
    """
    if not boxes:
        return Layout(0, 0, {}, ())
    users = _users([box.key for box in boxes], edges)
    column_of = _columns(users)
    items = {box.key: _Item(box.key, column_of[box.key], box.height, True) for box in boxes}
    columns: list[list[_Item]] = [[] for _ in range(max(column_of.values()) + 1)]
    links: list[tuple[_Item, _Item]] = []
    for box in boxes:
        columns[column_of[box.key]].append(items[box.key])
        links += _rail(items[box.key], [items[user] for user in users[box.key]], columns)
    _connect(links)
    _order(columns)
    _position(columns, down)
    return _drawn(boxes, items, columns, links, across)


def _users(keys: Sequence[str], edges: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    known = {key: number for number, key in enumerate(keys)}
    users: dict[str, set[str]] = {key: set() for key in keys}
    for source, user in edges:
        if source in known and user in known:
            users[source].add(user)
    return {key: sorted(users[key], key=known.__getitem__) for key in keys}


def _columns(users: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """As far to the right as what uses a node allows: edges get short, and roots stand together."""
    to_the_end: dict[str, int] = {}
    for key in TopologicalSorter(users).static_order():
        to_the_end[key] = max((to_the_end[user] + 1 for user in users[key]), default=0)
    deepest = max(to_the_end.values())
    return {key: deepest - steps for key, steps in to_the_end.items()}


def _rail(source: _Item, users: Sequence[_Item], columns: list[list[_Item]]) -> list[tuple[_Item, _Item]]:
    """Lead one rail as far as the farthest user needs it; each user branches off just before its column."""
    farthest = max((user.column for user in users), default=0)
    stops = {source.column: source}
    for column in range(source.column + 1, farthest):
        stops[column] = _Item(source.source, column, 2, False)
        columns[column].append(stops[column])
    along = list(stops.values())
    return [*itertools.pairwise(along), *((stops[user.column - 1], user) for user in users)]


def _connect(links: Sequence[tuple[_Item, _Item]]) -> None:
    for before, after in links:
        before.afters += (after,)
        after.befores += (before,)


def _order(columns: list[list[_Item]]) -> None:
    """Reorder each column in place; the best of all sweeps stays."""
    best, fewest = [list(column) for column in columns], _crossings(columns)
    for sweep in range(_SWEEPS):
        forward = sweep % 2 == 0
        for number in range(1, len(columns)) if forward else range(len(columns) - 2, -1, -1):
            place = {id(item): at for at, item in enumerate(columns[number - 1 if forward else number + 1])}
            centres = {
                id(item): _mean([place[id(each)] for each in (item.befores if forward else item.afters)], at)
                for at, item in enumerate(columns[number])
            }
            columns[number].sort(key=lambda item: centres[id(item)])
        found = _crossings(columns)
        if found < fewest:
            best, fewest = [list(column) for column in columns], found
    columns[:] = best


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _crossings(columns: Sequence[Sequence[_Item]]) -> int:
    count = 0
    for column, following in itertools.pairwise(columns):
        place = {id(item): at for at, item in enumerate(following)}
        ends: list[int] = []
        for item in column:
            reached = sorted(place[id(after)] for after in item.afters)
            count += sum(len(ends) - bisect_left(ends, end + 1) for end in reached)
            for end in reached:
                insort(ends, end)
    return count


def _position(columns: Sequence[Sequence[_Item]], gap: int) -> None:
    """Set every item's centre `y`: near its neighbours, in its column's order, nothing above 0."""
    for column in columns:
        at = 0.0
        for item in column:
            item.y = at + item.height / 2
            at += item.height + gap
    for sweep in range(_SWEEPS):
        for column in columns if sweep % 2 == 0 else columns[::-1]:
            wishes = [_mean([each.y for each in (*item.befores, *item.afters)], item.y) for item in column]
            weights = [1.0 if item.box else _RAIL_WEIGHT for item in column]
            for item, y in zip(column, _apart(column, wishes, weights, gap), strict=True):
                item.y = y
    top = min(item.y - item.height / 2 for column in columns for item in column)
    for column in columns:
        for item in column:
            item.y = round(item.y - top, 1)


def _apart(column: Sequence[_Item], wishes: Sequence[float], weights: Sequence[float], gap: int) -> list[float]:
    """The positions nearest to `wishes` (weighted least squares) that keep the order and the gaps.

    With the least distances taken off it is an isotonic regression: pool adjacent violators.
    """
    least = [0.0]
    for upper, lower in itertools.pairwise(column):
        least.append(least[-1] + (upper.height + lower.height) / 2 + gap)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for wish, weight, offset in zip(wishes, weights, least, strict=True):
        mean, sum_, count = wish - offset, weight, 1
        while pools and pools[-1][0] > mean:
            before, its_weight, its_count = pools.pop()
            mean = (mean * sum_ + before * its_weight) / (sum_ + its_weight)
            sum_, count = sum_ + its_weight, count + its_count
        pools.append((mean, sum_, count))
    flat = [mean for mean, _, count in pools for _ in range(count)]
    return [mean + offset for mean, offset in zip(flat, least, strict=True)]


def _drawn(
    boxes: Sequence[Box],
    items: Mapping[str, _Item],
    columns: Sequence[Sequence[_Item]],
    links: Sequence[tuple[_Item, _Item]],
    across: int,
) -> Layout:
    widths = {box.key: box.width for box in boxes}
    spans: list[tuple[int, int]] = []
    at = 0
    for column in columns:
        wide = max(widths[item.source] if item.box else 0 for item in column)
        spans.append((at, at + wide))
        at += wide + across
    corners = {
        box.key: (float(spans[items[box.key].column][0]), round(items[box.key].y - box.height / 2, 1)) for box in boxes
    }
    arrivals = _arrivals(items.values())
    segments = []
    for before, after in links:
        left = spans[before.column][0] + widths[before.source] if before.box else spans[before.column][1]
        right, end = spans[after.column]
        segments.append(
            Segment(
                before.source,
                after.source if after.box else None,
                float(left),
                before.y,
                float(right),
                arrivals[after.source, before.source] if after.box else after.y,
                float(right if after.box else end),
            )
        )
    bottom = max(item.y + item.height / 2 for column in columns for item in column)
    return Layout(spans[-1][1], round(bottom), corners, tuple(segments))


def _arrivals(items: Iterable[_Item]) -> dict[tuple[str, str], float]:
    """Where edges meet a box's left side: beside each other, in the order that they come from."""
    found = {}
    for item in items:
        room = min(8.0, (item.height - 12) / max(len(item.befores), 1))
        for number, before in enumerate(sorted(item.befores, key=lambda each: each.y)):
            found[item.source, before.source] = round(item.y + (number - (len(item.befores) - 1) / 2) * room, 1)
    return found
