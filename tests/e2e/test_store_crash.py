"""The store under kill -9 at every step, on a full and on a read-only disk, and with several processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.crashing import die_at, ended, forked
from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import BuildKey, Derivation, DrvHash, ObjectInfo, StorePath, canonical_json, store_path
from vzrepro.store import LocalStore, ReadOnlyStore

root_on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounting needs root on Linux"
)


def path_of(name: str) -> StorePath:
    return store_path(DrvHash.of(name.encode()), name)


def put(store: LocalStore, name: str, content: bytes = b"content", *, repair: bool = False) -> ObjectInfo:
    with store.scratch("test") as scratch:
        source = scratch / "source"
        (source / "sub").mkdir(parents=True)
        (source / "file").write_bytes(content)
        (source / "sub" / "link").symlink_to("../file")
        nar_hash, nar_size, _ = nar.canonical_copy(source, scratch / "out")
        info = ObjectInfo(path_of(name), nar_hash, nar_size, build_key=BuildKey.of(name.encode()))
        return (store.replace if repair else store.add)(scratch / "out", info)


def killed_at_every_step(prepare: Callable[[int], Callable[[], None]], check: Callable[[int], None]) -> None:
    """For n = 0, 1, …: prepare, run the work with death at step n, check; until the work survives."""
    step = 0
    while True:
        work = prepare(step)

        def doomed(step: int = step, work: Callable[[], None] = work) -> None:
            die_at(step)
            work()

        code = ended(forked(doomed))
        assert code in (0, -signal.SIGKILL)
        check(step)
        if code == 0:
            break
        step += 1
    assert step > 20


def private(store: LocalStore, name: str) -> list[str]:
    return sorted(path.name for path in (store.root / ".vzrepro" / name).iterdir())


def test_kill_while_adding_leaves_a_path_absent_or_correct(memory: Path) -> None:
    derivation = Derivation(name="x", builder="sandbox")

    def work(root: Path) -> None:
        with LocalStore(root) as store:
            store.sweep()
            store.hold([path_of("x")])
            with store.lock(path_of("x"), "build", lambda _: None):
                put(store, "x")
            store.put_derivation(derivation.drv_hash(), derivation.name, canonical_json(derivation.document()))
            store.record_history("x", "build", 1.0, 10)
            put(store, "y")
            store.add_root(root.parent / f"{root.name}-result", path_of("x"))

    def prepare(step: int) -> Callable[[], None]:
        return lambda: work(memory / str(step))

    def check(step: int) -> None:
        with LocalStore(memory / str(step)) as store:
            store.sweep()
            assert store.verify() == []
            if store.root.exists() and (store.root / ".vzrepro" / "lock").exists():
                assert private(store, "tmp") == []
                assert private(store, "lock") == []
            assert all(root.source.startswith("/") for root in store.roots())
        work(memory / str(step))
        with LocalStore(memory / str(step)) as store:
            assert store.verify() == []
            assert set(store.query_many([path_of("x"), path_of("y")])) == {path_of("x"), path_of("y")}
            assert store.gc().deleted == (path_of("y"),)
        disk.remove_tree(memory / str(step))

    killed_at_every_step(prepare, check)


@pytest.mark.parametrize("swap", [True, False])
def test_kill_while_repairing_never_loses_a_right_object(
    memory: Path, swap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)

    def prepare(step: int) -> Callable[[], None]:
        root = memory / str(step)
        with LocalStore(root) as store:
            info = put(store, "x")
            file = store.location(info.path) / "file"
            file.chmod(0o644)
            file.write_bytes(b"CONTENT")
            file.chmod(0o444)

        def work() -> None:
            with LocalStore(root) as store:
                put(store, "x", repair=True)

        return work

    def check(step: int) -> None:
        with LocalStore(memory / str(step)) as store:
            store.sweep()
            kinds = {finding.kind for finding in store.verify()}
            assert kinds <= ({"corrupt"} if swap else {"corrupt", "missing"})
            assert private(store, "tmp") == []
            put(store, "x", repair=True)
            assert store.verify() == []
        disk.remove_tree(memory / str(step))

    killed_at_every_step(prepare, check)


def test_kill_while_collecting_deletes_whole_objects_only(memory: Path) -> None:
    def prepare(step: int) -> Callable[[], None]:
        root = memory / str(step)
        with LocalStore(root) as store:
            for name in ("kept", "loose", "also-loose"):
                put(store, name)
            store.add_root(memory / f"{step}-result", path_of("kept"))

        def work() -> None:
            with LocalStore(root) as store:
                store.gc()

        return work

    def check(step: int) -> None:
        with LocalStore(memory / str(step)) as store:
            store.sweep()
            assert store.verify() == []
            assert private(store, "tmp") == []
            assert store.query(path_of("kept")) is not None
            store.gc()
            entries = sorted(path.name for path in store.root.iterdir())
            assert entries == sorted([".vzrepro", path_of("kept").base])
        disk.remove_tree(memory / str(step))

    killed_at_every_step(prepare, check)


# --- several processes


def test_processes_that_want_the_same_thing_make_it_once(tmp_path: Path) -> None:
    def work() -> None:
        with LocalStore(tmp_path / "store") as store:
            for number in range(5):
                store.hold([path_of(f"x{number}")])
                with store.lock(path_of(f"x{number}"), "build", lambda _: None):
                    if store.query(path_of(f"x{number}")) is None:
                        put(store, f"x{number}")
                        with (tmp_path / "made").open("a") as made:
                            made.write(f"x{number}\n")

    assert [ended(pid) for pid in [forked(work) for _ in range(4)]] == [0] * 4
    assert (tmp_path / "made").read_text().split() == [f"x{number}" for number in range(5)]
    assert LocalStore(tmp_path / "store").verify() == []


def test_processes_that_add_the_same_path_without_asking_agree(tmp_path: Path) -> None:
    def work() -> None:
        with LocalStore(tmp_path / "store") as store:
            for number in range(8):
                put(store, f"x{number}")
                store.sweep()

    assert [ended(pid) for pid in [forked(work) for _ in range(4)]] == [0] * 4
    store = LocalStore(tmp_path / "store")
    assert store.verify() == []
    assert len(store.query_many(path_of(f"x{number}") for number in range(8))) == 8


def test_gc_beside_builds_deletes_nothing_that_is_held(tmp_path: Path) -> None:
    stop = tmp_path / "stop"

    def collect() -> None:
        with LocalStore(tmp_path / "store") as store:
            while not stop.exists():
                store.gc()

    def build(label: str) -> None:
        with LocalStore(tmp_path / "store") as store:
            for number in range(15):
                path = path_of(f"{label}{number}")
                store.hold([path])
                put(store, path.name)
                assert store.query(path) is not None
            held = [path_of(f"{label}{number}") for number in range(15)]
            assert len(store.query_many(held)) == 15
            assert store.verify(held) == []

    collectors = [forked(collect) for _ in range(2)]
    builders = [forked(lambda label=label: build(label)) for label in "ab"]  # type: ignore[misc]
    codes = [ended(pid) for pid in builders]
    stop.touch()
    assert codes + [ended(pid) for pid in collectors] == [0] * 4
    with LocalStore(tmp_path / "store") as store:
        store.gc()
        assert sorted(path.name for path in store.root.iterdir()) == [".vzrepro"]


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        with LocalStore(tmp_path / "store") as store, store.lock(path_of("x"), "doomed", lambda _: None):
            os.write(told, b"!")
            time.sleep(600)

    pid = forked(hold)
    os.read(ready, 1)
    holders: list[str] = []

    def kill(holder: str) -> None:
        holders.append(holder)
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL

    with LocalStore(tmp_path / "store") as store, store.lock(path_of("x"), "next", kill):
        put(store, "x")
    assert holders == [f"pid {pid} (doomed)"]


def test_ctrl_c_ends_the_waiting(tmp_path: Path) -> None:
    with LocalStore(tmp_path / "store") as store, store.lock(path_of("x"), "first", lambda _: None):

        def wait() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            interrupt = lambda _: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
            with (
                pytest.raises(KeyboardInterrupt),
                LocalStore(tmp_path / "store") as other,
                other.lock(path_of("x"), "second", interrupt),
            ):
                os._exit(2)

        assert ended(forked(wait)) == 0


# --- full and read-only disks


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
        return place

    yield mount
    subprocess.run(["umount", "-l", place], check=False)


@root_on_linux
def test_a_full_disk_is_one_clear_error_and_gc_helps(mounted: Callable[[str], Path]) -> None:
    place = mounted("size=12m")
    with LocalStore(place / "store") as store:
        added = []
        with pytest.raises(VzreproError) as caught:
            for number in range(100):
                added.append(put(store, f"x{number}", os.urandom(500_000)).path)
        assert len(added) > 5
        assert caught.value.message == "the disk is full"
        assert caught.value.reason is not None
        assert f"bytes are free on {place}, where the store {store.root} is" in caught.value.reason
        assert caught.value.hint == "vzrepro store gc"
        assert private(store, "tmp") == []
        assert store.verify() == []
        assert set(store.query_many(added)) == set(added)

        filler = place / "filler"
        with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        store.sweep()
        assert set(store.gc().deleted) == set(added)
        put(store, "again", os.urandom(500_000))
        assert store.verify() == []


@root_on_linux
def test_the_disk_may_fill_up_at_any_write(mounted: Callable[[str], Path]) -> None:
    place = mounted("size=6m")
    outcomes = set()
    for free in range(0, 2_000_000, 40_000):
        store = LocalStore(place / "store")
        filler = place / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(place).f_bavail * 4096 - free or 1)
        failed = None
        try:
            store.hold([path_of("x")])
            put(store, "x", os.urandom(300_000))
            store.record_history("x", "build", 1.0, 1)
        except VzreproError as error:
            failed = error
            assert error.message == "the disk is full"
        outcomes.add(failed is None)
        store.close()
        filler.unlink()
        with LocalStore(place / "store") as after:
            after.sweep()
            assert after.verify() == []
            if failed is None:
                assert after.query(path_of("x")) is not None
            put(after, "y")
            assert after.verify() == []
        disk.remove_tree(place / "store")
    assert outcomes == {True, False}


@root_on_linux
@pytest.mark.parametrize("killed", [True, False])
def test_a_read_only_store_answers_and_refuses_clearly(mounted: Callable[[str], Path], killed: bool) -> None:
    place = mounted("size=12m")

    def fill() -> None:
        store = LocalStore(place / "store")
        put(store, "x")
        put(store, "y")
        store.hold([path_of("x")])
        if not killed:
            store.close()

    assert ended(forked(fill)) == 0
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with LocalStore(place / "store") as store:
        store.sweep()
        store.hold([path_of("x")])
        assert set(store.query_many([path_of("x"), path_of("y")])) == {path_of("x"), path_of("y")}
        assert store.by_build_key(BuildKey.of(b"x")) == store.query(path_of("x"))
        assert store.verify() == []
        assert store.roots() == []
        assert len(store.gc(dry_run=True).deleted) == 2
        refused: list[Callable[[], object]] = [
            lambda: put(store, "z"),
            store.gc,
            lambda: store.record_history("x", "build", 1.0, 1),
            lambda: store.lock(path_of("z"), "build", lambda _: None).__enter__(),
            lambda: store.add_root(place / "result", path_of("x")),
        ]
        for attempt in refused:
            with pytest.raises(ReadOnlyStore, match=f"the store {store.root} cannot be written") as caught:
                attempt()
            assert caught.value.hint is not None
    with pytest.raises(ReadOnlyStore):
        put(LocalStore(place / "another"), "x")
    assert LocalStore(place / "another").query(path_of("x")) is None
