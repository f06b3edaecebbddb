"""A worker whose builds are played: what becomes of an order is in its name. As a process, so that it can be killed.

    python -m tests.farm_stub URL NAME FILE [JOBS [FORMAT]]

Each begun build is a line in FILE, with the time; what has been built, by whomever, is answered without building it,
as a cache would have it. With a FORMAT, it understands orders of that one only. Orders are called `ok…`, `pause…` (up
to two seconds), `slow…` (until it is stopped), `oom…` (small ones run out of memory), `remote…` (the cache fails,
once), `broken…`, `disk…` (trouble, on `one`), `crash…` (the worker dies).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from vzrepro.base.config import Config
from vzrepro.base.errors import BuildFailed, Interrupted, OutOfMemory, RemoteError
from vzrepro.base.model import NarHash, store_path
from vzrepro.farm import order as orders
from vzrepro.farm.order import SIZES, Order, OrderAnswer
from vzrepro.farm.temporal.server import FarmServer, leave
from vzrepro.farm.temporal.worker import FarmWorker
from vzrepro.farm.workshop import Attempt


def key_id(name: str) -> str:
    """The id of the key that a worker of this name would have."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def main() -> None:
    url, name, file = sys.argv[1:4]
    jobs = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    orders.FORMAT = int(sys.argv[5]) if len(sys.argv) > 5 else orders.FORMAT
    seen, there = Path(file), Path(f"{file}.built")

    def build(order: Order, attempt: Attempt) -> OrderAnswer:
        answer = OrderAnswer(store_path(order.drv, order.name), NarHash(order.drv.hex), name, "built")
        if there.is_file() and f"{order.id}\n" in there.read_text():
            return replace(answer, outcome="substituted")
        with seen.open("a") as lines:
            lines.write(f"{order.id} {order.size} {name} {time.time():.3f}\n")
        attempt.phase = "builds"
        match order.name.partition("-")[0]:
            case "slow":
                attempt.stop.wait()
                raise Interrupted("interrupted")
            case "pause":
                time.sleep(random.uniform(0, 2))
            case "oom" if order.size == "small":
                raise OutOfMemory("it needs more memory")
            case "remote" if seen.read_text().count(order.id) == 1:
                raise RemoteError("the cache does not answer")
            case "broken":
                raise BuildFailed("exit code 1", reason="the end of its log:\n    make: ***", hint="vzrepro shell it")
            case "disk" if name == "one":
                raise OSError(28, "No space left on device")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
        with there.open("a") as lines:
            lines.write(f"{order.id}\n")
        return answer

    def healthy() -> None:
        if name == "one":
            raise OSError(28, "No space left on device")

    server = FarmServer.of(url, Config())
    worker = FarmWorker(
        server,
        name,
        ["linux/amd64"],
        SIZES,
        jobs,
        build,
        healthy,
        key_id=key_id(name),
        say=lambda line: print(line, flush=True),
    )
    worker.serve()
    leave(0)


if __name__ == "__main__":
    main()
