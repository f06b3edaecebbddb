"""Semantic versions, as Cargo has them: which is newer, and which are in a series (semver.org 2.0.0, §9–11)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORDS = r"[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*"
# Cargo keeps the three numbers in 64 bits; the identifiers of a pre-release may be longer.
_VERSION = re.compile(rf"([0-9]{{1,20}})\.([0-9]{{1,20}})\.([0-9]{{1,20}})(?:-({_WORDS}))?(?:\+({_WORDS}))?", re.ASCII)

_Rank = tuple[tuple[bool, int, str], ...]


@dataclass(frozen=True, slots=True)
class Version:
    """`text` is as it was written; `pre` and `build` are empty when it has no pre-release tag or build metadata."""

    text: str
    numbers: tuple[int, int, int]
    pre: str
    build: str

    @classmethod
    def parse(cls, text: str) -> Version:
        """Raises ValueError for anything but `1.2.3`, `1.2.3-rc.1`, `1.2.3+meta` and both."""
        match = _VERSION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a semantic version")
        major, minor, patch = (int(match[i]) for i in (1, 2, 3))
        return cls(text, (major, minor, patch), match[4] or "", match[5] or "")

    @property
    def rank(self) -> tuple[tuple[int, int, int], bool, _Rank, _Rank]:
        """Sorts by precedence (§11). Build metadata has none; Cargo compares it last, and so does this."""
        return self.numbers, not self.pre, _rank(self.pre), _rank(self.build)

    def in_series(self, series: str) -> bool:
        """Whether this is `series` itself, or one of its releases: `0.18` holds 0.18.8 and 0.18.8+1.9.7.

        A pre-release, or one build of a version, is taken only where it is named in full.
        """
        if self.text == series:
            return True
        numbers = ".".join(map(str, self.numbers))
        return not self.pre and f"{numbers}.".startswith(f"{series}.")


def _rank(tag: str) -> _Rank:
    """Numbers before words, numbers by value; fewer identifiers before more."""
    words = tag.split(".") if tag else []
    # Digits sort by length first: that is their value, whatever their number (int() refuses more than 4,300).
    digits = [word.lstrip("0") for word in words]
    return tuple(
        (False, len(number), number) if word.isdigit() else (True, 0, word)
        for word, number in zip(words, digits, strict=True)
    )
