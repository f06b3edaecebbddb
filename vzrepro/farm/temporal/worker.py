"""A worker: takes orders that fit what is free, has each built in a thread, and tells the server that it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from temporalio import activity
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from vzrepro.base.errors import Interrupted, RemoteError, VzreproError
from vzrepro.farm.order import Order, OrderAnswer, SizeClass, failure_document, kind_of
from vzrepro.farm.temporal.server import BUILD, DRAIN, WORKFLOWS, FarmServer, build_queue, sdk_runtime, worker_queue
from vzrepro.farm.temporal.workflow import BuildWorkflow, DrainWorkflow
from vzrepro.farm.workshop import Attempt

_BEAT_SECS = 1.0
_WAIT_SECS = 5.0  # an order that does not fit goes back to the queue after that: another worker may be free
_LONGEST_PAUSE_SECS = 60.0  # between looks for a server
_TROUBLE_SECS = 30.0  # a machine that cannot build takes nothing for so long, else it would soon have failed them all
_FOR_EVER = timedelta(days=365)

OrderBuild = Callable[[Order, Attempt], OrderAnswer]
"""Builds an order in the calling thread (`Workshop.build`)."""


@dataclass(slots=True)
class FarmWorker:
    """Serves the queues of `platforms` and `sizes`: `jobs` builds at once, whose memory limits together are at most
    `memory_bytes`. `healthy` raises when this machine cannot build at all; asked when a build fails by something that
    was not its own fault. `key_id` is that of its key: what another one is to build it leaves alone. `say` is told, a
    line each, of what happens."""

    server: FarmServer
    name: str
    platforms: Sequence[str]
    sizes: Sequence[SizeClass]
    jobs: int
    build: OrderBuild
    healthy: Callable[[], object] = lambda: None
    memory_bytes: int | None = None
    key_id: str = ""
    metrics: str | None = None
    say: Callable[[str], None] = lambda _line: None
    _running: dict[str, tuple[Order, Attempt]] = field(default_factory=dict)
    _freed: asyncio.Event = field(default_factory=asyncio.Event)
    _drained: asyncio.Event = field(default_factory=asyncio.Event)
    _pool: ThreadPoolExecutor | None = None
    _trouble_until: float = 0.0

    def serve(self) -> None:
        """Work until SIGTERM, SIGINT or `farm drain`; then finish what runs. A second signal gives that back."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        client = await self._connected()
        if client is None:
            return
        with ThreadPoolExecutor(max(self.jobs, 1) * len(self.platforms) * len(self.sizes)) as pool:
            self._pool = pool
            async with contextlib.AsyncExitStack() as stack:
                for worker in self._workers(client):
                    await stack.enter_async_context(worker)
                self.say(f"{self.name} takes orders from {self.server.url}")
                await self._drained.wait()
                self.say(f"{self.name} takes nothing more" + (", and finishes what it has" if self._running else ""))

    async def _connected(self) -> Client | None:
        """The connection, as soon as there is a server; None when the worker is to end before that."""
        runtime = sdk_runtime(self.metrics)
        pause, said = _WAIT_SECS, ""
        while not self._drained.is_set():
            try:
                return await self.server.connect(self.name, runtime)
            except RemoteError as error:
                if error.in_a_line != said:
                    said = error.in_a_line
                    self.say(f"{self.name} waits for a server: {said}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._drained.wait(), pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECS)
        return None

    def _workers(self, client: Client) -> list[Worker]:
        """In the order in which they are entered; they are left the other way round, so that what is said about a
        build's end still reaches the workflow."""
        workflows = Worker(
            client,
            task_queue=WORKFLOWS,
            workflows=[BuildWorkflow, DrainWorkflow],
            # What is in them is ours and does nothing that a replay must not; the sandbox takes 5 ms per workflow.
            workflow_runner=UnsandboxedWorkflowRunner(),
            # A build that ends with a strange error can be ordered again; one that hangs cannot.
            workflow_failure_exception_types=[Exception],
        )
        control = Worker(client, task_queue=worker_queue(self.name), activities=[self._drain_activity()])
        builds = [
            Worker(
                client,
                task_queue=build_queue(platform, size),
                activities=[self._build_activity()],
                max_concurrent_activities=self.jobs,
                max_concurrent_activity_task_polls=1,
                max_heartbeat_throttle_interval=timedelta(seconds=_BEAT_SECS),
                graceful_shutdown_timeout=_FOR_EVER,
            )
            for platform in self.platforms
            for size in self.sizes
        ]
        return [workflows, control, *builds]

    def _signalled(self) -> None:
        if not self._drained.is_set():
            self._drained.set()
            return
        for _, attempt in self._running.values():
            attempt.stop.set()

    def _drain_activity(self) -> Callable[[], Any]:
        @activity.defn(name=DRAIN)
        async def drain() -> list[str]:
            # The answer first: who is asked to end may not get round to it afterwards.
            asyncio.get_running_loop().call_later(1.0, self._drained.set)
            return [order.id for order, _ in self._running.values()]

        return drain

    def _build_activity(self) -> Callable[[dict[str, Any]], Any]:
        @activity.defn(name=BUILD)
        async def build(document: dict[str, Any]) -> dict[str, Any]:
            try:
                order = Order.parse(document)
            except VzreproError as error:
                raise self._failure(error) from None
            return await self._built(order)

        return build

    async def _built(self, order: Order) -> dict[str, Any]:
        token = activity.info().task_token.hex()
        until = time.monotonic() + _WAIT_SECS
        mine = self.key_id not in order.apart_from
        while not (mine and self._fits(order)):
            phase = "waits for what it builds" if mine else "leaves it to another builder"
            activity.heartbeat({"worker": self.name, "phase": phase})
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), 1.0)
            if time.monotonic() > until or self._drained.is_set():
                return {"busy": True}
        attempt = Attempt()
        self._running[token] = order, attempt
        self.say(f"{order.name}: begins")
        try:
            answer = await self._awaited(order, attempt)
        except Exception as error:
            self.say(f"{order.name}: {error}")
            if kind_of(error) == VzreproError.__name__:
                await self._examine()
            raise self._failure(error) from None
        finally:
            del self._running[token]
            self._freed.set()
        self.say(f"{order.name}: {answer.outcome}")
        return answer.document()

    async def _awaited(self, order: Order, attempt: Attempt) -> OrderAnswer:
        """Build in a thread, and let the server know that it goes on. Cancelled, the build ends first."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, functools.partial(self.build, order, attempt))
        try:
            while True:
                activity.heartbeat({"worker": self.name, **attempt.beat})
                done, _ = await asyncio.wait({future}, timeout=_BEAT_SECS)
                if done:
                    return future.result()
        except asyncio.CancelledError:
            attempt.stop.set()
            await asyncio.wait({future})
            self.say(f"{order.name}: cancelled")
            with contextlib.suppress(Interrupted):
                future.result()
            raise

    async def _examine(self) -> None:
        """Take nothing for a while if it is the machine that is in trouble, not a build that its engine refuses."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._pool, self.healthy)
        except (VzreproError, OSError) as error:
            self._trouble_until = time.monotonic() + _TROUBLE_SECS
            self.say(f"nothing is taken for {_TROUBLE_SECS:.0f} s: {error}")

    def _fits(self, order: Order) -> bool:
        """Whether there is room for it; alone, anything fits."""
        if time.monotonic() < self._trouble_until:
            return False
        running = [each for each, _ in self._running.values()]
        if not running:
            return True
        taken = sum(each.memory_bytes or 0 for each in (*running, order))
        return len(running) < self.jobs and (self.memory_bytes is None or taken <= self.memory_bytes)

    def _failure(self, error: BaseException) -> ApplicationError:
        document = failure_document(error, self.name)
        return ApplicationError(document["message"], document, type=document["kind"], non_retryable=True)
