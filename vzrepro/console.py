"""The only printer: turns events, errors, text and tables into a live display, plain log lines or JSON lines.

What a script wants (paths, tables, text, and everything under `--json`) goes to stdout; what a person watches goes to
stderr. docs/events.md describes the JSON lines.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TextIO

from vzrepro.base.errors import VzreproError
from vzrepro.base.events import (
    Event,
    Failed,
    Finished,
    LogLine,
    Notice,
    Phase,
    Planned,
    Progress,
    Result,
    Started,
    Waiting,
)
from vzrepro.base.words import duration, size

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

Mode = Literal["auto", "plain", "json"]
"""`auto`: a live display where stderr is a terminal, else plain lines · `plain`: always lines · `json`: JSON lines."""

TableCell = str | int | float | None
Pieces = list[tuple[str, str]]
"""A line as (text, style) pairs; a style is a key of `_SGR`."""

_OUTCOME_STYLES = {"DIFFERS": "red", "BUILD_FAILED": "red", "INCONCLUSIVE": "yellow"}
_SGR = {"": "", "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold red": "1;31"}
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_LINES_AT_ONCE = 1000
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LINE_BREAK = re.compile(r"[\t\n\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What would make more than one cell of a cell: line breaks, tabs, and marks that turn the direction of writing."""

_FRAME_SECS = 0.125
_PROGRESS_SECS = 10.0
"""In a log, an object's bytes are reported at most this often."""
_ALIVE_SECS = 60.0
"""In a log, work that nothing else is heard of is reported to go on this often, to within a quarter."""


def clean(text: str) -> str:
    """`text` without escape sequences and control characters, so that a builder's output cannot drive a terminal."""
    return _CONTROL.sub("", _ESCAPE.sub("", text))


def _cleaned(text: str) -> str:
    """`clean` for lines: what one of them leaves open ends with it."""
    return "\n".join(map(clean, text.split("\n")))


class _Sink:
    """A text stream that never raises: a closed pipe makes it silent, another failure is kept in `error`.

    Characters that the stream's encoding lacks are written as escapes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"
        self.error: OSError | None = None
        self._silent = False

    def write(self, text: str) -> int:
        if not self._silent:
            fits = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self._attempt(lambda: self._stream.write(fits))
        return len(text)

    def flush(self) -> None:
        if not self._silent:
            self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def line(self, text: str) -> None:
        self.write(text + "\n")
        self.flush()

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._silent = True
            if not isinstance(error, BrokenPipeError):
                self.error = error
            # What the stream still buffers would fail once more when the interpreter flushes it at exit.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)


@dataclass(slots=True)
class _Job:
    """One object under way; times are monotonic seconds."""

    target: str
    action: str
    since: float
    expected_secs: float | None = None
    total_bytes: int | None = None
    done_bytes: int | None = None
    rate_from: tuple[float, int] | None = None
    """When the first bytes were reported and how many: a resumed download's old bytes are not speed."""
    line: str = ""
    holder: str | None = None
    said: float = 0.0


@dataclass(slots=True)
class _Work:
    """What is under way, as the events told it."""

    since: float
    jobs: dict[str, _Job] = field(default_factory=dict)
    done: int = 0
    planned: Planned | None = None

    def apply(self, event: Event, now: float) -> _Job | None:
        """Take `event` in; returns the job it belongs to, if any (for the last time when it is `Finished`)."""
        match event:
            case Planned():
                self.planned, self.done, self.since = event, 0, now
            case Started():
                job = _Job(_named(event), event.action, now, event.expected_secs, event.total_bytes, said=now)
                self.jobs[event.path] = job
                return job
            case Waiting():
                job = self.jobs.setdefault(event.path, _Job(event.target, "wait", now, said=now))
                job.holder = event.holder
                return job
            case Progress():
                if (known := self.jobs.get(event.path)) is not None:
                    known.done_bytes, known.total_bytes = event.done_bytes, event.total_bytes or known.total_bytes
                    known.rate_from = known.rate_from or (now, event.done_bytes)
                return known
            case LogLine():
                if (known := self.jobs.get(event.path)) is not None and (line := clean(event.line).strip()):
                    known.line = line
                return known
            case Finished():
                self.done += event.action != "push"  # pushes are not part of the plan
                return self.jobs.pop(event.path, None)
        return None

    @property
    def total(self) -> int | None:
        """How many objects the plan works on, None without a plan."""
        return None if self.planned is None else sum(self.planned.actions.values())


class Console:
    """Shows what happens. Create one, use it as a context manager (or call `close`), give `report` to the work.

    Every method may be called from any thread. `verbose` echoes the builders' log lines. `environ` is looked at for
    TERM and NO_COLOR; the clocks are parameters for the tests' sake.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        stdout: TextIO,
        stderr: TextIO,
        verbose: bool = False,
        environ: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = _Sink(stdout)
        self._err = _Sink(stderr)
        self._mode = mode
        self.verbose = verbose
        self._clock = clock
        self._monotonic = monotonic
        # Reentrant: a signal handler may report while this thread reports.
        self._lock = threading.RLock()
        capable = environ.get("TERM", "dumb") not in ("", "dumb")
        self._colour_allowed = capable and not environ.get("NO_COLOR")
        self._may_draw = mode == "auto" and capable and self._err.isatty()
        self._work = _Work(monotonic())
        self._live: Live | None = None
        self._ticker: _Ticker | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(VzreproError):
                self.close()

    def close(self) -> None:
        """Take the live display away and give the cursor back. Can be repeated; printing afterwards still works.

        Raises VzreproError when something meant for stdout was lost (a full disk; a closed pipe is no loss).
        """
        with self._lock:
            self._stop_drawing()
            if self._ticker is not None:
                self._ticker.stop()
            lost, self._out.error = self._out.error, None
        if lost is not None:
            raise VzreproError(
                "standard output could not be written",
                reason=lost.strerror or str(lost),
                hint="send it to a place that has room and run the command again",
            )

    def report(self, event: Event) -> None:
        """Show `event`: the `events.Report` of every command."""
        with self._lock:
            if self._mode == "json":
                self._print_json({"event": event.kind, "time": _rfc3339(self._clock(), "milliseconds")} | asdict(event))
                return
            now = self._monotonic()
            job = self._work.apply(event, now)
            if isinstance(event, Result):
                self._to_stdout(event.location)
            elif isinstance(event, Failed):
                self._stop_drawing()
                for pieces in _error_lines(event):
                    self._above(pieces, stamp=False)
            elif self._may_draw:
                self._draw(event)
            else:
                if (line := self._log_line(event, job, now)) is not None:
                    self._above(line)
                self._watch_silent_jobs()

    def show_error(self, error: VzreproError) -> None:
        """Show why the command ends."""
        self.report(Failed(error.message, error.reason, error.hint, error.exit_code))

    def print_text(self, text: str, document: Mapping[str, Any] | None = None) -> None:
        """Print an answer on stdout, `clean`, whoever its text is by; under `--json` the `document` as one line,
        `{"text": …}` when there is none."""
        with self._lock:
            if self._mode == "json":
                self._print_json({"text": text} if document is None else document)
            else:
                self._to_stdout(_cleaned(text.removesuffix("\n")))

    def print_lines(self, lines: Iterable[str]) -> None:
        """Print lines on stdout as they come; under `--json` all of them as one `{"text": …}`."""
        if self._mode == "json":
            self.print_text("\n".join(lines))
            return
        lines = iter(lines)
        while some := list(itertools.islice(lines, _LINES_AT_ONCE)):
            with self._lock:
                self._to_stdout("\n".join(some))

    def print_table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[TableCell]],
        documents: Iterable[Mapping[str, Any]] | None = None,
    ) -> str | None:
        """Print rows on stdout, aligned below `columns`; under `--json` one object per row, keyed by column, or those
        `documents` when programs want more than people do.

        Numbers are aligned right. None is shown as `-`, and is null in JSON. Returns the table, None under `--json`.
        What the cells say is `clean`.
        """
        cells = [tuple(row) for row in rows]
        with self._lock:
            if self._mode == "json":
                for each in documents or (dict(zip(columns, row, strict=True)) for row in cells):
                    self._print_json(each)
                return None
            heading, *body = (_cleaned(line) for line in aligned(columns, cells))
            bold = self._colour_allowed and self._out.isatty()
            text = "\n".join([_ansi([(heading, "bold")]) if bold else heading, *body])
            self._to_stdout(text)
            return text

    def _print_json(self, document: Mapping[str, Any]) -> None:
        self._out.line(json.dumps(document))

    def _to_stdout(self, text: str) -> None:
        # stdout may be the terminal that is drawn on; the next event draws again.
        self._stop_drawing()
        self._out.line(text)

    def _above(self, pieces: Pieces, *, stamp: bool = True) -> None:
        """Write a line on stderr for good, above the live display if there is one."""
        if self._live is not None:
            self._live.console.print(_text(pieces), soft_wrap=True)
            return
        if stamp and not self._may_draw:
            pieces = [(_rfc3339(self._clock(), "seconds") + " ", "dim"), *pieces]
        coloured = self._colour_allowed and self._err.isatty()
        self._err.line(_ansi(pieces) if coloured else "".join(text for text, _ in pieces))

    def _log_line(self, event: Event, job: _Job | None, now: float) -> Pieces | None:
        """The line a log gets for `event`; None for what would only fill it."""
        match event:
            case Started():
                return _started_line(event)
            case Waiting():
                return [("wait ", "yellow"), (f"{event.target}: {event.holder} works on it", "")]
            case Progress() if job is not None and now - job.said >= _PROGRESS_SECS:
                job.said = now
                return [(f"{job.action} ", "cyan"), (f"{job.target} {_transfer(job, now)}", "")]
            case LogLine() if self.verbose:
                return [(f"{event.target}> ", "dim"), (clean(event.line), "")]
            case LogLine() if job is not None and now - job.said >= _ALIVE_SECS:
                return _alive_line(job, now)
        return _lasting_line(event)

    def _watch_silent_jobs(self) -> None:
        """While there is work, have a ticker say in the log that it goes on, though nothing may be heard of it."""
        if self._work.jobs and self._ticker is None:
            self._ticker = _Ticker(self._log_alive, _ALIVE_SECS / 4)
        elif not self._work.jobs and self._ticker is not None:
            self._ticker.stop()
            self._ticker = None

    def _log_alive(self) -> None:
        with self._lock:
            now = self._monotonic()
            for job in self._work.jobs.values():
                if now - job.said >= _ALIVE_SECS:
                    self._above(_alive_line(job, now))

    def _draw(self, event: Event) -> None:
        if isinstance(event, Started | Waiting) and self._live is None:
            self._start_drawing()
        if isinstance(event, LogLine) and self.verbose:
            self._above([(f"{event.target}> ", "dim"), (clean(event.line), "")])
        elif (line := _lasting_line(event)) is not None:
            self._above(line)
        if isinstance(event, Finished) and not self._work.jobs:
            self._stop_drawing()

    def _start_drawing(self) -> None:
        # Imported here: rich takes longer to import than a no-op realize may last.
        import rich.console
        from rich.live import Live

        screen = rich.console.Console(
            file=self._err,  # type: ignore[arg-type]  # the four methods of a text stream that rich calls
            force_terminal=True,
            no_color=not self._colour_allowed,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._live = Live(
            get_renderable=lambda: self._frame(screen.width, screen.height),
            console=screen,
            auto_refresh=False,  # rich's own thread would take its lock before ours: our ticker takes ours first
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()
        self._ticker = _Ticker(self._tick, _FRAME_SECS)
        atexit.register(self._stop_drawing)

    def _stop_drawing(self) -> None:
        if self._live is None:
            return
        live, self._live = self._live, None
        if self._ticker is not None:
            self._ticker.stop()
        atexit.unregister(self._stop_drawing)
        live.stop()
        self._err.flush()

    def _tick(self) -> None:
        with self._lock:
            if self._live is not None:
                self._live.refresh()

    def _frame(self, width: int, height: int) -> Text:
        """The live display, fitted to `width` columns and `height` rows."""
        from rich.text import Text

        now = self._monotonic()
        unicode = self._err.encoding.lower().replace("-", "") == "utf8"
        rows: list[Pieces] = []
        room = max(1, height - 3)
        jobs = sorted(self._work.jobs.values(), key=lambda job: job.since)
        # Log lines are the first to go when the window is low, then the youngest jobs.
        with_logs = len(jobs) + sum(bool(job.line) for job in jobs) <= room
        shown = jobs[: room if len(jobs) <= room else room - 1]
        column = min(max((len(job.target) for job in shown), default=0), max(8, width // 3))
        for job in shown:
            rows.append(_job_row(job, now, width, column, unicode))
            if with_logs and job.line:
                rows.append([("    " + job.line, "dim")])
        if len(shown) < len(jobs):
            rows.append([(f"  and {len(jobs) - len(shown)} more", "dim")])
        rows.append(_footer(self._work, now))
        lines = []
        for row in rows:
            line = _text(row)
            line.truncate(width, overflow="ellipsis" if unicode else "crop")
            lines.append(line)
        return Text("\n", no_wrap=True, overflow="crop").join(lines)


class _Ticker(threading.Thread):
    """Calls `tick` every `secs` until it is stopped."""

    def __init__(self, tick: Callable[[], None], secs: float) -> None:
        super().__init__(name="console", daemon=True)
        self._tick = tick
        self._secs = secs
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(self._secs):
            self._tick()

    def stop(self) -> None:
        # Not joined: the thread may just be waiting for the lock that the caller holds.
        self._stopped.set()


def _rfc3339(when: float, precision: Literal["seconds", "milliseconds"]) -> str:
    return datetime.fromtimestamp(when, UTC).isoformat(timespec=precision).removesuffix("+00:00") + "Z"


def _ansi(pieces: Pieces) -> str:
    return "".join(f"\x1b[{_SGR[style]}m{text}\x1b[0m" if style else text for text, style in pieces)


def _text(pieces: Pieces) -> Text:
    from rich.text import Text

    return Text.assemble(*pieces)


def aligned(columns: Sequence[str], rows: Sequence[Sequence[TableCell]]) -> list[str]:
    """A table's lines: the columns' names, then a line for each row."""
    shown = [["-" if cell is None else _LINE_BREAK.sub(" ", clean(str(cell))) for cell in row] for row in rows]
    number = [all(isinstance(row[i], int | float | None) for row in rows) and rows != [] for i in range(len(columns))]
    widths = [max(len(line[i]) for line in (columns, *shown)) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, number, strict=True)
        ).rstrip()
        for line in (columns, *shown)
    ]


def _error_lines(event: Failed) -> list[Pieces]:
    lines: list[Pieces] = [[("error: ", "bold red"), (clean(event.message), "bold")]]
    for label, style, body in (("reason", "yellow", event.reason), ("hint", "cyan", event.hint)):
        for i, line in enumerate((body or "").splitlines()):
            lines.append([(f"  {label}: ", style) if i == 0 else (" " * (len(label) + 4), ""), (clean(line), "")])
    return lines


def _named(event: Started | Finished) -> str:
    """What is worked on; of an audit, whose path tells it behind a `#`, what is varied, too."""
    varied = event.path.partition("#")[2] if event.action == "audit" else ""
    return f"{event.target} ({varied})" if varied else event.target


def _started_line(event: Started) -> Pieces:
    known = []
    if event.worker is not None:
        known.append(f"on {event.worker}")
    if event.total_bytes is not None:
        known.append(size(event.total_bytes))
    if event.expected_secs is not None:
        known.append(f"expected {duration(event.expected_secs)}")
    return [(f"{event.action} ", "cyan"), (_named(event) + (f" ({', '.join(known)})" if known else ""), "")]


def _lasting_line(event: Event) -> Pieces | None:
    """The line that stays, in a log and above the live display; None for events that leave none."""
    match event:
        case Planned():
            parts = [f"{count} to {action}" for action, count in event.actions.items() if count]
            if event.download_bytes:
                parts.append(f"{size(event.download_bytes)} to download")
            if event.expected_secs is not None and parts:
                parts.append(f"about {duration(event.expected_secs)}")
            return [("plan ", "bold"), (", ".join(parts) or "nothing to do", "")]
        case Finished(outcome="failed" | "interrupted"):
            verb = f"{event.outcome} after"
            return [(f"{event.action} ", "red"), (f"{_named(event)} {verb} {duration(event.secs)}", "red")]
        case Finished():
            nar = "" if event.nar_size is None else f", {size(event.nar_size)}"
            style = _OUTCOME_STYLES.get(event.outcome, "")
            return [
                (f"{event.action} ", style or "green"),
                (f"{_named(event)} {event.outcome} in {duration(event.secs)}{nar}", style),
            ]
        case Phase():
            return [("boot ", "cyan"), (f"{event.name} after {duration(event.secs)}", "")]
        case Notice():
            style = "yellow" if event.level == "warning" else "dim"
            label = "warning: " if event.level == "warning" else "note: "
            return [(label, style), (clean(event.message), "")]
    return None


def _alive_line(job: _Job, now: float) -> Pieces:
    job.said = now
    return [(f"{job.action} ", "cyan"), (f"{job.target} still runs, {_elapsed(job, now)}", "")]


def _elapsed(job: _Job, now: float) -> str:
    elapsed = duration(now - job.since)
    if job.expected_secs is None:
        return elapsed
    if now - job.since > job.expected_secs:
        return f"{elapsed}, usually {duration(job.expected_secs)}"
    return f"{elapsed} of about {duration(job.expected_secs)}"


def _transfer(job: _Job, now: float) -> str:
    """`45.2 MB of 146 MB, 3.61 MB/s`, as far as it is known."""
    done = job.done_bytes or 0
    text = size(done) if job.total_bytes is None else f"{size(done)} of {size(job.total_bytes)}"
    if job.rate_from is not None and now - job.rate_from[0] > 0.5:
        text += f", {size(int((done - job.rate_from[1]) / (now - job.rate_from[0])))}/s"
    return text


def _job_row(job: _Job, now: float, width: int, column: int, unicode: bool) -> Pieces:
    frames = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏" if unicode else "-\\|/"
    frame = frames[int(now / _FRAME_SECS) % len(frames)]
    name = job.target if len(job.target) <= column else job.target[: column - 1] + ("…" if unicode else "~")
    head: Pieces = [(f"{frame} ", "cyan"), (f"{job.action:<10} ", ""), (f"{name:<{column}}  ", "bold")]
    if job.holder is not None:
        return [*head, (f"{duration(now - job.since)}, {job.holder} works on it", "yellow")]
    if job.done_bytes is None:
        return [*head, (_elapsed(job, now), "")]
    figures = _transfer(job, now)
    room = min(30, width - sum(len(text) for text, _ in head) - len(figures) - 2)
    if not job.total_bytes or room < 8:
        return [*head, (figures, "")]
    filled = min(room, room * job.done_bytes // job.total_bytes)
    full, empty = ("━", "─") if unicode else ("#", ".")
    return [*head, (full * filled, "green"), (empty * (room - filled) + "  ", "dim"), (figures, "")]


def _footer(work: _Work, now: float) -> Pieces:
    parts = []
    if work.total is not None:
        parts.append(f"{work.done} of {work.total} done")
    elapsed = duration(now - work.since)
    if work.planned is not None and work.planned.expected_secs is not None:
        elapsed += f" of about {duration(work.planned.expected_secs)}"
    return [(", ".join([*parts, elapsed]), "dim")]
