"""Eight processes on one store and one cache, some of them killed, with gc and verification beside them.

Each process runs commands of its own choice. Whatever the collectors remove and the kills leave half done, what a
process has asked for is there and right, no look from beside sees anything corrupt, and in the end nothing is lost,
wrong or left over. See `frame` for the options.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.campaigns.frame import Line, Lost, Round, Wrong, main
from tests.campaigns.kills import EVERY, KEPT, learn
from tests.campaigns.mill import HARMLESS, Mill
from vzrepro.cache import check as checking
from vzrepro.cache.check import CacheFinding
from vzrepro.store import LocalStore

WORKERS = 8
_COMMANDS = 2  # of each process


def _works(mill: Mill, seed: float) -> None:
    chance = random.Random(seed)
    for _ in range(_COMMANDS):
        match chance.choice(("realize", "push", "pull", "asked")):
            case "realize":
                mill.realize()
            case "push":
                mill.push()
            case "pull":
                mill.pull()
            case _:
                _asked(mill)


def _asked(mill: Mill) -> None:
    """What is held and found then stays, until this process ends."""
    with LocalStore(mill.store) as store:
        paths = [mill.path(name) for name in EVERY]
        store.hold(paths)
        before = store.query_many(paths)
        time.sleep(0.05)
        if gone := before.keys() - store.query_many(paths).keys():
            raise Lost(f"held, and gone: {gone}")
        if found := store.verify(list(before)):
            raise Wrong(f"held, and {found}")


def _collects(mill: Mill, over: Path) -> None:
    with LocalStore(mill.store) as store:
        while not over.exists():
            store.gc()


def _looks(mill: Mill, over: Path) -> None:
    while not over.exists():
        with LocalStore(mill.store) as store:
            if bad := [each for each in store.verify() if each.kind in ("corrupt", "missing")]:
                raise Wrong(f"seen from beside: {bad}")
        found: list[CacheFinding] = []
        checking.verify(mill.reader(), deep=True, found=found.append)
        if bad_entries := [each for each in found if each.kind not in HARMLESS]:
            raise Wrong(f"seen from beside: {bad_entries}")


def side_by_side(round: Round) -> None:
    """One round."""
    learn(round)
    mill = Mill.at(round.place / "world")
    over = round.place / "over"
    round.calmly(mill.realize, "preparing")
    round.calmly(mill.push, "preparing")
    round.calmly(mill.root, "preparing")
    begun = time.monotonic()
    others = [round.start(lambda: _collects(mill, over)), round.start(lambda: _looks(mill, over))]
    try:
        seeds = [round.chance.random() for _ in range(WORKERS)]
        workers = [round.start(lambda seed=seed: _works(mill, seed)) for seed in seeds]  # type: ignore[misc]
        doomed = {pid: round.chance.uniform(0, 0.6) for pid in round.chance.sample(workers, WORKERS // 4)}
        codes = {}
        for pid in sorted(workers, key=lambda pid: doomed.get(pid, 10.0)):
            codes[pid] = round.ended(pid, begun, doomed.get(pid))
    finally:
        over.touch()
        beside = [round.ended(pid, time.monotonic()) for pid in others]
    round.tally.faults += sum(code == -9 for code in codes.values())
    bad = [code for pid, code in codes.items() if code not in ((0, -9) if pid in doomed else (0,))]
    if bad or beside != [0, 0]:
        raise Wrong(f"exit codes {bad} of workers, {beside} beside them\n{round.said()}")
    round.calmly(lambda: mill.judge_store(KEPT), "after it")
    round.calmly(lambda: mill.judge_cache(EVERY), "after it")
    round.calmly(mill.realize, "realize")
    # Sources may be gone: what is built already does not need them again.
    round.calmly(lambda: mill.judge_store(KEPT), "after that")


LINES: dict[str, Line] = {"8 processes, gc and verify": side_by_side}

if __name__ == "__main__":
    main(LINES, 100)
