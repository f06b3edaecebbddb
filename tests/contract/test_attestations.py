"""Attestations in a cache: they come along with a push, are found again everywhere, also over HTTP, and go with their
object."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.served import Serving
from tests.contract.test_binary_cache import KEY, STRANGER, Made, keys, make, narinfo_of, read
from tests.contract.test_check import found, kinds
from tests.contract.test_collect import DAY, MONTH, grow_old
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import DrvHash, Outcome
from vzrepro.cache import (
    Backend,
    CacheReader,
    CacheWriter,
    DirectoryBackend,
    PushOutcome,
    PushResult,
    SigningKey,
    TrustedKeys,
)
from vzrepro.cache.check import repair
from vzrepro.cache.collect import collect
from vzrepro.cache.http import HttpBackend
from vzrepro.cache.machine import trim
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.records import INDEX, MAX_ATTESTATION
from vzrepro.cache.remote import Patience
from vzrepro.cache.roots import add_root
from vzrepro.proof.attest.statement import Statement, Subject


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


@pytest.fixture(params=["memory", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """A new, empty place whose entries can be made old."""
    return MemoryBackend(time.time) if request.param == "memory" else DirectoryBackend(tmp_path / "cache")


def opened(backend: Backend, signer: SigningKey = KEY) -> CacheWriter:
    return new_cache(backend, TrustedKeys([KEY.public, STRANGER.public]), signer)


def drv_of(made: Made) -> DrvHash:
    assert made.info.drv_hash is not None
    return made.info.drv_hash


def claim(made: Made, signer: SigningKey = KEY, text: str = "built") -> bytes:
    subject = Subject(str(made.info.path), {"narSha256": made.info.nar_hash.hex})
    return Statement((subject,), "https://example.org/claim", {"text": text}).signed(signer)


def key_of(made: Made, envelope: bytes, signer: SigningKey = KEY) -> str:
    import hashlib

    return f"attest/{drv_of(made)}/{signer.public.id}/{hashlib.sha256(envelope).hexdigest()}.json"


def index_of(made: Made) -> str:
    return f"attest/{drv_of(made)}/{INDEX}"


def push(backend: Backend, made: Made, signer: SigningKey = KEY) -> PushResult:
    return opened(backend, signer).push(
        made.info, made.tree, derivation=made.derivation, log=made.log, attest=lambda key: claim(made, key)
    )


# --- putting and finding ----------------------------------------------------------------------------------------------


def test_what_is_put_is_found(backend: Backend, made: Made) -> None:
    cache = opened(backend)
    assert cache.reader.attestations(drv_of(made)) == []
    ours, theirs = claim(made), claim(made, STRANGER)
    assert cache.put_attestation(drv_of(made), ours)
    assert not cache.put_attestation(drv_of(made), ours), "it was there"
    assert cache.put_attestation(drv_of(made), theirs)
    assert CacheReader(backend, TrustedKeys()).attestations(drv_of(made)) == sorted([ours, theirs])
    assert cache.reader.attestations(DrvHash.of(b"another")) == []
    assert {key_of(made, ours), key_of(made, theirs, STRANGER), index_of(made)} <= keys(backend)
    assert read(backend, "nix-cache-info"), "a place that Nix clients know"


def test_over_plain_http_the_index_lists_them(tmp_path: Path, made: Made) -> None:
    directory = DirectoryBackend(tmp_path / "cache")
    push(directory, made)
    theirs = claim(made, STRANGER)
    opened(directory).put_attestation(drv_of(made), theirs)
    with Serving(tmp_path / "cache") as serving:
        reader = CacheReader(HttpBackend(serving.url, Patience(10.0)), TrustedKeys())
        assert reader.attestations(drv_of(made)) == sorted([claim(made), theirs])
        assert reader.attestations(DrvHash.of(b"another")) == []
        with pytest.raises(UsageError):
            CacheWriter(reader).put_attestation(drv_of(made), theirs)


def test_differences_over_http_and_beside_attestations(tmp_path: Path) -> None:
    first, second = make(tmp_path, content=b"one"), make(tmp_path, content=b"two")
    directory = DirectoryBackend(tmp_path / "cache")
    push(directory, first)
    assert push(directory, second, STRANGER).kept is PushOutcome.DIFFERENT
    with Serving(tmp_path / "cache") as serving:
        for backend in (directory, HttpBackend(serving.url, Patience(10.0))):
            reader = CacheReader(backend, TrustedKeys([KEY.public, STRANGER.public]))
            [difference] = reader.differences(narinfo_of(directory, first))
            assert (difference.by, difference.found) == ("theirs-1", second.info.nar_hash)
            assert reader.attestations(drv_of(first)) == sorted([claim(first), claim(second, STRANGER)]), (
                "who gets something else says so, too"
            )


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"payload":"x","payloadType":"t","signatures":[]}', b"[" * 99999]
)
def test_only_envelopes_are_taken(made: Made, data: bytes) -> None:
    with pytest.raises(UsageError):
        opened(MemoryBackend()).put_attestation(drv_of(made), data)


def test_too_large_a_one_is_refused(made: Made) -> None:
    with pytest.raises(UsageError):
        opened(MemoryBackend()).put_attestation(drv_of(made), claim(made, text="x" * MAX_ATTESTATION))


def test_what_is_wrong_in_a_cache_is_left_out(made: Made) -> None:
    backend = MemoryBackend()
    cache = opened(backend)
    good = claim(made)
    cache.put_attestation(drv_of(made), good)
    folder = f"attest/{drv_of(made)}/{'0' * 16}"
    backend.put(f"{folder}/{'0' * 64}.json", claim(made, STRANGER))  # not what its name says
    backend.put(key_of(made, b"junk"), b"junk")
    large = claim(made, text="x" * MAX_ATTESTATION)
    backend.put(key_of(made, large), large)
    backend.put(f"attest/{drv_of(made)}/readme", b"hello")
    assert cache.reader.attestations(drv_of(made)) == [good]


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"junk",
        b"{}",
        b'{"entries": 7}',
        b'{"entries": [7, null, "../../nix-cache-info", "/etc/passwd", "a/b.json"]}',
        b"[" * 100_000,
        b" " * (MAX_ATTESTATION + 1),
    ],
)
def test_a_wrong_index_is_none(tmp_path: Path, made: Made, index: bytes) -> None:
    directory = DirectoryBackend(tmp_path / "cache")
    opened(directory).put_attestation(drv_of(made), claim(made))
    directory.put(index_of(made), index)
    with Serving(tmp_path / "cache") as serving:
        reader = CacheReader(HttpBackend(serving.url, Patience(10.0)), TrustedKeys())
        assert reader.attestations(drv_of(made)) == []
    assert opened(directory).reader.attestations(drv_of(made)) == [claim(made)], "who can list does not go by it"


def test_an_index_may_name_what_is_gone(tmp_path: Path, made: Made) -> None:
    directory = DirectoryBackend(tmp_path / "cache")
    for signer in (KEY, STRANGER):
        opened(directory).put_attestation(drv_of(made), claim(made, signer))
    directory.delete([key_of(made, claim(made))])
    with Serving(tmp_path / "cache") as serving:
        reader = CacheReader(HttpBackend(serving.url, Patience(10.0)), TrustedKeys())
        assert reader.attestations(drv_of(made)) == [claim(made, STRANGER)]


def test_a_flood_is_not_read_to_its_end(made: Made) -> None:
    backend = MemoryBackend()
    for number in range(200):
        large = claim(made, text=f"{number}".ljust(700_000))
        backend.put(key_of(made, large), large)
    read = opened(backend).reader.attestations(drv_of(made))
    assert 64 << 20 < sum(map(len, read)) < 66 << 20
    asked = [key for verb, key in backend.log if verb == "get" and key.startswith("attest/")]
    assert len(asked) < 200


def test_a_cache_of_another_store_is_not_asked(made: Made) -> None:
    backend = MemoryBackend()
    opened(backend).put_attestation(drv_of(made), claim(made))
    backend.put("nix-cache-info", b"StoreDir: /other\n")
    with pytest.raises(RemoteError):
        opened(backend).reader.attestations(drv_of(made))


# --- along with a push ------------------------------------------------------------------------------------------------


def test_a_push_brings_its_provenance_before_its_narinfo(made: Made) -> None:
    backend = MemoryBackend()
    assert push(backend, made).kept is PushOutcome.NEW
    assert opened(backend).reader.attestations(drv_of(made)) == [claim(made)]
    writes = [key for verb, key in backend.log if verb == "put"]
    assert writes.index(key_of(made, claim(made))) < writes.index(narinfo_key(made.info.path))
    assert json.loads(read(backend, index_of(made)))["entries"] == [
        key_of(made, claim(made)).partition(f"{drv_of(made)}/")[2]
    ]


def test_a_push_of_what_is_there_states_nothing_anew(made: Made) -> None:
    backend = MemoryBackend()
    push(backend, made)
    asked: list[SigningKey] = []
    opened(backend).push(made.info, made.tree, attest=asked.append)
    assert asked == []


def test_who_builds_the_same_again_attests_it_as_well(backend: Backend, made: Made) -> None:
    push(backend, made)
    assert push(backend, made, STRANGER).kept is PushOutcome.HEALED
    assert opened(backend).reader.attestations(drv_of(made)) == sorted([claim(made), claim(made, STRANGER)])


def test_nothing_is_stated_where_there_is_nothing_to_state(made: Made, tmp_path: Path) -> None:
    backend = MemoryBackend()
    opened(backend).push(made.info, made.tree, attest=lambda _key: None)
    assert opened(backend).reader.attestations(drv_of(made)) == []
    # What came from elsewhere is not this machine's to attest, whatever it says.
    voucher = narinfo_of(backend, made).render()
    taken = replace(made.info, outcome=Outcome.SUBSTITUTED, voucher=voucher)
    other = MemoryBackend()
    opened(other).push(taken, made.tree, attest=lambda key: claim(made, key))
    assert opened(other).reader.attestations(drv_of(made)) == []


def test_many_are_pushed_without_a_listing_for_each(tmp_path: Path) -> None:
    backend = MemoryBackend()
    before, *new = [make(tmp_path, f"m{number}", salt=str(number)) for number in range(5)]
    push(backend, before)
    listings: list[str] = []
    listed = backend.list
    backend.list = lambda prefix="": listings.append(prefix) or listed(prefix)  # type: ignore[method-assign,func-returns-value]
    cache = opened(backend, STRANGER)
    with cache.surveyed():
        for each in (before, *new):
            cache.push(each.info, each.tree, attest=lambda key, each=each: claim(each, key))
    assert listings == ["", f"attest/{drv_of(before)}/"], "only what had entries is looked at"
    assert len(json.loads(read(backend, index_of(before)))["entries"]) == 2
    assert [len(json.loads(read(backend, index_of(each)))["entries"]) for each in new] == [1] * 4


# --- keeping a cache right --------------------------------------------------------------------------------------------


def test_attestations_stay_and_go_with_their_object(place: Backend, made: Made) -> None:
    push(place, made)
    add_root(place, "main", [made.info.path])
    grow_old(place, 2 * MONTH)
    assert collect(place, older_than_secs=MONTH).deleted.count == 0
    assert opened(place).reader.attestations(drv_of(made)) == [claim(made)]
    grow_old(place, 2 * MONTH)  # having been read is use
    collect(place, older_than_secs=MONTH, keep_roots=False)
    assert not any(key.startswith("attest/") for key in keys(place))


def test_what_is_about_to_be_collected_becomes_young_when_it_is_put_again(place: Backend, made: Made) -> None:
    opened(place).put_attestation(drv_of(made), claim(made))
    grow_old(place, 2 * MONTH)
    opened(place).put_attestation(drv_of(made), claim(made))
    collect(place, older_than_secs=2 * DAY, keep_roots=False)
    assert opened(place).reader.attestations(drv_of(made)) == [claim(made)]


def test_a_check_reads_them_and_a_repair_removes_what_is_damaged(backend: Backend, made: Made) -> None:
    push(backend, made)
    opened(backend).put_attestation(drv_of(made), claim(made, STRANGER))
    assert found(backend) == []
    damaged = key_of(made, claim(made))
    backend.put(damaged, claim(made).replace(b'"payload"', b'"pay1oad"'))
    assert kinds(found(backend, deep=False)) == []
    assert kinds(found(backend)) == [("damaged", damaged)]
    [done] = repair(opened(backend), found(backend), lambda _path: None)
    assert done.action == "removed"
    assert found(backend) == []
    assert opened(backend).reader.attestations(drv_of(made)) == [claim(made, STRANGER)]


def test_attestations_of_no_object_are_nobodys(place: Backend, made: Made) -> None:
    opened(place).put_attestation(drv_of(made), claim(made))
    assert found(place) == [], "it may belong to a push that is under way"
    grow_old(place, 2 * DAY)
    assert kinds(found(place)) == [("orphan", key_of(made, claim(made))), ("orphan", index_of(made))]


def test_trimming_a_machines_cache_takes_them_along(tmp_path: Path) -> None:
    backend = DirectoryBackend(tmp_path / "cache")
    old, new = make(tmp_path, "old", os.urandom(50_000)), make(tmp_path, "new", os.urandom(50_000))
    for each in (old, new):
        push(backend, each)
    grow_old(backend, DAY, narinfo_key(old.info.path))
    trim(backend, 80_000)
    assert opened(backend).reader.attestations(drv_of(old)) == []
    assert not any(key.startswith(f"attest/{drv_of(old)}") for key in keys(backend))
    assert opened(backend).reader.attestations(drv_of(new)) == [claim(new)]
