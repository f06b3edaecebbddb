"""Compare two trees byte by byte: exact, without Docker, with bounded memory.

What counts is what the store keeps of a tree (see `vzrepro.nar`): names, types, contents, executable bits and where
symbolic links point. Two trees without a difference here have the same NAR hash.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

_CHUNK = 1 << 18

DifferenceKind = Literal["only in a", "only in b", "type", "mode", "target", "content"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One path at which two trees differ.

    `path` is relative to both (surrogate escapes for names that are not UTF-8), empty for the trees themselves. `a` and
    `b` say in words what is there: a type, a mode, a link's target, a size; None where there is nothing. For
    contents `offset` is that of the first differing byte, and `count` how many positions differ, those beyond the
    shorter file's end included.
    """

    path: str
    kind: DifferenceKind
    a: str | None
    b: str | None
    offset: int | None = None
    count: int | None = None


def differences(a: Path, b: Path, *, check: Callable[[], None] = lambda: None) -> Iterator[Difference]:
    """What differs between two files, symbolic links or directories, a directory's missing names before what is in it.

    A directory that only one tree has is one difference, whatever is in it. `check` is called often and may raise to
    end this. Raises OSError for what cannot be read.
    """
    pending = [""]
    while pending:
        check()
        path = pending.pop()
        here, there = _at(a, path), _at(b, path)
        first, second = here.lstat(), there.lstat()
        kinds = _type(first.st_mode), _type(second.st_mode)
        if kinds[0] != kinds[1]:
            yield Difference(path, "type", *kinds)
        elif stat.S_ISDIR(first.st_mode):
            names, others = ({os.fsencode(entry.name) for entry in each.iterdir()} for each in (here, there))
            both = []
            for name in sorted(names | others):
                below = f"{path}/{os.fsdecode(name)}" if path else os.fsdecode(name)
                if name in names and name in others:
                    both.append(below)
                elif name in names:
                    yield Difference(below, "only in a", _type(_at(a, below).lstat().st_mode), None)
                else:
                    yield Difference(below, "only in b", None, _type(_at(b, below).lstat().st_mode))
            pending += reversed(both)
        elif stat.S_ISLNK(first.st_mode):
            targets = os.readlink(here), os.readlink(there)  # noqa: PTH115 - a Path would drop `./`
            if targets[0] != targets[1]:
                yield Difference(path, "target", *targets)
        elif stat.S_ISREG(first.st_mode):
            if (first.st_mode ^ second.st_mode) & stat.S_IXUSR:
                yield Difference(path, "mode", _mode(first.st_mode), _mode(second.st_mode))
            offset, count, sizes = _contents(here, there, check)
            if offset is not None:
                yield Difference(path, "content", f"{sizes[0]} bytes", f"{sizes[1]} bytes", offset, count)


def _at(root: Path, path: str) -> Path:
    return root / path if path else root


def _type(mode: int) -> str:
    for name, test in (("directory", stat.S_ISDIR), ("file", stat.S_ISREG), ("symbolic link", stat.S_ISLNK)):
        if test(mode):
            return name
    return "special file"


def _mode(mode: int) -> str:
    return f"{stat.S_IMODE(mode):04o}"


def _contents(a: Path, b: Path, check: Callable[[], None]) -> tuple[int | None, int, tuple[int, int]]:
    """Offset of the first differing byte (None: equal), how many differ, and both sizes as read."""
    offset: int | None = None
    count, sizes = 0, [0, 0]
    with a.open("rb", buffering=0) as one, b.open("rb", buffering=0) as other:
        while True:
            check()
            first, second = _filled(one), _filled(other)
            if not first and not second:
                return offset, count, (sizes[0], sizes[1])
            if first != second:
                at, differing = _chunk(first, second)
                offset = sizes[0] + at if offset is None else offset
                count += differing
            sizes[0] += len(first)
            sizes[1] += len(second)


def _filled(file: FileIO) -> bytes:
    """The next chunk, whole but at the end: a raw read may give less."""
    parts, missing = [], _CHUNK
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def differing(a: memoryview, b: memoryview) -> tuple[int | None, int]:
    """The offset of the first byte that differs in two contents (None: they are equal), and how many do."""
    offset: int | None = None
    count = 0
    for begin in range(0, max(len(a), len(b)), _CHUNK):
        first, second = bytes(a[begin : begin + _CHUNK]), bytes(b[begin : begin + _CHUNK])
        if first != second:
            at, more = _chunk(first, second)
            offset = begin + at if offset is None else offset
            count += more
    return offset, count


def _chunk(a: bytes, b: bytes) -> tuple[int, int]:
    """The same for two unequal chunks. Large integers do it: their bytes are gone through in C."""
    size = min(len(a), len(b))
    mask = (int.from_bytes(a[:size], "little") ^ int.from_bytes(b[:size], "little")).to_bytes(size, "little")
    beyond = max(len(a), len(b)) - size
    return size - len(mask.lstrip(b"\0")), size - mask.count(0) + beyond
