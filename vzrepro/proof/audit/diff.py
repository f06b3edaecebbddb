"""Explain why two trees differ: which files, where in them, which bytes, and a guess of the cause.

Two sources, merged: our own comparison (`compare`, `inside`), which is exact and needs nothing, and diffoscope in the
sandbox, which knows more formats. When diffoscope cannot run, or is cut off, ours stands.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vzrepro.base import disk, events
from vzrepro.base.errors import Interrupted, VzreproError
from vzrepro.base.model import canonical_json
from vzrepro.base.words import plural
from vzrepro.proof.audit import compare, inside
from vzrepro.proof.audit.diffoscope import LIMITS, SAME, ComparisonLimits, Look, look
from vzrepro.proof.audit.guess import FileContext, guesses
from vzrepro.proof.audit.inside import Bounds, ContentPlace, shown
from vzrepro.proof.audit.model import Detail, Explanation, Guess
from vzrepro.realize.realizer import Realizer

__all__ = ["LIMITS", "ComparisonLimits", "explain"]

_REDUNDANT = ("notes", "strings")


def explain(
    a: Path,
    b: Path,
    *,
    realizer: Realizer | None,
    scratch: Path,
    limits: ComparisonLimits = LIMITS,
    context: FileContext | None = None,
    page: Path | None = None,
    names: tuple[str, str] = ("a", "b"),
) -> Explanation:
    """Why the trees `a` and `b` (files or directories) differ; without details when they do not.

    `scratch` is an existing directory, best on the trees' file system; what is put there is removed again. `context` is
    what an audit varied (`guess.FileContext`). `page` is where diffoscope's HTML page goes, under the `names` of the
    two sides; it is not written without diffoscope. Without a `realizer`, whose graph has the image, diffoscope is not
    run. Raises OSError for trees that cannot be read, Interrupted when the realizer's `stop` is set.
    """
    work = _Work(realizer, f"{a}#{b}")
    with work.shown():
        told: list[compare.Difference] = []
        more = 0
        for difference in compare.differences(a, b, check=work.check):
            if len(told) < limits.details:
                told.append(difference)
            else:
                more += 1
        if not told:
            return _explanation("bytes", (), (), None)
        contents = [each.path for each in told if each.kind == "content"]
        pairs = {path: (_at(a, path), _at(b, path)) for path in contents[: limits.files]}
        own = {}
        for path, (first, second) in pairs.items():
            work.check()
            own[path] = _own(first, second, limits)
        sources = _page(told, pairs, names) if page is not None else None
        seen, trouble = _look(pairs, work, scratch, limits, sources)
        if page is not None and seen is not None and seen.page is not None:
            page.write_text(seen.page)
        placed = [(each.path, place) for each in told for place in _told(each, own, seen)]
        reasons = [*trouble]
        if more:
            reasons.append(plural(more, "more path differs", "more paths differ"))
        if len(contents) > len(pairs):
            reasons.append(
                f"not looked into: {len(contents) - len(pairs)} of {plural(len(contents), 'differing file')}"
            )
        if len(placed) > limits.details:
            reasons.append(plural(len(placed) - limits.details, "more place differs", "more places differ"))
        details = [_detail(path, place, limits.excerpt_bytes) for path, place in placed[: limits.details]]
        causes = guesses([(_named(path), place) for path, place in placed], context)
        return _explanation(seen.tool if seen is not None else "bytes", details, causes, "; ".join(reasons) or None)


def _at(root: Path, path: str) -> Path:
    return root / path if path else root


def _own(a: Path, b: Path, limits: ComparisonLimits) -> list[ContentPlace]:
    if max(each.stat().st_size for each in (a, b)) > limits.look_bytes:
        return []
    return inside.places(a.read_bytes(), b.read_bytes(), Bounds(decoded=limits.look_bytes))


def _look(
    pairs: Mapping[str, tuple[Path, Path]],
    work: _Work,
    scratch: Path,
    limits: ComparisonLimits,
    page: Mapping[str, Any] | None,
) -> tuple[Look | None, list[str]]:
    """diffoscope's findings, and what is missing in them."""
    realizer = work.realizer
    if realizer is None or (not pairs and page is None):
        return None, []
    try:
        found = look(pairs, realizer=realizer, scratch=scratch / "look", limits=limits, page=page, say=work.say)
    except Interrupted:
        raise
    except (VzreproError, OSError) as error:
        message = f"diffoscope could not be used: {error.message if isinstance(error, VzreproError) else error}"
        realizer.report(events.Notice("warning", f"{message}; the bytes were compared without it"))
        return None, [message]
    finally:
        disk.remove_tree(scratch / "look")
    missed: dict[str, list[str]] = {}
    for path, why in found.missed.items():
        if why != SAME:
            missed.setdefault(why, []).append(_named(path))
    return found, [f"diffoscope has nothing on {_some(paths)}: {why}" for why, paths in sorted(missed.items())]


def _some(paths: Sequence[str]) -> str:
    more = len(paths) - 3
    return ", ".join(sorted(paths)[:3]) + (f" and {more} more" if more > 0 else "")


class _Work:
    """A comparison under way: what is told of it, and its end when the realizer's `stop` is set."""

    def __init__(self, realizer: Realizer | None, path: str) -> None:
        self.realizer = realizer
        self._report = events.ignore if realizer is None else realizer.report
        self._path = path

    def shown(self) -> AbstractContextManager[object]:
        """Shows the block as this piece of work."""
        return events.working(self._report, events.Started("differences", self._path, "check"))

    def say(self, text: str) -> None:
        """What is being looked at."""
        self._report(events.LogLine("differences", self._path, text))

    def check(self) -> None:
        """Raise Interrupted once `stop` is set."""
        if self.realizer is not None and self.realizer.stop.is_set():
            raise Interrupted("interrupted while two trees were being compared")


def _page(told: Sequence[compare.Difference], pairs: Mapping[str, object], names: tuple[str, str]) -> Mapping[str, Any]:
    """What diffoscope's page shows, in its own format; the pairs' findings are put in later."""
    details: list[dict[str, Any]] = []
    for each in told:
        name = _named(each.path)
        entry: dict[str, Any] = {"source1": name, "source2": name}
        if each.path in pairs and each.kind == "content":
            entry["pair"] = each.path
        else:
            place = _plain(each)
            entry["unified_diff"] = f"@@ -1 +1 @@\n{place.diff}\n"
            entry["comments"] = [each.kind]
        details.append(entry)
    return {"sources": {"source1": names[0], "source2": names[1]}, "details": details}


# --- merging ------------------------------------------------------------------------------------------------------


def _told(
    difference: compare.Difference, own: Mapping[str, Sequence[ContentPlace]], seen: Look | None
) -> list[ContentPlace]:
    """The places of one difference, ours and diffoscope's."""
    if difference.kind != "content":
        return [_plain(difference)]
    ours = list(own.get(difference.path, ()))
    theirs = list(seen.places.get(difference.path, ())) if seen is not None else []
    if not ours and not theirs:
        return [_plain(difference)]
    if len(ours) == 1 and not ours[0].member and ours[0].offset is None:
        ours[0] = replace(ours[0], offset=difference.offset, count=difference.count)
    return _merged(ours, theirs) if ours else [_located(theirs[0], difference), *theirs[1:]]


def _located(place: ContentPlace, difference: compare.Difference) -> ContentPlace:
    return place if place.member else replace(place, offset=difference.offset, count=difference.count)


def _merged(ours: Sequence[ContentPlace], theirs: Sequence[ContentPlace]) -> list[ContentPlace]:
    """Both, each place once: ours knows offsets and counts, diffoscope's diff is the better one to read, except for
    plain bytes, of which ours shows those around the first that differs."""
    structured = any(place.member for place in ours)
    left = [place for place in theirs if not (structured and _is_redundant(place))]
    merged = []
    for place in ours:
        same = [each for each in left if each.member == place.member]
        if same and place.kind in ("ELF section", "text line"):
            merged.append(replace(place, diff=same[0].diff))
        else:
            merged.append(place)
        if same and place.kind in ("bytes", "ELF section", "text line"):
            left = [each for each in left if each is not same[0]]
    return merged + left


def _is_redundant(place: ContentPlace) -> bool:
    """Whether this only says again, in general, what ours says of each member."""
    return not place.member or place.member[-1] in _REDUNDANT or place.kind == "listing"


def _plain(difference: compare.Difference) -> ContentPlace:
    """The difference itself as a place."""
    kind = difference.kind
    if kind == "content":
        text = f"-{difference.a}\n+{difference.b}"
        return ContentPlace((), "bytes", difference.offset, difference.count, text)
    if kind in ("only in a", "only in b"):
        sign, what = ("-", difference.a) if kind == "only in a" else ("+", difference.b)
        return ContentPlace((), "listing", None, None, f"{sign}{what} {_named(difference.path)}")
    values = [_named(each or "") for each in (difference.a, difference.b)]
    label = {"type": "type", "mode": "mode", "target": "symbolic link to"}[kind]
    return ContentPlace((), "metadata", None, None, f"-{label}: {values[0]}\n+{label}: {values[1]}")


def _detail(path: str, place: ContentPlace, excerpt_bytes: int) -> Detail:
    return Detail(_named(path), place.member, place.kind, place.offset, place.count, _cut(place.diff, excerpt_bytes))


def _cut(diff: str, most: int) -> str:
    """About so many bytes of a diff at most: its first lines, of either side no more than half."""
    diff = diff.encode("utf-8", "backslashreplace").decode()
    if len(diff.encode()) <= most:
        return diff
    lines = diff.split("\n")
    left = {"-": most // 2, "+": most // 2}
    kept = []
    for line in lines:
        sign = line[:1] if line[:1] in left else ("+" if left["+"] > left["-"] else "-")
        if left[sign] > 0:
            shown_line = line.encode()[: left[sign]].decode(errors="ignore")
            kept.append(shown_line if shown_line == line else f"{shown_line}…")
            left[sign] -= len(line.encode()) + 1
    missing = len(lines) - len(kept)
    return "\n".join([*kept, f"… ({missing} more line{'' if missing == 1 else 's'})"] if missing else kept)


def _named(path: str) -> str:
    return shown(os.fsencode(path)) or "."


def _explanation(tool: str, details: Sequence[Detail], causes: Sequence[Guess], truncated: str | None) -> Explanation:
    """With an id that is a function of what it says."""
    explanation = Explanation("", tool, tuple(details), tuple(causes), truncated)
    document = {**asdict(explanation), "id": None}
    return replace(explanation, id=hashlib.sha256(canonical_json(document)).hexdigest()[:16])
