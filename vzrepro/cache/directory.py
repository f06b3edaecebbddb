"""A binary cache's entries as files below a directory; any number of processes may share it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path

from vzrepro.base import disk
from vzrepro.base.errors import RemoteError
from vzrepro.base.model import FileHash
from vzrepro.cache.backend import Entry, Sent, check_key, is_key

_LEFTOVER_SECS = 24 * 3600.0


class DirectoryBackend:
    """A `Backend` in a directory, which is made when the first entry is written.

    Writes go to a temporary file that is renamed (or linked, for `if_absent`); what crashed leaves is removed a day
    later. An entry's modification time says when it was last used.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    @property
    def url(self) -> str:
        """The directory as a `file:` URL."""
        return self._root.as_uri()

    def get(self, key: str, *, use: bool = True) -> AbstractContextManager[_Reader] | None:
        """See `Backend.get`; without `use`, looking at the entry does not make it a recently used one."""
        path = self._path(key)
        with self._explained("read"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                return None
            # A cache on a read-only medium serves as well, it only does not know what is used.
            if use:
                with contextlib.suppress(OSError):
                    os.utime(fd)
        return _Reader(fd, self._root)

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        sha256: FileHash | None = None,
        progress: Sent | None = None,
    ) -> bool:
        """See `Backend.put`; a directory has no place for `sha256`, and takes no time to speak of."""
        path = self._path(key)
        with self._explained("write"):
            if if_absent and path.exists():
                return False
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._temporary()
            try:
                self._fill(temporary, source)
                # A lost entry is a miss, so that a push of many small objects does not wait for as many directories.
                disk.publish(temporary, path, replace=not if_absent, durable=False)
                return True
            except FileExistsError:
                return False
            finally:
                temporary.unlink(missing_ok=True)

    def head(self, key: str) -> Entry | None:
        """See `Backend.head`."""
        with self._explained("read"):
            try:
                status = self._path(key).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return Entry(key, status.st_size, status.st_mtime) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Backend.list`."""
        # A prefix need not end at a part's end: walk what it certainly contains.
        inside = prefix.rpartition("/")[0]
        start = self._path(inside) if inside else self._root
        for directory, names, files in disk.walk(start, self._refuse_listing):
            names[:] = [name for name in names if not name.startswith(".")]
            for name in files:
                key = (directory / name).relative_to(self._root).as_posix()
                if key.startswith(prefix) and is_key(key) and (entry := self.head(key)) is not None:
                    yield entry

    def delete(self, keys: Collection[str]) -> None:
        """See `Backend.delete`."""
        for key in keys:
            with self._explained("write"), contextlib.suppress(NotADirectoryError):
                self._path(key).unlink(missing_ok=True)

    def refresh(self, key: str) -> bool:
        """See `Backend.refresh`."""
        with self._explained("write"):
            try:
                os.utime(self._path(key), follow_symlinks=False)
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def now(self) -> float:
        """See `Backend.now`."""
        return time.time()

    @contextmanager
    def spool(self) -> Iterator[Path]:
        """See `Backend.spool`; `put` takes such a file over without copying it."""
        with self._explained("write"):
            path = self._temporary()
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    @contextmanager
    def lock(self, *, exclusive: bool) -> Iterator[None]:
        """See `Backend.lock`: many writers together, or one that trims."""
        with self._explained("write"):
            own = self._root / disk.PRIVATE
            own.mkdir(parents=True, exist_ok=True)
            file = FileIO(os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644), "r+")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield

    def sweep(self) -> None:
        """Remove what interrupted writers left a day ago or earlier."""
        with self._explained("write"):
            for path in (self._root / disk.PRIVATE / "tmp").glob("*"):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime < time.time() - _LEFTOVER_SECS:
                        path.unlink()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _temporary(self) -> Path:
        temporary = self._root / disk.PRIVATE / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        return temporary / uuid.uuid4().hex

    def _fill(self, temporary: Path, source: bytes | Path) -> None:
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        elif source.parent == temporary.parent:
            source.rename(temporary)  # spooled here, for us
        else:
            shutil.copyfile(source, temporary)

    def _refuse_listing(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise self._error("list", error) from error

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(verb, error) from error

    def _error(self, verb: str, error: OSError) -> RemoteError:
        return RemoteError(
            f"cannot {verb} the cache in {self._root}",
            reason=error.strerror or str(error),
            hint=f"ls -ld {self._root}; df -h {self._root}",
        )


class _Reader:
    """An open entry."""

    def __init__(self, fd: int, root: Path) -> None:
        self._fd = fd
        self._root = root

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        os.close(self._fd)

    def read(self, size: int, /) -> bytes:
        try:
            return os.read(self._fd, size)
        except OSError as error:
            raise RemoteError(f"cannot read the cache in {self._root}", reason=error.strerror) from error
