"""Child processes that are killed at a chosen step of their work, for tests of what a crash leaves."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import Any


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
        self._left = step

    def count(self) -> None:
        """One step is reached."""
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with a step before and one after each call."""

        def call(*args: Any, **options: Any) -> Any:
            self.count()
            result = function(*args, **options)
            self.count()
            return result

        return call
