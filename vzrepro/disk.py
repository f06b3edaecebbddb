"""What the store needs from a file system: locks that die with their process, durable trees, swaps, removal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

_OPEN_DIR = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_FEW = 64  # entries that are synced one by one; beyond, flushing the whole file system is faster
_DEEP = 64  # levels that are descended into, each holding a descriptor
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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
    """Whether somebody has `path` locked; False when it does not exist."""
    try:
        fd = try_lock(path, create=False)
    except FileNotFoundError:
        return False
    if fd is not None:
        os.close(fd)
        return False
    return path.exists()


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
        found.append(tree)
        if tree.is_dir() and not tree.is_symlink():
            for directory, names, files in os.walk(tree):
                found += [Path(directory, name) for name in (*names, *files)]
                if len(found) > _FEW:
                    break
    if len(found) > _FEW:
        if found and _sync_file_system(trees[0].parent):
            return
        found = [path for tree in trees for path in (tree, *tree.rglob("*"))]
    for path in found:
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Have the file, or the directory's list of entries, on the disk before returning."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    """Swap two trees in one step; False, with nothing changed, where the system cannot (renameat2(2) is Linux's)."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    modes = _loosen(one), _loosen(other)
    swapped = not libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    number = ctypes.get_errno()
    for path, mode in zip((other, one) if swapped else (one, other), modes, strict=True):
        _tighten(path, mode)
    if not swapped and number not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(number, os.strerror(number), str(one), None, str(other))
    return swapped


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


def remove_tree(path: Path) -> None:
    """Remove a file, link or directory, whatever its modes and depth; fine if it is gone or goes meanwhile."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
            return
        path.chmod(0o700)
        top = os.open(path, _OPEN_DIR)
    except FileNotFoundError:
        return
    try:
        while _empty(top, top, 0):
            pass
    finally:
        os.close(top)
    with contextlib.suppress(FileNotFoundError):
        path.rmdir()


def _empty(fd: int, top: int, depth: int) -> bool:
    """Remove the directory's entries; True if some of them were moved up to `top`, being too deep to descend to."""
    lifted = False
    with os.scandir(fd) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_dir in found:
        with contextlib.suppress(FileNotFoundError):
            if not is_dir:
                os.unlink(name, dir_fd=fd)
                continue
            os.chmod(name, 0o700, dir_fd=fd)
            if depth >= _DEEP:
                os.rename(name, f"{secrets.token_hex(8)}.deep", src_dir_fd=fd, dst_dir_fd=top)
                lifted = True
                continue
            child = os.open(name, _OPEN_DIR, dir_fd=fd)
            try:
                lifted |= _empty(child, top, depth + 1)
            finally:
                os.close(child)
            os.rmdir(name, dir_fd=fd)
    return lifted
