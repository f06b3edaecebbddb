"""Several builders of one thing, an image: orders travel no farther than to the next function, all else is real."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from tests.attestations import put
from tests.contract.memory import MemoryBackend
from tests.debs import deb, file
from vzrepro.base import events
from vzrepro.base.config import Config
from vzrepro.base.errors import NotDeterministic, Untrusted, UsageError
from vzrepro.base.model import Derivation, FileHash, NarHash, ObjectInfo, store_path
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.writer import CacheWriter
from vzrepro.cli.farm import counting
from vzrepro.farm.order import Order, OrderAnswer
from vzrepro.farm.run import FarmRun, Watcher
from vzrepro.farm.workshop import Attempt, Workshop
from vzrepro.proof.attest.policy import Operator, OperatorKey, Policy
from vzrepro.proof.attest.provenance import build_of
from vzrepro.proof.attest.statement import Subject
from vzrepro.proof.attest.witness import pushed_along
from vzrepro.realize.inventory import Inventory
from vzrepro.realize.maker import Maker
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import PinnedFile
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import LocalStore

DEB = deb(file("bin/sh"))
KEYS = {name: SigningKey.generate(f"{name}-1") for name in ("one", "two", "three", "client")}


def _graph() -> tuple[DrvGraph, Node, Node]:
    """An image, and the package that it is made from."""
    pin = PinnedFile("mirror://debian/pool/sh.deb", FileHash.of(DEB), len(DEB))
    debs = Derivation("debs-c", "fetch", content={"sh.deb": pin.sha256})
    source = Node("debs-c", "source", "here", "", debs, debs.drv_hash(), store_path(debs.drv_hash(), "debs-c"))
    drv = Derivation(
        "image-c", "image", platform="linux/amd64", env={"image_format": "1"}, inputs={"debs": source.drv_hash}
    )
    image = Node("image-c", "image", "here", "", drv, drv.drv_hash(), store_path(drv.drv_hash(), "image-c"))
    nodes = {source.drv_hash: source, image.drv_hash: image}
    return DrvGraph(Path(), {"image-c": image}, nodes, (), frozenset()), source, image


@dataclass
class Team:
    """A client and the workers `one` and `two`, who take orders in turn unless they are asked to leave one to another.

    They are a `Queue`. `ordered` are the orders, each with who took it.
    """

    root: Path
    backend: MemoryBackend = field(default_factory=MemoryBackend)
    workers: tuple[str, ...] = ("one", "two")
    trusted: tuple[str, ...] = ("one", "two", "three")
    ordered: list[tuple[str, int, str]] = field(default_factory=list)
    told: list[events.Event] = field(default_factory=list)
    policy: Policy | None = None

    @property
    def keys(self) -> TrustedKeys:
        return TrustedKeys([KEYS[name].public for name in self.trusted])

    def cache(self, name: str) -> CacheWriter:
        return CacheWriter(CacheReader(self.backend, self.keys), KEYS[name])

    def store(self, name: str) -> LocalStore:
        return LocalStore(self.root / name)

    def place_order(self, order: Order, name: str) -> OrderAnswer:
        with self.store(name) as store:
            workshop = Workshop(
                name, store, Config(), self.cache(name), self.keys, Mirrors({}), partial(pushed_along, store)
            )
            return workshop.build(order, Attempt())

    def run(self, builders: int = 2) -> ObjectInfo:
        """Realize the image."""
        graph, source, image = _graph()
        given = self.root / "given"
        given.mkdir(exist_ok=True)
        (given / "sh.deb").write_bytes(DEB)
        with self.store("client") as store:
            cache = self.cache("client")
            inventory = Inventory(store, [cache.reader])
            maker = Maker(store, Config(), Mirrors({}), None, inventory.keep, self.told.append)
            maker.adopt(source, given)
            count = counting(self.keys, cache, builders, self.policy)
            run = FarmRun(Realizer(graph, inventory, maker), cache, self, count=count)
            [info] = run.realize([image])
            return info

    # --- as a queue

    def place(self, order: Order, watcher: Watcher, stop: threading.Event, urgency: float = 1.0) -> OrderAnswer | None:
        name = next(each for each in self.workers if KEYS[each].public.id not in order.apart_from)
        self.ordered.append((order.name, order.turn, name))
        return self.place_order(order, name)

    def farewell(self, orders: object) -> str | None:
        return None

    def close(self) -> None: ...


@pytest.fixture
def team(memory: Path) -> Iterator[Team]:
    yield Team(memory)


def test_two_builders_build_it_and_sign_the_same(team: Team) -> None:
    info = team.run()
    assert team.ordered == [("image-c", 1, "one"), ("image-c", 2, "two")]
    _, _, image = _graph()
    narinfo = team.cache("client").reader.ask(image.path)
    assert narinfo is not None and narinfo.nar_hash == info.nar_hash
    assert {key.name for key in team.keys.signers(narinfo.fingerprint, narinfo.signatures)} == {"one-1", "two-1"}
    started = [(event.target, event.worker) for event in team.told if isinstance(event, events.Started)]
    assert [each for each in started if each[1]] == [("image-c", "one"), ("image-c", "two")]


def test_who_shares_a_machine_or_an_operator_does_not_count_twice(team: Team) -> None:
    team.workers = ("one", "two", "three")
    one, two, three = (OperatorKey(KEYS[name].public, machine=name) for name in team.workers)
    team.policy = Policy("p", 1, 1, (Operator("a", (one, two)), Operator("b", (three,))))
    team.run()
    assert team.ordered == [("image-c", 1, "one"), ("image-c", 2, "three")]
    operators = tuple(Operator(each.key.name, (each,)) for each in (one, replace(two, machine="one"), three))
    team.policy = Policy("p", 2, 1, operators, machines_differ=True)
    del team.ordered[:]
    team.run(2)
    assert team.ordered == [], "one and three have"
    _say(team, "two", _result(team))
    with pytest.raises(StopIteration):
        team.run(3)
    assert team.ordered == []


def test_who_has_built_it_need_not_again(team: Team) -> None:
    team.run()
    del team.ordered[:]
    team.run()
    assert team.ordered == [], "it is here, and two have signed it"
    team.workers = ("one", "two", "three")
    team.run(3)
    assert team.ordered == [("image-c", 3, "three")]


def test_another_client_takes_what_two_have_signed(team: Team, memory: Path) -> None:
    team.run()
    other = Team(memory / "other", team.backend)
    other.root.mkdir()
    assert other.run().nar_hash == team.run().nar_hash
    assert other.ordered == []


def test_what_one_has_built_before_is_built_by_another_one_alone(team: Team) -> None:
    """Though the second one has it already, from the cache."""
    graph, _, image = _graph()
    team.workers = ("one",)
    with pytest.raises(StopIteration):
        team.run()
    assert [turn for _, turn, _ in team.ordered] == [1]
    with team.store("two") as store:
        cache = team.cache("two")
        inventory = Inventory(store, [cache.reader])
        maker = Maker(store, Config(), Mirrors({}), None, inventory.keep)
        Realizer(graph, inventory, maker).realize([image])
        assert store.query(image.path).voucher is not None  # type: ignore[union-attr]
    team.workers = ("one", "two")
    del team.ordered[:]
    team.run()
    assert team.ordered == [("image-c", 2, "two")]


def _result(team: Team) -> NarHash:
    info = team.cache("client").reader.ask(_graph()[2].path)
    assert info is not None
    return info.nar_hash


def _say(team: Team, name: str, nar_hash: NarHash) -> None:
    """Have a builder sign that it got this."""
    _, _, image = _graph()
    with team.store("one") as store:
        info = store.query(image.path)
        assert info is not None
        build = build_of(store, info)
    subject = Subject(str(image.path), {"narSha256": nar_hash.hex})
    statement = replace(build, nar_hash=nar_hash).statement((subject,), KEYS[name].public)
    team.cache(name).put_attestation(image.drv_hash, statement.signed(KEYS[name]))


def test_a_difference_stops_everything(team: Team) -> None:
    team.run()
    _say(team, "three", NarHash("c" * 64))
    with pytest.raises(NotDeterministic, match="image-c came out differently") as caught:
        team.run()
    assert "cccccccccccc by three-1" in (caught.value.reason or "")
    assert "by one-1, two-1" in (caught.value.reason or "")


def test_other_bytes_than_they_have_agreed_on_are_not_given_out(team: Team) -> None:
    """They have signed the same, and what the client has is something else."""
    _, _, image = _graph()
    with team.store("client") as store:
        put(store, image.drv, {"": b"something else"})
    with pytest.raises(NotDeterministic, match="image-c has other bytes than its builders have signed"):
        team.run()


def test_who_is_not_trusted_does_not_count(team: Team) -> None:
    team.run()
    team.trusted = ("two", "three")
    with pytest.raises(Untrusted, match="no builder that counts has signed it in addition") as caught:
        team.run()
    assert "one has none of this machine's trusted-keys" in (caught.value.reason or "")


def test_as_many_builders_must_be_known(team: Team) -> None:
    with pytest.raises(UsageError, match="too few builders are known"):
        team.run(4)
