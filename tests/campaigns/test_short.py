"""A short round of each campaign, and that campaigns tell what they find."""

from __future__ import annotations

import os

import pytest

from tests import servers
from tests.campaigns import frame, full_disks, hostile_guest, hostile_s3, kills, parsers, side_by_side, two_machines
from tests.campaigns.frame import Line, Lost, Round, Wrong

SHORT: dict[str, tuple[Line, int]] = {
    **{f"kill {name}": (line, 2) for name, line in kills.LINES.items()},
    **{f"full: {name}": (line, 1) for name, line in full_disks.LINES.items()},
    **{name: (line, 1) for name, line in side_by_side.LINES.items()},
    **{f"parse {name}": (parsers.fed(each, 40), 1) for name, each in parsers.PARSERS.items()},
    **{name: (parsers.fed(each, 40), 1) for name, each in hostile_guest.GUESTS.items()},
}


@pytest.mark.parametrize("name", SHORT)
def test_nothing_is_lost_or_wrong(name: str) -> None:
    if name.startswith("full") and (reason := full_disks.why_not()):
        pytest.skip(reason)
    line, rounds = SHORT[name]
    tally = frame.play(name, line, rounds, seed=1)
    assert (tally.lost, tally.wrong) == ([], [])
    assert tally.rounds >= rounds


@pytest.mark.parametrize("name", hostile_s3.LINES)
def test_a_lying_server_does_no_harm(name: str, credentials: None) -> None:
    tally = frame.play(name, hostile_s3.LINES[name], 1, seed=1)
    assert (tally.lost, tally.wrong) == ([], [])


def test_two_machines_on_one_bucket(seaweed: servers.S3Server, credentials: None) -> None:
    tally = frame.play("two machines", two_machines.two_machines(seaweed), 1, seed=1)
    assert (tally.lost, tally.wrong) == ([], [])


def test_what_is_lost_or_wrong_is_told() -> None:
    def line(round: Round) -> None:
        round.tally.faults += 1
        match round.number:
            case 0:
                raise Lost("it is gone")
            case 1:
                raise Wrong("it is another")
            case 2:
                round.calmly(lambda: os._exit(3), "a process that fails")
            case 3:
                assert round.child(lambda: None, kill_after=0.0) in (0, -9)

    tally = frame.play("any", line, 4, seed=1)
    assert tally.lost == ["any, round 0: it is gone"]
    assert [told.partition("\n")[0] for told in tally.wrong] == [
        "any, round 1: it is another",
        "any, round 2: a process that fails: exit code 3",
    ]
    assert tally.row() | {"longest_wait_secs": 0, "largest_memory_mib": 0} == {
        "rounds": 4,
        "faults": 4,
        "lost": 1,
        "wrong": 2,
        "longest_wait_secs": 0,
        "largest_memory_mib": 0,
    }
    assert frame.table({"any": {"rounds": 1, "lost": 2}}).splitlines()[2] == "| any | 1 | 2 |"
