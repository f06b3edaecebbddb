"""Writes an initramfs: a plain newc cpio archive whose bytes depend on the manifest and the files it names alone.

    newc.py MANIFEST OUT

The format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst). Entries are sorted by path,
inodes are numbered in that order, everything belongs to root, times are SOURCE_DATE_EPOCH (1 when it is not set).
Not compressed: the kernel would need a decompressor, and unpacking a few megabytes is no slower. Runs in the sandbox
with the standard library alone; the manifest's own comment says what its lines are.
"""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
"""The archive's size is a multiple of this many bytes, as cpio's own archives are."""


class ManifestError(Exception):
    """The manifest asks for something that cannot be; the text names its line."""


@dataclass(frozen=True)
class Entry:
    """One archive member. `path` is absolute, `mode` has the type bits, `data` is the file or the link's target."""

    path: str
    mode: int
    data: bytes = b""
    major: int = 0
    minor: int = 0


def parse(manifest: str) -> Iterator[Entry]:
    """The entries that a manifest asks for, in its order; reads the files it names. Raises ManifestError."""
    for number, line in enumerate(manifest.splitlines(), start=1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        try:
            match words:
                case ["dir", path, mode]:
                    yield Entry(path, stat.S_IFDIR | int(mode, 8))
                case ["file", path, mode, source]:
                    yield Entry(path, stat.S_IFREG | int(mode, 8), Path(source).read_bytes())
                case ["node", path, mode, major, minor]:
                    yield Entry(path, stat.S_IFCHR | int(mode, 8), b"", int(major), int(minor))
                case ["link", path, target]:
                    yield Entry(path, stat.S_IFLNK | 0o777, target.encode())
                case ["links", directory, source, target]:
                    for name in Path(source).read_text(encoding="utf-8").split():
                        yield Entry(f"{directory}/{name}", stat.S_IFLNK | 0o777, target.replace("*", name).encode())
                case _:
                    raise ValueError("no such kind of line, or a wrong number of words")
        except (ValueError, OSError) as error:
            raise ManifestError(f"manifest line {number}: {line!r}: {error}") from error


def archive(entries: Iterable[Entry], mtime: int) -> bytes:
    """The archive of `entries`, whatever their order. Raises ManifestError for a path that is not absolute and plain,
    that comes twice, or whose parent is not among the directories."""
    by_path: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        if parts[0] or len(parts) < 2 or not all(part not in ("", ".", "..") for part in parts[1:]):
            raise ManifestError(f"{entry.path!r} is not an absolute path without '.', '..' and doubled slashes")
        if entry.path in by_path:
            raise ManifestError(f"{entry.path} is there twice")
        by_path[entry.path] = entry
    directories = {path for path, entry in by_path.items() if stat.S_ISDIR(entry.mode)} | {""}
    for path in by_path:
        if path.rpartition("/")[0] not in directories:
            raise ManifestError(f"{path}: its parent directory is not in the manifest")

    # A parent sorts before what is below it, as the kernel needs: it makes no missing directories.
    ordered = sorted(by_path.values(), key=lambda entry: entry.path.encode())
    out = bytearray()
    for inode, entry in enumerate(ordered, start=1):
        out += _member(entry, inode, mtime)
    out += _member(Entry("/TRAILER!!!", 0), 0, 0)
    return bytes(out.ljust(-(-len(out) // BLOCK) * BLOCK, b"\0"))


def _member(entry: Entry, inode: int, mtime: int) -> bytes:
    name = entry.path[1:].encode() + b"\0"
    fields = (
        inode,
        entry.mode,
        0,  # uid
        0,  # gid
        2 if stat.S_ISDIR(entry.mode) else 1,  # links
        mtime,
        len(entry.data),
        0,  # major, minor of the device it lies on
        0,
        entry.major,
        entry.minor,
        len(name),
        0,  # checksum: newc has none
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def main() -> int:
    """Write the archive that the command line asks for; the exit code."""
    if len(sys.argv) != 3:
        print(f"usage: {sys.argv[0]} MANIFEST OUT", file=sys.stderr)
        return 2
    manifest, out = map(Path, sys.argv[1:])
    try:
        data = archive(parse(manifest.read_text(encoding="utf-8")), int(os.environ.get("SOURCE_DATE_EPOCH", "1")))
    except ManifestError as error:
        print(f"newc: {error}", file=sys.stderr)
        return 1
    out.write_bytes(data)
    print(f"{out}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
