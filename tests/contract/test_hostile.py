"""Caches that break, stall and lie, over real sockets: the right bytes arrive, or a miss, and never anything else.

`python -m tests.contract.test_hostile` prints the cases and what comes of each.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests import faults, servers
from tests.caches import new_cache
from tests.contract.served import Serving
from tests.faults import Exchange, Fault, FaultyProxy
from vzrepro import nar
from vzrepro.base.errors import RemoteError
from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, ObjectInfo, StorePath, store_path
from vzrepro.cache import CacheReader, CacheWriter, DirectoryBackend, NarInfo, SigningKey, TrustedKeys
from vzrepro.cache.http import CONNECTIONS, HttpBackend
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.remote import Patience
from vzrepro.net import Body
from vzrepro.net.http import Http

KEY = SigningKey.generate("ours-1")
INFO, NARINFO, NAR = "/nix-cache-info", "/*.narinfo", "/nar/*"
PATIENCE_SECS = 1.0
BUSY_SECS = 9.0  # where little has to be waited for, however busy the machine is
MEMORY = 160 << 20  # bytes; the proxy and the server are in this process as well


class Comes(enum.Enum):
    """What comes of asking such a cache for an object."""

    RIGHT = "the right bytes arrive"
    MISS = "a miss; the cache is still asked for others"
    LEFT = "a miss; the cache is left alone from then on"


class World:
    """A cache in a directory, served, with a proxy before it that breaks things; it holds two small objects, and a
    large one if asked to."""

    def __init__(
        self, root: Path, serving: Serving, proxy: FaultyProxy, objects: list[ObjectInfo], until_the_end: ExitStack
    ) -> None:
        self.root = root
        self.until_the_end = until_the_end
        self.served = serving.url
        self.proxy = proxy
        self.wanted, self.other, *self.large = objects
        self.url = proxy.url

    def narinfo(self, info: ObjectInfo) -> NarInfo:
        return NarInfo.parse((self.root / narinfo_key(info.path)).read_bytes())

    def write(self, info: NarInfo) -> None:
        (self.root / narinfo_key(info.path)).write_bytes(info.render())

    def plant(self, data: bytes, *, compress: bool = True, **changes: Any) -> None:
        """Let the wanted object's NAR be these bytes, its hashes and sizes, and the signature of a trusted but careless
        builder on them. `changes` are made to the narinfo before it is signed."""
        file = zstd(data) if compress else data
        old = self.narinfo(self.wanted)
        honest = replace(
            old,
            nar_hash=NarHash.of(data),
            nar_size=len(data),
            file_hash=FileHash.of(file),
            file_size=len(file),
            compression="zstd" if compress else "none",
            signatures=(),
            own_signatures=(),
        )
        (self.root / old.url).write_bytes(file)
        self.write(replace(honest, **changes).signed(KEY))
        self.wanted = replace(self.wanted, nar_hash=honest.nar_hash, nar_size=honest.nar_size)

    def forge(self, data: bytes, **changes: Any) -> None:
        """Let the wanted object's compressed NAR be these bytes, and its narinfo fit as far as nothing is signed."""
        old = self.narinfo(self.wanted)
        (self.root / old.url).write_bytes(data)
        self.write(replace(old, **{"file_hash": FileHash.of(data), "file_size": len(data), **changes}))

    def compressed(self) -> bytes:
        return (self.root / self.narinfo(self.wanted).url).read_bytes()

    def edit(self, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of the wanted object's narinfo."""
        path = self.root / narinfo_key(self.wanted.path)
        path.write_bytes(change(path.read_bytes()))


Arrange = Callable[[World], None]


@dataclass(frozen=True)
class Case:
    """Something that goes wrong. `silent`: nothing is wrong with the cache, so nobody is told."""

    name: str
    comes: Comes
    arrange: Arrange
    silent: bool = False
    large: bool = False


@dataclass
class Told:
    """How a case ended."""

    comes: Comes
    lines: list[str] = field(default_factory=list)
    error: str | None = None


# --- hostile bytes ----------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    return b"".join(nar.compress([data]))


def string(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data + bytes(-len(data) % 8)


def words(*each: bytes) -> bytes:
    return b"".join(map(string, each))


def nar_of(node: bytes) -> bytes:
    return string(b"nix-archive-1") + node


def plain(data: bytes) -> bytes:
    return words(b"(", b"type", b"regular", b"contents", data, b")")


def link(target: bytes) -> bytes:
    return words(b"(", b"type", b"symlink", b"target", target, b")")


def directory(*entries: tuple[bytes, bytes]) -> bytes:
    inside = b"".join(words(b"entry", b"(", b"name", name, b"node") + node + string(b")") for name, node in entries)
    return words(b"(", b"type", b"directory") + inside + string(b")")


def deep(levels: int) -> bytes:
    opening = words(b"(", b"type", b"directory")
    entry = words(b"entry", b"(", b"name", b"a", b"node")
    return nar_of((opening + entry) * levels + plain(b"x") + string(b")") * 2 * levels)


def huge_file(size: int) -> bytes:
    """A NAR that announces a file of so many bytes and holds a few."""
    return nar_of(words(b"(", b"type", b"regular", b"contents") + size.to_bytes(8, "little") + b"x" * 4096)


@cache
def bomb() -> bytes:
    """A few hundred KB that decode to 4 GiB of zeros, in one frame."""
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    piece = bytes(16 << 20)
    return b"".join(packer.compress(piece) for _ in range(256)) + packer.flush()


def skippable(size: int) -> bytes:
    return b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(size)


def endless_frame() -> bytes:
    """The beginning of a zstd frame, to which blocks can be added for ever: RLE blocks of 128 KiB of zeros."""
    return b"\x28\xb5\x2f\xfd" + b"\x00\x58"


RLE_BLOCK = (((1 << 17) << 3) | (1 << 1)).to_bytes(3, "little") + b"\0"


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


# --- the cases --------------------------------------------------------------------------------------------------------


def on(*rules: tuple[str, *tuple[Fault, ...]]) -> Arrange:
    """Faults on the way."""

    def arrange(world: World) -> None:
        for pattern, *each in rules:
            world.proxy.on(pattern, *each)

    return arrange


def everywhere(name: str, comes: Comes, *each: Fault) -> list[Case]:
    """The same fault at each of the three kinds of entries that are needed for an object."""
    places = (("nix-cache-info", INFO), ("the narinfo", NARINFO), ("the NAR", NAR))
    return [Case(f"{name}: {what}", comes, on((pattern, *each))) for what, pattern in places]


def planted(data: bytes, **changes: Any) -> Arrange:
    return lambda world: world.plant(data, **changes)


def forged(change: Callable[[bytes], bytes], **changes: Any) -> Arrange:
    """Changes the compressed NAR."""
    return lambda world: world.forge(change(world.compressed()), **changes)


def narinfo_with(**changes: Any) -> Arrange:
    """Changes the narinfo, and leaves the signatures that it had."""
    return lambda world: world.write(replace(world.narinfo(world.wanted), **changes))


def line_with(name: str, value: bytes) -> Arrange:
    """Changes a line of the narinfo."""

    def change(data: bytes) -> bytes:
        lines = [
            b"%s: %s" % (name.encode(), value) if line.startswith(name.encode()) else line for line in data.split(b"\n")
        ]
        return b"\n".join(lines)

    return lambda world: world.edit(change)


def swapped_narinfos(world: World) -> None:
    world.proxy.on(f"/{narinfo_key(world.wanted.path)}", faults.swaps(f"/{narinfo_key(world.other.path)}"))


def swapped_nars(world: World) -> None:
    world.proxy.on(f"/{world.narinfo(world.wanted).url}", faults.swaps(f"/{world.narinfo(world.other).url}"))


def stale_narinfo(world: World) -> None:
    """An old narinfo, rightly signed, whose NAR has since been replaced by one that was compressed anew."""
    path = f"/{narinfo_key(world.wanted.path)}"
    old = world.narinfo(world.wanted)
    answer = faults.Answer(200, {"content-length": str(len(old.render()))}, old.render())
    (world.root / old.url).rename(world.root / "nar" / "anew.nar.zst")
    world.write(replace(old, url="nar/anew.nar.zst"))
    world.proxy.on(path, faults.replays(answer))


def no_such_host(world: World) -> None:
    world.url = "http://cache.invalid"


def nobody_listens(world: World) -> None:
    port = world.until_the_end.enter_context(servers.refusing())
    world.url = f"http://127.0.0.1:{port}"


def no_tls(world: World) -> None:
    world.url = world.url.replace("http:", "https:")


def elsewhere(world: World) -> None:
    def fault(exchange: Exchange) -> None:
        faults.redirects(f"{world.served}{exchange.path}")(exchange)

    world.proxy.on("*", fault)


def to_nowhere(world: World) -> None:
    world.proxy.on(NAR, faults.redirects("http://cache.invalid/x"))


def to_a_file(world: World) -> None:
    world.proxy.on(NAR, faults.redirects((world.root / world.narinfo(world.wanted).url).as_uri()))


def endless_nar(piece: bytes, head: bytes = b"", file_size: int | None = None) -> Arrange:
    """A compressed NAR followed by `piece` for ever, and a narinfo with another size, which nobody has signed."""

    def arrange(world: World) -> None:
        world.forge(head or world.compressed(), file_hash=None, file_size=file_size)
        world.proxy.on(NAR, faults.endless(piece))

    return arrange


def dripping_miss(exchange: Exchange) -> None:
    exchange.drip(b"HTTP/1.1 404 x\r\nContent-Length: 9000\r\n\r\n" + bytes(9000), 0.1)


def another_store(world: World) -> None:
    (world.root / "nix-cache-info").write_text("StoreDir: /gnu/store\n")


def url_of_itself(world: World) -> None:
    line_with("URL", narinfo_key(world.wanted.path).encode())(world)


def flipped_in_place(world: World) -> None:
    data = flipped(world.compressed())
    (world.root / world.narinfo(world.wanted).url).write_bytes(data)


def appended(data: bytes) -> Arrange:
    """Adds to the narinfo."""
    return lambda world: world.edit(lambda before: before + data)


def signed_by_others(count: int) -> Arrange:
    return appended(b"".join(b"Sig: k%d:" % each + b"A" * 86 + b"==\n" for each in range(count)))


def signed_wrongly(count: int) -> Arrange:
    """Puts wrong signatures in the name of a trusted key before the right one."""
    wrong = b"".join(b"Sig: ours-1:" + b"%086d" % each + b"==\n" for each in range(count))
    return lambda world: world.edit(lambda before: before.replace(b"Sig: ", wrong + b"Sig: ", 1))


def in_a_directory(*entries: tuple[bytes, bytes]) -> Arrange:
    return planted(nar_of(directory(*entries)))


def long_name() -> bytes:
    opening = words(b"(", b"type", b"directory", b"entry", b"(", b"name")
    return nar_of(opening + (1 << 60).to_bytes(8, "little") + bytes(64))


def changing(world: World) -> None:
    world.proxy.on(NAR, faults.passes, faults.headers(etag='"another"'))


def missing(code: int, pattern: str) -> Arrange:
    return on((pattern, faults.status(code)))


ON_THE_WAY: list[tuple[str, Comes, *tuple[Fault, ...]]] = [
    ("503 twice", Comes.RIGHT, faults.status(503), faults.status(503), faults.passes),
    ("500 for ever", Comes.LEFT, faults.status(500)),
    ("429 with Retry-After: 1", Comes.RIGHT, faults.status(429, retry_after="1"), faults.passes),
    ("503 with Retry-After: 99999", Comes.LEFT, faults.status(503, retry_after="99999")),
    ("reset once before the answer", Comes.RIGHT, faults.refuses, faults.passes),
    ("reset before every answer", Comes.LEFT, faults.refuses),
    ("hangs up without an answer", Comes.LEFT, faults.hangs_up),
    ("reset once in the middle", Comes.RIGHT, faults.resets_after(20), faults.passes),
    ("cut off once, fewer bytes than announced", Comes.RIGHT, faults.cuts(20), faults.passes),
    ("cut off before every body", Comes.LEFT, faults.cuts(0)),
    ("stalls once", Comes.RIGHT, faults.stalls, faults.passes),
    ("stalls for ever", Comes.LEFT, faults.stalls),
    ("stalls in the middle", Comes.LEFT, faults.stalls_after(20)),
    ("a byte of the body now and then", Comes.LEFT, faults.drips(0.1)),
    ("a byte of the head now and then", Comes.LEFT, faults.drips_head(0.1)),
    ("a Content-Length that is none", Comes.LEFT, faults.headers(content_length="²")),
    ("a Content-Length of 5,000 digits", Comes.LEFT, faults.headers(content_length="9" * 5000)),
    ("two Content-Lengths", Comes.LEFT, faults.headers(content_length="5, 6")),
    ("not HTTP", Comes.LEFT, faults.says(b"\x16\x03\x01 \x1b[2J nonsense\r\n\r\n")),
    ("`100 Continue` for ever", Comes.LEFT, faults.says(b"HTTP/1.1 100 Continue\r\n\r\n", again=True)),
    ("headers for ever", Comes.LEFT, faults.says(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 999, again=True)),
    ("gzip that nobody asked for", Comes.LEFT, faults.compresses),
    ("a redirect loop", Comes.LEFT, faults.loops),
    ("a redirect to file:", Comes.LEFT, faults.redirects("file:///etc/passwd")),
    ("a redirect to nonsense", Comes.LEFT, faults.redirects("http://[::1\x1b[2J")),
]
"""What goes wrong on the way to whatever is asked for: at each of the three kinds of entries that an object needs, and
where a file is downloaded (`test_hostile_downloads`)."""

CASES = [
    *(case for name, comes, *each in ON_THE_WAY for case in everywhere(name, comes, *each)),
    # Busy and broken servers.
    Case("404: nix-cache-info", Comes.RIGHT, missing(404, INFO), silent=True),
    Case("404: the narinfo", Comes.MISS, missing(404, NARINFO), silent=True),
    Case("410: the narinfo", Comes.MISS, missing(410, NARINFO), silent=True),
    Case("404: the NAR", Comes.MISS, missing(404, NAR)),
    Case("403: everything", Comes.LEFT, missing(403, "*")),
    Case("403: the narinfo alone, as S3 says of what is missing", Comes.MISS, missing(403, NARINFO), silent=True),
    Case("403: the NAR", Comes.LEFT, missing(403, NAR)),
    Case("cut off again and again: a large NAR", Comes.LEFT, on((NAR, faults.cuts(9999))), large=True),
    Case("cut off once: a large NAR", Comes.RIGHT, on((NAR, faults.cuts(3 << 20), faults.passes)), large=True),
    Case("cut short with a length that fits: the narinfo", Comes.MISS, on((NARINFO, faults.shortens(200)))),
    Case("cut short with a length that fits: the NAR", Comes.MISS, on((NAR, faults.shortens(200)))),
    # Slow ones.
    Case("a byte of the 404 now and then", Comes.LEFT, on((NARINFO, dripping_miss))),
    Case("5 kB/s: a large NAR", Comes.LEFT, on((NAR, faults.drips(0.05, 250))), large=True),
    Case("stalls in the middle: a large NAR", Comes.LEFT, on((NAR, faults.stalls_after(3 << 20))), large=True),
    # Odd and wrong answers.
    Case("knows no ranges: a large NAR", Comes.RIGHT, on((NAR, faults.ignores_ranges)), silent=True, large=True),
    Case("tells no lengths: a large NAR", Comes.RIGHT, on((NAR, faults.without_lengths)), silent=True, large=True),
    Case(
        "knows ranges now and then: a large NAR",
        Comes.LEFT,
        on((NAR, faults.passes, faults.ignores_ranges)),
        large=True,
    ),
    Case("another range than the one asked for", Comes.LEFT, on((NAR, faults.shifts_ranges)), large=True),
    Case("an impossible Content-Range", Comes.LEFT, on((NAR, faults.headers(content_range="bytes ²-³/x")))),
    Case("another ETag in the middle", Comes.LEFT, changing, large=True),
    Case("a redirect to the right NAR as file:", Comes.LEFT, to_a_file),
    Case("a redirect to another host that has it all", Comes.RIGHT, elsewhere, silent=True),
    Case("a redirect to a host that does not exist", Comes.LEFT, to_nowhere),
    Case("an endless nix-cache-info", Comes.LEFT, on((INFO, faults.endless(b"x: y\n" * 9999)))),
    Case("an endless narinfo", Comes.MISS, on((NARINFO, faults.endless(b"x: y\n" * 9999)))),
    Case("an endless NAR", Comes.MISS, on((NAR, faults.endless(bytes(1 << 16))))),
    Case("nix-cache-info of another store", Comes.LEFT, another_store),
    # No server.
    Case("the host's name does not resolve", Comes.LEFT, no_such_host),
    Case("the connection is refused", Comes.LEFT, nobody_listens),
    Case("no TLS where TLS was asked for", Comes.LEFT, no_tls),
    # Right things in the wrong place, or at the wrong time.
    Case("another object's narinfo, rightly signed", Comes.MISS, swapped_narinfos),
    Case("another object's NAR", Comes.MISS, swapped_nars),
    Case("an old narinfo whose NAR is gone", Comes.MISS, stale_narinfo),
    # Tampered narinfos.
    Case("narinfo: another NarHash", Comes.MISS, narinfo_with(nar_hash=NarHash.of(b"evil"))),
    Case("narinfo: another NarSize", Comes.MISS, narinfo_with(nar_size=1 << 40)),
    Case("narinfo: no signature", Comes.MISS, narinfo_with(signatures=())),
    Case("narinfo: another FileHash", Comes.MISS, narinfo_with(file_hash=FileHash.of(b"evil"))),
    Case("narinfo: another FileSize", Comes.MISS, narinfo_with(file_size=7)),
    Case("narinfo: URL ../x", Comes.MISS, line_with("URL", b"../x")),
    Case("narinfo: URL nar/../../x", Comes.MISS, line_with("URL", b"nar/../../x")),
    Case("narinfo: URL /etc/passwd", Comes.MISS, line_with("URL", b"/etc/passwd")),
    Case("narinfo: URL http://cache.invalid/x", Comes.MISS, line_with("URL", b"http://cache.invalid/x")),
    Case("narinfo: URL //cache.invalid/x", Comes.MISS, line_with("URL", b"//cache.invalid/x")),
    Case("narinfo: URL file:///etc/passwd", Comes.MISS, line_with("URL", b"file:///etc/passwd")),
    Case("narinfo: URL of itself", Comes.MISS, url_of_itself),
    Case("narinfo: 2 MiB", Comes.MISS, appended(b"Foo: bar\n" * 240_000)),
    Case("narinfo: 60 signatures", Comes.RIGHT, signed_by_others(60), silent=True),
    Case("narinfo: 9,000 signatures", Comes.MISS, signed_by_others(9000)),
    Case("narinfo: 2,000 wrong signatures of a trusted name, which fit", Comes.MISS, signed_wrongly(2000)),
    Case("narinfo: 9 wrong signatures of a trusted name before the right one", Comes.MISS, signed_wrongly(9)),
    Case("narinfo: 3 wrong signatures of a trusted name", Comes.RIGHT, signed_wrongly(3), silent=True),
    Case("narinfo: empty", Comes.MISS, lambda world: world.edit(lambda data: b"")),
    Case("narinfo: a zero byte", Comes.MISS, appended(b"A: \0\n")),
    Case("narinfo: not UTF-8", Comes.MISS, appended(b"A: \xff\n")),
    Case("narinfo: NarSize of 5,000 digits", Comes.MISS, line_with("NarSize", b"9" * 5000)),
    Case("narinfo: a terminal's control codes", Comes.MISS, line_with("Compression", b"\x1b[2J\x1b]0;pwned\x07")),
    Case("narinfo: 900 KB of compression", Comes.MISS, line_with("Compression", b"x" * 900_000)),
    # Tampered NARs.
    Case("NAR: one bit flipped, in the file", Comes.MISS, forged(flipped, file_hash=None)),
    Case("NAR: one bit flipped, under its old FileHash", Comes.MISS, flipped_in_place),
    Case("NAR: content changed, sizes kept", Comes.MISS, lambda world: world.forge(zstd(nar_of(plain(b"jello\n"))))),
    Case("NAR: empty", Comes.MISS, forged(lambda data: b"")),
    Case("NAR: data after the end", Comes.MISS, forged(lambda data: data + b"junk")),
    Case("NAR: a frame after the end", Comes.MISS, forged(lambda data: data + zstd(b"junk"))),
    Case(
        "NAR: skippable frames with a payload",
        Comes.RIGHT,
        forged(lambda data: skippable(9) + data + skippable(999)),
        silent=True,
    ),
    Case(
        "NAR: a skippable frame that claims 4 GB",
        Comes.MISS,
        forged(lambda data: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + data),
    ),
    Case("NAR: 4 GiB of zeros in 400 KB", Comes.MISS, forged(lambda data: bomb())),
    Case("NAR: 4 GiB of zeros after the right bytes", Comes.MISS, forged(lambda data: data + bomb())),
    Case("NAR: 4 GiB of zeros, no FileSize", Comes.MISS, forged(lambda data: bomb(), file_hash=None, file_size=None)),
    Case("NAR: 4 GiB of zeros, a NarSize that lies", Comes.MISS, forged(lambda data: bomb(), nar_size=1 << 32)),
    Case("NAR: a window of 2 GiB", Comes.MISS, forged(lambda data: b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + data)),
    Case("NAR: an endless frame", Comes.MISS, endless_nar(RLE_BLOCK * 1000, endless_frame())),
    Case("NAR: empty frames for ever", Comes.MISS, endless_nar((zstandard.compress(b"") + skippable(4000)) * 16)),
    Case("NAR: skippable frames for ever", Comes.MISS, endless_nar(skippable(1 << 16))),
    Case(
        "NAR: skippable frames for ever, under a large FileSize",
        Comes.MISS,
        endless_nar(skippable(1 << 16), file_size=10**17),
    ),
    # Hostile NARs that a trusted builder has signed.
    Case("signed: a good NAR, not compressed", Comes.RIGHT, planted(nar_of(plain(b"x")), compress=False), silent=True),
    Case("signed: another NarSize", Comes.MISS, planted(nar_of(plain(b"x")), nar_size=500)),
    Case("signed: another NarHash", Comes.MISS, planted(nar_of(plain(b"x")), nar_hash=NarHash.of(b"evil"))),
    Case("signed: 64 PiB in one file", Comes.MISS, planted(huge_file(1 << 56), nar_size=(1 << 56) + 120)),
    Case("signed: 4 EiB in one file", Comes.MISS, planted(huge_file(1 << 62))),
    Case("signed: 2^64 - 1 bytes in one file", Comes.MISS, planted(huge_file((1 << 64) - 1))),
    Case("signed: a name of 2^60 bytes", Comes.MISS, planted(long_name())),
    Case("signed: 5,000 nested directories", Comes.MISS, planted(deep(5000))),
    Case("signed: the name `..`", Comes.MISS, in_a_directory((b"..", plain(b"x")))),
    Case("signed: the name `.`", Comes.MISS, in_a_directory((b".", plain(b"x")))),
    Case("signed: the name `a/b`", Comes.MISS, in_a_directory((b"a/b", plain(b"x")))),
    Case("signed: the name `/tmp/x`", Comes.MISS, in_a_directory((b"/tmp/x", plain(b"x")))),
    Case("signed: an empty name", Comes.MISS, in_a_directory((b"", plain(b"x")))),
    Case("signed: a name with a zero byte", Comes.MISS, in_a_directory((b"a\0b", plain(b"x")))),
    Case("signed: the same name twice", Comes.MISS, in_a_directory((b"a", plain(b"x")), (b"a", plain(b"y")))),
    Case("signed: names out of order", Comes.MISS, in_a_directory((b"b", plain(b"x")), (b"a", plain(b"y")))),
    Case(
        "signed: a link, then a directory below its name",
        Comes.MISS,
        in_a_directory((b"a", link(b"/tmp")), (b"a", directory((b"x", plain(b"x"))))),
    ),
    Case(
        "signed: a link, then an entry named as a path through it",
        Comes.MISS,
        in_a_directory((b"a", link(b"/tmp")), (b"a/x", plain(b"x"))),
    ),
    Case("signed: data after the end", Comes.MISS, planted(nar_of(plain(b"x")) + bytes(8))),
    Case(
        "signed: padding that is not zero",
        Comes.MISS,
        planted(nar_of(plain(b"x")).replace(b"x" + bytes(7), b"x" + bytes(6) + b"!")),
    ),
    Case("signed: a link to anywhere is only a link", Comes.RIGHT, planted(nar_of(link(b"/etc"))), silent=True),
    Case("signed: 64 MiB of zeros in a few KB", Comes.RIGHT, planted(nar_of(plain(bytes(64 << 20)))), silent=True),
]


# --- what comes of them -----------------------------------------------------------------------------------------------


def _pushed(cache: CacheWriter, root: Path, name: str, content: bytes) -> ObjectInfo:
    tree = root / name
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "run").write_bytes(content)
    (tree / "empty").mkdir()
    path = store_path(DrvHash.of(name.encode()), name)
    nar_hash, nar_size = nar.nar_hash(tree)
    info = ObjectInfo(path, nar_hash, nar_size)
    cache.push(info, tree)
    return info


@contextlib.contextmanager
def a_world(tmp: Path, large: bool) -> Iterator[World]:
    root = tmp / "cache"
    pushing = new_cache(DirectoryBackend(root), TrustedKeys([KEY.public]), KEY)
    objects = [
        _pushed(pushing, tmp / "trees", "wanted", b"wanted\n" * 50 + os.urandom(500)),
        _pushed(pushing, tmp / "trees", "other", b"other\n" * 50 + os.urandom(500)),
    ]
    if large:
        objects[0] = _pushed(pushing, tmp / "trees", "large", os.urandom(17 << 20))
    with ExitStack() as stack:
        serving = stack.enter_context(Serving(root))
        yield World(root, serving, stack.enter_context(FaultyProxy(serving.url)), objects, stack)


def _taken(cache: CacheReader, path: StorePath, dest: Path, told: Told) -> bool:
    """Query and fetch as a realization does; whether the object has arrived."""
    info = cache.query(path)
    if info is None:
        return False
    try:
        cache.fetch(info, dest)
    except RemoteError as error:
        told.error = error.message
        return False
    return True


def run(case: Case, tmp: Path) -> Told:
    """Play a case; asserts all that holds for every one."""
    patience = Patience(PATIENCE_SECS if case.comes is Comes.LEFT else BUSY_SECS)
    told = Told(Comes.MISS)
    private = tmp / "private"
    private.mkdir()
    with a_world(tmp, case.large) as world:
        case.arrange(world)
        cache = CacheReader(HttpBackend(world.url, patience), TrustedKeys([KEY.public]), warn=told.lines.append)
        with little_memory():
            begun = time.monotonic()
            arrived = _taken(cache, world.wanted.path, private / "dest", told)
            took = time.monotonic() - begun
        assert took < 60, "waits and waits"
        assert not world.proxy.swallowed, "takes in what never ends"
        if arrived:
            told.comes = Comes.RIGHT
            assert nar.nar_hash(private / "dest") == (world.wanted.nar_hash, world.wanted.nar_size)
        else:
            assert list(private.iterdir()) == []
            found = cache.query(world.other.path)
            cache.by_build_key(BuildKey.of(b"any"))
            # By name: of the requests that were given up, one may arrive now.
            if not world.proxy.of(f"/{narinfo_key(world.other.path)}") and not world.proxy.of("/build/*"):
                told.comes = Comes.LEFT
                assert found is None
        assert len(told.lines) <= 1
        assert all(line.isprintable() and len(line) < 1000 for line in told.lines)
        shutil.rmtree(private / "dest", ignore_errors=True)
    return told


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Asserts that what happens inside needs little memory at any time, where the system can tell."""
    clear = Path("/proc/self/clear_refs")
    before = _memory("VmRSS")
    try:
        clear.write_text("5\n")
    except OSError:
        before = None
    yield
    peak = _memory("VmHWM")
    assert before is None or peak is None or peak - before < MEMORY


def _memory(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_bytes_or_a_miss(case: Case, tmp_path: Path) -> None:
    told = run(case, tmp_path)
    assert told.comes is case.comes, told
    assert told.lines == [] if case.silent or case.comes is Comes.RIGHT else len(told.lines) == 1


class Counting(Http):
    """The real thing, which counts what it is asked for: the proxy may see a request that was given up much later."""

    def __init__(self) -> None:
        super().__init__(connections=CONNECTIONS)
        self.asked = 0

    def open(self, *words: Any, **more: Any) -> Body:
        self.asked += 1
        return super().open(*words, **more)


@pytest.mark.parametrize("fault", [faults.stalls, faults.status(503), faults.refuses, faults.drips_head(0.1)])
def test_many_who_ask_at_once_wait_together(fault: Fault, tmp_path: Path) -> None:
    """One patience, one warning, and then silence, however many threads look for however many objects."""
    lines: list[str] = []
    with a_world(tmp_path, large=False) as world:
        world.proxy.on("*", fault)
        http = Counting()
        backend = HttpBackend(world.url, Patience(PATIENCE_SECS), http=http)
        cache = CacheReader(backend, TrustedKeys([KEY.public]), warn=lines.append)
        paths = [store_path(DrvHash.of(b"%d" % number), "any") for number in range(200)]
        begun = time.monotonic()
        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(cache.query, paths)) == [None] * len(paths)
        assert time.monotonic() - begun < 60
        asked = http.asked
        assert asked > 0
        assert list(map(cache.query, paths)) == [None] * len(paths)
        assert http.asked == asked
    assert len(lines) == 1


def test_the_names_of_the_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def main() -> None:
    """Play every case and print what came of it, as a table in Markdown."""
    sys.stdout.write("| what is wrong | what comes of it | what is told |\n|---|---|---|\n")
    for case in CASES:
        with tempfile.TemporaryDirectory() as tmp:
            told = run(case, Path(tmp))
        line = re.sub(r"https?://127\.0\.0\.1:\d+", "it", told.lines[0].partition(": ")[2]) if told.lines else ""
        sys.stdout.write(f"| {case.name} | {told.comes.value} | {line} |\n")


if __name__ == "__main__":
    main()
