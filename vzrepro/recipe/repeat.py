"""The recipes evaluated a second time, by a process of its own under other circumstances, and what differs.

No guard sees that a recipe used the order of a set or the path of the clone; a second evaluation shows it. It has
another hash seed, path, environment and time zone, another user where root runs vzrepro, and a later time. It works on
a copy of the files that the first one read.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Set
from itertools import takewhile
from pathlib import Path
from typing import Any

import vzrepro
from vzrepro.base import disk
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.recipe import lock as locks
from vzrepro.recipe.confined import evaluate, load_modules
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.plan import FieldChange, diff

_SEEDS = ("20260101", "1")  # the second one where the first is this process's own
_NOBODY = 65534
_MAX_TOLD = 10  # lines
_MAX_VALUE = 60  # characters of a value

_HINT = (
    "a recipe may not depend on the order of a set (use sorted), hash(), id(), the repr of an object, "
    "the clone's path, the environment, the user or the time"
)

Told = dict[str, dict[str, Any]]
"""By drv hash: `what` (place and target) and the derivation's `document`."""


def check(graph: DrvGraph, lock_file: Path, platform: str) -> None:
    """Evaluate once more what gave `graph`. Raises UsageError that names the artifacts that came out otherwise."""
    with tempfile.TemporaryDirectory(prefix="vzrepro-repeat-") as directory:
        folder = Path(directory).resolve()
        root = folder / "another" / "clone"
        root.mkdir(parents=True)
        copy_files({*graph.reads, lock_file}, graph.root, root)
        second = _evaluated_elsewhere(folder, root, lock_file.name, platform)
    found = [second] if isinstance(second, str) else differences(_told(graph), second)
    if found:
        more = [f"and {len(found) - _MAX_TOLD} more"] if len(found) > _MAX_TOLD else []
        raise UsageError(
            "the recipes give something else when they are evaluated a second time",
            reason="\n    ".join([*found[:_MAX_TOLD], *more]),
            hint=_HINT,
        )


def _told(graph: DrvGraph) -> Told:
    return {
        drv.hex: {"what": f"{node.place}: {node.target}", "document": node.drv.document()}
        for drv, node in graph.nodes.items()
    }


def differences(first: Told, second: Told) -> list[str]:
    """A line for each artifact that differs by itself, not only since an input does."""
    both = first.keys() & second.keys()
    before, after = _by_what(first, both), _by_what(second, both)
    lines = []
    for what in sorted({*before, *after}):
        old, new = before.get(what, []), after.get(what, [])
        if len(old) != len(new):
            lines.append(f"{what} is declared by one evaluation only")
            continue
        for one, other in zip(old, new, strict=True):
            own = [change for change in diff(one, other) if not _follows(change, both)]
            lines += [f"{what}: {_line(change)}" for change in own]
    return lines or sorted({*before, *after})


def _by_what(told: Told, known: Set[str]) -> dict[str, list[dict[str, Any]]]:
    """The documents of those that are not `known`; a loop may declare several at one place."""
    found: dict[str, list[dict[str, Any]]] = {}
    for drv in sorted(told.keys() - known):
        found.setdefault(told[drv]["what"], []).append(told[drv]["document"])
    return found


def _follows(change: FieldChange, known: Set[str]) -> bool:
    """Whether this is an input or image that differs itself."""
    both = change.before is not None and change.after is not None
    return both and change.field.startswith(("image", "inputs.")) and not {change.before, change.after} <= known


def _line(change: FieldChange) -> str:
    before, after = repr(change.before), repr(change.after)
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    same = max(0, alike - _MAX_VALUE // 2)
    cut = [f"{'…' * bool(same)}{each[same : same + _MAX_VALUE]}" for each in (before, after)]
    return f"{change.field} is {cut[0]}, then {cut[1]}"


def copy_files(paths: Iterable[Path], root: Path, place: Path) -> None:
    """Copy files, directories without what is in them, and symbolic links with what they lead to, from below `root` to
    the same names below `place`. Of modes the executable bit is kept, and no times are."""
    pending, done = list(paths), set()
    while pending:
        path = pending.pop()
        if path in done:
            continue
        done.add(path)
        real = Path(os.path.realpath(path.parent), path.name)
        if real != path:
            pending += [real, path.parent]
            continue
        if path == root or not path.is_relative_to(root):
            continue
        copy = place / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            disk.copy_link(path, copy)
            pending.append(Path(os.path.normpath(path.parent / path.readlink())))
        elif path.is_dir():
            copy.mkdir(exist_ok=True)
        elif path.is_file():
            disk.copy_file(path, copy)
            copy.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


def _evaluated_elsewhere(folder: Path, root: Path, lock_name: str, platform: str) -> Told | str:
    """What a child process makes of the workspace `root`, or why it could not."""
    answer, said = folder / "answer", folder / "stderr"
    environment = {
        "HOME": str(root),
        "LC_ALL": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": next(seed for seed in _SEEDS if seed != os.environ.get("PYTHONHASHSEED")),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TZ": "ELSEWHERE-13",
    }
    with said.open("wb") as errors:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(folder), str(root), str(root / lock_name), platform, str(answer)],
            cwd=root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            check=False,
        )
    if done.returncode:
        raise VzreproError(
            f"the process of the second evaluation ended with {done.returncode}",
            reason=said.read_text(errors="replace")[-2000:].strip() or None,
        )
    found: Told | str = json.loads(answer.read_bytes())
    return found


def _be_nobody(folder: Path) -> None:
    """Give `folder` to another user and become that user, where this is root and the user can come there, and to
    the files of `vzrepro.recipes`."""
    package = Path(vzrepro.__file__).resolve().parent
    ways = (*folder.parents, package, *package.parents)
    if os.geteuid() != 0 or not all(parent.stat().st_mode & 0o001 for parent in ways):
        return
    try:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    except OSError:
        return  # a container may lack the capability or the user: the other circumstances still differ


def main() -> None:
    """The child process: evaluate, and write what came of it."""
    folder, root, lock_file, platform, answer = sys.argv[1:]
    lock = locks.load(Path(lock_file))
    load_modules()  # while Python's own files can surely be read
    with Path(answer).open("w") as file:
        _be_nobody(Path(folder))
        found: Told | str
        try:
            found = _told(evaluate(Path(root), lock, platform))
        except VzreproError as error:
            found = error.in_a_line
        file.write(json.dumps(found))


if __name__ == "__main__":
    main()
