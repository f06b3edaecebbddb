"""Ctrl-C is answered, whatever the main thread does just then."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORKING = """
import logging, os, random, signal, sys, threading, time
from vzrepro import cli

def interrupt():
    time.sleep(random.uniform(0, 0.02))
    os.kill(os.getpid(), signal.SIGINT)

ballast = [bytes(100) for _ in range(100_000)]  # so that a fork takes its time
for round in range(60):
    cli.answer_interrupts()
    asking = threading.Thread(target=interrupt)
    end = time.monotonic() + 5
    try:
        asking.start()
        while time.monotonic() < end:
            BUSY
        sys.exit(f"round {round}: no interrupt")
    except KeyboardInterrupt:
        asking.join()
    free = []
    looking = threading.Thread(target=lambda: free.append(logging._lock.acquire(timeout=1) and logging._lock.release()))
    looking.start()
    looking.join()
    if free != [None]:
        sys.exit(f"round {round}: the lock of logging is taken for ever")
"""

DELETING = """
class Deleted:
    def __del__(self):
        for _ in range(1000):
            pass
"""


@pytest.mark.parametrize(
    ("before", "busy"),
    [
        ("", "os.waitpid(os.fork() or os._exit(0), 0)"),
        ("", "logging.getLogger(str(random.random()))"),
        (DELETING, "Deleted()"),
    ],
    ids=["forks", "logs", "deletes"],
)
def test_an_interrupt_is_never_lost(before: str, busy: str) -> None:
    script = before + FORKING.replace("BUSY", busy)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_in_a_process_of_others_leaves_them_that() -> None:
    """Also where Temporal's library is loaded, whose threads `vzrepro` itself does not wait for at its end."""
    script = """
import vzrepro.farm.temporal.server
from vzrepro import cli
try:
    cli.main(["--help"])
except SystemExit:
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("still here\n")
