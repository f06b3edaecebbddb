"""A directory that takes different names for one, as disks of macOS and Windows do: a shim below `os`.

The kernels that tests run on have no such file system: no vfat, and ext4 and xfs without their case-insensitive forms.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

IGNORED: dict[str, Callable[[str], str]] = {
    "case": str.casefold,
    "form": lambda name: unicodedata.normalize("NFC", name),
    "form, and writes another": lambda name: unicodedata.normalize("NFD", name),
}

_CALLS = ("open", "mkdir", "symlink", "lstat", "stat", "utime", "unlink", "rmdir")


def fold(monkeypatch: pytest.MonkeyPatch, root: Path, ignored: str) -> None:
    """From now on names below `root` are kept in a folded form, so that those which differ only in it are one."""
    folded = IGNORED[ignored]
    top = f"{root}/"

    def convert(path: Any, dir_fd: int | None) -> Any:
        if isinstance(path, int):
            return path
        text = os.fsdecode(path)
        if dir_fd is not None:
            if os.readlink(f"/proc/self/fd/{dir_fd}").startswith(top):  # noqa: PTH115
                text = folded(text)
        elif text.startswith(top):
            text = top + folded(text.removeprefix(top))
        return os.fsencode(text) if isinstance(path, bytes) else text

    def below(real: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*args: Any, dir_fd: int | None = None, **options: Any) -> Any:
            given = list(args)
            given[at] = convert(given[at], dir_fd)
            return real(*given, dir_fd=dir_fd, **options)

        return call

    for name in _CALLS:
        monkeypatch.setattr(os, name, below(getattr(os, name), 1 if name == "symlink" else 0))
