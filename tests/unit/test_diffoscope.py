"""What diffoscope writes, read as a stranger's: its tree of findings becomes places, and anything else nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vzrepro.audit.diffoscope import parse
from vzrepro.audit.inside import Place


def node(source: str, diff: str | None = None, *details: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"source1": source, "source2": source, "unified_diff": diff, "details": list(details), **more}


def test_levels_become_members() -> None:
    hexdump = "readelf --wide --decompress --hex-dump=.rodata {}"
    disassembly = "objdump --line-numbers --disassemble --demangle --reloc --no-show-raw-insn --section=.text {}"
    document = node(
        "/in/a/0/initramfs.img.gz",
        None,
        node("filetype from file(1)", "-gzip, Tue\n+gzip, Wed\n"),
        node(
            "initramfs.img",
            None,
            node("file list", "-a\n+b\n"),
            node("./etc/passwd", "@@ -1 +1 @@\n-x\n+y\n"),
            node(
                "./bin/sh",
                None,
                node("readelf --wide --notes {}", "-1\n+2\n"),
                node(hexdump, "-0\n+1\n"),
                node(disassembly, "-mov\n+ret\n"),
                node("strings --all --bytes=8 {}", "-s\n+t\n"),
            ),
            node("./blob", "-00\n+01\n", has_internal_linenos=True),
        ),
    )
    found = parse(json.dumps({"diffoscope-json-version": 1, **document}).encode())
    assert [(each.member, each.kind) for each in found] == [
        ((), "metadata"),
        ((), "listing"),
        (("./etc/passwd",), "text line"),
        (("./bin/sh", "notes"), "metadata"),
        (("./bin/sh", ".rodata"), "ELF section"),
        (("./bin/sh", ".text"), "ELF section"),
        (("./bin/sh", "strings"), "metadata"),
        (("./blob",), "bytes"),
    ]
    assert found[2] == Place(("./etc/passwd",), "text line", None, None, "@@ -1 +1 @@\n-x\n+y")


def test_names_that_are_no_text_become_text() -> None:
    [place] = parse(json.dumps(node("/in/a/0/x", None, node("na\udcffme", "-\udcfe\n+x\n"))).encode())
    assert (place.member, place.diff) == (("na\\xffme",), "-\\xfe\n+x")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b'{"unified_diff": null}',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"details": 7}',
    ],
)
def test_anything_else_is_nothing(data: bytes) -> None:
    assert parse(data) == ()


def test_there_is_a_limit_of_places() -> None:
    document = node("x", None, *(node(f"m{number}", "-a\n+b\n") for number in range(1000)))
    assert len(parse(json.dumps(document).encode())) == 200
