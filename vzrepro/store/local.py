"""The local store: a path is either absent, or registered and correct; docs/store.md tells how that is kept true.

Layout, order of a write, locks and what `verify`, `gc` and `sweep` do: docs/store.md. One `LocalStore` may be used
from any number of threads: they share one SQLite connection behind one lock, held for the length of a statement or
a transaction, never while data is written, hashed or synced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vzrepro.base import disk
from vzrepro.base.errors import HashMismatch, Interrupted, UsageError, VzreproError
from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, ObjectInfo, Outcome, StorePath
from vzrepro.store.database import Database, ReadOnlyStore
from vzrepro.store.registrar import Registrar

OLD_SECS = 30 * 24 * 3600
"""Logs, derivations, attestations and kept build directories that belong to no object are collected after this time."""

_IN_CHUNK = 500  # host parameters per statement
_RECORD_SECS = 10  # a build is in the history this soon after its output is registered
_PROCESS = "process "


@dataclass(frozen=True, slots=True)
class StoreRoot:
    """Something that keeps `path` and its closure: `source` is an out-link's path or names a running process."""

    source: str
    path: StorePath


@dataclass(frozen=True, slots=True)
class StoreFinding:
    """Something `verify` found wrong with the entry `name` of the store directory."""

    name: str
    kind: Literal["corrupt", "missing", "foreign", "unregistered"]
    detail: str

    @property
    def path(self) -> StorePath | None:
        """The store path that `name` is; None for a foreign entry."""
        return _parsed(self.name)


@dataclass(frozen=True, slots=True)
class GcReport:
    """What a collection deleted (or would, in a dry run) and why the rest stays.

    `freed` is the bytes of the deleted objects' NARs; `kept` counts objects per reason.
    """

    deleted: tuple[StorePath, ...]
    freed: int
    kept: dict[str, int]


class LocalStore:
    """The store in the directory `root`, which is created by the first write.

    Every method may raise VzreproError: the disk is full, the store is read-only, its database is newer than this
    program or damaged, its file system lacks locks. Queries work on a read-only store.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root.absolute()
        self._db = Database(self.root)
        self._tmp = self._db.private / "tmp"
        self._locks = self._db.private / "lock"
        self._clock = clock
        self._registrar = Registrar(self.root, self._db, clock)
        self._owner: tuple[str, int] | None = None  # this process's lock file, keeping its temp roots, and its fd

    def __enter__(self) -> LocalStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop this process's temp roots and close the database."""
        with self._db.mutex:
            if self._owner is not None:
                owner, fd = self._owner
                self._owner = None
                with contextlib.suppress(VzreproError), self._db.transaction() as run:
                    run("DELETE FROM temp_roots WHERE owner = ?", owner)
                with contextlib.suppress(OSError):
                    (self._locks / owner).unlink()
                os.close(fd)
            self._db.close()

    @property
    def private(self) -> Path:
        """The directory of what is kept beside the objects."""
        return self._db.private

    @property
    def database_file(self) -> Path:
        """The file that says what is registered. When that changes, so does the directory `root`."""
        return self._db.file

    # --- objects

    def location(self, path: StorePath) -> Path:
        """Where the object lies, or would lie, on this machine."""
        return self.root / path.base

    def query(self, path: StorePath) -> ObjectInfo | None:
        """What is registered as `path`; None when nothing is, or when it is no longer on the disk."""
        return self.query_many([path]).get(path)

    def query_many(self, paths: Iterable[StorePath]) -> dict[StorePath, ObjectInfo]:
        """As `query`; the result has only those that are there."""
        wanted = [path.base for path in paths]
        infos = self._infos("path", wanted)
        return {info.path: info for info in infos if self._present(info.path)}

    def objects(self) -> list[ObjectInfo]:
        """All valid objects, by path."""
        found = self.query_many(StorePath.parse(base) for (base,) in self._db.rows("SELECT path FROM objects"))
        return sorted(found.values(), key=lambda info: info.path)

    def by_build_key(self, build_key: BuildKey) -> ObjectInfo | None:
        """An object that came of the same work, under whatever name; None when there is none on the disk."""
        return next((info for info in self._infos("build_key", [build_key.hex]) if self._present(info.path)), None)

    def add(self, tree: Path, info: ObjectInfo) -> ObjectInfo:
        """Register `tree` as the object `info` describes; returns what is registered when it is done.

        `tree` is canonical (`nar.unpack`, `nar.canonical_copy`), has the hash `info` says and lies in a scratch
        directory of this store. If the object exists already, it stays and `tree` is left to its scratch directory.
        Raises NotDeterministic when the existing object has another hash.
        """
        if self._registrar.enter(tree, info, replaces=False):
            return info
        return self.query(info.path) or info

    def replace(self, tree: Path, info: ObjectInfo, *, distrusted: bool = False) -> ObjectInfo:
        """As `add`, but `tree` takes the place of the tree on the disk, which is corrupt, or no longer trusted.

        The two are swapped in one step where the system can; the old one is left to the scratch directory.
        Raises NotDeterministic when another hash is registered than `info` has: then `tree` is not the remedy. What is
        `distrusted` is replaced all the same.
        """
        self._registrar.enter(tree, info, replaces=True, distrusted=distrusted)
        return info

    def copy_object(self, source: StorePath, target: Path, progress: Callable[[int], None] | None = None) -> None:
        """Copy the object's tree to `target`, which must not exist; nothing is shared with the original.

        Its content is checked while it is copied: raises HashMismatch when the object is corrupt or not there.
        `progress` is called with the bytes read until then; what it raises ends this.
        """
        from vzrepro import nar

        info = self.query(source)
        if info is None:
            raise HashMismatch(f"{source} is not in the store {self.root}")
        with self._db.explained():
            found, _, _ = nar.canonical_copy(self.location(source), target, progress=progress)
        if found != info.nar_hash:
            raise HashMismatch(
                f"{source} is corrupt",
                reason=f"wanted: {info.nar_hash.nix}\nfound:  {found.nix}",
                hint=f"vzrepro store repair {source}",
            )

    def known_origin(self, path: StorePath, origin: FileHash) -> bool:
        """Whether the download `path` was verified from the URLs that `origin` digests."""
        sql = "SELECT 1 FROM origins JOIN objects ON objects.id = object WHERE path = ? AND origin = ?"
        return bool(self._db.rows(sql, path.base, origin.hex))

    def add_origin(self, path: StorePath, origin: FileHash) -> None:
        """Record that the registered download `path` was verified from other URLs too."""
        info = self.query(path)
        if info is not None:
            with self._db.transaction() as run:
                self._registrar.insert_origin(run, replace(info, origin=origin))

    def references(self, path: StorePath) -> tuple[StorePath, ...]:
        """The store paths named inside the object, sorted."""
        info = self.query(path)
        return () if info is None else info.references

    def referrers(self, path: StorePath) -> tuple[StorePath, ...]:
        """The registered objects that name `path` inside them, sorted."""
        rows = self._db.rows(
            "SELECT path FROM objects JOIN object_references ON referrer = id WHERE reference = ? ORDER BY path",
            path.base,
        )
        return tuple(StorePath.parse(base) for (base,) in rows)

    def closure(self, paths: Iterable[StorePath]) -> tuple[StorePath, ...]:
        """`paths` and all they refer to, directly or not, each after what it refers to (but for cycles)."""
        edges = self._edges()
        order: dict[StorePath, None] = {}
        seen: set[StorePath] = set()
        for start in paths:
            stack = [(start, iter(edges.get(start, ())))]
            while stack:
                path, rest = stack[-1]
                seen.add(path)
                following = next((each for each in rest if each not in seen), None)
                if following is None:
                    order.setdefault(path)
                    stack.pop()
                else:
                    stack.append((following, iter(edges.get(following, ()))))
        return tuple(order)

    def _edges(self) -> dict[StorePath, list[StorePath]]:
        edges: dict[StorePath, list[StorePath]] = {}
        sql = "SELECT path, reference FROM object_references JOIN objects ON referrer = id ORDER BY path, reference"
        for base, reference in self._db.rows(sql):
            edges.setdefault(StorePath.parse(base), []).append(StorePath.parse(reference))
        return edges

    def _present(self, path: StorePath) -> bool:
        return os.path.lexists(self.location(path))

    def _infos(self, column: Literal["path", "build_key"], values: Sequence[str]) -> list[ObjectInfo]:
        infos = []
        for start in range(0, len(values), _IN_CHUNK):
            some = values[start : start + _IN_CHUNK]
            where = f"WHERE {column} IN ({','.join('?' * len(some))})"
            references: dict[int, list[StorePath]] = {}
            with self._db.mutex:
                objects = self._db.rows(
                    "SELECT id, path, nar_hash, nar_size, drv_hash, build_key, outcome,"
                    " (SELECT origin FROM origins WHERE object = objects.id ORDER BY origins.id DESC),"
                    " (SELECT narinfo FROM vouchers WHERE object = objects.id)"
                    f" FROM objects {where} ORDER BY id",
                    *some,
                )
                for referrer, reference in self._db.rows(
                    "SELECT referrer, reference FROM object_references JOIN objects ON referrer = id"
                    f" {where} ORDER BY reference",
                    *some,
                ):
                    references.setdefault(referrer, []).append(StorePath.parse(reference))
            infos += [
                ObjectInfo(
                    path=StorePath.parse(base),
                    nar_hash=NarHash(nar_hash),
                    nar_size=nar_size,
                    references=tuple(references.get(key, ())),
                    drv_hash=None if drv_hash is None else DrvHash(drv_hash),
                    build_key=None if build_key is None else BuildKey(build_key),
                    origin=None if origin is None else FileHash(origin),
                    outcome=Outcome(outcome),
                    voucher=voucher,
                )
                for key, base, nar_hash, nar_size, drv_hash, build_key, outcome, origin, voucher in objects
            ]
        return infos

    # --- derivations, history, logs

    def put_derivation(self, drv: DrvHash, name: str, canonical: bytes) -> None:
        """Keep a derivation's canonical JSON; one that is known becomes the newest of its name.

        `name` is the target's, which stays the same when a version in the store path's name changes.
        """
        with self._db.transaction() as run:
            run(
                "INSERT INTO derivations VALUES (?, ?, ?, ?)"
                " ON CONFLICT (drv_hash) DO UPDATE SET last_seen = excluded.last_seen",
                drv.hex,
                name,
                canonical,
                int(self._clock()),
            )

    def derivation(self, drv: DrvHash) -> bytes | None:
        """A derivation's canonical JSON, if it is known."""
        rows = self._db.rows("SELECT canonical FROM derivations WHERE drv_hash = ?", drv.hex)
        return rows[0][0] if rows else None

    def derivations_named(self, name: str) -> list[tuple[DrvHash, bytes, int]]:
        """All known derivations called `name`, newest first, with their canonical JSON and when they were seen."""
        sql = "SELECT drv_hash, canonical, last_seen FROM derivations WHERE name = ? ORDER BY last_seen DESC, drv_hash"
        return [(DrvHash(drv), canonical, seen) for drv, canonical, seen in self._db.rows(sql, name)]

    def target_of(self, drv: DrvHash) -> str | None:
        """The target's name that a derivation was kept under, if it is known."""
        rows = self._db.rows("SELECT name FROM derivations WHERE drv_hash = ?", drv.hex)
        return str(rows[0][0]) if rows else None

    def build_times(self, path: StorePath, name: str) -> tuple[int | None, int | None]:
        """When the build that made `path`, of the target `name`, began and when its output was registered.

        Seconds since 1970; None for what is not known: the beginning where the history has no build of that name that
        ended right then with an output of that size, or several.
        """
        found = self._db.rows("SELECT nar_size, registered FROM objects WHERE path = ?", path.base)
        if not found:
            return None, None
        [(nar_size, registered)] = found
        ended = self._db.rows(
            "SELECT ended, secs FROM history"
            " WHERE name = ? AND action IN ('build', 'image') AND nar_size = ? AND ended BETWEEN ? AND ?",
            name,
            nar_size,
            registered,
            registered + _RECORD_SECS,
        )
        return min(registered, round(ended[0][0] - ended[0][1])) if len(ended) == 1 else None, registered

    def record_history(self, name: str, action: str, secs: float, nar_size: int | None) -> None:
        """Remember how long an action (`events.Action`) on the object called `name` took."""
        with self._db.transaction() as run:
            run(
                "INSERT INTO history (name, action, secs, nar_size, ended) VALUES (?, ?, ?, ?, ?)",
                name,
                action,
                secs,
                nar_size,
                int(self._clock()),
            )

    def expected_secs(self, name: str, action: str) -> float | None:
        """The median of the last five times this action took; None the first time."""
        import statistics

        sql = "SELECT secs FROM history WHERE name = ? AND action = ? ORDER BY id DESC LIMIT 5"
        rows = self._db.rows(sql, name, action)
        return statistics.median(secs for (secs,) in rows) if rows else None

    def log_path(self, path: StorePath) -> Path:
        """Where the build log of `path` belongs; the directory is there once anything has been written."""
        return self._db.private / "log" / f"{path.base}.log"

    # --- scratch directories and locks

    @contextlib.contextmanager
    def scratch(self, label: str, *, stop: threading.Event | None = None) -> Iterator[Path]:
        """An empty private directory on the store's file system, removed at the end, read-only content included.

        `keep` saves it from that. If the process dies, the next `sweep` removes it; so it does with what is left a few
        seconds after `stop` was set. Raises VzreproError when the disk fills up inside the `with` block.
        """
        label = re.sub(r"[^A-Za-z0-9._-]", "-", label)[:80]
        with self._db.explained():
            self._db.create()
            fd = None
            while fd is None:  # a sweeper may take a directory that is not locked yet
                path = self._tmp / f"{label}.{secrets.token_hex(4)}.scratch"
                path.mkdir(mode=0o700)
                with contextlib.suppress(FileNotFoundError):
                    fd = disk.try_lock(path, create=False)
        try:
            with self._db.explained(only_full=True):
                yield path
        finally:
            try:
                disk.remove_tree(path, disk.until_stopped(stop, None))
            except Interrupted:
                path.rename(path.with_suffix(".trash"))
            finally:
                os.close(fd)

    def keep(self, scratch: Path) -> Path:
        """Let a scratch directory outlive its `with` block; returns its new place. gc removes it when it is old."""
        with self._db.explained():
            kept = scratch.with_suffix(".kept")
            scratch.rename(kept)
        return kept

    @contextlib.contextmanager
    def lock(
        self,
        path: StorePath,
        label: str,
        on_wait: Callable[[str], None],
        *,
        cancelled: threading.Event | None = None,
    ) -> Iterator[None]:
        """Be the only one, in all processes and threads, who makes `path`.

        `on_wait` is called once, with the holder's "pid N (label)", before waiting. Ask again what is valid
        once the lock is taken. Waiting ends with Ctrl-C in the main thread, elsewhere with `cancelled`, which
        raises Interrupted. If the holder dies, however it dies, the lock is free.
        """
        file = self._lock_file(path)
        with self._db.explained():
            self._db.create()
            fd = disk.try_lock(file)
            waits = 0
            while fd is None:
                waits += 1
                if waits == 2:  # gc and sweep probe locks for a moment; that is not worth a message
                    on_wait(_holder(file))
                pause = min(0.01 * waits, 0.25)
                if cancelled is None:
                    time.sleep(pause)
                elif cancelled.wait(pause):
                    raise Interrupted(f"interrupted while waiting for {path}")
                fd = disk.try_lock(file)
            try:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"pid {os.getpid()} ({label})".encode(), 0)
            except OSError:
                os.close(fd)
                raise
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: see disk.try_lock
            os.close(fd)

    # --- roots

    def hold(self, paths: Iterable[StorePath]) -> None:
        """Keep `paths`, whether they exist yet or not, and their closures from gc until `close` or death.

        Hold first, then query: what is found then stays. On a read-only store nothing can be held, and nothing is.
        """
        with contextlib.suppress(ReadOnlyStore), self._db.mutex:
            self._db.create()
            with self._db.explained():
                while self._owner is None:
                    owner = f"process-{os.getpid()}-{secrets.token_hex(4)}"
                    fd = disk.try_lock(self._locks / owner)
                    if fd is not None:
                        self._owner = owner, fd
            owner = self._owner[0]
            with self._db.transaction() as run:
                for path in paths:
                    run("INSERT OR IGNORE INTO temp_roots VALUES (?, ?, ?)", owner, os.getpid(), path.base)

    def is_shared(self) -> bool:
        """Whether another running process holds objects: it makes or uses some."""
        own = None if self._owner is None else self._owner[0]
        owners = [owner for (owner,) in self._db.rows("SELECT DISTINCT owner FROM temp_roots")]
        return any(owner != own and self._alive(owner) for owner in owners)

    def add_root(self, link: Path, path: StorePath) -> None:
        """Make the symbolic link `link` to the object, which is kept for as long as the link stays and points there.

        A link that is there is replaced. Raises UsageError when something else is.
        """
        link = link.absolute()
        if os.path.lexists(link) and not link.is_symlink():
            raise UsageError(
                f"{link} exists and is no symbolic link",
                reason="an out-link would overwrite it",
                hint=f"choose another path, or: rm -r {link}",
            )
        with self._db.explained():
            self._db.create()
            entry = self._db.private / "roots" / hashlib.sha256(os.fsencode(link)).hexdigest()[:32]
            _point(entry, link)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            _point(link, self.location(path))
        except OSError as error:
            raise VzreproError(f"the out-link {link} cannot be written", reason=error.strerror) from error

    def roots(self) -> list[StoreRoot]:
        """What keeps objects: out-links, sorted by path, then the temp roots of running processes."""
        found = []
        for entry in _listed(self._db.private / "roots"):
            link = entry.readlink()
            path = self._rooted(link)
            if path is not None:
                found.append(StoreRoot(str(link), path))
        found.sort(key=lambda root: root.source)
        owners: dict[str, bool] = {}
        for owner, pid, base in self._db.rows("SELECT owner, pid, path FROM temp_roots ORDER BY owner, path"):
            if owner not in owners:
                owners[owner] = self._alive(owner)
            if owners[owner]:
                found.append(StoreRoot(f"{_PROCESS}{pid}", StorePath.parse(base)))
        return found

    def _rooted(self, link: Path) -> StorePath | None:
        """The store path an out-link points to; None if it is gone or points elsewhere."""
        try:
            target = link.parent / link.readlink()
        except OSError:
            return None
        if os.path.realpath(target.parent) != os.path.realpath(self.root):
            return None
        return _parsed(target.name)

    def _alive(self, owner: str) -> bool:
        return (self._owner is not None and self._owner[0] == owner) or disk.held(self._locks / owner)

    # --- cleaning

    def gc(self, *, dry_run: bool = False, now: float | None = None, keep_newer_than: float | None = None) -> GcReport:
        """Delete the objects that nothing keeps.

        Kept are the closures of roots, of objects being made (locked) and, with `keep_newer_than` (seconds since
        1970), of those registered after it. Then logs, derivations and kept build directories older than
        `OLD_SECS` without an object go too. Safe beside running builds. `now` is for tests.
        """
        now = self._clock() if now is None else now
        if not self._db.file.exists():
            return GcReport((), 0, {})
        if dry_run:
            with self._db.mutex:
                return self._collectable(keep_newer_than)
        with self._db.explained():
            (self._db.private / "reserve").unlink(missing_ok=True)
        self.sweep()
        if not self._db.is_made():
            return GcReport((), 0, {})
        with self._db.transaction(durable=True) as run:
            report = self._collectable(keep_newer_than)
            for path in report.deleted:
                run("DELETE FROM objects WHERE path = ?", path.base)
            run(
                "DELETE FROM derivations WHERE last_seen < ? AND drv_hash NOT IN"
                " (SELECT drv_hash FROM objects WHERE drv_hash IS NOT NULL)",
                int(now) - OLD_SECS,
            )
        # Rows first: what is left by a crash here is unregistered trees, which the next sweep removes like this one.
        self.sweep()
        with self._db.explained():
            self._remove_old(now)
            self._db.reserve()
        return report

    def _collectable(self, keep_newer_than: float | None) -> GcReport:
        rows = self._db.rows("SELECT path, nar_size, registered FROM objects ORDER BY path")
        kept: dict[StorePath, str] = {}

        def keep(paths: Iterable[StorePath], reason: str) -> None:
            for path in self.closure(paths):
                kept.setdefault(path, reason)

        roots = self.roots()
        locked = {file.stem for file in _listed(self._locks) if file.suffix == ".lock" and disk.held(file)}
        registered = {StorePath.parse(base): when for base, _, when in rows}
        keep((root.path for root in roots if not root.source.startswith(_PROCESS)), "out-link")
        keep((root.path for root in roots if root.source.startswith(_PROCESS)), "in use")
        keep((path for path in registered if path.hash_part in locked), "being made")
        if keep_newer_than is not None:
            keep((path for path, when in registered.items() if when > keep_newer_than), "recent")
        deleted = [(StorePath.parse(base), size) for base, size, _ in rows if StorePath.parse(base) not in kept]
        return GcReport(
            deleted=tuple(path for path, _ in deleted),
            freed=sum(size for _, size in deleted),
            kept=dict(Counter(kept[path] for path in registered if path in kept)),
        )

    def _remove_old(self, now: float) -> None:
        def old(path: Path) -> bool:
            try:
                return path.lstat().st_mtime < now - OLD_SECS
            except FileNotFoundError:
                return False

        for log in _listed(self._db.private / "log"):
            path = _parsed(log.stem)
            if old(log) and (path is None or not self._registered(path)):
                log.unlink(missing_ok=True)
        for folder in _listed(self._db.private / "attest"):
            known = self._db.rows("SELECT 1 FROM objects WHERE drv_hash = ?", folder.name)
            if folder.is_dir() and not known and all(old(entry) for entry in (folder, *_listed(folder))):
                disk.remove_tree(folder)
        for entry in _listed(self._db.private / "roots"):
            # Not at once: add_root writes the entry before the link.
            if old(entry) and self._rooted(entry.readlink()) is None:
                entry.unlink(missing_ok=True)
        for kept in _listed(self._tmp):
            if kept.suffix == ".kept" and old(kept):
                disk.remove_tree(kept)

    def sweep(self) -> None:
        """Remove what dead processes left: scratch directories, temp roots, lock files, trees never registered.

        A tree is removed only if its name is a store path and nobody has the path locked; other entries of the
        store directory are `verify`'s to report. Does nothing on a read-only store.
        """
        if not self._db.private.exists():
            return
        with contextlib.suppress(ReadOnlyStore), self._db.explained():
            for entry in _listed(self._tmp):
                if entry.suffix == ".scratch":
                    disk.remove_unlocked(entry)
                elif entry.suffix == ".trash":
                    disk.remove_tree(entry)
            for file in _listed(self._locks):
                disk.remove_unlocked(file)
            owners = [owner for (owner,) in self._db.rows("SELECT DISTINCT owner FROM temp_roots")]
            dead = [owner for owner in owners if not self._alive(owner)]
            unregistered = self._unregistered()
            if not dead and not unregistered:
                return
            trash = []
            with self._db.transaction() as run:
                for owner in dead:
                    run("DELETE FROM temp_roots WHERE owner = ?", owner)
                for path in unregistered:
                    # Asked again under the write lock: an `add` renames and registers under it.
                    if self._registered(path) or disk.held(self._lock_file(path)):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        target = self._tmp / f"{secrets.token_hex(8)}.trash"
                        disk.move(self.location(path), target)
                        trash.append(target)
            for target in trash:
                disk.remove_tree(target)

    def _lock_file(self, path: StorePath) -> Path:
        return self._locks / f"{path.hash_part}.lock"

    def _registered(self, path: StorePath) -> bool:
        return bool(self._db.rows("SELECT 1 FROM objects WHERE path = ?", path.base))

    def _unregistered(self) -> list[StorePath]:
        known = {base for (base,) in self._db.rows("SELECT path FROM objects")}
        paths = (_parsed(entry.name) for entry in _listed(self.root) if entry.name not in known)
        return [path for path in paths if path is not None]

    # --- verifying

    def verify(
        self, paths: Iterable[StorePath] | None = None, progress: Callable[[StorePath], None] | None = None
    ) -> list[StoreFinding]:
        """Compare the store with what is registered: `paths`, or everything; changes nothing.

        Every file is read and hashed; modes, times, extended attributes and links are compared with the canonical
        form, which often names the file that was changed. `progress` is called before each object.
        With `paths` None, entries of the store directory that are no registered object are reported too.
        """
        entries = [entry.name for entry in _listed(self.root) if entry.name != disk.PRIVATE] if paths is None else []
        registered = [StorePath.parse(base) for (base,) in self._db.rows("SELECT path FROM objects ORDER BY path")]
        from vzrepro.store.examine import differences
        from vzrepro.store.staged import StagedLinks

        compare = functools.partial(differences, staged=StagedLinks(self._tmp))
        findings = []
        for path in registered if paths is None else paths:
            if progress is not None:
                progress(path)
            finding = self._examine(path, compare)
            # What gc has deleted meanwhile is not missing.
            if finding is not None and (paths is not None or self._registered(path)):
                findings.append(finding)
        for name in entries:
            entry = _parsed(name)
            if entry is None:
                findings.append(StoreFinding(name, "foreign", "not made by vzrepro; nothing here touches it"))
            elif not self._registered(entry) and self._present(entry):
                detail = "not registered: left by an interrupted run, or put there by hand; the next build removes it"
                findings.append(StoreFinding(name, "unregistered", detail))
        return findings

    def _examine(self, path: StorePath, compare: Callable[[Path, NarHash], list[str]]) -> StoreFinding | None:
        rows = self._db.rows("SELECT nar_hash FROM objects WHERE path = ?", path.base)
        if not rows:
            return StoreFinding(path.base, "missing", "not registered")
        if not self._present(path):
            return StoreFinding(path.base, "missing", "registered, but not on the disk")
        details = compare(self.location(path), NarHash(rows[0][0]))
        return StoreFinding(path.base, "corrupt", "; ".join(details)) if details else None


def _parsed(name: str) -> StorePath | None:
    try:
        path = StorePath.parse(name)
    except UsageError:
        return None
    return path if path.base == name else None


def _listed(directory: Path) -> list[Path]:
    """The directory's entries, sorted; none if it does not exist."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def _point(link: Path, target: Path) -> None:
    """Make or replace a symbolic link, in one step."""
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    fresh.symlink_to(target)
    try:
        fresh.replace(link)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _holder(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace") or "another process"
    except OSError:
        return "another process"
