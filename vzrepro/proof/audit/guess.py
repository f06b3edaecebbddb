"""Guess from the bytes what made two outputs differ, and say what to do about it.

Pure: places in, guesses out. A guess is evidence for a person, never a verdict; a verdict is what the axes show. Where
the audit knows what it varied, a value that turns up in the output is named with certainty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.causes import FIXES
from vzrepro.proof.audit.inside import ContentPlace
from vzrepro.proof.audit.model import Guess

FileContext = Mapping[str, tuple[str, str]]
"""What was seen inside the sandbox without and with an axis: axis → (baseline, varied)."""

_AXIS_CAUSES = {axis.name: axis.cause for axis in AXES}
_AXIS_ALSO = {axis.name: axis.also for axis in AXES}

_DIGESTS = (32, 40, 56, 64, 96, 128)
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
_CERTAIN, _CLEAR, _LIKELY, _PERHAPS, _FOLLOWS = range(5)
_SINCE, _UNTIL, _TWO_YEARS = 1_400_000_000, 2_200_000_000, 2 * 366 * 86400
_SHOWN = 80
_MIN_VALUE = 4
_LINES = 1000
_LINE = 4000

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)[a-z]*"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?"
_DATE = re.compile(
    rf"""\b(?:
        (?:19|20)\d\d-[01]\d-[0-3]\d(?:[T ]{_CLOCK}(?:\s?(?:Z|UTC|[+-]\d\d:?\d\d))?)?    # 2026-01-31 12:00:00
      | {_DAY},?\s+{_MONTH}\s+\d{{1,2}}(?:,?\s+{_CLOCK})?(?:\s+[A-Z]{{3,4}})?\s+(?:19|20)\d\d  # Sat Jan 31 2026
      | (?:{_DAY},?\s+)?\d{{1,2}}\s+{_MONTH}\s+(?:19|20)\d\d(?:\s+{_CLOCK})?              # Sat, 31 Jan 2026 12:00:00
      | {_MONTH}\s+\d{{1,2}},?\s+(?:19|20)\d\d(?:\s+{_CLOCK})?                              # Jan 31 2026
      | (?:19|20)\d\d[01]\d[0-3]\d(?:[T-]?[0-2]\d[0-5]\d(?:[0-5]\d)?)?Z?                      # 20260131T120000Z
      | [0-2]\d:[0-5]\d:[0-5]\d                                                            # 12:00:00
    )(?!\d)""",
    re.VERBOSE,
)
_EPOCH = re.compile(r"(?<![\w.])(?:1[0-9]|2[01])\d{8}(?:\d{3}|\d{6}|\d{9})?(?:\.\d+)?(?![\w])")
_UUID = re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")
_TEMPORARY = re.compile(r"(?:/tmp/[\w.+-]+|\b(?:tmp|cc)(?=[A-Za-z0-9_]*[A-Z0-9_])[A-Za-z0-9_]{6,8}\b)")
_PATH = re.compile(r"(?<![\w.])(?:/[\w.+@%:=~-]+){2,}/?|(?<![\w./])/(?:build|home|root|srv|tmp|work)\b/?[\w.+-]*")
_HEX = re.compile(r"\b(?=[0-9a-fA-F]*\d)[0-9a-fA-F]{16,}\b")
_PID = re.compile(r"(?i)\b(?:pid|process(?: id)?|getpid)\b\W{0,3}\d+")
_JOBS = re.compile(r"(?i)(?:\B-j ?\d+|--jobs[ =]\d+|\b(?:jobs|threads|cores|cpus|nproc|vz_cores)\b\W{0,3}\d+)")
_QUOTES = re.compile("[‘’“”«»„]")
_NUMBER = re.compile(r"\d+")
_TOKEN = re.compile(r"[A-Za-z0-9_.+-]+")
_PARTS = re.compile(r"[\s:,;=]+")
_FIELD = re.compile(r"(ino|mode|uid|gid|uname|gname|mtime|level flag|devmajor|devminor): (.*)")
_FIELD_CAUSES: Mapping[str, str] = {
    "ino": "inode",
    "devmajor": "inode",
    "devminor": "inode",
    "uid": "user",
    "gid": "user",
    "uname": "user",
    "gname": "user",
    "mtime": "timestamp",
    "mode": "umask",
    "level flag": "compression",
}
# A line of a listing, as diffoscope's cpio and tar readers and `ls -l` write it.
_LISTED = re.compile(
    r"(?P<mode>[-dlcbps][-rwxsStT]{9})\s+(?:\d+\s+)?(?P<owner>\S+(?:\s+\(\d+\))?\s+\S+(?:\s+\(\d+\))?)\s+(?P<size>\d+)\s+"
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d(?::\d\d(?:\.\d+)?)?)\s+(?P<name>.*)"
)
_HEX_LINE = re.compile(r"\s*(?:0x)?[0-9a-f]{4,16}:?\s+((?:[0-9a-f]{2,8} ){1,8})")

# What readelf prints of a file's tables: addresses and sizes, which only follow from what is in the sections.
_TABLES = tuple(
    (name,)
    for name in ("dyn-syms", "dynamic", "file-header", "program-header", "readelf", "relocs", "sections", "symbols")
)

# What a match of each pattern, in one version and not in the other, comes from; in order, since what one of them has
# matched is no business of the later ones.
_PATTERNS: Sequence[tuple[re.Pattern[str], str, int]] = (
    (_DATE, "timestamp", _CLEAR),
    (_EPOCH, "timestamp", _LIKELY),
    (_UUID, "random", _CLEAR),
    (_TEMPORARY, "random", _CLEAR),
    (_PATH, "path", _CLEAR),
    (_PID, "process-id", _CLEAR),
    (_JOBS, "parallelism", _CLEAR),
    (_HEX, "random", _PERHAPS),
)


@dataclass(frozen=True, slots=True)
class _Hint:
    cause: str
    rank: int
    evidence: str


def guesses(places: Iterable[tuple[str, ContentPlace]], context: FileContext | None = None) -> tuple[Guess, ...]:
    """What probably caused the differences, the surest and most frequent first, each cause once; `unknown` if nothing.

    `places` are (file, place); `context` is what the audit varied.
    """
    context = context or {}
    found: dict[str, list[_Hint]] = {}
    total, seen = 0, ""
    for file, place in places:
        total += 1
        seen = seen or _first_change(file, place)
        for cause, hint in _first_of_each(_hints(file, place, context)).items():
            found.setdefault(cause, []).append(hint)
    ranked = sorted(found.items(), key=lambda each: (min(hint.rank for hint in each[1]), -len(each[1]), each[0]))
    told = [Guess(cause, _told(hints), FIXES[cause]) for cause, hints in ranked]
    if not total:
        return ()
    if len(context) == 1:
        told = _by_axis(next(iter(context)), told, seen)
    return tuple(told) or (Guess("unknown", seen or f"nothing known in {_places(total)}", FIXES["unknown"]),)


def _by_axis(axis: str, told: list[Guess], seen: str) -> list[Guess]:
    """The guesses when one axis alone was varied: what it brings about comes first, since that much is proven. Where it
    may bring about several things, the bytes tell which."""
    cause = _AXIS_CAUSES.get(axis)
    if cause is None:
        return told
    own = next((guess for guess in told if guess.cause in (cause, *_AXIS_ALSO[axis])), None)
    if own is None:
        first = told[0].evidence if told else seen
        own = Guess(cause, f"nothing but {axis} was varied{f'; {first}' if first else ''}", FIXES[cause])
    return [own, *(guess for guess in told if guess.cause != own.cause)]


def _where(file: str, place: ContentPlace) -> str:
    """The place in words, innermost first; the trees themselves, when they are files, need no name."""
    parts = [*place.member] if file == "." and place.member else [file, *place.member]
    return " in ".join(reversed(parts)) if parts != ["."] else "the file"


def _first_change(file: str, place: ContentPlace) -> str:
    """The first pair of lines that differ, for when nothing better is known."""
    old, new = next(_pairs(place.diff.splitlines()[:_LINES]), ("", ""))
    return f"{_where(file, place)}: {_change(old.strip(), new.strip())}" if old or new else ""


def _first_of_each(hints: Iterable[_Hint]) -> Mapping[str, _Hint]:
    best: dict[str, _Hint] = {}
    for hint in hints:
        if hint.cause not in best or hint.rank < best[hint.cause].rank:
            best[hint.cause] = hint
    return best


def _told(hints: Sequence[_Hint]) -> str:
    best = min(hints, key=lambda hint: hint.rank)
    more = len(hints) - 1
    return f"{best.evidence}; and in {_places(more)} more" if more else best.evidence


def _places(count: int) -> str:
    return f"{count} place{'' if count == 1 else 's'}"


def _hints(file: str, place: ContentPlace, context: FileContext) -> Iterator[_Hint]:
    where = _where(file, place)
    if place.kind == "compression":
        yield _Hint("compression", _CLEAR, f"{where}: the same contents, compressed in another way")
        return
    if _is_build_id(place):
        yield _Hint("build-id", _FOLLOWS, f"{where}: a linker's build id")
        return
    lines = [line[:_LINE] for line in place.diff.splitlines()[:_LINES]]
    old = [line[1:] for line in lines if line.startswith("-")]
    new = [line[1:] for line in lines if line.startswith("+")]
    if old and sorted(old) == sorted(new):
        yield from _sorted_otherwise(where, old, new)
        return
    if old and new and all(map(_HEX_LINE.match, (*old, *new))):
        # With the rows around them, since a text may begin in one that is equal.
        before, after = (_decoded([line[1:] for line in lines if line[:1] in (sign, " ")]) for sign in "-+")
        yield from _binary(where, place, before, after, context)
        return
    if place.member[-1:] in _TABLES:
        return
    addresses = place.kind == "ELF section"
    for one, other in _pairs(lines):
        for hint in _line(where, one, other, context):
            if not (addresses and hint.cause == "random" and hint.rank >= _PERHAPS):
                yield hint
    yield from _locale(where, old, new)


def _is_build_id(place: ContentPlace) -> bool:
    if ".note.gnu.build-id" in place.member:
        return True
    changed = [line for line in place.diff.splitlines() if line[:1] in ("-", "+")]
    return bool(changed) and all(re.search(r"(?i)build[ -]?id", line) for line in changed)


def _pairs(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each removed line with the added one that stands for it."""
    old: list[str] = []
    new: list[str] = []
    for line in (*lines, " "):
        if line.startswith("-"):
            if new:
                yield from zip(old, new, strict=False)
                old, new = [], []
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
        else:
            yield from zip(old, new, strict=False)
            old, new = [], []


def _sorted_otherwise(where: str, old: Sequence[str], new: Sequence[str]) -> Iterator[_Hint]:
    evidence = f"{where}: the same lines in another order, for instance {_short(old[0])!r}"
    if old != sorted(old) and new != sorted(new) and sorted(old, key=str.lower) in (list(old), list(new)):
        yield _Hint("locale", _LIKELY, f"{evidence}; one of them is sorted without regard to case")
    yield _Hint("order", _CLEAR, evidence)


def _line(where: str, old: str, new: str, context: FileContext) -> Iterator[_Hint]:
    """What the difference between two versions of a line tells."""
    fields = _FIELD.fullmatch(old), _FIELD.fullmatch(new)
    if fields[0] and fields[1]:
        cause = _FIELD_CAUSES[fields[0][1]]
        yield _Hint(cause, _CLEAR, f"{where}: {fields[0][1]} {_change(fields[0][2], fields[1][2])}")
        return
    listed = _LISTED.search(old), _LISTED.search(new)
    if listed[0] and listed[1] and listed[0]["name"] == listed[1]["name"]:
        for part, cause in (("mode", "umask"), ("owner", "user"), ("time", "timestamp")):
            if listed[0][part] != listed[1][part]:
                change = _change(listed[0][part], listed[1][part])
                yield _Hint(cause, _CLEAR, f"{where}: {part} of {_short(listed[0]['name'])!r} {change}")
        return
    yield from _varied(where, old, new, context)
    for pattern, cause, rank in _PATTERNS:
        before, after = pattern.findall(old), pattern.findall(new)
        gone = [each for each in before if each not in after]
        come = [each for each in after if each not in before]
        if gone and come:
            follows = pattern is _HEX and len(gone[0]) == len(come[0]) and len(gone[0]) in _DIGESTS
            note = ", which may be hashes of something else that differs" if follows else ""
            yield _Hint(cause, _FOLLOWS if follows else rank, f"{where}: {_change(gone[0], come[0])}{note}")
        old, new = pattern.sub("\0", old), pattern.sub("\0", new)
        if old == new:
            return
    masked = _NUMBER.sub("#", old), _NUMBER.sub("#", new)
    if masked[0] == masked[1]:
        before, after = _NUMBER.findall(old), _NUMBER.findall(new)
        changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
        if changed and "." in old and re.search(r"\b\d+\.\d+\s?(?:s|ms|sec|seconds)\b", old):
            yield _Hint("timestamp", _LIKELY, f"{where}: a duration, {_change(*changed[0])}")


def _varied(where: str, old: str, new: str, context: FileContext) -> Iterator[_Hint]:
    """What the audit itself varied and what is now in the output."""
    tokens = _TOKEN.findall(old), _TOKEN.findall(new)
    swapped = set()
    if len(tokens[0]) == len(tokens[1]):
        swapped = {pair for pair in zip(*tokens, strict=True) if pair[0] != pair[1]}
    for axis, (baseline, varied) in context.items():
        cause = _AXIS_CAUSES.get(axis)
        if cause is None or baseline == varied:
            continue
        parts = [(baseline, varied), *zip(_PARTS.split(baseline), _PARTS.split(varied), strict=False)]
        for one, other in parts:
            if one == other or not other:
                continue
            seen = (one, other) in swapped or (other, one) in swapped
            long = len(other) >= _MIN_VALUE and (_holds(new, other) != _holds(old, other))
            if seen or long:
                yield _Hint(cause, _CERTAIN, f"{where}: {_short(other)!r}, which the audit's axis {axis} put there")
                break


def _holds(text: str, value: str) -> bool:
    at = text.find(value)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(value) : at + len(value) + 1]
        if not (before.isalnum() and value[0].isalnum()) and not (after.isalnum() and value[-1].isalnum()):
            return True
        at = text.find(value, at + 1)
    return False


def _locale(where: str, old: Sequence[str], new: Sequence[str]) -> Iterator[_Hint]:
    quoted = bool(_QUOTES.search("".join(old))), bool(_QUOTES.search("".join(new)))
    if quoted[0] != quoted[1]:
        yield _Hint("locale", _LIKELY, f"{where}: typographic quotation marks on one side only")


def _decoded(lines: Sequence[str]) -> bytes:
    """The bytes of a hexdump by xxd, readelf or `inside`."""
    out = bytearray()
    for line in lines:
        if match := _HEX_LINE.match(line):
            out += bytes.fromhex(match[1].replace(" ", ""))
    return bytes(out)


def _binary(where: str, place: ContentPlace, old: bytes, new: bytes, context: FileContext) -> Iterator[_Hint]:
    before, after = _text_of(old), _text_of(new)
    found = list(_line(where, before, after, context))
    yield from found
    if found:
        return
    at = [index for index, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
    if at and len(old) == len(new) and at[-1] - at[0] < 4:
        moment = _moment(old, new, at[0])
        if moment is not None:
            yield _Hint("timestamp", _LIKELY, f"{where}: seconds since 1970, {_change(*map(str, moment))}")
            return
    if place.count is not None and place.count >= 16 and len(at) >= 0.9 * min(len(old), len(new)) > 16:
        yield _Hint("random", _PERHAPS, f"{where}: {place.count} bytes without anything in common")


def _moment(old: bytes, new: bytes, at: int) -> tuple[int, int] | None:
    """The two times that four bytes around `at` may be: both of 2014 to 2039, and within two years of each other."""
    for order in _ORDERS:
        for begin in range(max(0, at - 3), at + 1):
            if begin % 4:
                continue
            one, other = (int.from_bytes(each[begin : begin + 4], order) for each in (old, new))
            if all(_SINCE <= each <= _UNTIL for each in (one, other)) and abs(one - other) < _TWO_YEARS:
                return one, other
    return None


def _text_of(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "\n" for byte in data)


def _change(old: str, new: str) -> str:
    return f"{_short(old)!r} → {_short(new)!r}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
