"""Builds HTML so that text can never become markup: every string is escaped unless this module has made it."""

from __future__ import annotations

import html
import re
import unicodedata

_LONGEST_LINE = 4000  # characters; more of one line helps nobody and makes browsers slow
_EMPTY = frozenset({"col", "input", "link", "meta", "path", "rect", "use"})
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Characters that reorder or hide what stands around them, and halves of pairs, which no file can hold.
_INVISIBLE = re.compile("[\ud800-\udfff\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Markup(str):
    """HTML that goes into a page as it is."""

    __slots__ = ()


def text(value: str) -> Markup:
    """`value` to be read: escaped, without colours of terminals, other control characters and those that reorder or
    hide text written as `\\x1b` and `\\u202e`, and endless lines cut."""
    if value.isascii() and value.isprintable() and len(value) <= _LONGEST_LINE:
        return Markup(html.escape(value))
    value = _COLOUR.sub("", value.replace("\r\n", "\n"))
    value = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", value)
    value = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)
    if len(value) > _LONGEST_LINE:
        value = "\n".join(map(_cut, value.split("\n")))
    return Markup(html.escape(value))


def _cut(line: str) -> str:
    more = len(line) - _LONGEST_LINE
    return line if more <= 0 else f"{line[:_LONGEST_LINE]} … {more:,} characters more"


def tag(name: str, /, *children: str | None, **attributes: str | int | float | bool | None) -> Markup:
    """The element `name`. Children that are no Markup are escaped; None is nothing.

    `class_` is the attribute class, `aria_label` aria-label. True gives one without a value, None and False give none.
    """
    head = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _EMPTY:
        return Markup(f"<{name}{head}/>")
    return Markup(f"<{name}{head}>{join(*children)}</{name}>")


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{text(str(value))}"'


def join(*children: str | None, by: str = "") -> Markup:
    """All children one after the other, `by` between them."""
    return Markup(text(by).join(child if isinstance(child, Markup) else text(child) for child in children if child))


def elide(value: str, longest: int) -> str:
    """`value` in at most `longest` characters, cut in its middle: names differ at both ends."""
    value = "".join(character for character in value if unicodedata.category(character)[0] != "C")
    if len(value) <= longest:
        return value
    head = (longest - 1) // 2
    return f"{value[:head]}…{value[len(value) - (longest - 1 - head) :]}"
