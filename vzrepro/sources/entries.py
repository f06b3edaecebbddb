"""The rules for what an archive or a commit unpacks to: which of its entries may become a tree, and which are an error.

Nothing in an entry is trusted, and nothing is guessed: a name that leads elsewhere, lies below a link or comes twice
ends it all, because whoever wrote it meant something that no tree can hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

CHUNK = 1 << 20
"""File bodies come in pieces of at most this many bytes."""

_MAX_ENTRIES = 1_000_000
MAX_PATH = 4096
"""Bytes, about, that a path or a link's target may have."""

PathKind = Literal["dir", "file", "symlink", "hardlink"]

Refuse = Callable[[str], NoReturn]
"""Raises the error whose reason is this text."""


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """One path of an archive.

    `path` is relative to the root, without `.`, `..`, empty parts or a trailing slash; bytes that are not UTF-8 are
    surrogate escapes. `mode` holds the nine permission bits only: setuid, setgid and sticky are gone. `target` is a
    symlink's text, or the path of the earlier regular file a hard link means. `body` gives a regular file's `size`
    bytes; what is left of it is skipped when the next entry is asked for.
    """

    path: str
    kind: PathKind
    mode: int
    size: int
    target: str
    body: Iterator[bytes]


def checked(
    entries: Iterable[ArchiveEntry], refuse: Refuse, *, links_stay_inside: bool = False
) -> Iterator[ArchiveEntry]:
    """The entries, whose paths are as the archive spells them, once each was seen to be fit for a tree.

    With `links_stay_inside`, a relative symlink must not climb past the root; else its text is left alone: links are
    written, never followed. Calls `refuse` for an absolute path or `..`, an entry below a symlink or file, a hard link
    to nothing, a path given twice, more than a million entries.
    """
    kinds: dict[str, PathKind] = {}
    regular: dict[str, str] = {}
    directories = {""}
    for raw in entries:
        path = _path(raw.path, refuse)
        if not path:
            if raw.kind != "dir":
                refuse(f"its root is a {raw.kind}")
            continue
        _check_parents(path, kinds, directories, refuse)
        if path in kinds and not (raw.kind == "dir" == kinds[path]):
            refuse(f"it holds {path} twice")
        if raw.kind != "dir" and path in directories:
            refuse(f"{path} is a {raw.kind}, but files were put below it")
        target = ""
        match raw.kind:
            case "symlink":
                target = _symlink(path, raw.target, links_stay_inside, refuse)
            case "hardlink":
                target = _path(raw.target, refuse)
                if target not in regular:
                    refuse(f"{path} is a hard link to {target!r}, which is no earlier regular file")
                target = regular[path] = regular[target]
            case "file":
                regular[path] = path
            case "dir":
                directories.add(path)
        kinds[path] = raw.kind
        if len(kinds) > _MAX_ENTRIES:
            refuse(f"it holds more than {_MAX_ENTRIES} entries")
        yield replace(raw, path=path, target=target)


def _path(raw: str, refuse: Refuse) -> str:
    if raw.startswith("/"):
        refuse(f"the path {raw!r} is absolute")
    if "\0" in raw:
        refuse(f"the path {raw!r} has a NUL byte")
    parts = [part for part in raw.split("/") if part not in ("", ".")]
    if ".." in parts:
        refuse(f"the path {raw!r} leads upwards")
    if len(raw) > MAX_PATH:
        refuse(f"a path of {len(raw)} characters")
    return "/".join(parts)


def _check_parents(path: str, kinds: dict[str, PathKind], directories: set[str], refuse: Refuse) -> None:
    parent = path.rpartition("/")[0]
    new = []
    while parent not in directories:
        if parent in kinds:
            refuse(f"{path} lies below {parent}, which is a {kinds[parent]}")
        new.append(parent)
        parent = parent.rpartition("/")[0]
    directories.update(new)


def _symlink(path: str, target: str, stays_inside: bool, refuse: Refuse) -> str:
    """An absolute target stays in an image, because that is its root; a relative one must not climb past it."""
    if not target or "\0" in target or len(target) > MAX_PATH:
        refuse(f"{path} is a symlink to {target[:80]!r}")
    if stays_inside and not target.startswith("/"):
        depth = path.count("/")
        for part in target.split("/"):
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            if depth < 0:
                refuse(f"{path} is a symlink to {target!r}, outside the root")
    return target
