"""The evaluation cache and the no-op path of `vzrepro realize`: standard library only, a few milliseconds.

After a realization, a memo keeps what the evaluation read (every file and directory with its stat), the `VZREPRO_*`
variables, and for each target the store object with the stat of what is in it. While all of that is unchanged, the
answer is the same, and nothing else needs to be imported. Anything unexpected is a miss: the long way then decides.
"""

from __future__ import annotations

import json
import os
import sys
import zlib

TYPE_CHECKING = False  # not from `typing`, whose import costs milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_FORMAT = 1
_RACY_NS = 50_000_000  # a file changed this short before it was read could change again without its stat showing it
_MAX_ENTRIES = 256  # larger objects are checked at the top only

Stat = list[int] | None


def memo_path(root: str, environ: Mapping[str, str]) -> str:
    """Where the memo of the workspace `root` is: in the user's cache directory, never in the workspace."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.join(environ.get("HOME", "/nonexistent"), ".cache")
    return os.path.join(cache, "vzrepro", "evaluated", f"{os.path.basename(root)}-{zlib.crc32(os.fsencode(root)):08x}")


def answer(targets: Sequence[str], environ: Mapping[str, str]) -> list[str] | None:
    """The store objects' places for `targets` if nothing changed since they were realized, else None."""
    try:
        root = _workspace(os.getcwd())
        if root is None:
            return None
        with open(memo_path(root, environ), "rb") as file:
            memo = json.loads(file.read())
        if [memo["format"], memo["root"], memo["python"]] != [_FORMAT, root, sys.version]:
            return None
        if memo["environ"] != _settings(environ):
            return None
        objects = [memo["targets"][target] for target in targets]
        for path, stat in memo["reads"].items():
            if _stat(path) != stat:
                return None
        for entry in objects:
            for path, stat in entry["entries"].items():
                if _stat(path) != stat:
                    return None
        return [entry["location"] for entry in objects]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def remember(
    root: str,
    environ: Mapping[str, str],
    begun_ns: int,
    reads: Iterable[str],
    locations: Mapping[str, str],
) -> None:
    """Keep the answer for `locations` (target → the object's place), which depend on `reads` (absolute paths).

    `begun_ns` is when the evaluation began (`time.time_ns()`): what changed at that moment or later is not trusted,
    so nothing is kept then. Answers for other targets stay while they rest on the same reads. Failing to write is
    no error.
    """
    seen = {path: _stat(path) for path in sorted(reads)}
    if any(stat is not None and max(stat[0], stat[3]) > begun_ns - _RACY_NS for stat in seen.values()):
        return
    memo = {
        "format": _FORMAT,
        "root": root,
        "python": sys.version,
        "environ": _settings(environ),
        "reads": seen,
        "targets": {},
    }
    path = memo_path(root, environ)
    try:
        with open(path, "rb") as file:
            before = json.loads(file.read())
        if all(before[key] == memo[key] for key in memo if key != "targets"):
            memo["targets"] = before["targets"]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    memo["targets"].update(  # type: ignore[attr-defined]
        {target: {"location": location, "entries": _entries(location)} for target, location in locations.items()}
    )
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{os.getpid()}"
        with open(temporary, "w") as file:
            json.dump(memo, file)
        os.replace(temporary, path)
    except OSError:
        pass


def _workspace(folder: str) -> str | None:
    """The nearest directory upwards that has recipes/, with links resolved as `config.find_workspace` does."""
    folder = os.path.realpath(folder)
    while True:
        if os.path.isdir(os.path.join(folder, "recipes")):
            return folder
        parent = os.path.dirname(folder)
        if parent == folder:
            return None
        folder = parent


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in sorted(environ.items()) if name.startswith("VZREPRO_")}


def _stat(path: str) -> Stat:
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_mtime_ns, found.st_size, found.st_ino, found.st_ctime_ns, found.st_mode]


def _entries(location: str) -> dict[str, Stat]:
    """The object itself and what is in it. A lost, added or touched file changes one of these."""
    entries = {location: _stat(location)}
    pending = [location]
    while pending:
        folder = pending.pop()
        if not os.path.isdir(folder) or os.path.islink(folder):
            continue
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            entries[path] = _stat(path)
            pending.append(path)
            if len(entries) > _MAX_ENTRIES:
                return entries
    return entries
