"""Many small requests at once, their answers in order, memory bounded whatever their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 16
"""Requests on their way at once: small ones wait for the place, not for this machine."""


def in_order(act: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> Generator[R]:
    """`act` of every item, in the items' order, done by `workers` threads; at most four times as many are ahead.

    The first error ends it: it is raised in its turn, what has not begun by then is not done, and what has is not
    waited for, nor is it after an interrupt. With one worker, all is done in the caller's thread, each item when its
    answer is wanted.
    """
    if workers == 1:
        yield from map(act, items)
        return
    coming: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="cache")
    try:
        for item in items:
            coming.append(pool.submit(act, item))
            if len(coming) >= 4 * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
