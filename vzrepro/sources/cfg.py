"""What a manifest's tables for some targets ask: `cfg()` expressions, over what rustc knows of a target.

Format: the Rust Reference, "Conditional compilation"; the Cargo book, "Platform specific dependencies".
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vzrepro.base.errors import UsageError


class _Truth(enum.IntEnum):
    """Kleene's three values: MAYBE for what depends on compiler flags, so that `not` of it stays MAYBE."""

    NO = 0
    MAYBE = 1
    YES = 2


@dataclass(frozen=True, slots=True)
class Cfg:
    """The configuration that rustc has for a target."""

    triple: str
    names: frozenset[str]
    values: frozenset[tuple[str, str]]

    def may_match(self, target: str) -> bool:
        """Whether a `[target.<target>.…]` table may apply: a triple or a `cfg(…)` expression."""
        if not target.startswith("cfg("):
            return target == self.triple
        tokens = _tokens(target)
        try:
            result = self._evaluate(tokens, target)
        except RecursionError as error:
            raise _bad_cfg(f"{target[:80]}…") from error
        if next(tokens, None) is not None:
            raise _bad_cfg(target)
        return result is not _Truth.NO

    def _evaluate(self, tokens: _Tokens, whole: str) -> _Truth:
        name = next(tokens, "")
        if not re.fullmatch(r"\w+", name):
            raise _bad_cfg(whole)
        if tokens.peek() == "=":
            next(tokens)
            return self._key_value(name, next(tokens, "").strip('"'))
        if tokens.peek() != "(":
            return self._name(name)
        next(tokens)
        arguments: list[_Truth] = []
        while tokens.peek() != ")":
            arguments.append(self._evaluate(tokens, whole))
            if tokens.peek() == ",":
                next(tokens)
            elif tokens.peek() != ")":
                raise _bad_cfg(whole)
        next(tokens)
        if name == "all":
            return min(arguments, default=_Truth.YES)
        if name == "any":
            return max(arguments, default=_Truth.NO)
        if name in ("not", "cfg") and len(arguments) == 1:
            return arguments[0] if name == "cfg" else _Truth(2 - arguments[0])
        raise _bad_cfg(whole)

    def _name(self, name: str) -> _Truth:
        if name in ("true", *self.names):
            return _Truth.YES
        return _Truth.MAYBE if name in ("debug_assertions", "overflow_checks", "ub_checks") else _Truth.NO

    def _key_value(self, key: str, value: str) -> _Truth:
        if (key, value) in self.values:
            return _Truth.YES
        settled = {known for known, _ in self.values}
        return _Truth.NO if key in settled else _Truth.MAYBE


_POINTER_WIDTHS = {"aarch64": "64", "x86_64": "64", "riscv64gc": "64", "armv7": "32", "i686": "32"}
_ARCHES = {"riscv64gc": "riscv64", "armv7": "arm", "i686": "x86"}


def linux_cfg(triple: str) -> Cfg:
    """What `rustc --print cfg --target <triple>` says of a GNU/Linux triple, as far as it is the same for all flags."""
    parts = triple.split("-")
    if len(parts) != 4 or parts[2] != "linux" or parts[0] not in _POINTER_WIDTHS:
        known = ", ".join(f"{arch}-unknown-linux-gnu" for arch in _POINTER_WIDTHS)
        raise UsageError(f"{triple!r} is not a target this knows", hint=f"use one of {known}")
    arch, vendor, system, environment = parts
    values = {
        "target_arch": _ARCHES.get(arch, arch),
        "target_vendor": vendor,
        "target_os": system,
        "target_env": environment,
        "target_family": "unix",
        "target_endian": "little",
        "target_pointer_width": _POINTER_WIDTHS[arch],
        "target_abi": "",
    }
    return Cfg(triple, frozenset({"unix"}), frozenset(values.items()))


class _Tokens(Iterator[str]):
    """The words, strings and signs of a cfg expression, with one token of look-ahead."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._tokens = tokens
        self._at = 0

    def __next__(self) -> str:
        if self._at == len(self._tokens):
            raise StopIteration
        self._at += 1
        return self._tokens[self._at - 1]

    def peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None


def _tokens(text: str) -> _Tokens:
    found = re.findall(r'"[^"]*"|\w+|[(),=]|\S', text)
    return _Tokens(found)


def _bad_cfg(text: str) -> UsageError:
    return UsageError(f"{text!r} is not a cfg expression Cargo knows")
