"""What runs a plan's steps, as far as no other test comes by it."""

from __future__ import annotations

import queue
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import PATIENCE_SECS
from vzrepro.realize.schedule import take


def test_an_interrupt_that_another_thread_was_given_is_seen() -> None:
    ended: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiting, seen = threading.Event(), threading.Event()

    def work() -> None:
        waiting.wait()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        ended.put(seen.wait(PATIENCE_SECS))

    with ThreadPoolExecutor(1) as pool:
        pool.submit(work)
        with pytest.raises(KeyboardInterrupt):
            waiting.set()
            take(ended)
        seen.set()
    assert ended.get_nowait()
