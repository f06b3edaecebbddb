"""Edges of the agent's promises: answers that are not kept, clients that die, ids of an agent that is gone, a
foreground that is a group of its own, a clock that is off. Each test runs against the agent on this host and the one in
a guest."""

from __future__ import annotations

import contextlib
import time
import uuid

import pytest

from tests.contract.agents import Side, eventually, refused

_JOB = "set -m; sh -c 'echo $$ up; exec sleep 1000'; echo after"


def test_more_output_than_is_kept_is_made_again(agent: Side) -> None:
    key = uuid.uuid4().hex
    script = "echo $$; head -c 3000000 /dev/zero"
    first, second = (agent.shell(script, key=key).whole() for _ in range(2))
    assert len(first.stdout) == len(second.stdout) > 3_000_000
    assert first.exec_id != second.exec_id


@pytest.mark.parametrize("side", ["host", pytest.param("guest", marks=pytest.mark.thorough)], indirect=True)
def test_what_connections_remember_is_bounded_and_ends_with_them(agent: Side) -> None:
    key = uuid.uuid4().hex
    agent.shell("head -c 500000 /dev/zero", key=key).whole()
    before = agent.resident_kib()
    with contextlib.ExitStack() as stack:
        for number in range(80):
            client = stack.enter_context(agent.connect())
            script = f": {number}; head -c 500000 /dev/zero"
            assert len(agent.shell(script, key=key, client=client).whole().stdout) == 500_000
        # 40 MB if all of it were kept.
        assert agent.resident_kib() < before + 32_768
    with agent.connect() as client:
        first, second = (agent.shell("echo $$", key=key, client=client).whole() for _ in range(2))
        assert first == second


def test_clients_that_die_in_mid_stream_leave_nothing_behind(agent: Side) -> None:
    pids: list[int] = []
    for number in range(30):
        client = agent.connect()
        command = agent.shell(f": {number}; echo $$; exec yes", key=f"req_{number}", client=client).until(b"\n")
        pids.append(int(command.stdout.split(b"\n")[0]))
        # Not a word of farewell, and much that was never read.
        client.close()
    eventually(lambda: not agent.alive(*pids) and not agent.zombies(), "the commands' end")


def test_a_signal_also_reaches_what_is_in_the_foreground_of_a_terminal(agent: Side) -> None:
    command = agent.shell(_JOB, pty=(24, 80)).until(b"up")
    job = int(command.stdout.split()[0])
    agent.client.signal(command.exec_id, 9)
    assert command.whole().end == 137
    eventually(lambda: not agent.alive(job), "the foreground's end")


def test_a_client_that_vanishes_takes_the_foreground_along(agent: Side) -> None:
    command = agent.shell(_JOB, pty=(24, 80)).until(b"up")
    job = int(command.stdout.split()[0])
    command.execution.close()
    eventually(lambda: not agent.alive(job), "the foreground's end")


def test_an_id_is_not_given_out_again_by_an_agent_that_was_started_again(agent: Side) -> None:
    old = agent.exec("sleep", ["1000"]).started()
    agent.kill_agent()
    new = [agent.exec("sleep", ["1000"]).started() for _ in range(20)]
    assert old.exec_id not in [command.exec_id for command in new]
    with refused("not_found"):
        agent.client.signal(old.exec_id, 9)
    for command in new:
        command.execution.close()


# Orphans are init's, in a guest ours.
@pytest.mark.parametrize("side", ["guest"], indirect=True)
def test_what_a_command_left_behind_is_reaped_in_the_end(agent: Side) -> None:
    pids = agent.text("for i in 1 2 3 4 5 6 7 8 9; do (sleep 0.3 & echo $!); done").split()
    assert len(pids) == 9
    eventually(lambda: agent.text(f"cd /proc; ls -d {' '.join(pids)} 2>/dev/null; :") == "", "the end of the orphans")


# That an agent outside a guest leaves the machine's clock alone is a test of the crate.
@pytest.mark.parametrize("side", ["guest"], indirect=True)
@pytest.mark.parametrize("wrong", [31_536_000, 4_000_000_000])
def test_an_agent_that_starts_sets_a_clock_that_is_off(agent: Side, wrong: int) -> None:
    assert abs(int(agent.text(f"date -s @{wrong} > /dev/null; date +%s")) - wrong) < 60
    agent.kill_agent()
    eventually(lambda: abs(int(agent.text("date +%s")) - time.time()) < 10, "the host's time in the guest")
