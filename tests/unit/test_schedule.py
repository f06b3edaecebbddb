"""What runs a plan's steps: whose turn it is, how long it takes, and how it ends."""

from __future__ import annotations

import queue
import signal
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from tests import PATIENCE_SECS
from vzrepro.base.errors import BuildFailed
from vzrepro.base.model import BuildKey, Derivation, DrvHash, FileHash, NarHash, ObjectInfo, StorePath, store_path
from vzrepro.realize.schedule import Schedule, StepState, expected_secs, planned, run, take
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.plan import Offer, Plan, Step, make_plan


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


# --- whose turn it is


@dataclass
class Facts:
    """Nothing is here; how long things take is known of some."""

    secs: Mapping[str, float]

    def have(self, paths: Sequence[StorePath]) -> dict[StorePath, ObjectInfo]:
        return {}

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        return False

    def offers(self, nodes: Sequence[Node]) -> dict[StorePath, Offer]:
        return {}

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        return None

    def expected_secs(self, target: str, verb: str) -> float | None:
        return self.secs.get(target)


def plan_of(needs: Mapping[str, str], **secs: float) -> Plan:
    """A plan for all of `needs`, a name to those it is made from; names in capitals are downloads."""
    nodes: dict[str, Node] = {}
    for name, inputs in needs.items():
        builder: Literal["fetch", "sandbox"] = "fetch" if name.isupper() else "sandbox"
        drv = Derivation(name, builder, inputs={each: nodes[each].drv_hash for each in inputs.split()})
        nodes[name] = Node(name, "recipe", "here", "", drv, drv.drv_hash(), store_path(drv.drv_hash(), name))
    graph = DrvGraph(Path(), nodes, {node.drv_hash: node for node in nodes.values()}, (), frozenset())
    return make_plan(graph, list(nodes.values()), Facts(secs))


def order(plan: Plan, jobs: int = 1) -> str:
    """The order in which steps begin, when the one that began first always ends first."""
    schedule, begun, running = Schedule(plan, jobs), [], deque[Step]()
    while True:
        running += (new := schedule.begin())
        begun += [step.node.target for step in new]
        assert schedule.running == bool(running)
        if not running:
            return " ".join(begun)
        schedule.move(running.popleft().node.drv_hash, StepState.DONE)


def test_the_longest_chain_is_begun_first() -> None:
    needs = {"short": "", "long": "", "low": "", "high": "low", "top": "high"}
    assert order(plan_of(needs, short=5, long=30, low=1, high=20, top=10)) == "low long high top short"
    assert order(plan_of(needs, short=5, long=32, low=1, high=20, top=10), jobs=2) == "long low short high top"


def test_equal_ones_begin_in_the_plans_order() -> None:
    names = "e a d c b".split()
    for _ in range(3):
        assert order(plan_of(dict.fromkeys(names, ""), **dict.fromkeys(names, 7.0))) == "e a d c b"
    assert order(plan_of(dict.fromkeys(names, ""))) == "e a d c b"


def test_what_nobody_knows_is_taken_to_last_a_minute() -> None:
    assert order(plan_of({"less": "", "unknown": "", "more": ""}, less=59, more=61)) == "more unknown less"


def test_downloads_that_much_waits_for_are_begun_first() -> None:
    needs = dict.fromkeys("ABCDEFGHIJ", "") | {"small": "A", "large": "J"}
    assert order(plan_of(needs, small=1, large=9)).split()[:2] == ["J", "A"]


def test_nothing_begins_after_a_failure() -> None:
    schedule = Schedule(plan_of({"a": "", "b": "", "c": "a", "d": ""}), 2)
    a, b = schedule.begin()
    schedule.move(a.node.drv_hash, StepState.FAILED)
    assert schedule.begin() == []
    schedule.move(b.node.drv_hash, StepState.DONE)
    assert schedule.begin() == []
    assert not schedule.running


def test_a_plan_takes_as_long_as_its_schedule() -> None:
    needs = {"S": "", "a": "S", "b": "", "c": "a b"}
    plan = plan_of(needs, S=2, a=10, b=7, c=1)
    assert [expected_secs(plan, jobs) for jobs in (1, 2)] == [18, 13], "a download needs no place of a build"
    assert expected_secs(plan_of(needs, a=10, b=7, c=1), 1) == 18, "how long downloads take is not known before"
    assert expected_secs(plan_of(needs, S=2, a=10, c=1), 1) is None
    assert expected_secs(plan_of({}), 1) is None
    assert (planned(plan, 2).expected_secs, planned(plan, None).expected_secs) == (13, None), "a farm's size is unknown"


class Performing:
    """Notes what is done; what is called `bad` fails."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.done: list[str] = []
        self.pushed: list[str] = []

    def perform(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        assert set(inputs) == set(step.node.drv.dependencies())
        self.done.append(step.node.target)
        if step.node.target == "bad":
            raise BuildFailed("it is bad")
        return ObjectInfo(step.node.path, NarHash.of(b""), 1)

    def push(self, node: Node, info: ObjectInfo) -> None:
        self.pushed.append(node.target)


def test_a_plan_is_done_in_its_order() -> None:
    work = Performing()
    run(plan_of({"short": "", "low": "", "top": "low"}, short=1, low=1, top=1), work, 1)
    assert work.done == ["low", "short", "top"]
    assert sorted(work.pushed) == sorted(work.done)


def test_the_first_failure_is_told_and_ends_it() -> None:
    work = Performing()
    with pytest.raises(BuildFailed, match="it is bad"):
        run(plan_of({"fine": "", "bad": "", "never": "bad"}, fine=9, bad=3, never=1), work, 1)
    assert work.done == ["fine", "bad"]
