"""Pairs of files that differ in one known way, made by hand or by the host's own programs."""

from __future__ import annotations

import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Newc:
    """One member of a newc archive."""

    name: str
    data: bytes = b""
    mode: int = 0o100644
    ino: int = 1
    uid: int = 0
    gid: int = 0
    mtime: int = 1_700_000_000


def newc(*members: Newc) -> bytes:
    out = b""
    for each in (*members, Newc("TRAILER!!!", mode=0, ino=0, mtime=0)):
        name = each.name.encode(errors="surrogateescape") + b"\0"
        numbers = (each.ino, each.mode, each.uid, each.gid, 1, each.mtime, len(each.data), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % number for number in numbers) + name
        out += head + bytes(-len(head) % 4) + each.data + bytes(-len(each.data) % 4)
    return out


def tar(files: Mapping[str, bytes], **fields: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def elf(sections: Sequence[tuple[str, bytes]], *, bits: int = 64, order: str = "<") -> bytes:
    """An ELF file of nothing but sections: enough for what reads headers."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name, _ in sections) + b".shstrtab\0"
    head, wide = (64, "Q") if bits == 64 else (52, "I")
    body, headers, at = b"", [bytes(64 if bits == 64 else 40)], 1
    for name, data in (*sections, (".shstrtab", names)):
        fields = (at, 1, 0, 0, head + len(body), len(data))
        headers.append(struct.pack(f"{order}II{wide * 4}", *fields) + struct.pack(f"{order}II{wide * 2}", 0, 0, 1, 0))
        body += data + bytes(-len(data) % 8)
        at += len(name) + 1
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    rest = struct.pack(
        f"{order}HHI{wide * 3}IHHHHHH",
        2,
        62,
        1,
        0,
        0,
        head + len(body),
        0,
        head,
        0,
        0,
        len(headers[0]),
        len(headers),
        len(headers) - 1,
    )
    return ident + rest + body + b"".join(headers)
