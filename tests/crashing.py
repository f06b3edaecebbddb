"""Child processes that are killed at a chosen step of their work, for tests of what a crash leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import traceback
from collections.abc import Callable
from typing import Any

from vzrepro.base import disk


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child process; its pid. It exits with 0, or 1 if `work` raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Wait for a child; its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Doom:
    """Kills this process at the n-th step that is counted."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.counted_steps = 0

    def count(self) -> None:
        """One step is reached."""
        self.counted_steps += 1
        if self.counted_steps > self._step:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a step before and one after each call."""

        def call(*args: Any, **options: Any) -> Any:
            self.count()
            result = function(*args, **options)
            self.count()
            return result

        return call


def die_at(step: int, *more: str) -> Doom:
    """Have this process killed before or after its n-th call that changes the disk or the database; `more` names
    functions of `os` that count as well."""
    doom = Doom(step)

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            doom.count()
            return super().execute(sql, *args)

        def executescript(self, sql: str) -> sqlite3.Cursor:
            doom.count()
            return super().executescript(sql)

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)  # type: ignore[assignment]
    for name in ("rename", "replace", "fsync", "mkdir", "rmdir", "unlink", "chmod", "symlink", "ftruncate", *more):
        setattr(os, name, doom.counted(getattr(os, name)))
    disk.exchange = doom.counted(disk.exchange)
    return doom
