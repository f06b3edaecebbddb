"""Draws an audit report as one HTML page that needs nothing else: no network, no fonts; readable without its script.

`view` arranges the report, `layout` places the graph and `drawing` draws it, `evidence` chooses what to show, `words`
are what things are called. The page itself is in templates/; page.css and page.js lie beside.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from functools import cache
from urllib.parse import quote

import vzrepro.base.words
from vzrepro.base import html
from vzrepro.proof.audit.model import REPEAT, AuditReport, Verdict
from vzrepro.proof.audit.page import drawing, evidence, words
from vzrepro.proof.audit.page.view import View, arrange

_ICON_COLOURS = {"ok": "#1a7f4b", "differs": "#b3261e", "failed": "#86226f", "unsure": "#8a5a00", "untested": "#5b6470"}


def render(report: AuditReport) -> str:
    """The whole page; equal reports give equal pages. Raises graphlib.CycleError when inputs go in circles."""
    view = arrange(report)
    count = view.counts[Verdict.REPRODUCED]
    style, script = (html.asset(__package__, name) for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_source(style)}'; script-src '{_source(script)}'; img-src data:; "
    return _template().render(
        view=view,
        title=f"{words.TITLES[view.verdict]}: {count} of {len(view.built)}, {', '.join(report.targets)}",
        icon=_icon(view),
        style=style,
        script=script,
        policy=policy + "base-uri 'none'; form-action 'none'",
    )


@cache
def _template() -> html.Template:
    rooms = (vzrepro.base.words, words, drawing, evidence)
    public = {name: value for room in rooms for name, value in vars(room).items() if not name.startswith("_")}
    names = {**public, "REPEAT": REPEAT, "Verdict": Verdict, "shell": shlex.join}
    return html.template(__package__, "page.html", names)


def _source(text: str) -> str:
    """What a content security policy calls an element with this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _icon(view: View) -> str:
    """The icon of the browser's tab: the verdict's colour and sign, as they are on the page."""
    name = words.style_class(view.verdict)
    image = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-4 -4 24 24"><rect x="-4" y="-4" width="24" height="24" '
        f'rx="6" fill="{_ICON_COLOURS[name]}"/><path d="{words.STROKES[name]}" fill="none" stroke="#fff" '
        'stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round"/></svg>'
    )
    return f"data:image/svg+xml,{quote(image)}"
