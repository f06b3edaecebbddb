"""The store's SQLite database: opened, created, written in transactions, and its failures told in plain words.

One connection serves all threads, behind one lock that is held for the length of a statement or a transaction.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vzrepro.base import disk
from vzrepro.base.errors import VzreproError

SCHEMA = 2
"""The `user_version` of the databases this code reads and writes: that of schema.sql."""

"""The directory in the store directory that holds all but the objects."""

Run = Callable[..., None]
"""Runs one statement, with its parameters, in the open transaction."""

_BUSY_SECS = 60.0
_RESERVE_BYTES = 1 << 20


class ReadOnlyStore(VzreproError):
    """The store cannot be written."""


class Database:
    """The database of the store in `root`, and the directories beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private = root / disk.PRIVATE
        self.file = self.private / "db.sqlite"
        self.mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the connection; it is opened again when needed."""
        with self.mutex:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @property
    def in_transaction(self) -> bool:
        """Whether this process has the write lock."""
        return self._connection is not None and self._connection.in_transaction

    def create(self) -> None:
        """Make what is missing of the store's directories and database."""
        if self._connection is not None:
            return
        with self.mutex, self.explained():
            for directory in (
                self.private / "tmp",
                self.private / "log",
                self.private / "roots",
                self.private / "lock",
            ):
                directory.mkdir(parents=True, exist_ok=True)
            if self._open() is not None:
                return
            file = self.private / "lock" / "create"
            while (fd := disk.try_lock(file)) is None:
                time.sleep(0.01)
            try:
                if self._open() is None:
                    connection = sqlite3.connect(self.file, timeout=_BUSY_SECS, isolation_level=None)
                    with contextlib.closing(connection):
                        # Of the memory that WAL shares, SQLite has a byte of each 4 KiB allocated. In smaller blocks
                        # the rest are holes, and who writes into one on a full disk ends with SIGBUS.
                        wal = os.statvfs(self.private).f_frsize >= 4096
                        connection.execute(f"PRAGMA journal_mode = {'WAL' if wal else 'DELETE'}")
                        self._write_schema(connection)
                    self.reserve()
            finally:
                file.unlink(missing_ok=True)
                os.close(fd)

    @staticmethod
    def _write_schema(connection: sqlite3.Connection) -> None:
        from importlib import resources

        schema = resources.files("vzrepro").joinpath("schema.sql").read_text("utf-8")
        connection.executescript(f"BEGIN IMMEDIATE; {schema} COMMIT;")

    def reserve(self) -> None:
        """Put a little of the disk aside, if there is that much."""
        reserve = self.private / "reserve"
        try:
            reserve.write_bytes(bytes(_RESERVE_BYTES))
        except OSError:
            reserve.unlink(missing_ok=True)

    def _open(self) -> sqlite3.Connection | None:
        """The connection; None as long as the store has no database. Call with the mutex held."""
        if self._connection is None and self.file.exists():
            connection = self._connect("mode=rw")
            try:
                (version,) = connection.execute("PRAGMA user_version").fetchone()
            except sqlite3.OperationalError as error:
                connection.close()
                if not _is_read_only(error):
                    raise
                connection = self._connect("mode=ro&immutable=1")
                (version,) = connection.execute("PRAGMA user_version").fetchone()
            if 0 < version < SCHEMA:
                self._write_schema(connection)  # what newer schemas add; nothing is taken away
                version = SCHEMA
            if version != SCHEMA:
                connection.close()
                if version == 0:  # its creation was interrupted, or goes on
                    return None
                raise VzreproError(
                    f"the store {self.root} was written by a newer vzrepro",
                    reason=f"its database has format {version}, this program knows {SCHEMA}",
                    hint="update vzrepro, or use another store: export VZREPRO_STORE=DIR",
                )
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA fullfsync = ON")  # through the drive's cache on macOS; nothing elsewhere
            self._connection = connection
        return self._connection

    def _connect(self, options: str) -> sqlite3.Connection:
        uri = f"{self.file.as_uri()}?{options}"
        return sqlite3.connect(uri, uri=True, timeout=_BUSY_SECS, isolation_level=None, check_same_thread=False)

    def is_made(self) -> bool:
        """Whether there is a database, whose making was not interrupted."""
        with self.mutex, self.explained():
            return self._open() is not None

    def rows(self, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
        with self.mutex, self.explained():
            connection = self._open()
            return [] if connection is None else connection.execute(sql, parameters).fetchall()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[Run]:
        """The store's write lock, for as long as the `with` block runs; its changes are all made, or none.

        Without `durable`, a power cut may undo the changes, but never tear them.
        """
        self.create()
        with self.mutex, self.explained():
            connection = self._open()
            if connection is None:
                raise VzreproError(f"the store {self.root} was removed while it was in use")

            def run(sql: str, *parameters: object) -> None:
                connection.execute(sql, parameters)

            run(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            run("BEGIN IMMEDIATE")
            try:
                yield run
                if connection.in_transaction:
                    run("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    run("ROLLBACK")
                raise

    @contextlib.contextmanager
    def explained(self, *, only_full: bool = False) -> Iterator[None]:
        """Turn errors of the disk and of the database into ones a user can act on."""
        try:
            yield
        except OSError as error:
            explained = self._explanation(error.errno, error.strerror or str(error), only_full=only_full)
            if explained is None:
                raise
            raise explained from error
        except sqlite3.Error as error:
            raise self._database_explanation(error) from error

    def _explanation(self, number: int | None, reason: str, *, only_full: bool) -> VzreproError | None:
        if number in (errno.ENOSPC, errno.EDQUOT):
            place = self.root
            while not place.is_mount() and place != place.parent:
                place = place.parent
            free = shutil.disk_usage(place).free
            return VzreproError(
                "the disk is full",
                reason=f"{reason}: {free:,} bytes are free on {place}, where the store {self.root} is",
                hint="vzrepro store gc",
            )
        if only_full:
            return None
        if number in (errno.EROFS, errno.EACCES, errno.EPERM):
            return ReadOnlyStore(
                f"the store {self.root} cannot be written",
                reason=reason,
                hint="use a store of your own: export VZREPRO_STORE=DIR",
            )
        if number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return VzreproError(
                f"the store {self.root} is on a file system without file locks or shared memory",
                reason=reason,
                hint="put it on a local disk: export VZREPRO_STORE=DIR",
            )
        return None

    def _database_explanation(self, error: sqlite3.Error) -> VzreproError:
        name = getattr(error, "sqlite_errorname", "")
        number = None
        if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and _is_full(self.private)):
            number = errno.ENOSPC
        elif isinstance(error, sqlite3.OperationalError) and _is_read_only(error):
            number = errno.EROFS
        elif name.startswith(("SQLITE_PROTOCOL", "SQLITE_IOERR_LOCK", "SQLITE_IOERR_SHM")):
            number = errno.ENOLCK
        explained = self._explanation(number, str(error), only_full=False)
        if explained is not None:
            return explained
        if name.startswith("SQLITE_BUSY"):
            return VzreproError(
                f"the store {self.root} is busy",
                reason=f"another process has kept its database locked for {_BUSY_SECS:.0f} s",
                hint="wait for it, or end it",
            )
        return VzreproError(
            f"the store's database {self.file} cannot be used",
            reason=str(error),
            hint=f"objects are made again after: rm {self.file}*",
        )


def _is_read_only(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN"))


def _is_full(directory: Path) -> bool:
    try:
        return shutil.disk_usage(directory).free < _RESERVE_BYTES
    except OSError:
        return False
