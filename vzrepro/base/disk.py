"""What is needed of a file system: locks that die with their process, whole files, durable trees, swaps, removal.

Each call that Linux or macOS alone has is here, with what takes its place elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from vzrepro.base.errors import Interrupted, TimedOut, VzreproError

PRIVATE = ".vzrepro"
"""Our own directory in a store or a cache. No object and no key has its name, and Nix clients do not look there."""

GRACE_SECS = 5.0
"""Removing goes on for so long when a run is interrupted; what is left then is left to the next sweep."""

_OPEN_DIR = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FEW = 64  # entries that are synced one by one; beyond, flushing the whole file system is faster
_DEEP = 64  # levels that are descended into, each holding a descriptor
_CHUNK = 1 << 20
_CANNOT_SHARE = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # or not these two files
_NO_FULL_SYNC = (errno.EINVAL, errno.ENOTTY, errno.ENOTSUP, errno.EOPNOTSUPP)  # shares, other file systems
_OFTEN = 1024  # files between two calls of `go_on`
_ENTRY_BYTES = 4096
_AT_FDCWD = -100  # Linux's
_RENAME_EXCHANGE = 2  # Linux's, and as RENAME_SWAP macOS's


def try_lock(path: Path, *, create: bool = True) -> int | None:
    """Lock `path`, a file (created if wanted) or a directory, until the returned descriptor is closed.

    None when another holds it, or when it went away meanwhile: who removes a locked path holds its lock, so a
    descriptor of a path that is no longer there locks nothing and is not returned.
    Raises FileNotFoundError when `path` is missing and not to be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW if create else os.O_RDONLY | os.O_CLOEXEC
    fd = os.open(path, flags, 0o644)
    locked = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.suppress(FileNotFoundError):
            locked = os.path.samestat(os.fstat(fd), path.lstat())
    except BlockingIOError:
        pass
    finally:
        if not locked:
            os.close(fd)
    return fd if locked else None


def held(path: Path) -> bool:
    """Whether somebody has `path` locked; False when it does not exist. Asking disturbs nobody else who asks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return path.exists()
    finally:
        os.close(fd)
    return False


def remove_unlocked(path: Path) -> None:
    """Remove a lockable file or directory, with all in it, unless somebody has it locked."""
    with contextlib.suppress(FileNotFoundError):
        fd = try_lock(path, create=False)
        if fd is not None:
            try:
                remove_tree(path)
            finally:
                os.close(fd)


def sync_trees(trees: Sequence[Path]) -> None:
    """Have all these trees, which are on one file system, on the disk before returning."""
    found: list[Path] = []
    for tree in trees:
        found += itertools.islice(_nodes(tree), _FEW + 1)
        if len(found) > _FEW:
            if _sync_file_system(trees[0].parent):
                return
            found = [path for tree in trees for path in _nodes(tree)]
            break
    for path in found:
        if not path.is_symlink():
            _synced(path, os.fsync)
    if _has_full_sync():
        sync(trees[0].parent)  # empties the drive's cache, once for all of them


def _nodes(tree: Path) -> Iterator[Path]:
    """The tree and all that is in it."""
    pending = [tree]
    while pending:
        path = pending.pop()
        yield path
        if path.is_dir() and not path.is_symlink():
            pending += path.iterdir()


def walk(top: Path, on_error: Callable[[OSError], object]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Like `os.walk` from the top downwards, which before Python 3.12 goes no deeper than the stack allows: each
    directory, the names of those in it (links to some included, and not followed), and of all else.

    Names taken off the second list are not visited. `on_error` gets what keeps a directory from being listed.
    """
    pending = [top]
    while pending:
        directory = pending.pop()
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else files).append(entry.name)
        except OSError as error:
            on_error(error)
            continue
        yield directory, folders, files
        pending += (below for name in reversed(folders) if not (below := directory / name).is_symlink())


def sync(path: Path) -> None:
    """Have the file, or the directory's list of entries, on the disk before returning."""
    _synced(path, _full_sync if _has_full_sync() else os.fsync)


def _synced(path: Path, flush: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flush(fd)
    finally:
        os.close(fd)


def _has_full_sync() -> bool:
    """Whether fsync(2) stops at the drive's cache, as on macOS, and another call goes through it."""
    return hasattr(fcntl, "F_FULLFSYNC")


def _full_sync(fd: int) -> None:
    try:
        fcntl.fcntl(fd, getattr(fcntl, "F_FULLFSYNC"))  # noqa: B009 - mypy knows the name on macOS alone
    except OSError as error:
        if error.errno not in _NO_FULL_SYNC:
            raise
        os.fsync(fd)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes to the new file `target`, sharing blocks where the system can (Linux's copy_file_range(2)).

    Raises OSError, also when the file becomes shorter meanwhile; what was written until then stays.
    """
    with source.open("rb") as reader, target.open("xb") as writer:
        size = os.fstat(reader.fileno()).st_size
        done = _share_blocks(reader.fileno(), writer.fileno(), size)
        if done < size:
            reader.seek(done)
            writer.seek(done)
            shutil.copyfileobj(reader, writer, _CHUNK)
            done = writer.tell()
        if done < size:
            raise OSError(errno.EIO, "it became shorter while it was copied", str(source))


def copy_link(source: Path, target: Path) -> None:
    """Make the symbolic link `target` that says what `source` does."""
    target.symlink_to(os.readlink(source))  # noqa: PTH115 - a Path would leave out `./` and doubled slashes


def _share_blocks(reader: int, writer: int, size: int) -> int:
    """Copy as many of the first `size` bytes as the kernel can by itself; returns how many."""
    done = 0
    if hasattr(os, "copy_file_range"):
        while done < size:
            try:
                count = os.copy_file_range(reader, writer, size - done)
            except OSError as error:
                if error.errno not in _CANNOT_SHARE:
                    raise
                break
            if not count:
                break
            done += count
    return done


@contextlib.contextmanager
def whole_file(path: Path, *, mode: int = 0o666, replace: bool = True, durable: bool = True) -> Iterator[BinaryIO]:
    """Write a file that is there as a whole or not at all, whenever the machine stops and whoever else writes it.

    The block writes to a new file beside `path`, whose mode is `mode` without the umask's bits; its end publishes it,
    see there for the rest. Raises OSError; nothing is left when the block or this raises.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "wb") as opened:
            yield opened
        publish(temporary, path, replace=replace, durable=durable)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, *, mode: int = 0o666, replace: bool = True, durable: bool = True) -> None:
    """Write a `whole_file` that holds `data`."""
    with whole_file(path, mode=mode, replace=replace, durable=durable) as opened:
        opened.write(data)


def publish(temporary: Path, path: Path, *, replace: bool = True, durable: bool = True) -> None:
    """Give a finished file of the same file system its name, its content being on the disk before.

    What has the name is replaced; without `replace`, FileExistsError is raised then, and of several at once the first
    one's file stays. What is not `durable` may be gone again, or be the one before, when the machine stops soon, but is
    never half a file. Raises OSError; `temporary` may still be there afterwards.
    """
    sync(temporary)
    if replace:
        temporary.replace(path)
    else:
        path.hardlink_to(temporary)
    if durable:
        sync(path.parent.resolve())


def _sync_file_system(path: Path) -> bool:
    """Linux's syncfs(2); False where it does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(fd)
    return True


def move(source: Path, target: Path) -> None:
    """Rename a read-only tree into another directory. `target` must not exist."""
    mode = _loosen(source)
    try:
        source.rename(target)
    except BaseException:
        _tighten(source, mode)
        raise
    _tighten(target, mode)


def exchange(one: Path, other: Path) -> bool:
    """Swap two trees in one step, by Linux's renameat2(2) or macOS's renamex_np(2).

    False, with nothing changed, where the system or the file system cannot.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2") and not hasattr(libc, "renamex_np"):
        return False
    modes = _loosen(one), _loosen(other)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        swapped = not libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    else:
        swapped = not libc.renamex_np(*names, _RENAME_EXCHANGE)
    number = ctypes.get_errno()
    for path, mode in zip((other, one) if swapped else (one, other), modes, strict=True):
        _tighten(path, mode)
    if not swapped and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return swapped


def same_name(directory: Path, one: str, other: str) -> bool:
    """Whether these two relative paths lead to one file in the directory, as the file system itself answers.

    It is asked in a new directory that is removed again. Raises OSError.
    """
    scratch = directory / f".names-{secrets.token_hex(8)}"
    scratch.mkdir()
    try:
        (scratch / one).mkdir(parents=True)
        return os.path.lexists(scratch / other)
    finally:
        remove_tree(scratch)


def require_distinct(directory: Path, names: Iterable[str]) -> None:
    """Raise VzreproError if two of `names`, relative paths, or of the directories above them would be one in
    `directory`: on a file system that ignores case or Unicode form. Nothing has been written then."""
    seen: dict[str, str] = {}
    for name in names:
        for path in (name, *map(str, Path(name).parents)):
            other = seen.setdefault(unicodedata.normalize("NFC", path.casefold()), path)
            if other != path and same_name(directory, other, path):
                raise merged(path, other)


def merged(name: str, other: str | None = None) -> VzreproError:
    """The error for a name that the file system takes for another one."""
    return VzreproError(
        f"{name} exists already" + (f", as {other}" if other else ""),
        reason="the names differ only in case, or in Unicode form, which the file system ignores",
        hint="use a store on a disk that tells them apart: export VZREPRO_STORE=DIR",
    )


def _loosen(path: Path) -> int | None:
    """Make a directory writable, as rename(2) wants it when the parent changes; the mode to go back to, if any."""
    mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode) or mode & stat.S_IWUSR:
        return None
    path.chmod(stat.S_IMODE(mode) | stat.S_IWUSR)
    return stat.S_IMODE(mode)


def _tighten(path: Path, mode: int | None) -> None:
    if mode is not None:
        path.chmod(mode)


def remove_tree(path: Path, go_on: Callable[[], None] = lambda: None) -> None:
    """Remove a file, link or directory, whatever its modes and depth; fine if it is gone or goes meanwhile.

    `go_on` is called for each directory and now and then for files: what it raises ends the removal there.
    """
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        _open_up(path, path.lstat().st_mode)
        top = os.open(path, _OPEN_DIR)
    except FileNotFoundError:
        return
    try:
        while _empty(top, top, 0, go_on):
            pass
    finally:
        os.close(top)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def _empty(fd: int, top: int, depth: int, go_on: Callable[[], None]) -> bool:
    """Remove the directory's entries; True if some of them were moved up to `top`, being too deep to descend to."""
    lifted = False
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    go_on()
    for number, (name, is_dir) in enumerate(found, 1):
        if number % _OFTEN == 0:
            go_on()
        with contextlib.suppress(FileNotFoundError):
            if not is_dir:
                os.unlink(name, dir_fd=fd)
                continue
            _open_up(name, os.lstat(name, dir_fd=fd).st_mode, fd)
            if depth >= _DEEP:
                os.rename(name, f"{secrets.token_hex(8)}.deep", src_dir_fd=fd, dst_dir_fd=top)
                lifted = True
                continue
            child = os.open(name, _OPEN_DIR, dir_fd=fd)
            try:
                lifted |= _empty(child, top, depth + 1, go_on)
            finally:
                os.close(child)
            os.rmdir(name, dir_fd=fd)
    return lifted


def _open_up(path: Path | str, mode: int, dir_fd: int | None = None) -> None:
    """Let the owner empty a directory. One that is open already may be another user's, who lets us write there."""
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(path, 0o700, dir_fd=dir_fd)


def until_stopped(stop: threading.Event | None, secs: float | None) -> Callable[[], None]:
    """A `go_on` that raises Interrupted a few seconds after `stop` was set, or TimedOut after `secs` (None: never)."""
    begun = time.monotonic()
    seen: float | None = None

    def go_on() -> None:
        nonlocal seen
        now = time.monotonic()
        if secs is not None and now > begun + secs:
            raise TimedOut(f"removing took longer than {secs:g} s")
        if stop is not None and stop.is_set():
            seen = now if seen is None else seen
            if now > seen + GRACE_SECS:
                raise Interrupted("interrupted while files were being removed")

    return go_on


def usage(directory: Path, enough: int, go_on: Callable[[], None] = lambda: None) -> int:
    """Bytes that what is in the directory takes on the disk; counting ends once there are more than `enough`.

    A file counts with its blocks, once for all its links; an entry at least as `_ENTRY_BYTES`, so that nothing is free.
    Others may be changing the tree, of any depth: a part that cannot be opened, or has just been moved, is left out.
    `go_on` is called as in `remove_tree`.
    """
    total = count = 0
    linked: set[tuple[int, int]] = set()
    pending: list[tuple[tuple[int, int], list[str]]] = []
    fd = os.open(directory, _OPEN_DIR)
    try:
        while True:
            status = os.fstat(fd)
            names: list[str] = []
            go_on()
            with os.scandir(fd) as entries:
                for entry in entries:
                    count += 1
                    if count % _OFTEN == 0:
                        go_on()
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if stat.S_ISDIR(found.st_mode):
                        names.append(entry.name)
                    elif found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in linked:
                            total += _ENTRY_BYTES
                            continue
                        linked.add((found.st_dev, found.st_ino))
                    total += max(_ENTRY_BYTES, found.st_blocks * 512)
                    if total > enough:
                        return total
            pending.append(((status.st_dev, status.st_ino), names))
            # One descriptor at a time, whatever the depth: up again through `..`, if that is still where we were.
            while (below := _first_opened(pending[-1][1], fd)) is None:
                pending.pop()
                if not pending:
                    return total
                above = os.open("..", _OPEN_DIR, dir_fd=fd)
                os.close(fd)
                fd = above
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != pending[-1][0]:
                    return total
            os.close(fd)
            fd = below
    finally:
        os.close(fd)


def _first_opened(names: list[str], dir_fd: int) -> int | None:
    """A descriptor of the last of the directories that can be opened; it and those after it are taken off `names`."""
    while names:
        with contextlib.suppress(OSError):
            return os.open(names.pop(), _OPEN_DIR, dir_fd=dir_fd)
    return None
