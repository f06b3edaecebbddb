"""The derivations that a cache has seen: nobody signs them, so anybody may have written anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.contract.memory import MemoryBackend
from vzrepro.base.model import Derivation, Digest, DrvHash, canonical_json, store_path
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.access import Access
from vzrepro.cache.history import CacheHistory
from vzrepro.recipe import plan
from vzrepro.recipe.graph import DrvGraph, Node

LIB = Derivation(name="lib", builder="local", content={"": Digest("0" * 64)})
APP = Derivation(
    name="app-1.0",
    version="1.0",
    builder="sandbox",
    platform="linux/amd64",
    image=DrvHash.of(b"image"),
    command=("sh", "-c", "make ä"),
    env={"A": "b"},
    inputs={"lib": LIB.drv_hash()},
    source_date_epoch=1,
)


def history(*entries: bytes) -> CacheHistory:
    """Of a cache with these entries, each under its own hash."""
    backend = MemoryBackend()
    for data in entries:
        backend.put(f"drv/{DrvHash.of(data)}.json", data)
    return CacheHistory(Access(backend, TrustedKeys()))


def changed(**fields: Any) -> bytes:
    return canonical_json({**APP.document(), **fields})


def test_derivations_are_found_by_hash_and_by_name_without_version() -> None:
    newer = changed(version="1.1", name="app-1.1")
    past = history(canonical_json(APP.document()), newer, canonical_json(LIB.document()))
    assert past.derivation(LIB.drv_hash()) == canonical_json(LIB.document())
    found = past.derivations_named("app")
    assert {drv for drv, _data, _seen in found} == {APP.drv_hash(), DrvHash.of(newer)}
    assert past.derivations_named("app-1.0") == []


BAD = [
    b"not json",
    b"",
    b"\xff",
    b"[]",
    b"null",
    b'{"name": "app-1.0", "version": "1.0"}',
    b"[" * 100_000,
    canonical_json(APP.document()) + b" ",
    json.dumps(APP.document()).encode(),
    changed(name=["app"]),
    changed(version=1),
    changed(builder="evil"),
    changed(image="x"),
    changed(command="sh"),
    changed(command=[1]),
    changed(env={"A": 1}),
    changed(env=[]),
    changed(inputs={"lib": "../../x"}),
    changed(inputs={"lib": None}),
    changed(inputs=[["lib", "x"]]),
    changed(content={"": "x"}),
    changed(source_date_epoch="1"),
    changed(source_date_epoch=True),
    changed(more=1),
]


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_what_is_no_derivation_counts_as_absent(data: bytes) -> None:
    good = canonical_json(APP.document())
    past = history(data, good)
    assert past.derivation(DrvHash.of(data)) is None
    assert [drv for drv, _data, _seen in past.derivations_named("app")] == [APP.drv_hash()]
    with pytest.raises(ValueError, match=r".") as caught:
        Derivation.parse(data)
    assert type(caught.value) in (ValueError, json.JSONDecodeError, UnicodeDecodeError)


def test_an_entry_under_anothers_hash_counts_as_absent() -> None:
    backend = MemoryBackend()
    backend.put(f"drv/{APP.drv_hash()}.json", canonical_json(LIB.document()))
    past = CacheHistory(Access(backend, TrustedKeys()))
    assert past.derivation(APP.drv_hash()) is None
    assert past.derivations_named("lib") == []


def test_why_goes_on_beside_garbage() -> None:
    """What `cache why-missing` asks."""
    node = Node("app", "recipe", "recipes/x.py:1", "", APP, APP.drv_hash(), store_path(APP.drv_hash(), "app-1.0"))
    other = changed(command=["sh", "-c", "\x1b[2Jmake"])
    graph = DrvGraph(Path(), {"app": node}, {node.drv_hash: node}, (), frozenset())
    found = plan.why(graph, node, history(*BAD, other), plan.nearest)
    assert [(name, [change.field for change in changes]) for name, changes in found] == [("app", ["command"])]
