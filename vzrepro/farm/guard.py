"""A process beside a worker, which removes the worker's containers when that has died, however it died."""

from __future__ import annotations

import contextlib
import sys
import time

from vzrepro import sandbox
from vzrepro.base.errors import VzreproError

_AGAIN_SECS = 2.0


def main() -> None:
    """Wait for the end of standard input, which the worker holds open, and writes to if it ends as it should. The
    engine may have been creating a container just then, so there is a second look."""
    if sys.stdin.buffer.read():
        return
    for pause in (0.2, _AGAIN_SECS):
        time.sleep(pause)
        with contextlib.suppress(VzreproError):
            sandbox.sweep()
