"""Puts a bundle where hosts look for it: a reader sees the old one or the new one, whole, and never half of each.

The copy is made in a staging directory, checked while it is written, and synced. Then it is exchanged with the target,
in one step. A directory that the profiles' directories lie in, as `~/.vz/linux` is, cannot be exchanged with them in
it: there the files are renamed one by one, version.json going first and coming last, so that in between there is no
bundle. Installers into one place take turns, by locks on directories that die with their process; whoever holds them
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
from dataclasses import dataclass
from pathlib import Path

from vzrepro.base import disk
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.bundle.files import FILES, Bundle, check_digests, examine, has_any
from vzrepro.guest.metadata import VERSION_FILE, KernelProfile

_CHUNK = 1 << 20
_TURN_SECS = 0.02
_STAGING, _OLD = ".staging", ".old"
_PARTS = tuple(f".{profile}." for profile in KernelProfile)
_NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS)


class Installation(enum.StrEnum):
    """What an installation found and did."""

    PRESENT = "present"
    """The very same bundle is there already."""
    NEW = "new"
    """Nothing was there."""
    REPLACED = "replaced"
    """Another intact bundle was there."""
    HEALED = "healed"
    """A damaged or incomplete one was there."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What installing into `target` would do. `mixed`: there may be other things, so files are renamed one by one."""

    target: Path
    mixed: bool
    state: Installation

    @property
    def folder(self) -> Path:
        """Where the staging directory is: on the target's file system."""
        return self.target if self.mixed else self.target.parent

    @property
    def prefix(self) -> str:
        """How the names of what is temporary begin there."""
        return ".bundle." if self.mixed else f".{self.target.name}."

    def leftovers(self, *endings: str) -> list[Path]:
        """What killed installers left."""
        return [
            path for path in self.folder.iterdir() if path.name.startswith(self.prefix) and path.name.endswith(endings)
        ]


class _Meanwhile(Exception):
    """Somebody made something where there was nothing: look again."""


def install(bundle: Bundle, target: Path, also: Path | None = None) -> Installation:
    """Make the directory `target` a copy of `bundle`, its files read-only, and put the same into the directory `also`,
    where other things stay as they are.

    Raises UsageError (there are files of somebody else, which would be lost), HashMismatch (the bundle changed
    meanwhile), VzreproError (the system refuses; what is there stays as it is).
    """
    targets = [Path(os.path.realpath(path)) for path in (target, also) if path is not None]

    def planned() -> list[_Plan]:
        return [_planned(bundle, path, path in targets[1:]) for path in targets]

    plans = planned()
    if all(plan.state is Installation.PRESENT for plan in plans):
        _tidy(plans)
        return Installation.PRESENT
    while True:
        try:
            for plan in plans:
                plan.folder.mkdir(parents=True, exist_ok=True)
            held = _locks(plans)
            with _turn(sorted(held)) as locked:
                plans = planned()
                if not _locks(plans) <= held:
                    continue
                for plan in plans:
                    if locked:
                        _sweep(plan, _STAGING)  # to make room; what is _OLD may be the last there is
                _replace_all(bundle, [plan for plan in plans if plan.state is not Installation.PRESENT])
                for plan in plans:
                    if locked:
                        _sweep(plan, _STAGING, _OLD)
                return next(
                    (plan.state for plan in plans if plan.state is not Installation.PRESENT), Installation.PRESENT
                )
        except _Meanwhile:
            continue
        except OSError as error:
            raise VzreproError(
                f"the bundle cannot be installed in {' and '.join(map(str, targets))}",
                reason=f"{error.filename or target}: {error.strerror or error}",
                hint=f"nothing was changed; make room or take another place: vzrepro bundle install "
                f"--kernel-profile {bundle.metadata.kind} --install-dir DIR",
            ) from error


def _planned(bundle: Bundle, target: Path, mixed: bool) -> _Plan:
    try:
        names = [path.name for path in target.iterdir()]
    except FileNotFoundError:
        return _Plan(target, mixed, Installation.NEW)
    except NotADirectoryError as error:
        raise UsageError(f"{target} is not a directory", hint="name another: --install-dir DIR") from error
    except OSError as error:
        raise VzreproError(f"{target} cannot be read", reason=error.strerror) from error
    mixed = mixed or any(name in set(KernelProfile) or name.startswith(_PARTS) for name in names)
    try:
        found = examine(target)
    except VzreproError:
        state = Installation.HEALED if has_any(target) or (names and not mixed) else Installation.NEW
    else:
        state = Installation.PRESENT if found.digests == bundle.digests else Installation.REPLACED
    lost = {name for name in names if name not in FILES}
    if mixed:  # what is foreign stays
        lost = {name for name in FILES if os.path.isdir(target / name)}  # noqa: PTH112 (which never raises)
    if state is not Installation.PRESENT and lost:
        raise UsageError(
            f"{target} has more than a bundle's files: {', '.join(sorted(lost)[:5])}",
            reason="a directory has the name of one" if mixed else "it would be replaced as a whole",
            hint=f"move them away, or name another: --install-dir {target / bundle.metadata.kind}",
        )
    return _Plan(target, mixed, state)


def _locks(plans: list[_Plan]) -> set[Path]:
    """The directories to be locked: also a target itself, since whoever installs below it holds that one."""
    return {plan.folder for plan in plans} | {plan.target for plan in plans if plan.target.is_dir()}


@contextlib.contextmanager
def _turn(folders: list[Path]) -> Iterator[bool]:
    """Hold the locks of `folders`, sorted, so that no two wait for each other; False where a file system has none, and
    only the exchange itself is safe."""
    with contextlib.ExitStack() as stack:
        locked = True
        for folder in folders:
            fd: int | None = None
            try:
                while (fd := disk.try_lock(folder, create=False)) is None:
                    time.sleep(_TURN_SECS)
            except FileNotFoundError as error:
                raise _Meanwhile from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                locked = False
            else:
                stack.callback(os.close, fd)
        yield locked


def _tidy(plans: list[_Plan]) -> None:
    """Remove what killed installers left, unless one is at work or this is not allowed."""
    for plan in plans:
        with contextlib.suppress(OSError):
            if plan.leftovers(_STAGING, _OLD) and (fd := disk.try_lock(plan.folder, create=False)) is not None:
                try:
                    _sweep(plan, _STAGING, _OLD)
                finally:
                    os.close(fd)


def _sweep(plan: _Plan, *endings: str) -> None:
    for path in plan.leftovers(*endings):
        with contextlib.suppress(OSError):
            disk.remove_tree(path)


def _replace_all(bundle: Bundle, plans: list[_Plan]) -> None:
    """All copies are made before the first of them gets its place: a full disk leaves everything as it was."""
    with contextlib.ExitStack() as stack:
        staged = []
        for plan in plans:
            staging = plan.folder / f"{plan.prefix}{secrets.token_hex(8)}{_STAGING}"
            staging.mkdir(mode=0o755)
            stack.callback(_remove, staging)  # what it holds then is unfinished, or what was there before
            for name in FILES:
                digest = _copy(bundle, name, staging / name)
                check_digests(bundle.directory, {name: bundle.digests[name]}, {name: digest}, bundle.metadata.profile)
            disk.sync_trees([staging])
            staged.append(staging)
        for plan, staging in zip(plans, staged, strict=True):
            old = staging.with_suffix(_OLD)
            if plan.mixed:
                _rename_files(staging, plan.target, old)
            else:
                _swap(staging, plan, old)
            disk.sync(plan.folder)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        disk.remove_tree(path)


def _copy(bundle: Bundle, name: str, target: Path) -> str:
    """Copy one file, read-only; the sha256 of what was copied."""
    digest = hashlib.sha256()
    with target.open("xb") as writer:
        if name == VERSION_FILE:
            digest.update(bundle.content)
            writer.write(bundle.content)
        else:
            with (bundle.directory / name).open("rb") as reader:
                while chunk := reader.read(_CHUNK):
                    digest.update(chunk)
                    writer.write(chunk)
    target.chmod(0o555 if name == "youki" else 0o444)
    return digest.hexdigest()


def _swap(staging: Path, plan: _Plan, old: Path) -> None:
    """Put `staging` in the place of the target; what was there is then at `staging` or nowhere."""
    target = plan.target
    try:
        staging.rename(target)  # nothing or an empty directory is there
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return
    if plan.state is Installation.NEW:
        raise _Meanwhile
    if disk.exchange(staging, target):
        return
    # Where the system cannot exchange, there is a moment with nothing at `target`; killed in it, the next installer
    # finds nothing there, installs, and removes `old`.
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    disk.remove_tree(old)


def _rename_files(staging: Path, target: Path, old: Path) -> None:
    """Put the files in `staging` into `target`, what was there into `old`, and remove that.

    version.json goes first and comes last: without it the rest is no bundle, so files of two bundles never count as
    one. Killed in between, the next installer finds none, installs, and removes `old`.
    """
    old.mkdir(mode=0o755)
    moved, placed = [], []
    try:
        for name in reversed(FILES):
            with contextlib.suppress(FileNotFoundError):
                (target / name).rename(old / name)
                moved.append(name)
        disk.sync(target)
        for name in FILES:
            (staging / name).rename(target / name)
            placed.append(name)
            if name == FILES[-2]:
                disk.sync(target)
    except BaseException:
        for name in reversed(placed):
            (target / name).rename(staging / name)
        for name in reversed(moved):
            (old / name).rename(target / name)
        old.rmdir()
        raise
    disk.sync(target)
    disk.remove_tree(old)
