"""What the server keeps of a build: who waits for it, what has failed, and what follows. It is replayed, so it does
nothing else: no I/O, no clock but the workflow's.
"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, TimeoutType, is_cancelled_exception
from temporalio.exceptions import TimeoutError as ActivityTimeout

with workflow.unsafe.imports_passed_through():
    from vzrepro.base.errors import UsageError
    from vzrepro.farm.order import Order
    from vzrepro.farm.retries import LOST, again
    from vzrepro.farm.temporal.server import BUILD, DRAIN, build_queue, worker_queue

HEARTBEAT_SECS = 10.0
"""A worker that is not heard of for so long is lost."""

LEASE_SECS = 180.0
"""A client that follows a build says so every third of that; one that does not any more has gone."""

_SLACK_SECS = 3600  # taking inputs and pushing, beside the build's own time limit
_WAITERS = 1000


@workflow.defn(name=BUILD)
class BuildWorkflow:
    """One build, until it is done or not worth another try."""

    def __init__(self) -> None:
        self._waiters: dict[str, float] = {}
        self._given_up = False
        self._try: asyncio.Task[Any] | None = None

    @workflow.run
    async def run(self, document: dict[str, Any], failures: dict[str, int] | None = None) -> Any:
        """Have it built. `failures` are those until now, by kind."""
        try:
            order = Order.parse(document)
        except UsageError as error:
            raise ApplicationError(str(error), type="UsageError", non_retryable=True) from error
        failures, size = dict(failures or {}), order.size
        while True:
            self._try = asyncio.create_task(
                workflow.execute_activity(
                    BUILD,
                    {**document, "size": size},
                    task_queue=build_queue(order.platform, size),
                    start_to_close_timeout=timedelta(seconds=order.most_secs + _SLACK_SECS),
                    heartbeat_timeout=timedelta(seconds=HEARTBEAT_SECS),
                    retry_policy=RetryPolicy(maximum_attempts=1),
                    cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                )
            )
            try:
                answer = await self._try
            except ActivityError as error:
                if is_cancelled_exception(error):
                    raise _cancelled() from error
                kind = _kind(error)
                failures[kind] = failures.get(kind, 0) + 1
                next_try = again(kind, failures, size)
                if next_try is None:
                    raise
                size = next_try.size
                with contextlib.suppress(TimeoutError):
                    pause = timedelta(seconds=next_try.after_secs)
                    await workflow.wait_condition(lambda: self._given_up, timeout=pause)
            except asyncio.CancelledError as error:
                if not self._given_up:
                    raise
                raise _cancelled() from error
            else:
                if not (isinstance(answer, dict) and answer.get("busy")):
                    return answer
            if self._given_up:
                raise _cancelled()
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(args=[{**document, "size": size}, failures])

    @workflow.signal
    def wait(self, who: str) -> None:
        """Somebody waits for this build."""
        if len(self._waiters) < _WAITERS:
            self._waiters[who[:200]] = workflow.now().timestamp()

    @workflow.signal
    def leave(self, who: str) -> None:
        """They do not any more; the build goes on."""
        self._waiters.pop(who[:200], None)

    @workflow.update
    def give_up(self, who: str) -> list[str]:
        """End the build unless others than `who` wait for it, who are named."""
        now = workflow.now().timestamp()
        others = sorted(each for each, last in self._waiters.items() if each != who and now - last < LEASE_SECS)
        if not others:
            self._given_up = True
            if self._try is not None:
                self._try.cancel()
        return others[:20]

    @workflow.query
    def waiters(self) -> list[str]:
        """Who waits, as far as is known."""
        return sorted(self._waiters)


@workflow.defn(name=DRAIN)
class DrainWorkflow:
    """Asks one worker to finish what it builds, take nothing more, and end."""

    @workflow.run
    async def run(self, worker: str) -> list[str]:
        """The builds that it still finishes."""
        running: list[str] = await workflow.execute_activity(
            DRAIN,
            task_queue=worker_queue(worker),
            result_type=list[str],
            schedule_to_close_timeout=timedelta(seconds=5),
            retry_policy=RetryPolicy(maximum_attempts=1),
        )
        return running


def _cancelled() -> ApplicationError:
    return ApplicationError("the build was cancelled", type="Cancelled", non_retryable=True)


def _kind(error: ActivityError) -> str:
    """The kind of a failed try, as `retries.again` has it."""
    cause = error.cause
    if isinstance(cause, ActivityTimeout):
        return "TimedOut" if cause.type is TimeoutType.START_TO_CLOSE else LOST
    return cause.type or "VzreproError" if isinstance(cause, ApplicationError) else "VzreproError"
