"""Applies the tar archives of an image's layers to a directory, and finds paths in a root file system as its own
processes would: nothing is ever written or looked up outside the directory, whatever the archives or links say.

Format: the OCI image specification's "Image Layer Filesystem Changeset" (tar, `.wh.` whiteouts), which Docker's layers
follow as well.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
from pathlib import Path
from typing import BinaryIO, NoReturn

from vzrepro.base import disk
from vzrepro.base.errors import UsageError
from vzrepro.base.tar import TarHeader

MAX_BYTES = 64 << 30
"""Default limit for what an image may unpack to."""

_CHUNK = 1 << 20
_MAX_ENTRIES = 4_000_000
_MAX_LINKS = 40
_MAX_PATH = 4095
_MAX_OWNER = (1 << 32) - 2  # the one above means "unchanged"
_MAX_SECS = (1 << 63) // 10**9  # what a time in ns has room for
_NO_NAME = (errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
"""What the system says of an entry that cannot be made beside the others; all else is the disk's fault."""

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


def inside(root: Path, path: str) -> Path:
    """Where `path` leads for a process whose root is `root`: links are followed, `..` and absolute targets stay inside.

    The last part may be missing, or several; the result holds no link. Raises UsageError for a loop of links.
    """
    pending = [part for part in path.split("/") if part not in ("", ".")][::-1]
    found: list[str] = []  # paths, each in the one before
    links = 0
    while pending:
        part = pending.pop()
        if part == "..":
            del found[-1:]
            continue
        here = f"{found[-1] if found else root}/{part}"
        try:
            target = os.readlink(here)  # noqa: PTH115 - a Path is as slow to make as it is deep
        except OSError:  # no link, or not there
            found.append(here)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise UsageError(f"/{path.lstrip('/')} in {root} leads through too many symbolic links")
        if target.startswith("/"):
            found = []
        pending += [part for part in target.split("/") if part not in ("", ".")][::-1]
    return Path(found[-1]) if found else root


class _Directory:
    """A directory as an image's entries name it: where it really is, and those below it that were looked up."""

    __slots__ = ("below", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.below: dict[str, _Directory] = {}


class Unpacking:
    """One root file system in the making: `apply` its layers in order, the lowest first.

    Owners are kept only when we are root. Kept otherwise: permission bits (the owner can always read, and search and
    write directories), times of files. Left out: setuid and setgid bits and file capabilities, which no container of
    ours could use (no_new_privileges); devices and fifos, since a container gets a /dev of its own.
    """

    def __init__(self, root: Path, name: str, *, max_bytes: int = MAX_BYTES) -> None:
        self._root, self._name = root, name
        self._max = self._left = max_bytes
        self._entries = 0
        self._is_root = os.geteuid() == 0
        self._what = "a layer"
        self._top = _Directory(root)
        self._written: set[Path] = set()
        self._left_out: set[Path] = set()

    def apply(self, layer: BinaryIO, what: str = "a layer") -> None:
        """Unpack one layer's uncompressed tar, read as a stream; errors call it `what`.

        Raises UsageError, tarfile.TarError for a bad one, OSError for what is the disk's fault.
        """
        self._written = set()
        self._forget()
        self._what = what
        with tarfile.open(fileobj=layer, mode="r|", bufsize=_CHUNK, tarinfo=TarHeader) as tar:
            for member in tar:
                self._entries += 1
                if self._entries > _MAX_ENTRIES:
                    self._bad(f"it holds more than {_MAX_ENTRIES} files")
                try:
                    self._one(tar, member)
                except OSError as error:
                    if error.errno not in _NO_NAME:
                        raise
                    self._bad(f"{member.name[:200]!r} cannot be made: {error.strerror}")
                except (ValueError, OverflowError) as error:  # what no system call takes
                    self._bad(f"{member.name[:200]!r} cannot be made: {error}")
                tar.members = []  # type: ignore[attr-defined]  # tarfile remembers every entry otherwise

    def _bad(self, reason: str) -> NoReturn:
        raise UsageError(f"{self._name}: {self._what} cannot be unpacked", reason=reason)

    def _forget(self) -> None:
        """Look all paths up anew: one may lead elsewhere now."""
        self._top = _Directory(self._root)

    def _one(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        parts = self._parts(member.name)
        if not parts:
            if member.isdir():
                self._root.chmod(member.mode & 0o777 | 0o700)
            return
        directory = self._parent(parts[:-1])
        name = parts[-1]
        if name == _OPAQUE:
            self._make_opaque(directory)
        elif name.startswith(_WHITEOUT + _WHITEOUT):
            pass  # what the aufs driver kept for itself
        elif name.startswith(_WHITEOUT):
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in ("", ".", ".."):
                self._bad(f"{member.name!r} is no name of a whiteout")
            # A whiteout speaks of the layers below, never of its own.
            if directory / hidden not in self._written:
                self._remove(directory / hidden)
        else:
            self._write(tar, member, directory / name)

    def _parts(self, path: str) -> list[str]:
        parts = [part for part in path.split("/") if part not in ("", ".")]
        if ".." in parts or "\0" in path:
            self._bad(f"the path {path[:200]!r} leads out of the image")
        size = len(os.fsencode("/".join((str(self._root), *parts))))
        if size > _MAX_PATH:
            self._bad(f"the path {path[:200]!r} … is {size - _MAX_PATH} bytes too long for this system")
        return parts

    def _parent(self, parts: list[str]) -> Path:
        """The directory that `parts` name, links within the root followed; made when it is missing."""
        directory = self._top
        for part in parts:
            below = directory.below.get(part)
            if below is None:
                below = directory.below[part] = _Directory(self._enter(directory.path / part))
            directory = below
        return directory.path

    def _enter(self, path: Path) -> Path:
        """Where the directory `path`, in one that is there, really is; made when it is missing."""
        try:
            kind = path.lstat().st_mode
        except FileNotFoundError:
            path.mkdir(0o755)
            self._written.add(path)
            return path
        if stat.S_ISDIR(kind):
            return path
        shown = path.relative_to(self._root)
        if not stat.S_ISLNK(kind):
            self._bad(f"an entry lies below /{shown}, which is no directory")
        target = inside(self._root, str(shown))
        here = self._root
        for part in target.relative_to(self._root).parts:
            here = self._enter(here / part)
        return here

    def _write(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        if not (0 <= member.uid <= _MAX_OWNER and 0 <= member.gid <= _MAX_OWNER):
            self._bad(f"{member.name[:200]!r} belongs to a user or group that cannot be: {member.uid}:{member.gid}")
        if not abs(member.mtime) < _MAX_SECS:
            self._bad(f"{member.name[:200]!r} was modified at a time that cannot be: {member.mtime}")
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            if not (member.ischr() or member.isblk() or member.isfifo()):
                self._bad(f"{member.name!r} is of the unknown type {member.type!r}")
            self._leave_out(path)
            return
        if not (member.isdir() and path.is_dir() and not path.is_symlink()):
            source = self._link_source(member) if member.islnk() else None
            if source == path:
                return
            if source in self._left_out:
                self._leave_out(path)
                return
            if member.issym() and not member.linkname:
                self._bad(f"{member.name!r} is a symbolic link to nothing")
            self._remove(path)
            self._left_out.discard(path)
            if member.isdir():
                path.mkdir(0o700)
            elif member.issym():
                path.symlink_to(member.linkname)
            elif source is not None:
                os.link(source, path, follow_symlinks=False)
            else:
                self._copy(tar, member, path)
        self._written.add(path)
        if member.islnk():
            return
        if self._is_root:
            os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            # Never less than the owner needs to read it: virtiofsd may not be root. chown clears bits, so this is last.
            path.chmod(member.mode & 0o1777 | (0o700 if member.isdir() else 0o400))
        if member.isreg():
            os.utime(path, (member.mtime, member.mtime))

    def _link_source(self, member: tarfile.TarInfo) -> Path:
        parts = self._parts(member.linkname)
        if parts:
            source = inside(self._root, "/".join(parts[:-1])) / parts[-1]
        if not parts or not (source in self._left_out or source.is_symlink() or source.is_file()):
            self._bad(f"{member.name!r} is a hard link to {member.linkname!r}, which is no file of the image")
        return source

    def _copy(self, tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        self._left -= member.size
        if self._left < 0:
            raise UsageError(
                f"{self._name} unpacks to more than the allowed {self._max} bytes",
                hint="unpack it yourself and name the directory, if it is meant to be this large",
            )
        body = tar.extractfile(member)
        assert body is not None
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb", buffering=0) as file:
            while chunk := body.read(_CHUNK):
                file.write(chunk)
            if file.tell() != member.size:
                raise tarfile.ReadError(f"{member.name} ends after {file.tell()} of {member.size} bytes")

    def _leave_out(self, path: Path) -> None:
        """Have nothing at `path`, nor at what later links to it."""
        self._remove(path)
        self._left_out.add(path)

    def _remove(self, path: Path) -> None:
        try:
            is_file = not stat.S_ISDIR(path.lstat().st_mode)
        except FileNotFoundError:
            return
        if is_file and not path.is_symlink():
            path.unlink()
            return
        # A directory, or a link that may have led to one: what is remembered of the paths below it is no longer so.
        self._forget()
        disk.remove_tree(path)

    def _make_opaque(self, directory: Path) -> None:
        """Remove what lower layers put into the directory, and keep what this one did."""
        self._forget()
        pending = [directory]
        while pending:
            for path in list(pending.pop().iterdir()):
                if path not in self._written:
                    disk.remove_tree(path)
                elif path.is_dir() and not path.is_symlink():
                    pending.append(path)
