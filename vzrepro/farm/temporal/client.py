"""A client's connection: orders are placed, followed, cancelled, in a loop that has a thread of its own."""

from __future__ import annotations

import asyncio
import datetime as dt
import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import temporalio.api.enums.v1 as enums
import temporalio.api.taskqueue.v1 as taskqueue
import temporalio.api.workflowservice.v1 as service
from temporalio.client import (
    Client,
    WorkflowFailureError,
    WorkflowHandle,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import Priority, WorkflowIDConflictPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ActivityError, ApplicationError, CancelledError
from temporalio.exceptions import TimeoutError as ActivityTimeout
from temporalio.service import RPCError, RPCStatusCode

from vzrepro.base.errors import Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.farm.order import Order, OrderAnswer, failure_of
from vzrepro.farm.run import Watcher
from vzrepro.farm.temporal.server import BUILD, DRAIN, WORKFLOWS, FarmServer
from vzrepro.farm.temporal.workflow import LEASE_SECS, BuildWorkflow, DrainWorkflow

T = TypeVar("T")

_LOOK_SECS = 1.0
_SERVER_SECS = 600.0
_ANSWER_SECS = 15.0
_SERVED_SECS = 5.0
_REPLAY = "TMPRL1100"  # the SDK's code for a workflow that does other things than its history says
_BUSY = 20.0  # a look is taken after this many times what the last one took
_FINAL = frozenset(
    {
        RPCStatusCode.INVALID_ARGUMENT,
        RPCStatusCode.NOT_FOUND,
        RPCStatusCode.ALREADY_EXISTS,
        RPCStatusCode.PERMISSION_DENIED,
        RPCStatusCode.UNAUTHENTICATED,
        RPCStatusCode.FAILED_PRECONDITION,
        RPCStatusCode.OUT_OF_RANGE,
        RPCStatusCode.UNIMPLEMENTED,
    }
)
"""What a server means when it says so. A broken connection is any of the others, UNKNOWN and CANCELLED among them."""


class FarmClient:
    """A `Queue` on Temporal. A server that is restarted is waited for, ten minutes long."""

    def __init__(self, server: FarmServer) -> None:
        """Connect. Raises RemoteError."""
        self.server = server
        self._who = f"{_user()}@{socket.gethostname()}:{os.getpid()}"
        self._served: dict[str, tuple[float, bool]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="farm", daemon=True)
        self._thread.start()
        try:
            self.client: Client = self.run(server.connect(self._who))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Nothing more is asked, and nothing is left that could answer."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_settled(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, doing: Coroutine[Any, Any, T]) -> T:
        """Do it in the loop's thread, and wait; Ctrl-C ends that. Raises RemoteError for what the server refuses."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(doing, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise
        except RPCError as error:
            raise self._refused(error) from error

    def _refused(self, error: RPCError) -> RemoteError:
        return RemoteError(f"{self.server.url} failed", reason=error.message[:500])

    # --- orders

    def place(self, order: Order, watcher: Watcher, stop: threading.Event, urgency: float = 1.0) -> OrderAnswer:
        """Have it built, by whomever, and follow it to its end (`run.Queue`)."""
        return self.run(self._placed(order, watcher, stop, urgency))

    def follow(self, wanted: str, watcher: Watcher, stop: threading.Event) -> OrderAnswer:
        """Follow a build that somebody has ordered."""
        return self.run(self._followed(self.client.get_workflow_handle(wanted), watcher, stop, None))

    async def _placed(self, order: Order, watcher: Watcher, stop: threading.Event, urgency: float) -> OrderAnswer:
        until = time.monotonic() + _SERVER_SECS
        while True:
            try:
                await self.client.start_workflow(
                    BUILD,
                    order.document(),
                    id=order.id,
                    task_queue=WORKFLOWS,
                    id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                    id_reuse_policy=WorkflowIDReusePolicy.ALLOW_DUPLICATE,
                    start_signal="wait",
                    start_signal_args=[self._who],
                    static_summary=f"{order.name} for {order.platform} ({order.size})",
                    priority=Priority(priority_key=priority_of(urgency)),
                )
                return await self._followed(self.client.get_workflow_handle(order.id), watcher, stop, order)
            except RPCError as error:
                # A server that has lost its memory does not know the build any more: it is ordered once again.
                if error.status in _FINAL - {RPCStatusCode.NOT_FOUND} or time.monotonic() > until:
                    raise
                await self._pause(watcher, stop, order.name)

    async def _pause(self, watcher: Watcher, stop: threading.Event, name: str) -> None:
        watcher.waits(f"{self.server.url} does not answer")
        for _ in range(5):
            if stop.is_set():
                raise Interrupted(f"interrupted while {name} was being built")
            await asyncio.sleep(_LOOK_SECS)

    async def _followed(
        self, handle: WorkflowHandle[Any, Any], watcher: Watcher, stop: threading.Event, order: Order | None
    ) -> OrderAnswer:
        result = asyncio.ensure_future(handle.result(rpc_timeout=dt.timedelta(seconds=60)))
        leased = time.monotonic()
        until = time.monotonic() + _SERVER_SECS
        since: dt.datetime | None = None
        look_at = time.monotonic() + _LOOK_SECS
        try:
            while True:
                done, _ = await asyncio.wait({result}, timeout=_LOOK_SECS)
                if stop.is_set() and not done:
                    raise Interrupted(f"interrupted while {handle.id} was being built")
                if done:
                    try:
                        return OrderAnswer.parse(result.result())
                    except WorkflowFailureError as error:
                        raise _why(error) from error
                    except RPCError as error:
                        if error.status in _FINAL or time.monotonic() > until:
                            raise
                        await self._pause(watcher, stop, handle.id)
                        result = asyncio.ensure_future(handle.result(rpc_timeout=dt.timedelta(seconds=60)))
                        continue
                if time.monotonic() < look_at:
                    continue
                begun = time.monotonic()
                try:
                    since = await self._look(handle, watcher, since)
                    if time.monotonic() - leased > LEASE_SECS / 3:
                        leased = time.monotonic()
                        await handle.signal(BuildWorkflow.wait, self._who)
                    until = time.monotonic() + _SERVER_SECS
                    # Looking must not be what keeps a busy server from its work.
                    look_at = time.monotonic() + min(60.0, _BUSY * (time.monotonic() - begun))
                except RPCError as error:
                    if error.status is RPCStatusCode.NOT_FOUND and not result.done():
                        if order is not None:
                            raise
                    elif error.status in _FINAL:
                        raise
        except Interrupted:
            with_signal = asyncio.wait_for(handle.signal(BuildWorkflow.leave, self._who), 5.0)
            await asyncio.gather(with_signal, return_exceptions=True)
            raise
        finally:
            result.cancel()

    async def _look(
        self, handle: WorkflowHandle[Any, Any], watcher: Watcher, since: dt.datetime | None
    ) -> dt.datetime | None:
        """Tell the watcher how the build is; `since` is when nobody was found to take it, and is given back."""
        described = await handle.describe()
        pending = list(described.raw_description.pending_activities)
        if pending:
            beat = beat_of(pending[0])
            if beat.get("phase") and beat.get("worker"):
                watcher.works(str(beat["worker"]), str(beat["phase"]))
                pieces = beat.get("pieces")
                if isinstance(pieces, int) and isinstance(stream := beat.get("stream"), str) and stream.isalnum():
                    watcher.log(stream, min(pieces, 1_000_000))
                return None
            queue = pending[0].activity_options.task_queue.name or WORKFLOWS
        else:
            queue = WORKFLOWS
        if await self._has_workers(queue, activities=bool(pending)):
            watcher.waits("all workers that may take it are busy" if pending else "a worker is to take it")
            return None
        since = since or dt.datetime.now().astimezone()
        what = f"for {queue_words(queue)}" if pending else "at all"
        watcher.waits(f"no worker {what} since {since:%H:%M}")
        return since

    async def _has_workers(self, queue: str, *, activities: bool) -> bool:
        """Whether workers serve a queue, as far as was known a few seconds ago."""
        asked, found = self._served.get(queue, (-_SERVED_SECS, False))
        if time.monotonic() - asked > _SERVED_SECS:
            self._served[queue] = time.monotonic(), found
            found = bool(await self.pollers(queue, activities=activities))
            self._served[queue] = time.monotonic(), found
        return found

    async def pollers(self, queue: str, *, activities: bool) -> list[tuple[str, dt.datetime]]:
        """The workers that have asked this queue for work within the last minutes, and when."""
        kind = (
            enums.TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY if activities else enums.TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW
        )
        answer = await self.client.workflow_service.describe_task_queue(
            service.DescribeTaskQueueRequest(
                namespace=self.client.namespace,
                task_queue=taskqueue.TaskQueue(name=queue),
                task_queue_type=kind,
            )
        )
        return [(each.identity, each.last_access_time.ToDatetime(dt.UTC)) for each in answer.pollers]

    def farewell(self, orders: Sequence[Order]) -> str | None:
        """What a client that goes away is told: the builds go on (`run.Queue`)."""
        if not orders:
            return None
        lines = [f"{len(orders)} build{'s go' if len(orders) > 1 else ' goes'} on; the same command follows again"]
        for order in orders[:5]:
            lines += [f"vzrepro farm attach {order.id}", f"vzrepro farm cancel {order.id}"]
        return "\n".join([*lines, *(["all: vzrepro farm list"] if len(orders) > 5 else [])])

    # --- what is asked of builds and workers

    def cancel(self, wanted: str) -> list[str]:
        """End a build unless others wait for it, who are returned."""

        async def give_up() -> list[str]:
            handle = self.client.get_workflow_handle(wanted)
            who = f"{_user()}@{socket.gethostname()}"
            return await handle.execute_update(
                BuildWorkflow.give_up, who, rpc_timeout=dt.timedelta(seconds=_ANSWER_SECS)
            )

        try:
            return self.run(give_up())
        except (WorkflowUpdateRPCTimeoutOrCancelledError, WorkflowUpdateFailedError) as error:
            raise RemoteError(
                f"{wanted} was not cancelled", reason="no worker answers, so nobody builds it now either"
            ) from error
        except RemoteError as error:
            raise UsageError(
                f"no build {wanted} is under way", reason=error.reason, hint="vzrepro farm list"
            ) from error

    def drain(self, worker: str) -> list[str]:
        """Have a worker finish what it builds, which is returned, and end."""

        async def drain() -> list[str]:
            return await self.client.execute_workflow(
                DrainWorkflow.run,
                worker,
                id=f"{DRAIN}-{worker}",
                task_queue=WORKFLOWS,
                id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
                execution_timeout=dt.timedelta(seconds=2 * _ANSWER_SECS),
            )

        try:
            return self.run(drain())
        except WorkflowFailureError as error:
            raise UsageError(
                f"no worker {worker} answers", hint="see who is there with: vzrepro farm status"
            ) from error


def priority_of(urgency: float) -> int:
    """The server's priority for what is so urgent: 1 is taken first, 5 last."""
    return min(5, 1 + int(5 * (1 - urgency)))


async def _settled() -> None:
    """End what still runs. A call that the SDK's threads come back from when Python is ending would hang it there."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(0.1)


def beat_of(pending: Any) -> dict[str, Any]:
    """What a worker last said of a build, as far as it can be read."""
    payloads = pending.heartbeat_details.payloads
    if (
        not payloads
        or len(payloads[0].data) > 4096
        or pending.state != enums.PendingActivityState.PENDING_ACTIVITY_STATE_STARTED
    ):
        return {}
    try:
        beat = json.loads(payloads[0].data)
    except (ValueError, RecursionError):
        return {}
    return beat if isinstance(beat, dict) else {}


def _why(error: WorkflowFailureError) -> VzreproError:
    """How a build has failed."""
    cause = error.cause
    if isinstance(cause, ActivityError):
        inner = cause.cause
        if isinstance(inner, ActivityTimeout):
            return VzreproError(
                "the build failed: its workers were lost, three in a row",
                reason="a worker that is not heard of for ten seconds is taken for lost",
                hint="vzrepro farm status",
            )
        cause = inner or cause
    if isinstance(cause, CancelledError) or (isinstance(cause, ApplicationError) and cause.type == "Cancelled"):
        return Interrupted("the build was cancelled")
    if isinstance(cause, ApplicationError) and _REPLAY in cause.message:
        return VzreproError(
            "the build was given up: its workers have another vzrepro than those that began it",
            hint="the same command orders it again; have the same vzrepro on clients and workers",
        )
    if isinstance(cause, ApplicationError):
        return failure_of(cause.details[0] if cause.details else {"kind": cause.type, "message": cause.message})
    return VzreproError("the build failed", reason=str(cause or error)[:500], hint="vzrepro farm list")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def queue_words(queue: str) -> str:
    """A task queue of builds for people: `linux/arm64 (small)`."""
    _, _, rest = queue.partition("/")
    platform, _, size = rest.partition("/")
    return f"{platform.replace('-', '/', 1)} ({size})"
