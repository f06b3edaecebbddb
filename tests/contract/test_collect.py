"""Collecting garbage: what goes, what stays, and that nothing breaks whatever happens in between."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE_SECS
from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.test_binary_cache import KEY, Made, keys, make
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import NarHash, StorePath, canonical_json
from vzrepro.cache import Backend, CacheWriter, Damaged, DirectoryBackend, Entry, NarInfo, Stream, TrustedKeys, notice
from vzrepro.cache.backend import FRESH_SECS
from vzrepro.cache.collect import Amount, CollectionResult, collect
from vzrepro.cache.layout import KeySet, kind_of
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.notice import NOTICES
from vzrepro.cache.roots import Lacking, add_root, read_roots, remove_root

DAY = 86400.0
MONTH = 30 * DAY


@pytest.fixture(params=["memory", "directory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """A new, empty place whose entries can be made old."""
    return MemoryBackend(time.time) if request.param == "memory" else DirectoryBackend(tmp_path / "cache")


def grow_old(backend: Backend, secs: float, *only: str) -> None:
    """Have all entries, or these, last used so long ago."""
    for entry in list(backend.list()):
        if only and entry.key not in only:
            continue
        if isinstance(backend, MemoryBackend):
            backend.used[entry.key] = entry.mtime - secs
        else:
            path = Path(backend.url.removeprefix("file://")) / entry.key
            os.utime(path, (entry.mtime - secs, entry.mtime - secs))


def cache_of(backend: Backend) -> CacheWriter:
    return new_cache(backend, TrustedKeys([KEY.public]), KEY)


def push(backend: Backend, made: Made) -> StorePath:
    cache_of(backend).push(made.info, made.tree, derivation=made.derivation, log=made.log)
    return made.info.path


def referring(made: Made, *others: Made) -> Made:
    return replace(made, info=replace(made.info, references=tuple(other.info.path for other in others)))


def content(backend: Backend, key: str) -> bytes:
    opened = backend.get(key)
    assert opened is not None, key
    with opened as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def belongings(backend: Backend, made: Made) -> set[str]:
    """All keys of an object that is there."""
    info = NarInfo.parse(content(backend, narinfo_key(made.info.path)))
    drv, key = made.info.drv_hash, made.info.build_key
    return {narinfo_key(info.path), info.url, f"log/{info.deriver}", f"drv/{drv}.json", f"build/{key}.json"}


# --- what goes and what stays -----------------------------------------------------------------------------------------


def test_what_roots_keep_stays_and_what_is_old_goes(place: Backend, tmp_path: Path) -> None:
    lib, tool, old, young = (make(tmp_path, name, name.encode()) for name in ("lib", "tool", "old", "young"))
    app = referring(make(tmp_path, "app", b"app"), lib)
    for made in (lib, tool, app, old):
        push(place, made)
    add_root(place, "release", [app.info.path])
    add_root(place, "tools", [tool.info.path, lib.info.path])
    grow_old(place, 2 * MONTH)
    push(place, young)
    stay = {key for made in (lib, tool, app, young) for key in belongings(place, made)}
    stay |= {"roots/release.json", "roots/tools.json", "nix-cache-info"}
    go = belongings(place, old)
    grow_old(place, 2 * MONTH, *go)  # asking for them was use, where memory is the place
    before = keys(place)

    would = collect(place, older_than_secs=MONTH, dry_run=True)
    assert keys(place) == before == stay | go
    report = collect(place, older_than_secs=MONTH)
    assert keys(place) == stay
    assert replace(would, dry_run=False) == report
    assert (report.narinfos.count, report.nars.count, report.records.count) == (1, 1, 3)
    assert report.deleted.count == 5
    assert report.young.count == 5
    assert report.roots["release"].count == report.roots["tools"].count == 2
    assert report.kept.count == 3
    shared = report.roots["release"].size + report.roots["tools"].size - report.kept.size
    sizes = {entry.key: entry.size for entry in place.list()}
    lib_info = NarInfo.parse(content(place, narinfo_key(lib.info.path)))
    assert shared == sizes[narinfo_key(lib.info.path)] + sizes[lib_info.url]
    assert (report.missing, report.foreign) == ((), 0)


def test_every_place_is_cleaned(backend: Backend, tmp_path: Path) -> None:
    """Where nothing can be made old, everything is old enough: nobody pushes meanwhile."""
    lib, old = make(tmp_path, "lib", b"lib"), make(tmp_path, "old", b"old")
    app = referring(make(tmp_path, "app", b"app"), lib)
    for made in (lib, app, old):
        push(backend, made)
    add_root(backend, "main", [app.info.path])
    stay, go = belongings(backend, lib) | belongings(backend, app), belongings(backend, old)
    newest = max(entry.mtime for entry in backend.list())
    while backend.now() <= newest:  # by the place's clock, and some count in seconds
        time.sleep(0.1)
    report = collect(backend, older_than_secs=0, fresh_secs=0)
    assert keys(backend) == {*stay, "roots/main.json", "nix-cache-info"}
    assert report.deleted.count == len(go)
    assert report.young.count == 0
    info = cache_of(backend).reader.query(app.info.path)
    assert info is not None
    cache_of(backend).reader.fetch(info, tmp_path / "dest")


def test_a_root_that_is_removed_keeps_nothing(place: Backend, tmp_path: Path) -> None:
    one, two = make(tmp_path, "one"), make(tmp_path, "two", b"two")
    push(place, one)
    push(place, two)
    add_root(place, "one", [one.info.path])
    add_root(place, "two", [two.info.path])
    remove_root(place, "two")
    grow_old(place, 2 * MONTH)
    assert collect(place, older_than_secs=MONTH).narinfos.count == 1
    assert narinfo_key(one.info.path) in keys(place)
    assert narinfo_key(two.info.path) not in keys(place)


def test_an_object_goes_before_its_nar(place: Backend, tmp_path: Path) -> None:
    """A narinfo's NAR may be as old as the narinfo and FRESH_SECS more."""
    made = make(tmp_path)
    push(place, made)
    grow_old(place, MONTH + FRESH_SECS / 2)
    assert collect(place, older_than_secs=MONTH, keep_roots=False).deleted.count == 1
    grow_old(place, FRESH_SECS)
    assert collect(place, older_than_secs=MONTH, keep_roots=False).deleted.count == 4
    assert keys(place) == {"nix-cache-info"}


def test_a_nar_that_another_narinfo_needs_stays(place: Backend, tmp_path: Path) -> None:
    one, two = make(tmp_path, "one", b"same"), make(tmp_path, "two", b"same")
    push(place, one)
    push(place, two)
    add_root(place, "two", [two.info.path])
    grow_old(place, 2 * MONTH)
    report = collect(place, older_than_secs=MONTH)
    assert (report.narinfos.count, report.nars.count) == (1, 0)
    assert broken(place) == set()


def test_what_is_young_keeps_its_nar_and_what_it_refers_to(place: Backend, tmp_path: Path) -> None:
    """Also when these are old: a Nix client leaves a NAR that it finds as old as it is."""
    lib, gone = make(tmp_path, "lib", b"lib"), make(tmp_path, "gone", b"gone")
    app = referring(make(tmp_path, "app", b"app"), lib)
    for made in (lib, gone, app):
        push(place, made)
    grow_old(place, 2 * MONTH)
    place.refresh(narinfo_key(app.info.path))
    report = collect(place, older_than_secs=MONTH, keep_roots=False)
    assert report.narinfos.count == 1
    assert {narinfo_key(lib.info.path), narinfo_key(app.info.path)} < keys(place)
    assert broken(place) == set()


def test_other_clients_narinfos_keep_their_nars(place: Backend) -> None:
    path = StorePath.parse(f"{'a' * 32}-a")
    foreign = f"StorePath: {path}\nURL: nar/x.nar.xz\nCompression: xz\nNarHash: sha256:x\nNarSize: 8\nReferences: \n"
    place.put("nar/x.nar.xz", b"xz")
    place.put("nar/y.nar.xz", b"xz")
    place.put(narinfo_key(path), foreign.encode())
    grow_old(place, 2 * MONTH)
    place.put(root_of(path), root_content(path))
    collect(place, older_than_secs=MONTH)
    assert keys(place) == {narinfo_key(path), "nar/x.nar.xz", "roots/main.json"}


def root_of(_path: StorePath) -> str:
    return "roots/main.json"


def root_content(path: StorePath) -> bytes:
    return canonical_json({"format": 1, "type": "root", "name": "main", "made": 1, "paths": [str(path)]})


FOREIGN = (
    "readme.txt",
    "realisations/sha256-x.doi",
    "debuginfo/x.debug",
    f"{'a' * 32}.ls",
    f"{'e' * 32}.narinfo",
    f"{'a' * 31}.narinfo",
    f"sub/{'a' * 32}.narinfo",
    "narrow/x",
    "nar",
    "vzrepro.json",
    "nix-cache-info",
)
OURS = (
    f"{'a' * 32}.narinfo",
    "nar/x.nar.zst",
    "drv/x.json",
    "log/x",
    "build/x.json",
    "attest/a/b/c.json",
)


def test_only_what_is_ours_is_ever_deleted() -> None:
    """Memory alone: a directory cannot have an entry `nar` beside `nar/x`."""
    place = MemoryBackend(time.time)
    for key in FOREIGN + OURS:
        place.put(key, b"something")
    grow_old(place, 2 * MONTH)
    report = collect(place, older_than_secs=MONTH, keep_roots=False)
    assert keys(place) == set(FOREIGN)
    assert report.foreign == len(FOREIGN) - 2
    assert report.deleted == Amount(len(OURS), 9 * len(OURS))


def test_a_differences_record_stays_as_long_as_its_object(place: Backend, tmp_path: Path) -> None:
    made, other = make(tmp_path, "x", b"one"), make(tmp_path, "x", b"two")
    push(place, made)
    cache_of(place).push(other.info, other.tree)
    attest = {key for key in keys(place) if key.startswith("attest/")}
    assert len(attest) == 2, "the record, and the list of them"
    add_root(place, "main", [made.info.path])
    grow_old(place, 2 * MONTH)
    assert collect(place, older_than_secs=MONTH).deleted.count == 0
    grow_old(place, 2 * MONTH)  # having been read is use, where memory is the place
    assert collect(place, older_than_secs=MONTH, keep_roots=False).deleted.count == 7


def test_missing_objects_are_told_and_damaged_ones_stop_it(place: Backend, tmp_path: Path) -> None:
    gone, old = make(tmp_path, "gone", b"gone"), make(tmp_path, "old", b"old")
    app = referring(make(tmp_path, "app", b"app"), gone)
    push(place, app)
    push(place, old)
    with pytest.raises(Lacking):
        add_root(place, "main", [app.info.path])
    grow_old(place, 2 * MONTH)
    report = collect(place, older_than_secs=MONTH, dry_run=True)
    assert report.missing == (gone.info.path,)
    assert report.roots == {"main": report.kept}
    assert report.kept.count == 1
    place.put(narinfo_key(app.info.path), b"damaged\n")
    before = keys(place)
    with pytest.raises(Damaged, match="a root keeps it") as caught:
        collect(place, older_than_secs=MONTH)
    assert "verify --repair" in str(caught.value)
    assert keys(place) == before


def test_a_root_that_is_not_understood_stops_it(place: Backend, tmp_path: Path) -> None:
    push(place, make(tmp_path))
    place.put("roots/strange", b"hello")
    grow_old(place, 2 * MONTH)
    before = keys(place)
    with pytest.raises(Damaged, match="roots/strange"):
        collect(place, older_than_secs=MONTH)
    assert keys(place) == before


def test_without_roots_everything_would_go_and_must_be_asked_for(place: Backend, tmp_path: Path) -> None:
    push(place, make(tmp_path))
    grow_old(place, 2 * MONTH)
    with pytest.raises(UsageError, match="no roots") as caught:
        collect(place, older_than_secs=MONTH)
    assert "everything older than 30 days would go" in str(caught.value)
    assert "--ignore-roots" in str(caught.value)
    assert len(keys(place)) == 6
    collect(place, older_than_secs=MONTH, keep_roots=False)
    assert keys(place) == {"nix-cache-info"}


def test_what_an_upload_may_need_is_too_young_for_garbage(place: Backend) -> None:
    with pytest.raises(UsageError, match="too young") as caught:
        collect(place, older_than_secs=2 * FRESH_SECS - 1, keep_roots=False)
    assert "48h" in str(caught.value)
    collect(place, older_than_secs=2 * FRESH_SECS, keep_roots=False)
    collect(place, older_than_secs=0, fresh_secs=0, keep_roots=False, dry_run=True)


def test_stale_uploads_and_notices_go_too() -> None:
    class Uploading(MemoryBackend):
        aborted: tuple[float, ...] = ()

        def abort_stale_uploads(self, older_than_secs: float) -> int:
            self.aborted += (older_than_secs,)
            if len(self.aborted) > 1:
                raise RemoteError("cannot list uploads")
            return 7

    place = Uploading(time.time)
    place.put(f"{NOTICES}old.json", b"")
    grow_old(place, DAY)
    place.put(f"{NOTICES}new.json", b"")
    report = collect(place, older_than_secs=MONTH, keep_roots=False, dry_run=True)
    assert (place.aborted, len(keys(place)), report.uploads) == ((), 2, None)
    report = collect(place, older_than_secs=MONTH, keep_roots=False)
    assert report.uploads == 7
    assert (place.aborted, keys(place), report.foreign) == ((MONTH,), {f"{NOTICES}new.json"}, 0)
    assert collect(place, older_than_secs=MONTH, keep_roots=False).uploads is None


def test_a_place_that_is_too_slow_to_be_cleaned_safely_is_left_as_it_is() -> None:
    now = [time.time()]

    class Slow(MemoryBackend):
        def head(self, key: str) -> Entry | None:
            now[0] += 61
            return super().head(key)

    place = Slow(lambda: now[0])
    place.put("nar/x", b"")
    now[0] += 2 * MONTH
    with pytest.raises(RemoteError, match="too slow"):
        collect(place, older_than_secs=MONTH, keep_roots=False)
    assert keys(place) == {"nar/x"}


# --- whatever happens in between --------------------------------------------------------------------------------------


def broken(backend: Backend) -> set[str]:
    """Narinfos whose NAR is missing. Looking is not use here, and not a call of the backend's."""
    if isinstance(backend, MemoryBackend):
        entries = dict(backend.entries)
    else:
        root = Path(backend.url.removeprefix("file://"))
        entries = {entry.key: (root / entry.key).read_bytes() for entry in backend.list() if "." in entry.key}
    infos = {key: NarInfo.parse(data) for key, data in entries.items() if key.endswith(".narinfo")}
    return {key for key, info in infos.items() if info.url not in entries}


class Watched(MemoryBackend):
    """Time stands still; after every single deletion everything is looked at. Tells when somebody waits for a notice or
    wants to write a narinfo, which `hold` can delay."""

    def __init__(self) -> None:
        super().__init__(lambda: 1_000_000_000.0)
        self.stuck = threading.Event()
        self.hold: threading.Event | None = None
        self.broken: set[str] = set()

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            super().delete([key])
            self.broken |= broken(self)

    def head(self, key: str) -> Entry | None:
        found = super().head(key)
        if key.startswith(NOTICES) and found is not None:
            self.stuck.set()
        return found

    def put(self, key: str, source: bytes | Path, **more: Any) -> bool:
        if self.hold is not None and key.endswith(".narinfo"):
            self.stuck.set()
            assert self.hold.wait(PATIENCE_SECS)
        return super().put(key, source, **more)

    def copy(self) -> Watched:
        twin = Watched()
        twin.entries, twin.told, twin.used = dict(self.entries), dict(self.told), dict(self.used)
        return twin


class Scripted:
    """What a collection sees of a place: before its `at`-th call, `act` happens."""

    def __init__(self, place: Watched, at: int = -1, act: Callable[[], object] = lambda: None) -> None:
        self._place = place
        self._at = at
        self._act = act
        self.calls = 0
        self.url = place.url

    def _step(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if number == self._at:
            self._act()

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        self._step()
        return self._place.get(key)

    def put(self, key: str, source: bytes | Path, **more: Any) -> bool:
        self._step()
        return MemoryBackend.put(self._place, key, source, **more)

    def head(self, key: str) -> Entry | None:
        self._step()
        return MemoryBackend.head(self._place, key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self._step()
        for entry in self._place.list(prefix):
            self._step()
            yield entry

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            self._step()
            self._place.delete([key])

    def refresh(self, key: str) -> bool:
        self._step()
        return self._place.refresh(key)

    def now(self) -> float:
        self._step()
        return self._place.now()

    def spool(self) -> AbstractContextManager[Path]:
        raise NotImplementedError

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        self._step()
        return nullcontext()


@dataclass(frozen=True)
class World:
    """A place with old objects: `app` refers to `lib` and is rooted; `tool` refers to `part` and is not, nor is `old`;
    `bare` has a NAR without narinfo. `twin` has the bytes of `old`, and is not there."""

    place: Watched
    app: Made
    lib: Made
    tool: Made
    part: Made
    old: Made
    bare: Made
    twin: Made

    def copy(self) -> World:
        return replace(self, place=self.place.copy())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    lib, part, old, bare = (make(root, name, name.encode()) for name in ("lib", "part", "old", "bare"))
    app = referring(make(root, "app", b"app"), lib)
    tool = referring(make(root, "tool", b"tool"), part)
    twin = make(root, "twin", b"old")
    place = Watched()
    for made in (lib, app, part, tool, old, bare):
        push(place, made)
    place.delete([narinfo_key(bare.info.path)])
    add_root(place, "main", [app.info.path])
    grow_old(place, 2 * MONTH)
    return World(place, app, lib, tool, part, old, bare, twin)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "_PAUSE_SECS", 0.0005)


def run(backend: Backend) -> CollectionResult:
    return collect(backend, older_than_secs=MONTH, workers=1)


def steps(world: World) -> int:
    scripted = Scripted(world.copy().place)
    run(scripted)
    return scripted.calls


def whole(place: Watched, *objects: Made) -> bool:
    """Whether these objects can be read, all of them."""
    for made in objects:
        data = place.entries.get(narinfo_key(made.info.path))
        if data is None or NarInfo.parse(data).url not in place.entries:
            return False
    return True


def meanwhile(world: World, at: int, act: Callable[[World], object], *, hold: bool = False) -> list[BaseException]:
    """A collection during which, before its `at`-th call, somebody else begins to `act` and goes on until that ends or
    has to wait; what it raised. With `hold`, narinfos are written only when the collection has ended."""
    place = world.place
    raised: list[BaseException] = []

    def acting() -> None:
        try:
            act(world)
        except BaseException as error:
            raised.append(error)
        finally:
            place.stuck.set()

    other = threading.Thread(target=acting, daemon=True)

    def begin() -> None:
        other.start()
        assert place.stuck.wait(PATIENCE_SECS)

    place.hold = threading.Event() if hold else None
    run(Scripted(place, at, begin))
    if place.hold is not None:
        place.hold.set()
    if other.ident is None:
        begin()
    other.join(PATIENCE_SECS)
    assert not other.is_alive()
    return raised


def push_old(world: World) -> None:
    push(world.place, world.old)


def push_twin(world: World) -> None:
    push(world.place, world.twin)


def push_bare(world: World) -> None:
    push(world.place, world.bare)


def push_tool(world: World) -> None:
    push(world.place, world.part)
    push(world.place, world.tool)


def ask_for_old(world: World) -> None:
    """Makes its narinfo young, not its NAR."""
    world.place.get(narinfo_key(world.old.info.path))


@pytest.mark.parametrize("hold", [False, True], ids=["quick", "slow"])
@pytest.mark.parametrize("act", [push_old, push_twin, push_bare, push_tool, ask_for_old])
def test_a_push_at_any_moment_leaves_everything_whole(world: World, act: Callable[[World], object], hold: bool) -> None:
    for at in range(steps(world)):
        now = world.copy()
        assert meanwhile(now, at, act, hold=hold) == [], at
        assert now.place.broken == broken(now.place) == set(), at
        assert whole(now.place, now.app, now.lib), at
        run(now.place)
        assert now.place.broken == set(), at


def root_tool(world: World) -> None:
    add_root(world.place, "tool", [world.tool.info.path], workers=1)


def push_and_root_tool(world: World) -> None:
    push_tool(world)
    root_tool(world)


@pytest.mark.parametrize("act", [root_tool, push_and_root_tool])
def test_a_root_at_any_moment_keeps_its_closure_or_says_what_is_gone(
    world: World, act: Callable[[World], object]
) -> None:
    outcomes = set()
    records = {key for key in belongings(world.copy().place, world.tool) if "/" in key}
    for at in range(steps(world)):
        now = world.copy()
        raised = meanwhile(now, at, act)
        outcomes.add(bool(raised))
        kept = (now.app, now.lib, *(() if raised else (now.tool, now.part)))
        if raised:
            assert isinstance(raised[0], Lacking), at
            push_tool(now)  # what its hint says
            root_tool(now)
            kept += (now.tool, now.part)
        assert whole(now.place, *kept), at
        assert raised or records <= set(now.place.entries), at
        assert now.place.broken == broken(now.place) == set(), at
        grow_old(now.place, 2 * MONTH)
        run(now.place)
        assert whole(now.place, *kept), at
        assert now.place.broken == set(), at
    assert False in outcomes


def test_a_root_that_is_added_too_late_says_so(world: World) -> None:
    now = world.copy()
    run(now.place)
    with pytest.raises(Lacking) as caught:
        root_tool(now)
    assert now.tool.info.path in caught.value.paths
    assert len(read_roots(now.place)) == 2


def test_two_collections_at_once_leave_everything_whole(world: World) -> None:
    alone = world.copy()
    run(alone.place)
    for at in range(steps(world)):
        now = world.copy()
        run(Scripted(now.place, at, lambda now=now: run(now.place)))
        assert now.place.broken == set(), at
        assert set(now.place.entries) == set(alone.place.entries), at


def test_a_crash_at_any_moment_leaves_everything_whole_and_is_made_up_for(world: World) -> None:
    alone = world.copy()
    run(alone.place)
    crashed = 0
    for at in range(steps(world)):
        now = world.copy()

        def crash() -> None:
            raise RemoteError("gone")

        try:
            run(Scripted(now.place, at, crash))
        except RemoteError:
            crashed += 1
        assert now.place.broken == broken(now.place) == set(), at
        assert whole(now.place, now.app, now.lib), at
        grow_old(now.place, 1, *(key for key in now.place.entries if key.startswith(NOTICES)))
        run(now.place)
        left = {key for key in now.place.entries if not key.startswith(NOTICES)}
        assert left == set(alone.place.entries), at
    assert crashed > 10


# --- a large place ----------------------------------------------------------------------------------------------------


class Large:
    """Many objects that take no memory: `kept` of them are the closure of a root, the rest is old garbage; each has a
    narinfo, a NAR and a derivation."""

    url = "large:"

    def __init__(self, objects: int, kept: int) -> None:
        self.objects, self.kept = objects, kept
        self.gets, self.lists = 0, []
        self.deleted = bytearray(2 * objects)
        self.extra: dict[str, bytes] = {}
        paths = [str(self.path(number)) for number in range(min(kept, 10))]
        root = {"format": 1, "type": "root", "name": "main", "made": 1, "paths": sorted(paths)}
        self.extra["roots/main.json"] = canonical_json(root)
        self.extra["readme"] = b""

    @staticmethod
    def path(number: int) -> StorePath:
        return StorePath.parse(f"{number:032d}-object")

    @staticmethod
    def nar(number: int) -> str:
        return f"nar/{number:052d}.nar.zst"

    def narinfo(self, number: int) -> bytes:
        # A tree with ten children each, ten of which are rooted.
        children = tuple(self.path(each) for each in range(10 * number + 10, 10 * number + 20) if each < self.kept)
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        return NarInfo(
            self.path(number), self.nar(number), "zstd", NarHash(digest), 100, file_size=50, references=children
        ).render()

    def _number(self, key: str) -> int | None:
        """Which of `deleted` an entry of an object is."""
        if key.endswith(".narinfo"):
            return int(key[:32])
        return self.objects + int(key[4:56]) if key.startswith("nar/") else None

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        self.gets += 1
        number = self._number(key)
        data = self.extra.get(key) if number is None else self.narinfo(number)
        return None if data is None or (number is not None and self.deleted[number]) else io.BytesIO(data)

    def put(self, key: str, source: bytes | Path, **more: Any) -> bool:
        assert isinstance(source, bytes)
        self.extra[key] = source
        return True

    def head(self, key: str) -> Entry | None:
        number = self._number(key)
        return None if number is None or self.deleted[number] else Entry(key, 50, 0.0)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.lists.append(prefix)
        for key in list(self.extra):
            if key.startswith(prefix):
                yield Entry(key, len(self.extra[key]), 0.0)
        if not prefix:
            for number in range(self.objects):
                yield Entry(narinfo_key(self.path(number)), 50, 0.0)
                yield Entry(self.nar(number), 50, 0.0)

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            number = self._number(key)
            if number is None:
                del self.extra[key]
            else:
                self.deleted[number] = 1

    def refresh(self, key: str) -> bool:
        raise NotImplementedError

    def now(self) -> float:
        return 10 * MONTH

    def spool(self) -> AbstractContextManager[Path]:
        raise NotImplementedError

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.thorough
def test_a_hundred_thousand_objects_need_one_listing_few_reads_and_little_memory() -> None:
    place = Large(100_000, 10_000)
    tracemalloc.start()
    try:
        report = collect(place, older_than_secs=MONTH, workers=1)  # threads would only make tracing slow
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert place.lists.count("") == 1
    batches = 2 * 90_000 // 500
    assert place.gets <= 10_000 + 1 + 2 * batches  # each batch looks at the root twice
    assert report.kept.count == report.roots["main"].count == 10_000
    assert report.narinfos.count == report.nars.count == 90_000
    assert place.deleted.count(1) == 180_000
    assert not any(place.deleted[:10_000])
    assert peak < 16 << 20


def test_a_set_of_keys_is_small_and_has_what_was_added() -> None:
    some = [f"nar/{number}" for number in range(200_000)]
    tracemalloc.start()
    try:
        found = KeySet()
        for at in range(0, len(some), 1000):
            found.update(some[at : at + 1000])
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(text in found for text in some)
    assert not any(f"{text}-" in found for text in some)
    assert size < 20 << 20


@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_key_is_of_no_kind(key: str) -> None:
    assert kind_of(key) is None


@pytest.mark.parametrize("key", OURS)
def test_our_keys_are_of_a_kind(key: str) -> None:
    assert kind_of(key) == ("narinfo" if key.endswith(".narinfo") else key.partition("/")[0])
