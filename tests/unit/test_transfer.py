"""Pushing many: the order, and what one failure does to the rest."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.labs import grinds, played, realizer, small_graph, small_sources
from vzrepro import nar
from vzrepro.base import events
from vzrepro.base.errors import Interrupted, RemoteError
from vzrepro.base.model import DrvHash, NarHash, ObjectInfo, StorePath, store_path
from vzrepro.cache import PushOutcome, SigningKey, TrustedKeys
from vzrepro.cache.check import CacheFinding, verify
from vzrepro.realize import transfer
from vzrepro.realize.transfer import Pusher, waves
from vzrepro.store import LocalStore

KEY = SigningKey.generate("ours-1")


def info(name: str, size: int, *references: StorePath) -> ObjectInfo:
    drv = DrvHash.of(name.encode())
    return ObjectInfo(store_path(drv, name), NarHash.of(name.encode()), size, references, drv)


def test_the_largest_come_first_but_nothing_before_what_it_refers_to() -> None:
    small, large = info("small", 1), info("large", 100)
    user = info("user", 1000, small.path)
    top = info("top", 5, user.path, large.path)
    itself = info("itself", 50)
    itself = replace(itself, references=(itself.path, info("elsewhere", 1).path))
    found = [[each.path.name for each in wave] for wave in waves([top, small, user, large, itself])]
    assert found == [["large", "itself", "small"], ["user"], ["top"]]
    assert waves([]) == []


def test_a_circle_comes_at_once() -> None:
    one, two = info("one", 1), info("two", 2)
    one, two = replace(one, references=(two.path,)), replace(two, references=(one.path,))
    assert [len(wave) for wave in waves([one, two])] == [2]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def put(store: LocalStore, name: str, *references: StorePath, content: str | None = None) -> ObjectInfo:
    with store.scratch(name) as scratch:
        (scratch / "source").write_text(content or name)
        nar_hash, size, _ = nar.canonical_copy(scratch / "source", scratch / "tree")
        return store.add(scratch / "tree", replace(info(name, size, *references), nar_hash=nar_hash))


def pusher(store: LocalStore, seen: list[events.Event] | None = None) -> Pusher:
    return Pusher(store, events.ignore if seen is None else seen.append, threading.Event())


def test_a_closure_arrives_whole_and_in_order(store: LocalStore) -> None:
    low = put(store, "low")
    high = put(store, "high", low.path)
    backend, seen = MemoryBackend(), list[events.Event]()
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    summary = pusher(store, seen).push_all(cache, [high, low], jobs=4)
    assert summary.kept[PushOutcome.NEW] == (low.path, high.path)
    assert summary.written_bytes > 0
    written = [key for verb, key in backend.log if verb == "put" and key.endswith(".narinfo")]
    assert written == [f"{low.path.hash_part}.narinfo", f"{high.path.hash_part}.narinfo"]
    ended = [event.outcome for event in seen if isinstance(event, events.Finished)]
    assert ended == ["new", "new"]
    again = pusher(store).push_all(cache, [high, low], jobs=4)
    assert (set(again.kept[PushOutcome.PRESENT]), again.written_bytes) == ({low.path, high.path}, 0)


def test_of_many_none_that_is_not_listed_is_asked_for(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_MANY", 3)
    infos = [put(store, f"object-{number}") for number in range(3)]
    alias = put(store, "object-0-alias", content="object-0")
    backend = MemoryBackend()
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    pusher(store).push_all(cache, [*infos, alias], jobs=1)
    asked = [key for verb, key in backend.log if verb != "put" and key != "nix-cache-info"]
    # What the first of two equal objects has written is known to be there.
    assert asked == [key for key in backend.entries if key.startswith("nar/") and key in asked]
    assert len([key for key in backend.entries if key.startswith("nar/")]) == 3
    again = pusher(store).push_all(cache, [*infos, alias], jobs=1)
    assert (len(again.kept[PushOutcome.PRESENT]), again.written_bytes) == (4, 0)


def test_what_others_push_after_the_listing_is_no_error(store: LocalStore) -> None:
    low = put(store, "low")
    backend = MemoryBackend()
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    other = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    with cache.surveyed():
        pusher(store).push(other, "low", low)
        assert pusher(store).push(cache, "low", low).kept is PushOutcome.PRESENT
    assert pusher(store).push(cache, "low", low).kept is PushOutcome.PRESENT


class Refusing(MemoryBackend):
    """Takes everything but the narinfo of one path."""

    def __init__(self, path: StorePath) -> None:
        super().__init__()
        self._refused = f"{path.hash_part}.narinfo"

    def put(self, key: str, source: bytes | Path, **more: object) -> bool:  # type: ignore[override]
        if key == self._refused:
            raise RemoteError("507 Insufficient Storage")
        return super().put(key, source, **more)  # type: ignore[arg-type]


def test_a_failure_ends_the_push_and_leaves_no_dangling_object(store: LocalStore) -> None:
    low = put(store, "low")
    high = put(store, "high", low.path)
    backend = Refusing(low.path)
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    with pytest.raises(RemoteError, match="507"):
        pusher(store).push_all(cache, [low, high], jobs=2)
    assert not any(key.endswith(".narinfo") for key in backend.entries)


def test_what_is_stopped_has_not_begun(store: LocalStore) -> None:
    low = put(store, "low")
    backend = MemoryBackend()
    stopped = pusher(store)
    stopped.stop.set()
    with pytest.raises(Interrupted):
        stopped.push_all(new_cache(backend, TrustedKeys([KEY.public]), KEY), [low], jobs=2)
    assert backend.entries == {}


def test_what_a_new_object_refers_to_is_pushed_before_it(store: LocalStore, tmp_path: Path) -> None:
    """It may be here from a run that was killed before it pushed it, or come from the workspace."""
    small_sources(tmp_path)
    graph = small_graph(tmp_path)
    cache = new_cache(MemoryBackend(), TrustedKeys([KEY.public]), KEY)
    with played(grinds):
        realizer(graph, store).realize([graph.find("left")])
        realizer(graph, store, writers=[cache]).realize([graph.find("whole")])
    found: list[CacheFinding] = []
    verify(cache.reader, deep=True, found=found.append)
    assert found == []
    assert cache.reader.ask(graph.find("whole").path) is not None
