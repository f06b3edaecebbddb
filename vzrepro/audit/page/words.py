"""What the audit page calls things: verdicts with their signs, times, sizes, hashes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from vzrepro.audit.model import Cell, Verdict
from vzrepro.audit.page.markup import Markup, join, tag

WORDS = {
    Verdict.REPRODUCED: "reproduced",
    Verdict.DIFFERS: "differs",
    Verdict.BUILD_FAILED: "build failed",
    Verdict.INCONCLUSIVE: "inconclusive",
    Verdict.UNTESTED: "untested",
}
MEANINGS = {
    Verdict.REPRODUCED: "rebuilt, and every byte is the same",
    Verdict.DIFFERS: "rebuilt, and other bytes came out",
    Verdict.BUILD_FAILED: "the rebuild did not succeed",
    Verdict.INCONCLUSIVE: "could not be judged; the reason is given",
    Verdict.UNTESTED: "not tried",
}
ORDER = (
    Verdict.DIFFERS,
    Verdict.BUILD_FAILED,
    Verdict.INCONCLUSIVE,
    Verdict.UNTESTED,
    Verdict.REPRODUCED,
)
HELD = "held"
"""The sixth kind of cell: UNTESTED since the recipe keeps the axis constant."""

_CLASSES = {
    Verdict.REPRODUCED: "ok",
    Verdict.DIFFERS: "differs",
    Verdict.BUILD_FAILED: "failed",
    Verdict.INCONCLUSIVE: "unsure",
    Verdict.UNTESTED: "untested",
}
# Strokes in a square of 16, so that no font decides how a verdict looks.
_STROKES = {
    "ok": "M3 8.5 6.5 12 13 4.5",
    "differs": "M3 6h10M3 10h10M10.5 2.5l-5 11",
    "failed": "M8 2.5v7M8 12.6v.8",
    "unsure": "M5.2 5.6a2.8 2.8 0 1 1 4.3 2.4Q8 8.9 8 10M8 12.9v.6",
    "untested": "M4.5 8h7",
    HELD: "M4 7.5h8v6H4zM5.7 7.5V5a2.3 2.3 0 0 1 4.6 0v2.5",
}


def symbols() -> Markup:
    """The signs, to stand once in a page before `glyph` is used."""
    shapes = (
        tag("symbol", tag("path", d=path), id=f"g-{name}", viewBox="0 0 16 16") for name, path in _STROKES.items()
    )
    return tag("svg", *shapes, class_="symbols", width=0, height=0, aria_hidden="true")


def strokes(name: str) -> str:
    """The path of a class's sign, to be stroked in a square of 16."""
    return _STROKES[name]


def style_class(verdict: Verdict) -> str:
    """The CSS class that colours a verdict, and the name of its sign."""
    return _CLASSES[verdict]


def is_held(cell: Cell) -> bool:
    """Whether the axis was not tried because the recipe keeps it constant. One that differs all the same is not."""
    return cell.held is not None and cell.verdict is Verdict.UNTESTED


def cell_class(cell: Cell | None) -> str:
    """As `style_class`, for a cell of the matrix."""
    if cell is None:
        return _CLASSES[Verdict.UNTESTED]
    return HELD if is_held(cell) else _CLASSES[cell.verdict]


def cell_word(cell: Cell | None) -> str:
    """What a cell says, in words."""
    if cell is None:
        return WORDS[Verdict.UNTESTED]
    return "held constant" if is_held(cell) else WORDS[cell.verdict]


def glyph(name: str, *, x: float | None = None, y: float | None = None, size: int = 16) -> Markup:
    """The sign of a class; it says nothing to a screen reader, so a word must stand beside it."""
    use = tag("use", href=f"#g-{name}")
    return tag("svg", use, class_="glyph", x=x, y=y, width=size, height=size, aria_hidden="true")


def badge(verdict: Verdict) -> Markup:
    """A verdict's sign and word."""
    return tag("span", glyph(style_class(verdict)), WORDS[verdict], class_=f"badge {style_class(verdict)}")


def duration(milliseconds: int) -> str:
    """In the two largest units: `0.8 s`, `41 s`, `8 min 32 s`, `3 h 29 min`."""
    seconds = milliseconds / 1000
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Bytes in decimal units, as the console writes them."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count} B"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 node`, `15 nodes`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(names: Sequence[str | Markup], last: str = "and") -> Markup:
    """`a`, `a and b`, `a, b and c`."""
    if len(names) < 2:
        return join(*names)
    return join(join(*names[:-1], by=", "), f" {last} ", names[-1])


def moment(value: str) -> Markup:
    """A time of day in UTC, to the minute; something else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)\S*", value)
    return tag("time", f"{found[1]} {found[2]} UTC", datetime=value) if found else join(value)


def short(digest: str) -> Markup:
    """The start of a hash, the whole of it to be pointed at."""
    return tag("code", digest[:12], title=digest, class_="hash")


def command(*words: str) -> Markup:
    """A command to copy, quoted for a shell: nobody should run a node's name."""
    return tag("code", shlex.join(words), class_="command")
