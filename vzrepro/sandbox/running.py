"""A run from start to end: its output, its limits, and the error for how it failed.

The engine's client is started in a session of its own, so that Ctrl-C does not reach it, and its output is read from a
pipe here: the output callbacks of `sh` decode text strictly, hold a line of any length in memory, and lose track of
time.
"""

from __future__ import annotations

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
from typing import Any, BinaryIO

from vzrepro.errors import BuildFailed, Interrupted, TimedOut, VzreproError
from vzrepro.sandbox import engine
from vzrepro.sandbox.confine import run_arguments, shell_command
from vzrepro.sandbox.job import LINE_LIMIT, TAIL_LINES, Job
from vzrepro.sandbox.staging import prepare


def run(job: Job, *, on_line: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Build: prepare the scratch directory, run the command in a fresh container, remove that, return.

    Output, stdout and stderr in the order written, goes to `job.log` as it comes and line by line to `on_line` (called
    in this thread; text that is not UTF-8 is shown with replacement characters, long lines are cut). The result is in
    `job.out`, `discard` cleans up. Setting `stop` ends the build from another thread. However this ends, even by
    an exception in `on_line`, the container is gone before it returns.

    Raises BuildFailed, TimedOut, Interrupted (`stop` or KeyboardInterrupt), or VzreproError when the container
    engine itself does not work.
    """
    name = engine.new_name()
    client = None
    read_end, write_end = os.pipe()
    try:
        prepare(job)
        deadline = None if job.timeout_secs is None else time.monotonic() + job.timeout_secs
        with (
            job.log.open("ab", buffering=0) as log,
            tempfile.TemporaryFile() as complaints,
            Path(os.devnull).open("rb") as nothing,
        ):
            output = _Output(log, on_line)
            try:
                client = engine.start(run_arguments(job, name), nothing, write_end, complaints)
                write_end = _close(write_end)
                _follow(job, read_end, output, deadline, stop)
                exit_code = engine.wait(client)
                complaints.seek(0)
                complaint = complaints.read().decode(errors="replace").strip()
                state = None if exit_code == 0 else engine.state(name)
            finally:
                engine.remove(name, client)
            if exit_code != 0:
                raise _failure(job, state, complaint, output.tail)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted while {job.label} was being built") from error
    finally:
        _close(write_end)
        _close(read_end)


class _Output:
    """Takes the builder's bytes: all of them into the log, line by line to the caller, the last lines kept."""

    def __init__(self, log: BinaryIO, on_line: Callable[[str], None]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._log = log
        self._on_line = on_line
        self._line = bytearray()
        self._cut = 0

    def feed(self, chunk: bytes) -> None:
        self._write(chunk)
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._append(piece)
            self._emit()
        self._append(rest)

    def finish(self) -> None:
        if self._line:
            self._emit()

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[self._log.write(view) :]
        except OSError as error:
            raise VzreproError(
                f"the build log {self._log.name} cannot be written",
                reason=os.strerror(error.errno or 0),
                hint=f"look at the space left with: df -h {shlex.quote(str(Path(self._log.name).parent))}",
            ) from error

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


def _follow(job: Job, read_end: int, output: _Output, deadline: float | None, stop: threading.Event | None) -> None:
    """Pass on the client's output until it ends, the time is over (TimedOut) or `stop` is set (Interrupted)."""
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    while True:
        if stop is not None and stop.is_set():
            raise Interrupted(f"interrupted while {job.label} was being built")
        left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
        if left <= 0:
            raise TimedOut(
                f"building {job.label} took longer than its time limit of {job.timeout_secs:g} s",
                reason=_log_excerpt(job, output.tail),
                hint=f"raise the recipe's time limit, or look at what hangs: {_reopen(job)}",
            )
        if poll.poll(left * 1000):
            chunk = os.read(read_end, 1 << 16)
            if not chunk:
                output.finish()
                return
            output.feed(chunk)


def _failure(job: Job, state: Mapping[str, Any] | None, complaint: str, tail: deque[str]) -> VzreproError:
    """The error for a container whose client ended with a non-zero code."""
    if state is None or state.get("Error") or state.get("Status") != "exited":
        return engine.trouble(complaint or f"the container of {job.label} ended without a result")
    code = int(state["ExitCode"])
    excerpt = _log_excerpt(job, tail)
    limit = None if job.memory_bytes is None else f"its memory limit of {job.memory_bytes / 2**20:.0f} MiB"
    more_memory = (
        "raise the recipe's memory limit, or memory_gib in [tool.vzrepro] (VZREPRO_MEMORY_GIB), "
        "or let it do less at once: --cores 1"
    )
    if state.get("OOMKilled"):
        return BuildFailed(
            f"building {job.label} ran out of memory: it needs more than {limit or 'the host has'} (exit code {code})",
            reason=excerpt,
            hint=more_memory,
        )
    if code == 128 + signal.SIGKILL and limit is not None:
        # Engines miss some kills for memory; nothing else in a sandbox is likely to send this signal.
        return BuildFailed(
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
        return f"/build is kept in {job.build}; reopen the sandbox with:\n    {shlex.join(shell_command(job))}"
    return f"vzrepro shell {shlex.quote(job.label)}   (or keep /build as it is: --keep-failed)"


def _close(descriptor: int) -> int:
    """Close a file descriptor if it is still open; returns -1, which stands for closed."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1
