"""Draws an audit report as one HTML page that needs nothing else: no network, no fonts; readable without its script.

`view` arranges the report, `layout` places the graph; `verdict`, `remedies`, `drawing`, `matrix`, `evidence` and
`surroundings` write the sections; `markup` is the only place that makes HTML of text. page.css and page.js lie beside.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from urllib.parse import quote

from vzrepro.audit.model import Report
from vzrepro.audit.page import drawing, evidence, matrix, surroundings, verdict
from vzrepro.audit.page.markup import Markup, join, tag
from vzrepro.audit.page.view import View, arrange
from vzrepro.audit.page.words import command, strokes, style_class, symbols

_ICON_COLOURS = {"ok": "#1a7f4b", "differs": "#b3261e", "failed": "#86226f", "unsure": "#8a5a00", "untested": "#5b6470"}


def render(report: Report) -> str:
    """The whole page; equal reports give equal pages. Raises graphlib.CycleError when inputs go in circles."""
    view = arrange(report)
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_source(style)}'; script-src '{_source(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", verdict.plain(view)),
        tag("link", rel="icon", href=_icon(view)),
        tag("style", Markup(style)),
    )
    sections = [
        drawing.switch(view),
        drawing.graph(view),
        matrix.matrix(view),
        evidence.nodes(view),
        surroundings.against(view),
        surroundings.history(view),
        surroundings.axes(view),
        surroundings.seed(view),
        surroundings.builder(view),
    ]
    body = tag(
        "body",
        symbols(),
        tag("a", "Skip to the evidence", href="#evidence", class_="skip"),
        _navigation(view),
        tag("main", verdict.head(view), *sections),
        _foot(view),
        tag("script", Markup(script)),
        class_=f"page-{style_class(view.verdict)}",
    )
    return join(Markup("<!doctype html>\n"), tag("html", head, body, lang="en"), Markup("\n"))


def _navigation(view: View) -> Markup:
    links = [("#verdict", "Verdict"), ("#graph", "Graph"), ("#matrix", "Axes × nodes"), ("#evidence", "Evidence")]
    links += [("#against", "Caches")] if view.report.against else []
    links += [("#history", "History")] if view.report.history else []
    links += [("#axes", "Axes"), ("#seed", "Seed"), ("#builder", "Builder")]
    return tag("nav", *(tag("a", name, href=href) for href, name in links), aria_label="Sections")


def _foot(view: View) -> Markup:
    return tag(
        "footer",
        tag("p", "The same as data: ", command("vzrepro", "audit", "show", view.report.id, "--json")),
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _source(text: str) -> str:
    """What a content security policy calls an element with this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _icon(view: View) -> str:
    """The icon of the browser's tab: the verdict's colour and sign, as they are on the page."""
    name = style_class(view.verdict)
    image = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 24 24"><rect x="-4" y="-4" width="24" height="24" '
        f'rx="6" fill="{_ICON_COLOURS[name]}"/><path d="{strokes(name)}" fill="none" stroke="#fff" stroke-width="2.4" '
        'stroke-linecap="round" stroke-linejoin="round"/></svg>'
    )
    return f"data:image/svg+xml,{quote(image)}"
