"""Packages and archives made by hand: every byte of a hostile .deb is under a test's control."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512


@dataclass(frozen=True, slots=True)
class Item:
    """One tar entry as the archive will spell it; `flag` is the tar type (`0` file, `1` hard link, `2` symlink …)."""

    path: str
    flag: str = "0"
    data: bytes = b""
    mode: int = 0o644
    target: str = ""
    size: int | None = None
    checksum: int | None = None

    def tar(self) -> bytes:
        out = b""
        for text, flag in ((self.path, b"L"), (self.target, b"K")):
            raw = text.encode("utf-8", "surrogateescape")
            if len(raw) > 100 or b"\0" in raw:
                out += header(b"././@LongLink", flag, 0, len(raw) + 1, b"", None) + padded(raw + b"\0")
        size = len(self.data) if self.size is None else self.size
        name = self.path.encode("utf-8", "surrogateescape")[:100]
        return (
            out
            + header(name, self.flag.encode(), self.mode, size, self.target.encode()[:100], self.checksum)
            + padded(self.data)
        )


def header(name: bytes, flag: bytes, mode: int, size: int, target: bytes, checksum: int | None) -> bytes:
    head = name.ljust(100, b"\0") + b"%07o\0" % mode + b"0000000\0" * 2 + b"%011o\0" % size + b"%011o\0" % 1700000000
    raw = (head + b" " * 8 + flag + target.ljust(100, b"\0") + b"ustar  \0").ljust(BLOCK, b"\0")
    return raw[:148] + b"%06o\0 " % (sum(raw) if checksum is None else checksum) + raw[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def folder(path: str, mode: int = 0o755) -> Item:
    return Item(path + "/", "5", mode=mode)


def file(path: str, data: bytes = b"content\n", mode: int = 0o644) -> Item:
    return Item(path, data=data, mode=mode)


def symlink(path: str, target: str) -> Item:
    return Item(path, "2", mode=0o777, target=target)


def hardlink(path: str, target: str) -> Item:
    return Item(path, "1", target=target)


def tar(*items: Item) -> bytes:
    return b"".join(item.tar() for item in items) + bytes(2 * BLOCK)


def member(name: str, data: bytes) -> bytes:
    head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    return head + data + b"\n" * (len(data) % 2)


def ar(*members: bytes) -> bytes:
    return b"!<arch>\n" + b"".join(members)


def deb(*items: Item, pack: str = "xz", data: bytes | None = None, postinst: bytes | None = None) -> bytes:
    """A package of the items; or, with `data`, one whose data.tar holds exactly these bytes."""
    control = [] if postinst is None else [folder("."), file("./control"), file("./postinst", postinst, 0o755)]
    plain = tar(*items)
    packed = {"xz": lambda raw: lzma.compress(raw, preset=0), "gz": gzip.compress, "": bytes}[pack](plain)
    suffix = f".{pack}" if pack else ""
    return ar(
        member("debian-binary", b"2.0\n"),
        member("control.tar.xz", lzma.compress(tar(*control), preset=0)),
        member(f"data.tar{suffix}", packed if data is None else data),
    )


def write(path: Path, *items: Item, postinst: bytes | None = None) -> tuple[str, Path]:
    """The package as a file, in the form `write_image` takes."""
    path.write_bytes(deb(*items, postinst=postinst))
    return path.name, path
