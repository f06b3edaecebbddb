"""The rest of the audit page: axes, the trusted seed, the builder, what other caches have, and earlier audits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from vzrepro.audit.model import REPEAT, Against, PastAudit, Verdict
from vzrepro.audit.page.evidence import facts
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import (
    ORDER,
    WORDS,
    badge,
    glyph,
    moment,
    plural,
    short,
    size,
    style_class,
)

_BAR = 160  # px that all nodes of an audit, or the largest image, take


def against(view: View) -> Markup | None:
    """What other caches have; those that agree are folded."""
    rows = view.report.against
    if not rows:
        return None
    parts = []
    for cache, each in groupby(sorted(rows, key=lambda row: row.cache), key=lambda row: row.cache):
        found = list(each)
        other = [row for row in found if row.agrees is False]
        same = [row for row in found if row.agrees]
        none = [row for row in found if row.agrees is None]
        said = [plural(len(same), "node") + " the same"]
        said += [f"{len(other)} with other bytes"] if other else []
        said += [f"{len(none)} not there"] if none else []
        verdict = "differs" if other else "ok"
        parts.append(tag("h3", glyph(verdict), tag("span", cache), class_=f"cache {verdict}"))
        parts.append(tag("p", ", ".join(said), class_="soft"))
        if other:
            parts.append(_compared(view, other, f"Other bytes in {cache}"))
        rest = [*same, *none]
        if rest:
            summary = tag("summary", "The other nodes" if other else "All nodes")
            parts.append(tag("details", summary, _compared(view, rest, f"Nodes in {cache}"), class_="plain"))
    return _section("against", "What other caches have", *parts)


def _compared(view: View, rows: Sequence[Against], caption: str) -> Markup:
    ours = {node.target: node.nar_hash for node in view.report.nodes}
    lines = []
    for row in rows:
        if row.agrees is None:
            said = join(glyph("untested"), "not there")
        else:
            said = join(glyph("ok"), "the same") if row.agrees else join(glyph("differs"), "differs")
        lines.append(
            (
                row.target,
                tag("span", said, class_=f"badge {_agreement(row)}"),
                short(row.nar_hash) if row.nar_hash else "",
                short(ours[row.target]) if row.target in ours else "",
                join(*map(str, row.signers), by=", "),
            )
        )
    return _table(caption, ("Node", "Result", "There", "Here", "Signed by"), lines)


def _agreement(row: Against) -> str:
    return "untested" if row.agrees is None else "ok" if row.agrees else "differs"


def history(view: View) -> Markup | None:
    """Earlier audits, newest first, with this one marked."""
    rows = sorted(view.report.history, key=lambda past: (past.finished, past.id), reverse=True)
    if not rows:
        return None
    lines = [
        (
            join(moment(past.finished), tag("span", "this one", class_="chip") if past.id == view.report.id else None),
            badge(past.verdict),
            join(_bar(past), _counted(past)),
            ", ".join(past.targets),
            "one axis each" if past.mode == "alone" else "all at once",
            tag("code", past.id),
        )
        for past in rows
    ]
    return _section(
        "history",
        "Earlier audits",
        _table("Earlier audits", ("Finished", "Verdict", "Nodes", "Targets", "Axes", "Id"), lines),
    )


def _nodes_of(past: PastAudit) -> list[tuple[Verdict, int]]:
    return [(verdict, past.nodes[verdict]) for verdict in reversed(ORDER) if past.nodes.get(verdict)]


def _bar(past: PastAudit) -> Markup:
    """The audit's nodes as a bar, reproduced ones first."""
    found = _nodes_of(past)
    total = sum(count for _, count in found) or 1
    bars, at = [], 0.0
    for verdict, count in found:
        width = count / total * _BAR
        bars.append(
            tag(
                "rect",
                x=round(at, 1),
                y=0,
                width=round(max(width - 1, 1), 1),
                height=10,
                rx=2,
                class_=style_class(verdict),
            )
        )
        at += width
    return tag("svg", *bars, class_="bar", width=_BAR, height=10, aria_hidden="true")


def _counted(past: PastAudit) -> Markup:
    return tag("span", ", ".join(f"{count} {WORDS[verdict]}" for verdict, count in _nodes_of(past)), class_="small")


def axes(view: View) -> Markup:
    """What was varied, how, and how it shows that it took effect."""
    lines = [
        (tag("b", axis.name), axis.about, axis.applied, axis.proof) for axis in view.columns if axis.name != REPEAT
    ]
    return _section(
        "axes",
        "What was varied",
        tag("p", f"The column {REPEAT} is a rebuild with nothing varied on purpose.", class_="soft"),
        _table("Axes", ("Axis", "What is varied", "How", "Shown to take effect by"), lines, class_="prose"),
    )


def seed(view: View) -> Markup:
    """The binaries that no audit rebuilds."""
    found = view.report.seed
    largest = max((image.bytes for image in found.images), default=1) or 1
    lines = [
        (
            tag("b", image.target),
            f"{image.packages:,}",
            join(
                tag(
                    "svg",
                    tag("rect", x=0, y=0, width=round(image.bytes / largest * _BAR, 1), height=10, rx=2, class_="seed"),
                    class_="bar",
                    width=_BAR,
                    height=10,
                    aria_hidden="true",
                ),
                tag("span", size(image.bytes)),
            ),
        )
        for image in found.images
    ]
    return _section(
        "seed",
        "The trusted seed",
        tag(
            "p",
            tag("strong", f"{plural(found.packages, 'Debian package')}, {size(found.bytes)}"),
            ": binaries that everything here rests on and that this audit does not rebuild. They are pinned by hash in "
            "lock.toml; a package in several images is counted once in the sum.",
        ),
        _table("The toolchain images", ("Image", "Packages", "Size"), lines) if lines else None,
    )


def builder(view: View) -> Markup:
    """Who has audited, on what, and how."""
    report = view.report
    rows = [
        *report.builder.items(),
        ("targets", ", ".join(report.targets)),
        ("mode", "one axis per rebuild" if report.mode == "alone" else "all axes in one rebuild (--quick)"),
        (
            "depth",
            "images and downloads made again, too (--deep)" if report.deep else "images and downloads as they are",
        ),
        ("rounds", plural(report.rounds, "value") + " per axis"),
        ("started", moment(report.started)),
        ("finished", moment(report.finished)),
        ("complete", "yes" if report.complete else "no: it was interrupted"),
    ]
    return _section("builder", "Who audited, on what", facts(rows))


def _section(id_: str, title: str, *parts: str | None) -> Markup:
    return tag("section", tag("h2", title), *parts, id=id_, aria_label=title)


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None) -> Markup:
    """A table that becomes a list of cards where there is no room; each cell carries its column's name for that."""
    lines = [
        join(
            tag(
                "tr",
                tag("th", row[0], scope="row"),
                *(tag("td", cell, data_name=name) for name, cell in zip(head[1:], row[1:], strict=True)),
            ),
            "\n",
        )
        for row in rows
    ]
    return tag(
        "table",
        tag("caption", caption, class_="hidden"),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *lines),
        class_=f"list {class_ or ''}".rstrip(),
    )
