"""The two ways in which a sandbox comes to its directories: mounted from here, or sent to the engine and fetched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from vzrepro.base import disk
from vzrepro.sandbox.job import Job
from vzrepro.sandbox.sharing import sharing_of
from vzrepro.sandbox.staging import Mounts, discard_directories
from vzrepro.sandbox.volume import BuildVolume, discard_volume


class Directories(Protocol):
    """Where a job's directories are while it runs.

    Whoever calls `fill` calls `end`, whatever has happened. What is called as `go_on` or `check` (with the bytes of the
    result that have been read) may raise, and ends what is going on.
    """

    def fill(self, go_on: Callable[[], None], /) -> None:
        """Have there what the sandbox is to show. Raises VzreproError."""

    def free(self, go_on: Callable[[], None], /) -> int:
        """Bytes that are left where /build and /out are."""

    def used(self, enough: int, go_on: Callable[[], None], /) -> int:
        """Bytes in /build and /out; counting may end once there are more than `enough`."""

    def take(self, check: Callable[[int], None], /) -> None:
        """Have in `job.out` what the builder left in /out. Raises VzreproError."""

    def end(self, *, keep: bool) -> None:
        """Remove what is not below the job's scratch directory; with `keep`, leave it to be looked at."""


def way(job: Job) -> Directories:
    """The way that is right for the engine. Raises VzreproError when that does not work."""
    return Mounts(job) if sharing_of(job.scratch).mounts else BuildVolume(job)


def prepare(job: Job) -> None:
    """Fill the job's /in, and make /build and /out, empty and for the sandbox's user. `run` does this itself;
    `vzrepro shell` needs it before `shell_command`. Raises VzreproError."""
    found = way(job)
    filled = False
    try:
        found.fill(lambda: None)
        filled = True
    finally:
        found.end(keep=filled)


def discard(job: Job, *, stop: threading.Event | None = None) -> None:
    """Remove the job's directories, whatever the builder left in them and whoever owns that.

    Raises Interrupted some seconds after `stop` was set, TimedOut when it takes longer than the build may: the rest
    is left to whoever owns the scratch directory.
    """
    discard_volume(job)
    discard_directories(job, disk.until_stopped(stop, job.timeout_secs))
