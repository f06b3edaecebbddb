"""Verifying a whole cache, and mending it: every kind of damage is found, and goes or is left as it should."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.test_binary_cache import KEY, STRANGER, Made, keys, make, packed, read
from tests.contract.test_collect import MONTH, belongings, grow_old, push, referring
from vzrepro import nar
from vzrepro.base.errors import UsageError
from vzrepro.base.model import FileHash, StorePath
from vzrepro.cache import Backend, CacheReader, CacheWriter, DirectoryBackend, NarInfo, SigningKey, TrustedKeys
from vzrepro.cache.check import CacheFinding, CheckSummary, HeldObject, RepairResult, repair, verify
from vzrepro.cache.narinfo import narinfo_key

REVOKED = SigningKey.generate("ours-1")


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def cache_of(backend: Backend, *also: SigningKey, required: int = 1) -> CacheWriter:
    trusted = TrustedKeys([KEY.public, *(key.public for key in also)], revoked=[REVOKED.public], required=required)
    return new_cache(backend, trusted, KEY)


def found(backend: Backend, *, deep: bool = True, cache: CacheWriter | None = None) -> list[CacheFinding]:
    findings: list[CacheFinding] = []
    verify((cache or cache_of(backend)).reader, deep=deep, found=findings.append)
    return findings


def kinds(findings: list[CacheFinding]) -> list[tuple[str, str]]:
    return sorted((finding.kind, finding.key) for finding in findings)


def narinfo(backend: Backend, made: Made) -> NarInfo:
    return NarInfo.parse(read(backend, narinfo_key(made.info.path)))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_cache_is_sound(backend: Backend, tmp_path: Path, deep: bool) -> None:
    lib = make(tmp_path, "lib", b"lib")
    app = referring(make(tmp_path, "app", b"app"), lib)
    copy = make(tmp_path, "copy", b"lib", salt="other")  # shares its NAR
    for each in (lib, app, copy):
        push(backend, each)
    push(backend, make(tmp_path, "app", b"other"))  # its difference is recorded
    backend.put("readme", b"foreign")
    seen: list[tuple[int, int]] = []
    findings: list[CacheFinding] = []
    checked = verify(
        cache_of(backend).reader,
        deep=deep,
        found=findings.append,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert findings == []
    sizes = {entry.key: entry.size for entry in backend.list()}
    nars = sum(size for key, size in sizes.items() if key.startswith("nar/"))
    infos = sum(size for key, size in sizes.items() if key.endswith(".narinfo"))
    assert (checked.objects, checked.entries) == (3, len(sizes) - 2)
    assert nars <= checked.nar_bytes <= 2 * nars if deep else checked.nar_bytes == 0
    assert seen == sorted(seen)
    assert seen[-1] == (infos + (nars if deep else 0),) * 2


def test_an_empty_cache_is_sound(backend: Backend) -> None:
    findings: list[CacheFinding] = []
    assert verify(cache_of(backend).reader, deep=True, found=findings.append) == CheckSummary(0, 0, 0)
    assert findings == []


Harm = Callable[[Backend, Made, NarInfo], object]


def edit(backend: Backend, info: NarInfo, **changes: object) -> None:
    backend.put(narinfo_key(info.path), replace(info, **changes).render())  # type: ignore[arg-type]


def sign_again(backend: Backend, info: NarInfo, key: SigningKey, *, keep: bool = False) -> None:
    blank = info if keep else replace(info, signatures=(), own_signatures=())
    backend.put(narinfo_key(info.path), blank.signed(key).render())


NARINFO_HARMS: dict[str, tuple[str, Harm]] = {
    "empty": ("damaged", lambda b, m, i: b.put(narinfo_key(i.path), b"")),
    "cut": ("damaged", lambda b, m, i: b.put(narinfo_key(i.path), i.render()[:-5])),
    "no text": ("damaged", lambda b, m, i: b.put(narinfo_key(i.path), b"\xff" * 100)),
    "too large": ("damaged", lambda b, m, i: b.put(narinfo_key(i.path), i.render() + b"X: y\n" * (1 << 18))),
    "unsigned": ("damaged", lambda b, m, i: edit(b, i, signatures=())),
    "its own fields unsigned": ("damaged", lambda b, m, i: edit(b, i, own_signatures=())),
    "wrongly signed in our name": ("damaged", lambda b, m, i: edit(b, i, nar_size=i.nar_size + 1)),
    "a stranger's": ("untrusted", lambda b, m, i: sign_again(b, i, STRANGER)),
    "a revoked key's of the same name": ("untrusted", lambda b, m, i: sign_again(b, i, REVOKED)),
}


@pytest.mark.parametrize("harm", NARINFO_HARMS)
def test_what_is_wrong_with_a_narinfo_is_found(backend: Backend, made: Made, harm: str) -> None:
    push(backend, made)
    info = narinfo(backend, made)
    kind, act = NARINFO_HARMS[harm]
    act(backend, made, info)
    for deep in (False, True):
        findings = found(backend, deep=deep)
        assert (kind, narinfo_key(info.path)) in kinds(findings)
        assert len(findings) == 1, findings
        assert findings[0].detail


def test_a_narinfo_in_anothers_place_is_damaged(backend: Backend, made: Made) -> None:
    push(backend, made)
    elsewhere = f"{'a' * 32}.narinfo"
    backend.put(elsewhere, read(backend, narinfo_key(made.info.path)))
    findings = found(backend)
    assert kinds(findings) == [("damaged", elsewhere)]
    assert str(made.info.path) in findings[0].detail


def test_good_signatures_among_others_are_enough_and_too_few_are_no_damage(backend: Backend, made: Made) -> None:
    push(backend, made)
    sign_again(backend, narinfo(backend, made), STRANGER, keep=True)
    assert found(backend) == []
    other = SigningKey.generate("other-1")
    strict = cache_of(backend, other, required=2)
    assert {kind for kind, _ in kinds(found(backend, cache=strict))} == {"untrusted"}
    sign_again(backend, narinfo(backend, made), other, keep=True)
    assert kinds(found(backend, cache=strict)) == [("untrusted", f"build/{made.info.build_key}.json")]


def test_a_missing_and_a_cut_nar_are_found(backend: Backend, made: Made) -> None:
    push(backend, made)
    info = narinfo(backend, made)
    backend.put(info.url, read(backend, info.url)[:-1])
    assert kinds(found(backend, deep=False)) == [("damaged-nar", info.url)]
    assert kinds(found(backend, deep=True)) == [("damaged-nar", info.url)]
    backend.delete([info.url])
    assert kinds(found(backend, deep=False)) == [("missing-nar", narinfo_key(info.path))]


def test_what_the_place_says_of_a_nar_is_compared(made: Made) -> None:
    backend = MemoryBackend()
    push(backend, made)
    info = narinfo(backend, made)
    backend.put(info.url, flipped(read(backend, info.url)), sha256=FileHash.of(b"other"))
    assert kinds(found(backend, deep=False)) == [("damaged-nar", info.url)]


def deep_only(tmp_path: Path, made: Made) -> dict[str, tuple[bytes, dict[str, object]]]:
    """Contents of the right announced size, and what the narinfo says of them."""
    good = packed(made.tree)
    zipped = b"".join(nar.compress([good]))
    more = b"".join(nar.compress([good, b"more"]))
    other = flipped(good)
    return {
        "bits rotted": (flipped(zipped), {}),
        "all zero": (bytes(len(zipped)), {}),
        "another nar": (b"".join(nar.compress([other])), {}),
        "a nar and more": (more, {"file_size": len(more), "file_hash": FileHash.of(more)}),
        "trailing bytes": (zipped + b"x", {"file_size": len(zipped) + 1, "file_hash": FileHash.of(zipped + b"x")}),
        "another file hash": (zipped, {"file_hash": FileHash.of(b"")}),
        "not compressed": (other, {"compression": "none", "file_size": len(good), "file_hash": FileHash.of(other)}),
        "no sizes": (other, {"compression": "none", "file_size": None, "file_hash": None}),
        "longer": (good + b"x", {"compression": "none", "file_size": None, "file_hash": None}),
    }


CONTENTS = (
    "bits rotted",
    "all zero",
    "another nar",
    "a nar and more",
    "trailing bytes",
    "another file hash",
    "not compressed",
    "no sizes",
    "longer",
)


@pytest.mark.parametrize("harm", CONTENTS)
def test_a_wrong_nar_is_found_by_reading_it(backend: Backend, made: Made, tmp_path: Path, harm: str) -> None:
    push(backend, made)
    content, changes = deep_only(tmp_path, made)[harm]
    info = narinfo(backend, made)
    edit(backend, info, **changes)
    backend.put(info.url, content)
    if harm != "another nar":  # which may be of another size
        assert found(backend, deep=False) == []
    findings = found(backend, deep=True)
    assert kinds(findings) == [("damaged-nar", info.url)]
    assert findings[0].path == made.info.path


def test_a_damaged_nar_is_told_for_each_that_needs_it(backend: Backend, tmp_path: Path) -> None:
    one, two = make(tmp_path, "one", b"same"), make(tmp_path, "two", b"same")
    push(backend, one)
    push(backend, two)
    url = narinfo(backend, one).url
    backend.put(url, flipped(read(backend, url)))
    findings = found(backend)
    assert {(finding.key, finding.path) for finding in findings} == {(url, one.info.path), (url, two.info.path)}


def test_a_missing_reference_is_told_once(backend: Backend, tmp_path: Path) -> None:
    lib = make(tmp_path, "lib", b"lib")
    push(backend, referring(make(tmp_path, "one", b"one"), lib))
    push(backend, referring(make(tmp_path, "two", b"two"), lib))
    findings = found(backend, deep=False)
    assert kinds(findings) == [("missing-reference", narinfo_key(lib.info.path))]
    assert findings[0].path == lib.info.path


def test_wrong_records_are_found(backend: Backend, made: Made) -> None:
    push(backend, made)
    drv, build = f"drv/{made.info.drv_hash}.json", f"build/{made.info.build_key}.json"
    record = json.loads(read(backend, build))
    backend.put(drv, made.derivation + b" ")
    assert kinds(found(backend, deep=False)) == [("damaged", drv)]
    backend.put(drv, made.derivation)
    for content, kind in (
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"x" * (1 << 17), "damaged"),
        (json.dumps(record | {"signatures": []}).encode(), "damaged"),
        (json.dumps(record | {"signatures": [STRANGER.sign(b"x")]}).encode(), "untrusted"),
        (json.dumps(record | {"signatures": [KEY.sign(b"x")]}).encode(), "damaged"),
        (json.dumps(record | {"realization": record["realization"] | {"nar_size": 9}}).encode(), "damaged"),
    ):
        backend.put(build, content)
        assert kinds(found(backend, deep=False)) == [(kind, build)], content


def test_a_build_record_agrees_with_its_narinfo(backend: Backend, tmp_path: Path) -> None:
    one, other = make(tmp_path, "x", b"one"), make(tmp_path, "x", b"two")
    elsewhere = MemoryBackend()
    push(backend, one)
    push(elsewhere, other)
    build = f"build/{one.info.build_key}.json"
    backend.put(build, read(elsewhere, build))
    assert kinds(found(backend)) == [("damaged", build)]
    assert "does not agree" in found(backend)[0].detail


def test_what_nobody_needs_is_told_when_no_push_can_be_about_to_need_it(tmp_path: Path) -> None:
    for place in (MemoryBackend(time.time), DirectoryBackend(tmp_path / "cache")):
        made = make(tmp_path / place.url.partition(":")[0])
        push(place, made)
        mine = belongings(place, made)
        place.delete([narinfo_key(made.info.path)])
        assert found(place) == []
        grow_old(place, MONTH)
        assert {finding.key for finding in found(place)} == mine - {narinfo_key(made.info.path)}
        assert {finding.kind for finding in found(place)} == {"orphan"}


def test_what_goes_meanwhile_is_no_finding(made: Made) -> None:
    class Collected(MemoryBackend):
        def list(self, prefix: str = "") -> object:  # type: ignore[override]
            entries = list(super().list(prefix))
            self.entries.clear()
            return iter(entries)

    backend = Collected()
    push(backend, made)
    assert found(backend) == []


def test_a_thousand_objects_need_little_memory(tmp_path: Path) -> None:
    backend = MemoryBackend()
    template = make(tmp_path)
    push(backend, template)
    info = replace(narinfo(backend, template), drv_hash=None, build_key=None, origin=None, own_signatures=())
    info = replace(info, signatures=())
    for number in range(1000):
        path = StorePath(f"{number:032d}", "x")
        backend.put(narinfo_key(path), replace(info, path=path).signed(KEY).render())
    backend.log.clear()
    tracemalloc.start()
    try:
        findings = found(backend)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert findings == []
    assert peak < 64 << 20


# --- mending ----------------------------------------------------------------------------------------------------------


def source_of(*objects: Made) -> Callable[[StorePath], HeldObject | None]:
    held = {made.info.path: HeldObject(made.info, made.tree, made.derivation, made.log) for made in objects}
    return held.get


def mended(backend: Backend, *objects: Made) -> list[RepairResult]:
    return list(repair(cache_of(backend), found(backend), source_of(*objects)))


def harms(tmp_path: Path, made: Made) -> dict[str, Harm]:
    drv, build = f"drv/{made.info.drv_hash}.json", f"build/{made.info.build_key}.json"
    named = {name: act for name, (kind, act) in NARINFO_HARMS.items() if kind == "damaged"}
    return named | {
        "nar gone": lambda b, m, i: b.delete([i.url]),
        "nar cut": lambda b, m, i: b.put(i.url, b"cut"),
        "nar rotted": lambda b, m, i: b.put(i.url, flipped(read(b, i.url)), sha256=i.file_hash),
        "derivation rotted": lambda b, m, i: b.put(drv, b"{}"),
        "build record rotted": lambda b, m, i: b.put(build, b"{}"),
    }


HARMS = (
    *(name for name, (kind, _) in NARINFO_HARMS.items() if kind == "damaged"),
    "nar gone",
    "nar cut",
    "nar rotted",
    "derivation rotted",
    "build record rotted",
)


@pytest.mark.parametrize("harm", HARMS)
def test_what_the_source_has_is_pushed_again(backend: Backend, made: Made, tmp_path: Path, harm: str) -> None:
    push(backend, made)
    before = {key: read(backend, key) for key in keys(backend)}
    harms(tmp_path, made)[harm](backend, made, narinfo(backend, made))
    done = mended(backend, made)
    assert len(done) == 1
    if done[0].finding.path is None:  # nothing says any more whose it was
        assert done[0].action == "removed"
        push(backend, made)
    else:
        assert done[0].action == "pushed", done
    assert found(backend) == []
    assert {key: read(backend, key) for key in keys(backend)} == before
    got = CacheReader(backend, TrustedKeys([KEY.public]))
    info = got.query(made.info.path)
    assert info is not None
    got.fetch(info, tmp_path / "dest")


@pytest.mark.parametrize("harm", HARMS)
def test_what_nobody_has_goes_and_can_be_pushed_by_others(
    backend: Backend, made: Made, tmp_path: Path, harm: str
) -> None:
    push(backend, made)
    harms(tmp_path, made)[harm](backend, made, narinfo(backend, made))
    done = mended(backend)
    assert [each.action for each in done] == ["removed"]
    assert found(backend) == []
    push(backend, made)
    assert found(backend) == [], harm


def test_a_source_that_is_damaged_itself_is_none(backend: Backend, made: Made) -> None:
    push(backend, made)
    backend.delete([narinfo(backend, made).url])
    (made.tree / "bin" / "run").write_bytes(b"changed")
    assert [each.action for each in mended(backend, made)] == ["removed"]
    assert found(backend) == []


def test_a_missing_reference_is_pushed_or_left(backend: Backend, tmp_path: Path) -> None:
    lib = make(tmp_path, "lib", b"lib")
    app = referring(make(tmp_path, "app", b"app"), lib)
    push(backend, app)
    assert [each.action for each in mended(backend)] == ["left"]
    assert narinfo_key(app.info.path) in keys(backend)
    assert [each.action for each in mended(backend, lib)] == ["pushed"]
    assert found(backend) == []


def test_a_nar_that_two_need_is_mended_for_both_at_once(backend: Backend, tmp_path: Path) -> None:
    one, two = make(tmp_path, "one", b"same"), make(tmp_path, "two", b"same")
    push(backend, one)
    push(backend, two)
    url = narinfo(backend, one).url
    good = read(backend, url)
    backend.put(url, flipped(good))
    assert sorted(each.action for each in mended(backend, one)) == ["pushed", "sound"] or found(backend) == []
    assert read(backend, url) == good
    backend.put(url, flipped(good))
    assert [each.action for each in mended(backend)] == ["removed", "removed"]
    assert {key for key in keys(backend) if key.endswith(".narinfo")} == set()


def test_what_others_have_signed_is_never_touched(backend: Backend, made: Made) -> None:
    new_cache(backend, TrustedKeys([STRANGER.public]), STRANGER).push(made.info, made.tree)
    before = {key: read(backend, key) for key in keys(backend)}
    done = mended(backend, made)
    assert {each.action for each in done} == {"left"}
    assert len(done) == 2  # narinfo and build record
    assert {key: read(backend, key) for key in keys(backend)} == before


def test_another_result_than_ours_that_nobody_can_have_any_more_gives_way(backend: Backend, tmp_path: Path) -> None:
    theirs, ours = make(tmp_path, "x", b"theirs"), make(tmp_path, "x", b"ours")
    push(backend, theirs)
    backend.delete([narinfo(backend, theirs).url, f"build/{theirs.info.build_key}.json"])
    assert [each.action for each in mended(backend, ours)] == ["pushed"]
    assert narinfo(backend, ours).nar_hash == ours.info.nar_hash


def test_what_was_mended_meanwhile_is_left_alone(backend: Backend, made: Made) -> None:
    push(backend, made)
    url = narinfo(backend, made).url
    good = read(backend, url)
    backend.put(url, flipped(good))
    findings = found(backend)
    backend.put(url, good)
    done = list(repair(cache_of(backend), findings, source_of()))
    assert [each.action for each in done] == ["sound"]
    assert narinfo_key(made.info.path) in keys(backend)


def test_orphans_are_left_to_who_collects_them(made: Made) -> None:
    backend = MemoryBackend(time.time)
    push(backend, made)
    backend.delete([narinfo_key(made.info.path)])
    grow_old(backend, MONTH)
    before = keys(backend)
    assert {each.action for each in mended(backend, made)} == {"left"}
    assert keys(backend) == before


def test_without_a_key_nothing_is_pushed(backend: Backend, made: Made) -> None:
    push(backend, made)
    backend.delete([narinfo(backend, made).url])
    reader = CacheReader(backend, TrustedKeys([KEY.public]))
    with pytest.raises(UsageError, match="no key"):
        list(repair(CacheWriter(reader), found(backend), source_of(made)))
    assert narinfo_key(made.info.path) in keys(backend)
