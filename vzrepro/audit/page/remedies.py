"""What is to be done: a card for each node that did not reproduce, with the fix or with the command that tells more."""

from __future__ import annotations

from vzrepro.audit.model import REPEAT, AuditedNode, Guess, Verdict
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.view import View
from vzrepro.audit.page.words import badge, command, glyph, listed, plural, style_class

_SHOWN = 8  # cards before the rest is folded


def remedies(view: View) -> Markup:
    """The section "What to do", what differs first."""
    cards = [_to_mend(view, node) for node in view.origins]
    cards += [
        _to_look_at(view, node)
        for verdict in (Verdict.BUILD_FAILED, Verdict.INCONCLUSIVE, Verdict.UNTESTED)
        for node in view.built
        if node.verdict is verdict
    ]
    # First of all: other bytes in a cache may mean that somebody lies.
    cards = ([_to_ask(view)] if view.disagreements else []) + cards
    if not cards:
        words = ("vzrepro", "attest", *view.report.targets, "--key", "FILE")
        cards = [
            tag(
                "li",
                tag("p", tag("strong", "Nothing to mend."), class_="what"),
                tag("p", "Say so with your name: ", command(*words)),
                class_="card ok",
            )
        ]
    more = None
    if len(cards) > _SHOWN + 1:
        rest = tag("ol", *cards[_SHOWN:], class_="cards")
        more = tag("details", tag("summary", f"{len(cards) - _SHOWN} more"), rest, class_="plain")
        cards = cards[:_SHOWN]
    return tag("section", tag("h2", "What to do"), tag("ol", *cards, class_="cards"), more, aria_label="What to do")


def blamed(view: View, node: AuditedNode) -> Markup:
    """What an origin's output changes with, to be read after "with"."""
    axes = view.blamed_axes(node)
    names = {axis: "nothing varied" if axis == REPEAT else axis for axis in axes}
    links = [tag("a", names[axis], href=f"#{view.cell_anchor(node, axis)}") for axis in axes]
    return listed(links) if links else join("an axis that is not known yet")


def _to_ask(view: View) -> Markup:
    targets = dict.fromkeys(each.target for each in view.disagreements)
    caches = sorted({each.cache for each in view.disagreements})
    return tag(
        "li",
        tag(
            "p",
            tag("span", glyph("differs"), "other bytes", class_="badge differs"),
            f" for {plural(len(targets), 'node')} ",
            tag("a", "in other caches", href="#against"),
            class_="what",
        ),
        tag(
            "p", "See who has built what: ", command("vzrepro", "challenge", next(iter(targets)), "--against", *caches)
        ),
        class_="card differs",
    )


def _to_mend(view: View, node: AuditedNode) -> Markup:
    axes = view.blamed_axes(node)
    fixes: dict[tuple[str, str], list[str]] = {}
    for guess in _guesses(view, node):
        fixes.setdefault((guess.cause, guess.fix), []).append(guess.evidence)
    # Without an axis there is still something to find out, whatever the bytes look like.
    again = None
    if not fixes or not axes:
        varied = [axis for axis in axes if axis != REPEAT]
        option = ["--axes", ",".join(varied), "--fresh"] if varied else ["--fresh"] if axes else []
        what = "See it again: " if axes else "Find the axis: "
        again = tag("p", what, command("vzrepro", "audit", node.target, *option), class_="soft")
    reasons = [] if fixes else dict.fromkeys(node.cells[axis].reason for axis in axes if axis in node.cells)
    return tag(
        "li",
        tag("p", badge(node.verdict), " ", view.link(node), " with ", blamed(view, node), class_="what"),
        *(_fix(cause, fix, evidence) for (cause, fix), evidence in fixes.items()),
        *(tag("p", reason) for reason in reasons if reason),
        again,
        class_="card differs",
    )


def _guesses(view: View, node: AuditedNode) -> list[Guess]:
    """Those about the node's causes; while no axis is known as the cause, those about its differences."""
    if node.causes:
        return [cause.guess for cause in node.causes if cause.guess is not None]
    names = dict.fromkeys(rebuild.explanation for rebuild in node.rebuilds if rebuild.explanation)
    explanations = view.report.explanations
    return [guess for name in names if name in explanations for guess in explanations[name].guesses]


def _fix(cause: str, fix: str, evidence: list[str]) -> Markup:
    return tag(
        "p",
        tag("span", cause, class_="chip"),
        " ",
        tag("strong", fix),
        *(tag("span", found, class_="seen") for found in dict.fromkeys(evidence)),
    )


def _to_look_at(view: View, node: AuditedNode) -> Markup:
    cells = [(axis, cell) for axis, cell in view.cells(node) if cell.verdict is node.verdict and cell.reason]
    axis, reason = (cells[0][0].name, cells[0][1].reason) if cells else (REPEAT, None)
    on_axis = axis != REPEAT and node.verdict is not Verdict.UNTESTED
    where = tag("a", axis, href=f"#{view.cell_anchor(node, axis)}")
    option = ["--axes", axis] if on_axis else []
    return tag(
        "li",
        tag("p", badge(node.verdict), " ", view.link(node), join(" with ", where) if on_axis else None, class_="what"),
        tag("p", reason) if reason else None,
        tag("p", "Try it again: ", command("vzrepro", "audit", node.target, *option, "--fresh"), class_="soft"),
        class_=f"card {style_class(node.verdict)}",
    )
