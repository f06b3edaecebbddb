"""Comparing two trees without diffoscope: what differs, where inside files, and what is said of it."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.differing import Newc, elf, newc, tar
from vzrepro import nar
from vzrepro.base.errors import Interrupted
from vzrepro.proof.audit import compare
from vzrepro.proof.audit.compare import Difference, differences, differing
from vzrepro.proof.audit.diff import LIMITS, explain
from vzrepro.proof.audit.inside import Bounds, ContentPlace, places, sections

# --- trees


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("a", "b"):
        tree = tmp_path / side
        (tree / "same/deep").mkdir(parents=True)
        (tree / "same/deep/file").write_text("equal")
        (tree / "same/link").symlink_to("deep/file")
    return tmp_path / "a", tmp_path / "b"


def test_equal_trees_have_no_differences(sides: tuple[Path, Path]) -> None:
    (sides[1] / "same/deep/file").chmod(0o640)
    os.utime(sides[1] / "same/deep/file", (1, 1))
    assert list(differences(*sides)) == []
    assert nar.nar_hash(sides[0]) == nar.nar_hash(sides[1])


def test_every_kind_of_difference_is_found(sides: tuple[Path, Path]) -> None:
    a, b = sides
    (a / "gone").write_text("x")
    (b / "new").mkdir()
    (b / "new/below").write_text("not told of by itself")
    (a / "kind").write_text("x")
    (b / "kind").symlink_to("x")
    (a / "link").symlink_to("one")
    (b / "link").symlink_to("./one")
    for tree, text, mode in ((a, "12345", 0o644), (b, "12x4567", 0o755)):
        (tree / "content").write_text(text)
        (tree / "content").chmod(mode)
    assert list(differences(a, b)) == [
        Difference("gone", "only in a", "file", None),
        Difference("new", "only in b", None, "directory"),
        Difference("content", "mode", "0644", "0755"),
        Difference("content", "content", "5 bytes", "7 bytes", 2, 3),
        Difference("kind", "type", "file", "symbolic link"),
        Difference("link", "target", "one", "./one"),
    ]


def test_files_are_compared_as_files(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / name).write_text(text)
    assert list(differences(tmp_path / "a", tmp_path / "b")) == [Difference("", "content", "3 bytes", "3 bytes", 0, 3)]


def test_names_that_are_no_text(sides: tuple[Path, Path]) -> None:
    for tree, text in zip(sides, ("one", "two"), strict=True):
        (tree / "a\nb").write_text(text)
        (Path(os.fsdecode(os.fsencode(tree) + b"/\xff\x1b[2J"))).write_text(text)
    found = explain(*sides, realizer=None, scratch=sides[0])
    assert [each.file for each in found.details] == ["a\\nb", "\\xff\\x1b[2J"]


def test_a_special_file_is_told_of_and_not_opened(sides: tuple[Path, Path]) -> None:
    os.mkfifo(sides[0] / "pipe")
    (sides[1] / "pipe").write_text("x")
    assert list(differences(*sides)) == [Difference("pipe", "type", "special file", "file")]


def test_what_may_not_be_read_is_an_error(sides: tuple[Path, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        list(differences(sides[0], sides[1] / "nowhere"))


def test_a_comparison_ends_when_it_is_told_to(sides: tuple[Path, Path]) -> None:
    stop = threading.Event()
    stop.set()

    def check() -> None:
        if stop.is_set():
            raise Interrupted("interrupted")

    with pytest.raises(Interrupted):
        list(differences(*sides, check=check))


@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(1, 8))
def test_offset_and_count_are_exact(a: bytes, b: bytes, chunk: int) -> None:
    compare._CHUNK, kept = chunk, compare._CHUNK
    try:
        found = differing(memoryview(a), memoryview(b))
    finally:
        compare._CHUNK = kept
    longer = max(len(a), len(b))
    at = [index for index in range(longer) if a[index : index + 1] != b[index : index + 1]]
    assert found == (at[0] if at else None, len(at))


def test_large_files_are_compared_in_chunks(tmp_path: Path) -> None:
    data = bytearray(random.Random(1).randbytes(3 << 20))
    (tmp_path / "a").write_bytes(data)
    for at in (1 << 20, (2 << 20) + 5):
        data[at] ^= 1
    (tmp_path / "b").write_bytes(data + b"more")
    [found] = differences(tmp_path / "a", tmp_path / "b")
    assert (found.offset, found.count) == (1 << 20, 6)


# --- inside files


def members(found: list[ContentPlace]) -> list[tuple[tuple[str, ...], str]]:
    return [(each.member, each.kind) for each in found]


@pytest.mark.parametrize(("bits", "order"), [(64, "<"), (64, ">"), (32, "<"), (32, ">")])
def test_the_section_of_an_elf_file_is_named(bits: int, order: str) -> None:
    first = elf([(".text", b"code"), (".rodata", b"host alpha\0")], bits=bits, order=order)
    second = elf([(".text", b"code"), (".rodata", b"host bravo\0")], bits=bits, order=order)
    assert [each.name for each in sections(first)] == [".text", ".rodata", ".shstrtab"]
    [place] = places(first, second)
    assert (place.member, place.kind, place.offset, place.count) == ((".rodata",), "ELF section", 5, 5)
    assert "-00000000: 686f 7374 2061 6c70 6861 00" in place.diff


def test_sections_that_only_one_has_and_headers() -> None:
    first = elf([(".text", b"code"), (".comment", b"x")])
    second = elf([(".text", b"code"), (".debug", b"xyz")])
    assert members(places(first, second)) == [
        ((".comment",), "ELF section"),
        ((".shstrtab",), "ELF section"),
        ((".debug",), "ELF section"),
    ]
    other = bytearray(elf([(".text", b"code")]))
    other[9] = 7  # e_ident's padding
    [place] = places(elf([(".text", b"code")]), other)
    assert (place.member, place.offset) == (("ELF headers and padding",), 9)


def test_a_real_elf_file() -> None:
    data = Path("/bin/ls").resolve().read_bytes()
    text = next(each for each in sections(data) if each.name == ".text")
    changed = bytearray(data)
    changed[text.offset + 100] ^= 0xFF
    [place] = places(data, changed)
    assert (place.member, place.offset, place.count) == ((".text",), 100, 1)


@pytest.mark.parametrize("cut", [5, 63, 70, 200])
def test_a_broken_elf_file_is_bytes(cut: int) -> None:
    data = elf([(".text", b"\0" * 100)])[:cut]
    assert members(places(data, data + b"\0x")) == [((), "bytes")]


def test_members_of_an_initramfs() -> None:
    first = newc(Newc("etc/a", b"one\n"), Newc("etc/b", b"same", ino=7, mtime=10), Newc("gone"))
    second = newc(Newc("etc/a", b"two\n"), Newc("etc/b", b"same", ino=9, mtime=20, mode=0o100664), Newc("new"))
    found = places(first, second)
    assert members(found) == [
        ((), "listing"),
        (("etc/a",), "text line"),
        (("etc/b",), "cpio member"),
    ]
    assert found[0].diff.splitlines()[-2:] == ["-gone", "+new"]
    assert found[2].diff.splitlines() == [
        "-ino: 7",
        "+ino: 9",
        "-mode: -rw-r--r--",
        "+mode: -rw-rw-r--",
        "-mtime: 10 (1970-01-01 00:00:10)",
        "+mtime: 20 (1970-01-01 00:00:20)",
    ]


def test_names_that_an_archive_has_twice() -> None:
    first = newc(Newc("a", b"one"), Newc("a", b"two"))
    assert places(first, newc(Newc("a", b"one"), Newc("a", b"two"))) == []
    [place] = places(first, newc(Newc("a", b"one"), Newc("a", b"2wo")))
    assert (place.member, place.offset, place.count) == (("a",), 0, 1)


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstandard.compress])
def test_an_archive_in_an_archive_in_a_compressed_file(pack: object) -> None:
    assert callable(pack)
    first, second = (
        pack(newc(Newc("inner.tar", tar({"f": text}, mtime=1700000000)), Newc("bin", elf([(".data", text)]))))
        for text in (b"built on alpha\n", b"built on bravo\n")
    )
    found = places(first, second)
    assert (("inner.tar", "f"), "text line") in members(found)
    assert (("bin", ".data"), "ELF section") in members(found)


def test_fields_of_a_tar_member() -> None:
    first = tar({"f": b"x"}, mtime=1700000000, uid=1, uname="ann", mode=0o644)
    second = tar({"f": b"x"}, mtime=1700000001, uid=2, uname="bob", mode=0o600)
    [place] = places(first, second)
    assert place.member == ("f",)
    assert [line.split(":")[0] for line in place.diff.splitlines()] == [
        "-mode",
        "+mode",
        "-uid",
        "+uid",
        "-uname",
        "+uname",
        "-mtime",
        "+mtime",
    ]


def test_the_header_of_a_gzip_file() -> None:
    [place] = places(gzip.compress(b"x", mtime=1700000000), gzip.compress(b"x", mtime=1700000060))
    assert (place.member, place.kind) == (("gzip header",), "metadata")
    assert place.diff.splitlines()[1] == "+mtime: 1700000060 (2023-11-14 22:14:20)"


def test_the_same_contents_compressed_in_two_ways() -> None:
    data = b"".join(b"%d\n" % (number * number % 977) for number in range(5000))
    for first, second in (
        (zstandard.compress(data, 1), zstandard.compress(data, 19)),
        (lzma.compress(data, preset=0), lzma.compress(data, preset=9)),
    ):
        assert [each.kind for each in places(first, second)] == ["compression"]


def test_options_of_a_configuration() -> None:
    first = b"# Linux/arm64\nCONFIG_A=y\nCONFIG_HZ=100\n# CONFIG_B is not set\nCONFIG_C=m\n"
    second = b"# Linux/arm64\nCONFIG_A=y\nCONFIG_HZ=250\nCONFIG_B=y\n"
    assert [(each.member, each.diff.splitlines()) for each in places(first, second)] == [
        (("CONFIG_B",), ["-# CONFIG_B is not set", "+CONFIG_B=y"]),
        (("CONFIG_C",), ["-CONFIG_C=m"]),
        (("CONFIG_HZ",), ["-CONFIG_HZ=100", "+CONFIG_HZ=250"]),
    ]


def test_lines_of_text_are_aligned() -> None:
    [place] = places(b"a\nb\nc\nd\n", b"a\nb\nnew\nc\nd\n")
    assert place.diff.splitlines() == ["@@ -2,2 +2,3 @@", " b", "+new", " c"]
    [place] = places(b"a\nb\n", b"a\r\nb\r\n")
    assert place.kind == "bytes"


def test_text_of_very_many_lines_takes_no_time() -> None:
    first = b"".join(b"%d of a\n" % (number % 7) for number in range(60_000))
    [place] = places(first, first.replace(b"of a", b"of b"))
    assert "too many to align" in place.diff
    assert place.diff.splitlines()[1:3] == ["-0 of a", "+0 of b"]


def test_a_file_that_decodes_to_too_much_is_bytes() -> None:
    first, second = gzip.compress(bytes(1 << 20), mtime=0), gzip.compress(bytes(1 << 20) + b"x", mtime=0)
    assert members(places(first, second, Bounds(decoded=1 << 20))) == [((), "bytes")]
    assert members(places(first, second)) == [((), "bytes")]  # that of what is inside
    assert places(first, second)[0].offset == 1 << 20


def test_archives_in_archives_have_an_end() -> None:
    first, second = b"one", b"two"
    for _ in range(30):
        first, second = gzip.compress(first, mtime=0), gzip.compress(second, mtime=0)
    assert members(places(first, second)) == [((), "bytes")]


@pytest.mark.parametrize(
    "good",
    [
        newc(Newc("a", b"x" * 50), Newc("b")),
        tar({"a": b"x" * 50}),
        gzip.compress(b"hello" * 9, mtime=0),
        zstandard.compress(b"hello" * 9),
        lzma.compress(b"hello" * 9),
        bz2.compress(b"hello" * 9),
        elf([(".text", b"hello")]),
    ],
)
def test_what_is_cut_off_or_garbled_is_no_error(good: bytes) -> None:
    luck = random.Random(7)
    for _ in range(200):
        bad = bytearray(good[: luck.randrange(len(good) + 1)])
        for _ in range(luck.randrange(4)):
            if bad:
                bad[luck.randrange(len(bad))] = luck.randrange(256)
        found = places(good, bad)  # bytes that differ need not mean anything: padding, a checksum
        assert found == [] or bytes(bad) != good


def test_a_tar_whose_headers_speak_of_the_next_is_bytes() -> None:
    header = tarfile.TarInfo("f")
    header.type = tarfile.XHDTYPE
    chain = header.tobuf(tarfile.GNU_FORMAT) * 3000
    assert members(places(chain + b"a", chain + b"b")) == [((), "bytes")]


def test_a_member_count_is_bounded() -> None:
    first = newc(*(Newc(f"f{number}", b"1") for number in range(200)))
    second = newc(*(Newc(f"f{number}", b"2") for number in range(200)))
    assert len(places(first, second, Bounds(places=5))) == 5


# --- the explanation


def test_equal_trees_have_nothing_to_explain(sides: tuple[Path, Path], tmp_path: Path) -> None:
    found = explain(*sides, realizer=None, scratch=tmp_path)
    assert (found.details, found.guesses, found.truncated) == ((), (), None)


def test_an_explanation_without_diffoscope(sides: tuple[Path, Path], tmp_path: Path) -> None:
    for tree, moment in zip(sides, (1700000000, 1700000777), strict=True):
        (tree / "initramfs.img").write_bytes(newc(Newc("init", b"#!/bin/sh\n", mtime=moment)))
    found = explain(*sides, realizer=None, scratch=tmp_path)
    [detail] = found.details
    assert (found.tool, detail.file, detail.member, detail.kind) == ("bytes", "initramfs.img", ("init",), "cpio member")
    assert [guess.cause for guess in found.guesses] == ["timestamp"]
    again = explain(*sides, realizer=None, scratch=tmp_path)
    assert again == found
    assert len(found.id) == 16
    (sides[1] / "other").touch()
    assert explain(*sides, realizer=None, scratch=tmp_path).id != found.id


def test_limits_are_told_of(sides: tuple[Path, Path], tmp_path: Path) -> None:
    for tree, text in zip(sides, ("one", "two"), strict=True):
        for number in range(20):
            (tree / f"f{number:02}").write_text(f"{text}\n" * 500)
    limits = replace(LIMITS, details=10, files=4, excerpt_bytes=200)
    found = explain(*sides, realizer=None, scratch=tmp_path, limits=limits)
    assert len(found.details) == 10
    assert found.truncated == "10 more paths differ; not looked into: 6 of 10 differing files"
    excerpt = found.details[0].excerpt
    assert len(excerpt.encode()) < 300
    assert "-one" in excerpt
    assert "+two" in excerpt
    assert excerpt.endswith("more lines)")
    # What was not looked into has its sizes, offset and count all the same.
    assert (found.details[-1].offset, found.details[-1].count) == (0, 1500)


def test_a_file_that_is_too_large_to_look_into(sides: tuple[Path, Path], tmp_path: Path) -> None:
    for tree, text in zip(sides, ("one", "two"), strict=True):
        (tree / "large").write_text(text)
    [detail] = explain(*sides, realizer=None, scratch=tmp_path, limits=replace(LIMITS, look_bytes=2)).details
    assert (detail.kind, detail.offset, detail.count, detail.excerpt) == ("bytes", 0, 3, "-3 bytes\n+3 bytes")
