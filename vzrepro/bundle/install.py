"""Puts a bundle where hosts look for it, in one step: a reader sees the old one or the new one, whole.

The copy is made in a staging directory beside the target, checked while it is written, synced, and exchanged with what
is there. Installers into one parent directory take turns, by a lock on it that dies with its process; whoever holds it
removes what a killed one left.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from vzrepro import disk
from vzrepro.bundle.files import FILES, Bundle, check_digests, examine
from vzrepro.errors import UsageError, VzreproError

_CHUNK = 1 << 20
_TURN_SECS = 0.02
_STAGING, _OLD = ".staging", ".old"


class Installed(enum.StrEnum):
    """What an installation found and did."""

    PRESENT = "present"
    """The very same bundle is there already."""
    NEW = "new"
    """Nothing was there."""
    REPLACED = "replaced"
    """Another intact bundle was there."""
    HEALED = "healed"
    """A damaged or incomplete one was there."""


def install(bundle: Bundle, target: Path) -> Installed:
    """Make the directory `target` a copy of `bundle`, its files read-only.

    Raises UsageError (`target` has files of somebody else, which would be lost), HashMismatch (the bundle changed
    meanwhile), VzreproError (the system refuses; what is there stays as it is).
    """
    target = Path(os.path.realpath(target))
    if _state(bundle, target) is Installed.PRESENT:
        _tidy(target)
        return Installed.PRESENT
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _turn(target.parent) as locked:
            state = _state(bundle, target)
            if state is not Installed.PRESENT:
                if locked:
                    _sweep(target, _STAGING)  # to make room; what is _OLD may be the last there is
                _replace(bundle, target)
            if locked:
                _sweep(target, _STAGING, _OLD)
            return state
    except OSError as error:
        raise VzreproError(
            f"the bundle cannot be installed in {target}",
            reason=f"{error.filename or target}: {error.strerror or error}",
            hint=f"nothing was changed; make room or take another place: vzrepro bundle install "
            f"--kernel-profile {bundle.metadata.profile} --install-dir DIR",
        ) from error


def _state(bundle: Bundle, target: Path) -> Installed:
    """What installing `bundle` would do."""
    try:
        names = [path.name for path in target.iterdir()]
    except FileNotFoundError:
        return Installed.NEW
    except NotADirectoryError as error:
        raise UsageError(f"{target} is not a directory", hint="name another: --install-dir DIR") from error
    except OSError as error:
        raise VzreproError(f"{target} cannot be read", reason=error.strerror) from error
    foreign = sorted(set(names) - set(FILES))
    try:
        found = examine(target)
    except VzreproError:
        state = Installed.HEALED if names else Installed.NEW
    else:
        state = Installed.PRESENT if found.digests == bundle.digests else Installed.REPLACED
    if state is not Installed.PRESENT and foreign:
        raise UsageError(
            f"{target} has more than a bundle's files: {', '.join(foreign[:5])}",
            reason="it would be replaced as a whole",
            hint=f"move them away, or name another: --install-dir {target / bundle.metadata.profile}",
        )
    return state


@contextlib.contextmanager
def _turn(parent: Path) -> Iterator[bool]:
    """Hold the lock of `parent`; False where the file system has none, and only the exchange itself is safe."""
    fd: int | None = None
    try:
        while (fd := disk.try_lock(parent, create=False)) is None:
            time.sleep(_TURN_SECS)
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS):
            raise
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def _tidy(target: Path) -> None:
    """Remove what killed installers left, unless one is at work or this is not allowed."""
    with contextlib.suppress(OSError):
        if _leftovers(target, _STAGING, _OLD) and (fd := disk.try_lock(target.parent, create=False)) is not None:
            try:
                _sweep(target, _STAGING, _OLD)
            finally:
                os.close(fd)


def _sweep(target: Path, *endings: str) -> None:
    for path in _leftovers(target, *endings):
        with contextlib.suppress(OSError):
            disk.remove_tree(path)


def _leftovers(target: Path, *endings: str) -> list[Path]:
    beside = list(target.parent.iterdir())
    return [path for path in beside if path.name.startswith(f".{target.name}.") and path.name.endswith(endings)]


def _replace(bundle: Bundle, target: Path) -> None:
    beside = f".{target.name}.{secrets.token_hex(8)}"
    staging = target.parent / f"{beside}{_STAGING}"
    staging.mkdir(mode=0o755)
    try:
        for name in FILES:
            digest = _copy(bundle.directory / name, staging / name)
            check_digests(bundle.directory, {name: bundle.digests[name]}, {name: digest}, bundle.metadata.profile)
        disk.sync_trees([staging])
        _swap(staging, target, target.parent / f"{beside}{_OLD}")
        disk.sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            disk.remove_tree(staging)  # what it holds now is unfinished, or what was there before


def _copy(source: Path, target: Path) -> str:
    """Copy one file, read-only; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    target.chmod(0o555 if target.name == "youki" else 0o444)
    return digest.hexdigest()


def _swap(staging: Path, target: Path, old: Path) -> None:
    """Put `staging` in the place of `target`; what was there is then at `staging` or nowhere."""
    try:
        staging.rename(target)  # nothing or an empty directory is there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if disk.exchange(staging, target):
        return
    # Where the system cannot exchange, there is a moment with nothing at `target`; killed in it, the next installer
    # finds nothing there, installs, and removes `old`.
    target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        old.rename(target)
        raise
    disk.remove_tree(old)
