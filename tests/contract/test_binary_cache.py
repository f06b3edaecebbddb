"""What a binary cache does with good, hostile and broken entries: right bytes or a miss, over every backend."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from vzrepro import nar
from vzrepro.base.errors import HashMismatch, RemoteError, UsageError
from vzrepro.base.model import (
    BuildKey,
    Derivation,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    Outcome,
    Realization,
    canonical_json,
    store_path,
)
from vzrepro.cache import (
    Backend,
    CacheReader,
    CacheWriter,
    Damaged,
    DirectoryBackend,
    Entry,
    NarInfo,
    PushOutcome,
    PushResult,
    SigningKey,
    Stream,
    TrustedKeys,
    machine_cache,
)
from vzrepro.cache.machine import trim
from vzrepro.cache.narinfo import deriver_of, narinfo_key

KEY = SigningKey.generate("ours-1")
STRANGER = SigningKey.generate("theirs-1")


@dataclass(frozen=True)
class Made:
    """An object as the store would hand it over."""

    info: ObjectInfo
    tree: Path
    derivation: bytes
    log: Path


def make(root: Path, name: str = "hello", content: bytes = b"hello\n", salt: str = "") -> Made:
    """An object; `content` changes what came out, `salt` what was asked."""
    tree = root / f"{name}-{FileHash.of(content + salt.encode())}"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "run").write_bytes(b"#!/bin/sh\n" + content)
    (tree / "bin" / "run").chmod(0o755)
    (tree / "link").symlink_to("bin/run")
    drv = Derivation(name=name, builder="sandbox", env={"SALT": salt})
    path = store_path(drv.drv_hash(), name)
    nar_hash, nar_size = nar.nar_hash(tree)
    log = root / f"{tree.name}.log"
    log.write_text("cc -o run\n")
    key = BuildKey.of(drv.drv_hash().bytes)
    info = ObjectInfo(path, nar_hash, nar_size, (), drv.drv_hash(), key, FileHash.of(b"origin"))
    return Made(info, tree, canonical_json(drv.document()), log)


@dataclass
class Warnings:
    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


@pytest.fixture
def cache(backend: Backend, warnings: Warnings) -> CacheWriter:
    return new_cache(backend, TrustedKeys([KEY.public]), KEY, warn=warnings)


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def push(cache: CacheWriter, made: Made) -> PushResult:
    return cache.push(made.info, made.tree, derivation=made.derivation, log=made.log)


def reader(cache: CacheWriter, warnings: Warnings, *keys: SigningKey) -> CacheReader:
    """Another process that reads the same place."""
    return CacheReader(cache.access.backend, TrustedKeys([key.public for key in keys or (KEY,)]), warn=warnings)


def read(backend: Backend, key: str) -> bytes:
    opened = backend.get(key)
    assert opened is not None, f"no {key}"
    with opened as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def keys(backend: Backend) -> set[str]:
    return {entry.key for entry in backend.list()}


def narinfo_of(backend: Backend, made: Made) -> NarInfo:
    return NarInfo.parse(read(backend, narinfo_key(made.info.path)))


# --- there and back ---------------------------------------------------------------------------------------------------


def test_an_object_goes_there_and_comes_back(
    cache: CacheWriter, made: Made, tmp_path: Path, warnings: Warnings
) -> None:
    pushed = push(cache, made)
    assert pushed.kept is PushOutcome.NEW
    assert pushed.written_bytes > 0
    other = reader(cache, warnings)
    info = other.query(made.info.path)
    assert info is not None
    seen: list[tuple[int, int | None]] = []
    got = other.fetch(info, tmp_path / "dest", lambda done, total: seen.append((done, total)))
    assert got == replace(made.info, outcome=Outcome.SUBSTITUTED, voucher=info.render())
    assert nar.nar_hash(tmp_path / "dest") == (made.info.nar_hash, made.info.nar_size)
    assert seen[-1] == (info.file_size, info.file_size)
    assert warnings.lines == []


def test_the_layout_is_the_documented_one(cache: CacheWriter, backend: Backend, made: Made) -> None:
    push(cache, made)
    info = narinfo_of(backend, made)
    assert info.file_hash is not None
    assert info.url == f"nar/{info.file_hash.nix.removeprefix('sha256:')}.nar.zst"
    assert info.file_hash == FileHash.of(read(backend, info.url))
    assert made.info.drv_hash is not None
    deriver = deriver_of(made.info.drv_hash, made.info.path.name)
    assert info.deriver == deriver
    assert keys(backend) == {
        "nix-cache-info",
        narinfo_key(made.info.path),
        info.url,
        f"drv/{made.info.drv_hash}.json",
        f"log/{deriver}",
        f"build/{made.info.build_key}.json",
    }
    assert read(backend, f"drv/{made.info.drv_hash}.json") == made.derivation
    assert read(backend, f"log/{deriver}") == b"cc -o run\n"
    assert read(backend, "nix-cache-info").startswith(b"StoreDir: /nix/store\n")


def test_the_log_can_be_read_by_those_who_trust_the_object(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    assert cache.reader.log(made.info.path) is None
    cache.push(made.info, made.tree)
    assert cache.reader.log(made.info.path) is None
    push(cache, made)
    assert cache.reader.log(made.info.path) == b"cc -o run\n"
    assert reader(cache, warnings, STRANGER).log(made.info.path) is None


def test_the_narinfo_is_written_last_and_the_nar_first(made: Made) -> None:
    backend = MemoryBackend()
    push(new_cache(backend, TrustedKeys([KEY.public]), KEY), made)
    written = [key for verb, key in backend.log if verb == "put" and key != "nix-cache-info"]
    assert written[0].startswith("nar/")
    assert written[-1].endswith(".narinfo")


def test_a_single_file_and_an_object_without_history_travel_too(cache: CacheWriter, tmp_path: Path) -> None:
    source = tmp_path / "source.tar"
    source.write_bytes(os.urandom(3_000_000))
    nar_hash, nar_size = nar.nar_hash(source)
    info = ObjectInfo(store_path(DrvHash.of(b"x"), "source.tar"), nar_hash, nar_size)
    assert cache.push(info, source).kept is PushOutcome.NEW
    found = cache.reader.query(info.path)
    assert found is not None
    taken = replace(info, outcome=Outcome.SUBSTITUTED, voucher=found.render())
    assert cache.reader.fetch(found, tmp_path / "dest") == taken
    assert (tmp_path / "dest").read_bytes() == source.read_bytes()


def test_references_travel(cache: CacheWriter, tmp_path: Path, made: Made) -> None:
    other = store_path(DrvHash.of(b"dep"), "dep")
    info = replace(made.info, references=tuple(sorted((other, made.info.path))))
    cache.push(info, made.tree)
    found = cache.reader.query(info.path)
    assert found is not None
    assert cache.reader.fetch(found, tmp_path / "dest").references == info.references


def test_what_is_not_there_is_a_silent_miss(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    assert cache.reader.query(made.info.path) is None
    assert made.info.build_key is not None
    assert cache.reader.by_build_key(made.info.build_key) is None
    assert warnings.lines == []


def test_pushing_again_writes_nothing(cache: CacheWriter, backend: Backend, made: Made) -> None:
    push(cache, made)
    before = {key: read(backend, key) for key in keys(backend)}
    assert push(cache, made) == PushResult(PushOutcome.PRESENT, 0)
    assert {key: read(backend, key) for key in keys(backend)} == before


def test_equal_bytes_under_two_names_travel_once(cache: CacheWriter, tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b", salt="a comment")
    assert one.info.path != two.info.path
    first, second = push(cache, one), push(cache, two)
    assert second.kept is PushOutcome.NEW
    assert second.written_bytes < first.written_bytes
    assert len([key for key in keys(cache.access.backend) if key.startswith("nar/")]) == 1


def test_without_a_key_nothing_is_pushed(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    other = CacheWriter(reader(cache, warnings))
    assert not other.writable
    assert cache.writable
    with pytest.raises(UsageError, match="no key"):
        push(other, made)
    assert keys(cache.access.backend) == set()


def test_a_damaged_object_is_not_pushed(cache: CacheWriter, made: Made) -> None:
    (made.tree / "bin" / "run").write_bytes(b"flipped")
    with pytest.raises(HashMismatch, match="damaged"):
        push(cache, made)
    assert not any(key.endswith(".narinfo") for key in keys(cache.access.backend))


def test_a_foreign_derivation_is_refused(cache: CacheWriter, made: Made) -> None:
    with pytest.raises(ValueError, match="not the one"):
        cache.push(made.info, made.tree, derivation=b"{}")


# --- early cutoff -----------------------------------------------------------------------------------------------------


def test_a_build_key_finds_its_realization(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    push(cache, made)
    info = made.info
    assert info.build_key is not None
    assert info.drv_hash is not None
    expected = Realization(info.build_key, info.drv_hash, info.path, info.nar_hash, info.nar_size)
    assert reader(cache, warnings).by_build_key(info.build_key) == expected


def edited(record: bytes, **changes: Any) -> bytes:
    document = json.loads(record)
    document["realization"] |= changes
    return canonical_json(document)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _record: b"",
        lambda _record: b"[" * 50_000,
        lambda _record: b"{}",
        lambda _record: b"x" * 100_000,
        lambda record: record[: len(record) // 2],
        lambda record: edited(record, nar_hash=NarHash.of(b"evil").hex),
        lambda record: edited(record, nar_size=1),
        lambda record: edited(record, build_key=BuildKey.of(b"other").hex),
        lambda record: edited(record, path=str(store_path(DrvHash.of(b"evil"), "hello"))),
        lambda record: record.replace(b"ours-1", b"ours-2"),
    ],
)
def test_a_bad_build_record_is_a_miss_with_a_warning(
    cache: CacheWriter, made: Made, warnings: Warnings, damage: Callable[[bytes], bytes]
) -> None:
    push(cache, made)
    assert made.info.build_key is not None
    key = f"build/{made.info.build_key}.json"
    cache.access.backend.put(key, damage(read(cache.access.backend, key)))
    assert reader(cache, warnings).by_build_key(made.info.build_key) is None
    assert len(warnings.lines) == 1


def test_a_build_record_in_anothers_place_is_a_miss(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    push(cache, made)
    other = BuildKey.of(b"other")
    cache.access.backend.put(f"build/{other}.json", read(cache.access.backend, f"build/{made.info.build_key}.json"))
    assert cache.reader.by_build_key(other) is None
    assert "another build key" in warnings.lines[0]


# --- trust ------------------------------------------------------------------------------------------------------------


def test_a_stranger_is_not_believed(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    push(cache, made)
    other = reader(cache, warnings, STRANGER)
    assert other.query(made.info.path) is None
    assert other.query(made.info.path) is None
    assert made.info.build_key is not None
    assert other.by_build_key(made.info.build_key) is None
    assert len(warnings.lines) == 1
    assert "not signed by a trusted key" in warnings.lines[0]
    assert "ours-1" in warnings.lines[0]


Change = Callable[[NarInfo], NarInfo]


@pytest.mark.parametrize(
    "change",
    [
        lambda info: replace(info, nar_hash=NarHash.of(b"evil")),
        lambda info: replace(info, nar_size=info.nar_size + 1),
        lambda info: replace(info, references=(info.path,)),
        lambda info: replace(info, build_key=BuildKey.of(b"evil")),
        lambda info: replace(info, origin=FileHash.of(b"evil")),
        lambda info: replace(info, origin=None),
        lambda info: replace(info, own_signatures=()),
        lambda info: replace(info, signatures=()),
        lambda info: replace(info, signatures=(), own_signatures=()).signed(STRANGER),
        lambda info: replace(info, own_signatures=(STRANGER.sign(b"x"),)),
    ],
)
def test_tampered_narinfo_is_a_miss(cache: CacheWriter, made: Made, warnings: Warnings, change: Change) -> None:
    push(cache, made)
    tampered = change(narinfo_of(cache.access.backend, made))
    cache.access.backend.put(narinfo_key(made.info.path), tampered.render())
    assert reader(cache, warnings).query(made.info.path) is None
    assert len(warnings.lines) == 1


def test_a_rightly_signed_narinfo_in_anothers_place_is_a_miss(
    cache: CacheWriter, tmp_path: Path, warnings: Warnings
) -> None:
    one, two = make(tmp_path / "1", "one"), make(tmp_path / "2", "two", b"two")
    push(cache, one)
    cache.access.backend.put(narinfo_key(two.info.path), read(cache.access.backend, narinfo_key(one.info.path)))
    assert cache.reader.query(two.info.path) is None
    assert "belongs" in warnings.lines[0]
    assert cache.reader.query(one.info.path) is not None


def test_another_name_with_the_same_hash_part_is_a_miss(cache: CacheWriter, made: Made) -> None:
    push(cache, made)
    assert cache.reader.query(replace(made.info.path, name="other")) is None


def test_two_keys_may_sign_and_one_suffices(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    push(cache, made)
    both = narinfo_of(cache.access.backend, made).signed(STRANGER)
    cache.access.backend.put(narinfo_key(made.info.path), both.render())
    assert reader(cache, warnings).query(made.info.path) is not None
    assert reader(cache, warnings, STRANGER).query(made.info.path) is not None
    assert warnings.lines == []


def test_a_cache_of_another_store_is_not_asked(cache: CacheWriter, made: Made, warnings: Warnings) -> None:
    push(cache, made)
    cache.access.backend.put("nix-cache-info", b"StoreDir: /gnu/store\n")
    other = new_cache(cache.access.backend, TrustedKeys([KEY.public]), KEY, warn=warnings)
    assert other.reader.query(made.info.path) is None
    assert "another store" in warnings.lines[0]
    with pytest.raises(RemoteError):
        push(new_cache(cache.access.backend, TrustedKeys([KEY.public]), KEY), made)


@pytest.mark.parametrize("content", [None, b"", b"WantMassQuery: 1\n", b"\xff\xfe", b"StoreDir: /nix/store"])
def test_a_cache_need_not_say_whose_it_is(
    cache: CacheWriter, made: Made, warnings: Warnings, content: bytes | None
) -> None:
    push(cache, made)
    cache.access.backend.delete(["nix-cache-info"])
    if content is not None:
        cache.access.backend.put("nix-cache-info", content)
    assert reader(cache, warnings).query(made.info.path) is not None
    assert warnings.lines == []


# --- damage -----------------------------------------------------------------------------------------------------------


def replace_nar(cache: CacheWriter, made: Made, data: bytes, **changes: Any) -> NarInfo:
    """Put other bytes behind the narinfo, which an attacker with write access makes fit as far as no signature
    covers it."""
    info = narinfo_of(cache.access.backend, made)
    lying = replace(info, file_hash=FileHash.of(data), file_size=len(data), **changes)
    cache.access.backend.put(info.url, data)
    cache.access.backend.put(narinfo_key(made.info.path), lying.render())
    found = cache.reader.query(made.info.path)
    assert found is not None
    return found


def packed(tree: Path) -> bytes:
    return b"".join(nar.pack(tree))


def zstd(data: bytes) -> bytes:
    return b"".join(nar.compress([data]))


Damage = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda good: b"", id="empty"),
        pytest.param(lambda good: b"junk", id="junk"),
        pytest.param(lambda good: zstd(good)[:-7], id="truncated"),
        pytest.param(lambda good: zstd(good) + b"junk", id="trailing junk"),
        pytest.param(lambda good: zstd(good + b"more"), id="data after the NAR's end"),
        pytest.param(lambda good: zstd(good) + zstd(b"more"), id="a frame after the NAR's end"),
        pytest.param(lambda good: zstd(good[:-16]), id="truncated NAR"),
        pytest.param(lambda good: zstd(good.replace(b"hello\n", b"jello\n")), id="tampered content"),
        pytest.param(lambda good: zstd(bytes(1 << 28)), id="zstd bomb"),
        pytest.param(lambda good: zstd(good.replace(b"bin/run", b"/bin/sh")), id="tampered link"),
        pytest.param(lambda good: good, id="not compressed"),
    ],
)
def test_a_bad_nar_is_refused_and_leaves_nothing(
    cache: CacheWriter, made: Made, tmp_path: Path, warnings: Warnings, damage: Damage
) -> None:
    push(cache, made)
    info = replace_nar(cache, made, damage(packed(made.tree)))
    private = tmp_path / "private"
    private.mkdir()
    with pytest.raises(Damaged):
        cache.reader.fetch(info, private / "dest")
    assert list(private.iterdir()) == []
    assert len(warnings.lines) == 1
    assert "what is wrong there is built here" in warnings.lines[0]
    assert cache.reader.query(made.info.path) is not None  # others may be fine: the cache is still asked


def test_a_link_in_the_tampered_nars_place_is_removed_and_not_followed(
    cache: CacheWriter, made: Made, tmp_path: Path
) -> None:
    push(cache, made)
    target = tmp_path / "target"
    (target / "inside").mkdir(parents=True, mode=0o755)
    link = tmp_path / "link"
    link.symlink_to(target)
    info = replace_nar(cache, made, zstd(packed(link)))
    with pytest.raises(Damaged, match="another"):
        cache.reader.fetch(info, tmp_path / "dest")
    assert not os.path.lexists(tmp_path / "dest")
    assert (target / "inside").stat().st_mode & 0o777 == 0o755


def test_what_is_at_the_destination_already_stays(cache: CacheWriter, made: Made, tmp_path: Path) -> None:
    push(cache, made)
    info = cache.reader.query(made.info.path)
    assert info is not None
    (tmp_path / "dest").write_text("mine")
    with pytest.raises(FileExistsError):
        cache.reader.fetch(info, tmp_path / "dest")
    assert (tmp_path / "dest").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda info: {"file_hash": FileHash.of(b"x")}, "found sha256:"),
        (lambda info: {"file_size": info.file_size - 1}, "found more"),
        (lambda info: {"file_size": info.file_size + 1}, " bytes"),
    ],
)
def test_what_nix_clients_do_not_check_is_checked(
    cache: CacheWriter, made: Made, tmp_path: Path, change: Callable[[NarInfo], dict[str, Any]], found: str
) -> None:
    push(cache, made)
    info = narinfo_of(cache.access.backend, made)
    with pytest.raises(Damaged, match=found):
        cache.reader.fetch(replace(info, **change(info)), tmp_path / "dest")


def test_file_hash_and_size_may_be_absent(cache: CacheWriter, made: Made, tmp_path: Path) -> None:
    push(cache, made)
    info = replace(narinfo_of(cache.access.backend, made), file_hash=None, file_size=None)
    cache.reader.fetch(info, tmp_path / "dest")
    with pytest.raises(Damaged):
        cache.access.backend.put(info.url, zstd(packed(made.tree)) + zstd(b"x"))
        cache.reader.fetch(info, tmp_path / "other")


def test_an_uncompressed_nar_is_read(cache: CacheWriter, made: Made, tmp_path: Path) -> None:
    push(cache, made)
    info = replace_nar(cache, made, packed(made.tree), compression="none")
    cache.reader.fetch(info, tmp_path / "dest")
    assert (tmp_path / "dest" / "bin" / "run").read_bytes().endswith(b"hello\n")


def test_a_lost_nar_is_damage(cache: CacheWriter, made: Made, tmp_path: Path, warnings: Warnings) -> None:
    push(cache, made)
    info = narinfo_of(cache.access.backend, made)
    cache.access.backend.delete([info.url])
    with pytest.raises(Damaged, match="has lost"):
        cache.reader.fetch(info, tmp_path / "dest")
    assert len(warnings.lines) == 1


@pytest.mark.parametrize("damage", [b"", b"junk\n", b"x" * (2 << 20)])
def test_a_narinfo_that_is_none_is_a_miss_and_heals(
    cache: CacheWriter, made: Made, warnings: Warnings, damage: bytes
) -> None:
    push(cache, made)
    cache.access.backend.put(narinfo_key(made.info.path), damage)
    assert cache.reader.query(made.info.path) is None
    assert len(warnings.lines) == 1
    if len(damage) < 1 << 20:
        assert push(cache, made).kept is PushOutcome.HEALED
        assert cache.reader.query(made.info.path) is not None


@pytest.mark.parametrize("blob", [None, b"short"])
def test_a_lost_or_cut_nar_heals_on_the_next_push(
    cache: CacheWriter, made: Made, tmp_path: Path, blob: bytes | None
) -> None:
    push(cache, made)
    info = narinfo_of(cache.access.backend, made)
    if blob is None:
        cache.access.backend.delete([info.url])
    else:
        cache.access.backend.put(info.url, blob)
    assert push(cache, made).kept is PushOutcome.HEALED
    found = cache.reader.query(made.info.path)
    assert found is not None
    cache.reader.fetch(found, tmp_path / "dest")


def test_a_wrong_signature_in_our_name_heals(cache: CacheWriter, made: Made) -> None:
    push(cache, made)
    wrong = replace(narinfo_of(cache.access.backend, made), nar_hash=NarHash.of(b"flipped"))
    cache.access.backend.put(narinfo_key(made.info.path), wrong.render())
    assert push(cache, made).kept is PushOutcome.HEALED
    assert cache.reader.query(made.info.path) is not None


# --- two builders -----------------------------------------------------------------------------------------------------


def test_the_first_of_two_results_stays_and_the_difference_is_recorded(
    cache: CacheWriter, tmp_path: Path, warnings: Warnings
) -> None:
    first, second = make(tmp_path / "1"), make(tmp_path / "2", content=b"built at noon\n")
    assert first.info.path == second.info.path
    push(cache, first)
    before = read(cache.access.backend, narinfo_key(first.info.path))
    colleague = new_cache(cache.access.backend, TrustedKeys([KEY.public, STRANGER.public]), STRANGER, warn=warnings)
    pushed = push(colleague, second)
    assert pushed.kept is PushOutcome.DIFFERENT
    assert pushed.other == first.info.nar_hash
    assert pushed.record is not None
    assert pushed.record.startswith(f"attest/{first.info.drv_hash}/{STRANGER.public.id}/")
    assert read(cache.access.backend, narinfo_key(first.info.path)) == before
    record = read(cache.access.backend, pushed.record)
    assert pushed.record.endswith(f"/{FileHash.of(record)}.json")
    statement = json.loads(record)["statement"]
    assert statement["kept"]["nar_hash"] == first.info.nar_hash.hex
    assert statement["found"]["nar_hash"] == second.info.nar_hash.hex
    signed = b"vzrepro:" + canonical_json(statement)
    assert TrustedKeys([STRANGER.public]).signers(signed, json.loads(record)["signatures"])
    assert push(colleague, second) == replace(pushed, written_bytes=0)
    assert len([key for key in keys(cache.access.backend) if key.startswith("nar/")]) == 1


def test_a_strangers_different_result_stays_too(cache: CacheWriter, tmp_path: Path) -> None:
    first, second = make(tmp_path / "1"), make(tmp_path / "2", content=b"other\n")
    push(new_cache(cache.access.backend, TrustedKeys([STRANGER.public]), STRANGER), first)
    assert push(cache, second).kept is PushOutcome.DIFFERENT
    assert narinfo_of(cache.access.backend, first).nar_hash == first.info.nar_hash


def test_a_strangers_equal_result_gets_our_signature_as_well(
    cache: CacheWriter, made: Made, warnings: Warnings
) -> None:
    stranger = new_cache(cache.access.backend, TrustedKeys([STRANGER.public]), STRANGER)
    push(stranger, made)
    assert push(cache, made).kept is PushOutcome.HEALED
    assert reader(cache, warnings).query(made.info.path) is not None
    assert reader(cache, warnings, STRANGER).query(made.info.path) is not None
    assert warnings.lines == []


@pytest.mark.parametrize("signer", [KEY, STRANGER])
def test_what_nix_has_copied_back_without_our_fields_gets_them_again(
    cache: CacheWriter, made: Made, signer: SigningKey
) -> None:
    push(cache, made)
    before = narinfo_of(cache.access.backend, made)
    bare = replace(before, drv_hash=None, build_key=None, origin=None, own_signatures=(), signatures=())
    cache.access.backend.put(narinfo_key(made.info.path), bare.signed(signer).render())
    assert push(cache, made).kept is PushOutcome.HEALED
    found = cache.reader.query(made.info.path)
    assert found is not None
    assert found.build_key == made.info.build_key
    assert found.own_signatures == before.own_signatures
    assert push(cache, made).kept is PushOutcome.PRESENT


def test_where_two_must_sign_fields_that_one_would_sign_are_not_added(cache: CacheWriter, made: Made) -> None:
    push(cache, made)
    before = narinfo_of(cache.access.backend, made)
    bare = replace(before, drv_hash=None, build_key=None, origin=None, own_signatures=()).signed(STRANGER)
    cache.access.backend.put(narinfo_key(made.info.path), bare.render())
    demanding = new_cache(cache.access.backend, TrustedKeys([KEY.public, STRANGER.public], required=2), KEY)
    assert push(demanding, made).kept is PushOutcome.PRESENT
    assert demanding.reader.query(made.info.path) is not None


def test_many_that_push_at_once_leave_one_whole_object(backend: Backend, tmp_path: Path) -> None:
    results = [make(tmp_path / str(number), content=b"%d\n" % (number % 2)) for number in range(6)]
    start = threading.Barrier(len(results))

    def one(made: Made) -> PushOutcome:
        cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
        start.wait()
        return push(cache, made).kept

    with ThreadPoolExecutor(len(results)) as pool:
        kept = list(pool.map(one, results))
    assert kept.count(PushOutcome.NEW) == 1
    winner = results[kept.index(PushOutcome.NEW)]
    assert kept.count(PushOutcome.DIFFERENT) == 3
    reading = CacheReader(backend, TrustedKeys([KEY.public]))
    info = reading.query(winner.info.path)
    assert info is not None
    assert info.nar_hash == winner.info.nar_hash
    reading.fetch(info, tmp_path / "dest")


# --- a cache that fails -----------------------------------------------------------------------------------------------


class Failing:
    """A backend that breaks when told to: at a call whose verb and key match, or in the middle of reading."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.url = "failing:"
        self.fails: Callable[[str, str], bool] = lambda _verb, _key: False
        self.asked = 0

    def _ask(self, verb: str, key: str) -> None:
        self.asked += 1
        if self.fails(verb, key):
            raise RemoteError("503 Slow Down")

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        self._ask("get", key)
        opened = self.inner.get(key)
        return _Breaking(opened) if opened is not None and self.fails("read", key) else opened

    def put(self, key: str, source: bytes | Path, **more: Any) -> bool:
        self._ask("put", key)
        return self.inner.put(key, source, **more)

    def head(self, key: str) -> Entry | None:
        self._ask("head", key)
        return self.inner.head(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self.inner.list(prefix)

    def delete(self, keys: Collection[str]) -> None:
        self.inner.delete(keys)

    def refresh(self, key: str) -> bool:
        self._ask("refresh", key)
        return self.inner.refresh(key)

    def now(self) -> float:
        return self.inner.now()

    def spool(self) -> AbstractContextManager[Path]:
        return self.inner.spool()

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        return self.inner.lock(exclusive=exclusive)


class _Breaking:
    def __init__(self, opened: AbstractContextManager[Stream]) -> None:
        self._opened = opened

    def __enter__(self) -> Stream:
        self._stream = self._opened.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(min(size, 10))
        if len(piece) < 10:
            raise RemoteError("connection reset")
        self.read = self._reset  # type: ignore[method-assign]
        return piece

    def _reset(self, _size: int, /) -> bytes:
        raise RemoteError("connection reset")


@pytest.mark.parametrize("where", ["nix-cache-info", ".narinfo"])
@pytest.mark.parametrize("verb", ["get", "read"])
def test_a_failing_cache_is_a_miss_with_one_warning_and_then_left_alone(
    cache: CacheWriter, made: Made, warnings: Warnings, where: str, verb: str
) -> None:
    push(cache, made)
    failing = Failing(cache.access.backend)
    failing.fails = lambda did, key: did == verb and key.endswith(where)
    other = new_cache(failing, TrustedKeys([KEY.public]), KEY, warn=warnings)
    assert other.reader.query(made.info.path) is None
    asked = failing.asked
    assert other.reader.query(made.info.path) is None
    assert made.info.build_key is not None
    assert other.reader.by_build_key(made.info.build_key) is None
    assert failing.asked == asked
    assert len(warnings.lines) == 1
    assert "not asked again" in warnings.lines[0]
    assert not other.writable


def test_a_nar_that_breaks_off_disables_the_cache(
    cache: CacheWriter, made: Made, tmp_path: Path, warnings: Warnings
) -> None:
    push(cache, made)
    failing = Failing(cache.access.backend)
    failing.fails = lambda verb, key: verb == "read" and key.startswith("nar/")
    other = CacheReader(failing, TrustedKeys([KEY.public]), warn=warnings)
    info = other.query(made.info.path)
    assert info is not None
    with pytest.raises(RemoteError, match="connection reset"):
        other.fetch(info, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()
    assert other.query(made.info.path) is None
    assert len(warnings.lines) == 1


@pytest.mark.parametrize("where", ["nix-cache-info", "nar/", "drv/", "log/", "build/"])
def test_a_push_that_fails_leaves_no_narinfo_and_is_made_up_for(
    backend: Backend, made: Made, warnings: Warnings, where: str
) -> None:
    failing = Failing(backend)
    failing.fails = lambda verb, key: verb == "put" and key.startswith(where)
    cache = new_cache(failing, TrustedKeys([KEY.public]), KEY, warn=warnings)
    with pytest.raises(RemoteError, match="503"):
        push(cache, made)
    assert not cache.writable
    assert len(warnings.lines) == 1
    assert backend.head(narinfo_key(made.info.path)) is None
    again = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    assert push(again, made).kept is PushOutcome.NEW
    assert again.reader.query(made.info.path) is not None


# --- the machine's cache ----------------------------------------------------------------------------------------------


def test_the_machines_cache_is_shared_by_all_who_have_its_key(tmp_path: Path, made: Made, warnings: Warnings) -> None:
    place, config = tmp_path / "cache", tmp_path / "config"
    first = machine_cache(place, config, warn=warnings)
    assert not place.exists()
    assert first.reader.query(made.info.path) is None
    push(first, made)
    second = machine_cache(place, config, warn=warnings)
    info = second.reader.query(made.info.path)
    assert info is not None
    second.reader.fetch(info, tmp_path / "dest")
    assert warnings.lines == []
    (key,) = config.iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    stranger = machine_cache(place, tmp_path / "elsewhere", warn=warnings)
    assert stranger.reader.query(made.info.path) is None
    assert len(warnings.lines) == 1


def test_of_many_that_make_the_key_at_once_one_wins(tmp_path: Path) -> None:
    start = threading.Barrier(8)

    def one(_number: int) -> bytes:
        start.wait()
        machine_cache(tmp_path / "cache", tmp_path / "config")
        return next((tmp_path / "config").glob("*.key")).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(one, range(8)))) == 1


def test_a_key_open_to_others_disables_the_machines_cache(tmp_path: Path, made: Made, warnings: Warnings) -> None:
    place, config = tmp_path / "cache", tmp_path / "config"
    push(machine_cache(place, config), made)
    next(config.iterdir()).chmod(0o644)
    cache = machine_cache(place, config, warn=warnings)
    assert cache.reader.query(made.info.path) is None
    assert not cache.writable
    assert len(warnings.lines) == 1
    assert "0644" in warnings.lines[0]


def test_a_key_that_cannot_be_made_disables_the_machines_cache(tmp_path: Path, warnings: Warnings) -> None:
    (tmp_path / "file").write_text("")
    assert not machine_cache(tmp_path / "cache", tmp_path / "file", warn=warnings).writable
    assert len(warnings.lines) == 1


def stamp(backend: DirectoryBackend, root: Path, made: Made, at: int) -> None:
    """Let the object have been used `at` seconds after the epoch."""
    info = narinfo_of(backend, made)
    for key in (narinfo_key(made.info.path), info.url):
        os.utime(root / key, (at, at))


@pytest.fixture
def several(tmp_path: Path) -> list[Made]:
    return [make(tmp_path / "made", f"object-{number}", os.urandom(50_000)) for number in range(4)]


def whole(backend: DirectoryBackend) -> bool:
    """Whether no narinfo is without its NAR."""
    infos = [NarInfo.parse(read(backend, key)) for key in keys(backend) if key.endswith(".narinfo")]
    return all(backend.head(info.url) is not None for info in infos)


def test_the_least_recently_used_objects_go_first(tmp_path: Path, several: list[Made]) -> None:
    root = tmp_path / "cache"
    backend = DirectoryBackend(root)
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    for number, made in enumerate(several):
        push(cache, made)
        stamp(backend, root, made, number)
    cache.reader.query(several[0].info.path)  # used: now it is the youngest
    assert trim(backend, 120_000) <= 120_000
    assert [cache.reader.query(made.info.path) is not None for made in several] == [True, False, False, True]
    assert whole(backend)
    gone = several[1].info
    assert gone.drv_hash is not None
    left = keys(backend)
    for key in (
        f"drv/{gone.drv_hash}.json",
        f"build/{gone.build_key}.json",
        f"log/{deriver_of(gone.drv_hash, gone.path.name)}",
    ):
        assert key not in left
    assert len([key for key in left if key.startswith("nar/")]) == 2


def test_looking_for_what_to_trim_does_not_count_as_use(tmp_path: Path, several: list[Made]) -> None:
    root = tmp_path / "cache"
    backend = DirectoryBackend(root)
    push(new_cache(backend, TrustedKeys([KEY.public]), KEY), several[0])
    stamp(backend, root, several[0], 7)
    trim(backend, 1 << 30)
    assert (root / narinfo_key(several[0].info.path)).stat().st_mtime == 7


def test_a_nar_that_another_object_needs_stays(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a"), make(tmp_path / "b", salt="x")
    root = tmp_path / "cache"
    backend = DirectoryBackend(root)
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    push(cache, one)
    push(cache, two)
    (root / narinfo_key(one.info.path)).touch()
    os.utime(root / narinfo_key(two.info.path), (1, 1))
    total = sum(entry.size for entry in backend.list())
    trim(backend, total - 10)
    assert cache.reader.query(two.info.path) is None
    found = cache.reader.query(one.info.path)
    assert found is not None
    cache.reader.fetch(found, tmp_path / "dest")


def test_orphans_go_after_an_hour_and_foreign_entries_stay(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    backend = DirectoryBackend(root)
    for key in ("nar/old.nar.zst", "nar/new.nar.zst", "readme.txt", "broken.narinfo"):
        backend.put(key, b"x")
    os.utime(root / "nar" / "old.nar.zst", (1, 1))
    assert trim(backend, 0) == 3
    assert keys(backend) == {"nar/new.nar.zst", "readme.txt", "broken.narinfo"}


def test_the_machines_cache_stays_below_its_bound(tmp_path: Path, several: list[Made]) -> None:
    cache = machine_cache(tmp_path / "cache", tmp_path / "config", 120_000)
    backend = DirectoryBackend(tmp_path / "cache")
    for made in several:
        push(cache, made)
        assert sum(entry.size for entry in backend.list()) <= 120_000
        assert whole(backend)
    assert cache.reader.query(several[-1].info.path) is not None
