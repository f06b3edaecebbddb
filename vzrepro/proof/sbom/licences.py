"""Licences as SPDX expressions, from what authors wrote: Cargo.toml, Debian copyright files, SPDX tags.

Formats: SPDX 2.3 annex D (licence expressions); the Cargo book, "The license and license-file fields"; DEP-5
(Debian's machine-readable copyright format 1.0). Nothing is guessed: a name that is not equal to an SPDX identifier
becomes `LicenseRef-Debian-<name>`, and text without a machine-readable licence has none.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from vzrepro.base import version
from vzrepro.base.errors import UsageError

DEBIAN_REF = "LicenseRef-Debian-"
"""How a licence is called that Debian has a short name for and SPDX has not."""

_MAX_TEXT = 4 << 20
"""Bytes: the largest copyright files (Rust's, Chromium's) have one or two million."""


def check_installed() -> None:
    """Raise UsageError where the library that knows SPDX's licences is not there: an extra of vzrepro's package."""
    if importlib.util.find_spec("license_expression") is None:
        raise UsageError(
            "bills of materials need the Python package license-expression, which is not installed",
            hint=f"install it with: {version.adding('license-expression')}",
        )


def from_cargo(text: str) -> str | None:
    """The expression of a Cargo.toml's `license`, in the old form with a slash too; None when it is not SPDX."""
    # A slash meant OR before Cargo asked for SPDX expressions (Cargo book).
    return _valid(text.replace("/", " OR "))


def from_tag(text: str) -> str | None:
    """What a licence file of a source tree says of the whole tree; None when it does not say it to a machine.

    An `SPDX-License-Identifier:` line, as in the kernel's COPYING; or the GPL's text, headed by the sentence that
    its version is the only one, as in busybox's LICENSE. A bare licence text says nothing of later versions.
    """
    if tag := re.search(r"SPDX-License-Identifier:[ \t]*([^\n]+)", text):
        return _valid(tag[1].strip())
    only = re.search(r"Version (\d) is the only version of this license", re.sub(r"\s+", " ", text[:2000]))
    title = re.search(r"GNU GENERAL PUBLIC LICENSE\s+Version (\d),", text[:4000])
    return f"GPL-{only[1]}.0-only" if only and title and only[1] == title[1] else None


def from_copyright(text: str) -> str | None:
    """All that a Debian copyright file says applies to the package's source, joined by AND.

    None when the file is not machine-readable, or names no licence. The licences are those of the source package;
    which of its files a binary package is made of, nobody writes down.
    """
    if len(text) > _MAX_TEXT:
        return None
    stanzas = [dict(stanza) for stanza in _stanzas(text)]
    if not stanzas or not re.search(r"copyright-format|dep5|dep\.debian\.net", stanzas[0].get("format", ""), re.I):
        return None
    named = [stanza for stanza in stanzas[1:] if "files" in stanza] or stanzas[:1]
    terms = [_Expression(short).parse() for stanza in named if (short := stanza.get("license", "").strip())]
    return _spelt(_joined(terms, "AND")) if terms else None


def refs(expression: str) -> frozenset[str]:
    """The `LicenseRef-…` names in an expression."""
    return frozenset(re.findall(r"LicenseRef-[A-Za-z0-9.-]+", expression))


def _stanzas(text: str) -> Iterator[Iterator[tuple[str, str]]]:
    """The paragraphs of a deb822 file: field name in lower case → the first line of its value."""
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        lines = [line for line in paragraph.split("\n") if not line.startswith((" ", "\t", "#"))]
        fields = [line.partition(":") for line in lines if ":" in line]
        if fields:
            yield ((name.strip().lower(), value) for name, _, value in reversed(fields))


# --- DEP-5 expressions ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Joint:
    """Operands joined by one word (`AND`, `OR`); none is itself joined by that word."""

    word: str
    operands: frozenset[_Terms]


_Terms: TypeAlias = "str | _Joint"


def _joined(operands: Sequence[_Terms], word: str) -> _Terms:
    flat: set[_Terms] = set()
    for operand in operands:
        flat |= operand.operands if isinstance(operand, _Joint) and operand.word == word else {operand}
    return flat.pop() if len(flat) == 1 else _Joint(word, frozenset(flat))


def _spelt(terms: _Terms) -> str:
    """The expression with its operands sorted, so that the same terms are always spelt the same."""
    if isinstance(terms, str):
        return terms
    operands = ((_spelt(operand), isinstance(operand, _Joint)) for operand in terms.operands)
    return f" {terms.word} ".join(f"({text})" if nested else text for text, nested in sorted(operands))


class _Expression:
    """A DEP-5 licence line: names joined by `or` and `and`, `and` binding tighter; a comma before either (or alone,
    for `and`) binds loosest; parentheses, which some use although DEP-5 has none."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = re.findall(r"[(),]|[^\s(),]+", text)
        self._at = 0

    def parse(self) -> _Terms:
        """What cannot be read is one name."""
        try:
            result = self._loose()
        except (ValueError, RecursionError):
            return _name(self._text)
        return result if self._at == len(self._tokens) else _name(self._text)

    def _peek(self) -> str:
        return self._tokens[self._at].lower() if self._at < len(self._tokens) else ""

    def _loose(self) -> _Terms:
        result = self._joints("OR", lambda: self._joints("AND", self._one))
        while self._peek() == ",":
            self._at += 1
            word = "OR" if self._peek() == "or" else "AND"
            self._at += self._peek() in ("and", "or")
            result = _joined([result, self._joints("OR", lambda: self._joints("AND", self._one))], word)
        return result

    def _joints(self, word: str, operand: Callable[[], _Terms]) -> _Terms:
        operands = [operand()]
        while self._peek() == word.lower():
            self._at += 1
            operands.append(operand())
        return _joined(operands, word)

    def _one(self) -> _Terms:
        if self._peek() == "(":
            self._at += 1
            result = self._loose()
            if self._peek() != ")":
                raise ValueError(self._text)
            self._at += 1
            return result
        words = []
        while self._peek() not in ("", "and", "or", ",", "(", ")"):
            words.append(self._tokens[self._at])
            self._at += 1
        if not words:
            raise ValueError(self._text)
        return _name(" ".join(words))


# --- names ------------------------------------------------------------------------------------------------------------

_SAME = {"expat": "MIT", "apache-2": "Apache-2.0", "cc0": "CC0-1.0", "artistic-2": "Artistic-2.0", "bsl-1": "BSL-1.0"}
"""Short names whose text is, by DEP-5's own list, that of an SPDX identifier that is spelt otherwise."""

_EXCEPTIONS = {
    "autoconf": {"2": "Autoconf-exception-2.0", "3": "Autoconf-exception-3.0"},
    "autoconf generic": {"2": "Autoconf-exception-generic", "3": "Autoconf-exception-generic-3.0"},
    "bison": dict.fromkeys("23", "Bison-exception-2.2"),
    "bison-2.2": dict.fromkeys("23", "Bison-exception-2.2"),
    "libtool": {"2": "Libtool-exception"},
    "linux-syscall-note": {"2": "Linux-syscall-note"},
    "llvm": {"": "LLVM-exception"},
    "texinfo": dict.fromkeys("23", "Texinfo-exception"),
}
"""`with <this> exception` → GPL's version, or none → SPDX exception."""


@cache
def _name(short: str) -> str:
    """The SPDX form of one DEP-5 licence name, `with … exception` included."""
    base, _, exception = short.partition(" with ")
    plain = _plain(base.strip())
    if not exception:
        return plain or _reference(short)
    words = exception.lower().removesuffix("exception").strip()
    version = re.search(r"GPL-(\d)", plain or "")
    found = _EXCEPTIONS.get(words, {}).get(version[1] if version else "")
    return f"{plain} WITH {found}" if plain and found else _reference(short)


def _plain(short: str) -> str | None:
    # GNU licences as DEP-5 writes them: GPL-2+, LGPL-2.1, GFDL-NIV-1.3+ (no invariant sections).
    if gnu := re.fullmatch(r"(A?GPL|LGPL|GFDL)(-NIV)?-(\d)(\.\d)?(\+)?", short, re.I):
        family, invariant, major, minor, later = gnu.groups()
        without = "-no-invariants" if invariant else ""
        return _valid(f"{family.upper()}-{major}{minor or '.0'}{without}-{'or-later' if later else 'only'}")
    if re.fullmatch(r"[A-Za-z0-9.+-]+", short):
        return _valid(_SAME.get(short.lower(), short))
    return None


def _reference(short: str) -> str:
    return DEBIAN_REF + (re.sub(r"[^A-Za-z0-9.]+", "-", short.replace("+", "-or-later")).strip("-.") or "unnamed")


@cache
def _licensing() -> Any:
    import license_expression  # slow to import, and most commands have no use for it

    licensing = license_expression.get_spdx_licensing()
    # Else the first parse makes it, and a second thread's first parse would find it half made.
    licensing.get_advanced_tokenizer()
    return licensing


@cache
def _valid(expression: str) -> str | None:
    """The expression with its identifiers spelt as SPDX spells them today; None if one is not SPDX's."""
    from license_expression import ExpressionError

    try:
        found = _licensing().parse(expression, validate=True)
    except ExpressionError:
        return None
    normal = str(found.render("{symbol.key}")) if found is not None else ""
    # The library knows ScanCode's licences as well, which are not SPDX's.
    return None if not normal or "LicenseRef-" in normal else normal
