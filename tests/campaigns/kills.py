"""`kill -9` of every command that writes: at each step that changes a disk or a database, and at random moments.

Even rounds end the command before or after one such step, and with enough rounds each of them; odd rounds at a moment
within its usual time. Then nothing may be lost or wrong, nothing may be left over, and the same command must go on.
See `frame` for the options.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.campaigns.frame import Line, Round, main
from tests.campaigns.mill import EVERY, KEPT, Mill
from tests.crashing import die_at

MORE = ("link", "utime", "pwrite", "truncate")
_STRIDE = 0.618  # of the steps, so that a few rounds are spread over all of them


@dataclass
class Verb:
    """A command: what is there before it, what must be there whenever it is killed, and what when it has ended."""

    run: Callable[[Mill], None]
    prepare: Callable[[Mill], None]
    safe: Callable[[Mill], None]
    done: Callable[[Mill], None]
    steps: int = 0
    secs: float = 0.0


def filled(mill: Mill) -> None:
    mill.realize(giving=False)
    mill.root()


def _shared(mill: Mill) -> None:
    """The cache has everything, and the store nothing."""
    there = Mill(mill.store.with_name("theirs"), mill.cache, mill.sources)
    there.realize()
    there.push()


def _littered(mill: Mill) -> None:
    mill.realize()
    mill.push()
    mill.root()
    mill.keep_in_cache()
    mill.junk()


def _damaged(mill: Mill) -> None:
    mill.realize()
    mill.push()
    mill.root()
    mill.damage()


def _both(store: tuple[str, ...] = (), cache: tuple[str, ...] = ()) -> Callable[[Mill], None]:
    def judge(mill: Mill) -> None:
        mill.judge_store(store)
        mill.judge_cache(cache)

    return judge


def _half_repaired(mill: Mill) -> None:
    # The object that was damaged may still be; no other may have become so.
    mill.judge_store(EVERY, corrupt=("left",))
    mill.judge_cache(("notes", "archive", "left", "whole"), damaged=True)


VERBS = {
    # What was made before the kill, and not pushed, is not pushed later; but nothing without what it refers to.
    "realize": Verb(Mill.realize, lambda mill: None, _both(), _both(EVERY)),
    "push": Verb(Mill.push, filled, _both(EVERY), _both(EVERY, EVERY)),
    "pull": Verb(Mill.pull, _shared, _both((), EVERY), _both(("whole",), EVERY)),
    "gc": Verb(Mill.gc, _littered, _both(KEPT, KEPT), _both(KEPT, KEPT)),
    "repair": Verb(Mill.repair, _damaged, _half_repaired, _both(EVERY, EVERY)),
    "audit": Verb(Mill.audit, filled, _both(EVERY), _both(EVERY)),
}


def _measure(verb: Verb, round: Round, mill: Mill) -> None:
    """Count the steps and the time of the command; the world is as after it."""
    told = round.place / "steps"

    def work() -> None:
        doom = die_at(1 << 60, *MORE)
        verb.run(mill)
        told.write_text(str(doom.counted_steps))

    round.calmly(work, "the command, undisturbed")
    verb.steps = int(told.read_text())
    begun = time.monotonic()
    again = Mill.at(round.place / "again")
    round.calmly(lambda: verb.prepare(again), "preparing it again")
    begun = time.monotonic()
    round.calmly(lambda: verb.run(again), "the command, undisturbed")
    verb.secs = time.monotonic() - begun


def kills(name: str) -> Line:
    """Rounds of one command."""
    verb = VERBS[name]

    def line(round: Round) -> None:
        learn(round)
        mill = Mill.at(round.place / "world")
        round.calmly(lambda: verb.prepare(mill), "preparing")
        if not verb.steps:
            measured = Mill.at(round.place / "measured")
            round.calmly(lambda: verb.prepare(measured), "preparing")
            _measure(verb, round, measured)

        def doomed() -> None:
            if round.number % 2 == 0:
                die_at(_step(round, verb.steps), *MORE)
            verb.run(mill)

        secs = None if round.number % 2 == 0 else round.chance.uniform(0, verb.secs)
        code = round.child(doomed, kill_after=secs)
        round.tally.faults += code < 0
        assert code in (0, -9), round.said()
        round.calmly(lambda: verb.safe(mill), "after the kill")
        round.calmly(lambda: verb.run(mill), "the same command again")
        round.calmly(lambda: verb.done(mill), "after the same command")

    return line


def learn(round: Round) -> None:
    """Know what is right, once in this process: children inherit it."""
    from tests.campaigns import mill as mills

    if not mills._known:
        once = Mill.at(round.place / "truth")
        # In this process, before there is a thread of anybody: what realizing starts has ended when it returns.
        once.realize(giving=False)
        once.learn()


def _step(round: Round, steps: int) -> int:
    stride = next(each for each in range(int(steps * _STRIDE), steps * 2) if math.gcd(each, steps) == 1)
    return (round.number // 2) * stride % steps


LINES: dict[str, Line] = {name: kills(name) for name in VERBS}

if __name__ == "__main__":
    main(LINES, 200)
