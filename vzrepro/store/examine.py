"""Comparing one object on the disk with what is registered: content first, then everything the NAR does not hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vzrepro import nar
from vzrepro.errors import VzreproError
from vzrepro.model import NarHash

_SHOWN = 3  # deviations that are told


def differences(tree: Path, wanted: NarHash) -> list[str]:
    """How `tree` differs from the canonical tree with this hash, in words; nothing if it does not."""
    details = []
    try:
        found, _ = nar.nar_hash(tree)
        if found != wanted:
            details.append(f"its content has changed (wanted {wanted.nix}, found {found.nix})")
        deviations = list(_deviations(tree))
        details += deviations[:_SHOWN]
        if len(deviations) > _SHOWN:
            details.append(f"{len(deviations) - _SHOWN} more")
    except (OSError, VzreproError) as error:
        details.append(str(error))
    return details


def _deviations(tree: Path) -> Iterator[str]:
    """What in a tree differs from the canonical form, apart from content: one line for each entry."""
    paths = [tree]
    while paths:
        path = paths.pop()
        status = path.lstat()
        wrong = []
        if stat.S_ISDIR(status.st_mode):
            paths += sorted(path.iterdir(), reverse=True)
            modes: tuple[int, ...] = (0o555,)
        else:
            modes = (0o444, 0o555)
            if status.st_nlink > 1:
                wrong.append("has another hard link")
        if not stat.S_ISLNK(status.st_mode) and stat.S_IMODE(status.st_mode) not in modes:
            wrong.append(f"mode {stat.S_IMODE(status.st_mode):04o}")
        if status.st_mtime_ns != 1_000_000_000:
            wrong.append("modified later")
        # Labels of security modules belong to the machine, not to the object.
        if hasattr(os, "listxattr"):
            names = os.listxattr(path, follow_symlinks=False)
            wrong += [f"attribute {name}" for name in names if not name.startswith("security.") or "capab" in name]
        if wrong:
            yield f"{path.relative_to(tree.parent)}: {', '.join(wrong)}"
