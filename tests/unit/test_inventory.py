"""What counts of what is here and elsewhere, for every combination of doubts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vzrepro import nar
from vzrepro.base.errors import NotDeterministic
from vzrepro.base.model import BuildKey, Derivation, FileHash, ObjectInfo, origin_digest, store_path
from vzrepro.realize.inventory import Counts, Doubt, Inventory, counts
from vzrepro.recipe.graph import Node
from vzrepro.store import LocalStore

KEY = BuildKey.of(b"key")
DRV = Derivation("thing", "sandbox")
NODE = Node("thing", "recipe", "recipes/thing.py:1", "", DRV, DRV.drv_hash(), store_path(DRV.drv_hash(), "thing"))

LOST, CORRUPT, DISTRUSTED, TAINTED = Doubt.LOST, Doubt.CORRUPT, Doubt.DISTRUSTED, Doubt.TAINTED
TABLE = [
    # doubts, and whether it counts as here, as offered, as equal
    (Doubt.NONE, True, True, True),
    (LOST, True, False, False),
    (CORRUPT, False, True, False),
    (DISTRUSTED, False, True, False),
    (TAINTED, False, False, True),
    (LOST | CORRUPT, False, False, False),
    (LOST | DISTRUSTED, False, False, False),
    (LOST | TAINTED, False, False, False),
    (CORRUPT | DISTRUSTED, False, True, False),
    (CORRUPT | TAINTED, False, False, False),
    (DISTRUSTED | TAINTED, False, False, False),
    (LOST | CORRUPT | DISTRUSTED, False, False, False),
    (LOST | CORRUPT | TAINTED, False, False, False),
    (LOST | DISTRUSTED | TAINTED, False, False, False),
    (CORRUPT | DISTRUSTED | TAINTED, False, False, False),
    (LOST | CORRUPT | DISTRUSTED | TAINTED, False, False, False),
]


@pytest.fixture
def store(memory: Path) -> Iterator[LocalStore]:
    with LocalStore(memory / "store") as store:
        yield store


def offering(url: str, origin: FileHash | None) -> Any:
    """A cache that has everything, downloaded from the URLs of `origin`."""
    said = SimpleNamespace(file_size=5, nar_size=9, origin=origin)
    return SimpleNamespace(url=url, query=lambda _path: said)


@pytest.fixture
def inventory(store: LocalStore) -> Inventory:
    """`thing` is here, and offered by a cache."""
    inventory = Inventory(store, [offering("u", origin_digest({}))])
    put(inventory, "content")
    return inventory


def put(inventory: Inventory, content: str) -> ObjectInfo:
    with inventory.store.scratch("thing") as scratch:
        (scratch / "made").write_text(content)
        nar_hash, size, _ = nar.canonical_copy(scratch / "made", scratch / "tree")
        info = ObjectInfo(NODE.path, nar_hash, size, drv_hash=NODE.drv_hash, build_key=KEY)
        return inventory.keep(scratch / "tree", info)


def test_how_long_it_took_here_counts_more_than_elsewhere(store: LocalStore) -> None:
    reference = {"thing": 100.0, "other": 200.0, "image-x": 50.0, "quick": 9.0}

    def expected(target: str, verb: str = "build") -> float | None:
        return Inventory(store, [], reference=reference).expected_secs(target, verb)

    assert expected("other") == 200, "as long as nothing was built here"
    assert expected("unheard-of") is None
    assert expected("thing", "substitute") is None, "the reference is about making it"
    store.record_history("quick", "build", 900, 1)
    assert (expected("quick"), expected("other")) == (900, 200), "what is quick by the reference tells little"
    store.record_history("thing", "build", 250, 1)
    assert (expected("thing"), expected("other")) == (250, 500)
    store.record_history("image-x", "image", 50, 1)
    assert expected("other") == 400, "300 s for what took 150 s elsewhere"


def test_the_table_is_whole() -> None:
    assert {doubt.value for doubt, *_ in TABLE} == set(range(1 << len(Doubt)))


@pytest.mark.parametrize(("doubt", "here", "offered", "equal"), TABLE)
def test_what_counts(inventory: Inventory, doubt: Doubt, here: bool, offered: bool, equal: bool) -> None:
    assert counts(doubt) == Counts(here, offered, equal)
    for reason in doubt:
        inventory.doubt([NODE.path], reason)
    assert inventory.doubts(NODE.path) == doubt
    assert bool(inventory.have([NODE.path])) == here
    assert bool(inventory.offers([NODE])) == offered
    assert (inventory.equal(KEY) is not None) == equal


@pytest.mark.parametrize(("doubt", "here"), [row[:2] for row in TABLE])
def test_what_does_not_count_as_here_is_replaced(inventory: Inventory, doubt: Doubt, here: bool) -> None:
    """What was corrupt must come out as it was registered; what was not trusted may come out otherwise."""
    inventory.doubt([NODE.path], doubt)
    file = inventory.store.location(NODE.path)
    file.chmod(0o644)
    file.write_text("damaged")
    put(inventory, "content")
    assert file.read_text() == ("damaged" if here else "content")
    assert inventory.doubts(NODE.path) == doubt & LOST
    assert inventory.have([NODE.path])


@pytest.mark.parametrize(("doubt", "here"), [row[:2] for row in TABLE])
def test_other_bytes_replace_only_what_was_not_trusted(inventory: Inventory, doubt: Doubt, here: bool) -> None:
    inventory.doubt([NODE.path], doubt)
    file = inventory.store.location(NODE.path)
    if here or CORRUPT in doubt:
        with pytest.raises(NotDeterministic):
            put(inventory, "other")
        assert file.read_text() == "content"
        assert inventory.doubts(NODE.path) == doubt
    else:
        put(inventory, "other")
        assert file.read_text() == "other"
        assert inventory.doubts(NODE.path) == doubt & LOST


def test_doubts_are_found_by_reason(inventory: Inventory) -> None:
    inventory.doubt([NODE.path], LOST | TAINTED)
    assert inventory.doubted(TAINTED | DISTRUSTED) == [NODE.path]
    assert inventory.doubted(CORRUPT | DISTRUSTED) == []


@pytest.mark.parametrize(("substitute", "builder", "asked"), [
    ("all", "sandbox", True), ("all", "fetch", True),
    ("sources", "sandbox", False), ("sources", "fetch", True),
    ("none", "sandbox", False), ("none", "fetch", False),
])  # fmt: skip
def test_what_may_come_from_caches(inventory: Inventory, substitute: Any, builder: Any, asked: bool) -> None:
    drv = Derivation("thing", builder)
    inventory.substitute = substitute
    node = Node("thing", "recipe", "", "", drv, drv.drv_hash(), store_path(drv.drv_hash(), "thing"))
    assert bool(inventory.offers([node])) == asked


def test_the_first_cache_that_knows_a_downloads_urls_is_taken(inventory: Inventory) -> None:
    drv = Derivation("thing", "fetch")
    node = Node("thing", "source", "", "", drv, drv.drv_hash(), store_path(drv.drv_hash(), "thing"))
    inventory.caches = [offering("lost", None), offering("other", FileHash.of(b"")), offering("right", node.origin)]
    assert inventory.offers([node])[node.path].cache == "right"
    inventory.caches = inventory.caches[:2]
    assert inventory.offers([node]) == {}
