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
from functools import partial
from typing import BinaryIO, NoReturn

from vzrepro.base.errors import UsageError
from vzrepro.sources.entries import CHUNK, MAX_PATH, ArchiveEntry, PathKind, checked
from vzrepro.sources.streams import Raw, Xz

_BLOCK = 512
_NUL = b"\0"
_MAX_CONTROL = 16 << 20
_XZ_MEMORY = 256 << 20  # `xz -9e`, the most dpkg-deb uses, needs 65 MiB

_KINDS: dict[bytes, PathKind] = {b"\0": "file", b"0": "file", b"1": "hardlink", b"2": "symlink", b"5": "dir"}
_REFUSED = {
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"S": "a sparse file",
    b"x": "a pax header",
    b"g": "a pax header",
}


def read_deb(stream: BinaryIO, name: str, *, max_bytes: int) -> Iterator[ArchiveEntry]:
    """The entries of the package's data archive, in its order; `name` is what errors call the package.

    Memory is bounded whatever the package holds; at most `max_bytes` are unpacked. Raises UsageError for anything
    that is not a sound .deb: truncated, damaged, unsupported compression, absolute path or `..`, device or fifo,
    symlink that leaves the root, an entry below a symlink or file, a hard link to nothing, a path given twice.
    """
    try:
        yield from _checked(_tar(_data(stream, name, max_bytes), name), name)
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        _bad(name, f"its data archive is damaged or truncated: {error}")


def control_file(stream: BinaryIO, name: str, wanted: str) -> bytes | None:
    """The file `wanted` (`postinst`) of the package's control archive; None when it has none. Raises as `read_deb`."""
    try:
        _begin(stream, name)
        while not (found := _member(stream, name))[0].startswith("control.tar"):
            _skip(stream, *found, name)
        member, size = found
        tar = _unpack(_Member(stream, size, name), member, name, _MAX_CONTROL)
        for entry in _checked(_tar(tar, name), name):
            if (entry.path, entry.kind) == (wanted, "file"):
                return b"".join(entry.body)
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        _bad(name, f"its control archive is damaged or truncated: {error}")
    return None


def _checked(entries: Iterator[ArchiveEntry], name: str) -> Iterator[ArchiveEntry]:
    return checked(entries, partial(_bad, name), links_stay_inside=True)


def _bad(name: str, reason: str) -> NoReturn:
    raise UsageError(
        f"{name} is not a package this can unpack",
        reason=reason,
        hint="if it has the locked size and sha256, leave it out or lock another version; else fetch it again",
    )


# --- ar -----------------------------------------------------------------------------------------------------------


def _data(stream: BinaryIO, name: str, max_bytes: int) -> BinaryIO:
    """Walk the ar members up to `data.tar*`; the unpacked bytes of that one, limited to `max_bytes`."""
    _begin(stream, name)
    seen: list[str] = []
    while True:
        member, size = _member(stream, name)
        if member.startswith("data.tar"):
            if [part.partition(".tar")[0] for part in seen] != ["debian-binary", "control"]:
                _bad(name, f"{member} follows {', '.join(seen) or 'nothing'}, not debian-binary and control.tar")
            return _unpack(_Member(stream, size, name), member, name, max_bytes)
        body = _skip(stream, member, size, name)
        if member == "debian-binary" and not body.startswith(b"2."):
            _bad(name, f"it has format version {body[:8]!r}, not 2.x")
        # deb(5): names starting with an underscore are reserved for others and may stand before data.tar.
        if not member.startswith("_"):
            seen.append(member)


def _begin(stream: BinaryIO, name: str) -> None:
    if stream.read(8) != b"!<arch>\n":
        _bad(name, "it does not start as an ar archive")


def _member(stream: BinaryIO, name: str) -> tuple[str, int]:
    """The next member's name and size; its bytes follow."""
    header = stream.read(60)
    if len(header) != 60 or header[58:] != b"`\n":
        _bad(name, "it ends before its data archive" if len(header) < 60 else "an ar header is damaged")
    member = header[:16].decode("latin-1").rstrip(" ").removesuffix("/")
    size_text = header[48:58].rstrip(b" ")
    if not size_text.isdigit():
        _bad(name, f"the ar member {member!r} has no proper size")
    return member, int(size_text)


def _skip(stream: BinaryIO, member: str, size: int, name: str) -> bytes:
    """What was skipped."""
    if size > _MAX_CONTROL:
        _bad(name, f"the ar member {member!r} claims {size} bytes")
    body = stream.read(size + size % 2)
    if len(body) < size:
        _bad(name, f"it ends inside {member}")
    return body


def _unpack(member: _Member, member_name: str, name: str, max_bytes: int) -> BinaryIO:
    raw: io.RawIOBase
    archive, _, suffix = member_name.partition(".tar")
    match suffix:
        case ".xz":
            raw = Xz(member.take, _XZ_MEMORY)
        case ".gz":
            raw = _Gz(member)
        case "":
            raw = member
        case _:
            _bad(name, f"{archive}.tar{suffix}: unsupported compression (xz, gz and none are supported)")
    return io.BufferedReader(_Limited(raw, name, max_bytes), 1 << 18)


class _Member(Raw):
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


class _Gz(Raw):
    """gzip, through the standard library's reader (which checks length and CRC)."""

    def __init__(self, member: _Member) -> None:
        self._gzip = gzip.GzipFile(fileobj=io.BufferedReader(member), mode="rb")

    def take(self, count: int) -> bytes:
        return self._gzip.read(count)


class _Limited(Raw):
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


def _tar(tar: BinaryIO, name: str) -> Iterator[ArchiveEntry]:
    """Parse headers; paths come out as the archive spells them."""
    long_path = long_target = None
    while (header := _exactly(tar, _BLOCK, name)).strip(_NUL):
        if _number(header[148:156], name) != sum(header) - sum(header[148:156]) + 8 * 0x20:
            _bad(name, "a tar header has a wrong checksum")
        size, flag = _number(header[124:136], name), header[156:157]
        if flag in (b"L", b"K"):
            if size > MAX_PATH + 1:
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
        yield ArchiveEntry(_text(path), kind, _number(header[100:108], name) & 0o777, size, _text(target), body)
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
