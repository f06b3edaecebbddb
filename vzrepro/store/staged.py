"""Which hard links of objects' files are sandboxes' inputs: of builds that run, were killed, or are kept."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

_SCANS = 100  # a store that somebody has linked elsewhere, file by file, is not worth more
_TRIES = 5


class StagedLinks:
    """The links below `tmp`, the directory of a store's scratch directories, found out when they are asked for.

    A sandbox has its inputs in `in`, and files that an audit mounts in `files`, beside `etc` (vzrepro.sandbox); what
    builders make is not looked at. Only there do links to an object's files belong to the store itself.
    """

    def __init__(self, tmp: Path) -> None:
        self._tmp = tmp
        self._scans = 0
        self._links: Counter[tuple[int, int]] = Counter()

    def explain(self, status: os.stat_result, again: Callable[[], os.stat_result]) -> bool:
        """Whether all links of a file but its own are staged ones; `again` gives its status anew.

        Builds may begin and end meanwhile: an answer counts if the number of links was the same before and after.
        """
        for _ in range(_TRIES):
            if status.st_nlink == 1 + self._links[status.st_dev, status.st_ino]:
                return True
            if self._scans >= _SCANS:
                return False
            self._scans += 1
            self._links = Counter(self._scan())
            before, status = status.st_nlink, again()
            if status.st_nlink == before:
                return before == 1 + self._links[status.st_dev, status.st_ino]
        return True

    def _scan(self) -> Iterator[tuple[int, int]]:
        pending = [
            sandbox / name
            for scratch in _folders(self._tmp)
            for sandbox in (scratch, *_folders(scratch))
            if (sandbox / "etc").is_dir()
            for name in ("in", "files")
        ]
        while pending:
            try:
                with os.scandir(pending.pop()) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            pending.append(Path(entry.path))
                        elif entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            yield status.st_dev, status.st_ino
            except OSError:  # it has just ended
                continue


def _folders(directory: Path) -> list[Path]:
    try:
        return [entry for entry in directory.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError:
        return []
