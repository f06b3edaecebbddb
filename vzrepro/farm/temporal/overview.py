"""What goes on at a farm: its queues with their workers, and its builds."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from typing import Any, NamedTuple

from temporalio.client import WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from vzrepro.base.errors import UsageError
from vzrepro.farm.order import PLATFORMS, SIZES, Order
from vzrepro.farm.temporal.client import FarmClient, beat_of, queue_words
from vzrepro.farm.temporal.server import BUILD, build_queue

_MANY = 1000
_RECENT = dt.timedelta(seconds=90)


class QueueRow(NamedTuple):
    """A queue of builds: how many workers have asked it for work lately, and what is building and waiting there."""

    queue: str
    workers: int
    building: int
    waiting: int
    names: str


class BuildRow(NamedTuple):
    """A build: its id, how it is, who builds it, since when it is known (RFC 3339), and what is being done."""

    id: str
    state: str
    worker: str | None
    since: str
    phase: str | None


def queues(client: FarmClient) -> list[QueueRow]:
    """The queues of all platforms that have workers or orders."""
    return client.run(_queues(client))


def builds(client: FarmClient, *, ended: bool) -> list[BuildRow]:
    """The builds under way, at most a thousand; with `ended`, those of the last days too."""
    return client.run(_builds(client, ended))


def order_of(client: FarmClient, wanted: str) -> Order:
    """The order of a build, as it was placed. Raises UsageError when there is none, or it is malformed."""
    return client.run(_order_of(client, wanted))


async def _queues(client: FarmClient) -> list[QueueRow]:
    building: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    async for each in client.client.list_workflows(_query(ended=False), limit=_MANY):
        pending = await _pending(client, each.id)
        if pending is not None:
            queue = pending.activity_options.task_queue.name
            (building if beat_of(pending) else waiting)[queue] += 1
    known = dict.fromkeys(build_queue(platform, size) for platform in PLATFORMS for size in SIZES)
    rows = []
    now = dt.datetime.now(dt.UTC)
    for queue in {**known, **building, **waiting}:
        polled = await client.pollers(queue, activities=True)
        names = sorted({name for name, last in polled if now - last < _RECENT})
        if names or building[queue] or waiting[queue]:
            rows.append(QueueRow(queue_words(queue), len(names), building[queue], waiting[queue], " ".join(names)))
    return rows


async def _builds(client: FarmClient, ended: bool) -> list[BuildRow]:
    rows = []
    async for each in client.client.list_workflows(_query(ended=ended), limit=_MANY):
        running = each.status is WorkflowExecutionStatus.RUNNING
        pending = await _pending(client, each.id) if running else None
        beat = beat_of(pending) if pending is not None else {}
        state = ("building" if beat else "waiting") if running else (each.status.name.lower() if each.status else "?")
        worker, phase = (beat.get(name) for name in ("worker", "phase"))
        rows.append(
            BuildRow(
                each.id,
                state,
                None if worker is None else str(worker)[:63],
                each.start_time.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                None if phase is None else str(phase)[:200],
            )
        )
    return rows


async def _pending(client: FarmClient, wanted: str) -> Any | None:
    try:
        described = await client.client.get_workflow_handle(wanted).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise
    return next(iter(described.raw_description.pending_activities), None)


async def _order_of(client: FarmClient, wanted: str) -> Order:
    try:
        async for event in client.client.get_workflow_handle(wanted).fetch_history_events(page_size=1):
            payloads = event.workflow_execution_started_event_attributes.input.payloads
            values = await client.client.data_converter.decode(list(payloads)[:1])
            return Order.parse(values[0] if values else None)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
    raise UsageError(f"there is no build {wanted}", hint="vzrepro farm list")


def _query(*, ended: bool) -> str:
    return f"WorkflowType = '{BUILD}'" + ("" if ended else " AND ExecutionStatus = 'Running'")
