"""A tar or zip archive → the tree in it, whoever made the archive.

Which entries may become a tree `entries.checked` decides; here are the two formats, and the writing. Of modes only
"may be run" is kept, of times, owners and attributes nothing.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NoReturn, cast

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import UsageError
from vzrepro.base.tar import TarHeader
from vzrepro.sources.entries import CHUNK, MAX_PATH, ArchiveEntry, PathKind, checked
from vzrepro.sources.streams import Raw, XzStreams

MAX_UNPACKED = 16 << 30
"""Bytes that an archive may unpack to."""

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""What is added to the names of files that `decompress` reads."""

_MAGICS: dict[bytes, str] = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, nar.MalformedNar)
_XZ_MEMORY = 512 << 20  # `xz -9` needs 65 MiB
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06")  # the second is an empty one


def unpack(
    archive: Path, dest: Path, name: str, *, max_bytes: int = MAX_UNPACKED, go_on: Callable[[], None] = lambda: None
) -> None:
    """Write the tree that `archive` holds to the new directory `dest`, whose own directory is private to the caller.

    An archive with one directory at its top gives what is in that. `name` is what errors call it; `go_on` is called
    now and then, and may raise. Raises UsageError for what is neither tar nor zip, is damaged, unpacks to more than
    `max_bytes`, or holds what no tree can; VzreproError where the file system takes two names for one.
    """
    refuse = partial(_bad, name)
    whole = dest.with_name(f"{dest.name}.whole")
    whole.mkdir()
    with _opened(archive, refuse, max_bytes) as entries:
        write_tree(checked(entries, refuse), whole, refuse, max_bytes=max_bytes, go_on=go_on)
    inside = list(whole.iterdir())
    if len(inside) == 1 and stat.S_ISDIR(inside[0].lstat().st_mode):
        inside[0].rename(dest)
        whole.rmdir()
    else:
        whole.rename(dest)


def check(archive: Path, name: str) -> None:
    """Raise UsageError unless the file begins as a tar or zip does."""
    with _opened(archive, partial(_bad, name), MAX_UNPACKED) as entries:
        next(entries, None)


@contextlib.contextmanager
def _opened(archive: Path, refuse: Callable[[str], NoReturn], max_bytes: int) -> Iterator[Iterator[ArchiveEntry]]:
    """What is in an archive, to be read in the block; `refuse` is called for what cannot be."""
    with archive.open("rb") as file:
        magic = file.read(8)
        file.seek(0)
        try:
            yield _zip(file, refuse) if magic.startswith(_ZIPS) else _tar(_plain(file, magic), refuse, max_bytes)
        except (*_DAMAGED, RuntimeError, ValueError) as error:  # the last two are zipfile's, for what it cannot read
            refuse(f"it is no tar or zip archive, or damaged: {error}")
        except OSError as error:
            if error.errno is not None:
                raise
            refuse(f"it is damaged: {error}")  # said by gzip and bz2


def decompress(path: Path, dest: IO[bytes], name: str, *, max_bytes: int = MAX_UNPACKED) -> None:
    """Write to `dest` what gzip, bzip2, xz or zstd has compressed. Raises UsageError for damage and for more than
    `max_bytes`."""
    with path.open("rb") as file:
        magic = file.read(8)
        file.seek(0)
        try:
            for piece in _pieces(_plain(file, magic)):
                dest.write(piece)
                if dest.tell() > max_bytes:
                    _bad(name, f"it unpacks to more than the allowed {max_bytes} bytes")
        except _DAMAGED as error:
            _bad(name, f"it is damaged: {error}")
        except OSError as error:
            if error.errno is not None:
                raise
            _bad(name, f"it is damaged: {error}")  # said by gzip and bz2
    dest.flush()


def write_tree(
    entries: Iterable[ArchiveEntry],
    dest: Path,
    refuse: Callable[[str], NoReturn],
    *,
    max_bytes: int,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write entries that `checked` has let pass below the directory `dest`, which is empty.

    `go_on` is called before each entry and piece, and may raise; `refuse` for more than `max_bytes` and for names that
    the file system does not take. Raises VzreproError where two names are one there, OSError when writing fails.
    """
    left = max_bytes
    names = []
    made = {dest}
    for entry in entries:
        go_on()
        names.append(entry.path)
        path = dest / entry.path
        try:
            if entry.kind == "dir":
                path.mkdir(parents=True, exist_ok=True)
                continue
            if path.parent not in made:
                path.parent.mkdir(parents=True, exist_ok=True)
                made.add(path.parent)
            if entry.kind == "symlink":
                path.symlink_to(entry.target)
                continue
            if entry.kind == "hardlink":
                path.hardlink_to(dest / entry.target)
                continue
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644 | (entry.mode & 0o111))
        except FileExistsError as error:
            raise disk.merged(entry.path) from error
        except (ValueError, UnicodeError, NotADirectoryError) as error:
            refuse(f"{entry.path!r} is a name that cannot be written: {error}")
        except OSError as error:
            if error.errno in _NAME_ERRORS:
                refuse(f"{entry.path[:80]!a}…: {error.strerror}")
            raise
        with os.fdopen(fd, "wb") as file:
            for piece in entry.body:
                left -= len(piece)
                if left < 0:
                    refuse(f"it unpacks to more than the allowed {max_bytes} bytes")
                file.write(piece)
                go_on()
    disk.require_distinct(dest, names)


_NAME_ERRORS = (36, 63, 84, 92)
"""ENAMETOOLONG and EILSEQ, of Linux and of macOS."""


def _bad(name: str, reason: str) -> NoReturn:
    raise UsageError(
        f"{name} cannot be unpacked",
        reason=reason,
        hint="take the file as it is (without unpack=True), and let the build unpack what it needs of it",
    )


def _plain(file: BinaryIO, magic: bytes) -> BinaryIO:
    suffix = next((suffix for start, suffix in _MAGICS.items() if magic.startswith(start)), "")
    match suffix:
        case ".gz":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
        case ".bz2":
            return cast(BinaryIO, bz2.BZ2File(file, "rb"))
        case ".xz":
            return io.BufferedReader(XzStreams(file.read, _XZ_MEMORY), CHUNK)
        case ".zst":
            return io.BufferedReader(_Zstd(file))
        case _:
            return file


class _Zstd(Raw):
    """zstd, through the reader of compressed NARs."""

    def __init__(self, file: BinaryIO) -> None:
        self._read = nar.decompress(file, max_size=1 << 62)

    def take(self, count: int) -> bytes:
        return self._read(count)


# --- the two formats --------------------------------------------------------------------------------------------------

_TAR_KINDS: dict[bytes, PathKind] = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.CONTTYPE: "file",
    tarfile.LNKTYPE: "hardlink",
    tarfile.SYMTYPE: "symlink",
    tarfile.DIRTYPE: "dir",
}
_REFUSED = {
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_MAX_DIRECTORY = 128 << 20
_DIRECTORY_SIZE = 5  # where the end record has it


class _Header(TarHeader):
    """Without the maps of sparse files, which `tarfile` reads as long as they go on."""

    def _proc_gnusparse_10(self, *_args: object) -> NoReturn:
        raise tarfile.ReadError("a sparse file")


def _tar(stream: BinaryIO, refuse: Callable[[str], NoReturn], max_bytes: int) -> Iterator[ArchiveEntry]:
    # The encoding is said, because the default is the locale's.
    with tarfile.open(
        fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape", tarinfo=_Header
    ) as archive:
        for member in archive:
            # `tarfile` keeps them all, for those who ask for one by its name.
            archive.members.clear()  # type: ignore[attr-defined]
            kind = None if member.issparse() else _TAR_KINDS.get(member.type)
            if kind is None:
                refuse(f"it holds {_REFUSED.get(member.type, f'an entry of the type {member.type!r}')}: {member.name}")
            reader = archive.extractfile(member) if kind == "file" else None
            yield ArchiveEntry(
                member.name, kind, member.mode & 0o777, member.size, member.linkname, _pieces(cast(BinaryIO, reader))
            )
    # Reading to the end makes the decompressor check its own checksum.
    for piece in _pieces(stream):
        max_bytes -= len(piece)
        if max_bytes < 0:
            refuse("too much follows its end")


def _zip(file: BinaryIO, refuse: Callable[[str], NoReturn]) -> Iterator[ArchiveEntry]:
    # `ZipFile` makes an object of every record in the directory before it gives the first one.
    record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if record is not None and record[_DIRECTORY_SIZE] > _MAX_DIRECTORY:
        refuse(f"its directory has {record[_DIRECTORY_SIZE]} bytes")
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.header_offset < 0:  # to seek there is an error of the system
                refuse(f"its directory leads to before its beginning: {member.filename}")
            mode = member.external_attr >> 16
            kind: PathKind = "dir" if member.filename.endswith("/") else "file"
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                refuse(f"it holds what is no file, directory or link: {member.filename}")
            if stat.S_ISLNK(mode):
                with archive.open(member) as link:
                    target = link.read(MAX_PATH + 1).decode("utf-8", "surrogateescape")
                yield ArchiveEntry(member.filename, "symlink", 0, 0, target, iter(()))
            elif kind == "dir":
                yield ArchiveEntry(member.filename, "dir", 0, 0, "", iter(()))
            else:
                with archive.open(member) as reader:
                    body = _pieces(cast(BinaryIO, reader))
                    yield ArchiveEntry(member.filename, "file", mode & 0o777, member.file_size, "", body)


def _pieces(reader: BinaryIO | None) -> Iterator[bytes]:
    while reader is not None and (piece := reader.read(CHUNK)):
        yield piece
