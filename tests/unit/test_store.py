"""The local store: what is registered, found, kept, collected and reported, and which errors it gives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests import PATIENCE_SECS
from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.config import Config
from vzrepro.base.errors import HashMismatch, Interrupted, NotDeterministic, UsageError, VzreproError
from vzrepro.base.model import (
    BuildKey,
    Derivation,
    DrvHash,
    FileHash,
    ObjectInfo,
    Outcome,
    StorePath,
    canonical_json,
    store_path,
)
from vzrepro.realize.maker import Maker
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import OLD_SECS, LocalStore
from vzrepro.store.staged import StagedLinks

NOW = 1_800_000_000


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store", clock=clock) as store:
        yield store


def path_of(name: str) -> StorePath:
    return store_path(DrvHash.of(name.encode()), name)


def put(
    store: LocalStore,
    name: str,
    content: str = "content",
    *,
    build_key: str | None = None,
    references: tuple[StorePath, ...] = (),
    origin: FileHash | None = None,
    repair: bool = False,
) -> ObjectInfo:
    """Register a small tree under `name`."""
    with store.scratch("test") as scratch:
        source = scratch / "source"
        (source / "sub").mkdir(parents=True)
        (source / "file").write_text(content)
        (source / "sub" / "tool").write_text("#!/bin/sh\n")
        (source / "sub" / "tool").chmod(0o755)
        (source / "link").symlink_to("sub/tool")
        nar_hash, nar_size, _ = nar.canonical_copy(source, scratch / "out")
        info = ObjectInfo(
            path=path_of(name),
            nar_hash=nar_hash,
            nar_size=nar_size,
            references=references,
            drv_hash=DrvHash.of(name.encode()),
            build_key=None if build_key is None else BuildKey.of(build_key.encode()),
            origin=origin,
        )
        return (store.replace if repair else store.add)(scratch / "out", info)


def damage(store: LocalStore, info: ObjectInfo, file: str = "file") -> Path:
    """Change one bit of a file, leaving its size, mode and times alone."""
    path = store.location(info.path) / file
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    path.chmod(0o444)
    os.utime(path, (1, 1))
    return path


# --- objects


def test_a_store_that_does_not_exist_is_empty_and_stays_absent(store: LocalStore) -> None:
    path = path_of("x")
    assert store.query(path) is None
    assert store.query_many([path]) == {}
    assert store.by_build_key(BuildKey.of(b"k")) is None
    assert store.derivation(DrvHash.of(b"d")) is None
    assert store.roots() == []
    assert store.verify() == []
    assert store.gc().deleted == ()
    store.sweep()
    assert not store.root.exists()


def test_an_object_is_found_again_with_all_that_was_registered(store: LocalStore) -> None:
    other = put(store, "other")
    info = put(store, "tool-1.0", build_key="k", references=(other.path,), origin=FileHash.of(b"urls"))
    assert store.query(info.path) == info
    assert info.references == (other.path,)
    with LocalStore(store.root) as again:
        assert again.query_many([info.path, other.path, path_of("absent")]) == {info.path: info, other.path: other}
    assert store.location(info.path) == store.root / info.path.base
    assert (store.location(info.path) / "file").read_text() == "content"
    assert store.verify() == []


@pytest.mark.parametrize("kind", ["file", "link"])
def test_an_object_may_be_a_file_or_a_link(store: LocalStore, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    if kind == "file":
        source.write_text("x")
    else:
        source.symlink_to("nowhere")
    with store.scratch("t") as scratch:
        nar_hash, size, _ = nar.canonical_copy(source, scratch / "out")
        info = store.add(scratch / "out", ObjectInfo(path_of("single"), nar_hash, size))
    assert store.query(info.path) == info
    assert store.verify() == []


def test_an_object_lost_from_the_disk_is_absent_and_can_be_added_again(store: LocalStore) -> None:
    info = put(store, "x", build_key="k")
    disk.remove_tree(store.location(info.path))
    assert store.query(info.path) is None
    assert info.build_key is not None
    assert store.by_build_key(info.build_key) is None
    assert [(finding.kind, finding.path) for finding in store.verify()] == [("missing", info.path)]
    assert put(store, "x", "something else").nar_hash != info.nar_hash
    assert store.verify() == []


def test_the_first_object_stays_when_the_same_is_added_again(store: LocalStore) -> None:
    first = put(store, "x")
    inode = store.location(first.path).stat().st_ino
    with store.scratch("t") as scratch:
        store.copy_object(first.path, scratch / "out")
        second = store.add(scratch / "out", replace(first, outcome=Outcome.SUBSTITUTED))
    assert second == first
    assert store.location(first.path).stat().st_ino == inode


def test_another_content_for_the_same_path_is_refused_with_both_hashes(store: LocalStore) -> None:
    first = put(store, "x")
    with pytest.raises(NotDeterministic) as caught:
        put(store, "x", "other")
    assert first.nar_hash.nix in str(caught.value)
    assert str(first.path) in caught.value.message
    assert store.verify() == []
    with pytest.raises(NotDeterministic):
        put(store, "x", "other", repair=True)
    assert store.query(first.path) == first


def test_of_many_that_come_at_once_one_fails_alone(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a transaction, as the first of them keeps the others waiting for the disk."""
    wrong = put(store, "wrong")
    commits = 0
    real = disk.sync_trees

    def slow(trees: Sequence[Path]) -> None:
        nonlocal commits
        commits += 1
        threading.Event().wait(0.2)
        real(trees)

    monkeypatch.setattr(disk, "sync_trees", slow)

    def enter(name: str) -> ObjectInfo | None:
        try:
            return put(store, name, "other" if name == "wrong" else name)
        except NotDeterministic:
            return None

    names = ["wrong", *(f"right-{number}" for number in range(12))]
    with ThreadPoolExecutor(len(names)) as pool:
        entered = dict(zip(names, pool.map(enter, names), strict=True))
    assert [name for name, info in entered.items() if info is None] == ["wrong"]
    assert commits < len(names)
    assert {info.path.name for info in store.objects()} == set(names)
    assert store.query(wrong.path) == wrong
    assert store.verify() == []


def test_when_the_transaction_of_many_fails_all_of_them_hear_of_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store, "before")

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "sync", full)
    outcomes = []

    def enter(name: str) -> None:
        with pytest.raises(VzreproError, match="disk is full"):
            put(store, name)
        outcomes.append(name)

    names = [f"object-{number}" for number in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(enter, names))
    monkeypatch.undo()
    assert sorted(outcomes) == names
    assert [info.path.name for info in store.objects()] == ["before"]
    assert store.verify() == []
    assert put(store, names[0]) in store.objects()


def test_an_unregistered_tree_in_the_way_gives_way(store: LocalStore) -> None:
    put(store, "first")
    location = store.location(path_of("x"))
    location.mkdir()
    (location / "junk").write_text("half an object")
    location.chmod(0o555)
    put(store, "x")
    assert store.verify() == []


@pytest.mark.parametrize("swap", [True, False])
def test_replace_mends_a_corrupt_object(store: LocalStore, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    info = put(store, "x")
    damage(store, info)
    assert store.verify()
    assert put(store, "x", repair=True) == info
    assert store.verify() == []
    assert list((store.root / ".vzrepro" / "tmp").iterdir()) == []


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("repair", [True, False])
def test_a_failed_registration_leaves_everything_as_it_was(
    store: LocalStore, swap: bool, repair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    info = put(store, "x")
    damage(store, info)
    bad = (store.location(info.path) / "file").read_bytes()

    sync = disk.sync

    def fail(path: Path) -> None:
        if path == store.root:  # the tree is in place, and about to be registered
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(disk, "sync", fail)
    with pytest.raises(OSError, match="Input/output"):
        put(store, "x" if repair else "y", repair=repair)
    assert (store.location(info.path) / "file").read_bytes() == bad
    assert store.query(info.path) == info
    assert not store.location(path_of("y")).exists()
    assert [finding.kind for finding in store.verify()] == ["corrupt"]


def test_the_same_work_is_found_by_its_build_key(store: LocalStore) -> None:
    info = put(store, "old-name", build_key="work")
    assert store.by_build_key(BuildKey.of(b"work")) == info
    assert store.by_build_key(BuildKey.of(b"other work")) is None
    copy = put(store, "new-name", build_key="work")
    disk.remove_tree(store.location(info.path))
    assert store.by_build_key(BuildKey.of(b"work")) == copy


def test_a_copy_is_canonical_and_independent(store: LocalStore, tmp_path: Path) -> None:
    info = put(store, "x")
    store.copy_object(info.path, tmp_path / "copy")
    assert nar.nar_hash(tmp_path / "copy")[0] == info.nar_hash
    assert not (tmp_path / "copy" / "file").samefile(store.location(info.path) / "file")


def test_a_corrupt_object_is_not_copied(store: LocalStore, tmp_path: Path) -> None:
    info = put(store, "x")
    damage(store, info)
    with pytest.raises(HashMismatch, match="corrupt") as caught:
        store.copy_object(info.path, tmp_path / "copy")
    assert caught.value.hint == f"vzrepro store repair {info.path}"
    with pytest.raises(HashMismatch, match="not in the store"):
        store.copy_object(path_of("absent"), tmp_path / "other")


def test_a_download_may_be_verified_from_several_origins(store: LocalStore) -> None:
    first, second, third = (FileHash.of(text) for text in (b"1", b"2", b"3"))
    info = put(store, "x", origin=first)
    put(store, "y", origin=third)
    assert store.known_origin(info.path, first)
    assert not store.known_origin(info.path, second)
    store.add_origin(info.path, second)
    assert store.known_origin(info.path, first)
    assert store.known_origin(info.path, second)
    assert not store.known_origin(info.path, third)
    found = store.query(info.path)
    assert found is not None
    assert found.origin == second
    put(store, "x", origin=third)
    assert store.known_origin(info.path, third)


def test_references_referrers_and_closure(store: LocalStore) -> None:
    base = put(store, "base").path
    middle = put(store, "middle", references=(base,)).path
    itself = path_of("top")
    put(store, "top", references=tuple(sorted((middle, base, itself))))
    assert store.references(itself) == tuple(sorted((middle, base, itself)))
    assert store.referrers(base) == tuple(sorted((middle, itself), key=lambda path: path.base))
    assert store.closure([itself]) == (base, middle, itself)
    assert store.closure([middle]) == (base, middle)


def test_more_paths_than_a_statement_takes(store: LocalStore) -> None:
    infos = [put(store, f"x{i}") for i in (1, 2)]
    absent = [path_of(f"absent{i}") for i in range(1200)]
    paths = [infos[0].path, *absent, infos[1].path]
    assert store.query_many(paths) == {info.path: info for info in infos}


# --- derivations, history, logs


def test_derivations_are_found_by_hash_and_by_name_newest_first(store: LocalStore, clock: Clock) -> None:
    def keep(name: str, version: str) -> tuple[DrvHash, bytes]:
        derivation = Derivation(name=name, builder="sandbox", version=version)
        canonical = canonical_json(derivation.document())
        store.put_derivation(derivation.drv_hash(), derivation.name, canonical)
        clock.now += 1
        return derivation.drv_hash(), canonical

    old, new = keep("tool", "1"), keep("tool", "2")
    keep("other", "1")
    assert store.derivation(old[0]) == old[1]
    assert json.loads(old[1])["version"] == "1"
    assert store.derivations_named("tool") == [(*new, NOW + 1), (*old, NOW)]
    keep("tool", "1")
    assert store.derivations_named("tool") == [(*old, NOW + 3), (*new, NOW + 1)]


def test_the_expected_time_is_the_median_of_the_last_five(store: LocalStore) -> None:
    assert store.expected_secs("tool", "build") is None
    for secs in (1000.0, 1.0, 5.0, 2.0, 4.0, 3.0):
        store.record_history("tool", "build", secs, 10)
    store.record_history("tool", "fetch", 77.0, None)
    assert store.expected_secs("tool", "build") == 3.0
    assert store.expected_secs("tool", "fetch") == 77.0
    assert store.expected_secs("other", "build") is None


# --- scratch directories


def test_a_scratch_directory_is_private_and_goes_with_whatever_is_in_it(store: LocalStore) -> None:
    with store.scratch("a/b c") as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o700
        deep = scratch
        for _ in range(30):
            deep = deep / "directory"
            deep.mkdir()
        (deep / "file").write_text("x")
        (scratch / "read-only").mkdir()
        (scratch / "read-only" / "file").write_text("x")
        (scratch / "read-only").chmod(0o555)
        (scratch / "link").symlink_to("/")
        store.sweep()
        assert (deep / "file").exists()
    assert not scratch.exists()


def test_trees_deeper_than_path_names_reach_are_removed(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    fds = [os.open(tree, os.O_RDONLY)]
    for _ in range(300):
        os.mkdir("d" * 100, dir_fd=fds[-1])
        fds.append(os.open("d" * 100, os.O_RDONLY, dir_fd=fds[-1]))
        os.close(fds.pop(0))
    os.close(fds[-1])
    disk.remove_tree(tree)
    assert not tree.exists()
    disk.remove_tree(tree)


def test_a_scratch_directory_can_be_kept_until_it_is_old(store: LocalStore, clock: Clock) -> None:
    with store.scratch("failed") as scratch:
        (scratch / "build").mkdir()
        kept = store.keep(scratch)
    clock.now = kept.stat().st_mtime + OLD_SECS - 1
    store.sweep()
    store.gc()
    assert (kept / "build").is_dir()
    clock.now = kept.stat().st_mtime + OLD_SECS + 1
    store.gc()
    assert not kept.exists()


def test_the_scratch_directory_goes_when_its_block_fails(store: LocalStore) -> None:
    with pytest.raises(RuntimeError), store.scratch("x") as scratch:
        raise RuntimeError
    assert not scratch.exists()


def test_sweep_removes_what_nobody_owns_and_leaves_the_rest(store: LocalStore) -> None:
    info = put(store, "x")
    tmp = store.root / ".vzrepro" / "tmp"
    (tmp / "dead.00.scratch" / "build").mkdir(parents=True)
    (tmp / "00.trash").mkdir()
    leftover, locked = store.location(path_of("leftover")), store.location(path_of("locked"))
    for path in (leftover, locked):
        path.mkdir(mode=0o555)
    (store.root / "README").write_text("somebody's")
    with store.lock(path_of("locked"), "test", lambda _: None), store.scratch("alive") as scratch:
        store.sweep()
        assert list(tmp.iterdir()) == [scratch]
        assert not leftover.exists()
        assert locked.exists()
    assert (store.root / "README").exists()
    assert store.query(info.path) == info
    store.sweep()
    assert not locked.exists()


# --- locks


def test_the_second_waits_for_the_first_and_says_for_whom(store: LocalStore) -> None:
    path = path_of("x")
    events: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        def on_wait(holder: str) -> None:
            events.append(holder)
            waiting.set()

        with store.lock(path, "second", on_wait):
            events.append("second has it")

    with store.lock(path, "build x", events.append):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(PATIENCE_SECS)
        events.append("first is done")
    thread.join(PATIENCE_SECS)
    assert events == [f"pid {os.getpid()} (build x)", "first is done", "second has it"]
    assert list((store.root / ".vzrepro" / "lock").iterdir()) == []


def test_waiting_can_be_cancelled(store: LocalStore) -> None:
    cancelled = threading.Event()
    with (
        store.lock(path_of("x"), "first", lambda _: None),
        pytest.raises(Interrupted),
        store.lock(path_of("x"), "second", lambda _: cancelled.set(), cancelled=cancelled),
    ):
        pytest.fail("the lock was given twice")


def test_many_threads_take_turns(store: LocalStore) -> None:
    inside, worst = 0, 0

    def work() -> None:
        nonlocal inside, worst
        for _ in range(5):
            with store.lock(path_of("x"), "t", lambda _: None):
                inside += 1
                worst = max(worst, inside)
                store.sweep()
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == 1


def test_a_lock_file_that_goes_away_meanwhile_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        (tmp_path / "lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert disk.try_lock(tmp_path / "lock") is None
    monkeypatch.undo()
    fd = disk.try_lock(tmp_path / "lock")
    assert fd is not None
    assert disk.try_lock(tmp_path / "lock") is None
    assert disk.held(tmp_path / "lock")
    os.close(fd)
    assert not disk.held(tmp_path / "lock")
    assert not disk.held(tmp_path / "absent")


def test_threads_share_a_store(store: LocalStore) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(5):
                info = put(store, f"x{number}-{i}")
                assert store.query(info.path) == info
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.verify() == []


# --- roots and collection


def test_gc_keeps_what_a_link_points_to_and_its_closure(store: LocalStore, tmp_path: Path) -> None:
    base = put(store, "base")
    top = put(store, "top", references=(base.path,))
    loose = put(store, "loose")
    link = tmp_path / "links" / "result"
    store.add_root(link, top.path)
    assert link.samefile(store.location(top.path))
    assert [(root.source, root.path) for root in store.roots()] == [(str(link), top.path)]

    planned = store.gc(dry_run=True)
    assert store.query(loose.path) == loose
    report = store.gc()
    assert report == planned
    assert (report.deleted, report.freed, report.kept) == ((loose.path,), loose.nar_size, {"out-link": 2})
    assert not store.location(loose.path).exists()
    assert store.verify() == []


@pytest.mark.parametrize("change", ["remove", "elsewhere", "other object"])
def test_a_link_that_no_longer_points_to_the_object_is_no_root(store: LocalStore, tmp_path: Path, change: str) -> None:
    info, other = put(store, "x"), put(store, "y")
    link = tmp_path / "result"
    store.add_root(link, info.path)
    link.unlink()
    if change == "elsewhere":
        link.symlink_to(tmp_path)
    if change == "other object":
        link.symlink_to(store.location(other.path))
    assert [root.path for root in store.roots()] == ([other.path] if change == "other object" else [])
    assert info.path in store.gc().deleted


def test_an_out_link_replaces_links_only(store: LocalStore, tmp_path: Path) -> None:
    one, two = put(store, "one"), put(store, "two")
    link = tmp_path / "result"
    store.add_root(link, one.path)
    store.add_root(link, two.path)
    assert [root.path for root in store.roots()] == [two.path]
    precious = tmp_path / "precious"
    precious.write_text("mine")
    with pytest.raises(UsageError, match="no symbolic link"):
        store.add_root(precious, one.path)
    assert precious.read_text() == "mine"


def test_what_a_running_process_holds_stays(store: LocalStore) -> None:
    base = put(store, "base")
    info = put(store, "x", references=(base.path,))
    with LocalStore(store.root) as other:
        other.hold([info.path, path_of("not-built-yet")])
        assert {root.path for root in store.roots()} == {info.path, path_of("not-built-yet")}
        assert store.roots()[0].source == f"process {os.getpid()}"
        store.sweep()
        assert store.gc().kept == {"in use": 2}
    assert store.roots() == []
    assert set(store.gc().deleted) == {info.path, base.path}


def test_what_others_download_is_left_alone(store: LocalStore) -> None:
    """Each process holds what it wants before it downloads that."""
    maker = Maker(store, cast(Config, None), cast(Mirrors, None), None, store.add)
    part = store.root / ".vzrepro" / "downloads" / "file.part"
    store.hold([path_of("ours")])
    part.parent.mkdir()
    part.touch()
    with LocalStore(store.root) as other:
        assert not store.is_shared()
        other.hold([path_of("theirs")])
        assert store.is_shared()
        maker.clear_downloads()
        assert part.exists()
    assert not store.is_shared()
    maker.clear_downloads()
    assert not part.parent.exists()


def test_temp_roots_of_a_dead_process_do_not_count(store: LocalStore) -> None:
    info = put(store, "x")
    child = os.fork()
    if child == 0:
        LocalStore(store.root).hold([info.path])
        os._exit(0)
    os.waitpid(child, 0)
    assert store.roots() == []
    assert store.gc().deleted == (info.path,)
    with sqlite3.connect(store.root / ".vzrepro" / "db.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM temp_roots").fetchone() == (0,)


def test_gc_keeps_what_is_being_made_and_what_is_recent(store: LocalStore, clock: Clock) -> None:
    old, locked = put(store, "old"), put(store, "locked")
    clock.now += 100
    recent = put(store, "recent")
    with store.lock(locked.path, "rebuild", lambda _: None):
        report = store.gc(keep_newer_than=NOW + 50)
    assert report.deleted == (old.path,)
    assert report.kept == {"being made": 1, "recent": 1}
    assert store.query(recent.path) == recent


def test_gc_drops_old_logs_and_derivations_without_object(store: LocalStore, clock: Clock) -> None:
    info = put(store, "kept")
    store.hold([info.path])
    derivations = [Derivation(name=name, builder="sandbox") for name in ("kept", "gone")]
    for derivation in derivations:
        store.put_derivation(derivation.drv_hash(), derivation.name, canonical_json(derivation.document()))
    kept_log, old_log = store.log_path(info.path), store.log_path(path_of("gone"))
    for log in (kept_log, old_log):
        log.write_text("built")
    clock.now = old_log.stat().st_mtime + OLD_SECS - 1
    store.gc()
    assert old_log.exists()
    clock.now = max(clock.now, NOW + OLD_SECS) + 2
    store.gc()
    assert kept_log.exists()
    assert not old_log.exists()
    assert store.derivations_named("gone") == []


def test_gc_leaves_foreign_entries(store: LocalStore) -> None:
    put(store, "x")
    (store.root / "notes.txt").write_text("mine")
    store.gc()
    assert (store.root / "notes.txt").exists()


# --- verify


def state(root: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_mode)
        for path in root.rglob("*")
        if ".vzrepro" not in path.parts
    }


def flip(store: LocalStore, info: ObjectInfo) -> None:
    damage(store, info)


def drop_a_file(store: LocalStore, info: ObjectInfo) -> None:
    directory = store.location(info.path) / "sub"
    directory.chmod(0o755)
    (directory / "tool").unlink()
    directory.chmod(0o555)


def stage(store: LocalStore, info: ObjectInfo, scratch: Path) -> Path:
    """Link the object's file as a sandbox does that has it as an input."""
    (scratch / "sandbox" / "etc").mkdir(parents=True)
    staged = scratch / "sandbox" / "in" / "name" / "file"
    staged.parent.mkdir(parents=True)
    staged.hardlink_to(store.location(info.path) / "file")
    return staged


def test_inputs_of_builds_are_not_corrupt(store: LocalStore) -> None:
    info = put(store, "a")
    with store.scratch("build") as one, store.scratch("build") as two:
        stage(store, info, one)
        kept = store.keep(two)
        stage(store, info, kept)
        assert store.verify() == []
        (one / "elsewhere").hardlink_to(store.location(info.path) / "file")
        (finding,) = store.verify()
        assert (finding.path, finding.detail) == (info.path, f"{info.path.base}/file: has another hard link")


def test_builds_may_begin_and_end_while_links_are_counted(store: LocalStore) -> None:
    info = put(store, "a")
    file = store.location(info.path) / "file"
    links = StagedLinks(store.root / ".vzrepro" / "tmp")
    with store.scratch("one") as one, store.scratch("two") as two:
        stage(store, info, one)
        before = file.stat()
        later: list[Callable[[], object]] = [lambda: stage(store, info, two)]

        def again() -> os.stat_result:
            while later:
                later.pop()()
            return file.stat()

        assert links.explain(before, again), "a build began"
        assert links.explain(file.stat(), file.stat)
    assert file.stat().st_nlink == 1


def add_a_file(store: LocalStore, info: ObjectInfo) -> None:
    (store.location(info.path) / "sub" / "extra").write_text("x")


def loosen(store: LocalStore, info: ObjectInfo) -> None:
    (store.location(info.path) / "file").chmod(0o644)


def touch(store: LocalStore, info: ObjectInfo) -> None:
    os.utime(store.location(info.path) / "file", (5, 5))


def relink(store: LocalStore, info: ObjectInfo) -> None:
    os.link(store.location(info.path) / "file", store.root.parent / "alias")


def label(store: LocalStore, info: ObjectInfo) -> None:
    try:
        os.setxattr(store.location(info.path) / "file", "user.note", b"x")
    except (OSError, AttributeError):  # the file system, or the system, has none
        pytest.skip("no extended attributes here")


def plant_a_fifo(store: LocalStore, info: ObjectInfo) -> None:
    os.mkfifo(store.location(info.path) / "zzz")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into read-only directories")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip, "content has changed"),
        (drop_a_file, "sub: modified later"),
        (add_a_file, "sub/extra: mode 0644"),
        (loosen, "file: mode 0644"),
        (touch, "file: modified later"),
        (relink, "file: has another hard link"),
        (label, "file: attribute user.note"),
        (plant_a_fifo, "fifo"),
    ],
)
def test_verify_finds_every_change_and_says_where(
    store: LocalStore, change: Callable[[LocalStore, ObjectInfo], None], words: str
) -> None:
    info, intact = put(store, "x"), put(store, "y")
    change(store, info)
    before = state(store.root)
    seen: list[StorePath] = []
    findings = store.verify(progress=seen.append)
    assert [(finding.kind, finding.path) for finding in findings] == [("corrupt", info.path)]
    assert words in findings[0].detail
    assert sorted(seen, key=lambda path: path.base) == sorted((info.path, intact.path), key=lambda path: path.base)
    assert state(store.root) == before
    assert store.verify([intact.path]) == []


def test_verify_reports_foreign_and_unregistered_entries(store: LocalStore) -> None:
    info = put(store, "x")
    (store.root / "notes.txt").write_text("mine")
    store.location(path_of("leftover")).mkdir()
    findings = {finding.name: finding.kind for finding in store.verify()}
    assert findings == {"notes.txt": "foreign", path_of("leftover").base: "unregistered"}
    assert store.verify([info.path]) == []
    assert [finding.kind for finding in store.verify([path_of("absent")])] == ["missing"]


# --- databases


def test_a_newer_database_is_refused(store: LocalStore) -> None:
    info = put(store, "x")
    store.close()
    connection = sqlite3.connect(store.root / ".vzrepro" / "db.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(VzreproError, match="newer vzrepro") as caught:
        store.query(info.path)
    assert "99" in str(caught.value)


def test_a_damaged_database_gives_a_remedy_that_works(store: LocalStore) -> None:
    info = put(store, "x")
    store.close()
    database = store.root / ".vzrepro" / "db.sqlite"
    database.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(VzreproError, match="cannot be used") as caught:
        store.query(info.path)
    assert caught.value.hint is not None
    assert str(database) in caught.value.hint
    for file in database.parent.glob("db.sqlite*"):
        file.unlink()
    assert put(store, "x") == info
    assert store.verify() == []


def test_a_database_whose_creation_was_interrupted_is_made_again(store: LocalStore) -> None:
    database = store.root / ".vzrepro" / "db.sqlite"
    database.parent.mkdir(parents=True)
    database.touch()
    assert store.query(path_of("x")) is None
    info = put(store, "x")
    assert store.query(info.path) == info


def test_a_store_of_the_first_format_goes_on_with_all_it_has(store: LocalStore) -> None:
    info = put(store, "x", build_key="k")
    store.close()
    database = store.root / ".vzrepro" / "db.sqlite"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.executescript("DROP TABLE vouchers; PRAGMA user_version = 1;")
    assert store.query(info.path) == info
    vouched = replace(put(store, "y"), voucher=b"StorePath: ...\n")
    with store.scratch("again") as scratch:
        store.copy_object(vouched.path, scratch / "tree")
        assert store.replace(scratch / "tree", vouched) == vouched
    assert store.query(vouched.path) == vouched


def test_the_schema_matches_its_version(store: LocalStore) -> None:
    put(store, "x")
    with sqlite3.connect(store.root / ".vzrepro" / "db.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)


def test_gc_makes_no_store(store: LocalStore) -> None:
    """Where a full disk has kept it from being made, there may be no room to make it now."""
    assert store.gc().deleted == ()
    store.private.mkdir(parents=True)
    store.database_file.touch()
    assert store.gc().deleted == ()
    assert store.database_file.stat().st_size == 0


@pytest.mark.parametrize(("block", "mode"), [(4096, "wal"), (1024, "delete")])
def test_shared_memory_only_where_a_full_disk_cannot_leave_holes_in_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, block: int, mode: str
) -> None:
    """SQLite writes a byte of each 4 KiB of it; in a hole that no block can be had for, a process ends with SIGBUS."""
    real = os.statvfs(store.root.parent)
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result((block, block, *real[2:])))
    put(store, "x")
    with contextlib.closing(sqlite3.connect(store.database_file)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == (mode,)
    assert store.verify() == []
