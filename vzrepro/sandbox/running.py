"""A run from start to end: its output, its limits, and the error for how it failed.

The engine's client is started in a session of its own, so that Ctrl-C does not reach it, and its output is read from a
pipe here: the output callbacks of `sh` decode text strictly, hold a line of any length in memory, and lose track of
time.
"""

from __future__ import annotations

import math
import os
import select
import shlex
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vzrepro.base.errors import BuildFailed, Interrupted, OutOfMemory, TimedOut, VzreproError
from vzrepro.sandbox import engine, sharing, ways
from vzrepro.sandbox.confine import run_arguments, shell_command
from vzrepro.sandbox.job import LINE_LIMIT, TAIL_LINES, Job
from vzrepro.sandbox.log import Log
from vzrepro.sandbox.places import volume_of
from vzrepro.sandbox.staging import Mounts
from vzrepro.sandbox.ways import Directories

_LOOK_SECS = 1.0
_LOOK_ANYWAY_SECS = 30.0


def run(job: Job, *, on_line: Callable[[str], None], stop: threading.Event | None = None) -> RunLimits:
    """Build: fill the sandbox's directories, run the command in a fresh container, remove that, return.

    Output, stdout and stderr in the order written, goes to `job.log` as it comes and line by line to `on_line` (called
    in this thread; text that is not UTF-8 is shown with replacement characters, long lines are cut). The result is in
    `job.out`, `discard` cleans up. Setting `stop` ends the build from another thread. However this ends, even by
    an exception in `on_line`, the container is gone before it returns.

    Returns the limits, which go on: whoever reads the result calls `check` now and then.

    Raises BuildFailed, TimedOut, Interrupted (`stop` or KeyboardInterrupt), or VzreproError when the container
    engine itself does not work.
    """
    way: Directories | None = None
    ended = False
    try:
        way = ways.way(job)
        way.fill(RunLimits(job, stop, way).check)
        limits = RunLimits(job, stop, way)
        _build(job, limits, on_line)
        limits.check_disk(at_end=True)
        way.take(limits.check)
        ended = True
        return limits
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted while {job.label} was being built") from error
    finally:
        if way is not None:
            way.end(keep=job.keep_failed and not ended)


def _build(job: Job, limits: RunLimits, on_line: Callable[[str], None]) -> None:
    """Run the command in its container, which is gone afterwards. Raises what `run` raises, and KeyboardInterrupt."""
    name = engine.new_name()
    client = None
    read_end, write_end = os.pipe()
    try:
        with (
            Log(job.log) as log,
            tempfile.TemporaryFile() as complaints,
            Path(os.devnull).open("rb") as nothing,
        ):
            output = _Output(log, on_line, limits.tail)
            try:
                client = engine.start(run_arguments(job, name), nothing, write_end, complaints)
                write_end = _close(write_end)
                _follow(read_end, output, limits)
                exit_code = engine.wait(client)
                complaints.seek(0)
                complaint = complaints.read().decode(errors="replace").strip()
                state = None if exit_code == 0 else engine.state(name)
            finally:
                engine.remove(name, client)
            if exit_code != 0:
                raise _failure(job, state, complaint, output.tail)
    finally:
        _close(write_end)
        _close(read_end)


class RunLimits:
    """When a build has to end: its time is over, it has taken too much of the disk, or it is not wanted any more.

    They hold from the command's start until its result has been read. `tail` are the log's last lines, which an error
    repeats. `way` counts what is taken of the disk.
    """

    def __init__(self, job: Job, stop: threading.Event | None, way: Directories | None = None) -> None:
        self._way = Mounts(job) if way is None else way
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._job = job
        self._stop = stop
        self._deadline = math.inf if job.timeout_secs is None else time.monotonic() + job.timeout_secs
        self._next_look = -math.inf
        self._look_anyway = -math.inf
        self._enough_free = 0.0  # with more free than that, no look is needed yet

    @property
    def secs(self) -> float:
        """Seconds until the time limit; infinity where there is none."""
        return self._deadline - time.monotonic()

    def check(self, size: int = 0) -> None:
        """Raise Interrupted, TimedOut or, when the result has more than the allowed bytes, of which `size` have been
        read, BuildFailed."""
        if self._stop is not None and self._stop.is_set():
            raise Interrupted(f"interrupted while {self._job.label} was being built")
        if self.secs <= 0:
            raise TimedOut(
                f"building {self._job.label} took longer than its time limit of {self._job.timeout_secs:g} s",
                reason=_log_excerpt(self._job, self.tail),
                hint=f"raise the recipe's time limit, or look at what hangs: {_reopen(self._job)}",
            )
        if self._job.disk_bytes is not None and size > self._job.disk_bytes:
            self._too_much("is larger than", "what it leaves in /out")

    def check_disk(self, *, at_end: bool = False) -> None:
        """Raise BuildFailed when /build and /out together hold too much; as `check` does while that is being counted.

        Counting a large tree takes a while, so it waits until the disk has lost so much that the limit may have been
        reached, and for half a minute at most: others may have given something back.
        """
        limit = self._job.disk_bytes
        now = time.monotonic()
        if limit is None or (now < self._next_look and not at_end):
            return
        free = self._way.free(self.check)
        if free > self._enough_free and now < self._look_anyway:
            self._next_look = now + _LOOK_SECS
            return
        used = self._way.used(limit, self.check)
        if used > limit:
            self._too_much("takes more than", "what it has in /build and /out")
        took = time.monotonic() - now
        self._next_look = now + max(_LOOK_SECS, 20 * took)
        self._look_anyway = now + max(_LOOK_ANYWAY_SECS, 20 * took)
        self._enough_free = free - (limit - used)

    def _too_much(self, is_more: str, what: str) -> NoReturn:
        assert self._job.disk_bytes is not None
        raise BuildFailed(
            f"building {self._job.label} failed: {what} {is_more} its limit of {self._job.disk_bytes / 2**30:g} GiB",
            reason=_log_excerpt(self._job, self.tail),
            hint="raise the recipe's disk_gib, or disk-gib in your configuration (VZREPRO_DISK_GIB)",
        )


class _Output:
    """Takes the builder's bytes: into the log, line by line to the caller, the last lines into `tail`."""

    def __init__(self, log: Log, on_line: Callable[[str], None], tail: deque[str]) -> None:
        self.tail = tail
        self._log = log
        self._on_line = on_line
        self._line = bytearray()
        self._cut = 0

    def feed(self, chunk: bytes) -> None:
        self._log.write(chunk)
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._append(piece)
            self._emit()
        self._append(rest)

    def finish(self) -> None:
        if self._line:
            self._emit()

    def _append(self, piece: bytes) -> None:
        kept = piece[: LINE_LIMIT - len(self._line)]
        self._line += kept
        self._cut += len(piece) - len(kept)

    def _emit(self) -> None:
        text = self._line.decode(errors="replace").rstrip("\r")
        if self._cut:
            text += f" … ({self._cut} more bytes, in the log)"
        self._line.clear()
        self._cut = 0
        self.tail.append(text)
        self._on_line(text)


def _follow(read_end: int, output: _Output, limits: RunLimits) -> None:
    """Pass on the client's output until it ends, or a limit is reached."""
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    while True:
        limits.check()
        limits.check_disk()
        if poll.poll(max(0.0, min(0.1, limits.secs)) * 1000):
            chunk = os.read(read_end, 1 << 16)
            if not chunk:
                output.finish()
                return
            output.feed(chunk)


def _failure(job: Job, state: Mapping[str, Any] | None, complaint: str, tail: deque[str]) -> VzreproError:
    """The error for a container whose client ended with a non-zero code."""
    if sharing.mount_failed(complaint):
        sharing.forget(job.scratch)
        return VzreproError(
            "the container engine does not see this machine's files any more",
            reason=complaint,
            hint="run the same command again: then they are sent to it",
        )
    if state is None or state.get("Error") or state.get("Status") != "exited":
        return engine.trouble(complaint or f"the container of {job.label} ended without a result")
    code = int(state["ExitCode"])
    excerpt = _log_excerpt(job, tail)
    limit = None if job.memory_bytes is None else f"its memory limit of {job.memory_bytes / 2**20:.0f} MiB"
    more_memory = (
        "raise the recipe's memory_gib, or memory-gib in your configuration (VZREPRO_MEMORY_GIB), "
        "or let it do less at once: --cores 1"
    )
    if state.get("OOMKilled"):
        return OutOfMemory(
            f"building {job.label} ran out of memory: it needs more than {limit or 'the host has'} (exit code {code})",
            reason=excerpt,
            hint=more_memory,
        )
    if code == 128 + signal.SIGKILL and limit is not None:
        # Engines miss some kills for memory; nothing else in a sandbox is likely to send this signal.
        return OutOfMemory(
            f"building {job.label} failed: it was killed (exit code {code}), most likely for {limit}",
            reason=excerpt,
            hint=more_memory,
        )
    how = f"exit code {code}, killed by signal {code - 128}" if code > 128 else f"exit code {code}"
    return BuildFailed(f"building {job.label} failed: {how}", reason=excerpt, hint=_reopen(job))


def _log_excerpt(job: Job, tail: deque[str]) -> str:
    lines = ["the end of its log:"] if tail else ["it printed nothing"]
    return "\n".join([*lines, *(f"    {line}" for line in tail), f"  the whole log is in {job.log}"])


def _reopen(job: Job) -> str:
    if job.keep_failed:
        note = volume_of(job)
        where = job.build if note is None else f"the volume of the container {note.container}"
        more = "" if note is None else f"remove it with: {engine.remove_command(note.container)}; "
        return f"/build is kept in {where}; {more}reopen the sandbox with:\n    {shlex.join(shell_command(job))}"
    return f"vzrepro shell {shlex.quote(job.label)}   (or keep /build as it is: --keep-failed)"


def _close(descriptor: int) -> int:
    """Close a file descriptor if it is still open; returns -1, which stands for closed."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1
