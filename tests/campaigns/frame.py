"""What campaigns share: rounds that a seed decides, what is counted of them, and the table.

    .venv/bin/python -m tests.campaigns.NAME [--rounds N] [--seed N] [--line NAME]... [--json]

Each line of the table is played so many rounds. *Lost* is what was there, should have stayed, and is gone; *wrong* is
what is there and should not be, an answer that is not right, or an error that says nothing. Both are told with the
round, whose number and the seed play it again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.crashing import forked

MEMORY = Path("/dev/shm")
STANDS_SECS = 120.0
"""A process that takes longer than that stands still."""


@dataclass
class Tally:
    """What came of the rounds of one line; times in seconds, memory in bytes."""

    rounds: int = 0
    faults: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    longest_secs: float = 0.0
    largest_bytes: int = 0

    def row(self) -> dict[str, object]:
        """The figures by their names."""
        return {
            "rounds": self.rounds,
            "faults": self.faults,
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "longest_wait_secs": round(self.longest_secs, 2),
            "largest_memory_mib": self.largest_bytes >> 20,
        }


class Wrong(AssertionError):
    """Something came of a round that must not."""


class Lost(AssertionError):
    """Something that should have stayed is gone."""


@dataclass
class Round:
    """One round: its number, its own randomness, and an empty directory that goes with it."""

    number: int
    rounds: int
    chance: random.Random
    place: Path
    tally: Tally

    def child(self, work: Callable[[], None], *, kill_after: float | None = None, timed: bool = True) -> int:
        """Do the work in a process, which may be killed after so many seconds; its exit code, negative if it was
        killed. Counts its memory and, if it is `timed`, its time."""
        begun = time.monotonic()
        said = self.place / "said"
        with said.open("ab") as out:
            pid = forked(lambda: _quietly(work, out.fileno()))
        return self.ended(pid, begun, kill_after, timed=timed)

    def start(self, work: Callable[[], None]) -> int:
        """As `child`, but not waited for; its pid, for `ended`."""
        with (self.place / "said").open("ab") as out:
            return forked(lambda: _quietly(work, out.fileno()))

    def ended(self, pid: int, begun: float, kill_after: float | None = None, *, timed: bool = True) -> int:
        """Wait for a child that began at that monotonic time."""
        until = begun + (STANDS_SECS if kill_after is None else kill_after)
        found, status, used = os.wait4(pid, os.WNOHANG)
        while found == 0 and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.002))
            found, status, used = os.wait4(pid, os.WNOHANG)
        if found == 0:
            os.kill(pid, signal.SIGKILL)
            _, status, used = os.wait4(pid, 0)
            if kill_after is None:
                raise Wrong(f"it stands still for {STANDS_SECS:.0f} s")
        if timed:
            self.tally.longest_secs = max(self.tally.longest_secs, time.monotonic() - begun)
        self.tally.largest_bytes = max(self.tally.largest_bytes, used.ru_maxrss << 10)
        return os.waitstatus_to_exitcode(status)

    def calmly(self, work: Callable[[], None], what: str, *, timed: bool = True) -> None:
        """Do in a process what must succeed."""
        if (code := self.child(work, timed=timed)) != 0:
            raise Wrong(f"{what}: exit code {code}\n{self.said()}")

    def said(self) -> str:
        """The end of what the processes have printed."""
        return (self.place / "said").read_text(errors="replace")[-3000:]


def _quietly(work: Callable[[], None], out: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    work()


Line = Callable[[Round], None]
"""Plays one round. Raises Lost, Wrong, or any other error, which counts as wrong."""


def play(name: str, line: Line, rounds: int, seed: int, *, memory: bool = True) -> Tally:
    """Play the rounds of a line, in `memory` where there is a place for it: a kill is no power cut."""
    tally = Tally()
    for number in range(rounds):
        with _directory(memory) as place:
            chance = random.Random(f"{seed} {name} {number}")
            tally.rounds += 1
            try:
                line(Round(number, rounds, chance, place, tally))
            except Lost as error:
                tally.lost.append(f"{name}, round {number}: {error}")
            except Wrong as error:
                tally.wrong.append(f"{name}, round {number}: {error}")
            except Exception:
                tally.wrong.append(f"{name}, round {number}: {traceback.format_exc()}")
    return tally


@contextlib.contextmanager
def _directory(memory: bool) -> Iterator[Path]:
    where = MEMORY if memory and os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="campaign-") as directory:
        yield Path(directory)


def main(lines: dict[str, Line], rounds: int, *, memory: bool = True) -> None:
    """The command line of a campaign; exits with 1 when anything is lost or wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=rounds, help="of each line (%(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--line", action="append", choices=lines, help="only this one")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found: dict[str, Tally] = {}
    for name in asked.line or lines:
        found[name] = play(name, lines[name], asked.rounds, asked.seed, memory=memory)
        for told in (*found[name].lost, *found[name].wrong):
            print(told, file=sys.stderr, flush=True)
    rows = {name: tally.row() for name, tally in found.items()}
    print(json.dumps({"seed": asked.seed, "lines": rows}, indent=2) if asked.json else table(rows))
    sys.exit(any(tally.lost or tally.wrong for tally in found.values()))


def table(rows: dict[str, dict[str, object]]) -> str:
    """The figures as a table in Markdown."""
    names = [name.replace("_", " ") for name in next(iter(rows.values()))]
    lines: list[Sequence[object]] = [["what", *names], *([name, *row.values()] for name, row in rows.items())]
    shown = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([shown[0], f"{'|---' * len(lines[0])}|", *shown[1:]])
