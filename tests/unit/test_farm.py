"""What travels to a farm and back, and what follows a failure: pure parts of `vzrepro.farm`."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.memory import MemoryBackend
from vzrepro.base import events
from vzrepro.base.errors import (
    BuildFailed,
    HashMismatch,
    Interrupted,
    OutOfMemory,
    RemoteError,
    TimedOut,
    Untrusted,
    UsageError,
    VzreproError,
)
from vzrepro.base.model import BuildKey, DrvHash, NarHash, store_path
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.farm.command import CommandQueue
from vzrepro.farm.order import KINDS, MAX_APART, MAX_BUILDERS, Order, OrderAnswer, failure_document, failure_of, kind_of
from vzrepro.farm.retries import LOST, again
from vzrepro.farm.run import following_build
from vzrepro.proof.audit.axes import AXES

ORDER = Order(
    DrvHash("a" * 64), BuildKey("b" * 64), "kernel-6.12", "linux/arm64", "large", 3 * 3600, 16 << 30, 100 << 30
)
ANSWER = OrderAnswer(store_path(DrvHash("a" * 64), "kernel-6.12"), NarHash("c" * 64), "one", "built")

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


# --- orders


def test_an_order_and_its_answer_travel_in_less_than_a_kib() -> None:
    keys = tuple(f"{number:016x}" for number in range(MAX_APART))
    signed = replace(ORDER, turn=MAX_BUILDERS, apart_from=keys).signed(SigningKey.generate("somebody-at-a-long-name-1"))
    question = ",".join(f"{axis.name}:{axis.version}" for axis in AXES) + "//0/0/1"
    asked = replace(ORDER, question=question).signed(SigningKey.generate("somebody-at-a-long-name-1"))
    for document in (signed.document(), asked.document(), ANSWER.document()):
        assert len(json.dumps(document)) < 1024
    assert Order.parse(json.loads(json.dumps(signed.document()))) == signed
    assert Order.parse(json.loads(json.dumps(asked.document()))) == asked
    assert OrderAnswer.parse(json.loads(json.dumps(ANSWER.document()))) == ANSWER


def test_one_build_key_is_one_build() -> None:
    assert ORDER.id == f"kernel-6.12-{'b' * 64}"
    assert replace(ORDER, turn=2, apart_from=("0" * 16,)).id == f"{ORDER.id}-2", "each of several is one"
    ids = {replace(ORDER, question=question).id for question in (None, "//0/0/1", "//0/1/1")}
    assert len(ids) == 3, "and each rebuild of an audit"


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"format": None},
        {"turn": -1},
        {"turn": True},
        {"turn": 1000},
        {"apart_from": None},
        {"apart_from": ["one-1"]},
        {"apart_from": [7]},
        {"apart_from": ["0" * 16] * 17},
        {"question": 1},
        {"question": "x" * 600},
        {"question": "//0/0/1\n"},
        {"question": "//0/0/1", "turn": 1},
        {"drv": "a" * 63},
        {"drv": ["a"] * 64},
        {"key": None},
        {"name": "../../etc"},
        {"name": "x" * 300},
        {"platform": "linux/amd64/small"},
        {"platform": None},
        {"size": "huge"},
        {"size": []},
        {"timeout_secs": -1},
        {"timeout_secs": True},
        {"memory_bytes": 1.5},
        {"disk_bytes": 1 << 70},
        {"signature": "x" * 10_000_000},
        {"more": 1},
    ],
)
def test_a_malformed_order_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Order.parse({**ORDER.document(), **change})
    assert len(str(caught.value)) < 1000


@given(json_values)
def test_whatever_a_queue_says_has_an_answer(document: Any) -> None:
    for parse, error in ((Order.parse, UsageError), (OrderAnswer.parse, RemoteError)):
        with pytest.raises(error):
            parse(document)
    assert isinstance(failure_of(document), VzreproError)


@given(st.dictionaries(st.sampled_from(sorted(ORDER.document())), json_values))
def test_an_order_of_strange_parts_is_refused_or_sound(parts: dict[str, Any]) -> None:
    try:
        order = Order.parse({**ORDER.document(), **parts})
    except UsageError:
        return
    assert Order.parse(order.document()) == order


@pytest.mark.parametrize("field", ["path", "nar_hash", "worker", "outcome", "report"])
def test_ten_megabytes_are_no_answer(field: str) -> None:
    with pytest.raises(RemoteError) as caught:
        OrderAnswer.parse({**ANSWER.document(), field: "a" * (10 << 20)})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("field", sorted(set(ORDER.document()) - {"format"}))
def test_ten_megabytes_are_no_order(field: str) -> None:
    with pytest.raises(UsageError) as caught:
        Order.parse({**ORDER.document(), field: "a" * (10 << 20)})
    assert len(str(caught.value)) < 2000


def test_an_order_is_signed_by_its_client() -> None:
    key, other = SigningKey.generate("ci-1"), SigningKey.generate("ci-1")
    signed = ORDER.signed(key)
    signed.check_client(TrustedKeys([key.public]))
    Order.parse({**signed.document(), "size": "small"}).check_client(TrustedKeys([key.public]))
    for order, trusted in (
        (ORDER, key),
        (signed, other),
        (Order.parse({**signed.document(), "drv": "d" * 64}), key),
        (Order.parse({**signed.document(), "memory_bytes": 1 << 50}), key),
        (Order.parse({**signed.document(), "turn": 1}), key),
    ):
        with pytest.raises(Untrusted):
            order.check_client(TrustedKeys([trusted.public]))


# --- failures


@pytest.mark.parametrize("kind", KINDS.values())
def test_a_failure_is_the_same_on_the_other_side(kind: type[VzreproError]) -> None:
    there = failure_of(json.loads(json.dumps(failure_document(kind("what", reason="why", hint="do"), "one"))))
    assert type(there) is kind
    assert (there.message, there.reason, there.hint) == ("one: what", "why", "do")


def test_what_nobody_has_foreseen_is_trouble_of_the_worker() -> None:
    assert kind_of(OSError(28, "No space left on device")) == "VzreproError"
    assert "No space" in failure_of(failure_document(OSError(28, "No space left on device"), "one")).message


def test_a_failure_is_never_large() -> None:
    document = failure_document(BuildFailed("m" * 10**6, reason="r" * 10**6, hint="h" * 10**6), "one")
    assert len(json.dumps(document)) < 16 << 10
    assert document["reason"] == "r" * 7000


@pytest.mark.parametrize("error", [BuildFailed, TimedOut, HashMismatch, Untrusted, UsageError])
def test_what_would_be_the_same_elsewhere_is_not_tried_again(error: type[VzreproError]) -> None:
    assert again(kind_of(error("x")), {kind_of(error("x")): 1}, "small") is None


def test_a_lost_worker_is_replaced_twice() -> None:
    assert [again(LOST, {LOST: count}, "large") is not None for count in (1, 2, 3)] == [True, True, False]


def test_out_of_memory_is_tried_once_more_on_a_larger_machine() -> None:
    kind = kind_of(OutOfMemory("x"))
    found = again(kind, {kind: 1}, "small")
    assert found is not None
    assert found.size == "large"
    assert again(kind, {kind: 2}, "large") is None


def test_a_cache_is_given_time() -> None:
    pauses = [again("RemoteError", {"RemoteError": count}, "small") for count in range(1, 7)]
    assert [each and each.after_secs for each in pauses] == [5, 10, 20, 40, 80, None]


def test_kinds_are_counted_apart() -> None:
    failures = {LOST: 2, "RemoteError": 5, "Interrupted": 3}
    assert all(again(kind, failures, "small") for kind in failures)


# --- a command


class Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def waits(self, why: str) -> None: ...

    def works(self, worker: str, phase: str) -> None: ...

    def log(self, stream: str, pieces: int) -> None: ...

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("seen", [False, True])
def test_who_has_built_is_told_once_however_quick_it_was(seen: bool) -> None:
    told: list[events.Event] = []
    cache: Any = SimpleNamespace(access=SimpleNamespace(backend=MemoryBackend()))
    with following_build(told.append, cache, ORDER) as display:
        if seen:
            display.works("one", "builds")
        display.done(7, ANSWER)
    assert [(type(each), getattr(each, "worker", None)) for each in told] == [
        (events.Started, "one"),
        (events.Finished, None),
    ]


def test_a_command_is_filled_in_and_quoted() -> None:
    queue = CommandQueue("sbatch -C {platform} -J {name} --wrap 'vzrepro farm build '{drv} # {size}")
    assert queue.command(ORDER) == (
        f"sbatch -C linux/arm64 -J kernel-6.12 --wrap 'vzrepro farm build '{'a' * 64} # large"
    )


@pytest.mark.parametrize("template", ["", "make {platform}", "x {drv} {other}", "x {drv} {}"])
def test_a_command_that_cannot_work_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match="farm"):
        CommandQueue(template)


def test_a_command_s_lines_are_the_log_and_its_end_is_the_build_s() -> None:
    lines = Lines()
    CommandQueue("echo {drv}; printf 'no end \\377' >&2").place(ORDER, lines, threading.Event())
    assert lines.lines == ["a" * 64, "no end �"]
    for code, kind in ((100, BuildFailed), (102, HashMismatch), (7, VzreproError), (105, RemoteError)):
        with pytest.raises(kind, match=f"exit code {code}") as caught:
            CommandQueue(f"echo why {{drv}}; exit {code}").place(ORDER, lines, threading.Event())
        assert type(caught.value) is kind
        assert "why" in str(caught.value)


def test_an_interrupted_command_is_ended_with_what_it_has_begun() -> None:
    stop = threading.Event()

    class Stopping(Lines):
        def line(self, text: str) -> None:
            super().line(text)
            stop.set()

    lines = Stopping()
    with pytest.raises(Interrupted):
        CommandQueue("sh -c 'echo {drv}; sleep 1000' & wait").place(ORDER, lines, stop)
    assert lines.lines == ["a" * 64]
