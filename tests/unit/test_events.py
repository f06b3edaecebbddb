"""Work that is shown begins and ends, however it ends."""

from __future__ import annotations

import pytest

from vzrepro.base import events
from vzrepro.base.errors import Interrupted
from vzrepro.base.events import Event, Finished, Started, working

STARTED = Started("thing", "/nix/store/x", "check", 3.0, 5)


def test_work_ends_as_it_says() -> None:
    told: list[Event] = []
    with working(told.append, STARTED) as work:
        assert told == [STARTED]
        work.outcome, work.nar_size = "built", 7
    [_, finished] = told
    assert isinstance(finished, Finished)
    assert (finished.target, finished.path, finished.action) == ("thing", "/nix/store/x", "check")
    assert (finished.outcome, finished.nar_size) == ("built", 7)


def test_work_that_says_nothing_is_done() -> None:
    told: list[Event] = []
    with working(told.append, STARTED):
        pass
    assert [each.outcome for each in told if isinstance(each, Finished)] == ["done"]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (Interrupted("interrupted"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (OSError("no"), "failed"),
        (SystemExit(1), "failed"),
    ],
)
def test_an_error_says_more_than_the_work(error: BaseException, outcome: str) -> None:
    told: list[Event] = []
    with pytest.raises(type(error)), working(told.append, STARTED) as work:
        work.outcome = "built"
        raise error
    assert [each.outcome for each in told if isinstance(each, Finished)] == [outcome]


def test_time_counts_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    told: list[Event] = []
    for begun in (None, 90.0):
        with working(told.append, STARTED, begun):
            now[0] += 4
    assert [each.secs for each in told if isinstance(each, Finished)] == [4.0, 18.0]
