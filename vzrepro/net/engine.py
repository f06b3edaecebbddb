"""What every transfer does: attempts with pauses between them, bodies that must not crawl, the byte to go on from.

How long is long enough is a policy's affair. There are two: `sources.fetch` tries the mirrors of one file,
`cache.remote` asks one place for many entries.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from vzrepro.net import AttemptFailed, Body

MIN_SPEED = 16 << 10
"""Bytes per second, below which a body crawls."""

_MAX_DOUBLINGS = 30

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Pauses between attempts, in seconds, with full jitter: anything up to a bound that doubles from `first_secs` to
    `max_secs`. `jitter` is for tests."""

    first_secs: float
    max_secs: float
    jitter: Callable[[float, float], float] = random.uniform

    def pause(self, failures: int, failure: AttemptFailed) -> float:
        """How long to wait after so many failures, the last of them this one: never less than the server asks for."""
        bound = self.first_secs * 2.0 ** min(failures - 1, _MAX_DOUBLINGS)
        return max(failure.after, self.jitter(0.0, min(self.max_secs, bound)))


class AttemptPolicy(Protocol):
    """When an attempt is made, and when none is made any more. The engine asks in this order."""

    backoff: Backoff

    def begin(self) -> float:
        """Wait until an attempt may begin; the time then, by the policy's clock. Raises Interrupted."""

    def grants(self, failure: AttemptFailed, begun: float, pause: float) -> bool:
        """Whether, after an attempt that began at `begun` and failed, another one is made in `pause` seconds."""

    def sleep(self, secs: float) -> None:
        """Wait, unless everything is to end."""

    def succeed(self) -> None:
        """An attempt has succeeded."""


def persist(policy: AttemptPolicy, act: Callable[[], T]) -> T:
    """Do `act` until it does not raise AttemptFailed, as long as `policy` grants another attempt; else raises the last.

    A failure that has `advanced` counts as the first.
    """
    failures = 0
    while True:
        begun = policy.begin()
        try:
            result = act()
        except AttemptFailed as failure:
            failures = 1 if failure.advanced else failures + 1
            pause = policy.backoff.pause(failures, failure)
            if not policy.grants(failure, begun, pause):
                raise
            policy.sleep(pause)
        else:
            policy.succeed()
            return result


@dataclass(frozen=True, slots=True)
class Pace:
    """How slow a body may be: in any `window_secs`, it brings `min_speed` bytes per second on average."""

    window_secs: float
    clock: Callable[[], float]
    min_speed: int = MIN_SPEED

    def pieces(self, body: Body, check: Callable[[], None]) -> Iterator[bytes]:
        """The body's pieces until it ends; after each that was used, `check` may end that. Raises AttemptFailed when it
        crawls."""
        end, held = self.clock() + self.window_secs, 0
        while piece := body.read():
            yield piece
            check()
            held += len(piece)
            now = self.clock()
            if now >= end:
                if held < self.min_speed * self.window_secs:
                    raise AttemptFailed(f"sends fewer than {self.min_speed} bytes per second", again=True)
                end, held = now + self.window_secs, 0


def starting_at(body: Body, offset: int, pieces: Callable[[Body], Iterator[bytes]]) -> Body:
    """The body from byte `offset` on, which is not before its own start: the bytes before that are read, with `pieces`,
    and dropped. Raises AttemptFailed."""
    dropped = offset - body.start
    if not dropped:
        return body
    rest = b""
    for piece in pieces(body):
        rest = piece[dropped:]
        dropped -= len(piece) - len(rest)
        if not dropped:
            break
    else:
        raise AttemptFailed("breaks off in the middle", again=True)
    surplus = [rest] if rest else []
    return replace(body, start=offset, read=lambda: surplus.pop() if surplus else body.read())
