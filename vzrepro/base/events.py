"""What happens during long work, as values: the console draws them, `--json` prints them, tests read them.

Every event becomes one JSON object per line: its fields, plus `event` (the kind below) and `time` (RFC 3339, UTC),
which the printer adds. docs/events.md lists the kinds; tests compare that list with this module.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

from vzrepro.base.errors import Interrupted

Action = Literal["build", "copy", "fetch", "import", "substitute", "push", "check", "collect", "audit"]
"""What is being done to get one object: build in the sandbox · copy an equal object (early cutoff) · download ·
import a local tree · take from a cache · write to a cache · check a cache · collect its garbage · rebuild beside the
store, where `path` has `#` and what is varied behind the store path."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is known. Counts of objects per action and expected totals; None where nothing is known."""

    kind: ClassVar[str] = "planned"
    actions: dict[str, int]
    download_bytes: int | None
    expected_secs: float | None


@dataclass(frozen=True, slots=True)
class Started:
    """Work on one object began. `target` is the recipe's name, `path` the store path; sizes in bytes, times in s.
    `worker` is the farm's worker that does it, None for this machine."""

    kind: ClassVar[str] = "started"
    target: str
    path: str
    action: Action
    expected_secs: float | None = None
    total_bytes: int | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """`done_bytes` of the object's `total_bytes` have been transferred."""

    kind: ClassVar[str] = "progress"
    target: str
    path: str
    done_bytes: int
    total_bytes: int | None


@dataclass(frozen=True, slots=True)
class LogLine:
    """A builder wrote one line."""

    kind: ClassVar[str] = "log"
    target: str
    path: str
    line: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Another process works on the same object; `holder` names it."""

    kind: ClassVar[str] = "waiting"
    target: str
    path: str
    holder: str


@dataclass(frozen=True, slots=True)
class Finished:
    """Work on one object ended. `outcome` is a value of `model.Outcome`; of an audit's rebuild, of `Verdict`."""

    kind: ClassVar[str] = "finished"
    target: str
    path: str
    action: Action
    outcome: str
    secs: float
    nar_size: int | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """A named step of a VM's boot was reached, `secs` after the VM started."""

    kind: ClassVar[str] = "phase"
    name: str
    secs: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know; `level` says how much it matters."""

    kind: ClassVar[str] = "notice"
    level: Literal["info", "warning"]
    message: str


@dataclass(frozen=True, slots=True)
class Result:
    """A target is realized: its store path and where it lies on this machine."""

    kind: ClassVar[str] = "result"
    target: str
    path: str
    location: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The command ends with this error; the fields are those of `VzreproError`."""

    kind: ClassVar[str] = "error"
    message: str
    reason: str | None
    hint: str | None
    exit_code: int


Event = Planned | Started | Progress | LogLine | Waiting | Finished | Phase | Notice | Result | Failed
Report = Callable[[Event], None]
"""Where events go. Called from any thread."""


def ignore(_event: Event) -> None:
    """A `Report` for callers that show nothing."""


@dataclass(slots=True)
class Work:
    """Work that is under way; who does it may say how it ended, and the size of the object's NAR in bytes."""

    outcome: str = "done"
    nar_size: int | None = None


@contextmanager
def working(report: Report, started: Started, begun: float | None = None) -> Iterator[Work]:
    """Show the block as work on one object: `started`, then how it `Finished`, by an error or as `Work` says.

    Its time counts since `begun` (`time.monotonic`), if that was earlier.
    """
    begun = time.monotonic() if begun is None else begun
    report(started)
    work = Work()
    try:
        yield work
    except (Interrupted, KeyboardInterrupt):
        work.outcome = "interrupted"
        raise
    except BaseException:
        work.outcome = "failed"
        raise
    finally:
        secs = time.monotonic() - begun
        report(Finished(started.target, started.path, started.action, work.outcome, secs, work.nar_size))
