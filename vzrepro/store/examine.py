"""Comparing one object on the disk with what is registered: content, and everything that the NAR does not hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from vzrepro import nar
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import NarHash
from vzrepro.store.staged import StagedLinks

_SHOWN = 3  # deviations that are told


def differences(tree: Path, wanted: NarHash, staged: StagedLinks) -> list[str]:
    """How `tree` differs from the canonical tree with this hash, in words; nothing if it does not.

    Links of files that are `staged` for builds are no difference.
    """
    details: list[str] = []
    deviations: list[str] = []

    def inspect(status: os.stat_result, fd: int | None, path: Callable[[], str]) -> None:
        if wrong := _wrong(status, fd, path, staged):
            deviations.append(f"{Path(path()).relative_to(tree.parent)}: {', '.join(wrong)}")

    try:
        found, _ = nar.nar_hash(tree, inspect=inspect)
        if found != wanted:
            details.append(f"its content has changed (wanted {wanted.nix}, found {found.nix})")
        details += deviations[:_SHOWN]
        if len(deviations) > _SHOWN:
            details.append(f"{len(deviations) - _SHOWN} more")
    except (OSError, VzreproError) as error:
        details.append(str(error))
    return details


def _wrong(status: os.stat_result, fd: int | None, path: Callable[[], str], staged: StagedLinks) -> list[str]:
    """What in a node differs from the canonical form, apart from content."""
    wrong = []
    mode, kind = stat.S_IMODE(status.st_mode), stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFDIR:
        right = mode == 0o555
    else:
        right = kind == stat.S_IFLNK or mode in (0o444, 0o555)
        if status.st_nlink > 1 and not staged.explain(status, lambda: os.lstat(path()) if fd is None else os.fstat(fd)):
            wrong.append("has another hard link")
    if not right:
        wrong.append(f"mode {mode:04o}")
    if status.st_mtime_ns != 1_000_000_000:
        wrong.append("modified later")
    # Labels of security modules belong to the machine, not to the object.
    if hasattr(os, "listxattr"):
        names = os.listxattr(path(), follow_symlinks=False) if fd is None else os.listxattr(fd)
        wrong += [f"attribute {name}" for name in names if not name.startswith("security.") or "capab" in name]
    return wrong
