"""The guest agent under load: a thousand commands at once, a gigabyte for a slow reader. Each test runs against the
agent on this host and, where there is time, the one in a guest."""

from __future__ import annotations

import time

import pytest

from tests.contract.agents import LIMIT_SECS, Side, eventually

SLACK_KIB = 16_384
"""How much an agent may grow that holds a bounded amount of output."""


pytestmark = pytest.mark.parametrize("side", ["host", pytest.param("guest", marks=pytest.mark.thorough)], indirect=True)


def test_a_thousand_commands_at_once(agent: Side) -> None:
    """All of them are under way before the first may end: each waits to be told its exit code, and then prints much,
    which nobody reads until all have been told."""
    script = "read code; echo $code; head -c 100000 /dev/zero; exit $code"
    commands = [agent.shell(script) for _ in range(1000)]
    ids = {command.started().exec_id for command in commands}
    assert len(ids) == 1000
    agent.client.ping(LIMIT_SECS)
    for number, command in enumerate(commands):
        line = f"{number % 256}\n".encode()
        agent.client.stdin_write(command.exec_id, line, timeout_secs=LIMIT_SECS)
    for number, command in enumerate(commands):
        done = command.whole()
        line = f"{number % 256}\n".encode()
        assert (done.stdout == line + bytes(100_000), done.end) == (True, number % 256)
    eventually(lambda: not agent.zombies(), "every child reaped")


def test_a_gigabyte_waits_for_a_slow_reader(agent: Side) -> None:
    # An emulated guest's vsock carries 16 MB/s at best: an eighth shows the same there, in two minutes less.
    size = 1 << 30 if agent.name == "host" else 1 << 27
    before = agent.resident_kib()
    command = agent.shell(f"head -c {size} /dev/zero; echo end; echo err >&2").started()
    # Nothing is read until every buffer on the way is full and the command stands still.
    for _ in range(10):
        time.sleep(0.2)
        assert agent.resident_kib() < before + SLACK_KIB
    received, step, tail = 0, size // 64, b""
    while command.step() is not None:
        received += len(command.stdout)
        tail = (tail + command.stdout)[-8:]
        command.stdout.clear()
        if received > step:
            # A pause now and then, and a look at the agent.
            step += size // 64
            assert agent.resident_kib() < before + SLACK_KIB
    assert (received, tail, bytes(command.stderr), command.end) == (size + 4, b"\0\0\0\0end\n", b"err\n", 0)


def test_slow_readers_hold_up_nobody_else(agent: Side) -> None:
    before = agent.resident_kib()
    slow = [agent.exec("yes").started() for _ in range(10)]
    for _ in range(10):
        assert len(agent.shell("head -c 200000 /dev/zero").whole().stdout) == 200_000
        with agent.connect() as other:
            other.ping(LIMIT_SECS)
    # Each may hold a pipe's worth and a few events more.
    assert agent.resident_kib() < before + SLACK_KIB + 10 * 512
    for command in slow:
        command.execution.close()
