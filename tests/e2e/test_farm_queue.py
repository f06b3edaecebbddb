"""What the queue does with orders: a real Temporal server, and workers as processes, whose builds are played."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from temporalio import activity, workflow
from temporalio.client import Client, WorkflowFailureError
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from tests import servers
from tests.farm_stub import key_id
from tests.farms import TemporalServer, behind_tls
from vzrepro.base.config import Config
from vzrepro.base.errors import BuildFailed, Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.base.model import BuildKey, DrvHash, store_path
from vzrepro.farm.order import FORMAT, Order, OrderAnswer
from vzrepro.farm.temporal import overview
from vzrepro.farm.temporal.client import FarmClient
from vzrepro.farm.temporal.server import BUILD, FarmServer, build_queue

PROJECT = Path(__file__).resolve().parents[2]
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@dataclass
class Watch:
    """A watcher that remembers."""

    waited: list[str] = field(default_factory=list)
    worked: list[tuple[str, str]] = field(default_factory=list)

    def waits(self, why: str) -> None:
        self.waited.append(why)

    def works(self, worker: str, phase: str) -> None:
        self.worked.append((worker, phase))

    def log(self, stream: str, pieces: int) -> None: ...

    def line(self, text: str) -> None: ...


@dataclass
class Played:
    """The server, a client, and workers that can be started and killed; `begun` are the lines of their file."""

    server: TemporalServer
    client: FarmClient
    place: Path
    workers: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(
        self,
        name: str,
        jobs: int = 4,
        said: str = "takes orders",
        url: str | None = None,
        version: int = FORMAT,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        words = (url or self.server.url, name, str(self.place / "begun"), str(jobs), str(version))
        command = [sys.executable, "-m", "tests.farm_stub", *words]
        with (self.place / name).open("w") as out:
            environ = {**os.environ, **(env or {})}
            process = subprocess.Popen(command, cwd=PROJECT, stdout=out, stderr=out, text=True, env=environ)
        until = time.monotonic() + 60
        while said not in (self.place / name).read_text():
            assert process.poll() is None and time.monotonic() < until, (self.place / name).read_text()
            time.sleep(0.05)
        self.workers[name] = process
        return process

    def begun(self, order: Order) -> list[str]:
        file = self.place / "begun"
        lines = file.read_text().splitlines() if file.exists() else []
        return [" ".join(line.split(" ")[1:3]) for line in lines if line.startswith(f"{order.id} ")]

    def until(self, true: Callable[[], object]) -> None:
        until = time.monotonic() + 60
        while not true():
            assert time.monotonic() < until
            time.sleep(0.05)


def order(name: str, size: str = "small") -> Order:
    key = BuildKey.of(f"{name}{time.time_ns()}".encode())
    return Order(DrvHash.of(key.bytes), key, name, "linux/amd64", "large" if size == "large" else "small")


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    place = tmp_path_factory.mktemp("played")
    server = TemporalServer(place / "temporal")
    server.start()
    client = FarmClient(FarmServer.of(server.url, Config()))
    played = Played(server, client, place)
    played.start("one")
    try:
        yield played
    finally:
        client.close()
        for process in played.workers.values():
            process.kill()
            process.wait()
        server.kill()


def place(played: Played, wanted: Order, watch: Watch | None = None) -> OrderAnswer:
    return played.client.place(wanted, watch or Watch(), threading.Event())


def test_ten_clients_that_want_one_thing_have_it_built_once(played: Played) -> None:
    wanted = order("ok-ten")
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: place(played, wanted), range(10)))
    assert set(answers) == {answers[0]}
    assert answers[0].path == store_path(wanted.drv, "ok-ten")
    assert played.begun(wanted) == ["small one"]


def test_a_build_that_fails_is_not_tried_again(played: Played) -> None:
    wanted = order("broken-1")
    with pytest.raises(BuildFailed, match="one: exit code 1") as caught:
        place(played, wanted)
    assert "make: ***" in str(caught.value)
    assert played.begun(wanted) == ["small one"]


def test_out_of_memory_goes_to_a_larger_machine_once(played: Played) -> None:
    wanted = order("oom-1")
    assert place(played, wanted).outcome == "built"
    assert played.begun(wanted) == ["small one", "large one"]


def test_a_cache_that_fails_is_given_time(played: Played) -> None:
    wanted = order("remote-1")
    assert place(played, wanted).outcome == "built"
    assert played.begun(wanted) == ["small one", "small one"]


def test_cancelling_ends_a_build_that_nobody_else_waits_for(played: Played) -> None:
    wanted = order("slow-1")
    stops = [threading.Event(), threading.Event()]
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(played.client.place, wanted, Watch(), stop) for stop in stops]
        played.until(lambda: played.begun(wanted))
        assert len(played.client.cancel(wanted.id)) == 1, "one client waits, though twice"
        for stop in stops:
            stop.set()
        for each in waiting:
            with pytest.raises(Interrupted):
                each.result()
    assert overview.order_of(played.client, wanted.id) == wanted
    (row,) = [row for row in overview.builds(played.client, ended=False) if row.id == wanted.id]
    assert (row.state, row.worker) == ("building", "one")
    assert played.client.cancel(wanted.id) == []
    with pytest.raises(Interrupted, match="cancelled"):
        played.client.follow(wanted.id, Watch(), threading.Event())
    with pytest.raises(UsageError, match="under way"):
        played.client.cancel(wanted.id)


def test_nobody_to_build_it_is_a_reason(played: Played) -> None:
    wanted = replace(order("ok-arm"), platform="linux/arm64")
    watch, stop = Watch(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(played.client.place, wanted, watch, stop)
        played.until(lambda: watch.waited)
        stop.set()
        with pytest.raises(Interrupted):
            waiting.result()
    assert watch.waited[0].startswith("no worker for linux/arm64 (small) since ")
    rows = {row.queue: row for row in overview.queues(played.client)}
    assert (rows["linux/arm64 (small)"].workers, rows["linux/arm64 (small)"].waiting) == (0, 1)
    assert rows["linux/amd64 (small)"].names == "one"
    assert played.client.cancel(wanted.id) == []


def test_a_killed_worker_is_replaced(played: Played) -> None:
    """It is lost ten seconds after it was last heard of. Meanwhile the server is killed, too, and comes back."""
    wanted = order("slow-2")
    watch, stop = Watch(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(played.client.place, wanted, watch, stop)
        played.until(lambda: played.begun(wanted))
        played.workers.pop("one").kill()
        played.server.kill()
        played.server.start()
        played.start("one", jobs=1)
        played.until(lambda: len(played.begun(wanted)) == 2)
        played.until(lambda: ("one", "builds") in watch.worked)
        stop.set()
        with pytest.raises(Interrupted):
            waiting.result()
    assert played.client.cancel(wanted.id) == []


def test_a_machine_in_trouble_leaves_orders_to_others(played: Played) -> None:
    wanted = order("disk-1")
    two = played.start("two")
    assert place(played, wanted).worker == "two"
    assert set(played.begun(wanted)) <= {"small one", "small two"}
    two.terminate()
    assert two.wait(30) == 0
    played.workers["one"].kill()
    played.start("one")


def test_what_another_builder_is_to_build_is_left_to_it(played: Played) -> None:
    wanted = replace(order("ok-again"), turn=2, apart_from=(key_id("one"),))
    watch = Watch()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(place, played, wanted, watch)
        played.until(lambda: ("one", "leaves it to another builder") in watch.worked)
        process = played.start("four")
        assert answer.result(60).worker == "four"
    assert played.begun(wanted) == ["small four"]
    process.terminate()
    assert process.wait(30) == 0


def test_draining_finishes_what_runs(played: Played) -> None:
    process = played.start("three")
    assert played.client.drain("three") == []
    assert process.wait(30) == 0
    assert "takes nothing more" in (played.place / "three").read_text()
    with pytest.raises(UsageError, match="no worker nobody"):
        played.client.drain("nobody")


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with servers.refusing() as port, pytest.raises(RemoteError, match="no Temporal server") as caught:
        FarmClient(FarmServer.of(f"temporal://127.0.0.1:{port}", Config()))
    assert "temporal server start-dev" in str(caught.value)
    for url in ("temporal://host", "http://host:1/x", "temporal://u:p@host:1", "temporal://host:1/a/b"):
        with pytest.raises(UsageError, match="names no Temporal server"):
            FarmServer.of(url, Config())


def test_a_worker_waits_for_a_server(played: Played, tmp_path: Path) -> None:
    with servers.refusing() as port:
        early = replace(played, server=TemporalServer(tmp_path, port), place=tmp_path, workers={})
        process = early.start("early", said="waits for a server: no Temporal server")
    try:
        with servers.forwarding(port, played.server.port):
            early.until(lambda: "early takes orders" in (tmp_path / "early").read_text())
            process.terminate()
            assert process.wait(30) == 0
        process = early.start("in-vain", said="waits for a server")
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_the_server_is_told_what_is_urgent(played: Played) -> None:
    """A build's activity has its workflow's priority. The server gives out nearly by that: it keeps what waits in
    several parts, and in each of them the most urgent first."""
    urgencies = {0.05: 5, 1.0: 1, 0.5: 3}
    wanted = [replace(order(f"ok-{urgency}"), platform="linux/urgent") for urgency in urgencies]

    async def ask() -> list[int]:
        stop, watches = threading.Event(), [Watch() for _ in wanted]
        orders = [
            asyncio.ensure_future(played.client._placed(each, watch, stop, urgency))
            for each, watch, urgency in zip(wanted, watches, urgencies, strict=True)
        ]
        while not all(any("no worker for linux/urgent" in why for why in watch.waited) for watch in watches):
            await asyncio.sleep(0.1)
        handles = [played.client.client.get_workflow_handle(each.id) for each in wanted]
        described = [(await handle.describe()).raw_description for handle in handles]
        stop.set()
        await asyncio.gather(*orders, return_exceptions=True)
        return [each.workflow_execution_info.priority.priority_key for each in described]

    assert played.client.run(ask()) == list(urgencies.values())
    assert [played.client.cancel(each.id) for each in wanted] == [[]] * len(wanted)


# --- other versions, and TLS


def _elsewhere(played: Played) -> FarmClient:
    """A client of the namespace that has no workers yet."""
    return FarmClient(FarmServer.of(played.server.bucket_url, Config()))


def test_a_worker_with_an_older_vzrepro_says_so(played: Played) -> None:
    process = played.start("old", url=played.server.bucket_url, version=FORMAT - 1)
    try:
        with _elsewhere(played) as client, pytest.raises(UsageError, match="not an order that this vzrepro") as caught:
            client.place(order("ok-old"), Watch(), threading.Event())
        assert f"wanted format {FORMAT - 1}, found {FORMAT}" in str(caught.value)
        assert "have the same vzrepro on clients and workers" in str(caught.value)
    finally:
        process.kill()
        process.wait()


def test_workers_that_are_updated_while_it_is_built_are_a_reason(played: Played) -> None:
    process = played.start("first", url=played.server.bucket_url)
    wanted, stop = order("slow-updated"), threading.Event()
    try:
        with _elsewhere(played) as client, ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.place, wanted, Watch(), stop)
            try:
                played.until(lambda: played.begun(wanted))
                process.terminate()
                played.until(lambda: "takes nothing more" in (played.place / "first").read_text())
                process.terminate()
                process.wait(60)
                process = played.start("second", url=played.server.bucket_url, version=FORMAT + 1)
                with pytest.raises(VzreproError, match="another vzrepro than those that began it"):
                    waiting.result(120)
            finally:
                stop.set()
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not FAKETIME.exists(), reason="faketime is not installed")
def test_a_worker_whose_clock_is_wrong_builds(played: Played) -> None:
    """It is neither taken for lost, nor is its build given up: what is measured in seconds has the server's clock."""
    env = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+3d", "DONT_FAKE_MONOTONIC": "1"}
    process = played.start("shifted", url=played.server.bucket_url, env=env)
    wanted = order("slow-shifted")
    stop = threading.Event()
    try:
        with _elsewhere(played) as client, ThreadPoolExecutor(1) as pool:
            watch = Watch()
            waiting = pool.submit(client.place, wanted, watch, stop)
            played.until(lambda: ("shifted", "builds") in watch.worked)
            assert abs(float((played.place / "begun").read_text().split()[-1]) - time.time()) > 2 * 86400, (
                "it is shifted"
            )
            stop.set()
            with pytest.raises(Interrupted):
                waiting.result(60)
            assert client.cancel(wanted.id) == []
            assert client.place(order("ok-shifted"), Watch(), threading.Event()).worker == "shifted"
    finally:
        stop.set()
        process.kill()
        process.wait()


def test_tls_with_certificates_on_both_sides(played: Played, tmp_path: Path) -> None:
    """Temporal's small server has no TLS of its own: a proxy before it has, and asks for a certificate."""
    with behind_tls(played.server.port, tmp_path) as port:
        url = f"temporal://127.0.0.1:{port}/default"

        def config(ca: str, cert: str | None) -> Config:
            files = {"farm_ca": tmp_path / f"{ca}.pem"}
            if cert is not None:
                files |= {"farm_cert": tmp_path / f"{cert}.pem", "farm_cert_key": tmp_path / f"{cert}.key"}
            return Config().model_copy(update=files)

        with FarmClient(FarmServer.of(url, config("ca", "client"))) as client:
            assert client.place(order("ok-tls"), Watch(), threading.Event()).outcome == "built"
        for ca, cert in (("ca", None), ("ca", "stranger"), ("stranger", "client")):
            with pytest.raises(RemoteError, match="no Temporal server can be used"):
                FarmClient(FarmServer.of(url, config(ca, cert)))
        with pytest.raises(RemoteError):
            FarmClient(FarmServer.of(url, Config()))


# --- a hostile queue


@workflow.defn(name="hostile")
class Hostile:
    """Has an activity of the real workers called with whatever a queue may make up."""

    @workflow.run
    async def run(self, document: Any) -> Any:
        from datetime import timedelta

        from temporalio.common import RetryPolicy

        return await workflow.execute_activity(
            BUILD,
            document,
            task_queue=build_queue("linux/amd64", "small"),
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )


def test_a_worker_refuses_what_is_no_order(played: Played) -> None:
    sound = order("ok-hostile").document()
    payloads: list[Any] = [
        {**sound, "format": 99},
        {**sound, "name": "../../../etc/passwd"},
        {**sound, "size": "x" * 100_000},
        {},
    ]

    async def ask(client: Client) -> list[str]:
        found = []
        async with Worker(
            client, task_queue="hostile", workflows=[Hostile], workflow_runner=UnsandboxedWorkflowRunner()
        ):
            for number, payload in enumerate(payloads):
                try:
                    await client.execute_workflow(
                        Hostile.run, payload, id=f"hostile-{number}-{time.time_ns()}", task_queue="hostile"
                    )
                except Exception as error:
                    inner: Any = error
                    while getattr(inner, "cause", None) is not None:
                        inner = inner.cause
                    found.append(f"{getattr(inner, 'type', '')}: {inner}")
                else:
                    found.append("built")
        return found

    found = played.client.run(ask(played.client.client))
    assert [each.partition(":")[0] for each in found] == ["UsageError"] * len(payloads), found
    assert played.workers["one"].poll() is None
    assert place(played, order("ok-after")).outcome == "built"


ANSWERS: dict[str, Any] = {
    "nothing": None,
    "another format": {"format": 1},
    "no path": {"format": FORMAT, "path": "/etc/passwd", "nar_hash": "c" * 64, "worker": "one", "outcome": "built"},
    "a flood": {"format": FORMAT, "path": "x" * 1_500_000, "nar_hash": "c" * 64, "worker": "one", "outcome": "built"},
}


def test_a_flood_of_nonsense_keeps_no_worker_from_work(played: Played) -> None:
    sound = order("ok-flood").document()

    async def ask(client: Client) -> list[BaseException | object]:
        async with Worker(client, task_queue="flood", workflows=[Hostile], workflow_runner=UnsandboxedWorkflowRunner()):
            nonsense = [
                client.execute_workflow(
                    Hostile.run,
                    {**sound, "drv": "x" * 10_000 + str(number)},
                    id=f"flood-{number}-{time.time_ns()}",
                    task_queue="flood",
                )
                for number in range(40)
            ]
            good = played.client._placed(order("ok-beside"), Watch(), threading.Event(), 1.0)
            return await asyncio.gather(good, *nonsense, return_exceptions=True)

    answer, *refused = played.client.run(ask(played.client.client))
    assert isinstance(answer, OrderAnswer), answer
    assert all(isinstance(each, WorkflowFailureError) for each in refused)


@pytest.mark.parametrize("what", ANSWERS)
def test_a_client_believes_no_strange_answer(played: Played, what: str) -> None:
    """Who answers in a worker's place has a queue of its own here, so that the real worker is not asked."""
    wanted = replace(order("ok-strange"), platform="linux/strange")

    @activity.defn(name=BUILD)
    async def answer(_document: Any) -> Any:
        activity.heartbeat({"worker": "\x1b[31m" + "x" * 5000, "phase": ["?"], "pieces": "many", "stream": "../.."})
        await asyncio.sleep(1.5)
        return ANSWERS[what]

    async def ask() -> OrderAnswer:
        client = played.client.client
        async with Worker(client, task_queue=build_queue("linux/strange", "small"), activities=[answer]):
            return await played.client._placed(wanted, Watch(), threading.Event(), 1.0)

    with pytest.raises((RemoteError, VzreproError)) as caught:
        played.client.run(ask())
    assert len(str(caught.value)) < 2000


def test_what_a_hostile_queue_says_of_a_failure_is_bounded(played: Played) -> None:
    wanted = replace(order("ok-failure"), platform="linux/strange")

    @activity.defn(name=BUILD)
    async def fail(_document: Any) -> Any:
        told = {"kind": "SystemExit", "message": "\x1b[2J" + "m" * 100_000, "reason": ["?"], "worker": 7}
        raise ApplicationError("x" * 100_000, told, type="SystemExit", non_retryable=True)

    async def ask() -> OrderAnswer:
        client = played.client.client
        async with Worker(client, task_queue=build_queue("linux/strange", "small"), activities=[fail]):
            return await played.client._placed(wanted, Watch(), threading.Event(), 1.0)

    with pytest.raises(VzreproError) as caught:
        played.client.run(ask())
    assert type(caught.value) is VzreproError
    assert len(str(caught.value)) < 8000
