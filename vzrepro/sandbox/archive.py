"""A sandbox's directories as a tar archive: packed for an engine that cannot mount them, and /out unpacked again.

Owners, modes, times and hard links are those that the sandbox would see of mounted directories (`staging`).
"""

from __future__ import annotations

import io
import itertools
import os
import stat
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.base.tar import TarHeader
from vzrepro.sandbox.confine import ETC
from vzrepro.sandbox.job import Job
from vzrepro.sandbox.staging import STAGED_MTIME_NS, etc_file, mode_of

_BUFFER = 1 << 18
_PIECE = 1 << 16
_ZEROS = bytes(_PIECE)


# --- in -----------------------------------------------------------------------------------------------------------


def pack(job: Job, stream: IO[bytes]) -> None:
    """Write the archive with the job's `build`, `out`, `in`, `etc` and `files`.

    A second link to each input's file is in `links`, which no sandbox shows: a file in a store has one, too.
    """
    with tarfile.open(fileobj=stream, mode="w|", bufsize=_BUFFER, format=tarfile.PAX_FORMAT) as tar:
        packing = _Packing(tar, linked=job.surroundings.staging == "link")
        for name in ("build", "out"):
            packing.directory(name, 0o777, job.user, time.time_ns())
        packing.directory("etc", 0o755)
        for name in ETC:
            packing.content(f"etc/{name}", etc_file(name, job.surroundings))
        packing.directory("links", 0o700)
        packing.directory("in", 0o555, mtime_ns=STAGED_MTIME_NS)
        for name, source in job.inputs.items():
            packing.tree(f"in/{name}", source)
        packing.directory("files", 0o755)
        for index, given in enumerate(job.surroundings.files.values()):
            if isinstance(given, bytes):
                packing.content(f"files/{index}", given)
            else:
                packing.tree(f"files/{index}", given)


@dataclass(slots=True)
class _Packing:
    """Adds to an archive. Everything is root's, as in a store of root's; with `linked`, what is one file stays one."""

    tar: tarfile.TarFile
    linked: bool
    _count: itertools.count[int] = field(default_factory=itertools.count)
    _first: dict[tuple[int, int], str] = field(default_factory=dict)

    def directory(self, name: str, mode: int, owner: tuple[int, int] = (0, 0), mtime_ns: int = 0) -> None:
        info = _header(name, tarfile.DIRTYPE, mode, mtime_ns)
        info.uid, info.gid = owner
        self.tar.addfile(info)

    def content(self, name: str, data: bytes) -> None:
        info = _header(name, tarfile.REGTYPE, mode_of(data), 0)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def tree(self, name: str, source: Path) -> None:
        status = source.lstat()
        if stat.S_ISLNK(status.st_mode):
            info = _header(name, tarfile.SYMTYPE, 0o777, status.st_mtime_ns)
            info.linkname = os.readlink(source)  # noqa: PTH115 - as it is: a Path drops slashes
            self.tar.addfile(info)
        elif stat.S_ISDIR(status.st_mode):
            self.directory(name, 0o555, mtime_ns=status.st_mtime_ns)
            for entry in sorted(os.listdir(source)):  # noqa: PTH208
                self.tree(f"{name}/{entry}", source / entry)
        else:
            self._file(name, source)

    def _file(self, name: str, source: Path) -> None:
        with source.open("rb") as opened:
            status = os.fstat(opened.fileno())
            inode = status.st_dev, status.st_ino
            if self.linked and inode in self._first:
                self._link(name, self._first[inode])
                return
            info = _header(name, tarfile.REGTYPE, stat.S_IMODE(status.st_mode), status.st_mtime_ns)
            info.size = status.st_size
            self.tar.addfile(info, opened)
        if self.linked:
            self._first[inode] = name
            self._link(f"links/{next(self._count)}", name)

    def _link(self, name: str, first: str) -> None:
        info = _header(name, tarfile.LNKTYPE, 0o444, 0)
        info.linkname = first
        self.tar.addfile(info)


def _header(name: str, kind: bytes, mode: int, mtime_ns: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, mode
    secs, rest = divmod(mtime_ns, 10**9)
    info.mtime = secs
    if rest:
        info.pax_headers = {"mtime": f"{secs}.{rest:09}"}
    return info


# --- out ----------------------------------------------------------------------------------------------------------


def unpack(stream: IO[bytes], target: Path, check: Callable[[int], None]) -> int:
    """Make the new directory `target` from an archive of one directory, and return how many things are in it.

    `check` is called with the bytes that have been read. Long rows of zeros become holes. Modes are kept as far as the
    tree can still be read; owners and times are not. Raises VzreproError, tarfile.TarError, and what `check` raises.
    """
    unpacking = _Unpacking(target, check)
    with tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER, tarinfo=TarHeader, errorlevel=2) as tar:
        for member in tar:
            unpacking.add(tar, member)
    if not unpacking.modes:
        raise tarfile.ReadError("it is empty")
    for path, mode in reversed(unpacking.modes.items()):
        (target / path).chmod(mode)
    return unpacking.count


@dataclass(slots=True)
class _Unpacking:
    """Makes what an archive names. Each thing is new and in a directory made here, so nothing leads elsewhere."""

    target: Path
    check: Callable[[int], None]
    count: int = 0
    modes: dict[str, int] = field(default_factory=dict)
    _files: set[str] = field(default_factory=set)
    _done: int = 0

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self.check(self._done)
        name = _below(member.name)
        if name == "":
            if self.modes or not member.isdir():
                raise tarfile.ReadError(f"{member.name[:200]!r} is no directory at its beginning")
            self.target.mkdir()
            self.modes[""] = _readable(member, 0o700)
            return
        parent, _, base = name.rpartition("/")
        if parent not in self.modes or base in ("", ".", ".."):
            raise tarfile.ReadError(f"{member.name[:200]!r} is in no directory of it")
        if member.isdir() and name.count("/") + 2 > nar.MAX_DEPTH:
            raise VzreproError(
                f"{name[:80]}… is nested too deeply", reason=f"a store object may nest {nar.MAX_DEPTH} directories"
            )
        try:
            self._make(tar, member, name)
        except FileExistsError as error:
            raise disk.merged(name) from error
        self.count += 1

    def _make(self, tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        path = self.target / name
        if member.isdir():
            path.mkdir(mode=0o700)
            self.modes[name] = _readable(member, 0o700)
        elif member.isreg():
            self._file(tar, member, path)
            self._files.add(name)
        elif member.issym():
            path.symlink_to(member.linkname)
            self._files.add(name)
        elif member.islnk():
            first = _below(member.linkname)
            if first not in self._files:
                raise tarfile.ReadError(f"{member.name[:200]!r} is a link to what is not in it")
            os.link(self.target / first, path, follow_symlinks=False)
        elif member.isfifo():  # which whoever takes the result refuses
            os.mkfifo(path)
            self._files.add(name)
        else:
            raise tarfile.ReadError(f"{member.name[:200]!r} is of no kind that can be in it")

    def _file(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        content = tar.extractfile(member)
        assert content is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with content, os.fdopen(fd, "wb", buffering=0) as file:
            left = member.size
            while left:
                piece = content.read(min(left, _PIECE))
                if not piece:
                    raise tarfile.ReadError("it ends in the middle of a file")
                if piece == _ZEROS[: len(piece)]:
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]
                left -= len(piece)
                self._done += len(piece)
                self.check(self._done)
            file.truncate(member.size)
            os.fchmod(fd, _readable(member, 0o400))


def _below(name: str) -> str:
    """The name below the archive's one directory, whose own name does not matter."""
    return name.partition("/")[2]


def _readable(member: tarfile.TarInfo, least: int) -> int:
    """The member's mode; who is not root needs more to read it."""
    mode = stat.S_IMODE(member.mode) & 0o1777
    return mode if os.geteuid() == 0 else mode | least
