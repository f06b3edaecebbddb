"""Causes guessed from bytes and text: each kind of evidence, and nothing read into what is none."""

from __future__ import annotations

import gzip

import pytest
import zstandard

from tests.differing import Newc, elf, newc, tar
from vzrepro.proof.audit.causes import FIXES
from vzrepro.proof.audit.guess import FileContext, guesses
from vzrepro.proof.audit.inside import ContentPlace, places
from vzrepro.proof.audit.model import Guess


def of_bytes(a: bytes, b: bytes, context: FileContext | None = None) -> tuple[Guess, ...]:
    return guesses([("out", place) for place in places(a, b)], context)


def of_lines(old: str, new: str, context: FileContext | None = None) -> list[str]:
    return [each.cause for each in of_bytes(f"same\n{old}\nsame\n".encode(), f"same\n{new}\nsame\n".encode(), context)]


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("built 2026-01-31 12:00:00", "built 2026-02-01 09:10:11", "timestamp"),
        ("built 2026-01-31T12:00:00Z", "built 2026-01-31T12:00:01Z", "timestamp"),
        ("Sat Jan 31 12:00:00 UTC 2026", "Sun Feb  1 00:00:00 UTC 2026", "timestamp"),
        ("Sat, 31 Jan 2026 12:00:00 +0000", "Sun, 01 Feb 2026 12:00:00 +0000", "timestamp"),
        ("__DATE__ is Jan 31 2026", "__DATE__ is Feb  1 2026", "timestamp"),
        ("at 12:00:00", "at 12:00:07", "timestamp"),
        ("stamp 20260131", "stamp 20260201", "timestamp"),
        ("epoch=1700000000", "epoch=1700000999", "timestamp"),
        ("ms 1700000000123", "ms 1700000999456", "timestamp"),
        ("finished in 1.532 s", "finished in 1.610 s", "timestamp"),
        ("from /build/src/main.c:3", "from /srv/other/src/main.c:3", "path"),
        ("cwd /build", "cwd /work", "path"),
        ("id 0f8fad5b-d9cb-469f-a165-70867728950e", "id 7c9e6679-7425-40de-944b-e07fc1f90ae7", "random"),
        ("tmp /tmp/cc8Q2kXa.o", "tmp /tmp/ccPz81bb.o", "random"),
        ("nonce deadbeef01234567", "nonce 0123456789abcdef", "random"),
        ("pid 4711", "pid 4712", "process-id"),
        ("make -j4", "make -j5", "parallelism"),
        ("jobs: 4", "jobs: 5", "parallelism"),
        ("error: ‘x’ is unused", "error: 'x' is unused", "locale"),
        ("colour red", "colour blue", "unknown"),
        ("version 1.2", "version 1.3", "unknown"),
        (
            "-rw-r--r--   0 root  (0) root  (0)  4 2023-11-14 22:13:20.000000 f",
            "-rw-rw-r--   0 root  (0) root  (0)  4 2023-11-14 22:13:20.000000 f",
            "umask",
        ),
        (
            "-rw-r--r--   1  1000  1000  4 2023-11-14 22:13:20.000000 f",
            "-rw-r--r--   1  1001  1001  4 2023-11-14 22:13:20.000000 f",
            "user",
        ),
    ],
)
def test_a_line_tells_its_cause(old: str, new: str, cause: str) -> None:
    assert of_lines(old, new) == [cause]


def test_an_equal_date_beside_something_else_is_no_cause() -> None:
    assert of_lines("2026-01-31 by alpha", "2026-01-31 by bravo") == ["unknown"]


def test_the_unknown_is_shown() -> None:
    [guess] = of_bytes(b"CONFIG_HZ=100\n", b"CONFIG_HZ=250\n")
    assert guess == Guess("unknown", "CONFIG_HZ in out: 'CONFIG_HZ=100' → 'CONFIG_HZ=250'", FIXES["unknown"])


def test_order() -> None:
    assert [each.cause for each in of_bytes(b"b\na\nc\n", b"c\na\nb\n")] == ["order"]
    first, second = newc(Newc("a"), Newc("b"), Newc("c")), newc(Newc("b"), Newc("c"), Newc("a"))
    assert [each.cause for each in of_bytes(first, second)] == ["order"]


def test_order_that_a_locale_makes() -> None:
    lines = ["Apple", "banana", "Cherry"]
    first = "".join(f"{each}\n" for each in sorted(lines))
    second = "".join(f"{each}\n" for each in sorted(lines, key=str.lower))
    causes = [each.cause for each in of_bytes(first.encode(), second.encode(), {"locale": ("C", "de_DE.UTF-8")})]
    assert causes[0] == "locale"


def test_archive_fields() -> None:
    first, second = newc(Newc("f", ino=1)), newc(Newc("f", ino=2))
    assert [each.cause for each in of_bytes(first, second)] == ["inode"]
    for fields, others, cause in (
        ({"mtime": 1700000000}, {"mtime": 1700000009}, "timestamp"),
        ({"uid": 1000}, {"uid": 1001}, "user"),
        ({"gname": "ann"}, {"gname": "bob"}, "user"),
        ({"mode": 0o644}, {"mode": 0o600}, "umask"),
    ):
        assert [each.cause for each in of_bytes(tar({"f": b""}, **fields), tar({"f": b""}, **others))] == [cause]


def test_compression() -> None:
    data = b"".join(b"%d\n" % (number * number % 977) for number in range(5000))
    assert [each.cause for each in of_bytes(zstandard.compress(data, 1), zstandard.compress(data, 19))] == [
        "compression"
    ]
    first, second = gzip.compress(data, mtime=1700000000), gzip.compress(data, mtime=1700000001)
    assert [each.cause for each in of_bytes(first, second)] == ["timestamp"]


def test_a_build_id_follows_from_something_else() -> None:
    ids = [b"\4\0\0\0\x14\0\0\0\3\0\0\0GNU\0" + bytes([each]) * 20 for each in (1, 2)]
    first = elf([(".note.gnu.build-id", ids[0]), (".rodata", b"/build/a/main.c\0")])
    second = elf([(".note.gnu.build-id", ids[1]), (".rodata", b"/other/b/main.c")])
    assert [each.cause for each in of_bytes(first, second)] == ["path", "build-id"]
    alone = elf([(".note.gnu.build-id", ids[1]), (".rodata", b"/build/a/main.c\0")])
    assert [each.cause for each in of_bytes(first, alone)] == ["build-id"]


def test_a_path_that_begins_in_an_equal_row_of_a_hexdump() -> None:
    first, second = (
        elf([(".rodata", b"\0" * 9 + b"/build/" + tail + b"\0" * 9)]) for tail in (b"src/alpha.c", b"src/bravo.c")
    )
    [guess] = of_bytes(first, second)
    assert (guess.cause, guess.evidence) == (
        "path",
        ".rodata in out: '/build/src/alpha.c' → '/build/src/bravo.c'",
    )


def test_seconds_in_binary() -> None:
    for order in ("little", "big"):
        first, second = (b"\0\1\2\3" + moment.to_bytes(4, order) + b"\xff\0" * 8 for moment in (1700000000, 1700000999))
        [guess] = of_bytes(first, second)
        assert (guess.cause, guess.evidence) == ("timestamp", "out: seconds since 1970, '1700000000' → '1700000999'")
    # One changed byte of code is no time.
    assert [each.cause for each in of_bytes(b"\0\1\2\3\5\0\0\0", b"\0\1\2\3\6\0\0\0")] == ["unknown"]


def test_bytes_without_anything_in_common() -> None:
    first = bytes(each * 37 % 251 for each in range(128))
    second = bytes((each * 91 + 13) % 251 for each in range(128))
    assert [each.cause for each in of_bytes(first + b"\0", second + b"\0")] == ["random"]


def test_tables_of_addresses_tell_nothing() -> None:
    diff = "-Entry point address: 0x00000000005995cc\n+Entry point address: 0x00000000004b945c"
    for member, kind in ((("sections",), "metadata"), ((".text",), "ELF section")):
        assert [each.cause for each in guesses([("out", ContentPlace(member, kind, None, None, diff))])] == ["unknown"]


def test_a_hash_comes_last_since_it_follows() -> None:
    found = of_bytes(b"layer %s\nat 12:00:00\n" % (b"0a" * 32), b"layer %s\nat 12:00:09\n" % (b"1b" * 32))
    assert [each.cause for each in found] == ["timestamp", "random"]
    assert found[1].evidence.endswith("which may be hashes of something else that differs")


# --- what the audit knows


def test_a_value_that_was_varied_is_named_with_certainty() -> None:
    context = {"host-name": ("localhost in (none)", "vz-audit-7 in example.test"), "umask": ("0022", "0077")}
    [guess] = of_bytes(b"made on localhost\n", b"made on vz-audit-7\n", context)
    assert guess.cause == "host"
    assert guess.evidence == "out: 'vz-audit-7', which the audit's axis host-name put there"
    # Short values only where one stands for the other.
    assert of_lines("cores 2", "cores 3", {"cores": ("VZ_CORES=2", "VZ_CORES=3"), "umask": ("0022", "0077")}) == [
        "parallelism"
    ]
    assert of_lines("owner 1000", "owner 4242", {"user": ("1000:1000", "4242:4243"), "umask": ("1", "2")}) == ["user"]


def test_a_varied_value_in_binary() -> None:
    first, second = (elf([(".rodata", b"by " + each)]) for each in (b"localhost.\0", b"vz-audit-7\0"))
    context = {"host-name": ("localhost", "vz-audit-7"), "locale": ("C", "de_DE")}
    assert [each.cause for each in of_bytes(first, second, context)] == ["host"]


def test_one_axis_alone_is_the_cause_whatever_it_looks_like() -> None:
    causes = [each.cause for each in of_bytes(b"b\na\nc\n", b"c\na\nb\n", {"cores": ("4", "5")})]
    assert causes == ["parallelism", "order"]
    [guess] = of_bytes(b"colour red\n", b"colour blue\n", {"umask": ("0022", "0077")})
    assert (guess.cause, guess.evidence) == (
        "umask",
        "nothing but umask was varied; out: 'colour red' → 'colour blue'",
    )


@pytest.mark.parametrize("axis", ["file-system", "input-topology", "inodes"])
def test_of_what_an_axis_brings_about_the_bytes_tell_which(axis: str) -> None:
    def causes(one: bytes, other: bytes) -> list[str]:
        return [each.cause for each in of_bytes(one, other, {axis: ("1", "2")})]

    assert causes(b"b\na\nc\n", b"c\na\nb\n") == ["order"]
    assert causes(newc(Newc("f", ino=1)), newc(Newc("f", ino=2))) == ["inode"]
    assert causes(b"colour red\n", b"colour blue\n") == ["inode"]


def test_the_surest_comes_first_and_each_once() -> None:
    found = [
        ("a", ContentPlace((), "text line", None, None, "-x deadbeef01234567\n+x 0123456789abcdef")),
        ("b", ContentPlace((), "text line", None, None, "-at 1700000000\n+at 1700000001")),
        ("c", ContentPlace((), "text line", None, None, "-at 2026-01-01\n+at 2026-01-02")),
    ]
    result = guesses(found)
    assert [each.cause for each in result] == ["timestamp", "random"]
    assert result[0].evidence == "c: '2026-01-01' → '2026-01-02'; and in 1 place more"
    assert guesses([]) == ()


def test_hostile_text_takes_no_time() -> None:
    lines = "\n".join(["-" + "/a" * 3000, "+" + "/b" * 3000, "-" + "2026-" * 900, "+" + "1234567890" * 400] * 50)
    assert guesses([("x", ContentPlace((), "text line", None, None, lines))])
