"""HTML pages from templates: text can never become markup, nor hide or reorder what stands around it.

A template's line breaks and indentation are for its readers and never get into the page; where a page needs white space
at the end of a line, the template says so: `{{ " " }}`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from jinja2.ext import Extension
from markupsafe import Markup

__all__ = ["Markup", "Template", "asset", "elide", "readable", "template"]

_LONGEST_LINE = 4000  # characters; more of one line helps nobody and makes browsers slow
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Characters that reorder or hide what stands around them, and halves of pairs, which no file can hold.
_INVISIBLE = re.compile("[\ud800-\udfff\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_BREAK = re.compile(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})|\n\s*", re.DOTALL)


def template(package: str, name: str, names: Mapping[str, Any]) -> Template:
    """A template of the directory `templates` in `package`, which knows `names`, as do those that it includes."""
    found = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        finalize=readable,
        undefined=StrictUndefined,
        extensions=[_Joined],
        auto_reload=False,
    )
    found.globals.update(names)
    found.policies["json.dumps_kwargs"] = {}  # keys in their own order
    return found.get_template(name)


def asset(package: str, name: str) -> Markup:
    """A style or a script of `package`, to go into a page as it is."""
    return Markup(resources.files(package).joinpath(name).read_text("utf-8"))


def readable(value: object) -> object:
    """`value` as text to be read: without colours of terminals, other control characters and those that reorder or hide
    text written as `\\x1b` and `\\u202e`, and endless lines cut. Markup stays as it is; None is nothing."""
    if value is None:
        return ""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    if value.isascii() and value.isprintable() and len(value) <= _LONGEST_LINE:
        return value
    text = _COLOUR.sub("", value.replace("\r\n", "\n"))
    text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    text = _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return text if len(text) <= _LONGEST_LINE else "\n".join(map(_cut, text.split("\n")))


def elide(value: str, longest: int) -> str:
    """`value` in at most `longest` characters, cut in its middle: names differ at both ends."""
    value = "".join(character for character in value if unicodedata.category(character)[0] != "C")
    if len(value) <= longest:
        return value
    head = (longest - 1) // 2
    return f"{value[:head]}…{value[len(value) - (longest - 1 - head) :]}"


def _cut(line: str) -> str:
    more = len(line) - _LONGEST_LINE
    return line if more <= 0 else f"{line[:_LONGEST_LINE]} … {more:,} characters more"


class _Joined(Extension):
    """Takes line breaks and indentation out of a template; as comments, so that errors name the right line."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return _LINE_BREAK.sub(lambda found: found[1] or "{#" + "\n" * found[0].count("\n") + "#}", source)
