"""Many requests at once: answers in order, few ahead, and nothing goes on after an error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from tests import PATIENCE_SECS
from vzrepro.cache.parallel import in_order


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_answers_come_in_the_items_order(workers: int) -> None:
    assert list(in_order(lambda number: number * 2, range(1000), workers)) == list(range(0, 2000, 2))
    assert list(in_order(str, (), workers)) == []


def test_as_many_are_done_at_once_as_there_are_workers() -> None:
    together = threading.Barrier(5)
    assert sorted(in_order(lambda _: together.wait(PATIENCE_SECS), range(10), 5)) == sorted([*range(5)] * 2)


@pytest.mark.parametrize("workers", [1, 4])
def test_few_items_are_taken_ahead(workers: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in itertools.count(1):
            taken.append(number)
            yield number

    answers = in_order(abs, items(), workers)
    for number in range(1, 100):
        assert next(answers) == number
        assert len(taken) <= number + 4 * workers
    answers.close()


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_comes_in_its_turn_and_ends_it(workers: int) -> None:
    done = []

    def act(number: int) -> int:
        if number == 50:
            raise ValueError("fifty")
        done.append(number)
        return number

    answers = in_order(act, range(10_000), workers)
    assert [next(answers) for _ in range(50)] == list(range(50))
    with pytest.raises(ValueError, match="fifty"):
        next(answers)
    assert len(done) <= 50 + 4 * workers
