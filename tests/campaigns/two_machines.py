"""Two machines with stores of their own, and clocks that differ, push to one bucket, take from it and collect in it.

Both work at once; one is killed now and then. A machine's clock is ahead or behind by minutes, or by days in all but
the signatures of its requests, or by hours everywhere: then the server may refuse it, clearly, and nothing is lost.
What is young by the server's clock is never collected. The server is SeaweedFS. See `frame` for the options.
"""

from __future__ import annotations

import datetime as dt
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import botocore.auth

from tests import servers
from tests.campaigns.frame import Line, Round, Wrong, main
from tests.campaigns.full_disks import explained
from tests.campaigns.kills import EVERY, learn
from tests.campaigns.mill import Mill
from vzrepro.base.errors import VzreproError
from vzrepro.cache import CacheReader
from vzrepro.cache.collect import collect
from vzrepro.cache.places import open_backend, prepare
from vzrepro.cache.remote import Patience

_MINUTE, _DAY = 60.0, 86400.0
_PATIENCE_SECS = 30.0


def _clock(ahead: float, signatures: float) -> None:
    """Have this process believe that it is so many seconds later, also where it signs requests."""
    now = time.time
    time.time = lambda: now() + ahead
    botocore.auth.get_current_datetime = lambda: (
        dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(seconds=signatures)
    )


def _collect(mill: Mill) -> None:
    collect(mill.reader().access.backend, older_than_secs=2 * _DAY, keep_roots=False)


_VERBS: dict[str, Callable[[Mill], None]] = {
    "realize": Mill.realize,
    "push": Mill.push,
    "pull": Mill.pull,
    "collect": _collect,
}


def two_machines(server: servers.S3Server) -> Line:
    """Rounds on bucket `common` of this server, each below a prefix of its own."""

    def line(round: Round) -> None:
        learn(round)
        url = server.url("common", f"campaign-{os.getpid()}-{round.number}-{round.chance.randrange(1 << 40)}")
        mills = [
            Mill(
                round.place / name / "store",
                Path(),
                round.place / "sources",
                lambda: open_backend(url, Patience(_PATIENCE_SECS), Path()),
            )
            for name in ("one", "two")
        ]
        round.calmly(lambda: prepare(CacheReader(mills[0].backend(), mills[0].trusted).access), "preparing")  # type: ignore[misc]
        round.calmly(mills[0].realize, "preparing")
        round.calmly(mills[0].push, "preparing")
        begun = time.monotonic()
        pids, kills = [], []
        for mill in mills:
            ahead = round.chance.choice((0.0, 1.0)) * round.chance.uniform(-14, 14) * _MINUTE
            days, hours = round.chance.random() < 0.4, round.chance.random() < 0.1
            clock = (ahead, ahead)
            if days:
                clock = (round.chance.uniform(-400, 400) * _DAY, 0.0)
            elif hours:
                clock = (3 * 3600.0, 3 * 3600.0)
            chosen = [round.chance.choice(list(_VERBS)) for _ in range(2)]

            def work(mill: Mill = mill, clock: tuple[float, float] = clock, chosen: list[str] = chosen) -> None:
                _clock(*clock)
                for name in chosen:
                    try:
                        _VERBS[name](mill)
                    except VzreproError as error:
                        # A server may refuse a clock, and there may be nothing to pull.
                        if clock[1] < 3600 and "RequestTimeTooSkewed" not in str(error):
                            raise
                        print(error)

            pids.append(round.start(explained(work)))
            kills.append(round.chance.uniform(0, 3) if round.chance.random() < 0.3 else None)
        codes = []
        for pid, kill_after in sorted(zip(pids, kills, strict=True), key=lambda each: each[1] or 99.0):
            codes.append(round.ended(pid, begun, kill_after))
        round.tally.faults += codes.count(-9)
        if not set(codes) <= {0, -9}:
            raise Wrong(f"exit codes {codes}\n{round.said()}")
        round.calmly(lambda: mills[0].judge_cache(EVERY), "the bucket, after it")
        for mill in mills:
            round.calmly(mill.judge_store, "a store, after it")
            round.calmly(mill.realize, "realize")
            round.calmly(mill.push, "push")
            # What was pulled did not need what it was made from.
            round.calmly(lambda mill=mill: mill.judge_store(("whole",)), "a store, after that")  # type: ignore[misc]
        round.calmly(lambda: mills[1].judge_cache(EVERY), "the bucket, after that")

    return line


if __name__ == "__main__":
    os.environ.update(servers.CREDENTIALS)
    with tempfile.TemporaryDirectory() as directory, servers.seaweedfs(Path(directory) / "seaweed") as server:
        servers.make_bucket(server, "common")
        main({"two machines, one bucket": two_machines(server)}, 50)
