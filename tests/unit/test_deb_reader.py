"""The .deb reader: what sound packages hold, and one clear error for everything hostile or broken."""

from __future__ import annotations

import io
import lzma
import tracemalloc
import zlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.debs import Item, ar, deb, file, folder, hardlink, header, member, padded, symlink, tar
from vzrepro.base.errors import UsageError
from vzrepro.sources.deb import read_deb

LIMIT = 1 << 24


def read(data: bytes, limit: int = LIMIT) -> list[tuple[str, str, int, str, bytes]]:
    return [
        (entry.path, entry.kind, entry.mode, entry.target, b"".join(entry.body))
        for entry in read_deb(io.BytesIO(data), "x_1_all.deb", max_bytes=limit)
    ]


def refuse(data: bytes, why: str, limit: int = LIMIT) -> UsageError:
    with pytest.raises(UsageError, match=r"^x_1_all\.deb is not a package") as caught:
        read(data, limit)
    assert why in (caught.value.reason or "")
    return caught.value


@pytest.mark.parametrize("pack", ["xz", "gz", ""])
def test_a_sound_package_in_every_compression(pack: str) -> None:
    data = deb(
        folder("."),
        folder("./usr"),
        file("./usr/a", b"x" * 3_000_000, 0o755),
        symlink("./usr/b", "../usr/a"),
        hardlink("./usr/c", "./usr/a"),
        hardlink("./usr/d", "./usr/c"),
        symlink("./usr/absolute", "/etc/x"),
        file("usr//./e", b""),
        pack=pack,
    )
    assert read(data) == [
        ("usr", "dir", 0o755, "", b""),
        ("usr/a", "file", 0o755, "", b"x" * 3_000_000),
        ("usr/b", "symlink", 0o777, "../usr/a", b""),
        ("usr/c", "hardlink", 0o644, "usr/a", b""),
        ("usr/d", "hardlink", 0o644, "usr/a", b""),
        ("usr/absolute", "symlink", 0o777, "/etc/x", b""),
        ("usr/e", "file", 0o644, "", b""),
    ]


def test_bodies_that_nobody_reads_are_skipped() -> None:
    data = deb(file("a", b"1" * 2_000_001), file("b"))
    assert [entry.path for entry in read_deb(io.BytesIO(data), "x", max_bytes=LIMIT)] == ["a", "b"]


def test_long_and_foreign_names() -> None:
    long = "d/" + "n" * 150
    data = deb(file(long), symlink("s", "t" * 150), file("caf\u00e9"), file("raw-\udcff"))
    assert [(path, target) for path, _kind, _mode, target, _body in read(data)] == [
        (long, ""),
        ("s", "t" * 150),
        ("caf\u00e9", ""),
        ("raw-\udcff", ""),
    ]


def test_the_prefix_field_of_ustar() -> None:
    raw = bytearray(header(b"name", b"0", 0o644, 0, b"", None))
    raw[257:265], raw[345:350], raw[148:156] = b"ustar\x0000", b"pre/x", b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    assert read(deb(pack="", data=bytes(raw) + bytes(1024)))[0][0] == "pre/x/name"


def test_setuid_setgid_and_sticky_are_dropped() -> None:
    assert [mode for _p, _k, mode, _t, _b in read(deb(file("su", mode=0o6755), folder("tmp", 0o1777)))] == [
        0o755,
        0o777,
    ]


def test_members_reserved_by_an_underscore_are_skipped() -> None:
    start, rest = deb(file("a"))[:8], deb(file("a"))[8:]
    marker = len(member("debian-binary", b"2.0\n"))
    assert read(start + rest[:marker] + member("_gpgorigin", b"sig") + rest[marker:])[0][0] == "a"


HOSTILE = {
    "traversal": ([file("../evil")], "leads upwards"),
    "traversal in the middle": ([file("usr/../../evil")], "leads upwards"),
    "absolute": ([file("/etc/passwd")], "is absolute"),
    "NUL": ([file("a\0b")], "NUL"),
    "NUL in a link": ([symlink("a", "b\0c")], "symlink to"),
    "too long": ([file("a/" * 3000 + "b")], "a path of"),
    "character device": ([Item("null", "3")], "a character device: null"),
    "block device": ([Item("sda", "4")], "a block device: sda"),
    "fifo": ([Item("pipe", "6")], "a fifo: pipe"),
    "sparse file": ([Item("holes", "S")], "a sparse file"),
    "pax header": ([Item("pax", "x", b"30 path=../../evil\n")], "a pax header"),
    "unknown type": ([Item("odd", "Z")], "unknown type"),
    "symlink out": ([symlink("usr/a", "../../etc/shadow")], "outside the root"),
    "symlink out, then back": ([symlink("a", "b/../../root/b")], "outside the root"),
    "empty symlink": ([symlink("a", "")], "symlink to ''"),
    "file below a symlink": ([symlink("usr/l", "/etc"), file("usr/l/passwd")], "below usr/l, which is a symlink"),
    "file deep below a symlink": ([symlink("l", "/etc"), file("l/a/b/c")], "below l, which is a symlink"),
    "file below a file": ([file("f"), file("f/g")], "below f, which is a file"),
    "symlink in place of a filled directory": ([file("d/f"), symlink("d", "/etc")], "files were put below it"),
    "hard link out": ([hardlink("a", "../../etc/passwd")], "leads upwards"),
    "hard link to an absolute path": ([hardlink("a", "/etc/passwd")], "is absolute"),
    "hard link to nothing": ([hardlink("a", "b")], "no earlier regular file"),
    "hard link forwards": ([hardlink("a", "b"), file("b")], "no earlier regular file"),
    "hard link to a symlink": ([symlink("s", "/etc"), hardlink("a", "s")], "no earlier regular file"),
    "hard link to a directory": ([folder("d"), hardlink("a", "d")], "no earlier regular file"),
    "the same path twice": ([file("a"), file("./a")], "a twice"),
    "a directory and a file": ([folder("a"), file("a")], "a twice"),
    "root that is no directory": ([symlink(".", "/etc")], "its root is a symlink"),
    "directory with content": ([replace(folder("d"), data=b"x" * 600)], "claims 600 bytes"),
    "link with content": ([Item("l", "2", b"x", target="t")], "claims 1 bytes"),
    "file shorter than it says": ([Item("f", size=1 << 20)], "truncated"),
    "file of absurd size": ([Item("f", size=0o77777777777)], "truncated"),
    "wrong checksum": ([Item("f", checksum=1)], "wrong checksum"),
}


@pytest.mark.parametrize(("items", "why"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_entries_are_refused(items: list[Item], why: str) -> None:
    refuse(deb(*items), why)


def test_data_after_the_end_and_a_dangling_long_name_are_refused() -> None:
    refuse(deb(pack="", data=tar(file("a")) + padded(b"more")), "follows the end")
    refuse(
        deb(pack="", data=header(b"././@LongLink", b"L", 0, 4, b"", None) + padded(b"name") + bytes(1024)), "long name"
    )


def test_a_long_name_cannot_fill_the_memory() -> None:
    refuse(deb(pack="", data=header(b"././@LongLink", b"L", 0, 1 << 30, b"", None)), "a path of 1073741824 bytes")


@pytest.mark.parametrize("pack", ["xz", "gz"])
def test_a_bomb_stops_at_the_limit_with_little_memory(pack: str) -> None:
    data = deb(file("zeros", bytes(16 << 20)), pack=pack)
    assert len(data) < 1 << 17
    tracemalloc.start()
    try:
        refuse(data, "more than the allowed 8388608 bytes", limit=8 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # `read` collects the pieces of a body, so up to the limit is held, and never the bomb.
    assert peak < 16 << 20


def test_memory_stays_small_when_bodies_are_streamed() -> None:
    data = deb(file("zeros", bytes(16 << 20)))
    tracemalloc.start()
    try:
        total = sum(len(piece) for entry in read_deb(io.BytesIO(data), "x", max_bytes=1 << 30) for piece in entry.body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (total, peak < 8 << 20) == (16 << 20, True)


CONTAINERS = {
    "not ar": (b"PK\x03\x04" + bytes(100), "ar archive"),
    "empty": (b"", "ar archive"),
    "no data": (ar(member("debian-binary", b"2.0\n"), member("control.tar", b"")), "before its data archive"),
    "no control": (
        ar(member("debian-binary", b"2.0\n"), member("data.tar", tar())),
        "not debian-binary and control.tar",
    ),
    "format 3": (ar(member("debian-binary", b"3.0\n")), "not 2.x"),
    "zstd": (deb(data=b"").replace(b"data.tar.xz ", b"data.tar.zst"), "data.tar.zst: unsupported compression"),
    "bad member size": (b"!<arch>\n" + b"debian-binary   ".ljust(48) + b"-5        `\n", "no proper size"),
    "bad member end": (b"!<arch>\n" + b"debian-binary   ".ljust(48) + b"4         ``", "header is damaged"),
    "huge control": (ar(b"control.tar     ".ljust(48) + b"9999999999`\n"), "claims 9999999999 bytes"),
    "control cut": (ar(b"control.tar     ".ljust(48) + b"100       `\nabc"), "inside control.tar"),
    "bytes after xz": (deb(data=lzma.compress(tar()) + b"more"), "follow the xz stream"),
    "two xz streams": (deb(data=lzma.compress(tar()) * 2), "follow the xz stream"),
    "not xz": (deb(data=b"not xz at all"), "damaged"),
    "empty xz": (deb(data=b""), "damaged or truncated"),
    "not gzip": (deb(pack="gz", data=b"not gzip at all"), "damaged"),
}


@pytest.mark.parametrize(("data", "why"), CONTAINERS.values(), ids=CONTAINERS.keys())
def test_broken_containers_are_refused(data: bytes, why: str) -> None:
    refuse(data, why)


def test_an_xz_stream_that_wants_too_much_memory_is_refused() -> None:
    packed = lzma.compress(tar(file("a")))
    # The dictionary's size is one byte of the block header; 36 there means 1 GiB. Its CRC follows the header.
    block = bytearray(packed[12:24])
    block[4] = 36
    block[8:12] = zlib.crc32(bytes(block[:8])).to_bytes(4, "little")
    refuse(deb(data=packed[:12] + bytes(block) + packed[24:]), "Memory usage limit")


@pytest.mark.parametrize("pack", ["xz", "gz", ""])
def test_every_truncation_is_noticed(pack: str) -> None:
    whole = deb(folder("d"), file("d/f", bytes(range(256)) * 20), pack=pack)
    cuts = {*range(0, 220, 3), *range(220, len(whole), max(1, len(whole) // 60)), len(whole) - 2}
    for cut in cuts:
        with pytest.raises(UsageError):
            read(whole[:cut])


def test_a_flipped_bit_in_the_packed_data_is_noticed() -> None:
    whole = bytearray(deb(file("f", bytes(range(256)) * 400)))
    whole[-100] ^= 1
    refuse(bytes(whole), "damaged")


@settings(max_examples=40)
@given(st.binary(max_size=500))
def test_garbage_never_gets_past_as_another_error(data: bytes) -> None:
    for hostile in (data, deb(data=data), deb(pack="", data=data), deb(pack="gz", data=data)):
        with pytest.raises(UsageError):
            read(hostile)


@given(st.integers(0, 511), st.integers(0, 255))
def test_a_changed_header_is_read_or_refused_never_worse(position: int, value: int) -> None:
    raw = bytearray(tar(file("usr/f", b"x")))
    raw[position] = value
    try:
        entries = read(deb(pack="", data=bytes(raw)))
    except UsageError:
        return
    assert all(not path.startswith("/") and ".." not in path.split("/") for path, *_rest in entries)
