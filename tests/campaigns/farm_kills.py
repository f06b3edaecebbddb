"""Kills at random: workers, the server and clients of a farm, with nothing lost. By hand; about 15 minutes.

    .venv/bin/python -m tests.campaigns.farm_kills [ROUNDS] [SEED]

Three workers that pretend to build (`tests.farm_stub`), a real Temporal server with SQLite, clients as processes. In
each round some orders are placed by two clients each, one thing is killed by SIGKILL at a random moment and, but for a
client, started again. In the end each client that was not killed must have all answers, and what was begun again must
have a reason: between both, its worker or the server was killed. Prints a table.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

from tests.farms import TemporalServer
from vzrepro.base.config import Config
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import BuildKey, DrvHash
from vzrepro.farm.order import Order
from vzrepro.farm.temporal.client import FarmClient
from vzrepro.farm.temporal.server import FarmServer, leave

ORDERS = 4
WORKERS = ("one", "two", "three")


class Silent:
    """A watcher that shows nothing."""

    def waits(self, why: str) -> None: ...

    def works(self, worker: str, phase: str) -> None: ...

    def log(self, stream: str, pieces: int) -> None: ...

    def line(self, text: str) -> None: ...


def order(name: str) -> Order:
    key = BuildKey.of(name.encode())
    return Order(DrvHash(key.hex), key, name, "linux/amd64")


def follow(url: str, names: list[str]) -> None:
    """As a client: place these orders at once, and wait for all. Prints those that were built."""
    until = time.monotonic() + 60
    while True:  # who comes while the server is down is told so, and tries again
        try:
            client = FarmClient(FarmServer.of(url, Config()))
            break
        except VzreproError:
            if time.monotonic() > until:
                raise

    def place(name: str) -> None:
        try:
            answer = client.place(order(name), Silent(), threading.Event())
            print(name if answer.path.name == name else f"wrong {name}", flush=True)
        except VzreproError as error:
            print(f"failed {name}: {error.in_a_line}", flush=True)

    threads = [threading.Thread(target=place, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()


def _explained(tries: list[tuple[float, str]], kills: list[tuple[float, str]]) -> bool:
    """Whether each try but the first followed a kill of the server, or of the worker that had begun before."""
    pairs = itertools.pairwise(sorted(tries))
    return all(
        any(began <= when <= again and victim in ("server", worker) for when, victim in kills)
        for (began, worker), (again, _) in pairs
    )


def main() -> None:
    if sys.argv[1:2] == ["--follow"]:
        follow(sys.argv[2], sys.argv[3:])
        leave(0)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        server = TemporalServer(place / "temporal")
        server.start()
        workers: dict[str, subprocess.Popen[bytes]] = {}
        begun = place / "begun"
        ready: set[str] = set()

        def start(name: str) -> None:
            command = [sys.executable, "-m", "tests.farm_stub", server.url, name, str(begun), "4"]
            workers[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        for name in WORKERS:
            start(name)
        killed: Counter[str] = Counter()
        kills: list[tuple[float, str]] = []
        clients: list[tuple[str, subprocess.Popen[str], list[str], bool]] = []
        started = time.monotonic()
        for number in range(rounds):
            for name in WORKERS:
                # One that finds no server ends, and is started again, as a service is. All are there at a kill.
                while name not in ready:
                    if b"takes orders" in workers[name].stdout.readline():  # type: ignore[union-attr]
                        ready.add(name)
                    elif workers[name].poll() is not None:
                        start(name)
            names = [f"pause-{number}-{index}" for index in range(ORDERS)]
            pair = []
            for _ in range(2):
                command = [sys.executable, "-m", "tests.campaigns.farm_kills", "--follow", server.url, *names]
                pair.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
            time.sleep(chance.uniform(0.5, 3.0))
            victim = chance.choice([*WORKERS, "server", "client"])
            killed["worker" if victim in WORKERS else victim] += 1
            kills.append((time.time(), victim))
            if victim == "server":
                server.kill()
                server.start()
            elif victim == "client":
                pair[0].kill()
            else:
                workers[victim].kill()
                workers[victim].wait()
                ready.discard(victim)
                start(victim)
            clients += [(victim, each, names, victim == "client" and each is pair[0]) for each in pair]
        said: Counter[str] = Counter()
        for _, process, names, was_killed in clients:
            out, _ = process.communicate(timeout=900)
            lines = out.split("\n")[:-1]
            said["client killed" if was_killed else "client ended"] += 1
            if not was_killed:
                said["answers"] += sum(line in names for line in lines)
                for line in lines:
                    if line not in names:
                        said["failures"] += 1
                        print(line)
        took = time.monotonic() - started
        # What a killed client has ordered goes on: the other one has waited for it, too.
        every = [f"pause-{number}-{index}" for number in range(rounds) for index in range(ORDERS)]
        tries: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
        for line in begun.read_text().splitlines():
            id_, _size, by, when = line.split(" ")
            tries[id_.rpartition("-")[0]].append((float(when), by))
        lost = [name for name in every if not tries[name]]
        again = [name for name in every if len(tries[name]) > 1]
        unexplained = [name for name in again if not _explained(tries[name], kills)]
        for name in unexplained:
            print(f"begun again without a reason: {name}: {tries[name]}")
        for worker in workers.values():
            worker.kill()
            worker.wait()
        server.kill()
    columns = {
        "rounds": rounds,
        **{f"{name}s killed": killed[name] for name in ("worker", "server", "client")},
        "orders": len(every),
        "answers": f"{said['answers']} of {ORDERS * said['client ended']}",
        "failed": said["failures"],
        "lost": len(lost),
        "begun again": len(again),
        "without a reason": len(unexplained),
        "time": f"{took:.0f} s",
    }
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n| {' | '.join(map(str, columns.values()))} |")


if __name__ == "__main__":
    main()
