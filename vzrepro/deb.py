"""Read what one .deb unpacks to, as a stream, trusting nothing in it.

Formats: deb(5) (an ar archive: `debian-binary`, `control.tar*`, `data.tar*`) and the tar dialect dpkg allows
(v7, ustar, GNU long names; no pax, no sparse files). Everything dpkg would not write is an error, not a guess.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NoReturn

from vzrepro.errors import UsageError

CHUNK = 1 << 20
"""File bodies come in pieces of at most this many bytes."""

_BLOCK = 512
_NUL = b"\0"
_MAX_ENTRIES = 1_000_000
_MAX_PATH = 4096
_MAX_CONTROL = 16 << 20
_XZ_MEMORY = 256 << 20  # `xz -9e`, the most dpkg-deb uses, needs 65 MiB

Kind = Literal["dir", "file", "symlink", "hardlink"]
_KINDS: dict[bytes, Kind] = {b"\0": "file", b"0": "file", b"1": "hardlink", b"2": "symlink", b"5": "dir"}
_REFUSED = {
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"S": "a sparse file",
    b"x": "a pax header",
    b"g": "a pax header",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One path of a package.

    `path` is relative to the root, without `.`, `..`, empty parts or a trailing slash; bytes that are not UTF-8 are
    surrogate escapes. `mode` holds the nine permission bits only: setuid, setgid and sticky are gone. `target` is a
    symlink's text, or the path of the earlier regular file a hard link means. `body` gives a regular file's `size`
    bytes; what is left of it is skipped when the next entry is asked for.
    """

    path: str
    kind: Kind
    mode: int
    size: int
    target: str
    body: Iterator[bytes]


def read_deb(stream: BinaryIO, name: str, *, max_bytes: int) -> Iterator[Entry]:
    """The entries of the package's data archive, in its order; `name` is what errors call the package.

    Memory is bounded whatever the package holds; at most `max_bytes` are unpacked. Raises UsageError for anything
    that is not a sound .deb: truncated, damaged, unsupported compression, absolute path or `..`, device or fifo,
    symlink that leaves the root, an entry below a symlink or file, a hard link to nothing, a path given twice.
    """
    try:
        yield from _Tree(name).check(_tar(_data(stream, name, max_bytes), name))
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        _bad(name, f"its data archive is damaged or truncated: {error}")


def _bad(name: str, reason: str) -> NoReturn:
    raise UsageError(
        f"{name} is not a package this can unpack",
        reason=reason,
        hint="if it has the locked size and sha256, leave it out or lock another version; else fetch it again",
    )


# --- ar -----------------------------------------------------------------------------------------------------------


def _data(stream: BinaryIO, name: str, max_bytes: int) -> BinaryIO:
    """Walk the ar members up to `data.tar*`; the unpacked bytes of that one, limited to `max_bytes`."""
    if stream.read(8) != b"!<arch>\n":
        _bad(name, "it does not start as an ar archive")
    seen: list[str] = []
    while True:
        header = stream.read(60)
        if len(header) != 60 or header[58:] != b"`\n":
            _bad(name, "it ends before its data archive" if len(header) < 60 else "an ar header is damaged")
        member = header[:16].decode("latin-1").rstrip(" ").removesuffix("/")
        size_text = header[48:58].rstrip(b" ")
        if not size_text.isdigit():
            _bad(name, f"the ar member {member!r} has no proper size")
        size = int(size_text)
        if member.startswith("data.tar"):
            if [part.partition(".tar")[0] for part in seen] != ["debian-binary", "control"]:
                _bad(name, f"{member} follows {', '.join(seen) or 'nothing'}, not debian-binary and control.tar")
            return _unpack(_Member(stream, size, name), member, name, max_bytes)
        if size > _MAX_CONTROL:
            _bad(name, f"the ar member {member!r} claims {size} bytes")
        body = stream.read(size + size % 2)
        if len(body) < size:
            _bad(name, f"it ends inside {member}")
        if member == "debian-binary" and not body.startswith(b"2."):
            _bad(name, f"it has format version {body[:8]!r}, not 2.x")
        # deb(5): names starting with an underscore are reserved for others and may stand before data.tar.
        if not member.startswith("_"):
            seen.append(member)


def _unpack(member: _Member, member_name: str, name: str, max_bytes: int) -> BinaryIO:
    raw: io.RawIOBase
    match member_name.removeprefix("data.tar"):
        case ".xz":
            raw = _Xz(member)
        case ".gz":
            raw = _Gz(member)
        case "":
            raw = member
        case suffix:
            _bad(name, f"data.tar{suffix}: unsupported compression (xz, gz and none are supported)")
    return io.BufferedReader(_Limited(raw, name, max_bytes), 1 << 18)


class _Raw(io.RawIOBase):
    """A readable raw stream; subclasses give `take(n)`: 1 to n bytes, or none at the end."""

    def readable(self) -> bool:
        return True

    def take(self, count: int) -> bytes:
        raise NotImplementedError

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self.take(len(view))
        view[: len(data)] = data
        return len(data)


class _Member(_Raw):
    """The bytes of one ar member; ending early is an error, not an end of file."""

    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self._stream, self._left, self._name = stream, size, name

    def take(self, count: int) -> bytes:
        if self._left == 0:
            return b""
        data = self._stream.read(min(count, self._left))
        if not data:
            _bad(self._name, f"it is truncated: {self._left} bytes are missing")
        self._left -= len(data)
        return data


class _Xz(_Raw):
    """xz with a memory limit, which `lzma.LZMAFile` does not offer. One stream only, as dpkg-deb writes."""

    def __init__(self, member: _Member) -> None:
        self._member = member
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def take(self, count: int) -> bytes:
        while not self._xz.eof:
            packed = self._member.take(1 << 17) if self._xz.needs_input else b""
            if self._xz.needs_input and not packed:
                raise EOFError("the xz stream has no end")
            if data := self._xz.decompress(packed, count):
                return data
        if self._xz.unused_data or self._member.take(1):
            raise lzma.LZMAError("bytes follow the xz stream")
        return b""


class _Gz(_Raw):
    """gzip, through the standard library's reader (which checks length and CRC)."""

    def __init__(self, member: _Member) -> None:
        self._gzip = gzip.GzipFile(fileobj=io.BufferedReader(member), mode="rb")

    def take(self, count: int) -> bytes:
        return self._gzip.read(count)


class _Limited(_Raw):
    """Stops a bomb: more than `limit` bytes are an error."""

    def __init__(self, raw: io.RawIOBase, name: str, limit: int) -> None:
        self._raw, self._name, self._limit, self._left = raw, name, limit, limit

    def take(self, count: int) -> bytes:
        data = self._raw.read(count) or b""
        self._left -= len(data)
        if self._left < 0:
            _bad(self._name, f"it unpacks to more than the allowed {self._limit} bytes")
        return data


# --- tar ----------------------------------------------------------------------------------------------------------


def _tar(tar: BinaryIO, name: str) -> Iterator[Entry]:
    """Parse headers; paths come out as the archive spells them."""
    long_path = long_target = None
    while (header := _exactly(tar, _BLOCK, name)).strip(_NUL):
        if _number(header[148:156], name) != sum(header) - sum(header[148:156]) + 8 * 0x20:
            _bad(name, "a tar header has a wrong checksum")
        size, flag = _number(header[124:136], name), header[156:157]
        if flag in (b"L", b"K"):
            if size > _MAX_PATH + 1:
                _bad(name, f"a path of {size} bytes")
            text = _exactly(tar, size, name).removesuffix(_NUL)
            _exactly(tar, -size % _BLOCK, name)
            long_path, long_target = (text, long_target) if flag == b"L" else (long_path, text)
            continue
        if flag not in _KINDS:
            what = _REFUSED.get(flag, f"an entry of the unknown type {flag!r}")
            _bad(name, f"it holds {what}: {_text(header[:100].partition(_NUL)[0])}")
        path = header[:100].partition(_NUL)[0] if long_path is None else long_path
        if long_path is None and header[257:263] == b"ustar\0" and header[345]:
            path = header[345:500].partition(_NUL)[0] + b"/" + path
        target = header[157:257].partition(_NUL)[0] if long_target is None else long_target
        long_path = long_target = None
        kind = _KINDS[flag]
        if kind != "file" and size:
            _bad(name, f"{_text(path)} is a {kind} and claims {size} bytes of content")
        body = _body(tar, size, name)
        yield Entry(_text(path), kind, _number(header[100:108], name) & 0o777, size, _text(target), body)
        for _skipped in body:
            pass
        _exactly(tar, -size % _BLOCK, name)
    if long_path is not None or long_target is not None:
        _bad(name, "it ends after a long name")
    # Reading to the end makes the decompressor check its own checksum; tar pads with zero blocks.
    while rest := tar.read(CHUNK):
        if rest.strip(_NUL):
            _bad(name, "data follows the end of its tar archive")


def _exactly(tar: BinaryIO, count: int, name: str) -> bytes:
    data = tar.read(count)
    if len(data) != count:
        _bad(name, "its tar archive is truncated")
    return data


def _body(tar: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    while size:
        chunk = _exactly(tar, min(size, CHUNK), name)
        size -= len(chunk)
        yield chunk


def _number(field: bytes, name: str) -> int:
    """An octal number, or GNU's base 256 (first bit set) for what octal cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        _bad(name, f"{digits!r} in a tar header is not a number")
    return int(digits or b"0", 8)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


# --- paths --------------------------------------------------------------------------------------------------------


class _Tree:
    """What the package has unpacked so far: the rules that need more than one entry to see."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._kinds: dict[str, Kind] = {}
        self._regular: dict[str, str] = {}
        self._directories = {""}

    def check(self, entries: Iterator[Entry]) -> Iterator[Entry]:
        for raw in entries:
            path = self._path(raw.path)
            if not path:
                if raw.kind != "dir":
                    _bad(self._name, f"its root is a {raw.kind}")
                continue
            self._check_parents(path)
            if path in self._kinds and not (raw.kind == "dir" == self._kinds[path]):
                _bad(self._name, f"it holds {path} twice")
            if raw.kind != "dir" and path in self._directories:
                _bad(self._name, f"{path} is a {raw.kind}, but files were put below it")
            target = ""
            match raw.kind:
                case "symlink":
                    target = self._symlink(path, raw.target)
                case "hardlink":
                    target = self._path(raw.target)
                    if target not in self._regular:
                        _bad(self._name, f"{path} is a hard link to {target!r}, which is no earlier regular file")
                    target = self._regular[path] = self._regular[target]
                case "file":
                    self._regular[path] = path
                case "dir":
                    self._directories.add(path)
            self._kinds[path] = raw.kind
            if len(self._kinds) > _MAX_ENTRIES:
                _bad(self._name, f"it holds more than {_MAX_ENTRIES} entries")
            yield Entry(path, raw.kind, raw.mode, raw.size, target, raw.body)

    def _path(self, raw: str) -> str:
        if raw.startswith("/"):
            _bad(self._name, f"the path {raw!r} is absolute")
        if "\0" in raw:
            _bad(self._name, f"the path {raw!r} has a NUL byte")
        parts = [part for part in raw.split("/") if part not in ("", ".")]
        if ".." in parts:
            _bad(self._name, f"the path {raw!r} leads upwards")
        if len(raw) > _MAX_PATH:
            _bad(self._name, f"a path of {len(raw)} characters")
        return "/".join(parts)

    def _check_parents(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        new = []
        while parent not in self._directories:
            if parent in self._kinds:
                _bad(self._name, f"{path} lies below {parent}, which is a {self._kinds[parent]}")
            new.append(parent)
            parent = parent.rpartition("/")[0]
        self._directories.update(new)

    def _symlink(self, path: str, target: str) -> str:
        """An absolute target stays in the image, because that is its root; a relative one must not climb past it."""
        if not target or "\0" in target or len(target) > _MAX_PATH:
            _bad(self._name, f"{path} is a symlink to {target[:80]!r}")
        if not target.startswith("/"):
            depth = path.count("/")
            for part in target.split("/"):
                depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
                if depth < 0:
                    _bad(self._name, f"{path} is a symlink to {target!r}, outside the root")
        return target
