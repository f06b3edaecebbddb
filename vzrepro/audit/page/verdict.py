"""The head of the audit page: the verdict in a sentence, the counts, and what is to be done about it."""

from __future__ import annotations

from vzrepro.audit.model import REPEAT, AuditedNode, Verdict
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.remedies import blamed, remedies
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import (
    MEANINGS,
    ORDER,
    WORDS,
    duration,
    glyph,
    listed,
    moment,
    plural,
    style_class,
)

_TITLES = {
    Verdict.REPRODUCED: "Reproducible",
    Verdict.DIFFERS: "Not reproducible",
    Verdict.BUILD_FAILED: "Does not build again",
    Verdict.INCONCLUSIVE: "Not proven",
    Verdict.UNTESTED: "Not fully tested",
}
_NAMED = 5  # nodes that a sentence names before it counts
_LONG_TITLE = 70  # characters


def head(view: View) -> Markup:
    """The whole head."""
    report = view.report
    verdict = view.verdict
    title = ", ".join(report.targets)
    known = sum(len(node.rebuilds) for node in report.nodes)
    spent = sum(rebuild.milliseconds for rebuild in view.made)
    facts = join(
        moment(report.finished),
        f"{plural(len(view.made), 'rebuild')} in {duration(spent)}",
        f"{known - len(view.made):,} from earlier audits" if known > len(view.made) else None,
        "one axis per rebuild" if report.mode == "alone" else "all axes in one rebuild",
        join("audit ", tag("code", report.id)),
        by=" · ",
    )
    return tag(
        "header",
        tag("p", "Reproducibility audit", class_="eyebrow"),
        tag("h1", title, class_="long" if len(title) > _LONG_TITLE else None),
        tag("p", facts, class_="soft"),
        tag(
            "div",
            tag("p", glyph(style_class(verdict), size=22), _TITLES[verdict], class_="stamp"),
            tag("p", _lead(view), class_="lead"),
            tag("p", rest, class_="rest") if (rest := _rest(view)) else None,
            id="verdict",
            class_=f"verdict {style_class(verdict)}",
        ),
        _tiles(view),
        remedies(view),
    )


def plain(view: View) -> str:
    """The verdict in a few words, for the page's title."""
    count = view.counts.get(Verdict.REPRODUCED, 0)
    return f"{_TITLES[view.verdict]}: {count} of {len(view.built)}, {', '.join(view.report.targets)}"


def _lead(view: View) -> Markup:
    """How many reproduced, and who is to blame for the others."""
    count, total = view.counts.get(Verdict.REPRODUCED, 0), len(view.built)
    said = [tag("strong", f"{count} of {plural(total, 'node')} reproduced.")]
    if view.origins:
        said.append(_blame(view))
    if view.verdict is Verdict.REPRODUCED:
        said.append(join("Every byte came out the same again", _on_axes(view), "."))
    return join(*said, by=" ")


def _rest(view: View) -> Markup:
    """What else stands in the way of trusting the targets."""
    said = []
    for verdict, verb in (
        (Verdict.BUILD_FAILED, "did not build again"),
        (Verdict.INCONCLUSIVE, "could not be judged"),
        (Verdict.UNTESTED, "{} not tested"),
    ):
        found = [node for node in view.built if node.verdict is verdict]
        if found:
            said.append(join(_named(view, found), " ", verb.format("was" if len(found) == 1 else "were"), "."))
    if view.disagreements:
        caches = sorted({each.cache for each in view.disagreements})
        count = len({each.target for each in view.disagreements})
        said.append(
            join(listed(caches), f" {'has' if len(caches) == 1 else 'have'} other bytes for {plural(count, 'node')}.")
        )
    if not view.report.complete:
        said.append(join("The audit was interrupted: these are its verdicts so far."))
    return join(*said, by=" ")


def _blame(view: View) -> Markup:
    """Who, on which axis, and what that means for the targets."""
    origins = view.origins
    if len(origins) == 1:
        who = join(view.link(origins[0]), " is to blame: its output changes with ", blamed(view, origins[0]), ".")
    else:
        names = [join(view.link(node), " (", blamed(view, node), ")") for node in origins[:_NAMED]]
        more = [f"{len(origins) - _NAMED} more"] if len(origins) > _NAMED else []
        who = join(listed([*names, *more]), " are to blame.")
    targets = [
        node
        for node in view.nodes.values()
        if node.target in view.report.targets and node.drv_hash in view.carriers and not node.origin
    ]
    if not targets:
        return who
    # "With" may be a tool or a part: either way nobody can vouch for these bytes by rebuilding.
    it = "it" if len(origins) == 1 else "what differs"
    verb = "is" if len(targets) == 1 else "are"
    return join(who, " ", listed([node.target for node in targets]), f" {verb} built with {it}.")


def _named(view: View, nodes: list[AuditedNode]) -> Markup:
    names = [view.link(node) for node in nodes[:_NAMED]]
    return listed([*names, f"{len(nodes) - _NAMED} more"] if len(nodes) > _NAMED else names)


def _on_axes(view: View) -> Markup:
    tested = {axis.name for node in view.built for axis, cell in view.cells(node) if cell.verdict is Verdict.REPRODUCED}
    tested.discard(REPEAT)
    if not tested:
        return join(", with nothing varied")
    open_ = [axis.name for axis in view.columns if axis.name != REPEAT and axis.name not in tested]
    rest = join("; ", listed(open_), " could not be varied") if 0 < len(open_) <= _NAMED else None
    return join(f" on {plural(len(tested), 'axis', 'axes')}", rest)


def _tiles(view: View) -> Markup:
    tiles = [
        tag(
            "li",
            glyph(style_class(verdict), size=18),
            tag("b", str(view.counts[verdict])),
            tag("span", WORDS[verdict]),
            class_=f"tile {style_class(verdict)}{'' if view.counts[verdict] else ' none'}",
            title=MEANINGS[verdict],
        )
        for verdict in (Verdict.REPRODUCED, *ORDER[:-1])
    ]
    return tag("ul", *tiles, class_="tiles", aria_label="Nodes by verdict")
