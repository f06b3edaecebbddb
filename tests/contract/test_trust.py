"""Whose word counts: several keys, a threshold, keys that are replaced and revoked, and who signs what."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.test_binary_cache import KEY, STRANGER, Made, keys, make, narinfo_of, push, read
from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.base.model import DrvHash, Outcome, store_path
from vzrepro.cache import (
    Backend,
    CacheReader,
    CacheWriter,
    Damaged,
    DirectoryBackend,
    PublicKey,
    PushOutcome,
    SigningKey,
    TrustedKeys,
    machine_cache,
)
from vzrepro.cache.narinfo import has_lost_trust, narinfo_key

SECOND = SigningKey.generate("ours-2")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def by(backend: Backend, signer: SigningKey | None, *trusted: SigningKey, required: int = 1) -> CacheWriter:
    """The cache as somebody sees it who signs with `signer`."""
    return new_cache(backend, TrustedKeys([key.public for key in trusted], required=required), signer)


def test_two_builders_who_agree_both_sign(backend: Backend, made: Made) -> None:
    assert push(by(backend, KEY, KEY, SECOND), made).kept is PushOutcome.NEW
    demanding = by(backend, None, KEY, SECOND, required=2)
    assert demanding.reader.query(made.info.path) is None
    with pytest.raises(Untrusted, match="too few") as caught:
        demanding.reader.ask(made.info.path)
    assert "wanted 2, found 1, by ours-1" in str(caught.value)
    assert push(by(backend, SECOND, KEY, SECOND), made).kept is PushOutcome.HEALED
    assert demanding.reader.query(made.info.path) is not None
    assert push(by(backend, SECOND, KEY, SECOND), made).kept is PushOutcome.PRESENT
    assert push(by(backend, KEY, KEY, SECOND), made).kept is PushOutcome.PRESENT


def test_builders_who_demand_two_signatures_get_there_one_by_one(backend: Backend, made: Made) -> None:
    push(by(backend, KEY, KEY, SECOND, required=2), made)
    assert push(by(backend, SECOND, KEY, SECOND, required=2), made).kept is PushOutcome.HEALED
    assert by(backend, None, KEY, SECOND, required=2).reader.query(made.info.path) is not None


def test_one_key_under_two_names_is_one_voice(backend: Backend, made: Made) -> None:
    alias = SigningKey("ours-alias", KEY._seed)
    push(by(backend, KEY, KEY), made)
    push(by(backend, alias, alias), made)
    assert len(narinfo_of(backend, made).signatures) == 2
    assert by(backend, None, KEY, alias, required=2).reader.query(made.info.path) is None


def test_builders_who_were_fed_other_inputs_do_not_vouch_for_each_others_build_key(
    backend: Backend, made: Made
) -> None:
    push(by(backend, KEY, KEY, SECOND), made)
    other = replace(made, info=replace(made.info, build_key=None))
    assert push(by(backend, SECOND, KEY, SECOND), other).kept is PushOutcome.HEALED
    assert by(backend, None, KEY).reader.query(made.info.path) is not None
    found = narinfo_of(backend, made)
    assert found.build_key == made.info.build_key
    assert len(found.signatures) == 2
    assert len(found.own_signatures) == 1


def test_a_key_is_replaced_without_a_gap(backend: Backend, made: Made, tmp_path: Path) -> None:
    """The new key is trusted first, then used; the old objects stay good until the old key is dropped."""
    push(by(backend, KEY, KEY), made)
    fresh = make(tmp_path / "fresh", salt="new")
    push(by(backend, SECOND, KEY, SECOND), fresh)
    both = by(backend, None, KEY, SECOND)
    assert both.reader.query(made.info.path) is not None
    assert both.reader.query(fresh.info.path) is not None
    assert by(backend, None, KEY).reader.query(fresh.info.path) is None


def test_keys_of_one_name_are_told_apart_by_their_bytes(backend: Backend, made: Made) -> None:
    newer = SigningKey.generate("ours-1")
    push(by(backend, KEY, KEY), made)
    assert by(backend, None, newer).reader.query(made.info.path) is None
    assert by(backend, None, newer, KEY).reader.query(made.info.path) is not None


def revoking(*trusted: SigningKey, revoked: SigningKey, required: int = 1) -> TrustedKeys:
    return TrustedKeys([key.public for key in trusted], revoked=[revoked.public], required=required)


def test_a_revoked_key_vouches_for_nothing_even_if_it_is_trusted_too(backend: Backend, made: Made) -> None:
    push(by(backend, KEY, KEY), made)
    with pytest.raises(Untrusted, match="revoked key") as caught:
        CacheReader(backend, revoking(KEY, revoked=KEY)).ask(made.info.path)
    assert "ours-1" in str(caught.value)
    assert str(made.info.path) in str(caught.value)
    assert backend.url in str(caught.value)


def test_what_another_key_has_signed_as_well_survives_a_revocation(backend: Backend, made: Made) -> None:
    push(by(backend, KEY, KEY), made)
    push(by(backend, SECOND, KEY, SECOND), made)
    assert CacheReader(backend, revoking(KEY, SECOND, revoked=KEY)).query(made.info.path) is not None


def test_a_voucher_tells_later_whether_its_key_was_revoked(backend: Backend, made: Made, tmp_path: Path) -> None:
    push(by(backend, KEY, KEY), made)
    cache = by(backend, None, KEY)
    info = cache.reader.query(made.info.path)
    assert info is not None
    voucher = cache.reader.fetch(info, tmp_path / "dest").voucher
    assert voucher is not None
    renamed = PublicKey("another-name", KEY.public.raw)
    assert not has_lost_trust(voucher, TrustedKeys([KEY.public]))
    assert not has_lost_trust(voucher, TrustedKeys())
    assert not has_lost_trust(voucher, revoking(KEY, revoked=STRANGER))
    assert has_lost_trust(voucher, revoking(KEY, revoked=KEY))
    assert has_lost_trust(voucher, TrustedKeys(revoked=[renamed]))


def test_what_came_from_elsewhere_is_passed_on_with_its_own_signatures(
    backend: Backend, made: Made, tmp_path: Path
) -> None:
    """Whoever mirrors a cache vouches for nothing, and needs no key."""
    push(by(backend, KEY, KEY), made)
    source = by(backend, None, KEY)
    info = source.reader.query(made.info.path)
    assert info is not None
    taken = source.reader.fetch(info, tmp_path / "dest")
    mirror = MemoryBackend()
    for signer in (None, STRANGER):
        by(mirror, signer, KEY).push(taken, tmp_path / "dest", derivation=made.derivation)
        assert narinfo_of(mirror, made).signatures == narinfo_of(backend, made).signatures
    assert by(mirror, None, KEY).reader.query(made.info.path) is not None
    assert by(mirror, None, STRANGER).reader.query(made.info.path) is None


def test_what_was_made_here_needs_a_key(backend: Backend, made: Made) -> None:
    with pytest.raises(UsageError, match="no key"):
        push(by(backend, None, KEY), made)


def test_the_machines_own_cache_vouches_for_nothing_but_what_was_made_here(made: Made, tmp_path: Path) -> None:
    """So what comes from it is signed with the upload key when it goes to the team."""
    own = machine_cache(tmp_path / "own", tmp_path / "keys")
    push(own, made)
    info = own.reader.query(made.info.path)
    assert info is not None
    taken = own.reader.fetch(info, tmp_path / "dest")
    assert taken.voucher is None
    team = MemoryBackend()
    by(team, KEY, KEY).push(taken, tmp_path / "dest")
    assert [text.partition(":")[0] for text in narinfo_of(team, made).signatures] == ["ours-1"]


# --- copies: the same content under another name ----------------------------------------------------------------------


def copied(made: Made, voucher: bytes | None = None) -> Made:
    """What early cutoff makes of it when an input changed but came out as before."""
    drv_hash = DrvHash.of(b"changed")
    path = store_path(drv_hash, made.info.path.name)
    info = replace(made.info, path=path, drv_hash=drv_hash, outcome=Outcome.COPIED, voucher=voucher)
    return replace(made, info=info, derivation=None)  # type: ignore[arg-type]


def test_of_a_copy_only_the_new_name_travels(backend: Backend, made: Made, tmp_path: Path) -> None:
    first = push(by(backend, KEY, KEY), made)
    copy = copied(made)
    # Nothing of the tree is needed: it is not even read.
    second = by(backend, SECOND, KEY, SECOND).push(copy.info, tmp_path / "nowhere")
    assert second.kept is PushOutcome.NEW
    assert second.written_bytes < first.written_bytes
    assert len([key for key in keys(backend) if key.startswith("nar/")]) == 1
    cache = by(backend, None, SECOND)
    info = cache.reader.query(copy.info.path)
    assert info is not None
    assert info.url == narinfo_of(backend, made).url
    cache.reader.fetch(info, tmp_path / "dest")


def test_a_copy_of_what_the_cache_lacks_travels_whole(backend: Backend, made: Made) -> None:
    copy = copied(made)
    assert by(backend, KEY, KEY).push(copy.info, copy.tree).kept is PushOutcome.NEW
    assert by(backend, None, KEY).reader.query(copy.info.path) is not None


def test_a_copy_whose_original_has_lost_its_nar_travels_whole(backend: Backend, made: Made) -> None:
    push(by(backend, KEY, KEY), made)
    backend.delete([narinfo_of(backend, made).url])
    copy = copied(made)
    assert by(backend, KEY, KEY).push(copy.info, copy.tree).kept is PushOutcome.NEW
    assert backend.head(narinfo_of(backend, copy).url) is not None


@pytest.mark.parametrize("record", [b"", b"{}", b"[1]", b'{"realization": {"path": "x"}}', b"x" * 100_000])
def test_a_copy_is_not_misled_by_a_bad_record(backend: Backend, made: Made, record: bytes) -> None:
    push(by(backend, KEY, KEY), made)
    backend.put(f"build/{made.info.build_key}.json", record)
    copy = copied(made)
    assert by(backend, KEY, KEY).push(copy.info, copy.tree).kept is PushOutcome.NEW


# --- healing ----------------------------------------------------------------------------------------------------------


def test_a_nar_that_was_found_to_be_wrong_is_written_anew(backend: Backend, made: Made, tmp_path: Path) -> None:
    """Same size, other bytes: no question about it tells, but whoever has read it knows."""
    cache = by(backend, KEY, KEY)
    push(cache, made)
    url = narinfo_of(backend, made).url
    right = read(backend, url)
    backend.put(url, bytes([right[0]]) + bytes(len(right) - 1))
    assert push(by(backend, KEY, KEY), made).kept is PushOutcome.PRESENT
    info = cache.reader.query(made.info.path)
    assert info is not None
    with pytest.raises(Damaged):
        cache.reader.fetch(info, tmp_path / "dest")
    assert push(cache, made).kept is PushOutcome.HEALED
    assert read(backend, url) == right
    assert push(cache, made).kept is PushOutcome.PRESENT


def test_what_a_push_relies_on_becomes_young(tmp_path: Path, made: Made) -> None:
    backend = DirectoryBackend(tmp_path / "cache")
    cache = by(backend, KEY, KEY)
    push(cache, made)
    url = narinfo_of(backend, made).url
    entries = [tmp_path / "cache" / key for key in (url, narinfo_key(made.info.path))]
    for entry in entries:
        os.utime(entry, (1, 1))
    assert push(cache, made).kept is PushOutcome.PRESENT
    assert all(entry.stat().st_mtime > 1_000_000_000 for entry in entries)
