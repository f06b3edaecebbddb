"""Which links `update-alternatives` would make, read from maintainer scripts that never run.

Scripts are shell. Read are calls whose words stand there, or in variables that a line of the script sets to a word;
what is computed is passed over, and a recipe names such links itself (`links` of `debian_image`). Format:
update-alternatives(1), `--install link name path priority [--slave link name path]...`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

_CALL = re.compile(r"\bupdate-alternatives\b([^\n;|&]*)")
_SET = re.compile(r"^[ \t]*([A-Za-z_][A-Za-z0-9_]*)=([^\s;$`\'\"()]*)[ \t]*$", re.MULTILINE)
_USED = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_COMMENT = re.compile(r"^[ \t]*#.*$", re.MULTILINE)
_PRIORITY = re.compile(r"-?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Alternative:
    """One program, say, that may stand at `link`; `slaves` (link, path) come with it. Paths are absolute."""

    link: str
    path: str
    priority: int
    slaves: tuple[tuple[str, str], ...] = ()


def read(script: str) -> Iterator[Alternative]:
    """The alternatives that a postinst installs, in its order. Any text may be given."""
    lines = _COMMENT.sub("", script.replace("\\\n", " "))
    known = dict(_SET.findall(lines))
    for call in _CALL.findall(lines):
        words = _words(_USED.sub(lambda used: known.get(used[1] or used[2], used[0]), call))
        if "--install" not in words:
            continue
        link, _name, path, priority, *rest = [*words[words.index("--install") + 1 :], *[""] * 4]
        if not (_is_path(link) and _is_path(path) and _PRIORITY.fullmatch(priority)):
            continue
        slaves = [
            (rest[at + 1], rest[at + 3]) for at, word in enumerate(rest) if word == "--slave" and at + 3 < len(rest)
        ]
        yield Alternative(link, path, int(priority), tuple(each for each in slaves if all(map(_is_path, each))))


def chosen(offered: Iterable[Alternative], there: Callable[[str], bool]) -> dict[str, str]:
    """Link → path of what `update-alternatives` would choose: of what is `there`, the highest priority; of equal ones
    the first by path, as the order of installation, which decides elsewhere, is nobody's here."""
    found: dict[str, str] = {}
    for each in sorted(offered, key=lambda each: (-each.priority, each.path, each.slaves)):
        if each.link not in found and there(each.path):
            found[each.link] = each.path
            found |= {link: path for link, path in each.slaves if link not in found and there(path)}
    return found


def _words(text: str) -> list[str]:
    """The words before the first that a shell would compute."""
    plain = re.split(r"\$\(|`", text, maxsplit=1)[0]
    try:
        return shlex.split(plain, comments=True)
    except ValueError:  # quotation marks that do not end
        return plain.split()


def _is_path(text: str) -> bool:
    return bool(re.fullmatch(r"/[^$*?\0]+", text)) and not {"", ".", ".."} & set(text[1:].split("/"))
