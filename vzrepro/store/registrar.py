"""How a tree becomes an object: moved into place and registered in one step, whoever comes at the same time with it."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vzrepro.base import disk
from vzrepro.base.errors import NotDeterministic
from vzrepro.base.model import NarHash, ObjectInfo
from vzrepro.store.database import Database, Run


@dataclass(eq=False, slots=True)
class _Entry:
    """One tree on its way in; `entered` or `error` is set once it is `done`."""

    tree: Path
    info: ObjectInfo
    replaces: bool
    distrusted: bool
    done: bool = False
    entered: bool = False
    error: BaseException | None = None


class Registrar:
    """Enters objects into the store directory `root` and its database; usable from any thread.

    Syncing to the disk is what takes long, so threads that come while one of them is at it are entered together by
    the next: one sync and one transaction for all of them.
    """

    def __init__(self, root: Path, database: Database, clock: Callable[[], float]) -> None:
        self._root = root
        self._db = database
        self._clock = clock
        self._arrived: list[_Entry] = []
        self._arriving = threading.Lock()
        self._working = threading.Lock()

    def enter(self, tree: Path, info: ObjectInfo, *, replaces: bool, distrusted: bool = False) -> bool:
        """Register `tree`, a canonical tree in a scratch directory of the store, as the object `info` describes.

        False, and `tree` stays where it is, when the object is there already and not to be replaced. Raises
        NotDeterministic when another hash is registered, unless that is distrusted; what the disk or the database say.
        """
        entry = _Entry(tree, info, replaces, distrusted)
        with self._arriving:
            self._arrived.append(entry)
        with self._working:
            if not entry.done:
                with self._arriving:
                    batch, self._arrived = self._arrived, []
                self._enter_all(batch)
        if entry.error is not None:
            raise entry.error
        return entry.entered

    def insert_origin(self, run: Run, info: ObjectInfo) -> None:
        """Record where a download was verified from, if it is one."""
        if info.origin is not None:
            run(
                "INSERT OR REPLACE INTO origins (object, origin) SELECT id, ? FROM objects WHERE path = ?",
                info.origin.hex,
                info.path.base,
            )

    def _enter_all(self, batch: list[_Entry]) -> None:
        undos: list[Callable[[], None]] = []
        try:
            with self._db.explained():
                disk.sync_trees([entry.tree for entry in batch])
            with self._db.transaction(durable=True) as run:
                try:
                    for entry in batch:
                        self._place(entry, run, undos)
                    if undos:
                        disk.sync(self._root)
                    run("COMMIT")
                    if undos:
                        os.utime(self._root)  # it changed before: who looked in between has not seen these objects
                except BaseException:
                    # Without the write lock, the targets may be others' by now; then the next sweep removes ours.
                    if self._db.in_transaction:
                        for undo in reversed(undos):
                            undo()
                    raise
        except BaseException as error:
            for entry in batch:
                entry.error = entry.error or error
        finally:
            for entry in batch:
                entry.done = True

    def _place(self, entry: _Entry, run: Run, undos: list[Callable[[], None]]) -> None:
        info = entry.info
        target = self._root / info.path.base
        known = self._known(info)
        if known is not None and known != info.nar_hash and not entry.distrusted:
            # This one's affair alone: the others of the batch go on.
            entry.error = NotDeterministic(
                f"{info.path} came out differently than before",
                reason=f"registered: {known.nix}\nnow:        {info.nar_hash.nix}",
                hint="its inputs are the same, so its builder is not deterministic; keep both and compare them",
            )
        elif known is not None and not entry.replaces:
            self.insert_origin(run, info)
        else:
            undos.append(_put_in_place(entry.tree, target))
            run("DELETE FROM objects WHERE path = ?", info.path.base)
            self._insert(run, info)
            entry.entered = True

    def _known(self, info: ObjectInfo) -> NarHash | None:
        """The hash that is registered under the path, if the object is still on the disk."""
        rows = self._db.rows("SELECT nar_hash FROM objects WHERE path = ?", info.path.base)
        return NarHash(rows[0][0]) if rows and os.path.lexists(self._root / info.path.base) else None

    def _insert(self, run: Run, info: ObjectInfo) -> None:
        run(
            "INSERT INTO objects (path, nar_hash, nar_size, drv_hash, build_key, outcome, registered)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            info.path.base,
            info.nar_hash.hex,
            info.nar_size,
            info.drv_hash and info.drv_hash.hex,
            info.build_key and info.build_key.hex,
            info.outcome.value,
            int(self._clock()),
        )
        for reference in info.references:
            run(
                "INSERT OR IGNORE INTO object_references SELECT id, ? FROM objects WHERE path = ?",
                reference.base,
                info.path.base,
            )
        if info.voucher is not None:
            run("INSERT INTO vouchers SELECT id, ? FROM objects WHERE path = ?", info.voucher, info.path.base)
        self.insert_origin(run, info)


def _put_in_place(tree: Path, target: Path) -> Callable[[], None]:
    """Move `tree` to `target`; what was there lies in the scratch directory then. Returns how to undo it."""
    if not target.exists() and not target.is_symlink():
        disk.move(tree, target)
        return lambda: disk.move(target, tree)
    old = tree.with_name(f"{tree.name}.{secrets.token_hex(4)}.old")
    swapped = disk.exchange(tree, target)
    if not swapped:
        disk.move(target, old)
        disk.move(tree, target)

    def undo() -> None:
        if swapped:
            disk.exchange(tree, target)
        else:
            disk.move(target, tree)
            disk.move(old, target)

    return undo
