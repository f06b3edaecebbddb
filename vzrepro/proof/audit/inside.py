"""Find out where inside two files the difference is: the ELF section, the archive's member, the configuration option.

Formats: ELF (System V gABI, chapter 4: headers and sections), newc cpio (cpio(5)), tar (pax, by `tarfile`), gzip
(RFC 1952), and what xz and zstd hold. Only differences are looked for, so what is malformed is bytes, no error.
Memory is bounded by `Bounds`.
"""

from __future__ import annotations

import difflib
import io
import lzma
import re
import stat
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from vzrepro import nar
from vzrepro.base.errors import VzreproError
from vzrepro.base.tar import TarHeader
from vzrepro.proof.audit.compare import differing

_HEX_WIDTH = 16
_HEX_LINES = 8
_HEX_BEFORE = 2
_TEXT_MIDDLE = 2000
_TEXT_BYTES = 8 << 20
_MEMBERS = 200_000
_CONFIG = re.compile(rb"(?:# )?(CONFIG_[A-Za-z0-9_]+)(?:=| is not set)")
_GZIP_NAME, _GZIP_EXTRA = 8, 4

Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Bounds:
    """`decoded` is how many bytes a compressed file may decode to, `places` how many places are told per file, `depth`
    how many archives and compressed files may lie in one another."""

    decoded: int = 256 << 20
    places: int = 60
    depth: int = 8

    def deeper(self) -> Bounds:
        """Those for what is inside."""
        return replace(self, depth=self.depth - 1)


@dataclass(frozen=True, slots=True)
class ContentPlace:
    """Where two files differ. `member`, `kind`, `offset` and `count` as in `model.Detail`; the offset is that in the
    member. `diff` is a unified diff without its heading."""

    member: tuple[str, ...]
    kind: str
    offset: int | None
    count: int | None
    diff: str


def places(a: Data, b: Data, bounds: Bounds = Bounds()) -> list[ContentPlace]:
    """The places at which two contents differ, outermost first; empty for equal ones."""
    found: list[ContentPlace] = []
    for place in _places(memoryview(a), memoryview(b), (), bounds):
        found.append(place)
        if len(found) >= bounds.places:
            break
    return found


def _places(a: memoryview, b: memoryview, member: tuple[str, ...], bounds: Bounds) -> Iterator[ContentPlace]:
    if differing(a, b)[0] is None:
        return
    if bounds.depth:
        for look in (_elf, _cpio, _tar, _compressed):
            try:
                found = look(a, b, member, bounds)
                first = next(found, None)
            except (ValueError, struct.error, EOFError, OSError, lzma.LZMAError, zlib.error, tarfile.TarError):
                continue
            except VzreproError:  # nar.decompress of what is no proper zstd
                continue
            if first is not None:
                yield first
                yield from _until_malformed(found)
                return
    if _is_text(a) and _is_text(b):
        yield from _text(a, b, member)
    else:
        yield _bytes(a, b, member, "bytes")


def _until_malformed(found: Iterator[ContentPlace]) -> Iterator[ContentPlace]:
    try:
        yield from found
    except (ValueError, struct.error, EOFError, OSError, lzma.LZMAError, zlib.error, tarfile.TarError, VzreproError):
        return


# --- bytes and text -----------------------------------------------------------------------------------------------


def _bytes(a: memoryview, b: memoryview, member: tuple[str, ...], kind: str) -> ContentPlace:
    """The rows of a hexdump from the first that differs on, behind the ones before it."""
    offset, count = differing(a, b)
    begin = (offset or 0) // _HEX_WIDTH * _HEX_WIDTH
    lines = [f" {line}" for line in _hex(a, max(0, begin - _HEX_BEFORE * _HEX_WIDTH), begin)]
    for sign, data in (("-", a), ("+", b)):
        lines += [f"{sign}{line}" for line in _hex(data, begin, begin + _HEX_LINES * _HEX_WIDTH)]
    return ContentPlace(member, kind, offset, count, "\n".join(lines))


def _hex(data: memoryview, begin: int, end: int) -> Iterator[str]:
    """Lines as those of xxd."""
    for at in range(begin, min(end, len(data)), _HEX_WIDTH):
        row = bytes(data[at : min(at + _HEX_WIDTH, end)])
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        yield f"{at:08x}: {row.hex(' ', -2):<39}  {shown}"


def _is_text(data: memoryview) -> bool:
    if len(data) > _TEXT_BYTES:
        return False
    start = bytes(data[: 1 << 16])
    if b"\0" in start:
        return False
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3 and len(data) > len(start)
    return True


def _text(a: memoryview, b: memoryview, member: tuple[str, ...]) -> Iterator[ContentPlace]:
    offset, count = differing(a, b)
    first, second = bytes(a).splitlines(), bytes(b).splitlines()
    options = _options(first), _options(second)
    if options[0] and options[1] and options[0] != options[1]:
        for name in sorted(options[0].keys() | options[1].keys()):
            values = [each.get(name) for each in options]
            if values[0] != values[1]:
                lines = [f"{sign}{value}" for sign, value in zip("-+", values, strict=True) if value is not None]
                yield ContentPlace((*member, name), "text line", None, None, "\n".join(lines))
        return
    lines = unified(*([line.decode(errors="replace") for line in side] for side in (first, second)))
    if not lines:  # only the ends of lines differ
        yield _bytes(a, b, member, "bytes")
        return
    yield ContentPlace(member, "text line", offset, count, "\n".join(lines))


def _options(lines: Sequence[bytes]) -> Mapping[str, str]:
    """The options of a kernel's or busybox's configuration, whole lines; empty when it is something else."""
    found = {}
    for line in lines:
        if match := _CONFIG.match(line):
            found[match[1].decode()] = line.decode(errors="replace")
        elif line.strip() and not line.startswith(b"#"):
            return {}
    return found


def unified(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A unified diff with one line of context; where very many lines differ, they are put side by side in pairs."""
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    before = max(0, start - 1)
    first, second = a[before : len(a) - max(0, end - 1)], b[before : len(b) - max(0, end - 1)]
    if max(len(first), len(second)) <= _TEXT_MIDDLE:
        return [_moved(line, before) for line in difflib.unified_diff(first, second, n=1, lineterm="")][2:]
    lines = [f"@@ {len(first)} lines against {len(second)}: too many to align @@"]
    for one, other in zip(first, second, strict=False):
        if one != other:
            lines += [f"-{one}", f"+{other}"]
        if len(lines) > _TEXT_MIDDLE:
            break
    return lines


def _moved(line: str, by: int) -> str:
    """A hunk's heading with the line numbers of the whole."""
    if match := re.fullmatch(r"@@ -(\d+)((?:,\d+)?) \+(\d+)((?:,\d+)?) @@", line):
        return f"@@ -{int(match[1]) + by}{match[2]} +{int(match[3]) + by}{match[4]} @@"
    return line


# --- ELF ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Section:
    """A section of an ELF file: where its bytes are; `size` 0 for those that have none in the file (`.bss`)."""

    name: str
    offset: int
    size: int


_SHT_NOBITS = 8
_SHN_XINDEX = 0xFFFF


def sections(data: Data) -> list[Section]:
    """The sections of an ELF file, in the order of the table. Raises ValueError or struct.error for anything else."""
    head = bytes(data[:64])
    if len(head) < 52 or head[:4] != b"\x7fELF" or head[4] not in (1, 2) or head[5] not in (1, 2):
        raise ValueError("no ELF file")
    order = "<" if head[5] == 1 else ">"
    if head[4] == 2:
        (table,) = struct.unpack_from(f"{order}Q", head, 0x28)
        size, number, names = struct.unpack_from(f"{order}HHH", head, 0x3A)
        fields, least = f"{order}IIQQQQI", 64
    else:
        (table,) = struct.unpack_from(f"{order}I", head, 0x20)
        size, number, names = struct.unpack_from(f"{order}HHH", head, 0x2E)
        fields, least = f"{order}IIIIIII", 40
    if not table or size < least:
        raise ValueError("no section headers")
    zeroth = struct.unpack_from(fields, data, table)
    number = number or zeroth[5]  # gABI: the real number is in the first header's sh_size
    names = zeroth[6] if names == _SHN_XINDEX else names
    if names >= number or table + number * size > len(data):
        raise ValueError("the section headers are cut off")
    headers = [struct.unpack_from(fields, data, table + index * size) for index in range(number)]
    _, _, _, _, strings, length, _ = headers[names]
    texts = bytes(data[strings : strings + length])
    return [
        Section(
            texts[name : max(name, texts.find(b"\0", name))].decode(errors="replace") or f"section {index}",
            offset,
            0 if kind == _SHT_NOBITS else size,
        )
        for index, (name, kind, _, _, offset, size, _) in enumerate(headers)
        if index
    ]


def _elf(a: memoryview, b: memoryview, member: tuple[str, ...], bounds: Bounds) -> Iterator[ContentPlace]:
    here, there = sections(a), sections(b)
    covered = [(each.offset, each.offset + each.size) for each in here]
    others = {each.name: each for each in there}
    found = False
    for section in here:
        other = others.get(section.name)
        if other is None:
            found = True
            yield ContentPlace((*member, section.name), "ELF section", None, section.size, f"-section {section.name}")
            continue
        first = a[section.offset : section.offset + section.size]
        second = b[other.offset : other.offset + other.size]
        if differing(first, second)[0] is not None:
            found = True
            yield _bytes(first, second, (*member, section.name), "ELF section")
    for name in sorted(others.keys() - {each.name for each in here}):
        found = True
        yield ContentPlace((*member, name), "ELF section", None, others[name].size, f"+section {name}")
    if not found:
        # The sections are the same; what differs is a header, the padding between them or what comes after them.
        offset = differing(a, b)[0] or 0
        inside = any(begin <= offset < end for begin, end in covered)
        if not inside:
            yield _bytes(a, b, (*member, "ELF headers and padding"), "bytes")


# --- archives -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    fields: Mapping[str, str]
    begin: int
    size: int


def _archive(
    a: memoryview,
    b: memoryview,
    members: tuple[list[_Member], list[_Member]],
    member: tuple[str, ...],
    kind: str,
    bounds: Bounds,
) -> Iterator[ContentPlace]:
    """Compare two archives' members: their order, their fields, their contents."""
    names = [[each.name for each in side] for side in members]
    if names[0] != names[1]:
        yield ContentPlace(member, "listing", None, None, "\n".join(unified(names[0], names[1])))
    second_of = _numbered(members[1])
    for key, first in _numbered(members[0]).items():
        second = second_of.get(key)
        if second is None:
            continue
        where = (*member, first.name)
        lines = []
        for field, value in first.fields.items():
            if value != second.fields.get(field):
                lines += [f"-{field}: {value}", f"+{field}: {second.fields.get(field)}"]
        if lines:
            yield ContentPlace(where, kind, None, None, "\n".join(lines))
        yield from _places(
            a[first.begin : first.begin + first.size],
            b[second.begin : second.begin + second.size],
            where,
            bounds.deeper(),
        )


def _numbered(members: Sequence[_Member]) -> Mapping[tuple[str, int], _Member]:
    """Members by name and how often the name came before: archives may hold one twice."""
    seen: Counter[str] = Counter()
    found = {}
    for each in members:
        found[each.name, seen[each.name]] = each
        seen[each.name] += 1
    return found


_NEWC = (b"070701", b"070702")
_NEWC_FIELDS = ("ino", "mode", "uid", "gid", "nlink", "mtime", "size", "devmajor", "devminor", "rdevmajor", "rdevminor")


def _cpio(a: memoryview, b: memoryview, member: tuple[str, ...], bounds: Bounds) -> Iterator[ContentPlace]:
    return _archive(a, b, (_newc(a), _newc(b)), member, "cpio member", bounds)


def _newc(data: memoryview) -> list[_Member]:
    if bytes(data[:6]) not in _NEWC:
        raise ValueError("no newc archive")
    found: list[_Member] = []
    at = 0
    while len(found) < _MEMBERS:
        if bytes(data[at : at + 6]) not in _NEWC:
            break  # cut off; or the padding after a trailer, and what a boot loader would append
        numbers = [int(bytes(data[at + 6 + 8 * index : at + 14 + 8 * index]), 16) for index in range(13)]
        length = numbers[11]
        name = bytes(data[at + 110 : at + 110 + length - 1])
        begin = at + _aligned(110 + length)
        if name == b"TRAILER!!!":
            break
        values = dict(zip(_NEWC_FIELDS, map(str, numbers), strict=False))
        values["mode"] = stat.filemode(numbers[1])
        values["mtime"] = _time(numbers[5])
        found.append(_Member(shown(name), values, begin, numbers[6]))
        at = begin + _aligned(numbers[6])
    return found


def _aligned(size: int) -> int:
    return size + -size % 4


def _tar(a: memoryview, b: memoryview, member: tuple[str, ...], bounds: Bounds) -> Iterator[ContentPlace]:
    return _archive(a, b, (_tar_members(a), _tar_members(b)), member, "tar member", bounds)


def _tar_members(data: memoryview) -> list[_Member]:
    if bytes(data[257:262]) != b"ustar":
        raise ValueError("no tar archive")
    found = []
    with tarfile.open(fileobj=_Reader(data), mode="r:", errors="surrogateescape", tarinfo=TarHeader) as archive:
        for info in archive:
            fields = {
                "mode": stat.filemode(info.mode | (stat.S_IFDIR if info.isdir() else stat.S_IFREG)),
                "uid": str(info.uid),
                "gid": str(info.gid),
                "uname": info.uname,
                "gname": info.gname,
                "mtime": _time(info.mtime),
                "size": str(info.size),
                "linkname": info.linkname,
            }
            plain = info.isreg() and info.sparse is None
            name = shown(info.name.encode(errors="surrogateescape"))
            found.append(_Member(name, fields, info.offset_data, info.size if plain else 0))
            if len(found) >= _MEMBERS:
                break
    return found


class _Reader(io.RawIOBase):
    """A file of bytes in memory that are not copied."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        part = bytes(self._data[self._at : end])
        self._at += len(part)
        return part


def _time(seconds: float) -> str:
    try:
        moment = datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f}"
    return f"{seconds:.0f} ({moment:%Y-%m-%d %H:%M:%S})"


def shown(name: bytes) -> str:
    """A file's name as text: what is no UTF-8 and what is no character to print becomes an escape (`\\xff`, `\\n`)."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


# --- compressed files ---------------------------------------------------------------------------------------------


def _compressed(a: memoryview, b: memoryview, member: tuple[str, ...], bounds: Bounds) -> Iterator[ContentPlace]:
    for magic, name, decode in _DECODERS:
        if bytes(a[: len(magic)]) == magic == bytes(b[: len(magic)]):
            return _decoded(a, b, member, bounds, name, decode)
    raise ValueError("not compressed")


def _decoded(
    a: memoryview,
    b: memoryview,
    member: tuple[str, ...],
    bounds: Bounds,
    name: str,
    decode: _Decode,
) -> Iterator[ContentPlace]:
    (first, whole), (second, other_whole) = decode(a, bounds.decoded), decode(b, bounds.decoded)
    lines = []
    if name == "gzip":
        heads = _gzip_fields(a), _gzip_fields(b)
        for field, value in heads[0].items():
            if value != heads[1][field]:
                lines += [f"-{field}: {value}", f"+{field}: {heads[1][field]}"]
    if lines:
        yield ContentPlace((*member, "gzip header"), "metadata", None, None, "\n".join(lines))
    if first != second:
        yield from _places(memoryview(first), memoryview(second), member, bounds.deeper())
    elif not (whole and other_whole):
        yield _bytes(a, b, member, "bytes")
    elif not lines:
        offset, count = differing(a, b)
        text = f"-{name} stream of {len(a)} bytes\n+{name} stream of {len(b)} bytes"
        yield ContentPlace((*member, f"{name} stream"), "compression", offset, count, text)


_Decode = Callable[[memoryview, int], tuple[bytes, bool]]
"""Decodes at most so many bytes; False when there is something else behind them, or they are cut off."""


def _gunzip(data: memoryview, most: int) -> tuple[bytes, bool]:
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 16)
    decoded = _bounded(decoder.decompress(data, most + 1), most)
    return decoded, decoder.eof and not decoder.unused_data


def _unxz(data: memoryview, most: int) -> tuple[bytes, bool]:
    decoder = lzma.LZMADecompressor(memlimit=256 << 20)
    decoded = _bounded(decoder.decompress(data, most + 1), most)
    return decoded, decoder.eof and not decoder.unused_data


def _unzstd(data: memoryview, most: int) -> tuple[bytes, bool]:
    read = nar.decompress(io.BytesIO(data), max_size=most)
    return b"".join(iter(lambda: read(1 << 20), b"")), True


def _bounded(data: bytes, most: int) -> bytes:
    if len(data) > most:
        raise ValueError(f"decodes to more than {most} bytes")
    return data


_DECODERS: tuple[tuple[bytes, str, _Decode], ...] = (
    (b"\x1f\x8b", "gzip", _gunzip),
    (b"\xfd7zXZ\0", "xz", _unxz),
    (b"\x28\xb5\x2f\xfd", "zstd", _unzstd),
)


def _gzip_fields(data: memoryview) -> Mapping[str, str]:
    """The header's fields that may tell of a build (RFC 1952, 2.3)."""
    flags, mtime, extra, system = struct.unpack_from("<xxxBIBB", data)
    name = b""
    if flags & _GZIP_NAME and not flags & _GZIP_EXTRA:
        rest = bytes(data[10 : 10 + 1024])
        name = rest[: max(0, rest.find(b"\0"))]
    return {"mtime": _time(mtime), "name": shown(name), "level flag": str(extra), "system": str(system)}
