"""A download whose places cannot be asked is taken by its hash: from the store, or from a cache that has it from
elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from vzrepro.base import events
from vzrepro.base.config import Config
from vzrepro.base.errors import HashMismatch, RemoteError
from vzrepro.base.model import Derivation, FileHash, ObjectInfo, Outcome, store_path
from vzrepro.cache import CacheReader, SigningKey, TrustedKeys
from vzrepro.realize.inventory import Doubt, Inventory
from vzrepro.realize.maker import Maker
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import PinnedFile
from vzrepro.sources import fetch
from vzrepro.store import LocalStore

KEY = SigningKey.generate("ours-1")
CONTENT = b"the same bytes"
SHA256 = FileHash(hashlib.sha256(CONTENT).hexdigest())


def thing(*places: Path, name: str = "thing", env: dict[str, str] | None = None) -> Node:
    """A download with one hash, from these places."""
    urls = [place.as_uri() for place in places]
    drv = Derivation(name, "fetch", content={"": SHA256}, env=env or {})
    files = {"": PinnedFile(urls[0], SHA256, None, tuple(urls[1:]))}
    path = store_path(drv.drv_hash(), name)
    return Node("source-thing", "source", "recipes/x.py:1", "", drv, drv.drv_hash(), path, files=files)


@pytest.fixture
def store(memory: Path) -> Iterator[LocalStore]:
    with LocalStore(memory / "store") as store:
        yield store


@pytest.fixture
def seen() -> list[events.Event]:
    return []


def realizer(store: LocalStore, node: Node, seen: list[events.Event], *caches: CacheReader) -> Realizer:
    inventory = Inventory(store, caches)
    maker = Maker(store, Config(), fetch.Mirrors({}), None, inventory.keep, seen.append)
    return Realizer(DrvGraph(Path(), {node.target: node}, {node.drv_hash: node}, (), frozenset()), inventory, maker)


def warnings(seen: list[events.Event]) -> list[str]:
    found = [event.message for event in seen if isinstance(event, events.Notice) and event.level == "warning"]
    seen.clear()
    return found


@pytest.fixture
def old(tmp_path: Path) -> Path:
    place = tmp_path / "old"
    place.write_bytes(CONTENT)
    return place


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A place that cannot be asked: it is below a file."""
    (tmp_path / "server").touch()
    return tmp_path / "server" / "new"


@pytest.fixture
def cache(tmp_path: Path, old: Path) -> CacheReader:
    """A cache to which somebody has pushed what the old place gave."""
    writer = new_cache(MemoryBackend(), TrustedKeys([KEY.public]), KEY)
    node = thing(old)
    with LocalStore(tmp_path / "theirs") as theirs:
        (made,) = realizer(theirs, node, []).realize([node])
        writer.push(made, theirs.location(made.path))
    return writer.reader


def origins(store: LocalStore, info: ObjectInfo, *nodes: Node) -> list[bool]:
    return [store.known_origin(info.path, node.origin) for node in nodes if node.origin]


def test_from_a_cache_until_the_place_is_there(
    store: LocalStore, seen: list[events.Event], cache: CacheReader, old: Path, new: Path
) -> None:
    node = thing(new)
    for outcome, where in ((Outcome.SUBSTITUTED, cache.url), (Outcome.SUBSTITUTED, "this store")):
        (info,) = realizer(store, node, seen, cache).realize([node])
        assert (info.outcome, store.location(info.path).read_bytes()) == (outcome, CONTENT)
        (said,) = warnings(seen)
        assert f"source-thing is taken by its hash from {where}" in said
        assert new.as_uri() in said
        assert origins(store, info, node, thing(old)) == [False, True]
    # What the place gives once it is there, counts: other bytes are an error, these are remembered.
    new.parent.unlink()
    new.parent.mkdir()
    new.write_bytes(b"other bytes")
    with pytest.raises(HashMismatch):
        realizer(store, node, seen, cache).realize([node])
    new.write_bytes(CONTENT)
    (info,) = realizer(store, node, seen, cache).realize([node])
    assert (warnings(seen), origins(store, info, node)) == ([], [True])


def test_a_url_that_nobody_has_is_an_error(
    store: LocalStore, seen: list[events.Event], cache: CacheReader, old: Path, tmp_path: Path
) -> None:
    node = thing(tmp_path / "mistyped")
    with pytest.raises(RemoteError, match="no place has") as caught:
        realizer(store, node, seen, cache).realize([node])
    assert "a file of this hash is in a cache, from other URLs" in (caught.value.hint or "")
    realizer(store, thing(old), seen).realize([thing(old)])
    with pytest.raises(RemoteError, match="no place has") as caught:
        realizer(store, node, seen).realize([node])
    assert "a file of this hash is here, from other URLs" in (caught.value.hint or "")


def test_a_place_that_has_no_such_file_counts_beside_one_that_cannot_be_asked(
    store: LocalStore, seen: list[events.Event], cache: CacheReader, new: Path, tmp_path: Path
) -> None:
    (info,) = realizer(store, thing(new, new.with_name("mirror")), seen, cache).realize([thing(new)])
    assert info.outcome is Outcome.SUBSTITUTED
    node = thing(new, tmp_path / "mistyped")
    with pytest.raises(RemoteError, match="cannot download"):
        realizer(store, node, seen, cache).realize([node])


def test_from_the_store_under_another_files_name(
    store: LocalStore, seen: list[events.Event], old: Path, new: Path
) -> None:
    first = thing(old)
    realizer(store, first, seen).realize([first])
    node = thing(new, name="thing-1.0.tar")
    (info,) = realizer(store, node, seen).realize([node])
    assert (info.outcome, info.path, store.location(info.path).read_bytes()) == (Outcome.COPIED, node.path, CONTENT)
    assert "source-thing is taken by its hash from this store" in warnings(seen)[0]
    assert origins(store, info, node, first) == [False, True]
    # What is unpacked is no file, and a damaged object is no source.
    other = thing(new, name="tree", env={"unpack": "1"})
    for asked, damaged in ((other, False), (thing(new, name="third"), True)):
        run = realizer(store, asked, seen)
        if damaged:
            run.inventory.doubt([first.path, node.path], Doubt.CORRUPT)
        with pytest.raises(RemoteError, match="cannot download"):
            run.realize([asked])


@pytest.mark.parametrize("case", ["untrusted", "not asked", "lost", "no cache"])
def test_nothing_is_trusted_that_was_not(
    store: LocalStore, seen: list[events.Event], cache: CacheReader, new: Path, case: str
) -> None:
    node = thing(new)
    if case == "untrusted":
        stranger = SigningKey.generate("stranger-1").public
        cache = new_cache(cache.access.backend, TrustedKeys([stranger])).reader
    run = realizer(store, node, seen, *([] if case == "no cache" else [cache]))
    if case == "not asked":
        run = replace(run, inventory=Inventory(store, [cache], "none"))
    if case == "lost":
        run.inventory.doubt([node.path], Doubt.LOST)
    with pytest.raises(RemoteError, match="cannot download"):
        run.realize([node])
    assert store.query(node.path) is None
