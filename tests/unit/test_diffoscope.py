"""What diffoscope writes, read as a stranger's: its tree of findings becomes places, and anything else nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import Interrupted
from vzrepro.proof.audit import diffoscope
from vzrepro.proof.audit.diffoscope import parse
from vzrepro.proof.audit.inside import ContentPlace
from vzrepro.realize.realizer import Realizer
from vzrepro.sandbox import Job


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
    assert found[2] == ContentPlace(("./etc/passwd",), "text line", None, None, "@@ -1 +1 @@\n-x\n+y")


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


@settings(max_examples=100)
@given(
    st.recursive(
        st.sampled_from([None, True, 1, "", "a", "\ud800", "strings --all", "x{}"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.fixed_dictionaries({"source1": inner, "unified_diff": inner}, optional={"details": st.lists(inner)})
        ),
        max_leaves=8,
    )
)
def test_any_json_is_places_or_nothing(document: Any) -> None:
    assert all(isinstance(each, ContentPlace) for each in parse(json.dumps(document).encode()))


def test_there_is_a_limit_of_places() -> None:
    document = node("x", None, *(node(f"m{number}", "-a\n+b\n") for number in range(1000)))
    assert len(parse(json.dumps(document).encode())) == 200


def test_an_interrupt_is_no_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_job: Job, on_line: Callable[[str], None], stop: threading.Event) -> None:
        on_line("tool diffoscope 297")
        raise Interrupted("interrupted while the comparison was being built")

    discarded: list[Job] = []
    for name, instead in (("check", None), ("load_image", None), ("run", run), ("discard", discarded.append)):
        monkeypatch.setattr(diffoscope.sandbox, name, instead or (lambda *_: None))
    monkeypatch.setattr(diffoscope.image, "image_id", lambda _archive: "sha256:" + "ab" * 32)
    realizer = SimpleNamespace(
        graph=SimpleNamespace(find=lambda _name: SimpleNamespace(drv=SimpleNamespace(platform="linux/amd64"))),
        realize=lambda _nodes: [SimpleNamespace(path=None)],
        store=SimpleNamespace(location=lambda _path: tmp_path),
        config=SimpleNamespace(build_cores=lambda: 1, memory_bytes=lambda limit: limit, disk_bytes=lambda limit: limit),
        stop=threading.Event(),
    )
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    with pytest.raises(Interrupted):
        diffoscope.look(
            {"": (tmp_path / "a", tmp_path / "b")},
            realizer=cast(Realizer, realizer),
            scratch=tmp_path / "look",
            limits=diffoscope.LIMITS,
        )
    assert len(discarded) == 1
