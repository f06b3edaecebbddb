"""The directories behind a sandbox that the engine mounts from here: filled before a build, removed after it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.sandbox import engine
from vzrepro.sandbox.confine import ETC, SECCOMP, bind, seccomp_profile
from vzrepro.sandbox.job import Job, Surroundings

STAGED_MTIME_NS = 1_000_000_000
"""When /in was modified."""

_ELF = b"\x7fELF"


@dataclass(frozen=True, slots=True)
class Mounts:
    """The way of a job whose directories the engine mounts from here."""

    job: Job

    def fill(self, _go_on: Callable[[], None]) -> None:
        """Fill the scratch directory: empty /build and /out for the sandbox's user, and the staged inputs.

        Inputs are hard-linked (copied where that is not possible) into one neutral directory, since a bind mount's
        source path can be read from inside and would be a store path.

        Raises VzreproError where the directories ignore the case of names: what a builder writes would be lost
        silently.
        """
        job, around = self.job, self.job.surroundings
        for elsewhere in (around.build_at, around.inputs_at):
            if elsewhere is not None:  # what is in it is open to everyone, so its parent must not be
                elsewhere.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for parent in sorted({job.build.parent, job.out.parent, job.staged.parent}):
            if disk.same_name(parent, "a", "A"):
                raise VzreproError(
                    f"{parent} cannot hold a build",
                    reason="its file system ignores the case of names: of a file `a` and a file `A`, one would be lost",
                    hint="use a store on a disk that tells them apart: export VZREPRO_STORE=DIR",
                )
        for directory in (job.build, job.out):
            directory.mkdir()
            if os.geteuid() == 0:
                os.chown(directory, *job.user)
            # The same mode for everyone: for a host user who is not root it is the only way in for the sandbox's user.
            # Others on the host are kept out by the scratch directory's own mode.
            directory.chmod(0o777)
        etc = job.scratch / "etc"
        etc.mkdir()
        for name in ETC:
            _write(etc / name, etc_file(name, around))
        job.staged.mkdir()
        if around.inputs_at is not None:
            _twins(job).mkdir(mode=0o700)
        staging = _Staging(around, None if around.inputs_at is None else _twins(job))
        for name in staging.ordered(list(job.inputs)):
            staging.put(job.inputs[name], job.staged / name)
        _finish_directory(job.staged, mtime_ns=STAGED_MTIME_NS)
        _add_files(job)
        write_profile(job)

    def free(self, _go_on: Callable[[], None]) -> int:
        """Bytes that the disks behind /build and /out have left."""
        return sum({place.stat().st_dev: _free(place) for place in (self.job.build, self.job.out)}.values())

    def used(self, enough: int, go_on: Callable[[], None]) -> int:
        """Bytes in /build and /out; counting ends once there are more than `enough`."""
        used = 0
        for place in (self.job.build, self.job.out):
            used += disk.usage(place, enough - used, go_on)
        return used

    def take(self, _check: Callable[[int], None]) -> None:
        """Nothing is to be done: what the builder left in /out is in `job.out`."""

    def end(self, *, keep: bool) -> None:
        """Nothing is to be done: the directories are `discard`'s."""


def _free(place: Path) -> int:
    status = os.statvfs(place)
    return status.f_bfree * status.f_frsize


def etc_file(name: str, around: Surroundings) -> bytes:
    """What is in this file of /etc, one of `ETC`."""
    if name == "hosts":
        own = f"{around.hostname}.{around.domainname}\t{around.hostname}" if around.domainname else around.hostname
        more = f"127.0.1.1\t{own}\n" if own != "localhost" else ""
        return f"127.0.0.1\tlocalhost\n::1\tlocalhost\n{more}".encode()
    return f"{around.hostname}\n".encode() if name == "hostname" else b""


def _add_files(job: Job) -> None:
    if job.surroundings.files:
        (job.scratch / "files").mkdir()
    for index, content in enumerate(job.surroundings.files.values()):
        target = job.scratch / "files" / str(index)
        if isinstance(content, bytes):
            _write(target, content)
        else:  # staged like an input, so that no path of the host is seen
            _Staging(job.surroundings).put(content, target)


def write_profile(job: Job) -> None:
    """Write the seccomp profile, which the engine's client reads, if it is not the one of all builds."""
    if job.surroundings.personality:
        profile = json.loads(SECCOMP.read_text())
        arguments = [{"index": 0, "value": job.surroundings.personality, "op": "SCMP_CMP_EQ"}]
        rule = {"names": ["personality"], "args": arguments, "action": "SCMP_ACT_ALLOW"}
        profile["syscalls"].append(rule)
        _write(seccomp_profile(job), json.dumps(profile).encode())


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(mode_of(content))


def mode_of(content: bytes) -> int:
    """The mode of a file that is made from bytes: programs may be run."""
    return 0o555 if content.startswith(_ELF) else 0o444


class _Staging:
    """Makes an input's files at another place: linked or copied, in the order that the surroundings ask for."""

    def __init__(self, around: Surroundings, twins: Path | None = None) -> None:
        self._twins = twins
        self._copy = around.staging == "copy"
        self._count = itertools.count()
        self._random = None if around.order is None else random.Random(around.order)

    def ordered(self, names: list[str]) -> list[str]:
        if self._random is not None:
            names.sort()
            self._random.shuffle(names)
        return names

    def put(self, source: Path, target: Path) -> None:
        if source.is_symlink():
            disk.copy_link(source, target)
            os.utime(target, ns=(0, source.lstat().st_mtime_ns), follow_symlinks=False)
        elif source.is_dir():
            target.mkdir()
            for name in self.ordered(os.listdir(source)):  # noqa: PTH208
                self.put(source / name, target / name)
            _finish_directory(target, source.stat().st_mtime_ns)
        elif self._copy:
            shutil.copy2(source, target)
        else:
            try:
                os.link(source, target)
            except FileExistsError:  # never write through what is there: it may be a link to another input's file
                raise
            except OSError:  # another file system, a file of another user, too many links
                shutil.copy2(source, target)
                if self._twins is not None:
                    # Of the axes of an audit, another place is one and files without other links are one.
                    os.link(target, self._twins / str(next(self._count)))


def _twins(job: Job) -> Path:
    """Where a second link to each input's file is, so that copies on another file system are links as well."""
    return job.staged.with_name(f"{job.staged.name}-links")


def _finish_directory(directory: Path, mtime_ns: int) -> None:
    os.utime(directory, ns=(0, mtime_ns))
    directory.chmod(0o555)


def discard_directories(job: Job, go_on: Callable[[], None]) -> None:
    """Remove the job's directories here, whatever the builder left in them and whoever owns that. What `go_on` raises
    ends this."""
    inputs_at = job.surroundings.inputs_at
    # What is in memory goes first: nobody else knows of it.
    for elsewhere in (job.surroundings.build_at, inputs_at, None if inputs_at is None else _twins(job)):
        if elsewhere is not None:
            with contextlib.suppress(OSError):
                _remove(job, elsewhere)
            with contextlib.suppress(OSError):  # another one is still in it
                elsewhere.parent.rmdir()
    for directory in (job.build, job.out):
        _remove(job, directory, go_on)
    disk.remove_tree(job.scratch, go_on)


def _remove(job: Job, directory: Path, go_on: Callable[[], None] = lambda: None) -> None:
    try:
        disk.remove_tree(directory, go_on)
    except PermissionError:
        # Only the sandbox's user may open what it closed: a build that was ended did not get to its own chmod.
        # That may not change /build itself, so what it says is not looked at.
        uid, gid = job.user
        flags = ["--rm", "--pull", "never", "--network", "none", "--cap-drop", "ALL", "--user", f"{uid}:{gid}"]
        flags += ["--mount", bind(directory, "/build"), "--entrypoint", "chmod"]
        engine.docker("run", *flags, job.image, "-R", "a+rwX,-t", "/build", checked=False, limit_secs=engine.UNLIMITED)
        disk.remove_tree(directory, go_on)
