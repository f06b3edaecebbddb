"""Everything that reads what others wrote, fed by hypothesis: sound documents with a few changes that hurt.

What is read is read, or refused with an error of ours, in little time and memory; nothing else may happen, and nothing
may be written anywhere else. A round is an input, and a fault is one that was refused. An input that does something
else is made as small as it gets, and printed. See `frame` for the options; `--rounds` are batches of 200 inputs.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st

from tests import debs
from tests.campaigns.frame import Line, Round, Wrong, main
from tests.labs import small_graph
from tests.unit import (
    test_archive,
    test_crates,
    test_debian,
    test_dsse,
    test_lock,
    test_metadata,
    test_nar,
    test_narinfo,
    test_policy,
    test_rootfs,
    test_s3_documents,
)
from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import Derivation
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.records import BuildRecord, read_difference, read_index
from vzrepro.cache.roots import CacheRoot
from vzrepro.cache.s3.bucket import parsed, tag
from vzrepro.cache.s3.upload import count, seconds
from vzrepro.guest import metadata
from vzrepro.guest.vm.layer import Unpacking
from vzrepro.guest.vm.rootfs import image_root
from vzrepro.net import AttemptFailed
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.policy import Policy
from vzrepro.proof.attest.statement import Statement
from vzrepro.recipe import lock, wire
from vzrepro.recipe.lock.writing import render
from vzrepro.sources import archive, crates, deb, debian

BATCH = 200
SLOW_SECS = 10.0
"""Of one input, on a busy machine; they have a few kilobytes."""
_MOST = 1 << 20  # bytes that an input may unpack to


@dataclass
class Parser:
    """`read` gets an input and an empty directory, in which it may write; `refuses` are its errors for bad input.
    `tars`: half of the inputs get right checksums in the headers of tar archives."""

    samples: tuple[bytes, ...]
    read: Callable[[bytes, Path], object]
    refuses: tuple[type[Exception], ...] = (VzreproError,)
    tars: bool = False


# --- what hurts -------------------------------------------------------------------------------------------------------

WORDS = [
    *(b"", b"\0", b"/", b"../", b"/etc/passwd", b"\n", b"\r\n", b"\n\n", b" ", b"\t", b"\xff\xfe", b"\xc3", b"\x1b[2J"),
    *(b"-1", b"0", b"1e400", b"NaN", b"Infinity", b"9" * 5000, b"18446744073709551616", b"0x7fffffffffffffff"),
    *(b'"', b"'", b'"""', b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"]", b"}", b"[]", b"{}", b"null", b"true"),
    *(b"\\ud800", b"\\u0000", b"=", b":", b",", b"#", b"%2e%2e%2f", b"<", b"&", b"]]>", "é".encode(), b"a" * 5000),
    *(number.to_bytes(8, "little") for number in (1 << 63, (1 << 64) - 1, 1 << 62, 1 << 32, 255)),
    *(b"0001-01-01T00:00:00Z", b"9999-12-31T23:59:59Z", b"sha256:", b"77777777777", b"\x80\0\0\0\0\0\0\1\0\0\0\0"),
]

_PLACES = st.integers(0, 1 << 16)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), _PLACES, st.binary(min_size=1, max_size=12) | st.sampled_from(WORDS)),
        st.tuples(st.just("insert"), _PLACES, st.binary(max_size=12) | st.sampled_from(WORDS)),
        st.tuples(st.just("cut"), _PLACES, st.integers(1, 600)),
        st.tuples(st.just("again"), _PLACES, st.integers(1, 600)),
        st.tuples(st.just("value"), _PLACES, st.sampled_from(WORDS)),
    ),
    max_size=3,
)
_VALUE = re.compile(rb'"[^"]*"|[A-Za-z0-9_.+-]+')


def edited(data: bytes, edits: list[tuple[str, int, bytes | int]]) -> bytes:
    """The data with the changes made one after the other; places beyond its end are taken from its beginning."""
    for kind, place, what in edits:
        at = place % (len(data) + 1)
        if isinstance(what, int):
            piece = data[at : at + what]
            data = data[:at] + (piece * 2 if kind == "again" else b"") + data[at + len(piece) :]
        elif kind == "value":
            values = list(_VALUE.finditer(data))
            if values:
                found = values[place % len(values)]
                data = data[: found.start()] + what + data[found.end() :]
        else:
            data = data[:at] + what + data[at + (len(what) if kind == "put" else 0) :]
    return data


def summed(data: bytes) -> bytes:
    """The data with right checksums in whatever looks like the header of a tar archive."""
    raw = bytearray(data)
    for found in re.finditer(b"ustar", data):
        start = found.start() - 257
        if start >= 0 and start + 512 <= len(raw):
            total = sum(raw[start : start + 148]) + sum(raw[start + 156 : start + 512]) + 8 * 0x20
            raw[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(raw)


# --- what is read -----------------------------------------------------------------------------------------------------


def _nar(data: bytes, place: Path) -> None:
    nar.unpack(io.BytesIO(data), place / "out", max_size=_MOST)


def _zstd(data: bytes, _place: Path) -> None:
    read = nar.decompress(io.BytesIO(data), max_size=_MOST)
    while read(1 << 16):
        pass


def _deb(data: bytes, _place: Path) -> None:
    with contextlib.suppress(VzreproError):
        deb.control_file(io.BytesIO(data), "a.deb", "postinst")
    for entry in deb.read_deb(io.BytesIO(data), "a.deb", max_bytes=_MOST):
        for _ in entry.body:
            pass


def _archive(data: bytes, place: Path) -> None:
    (place / "file").write_bytes(data)
    archive.unpack(place / "file", place / "out", "a.tar", max_bytes=_MOST)


def _layer(data: bytes, place: Path) -> None:
    (place / "out").mkdir()
    Unpacking(place / "out", "the image", max_bytes=_MOST).apply(io.BytesIO(data))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


_LAYER = test_rootfs.tar(test_rootfs.entry("a", b"content"))


def _blob(data: bytes) -> dict[str, object]:
    return {"digest": test_rootfs.sha256(data), "size": len(data)}


_CONFIG = test_rootfs.config([_LAYER], Entrypoint=["a"], Env=["A=b"], User="1:1", WorkingDir="/w", StopSignal="9")
_IMAGE = json.dumps({"schemaVersion": 2, "config": _blob(_CONFIG), "layers": [_blob(_LAYER)]}).encode()
_CHOICE = json.dumps({"manifests": [{**_blob(_IMAGE), "platform": {"os": "linux", "architecture": "arm64"}}]}).encode()


def _image(data: bytes, place: Path) -> None:
    """One of an image's documents, after the letter that says which it is."""
    layout = test_rootfs.Layout(place / "layout")
    kind, text = data[:1], data[1:]
    layout.blob(_LAYER)
    config = layout.blob(text if kind == b"c" else _CONFIG)
    sound = json.loads(_IMAGE) | {"config": config}
    manifest = layout.blob(text if kind == b"m" else json.dumps(sound).encode())
    choice = text if kind == b"i" else json.dumps({"manifests": [manifest]}).encode()
    (layout.path / "index.json").write_bytes(choice)
    layout.blob(_IMAGE)
    with image_root(layout.path, cache=place / "cache"):
        pass


_PACKAGES: test_crates.Packages = {
    "root 1.0.0": (
        '[features]\nf = ["dep:a", "b/x"]\n[dependencies]\na = { version = "1", optional = true }\nb = "1"',
        ["a", "b"],
    ),
    "a 1.0.0": ("", []),
    "b 1.0.0": ("[target.'cfg(unix)'.dependencies]\na = \"1\"\n[features]\nx = []", ["a"]),
}
_MANIFEST = test_crates.manifest("root 1.0.0", _PACKAGES["root 1.0.0"][0])


def _manifests(wave: object) -> dict[crates.Crate, str]:
    assert isinstance(wave, tuple | list | set | frozenset)
    return {each: test_crates.manifest(f"{each.name} {each.version}", "") for each in wave}


def _cargo_lock(data: bytes, _place: Path) -> None:
    crates.reached(_text(data), _MANIFEST, _manifests, features=["f"])


def _cargo_toml(data: bytes, _place: Path) -> None:
    crates.reached(test_crates.lock(_PACKAGES), _text(data), _manifests)


_INDEX = test_debian.trixie(test_debian.package("a"))
_STANZAS = "\n\n".join(
    "\n".join(f"{key}: {value}" for key, value in stanza.items())
    for stanza in (
        test_debian.package("a", Depends="b (>= 1.0) | c, d:any", Provides="e (= 1)", Multi_Arch="same"),
        *(test_debian.package(name, Provides="e", Priority="optional") for name in "bcd"),
    )
).encode()
_SOURCES = "\n".join(
    f"{key}: {value}" for key, value in test_debian.source("a", "1.0-1", "a_1.0.orig.tar.gz").items()
).encode()


def _deb822(data: bytes, _place: Path) -> None:
    text = debian._text("debian", data)
    _INDEX._texts = {"binary-amd64": (text,), "source": (text,)}
    _INDEX._candidates.clear()
    for ask in (lambda: _INDEX.resolve(["a", "e"]), lambda: _INDEX.sources("a", "1.0")):
        with contextlib.suppress(VzreproError):
            ask()
    _INDEX.resolve(["a"])


def _records(data: bytes, _place: Path) -> None:
    read_difference(data, test_narinfo.PATH, TrustedKeys())
    read_index(data)
    with contextlib.suppress(ValueError):
        CacheRoot.parse(data, "release")
    with contextlib.suppress(VzreproError, ValueError):
        Derivation.parse(data)
    BuildRecord.parse(data, "here")


def _statement(data: bytes, _place: Path) -> None:
    with contextlib.suppress(VzreproError):
        Statement.parse(data)
    dsse.parse(data)


def _listing(data: bytes, _place: Path) -> None:
    for each in parsed(data).iterfind("{*}Contents"):
        count(tag(each, "Size"))
        seconds(tag(each, "LastModified"))


def _crate(data: bytes, _place: Path) -> None:
    with contextlib.suppress(VzreproError):
        crates.index_entries(data, "a")
    crates.manifest_of(data)


_TAR = test_archive.tar(("d/", None), ("d/a.sh", b"text"), ("l", "d/a.sh"), ("é" * 120, b"long"))
_ITEMS = (debs.folder("usr"), debs.file("usr/a"), debs.symlink("usr/l", "a"), debs.hardlink("usr/h", "usr/a"))
_REALIZATION = {
    "build_key": "0" * 64,
    "drv_hash": test_narinfo.DRV.hex,
    "path": str(test_narinfo.PATH),
    "nar_hash": "0" * 64,
    "nar_size": 1,
}
_SIGNATURE = f"a:{base64.b64encode(bytes(64)).decode()}"
_RECORD = json.dumps({"realization": _REALIZATION, "signatures": [_SIGNATURE]}).encode()

_DEBS = tuple(debs.deb(*_ITEMS, pack=pack, postinst=b"#!/bin/sh\n") for pack in ("", "gz", "xz"))
_CRATES = (test_crates.crate_file({"a-1/Cargo.toml": b"t"}), b'{"vers":"1.0.0","cksum":"%064d"}' % 0)
_VERSION = json.dumps(test_metadata.DOCUMENT).encode()
_STATEMENTS = (test_dsse.envelope(), json.dumps(test_dsse.STATEMENT.document()).encode())
_FRAMES = (b"".join(nar.compress([test_nar.GOOD * 9])), test_rootfs.packed(b"x" * 999, "pzstd"))

PARSERS: dict[str, Parser] = {
    "NAR": Parser((test_nar.GOOD,), _nar),
    "zstd": Parser(_FRAMES, _zstd),
    "narinfo": Parser((test_narinfo.FULL.render(),), lambda data, _: NarInfo.parse(data)),
    ".deb": Parser(_DEBS, _deb, tars=True),
    "tar, zip": Parser((_TAR, test_archive.zipped(("a/b", b"text"), ("c", b"c"))), _archive, tars=True),
    "image layer": Parser((_TAR, _LAYER), _layer, (VzreproError, tarfile.TarError), tars=True),
    "image JSON": Parser((b"c" + _CONFIG, b"m" + _IMAGE, b"i" + _CHOICE), _image),
    "Cargo.lock": Parser((test_crates.lock(_PACKAGES).encode(),), _cargo_lock),
    "Cargo.toml": Parser((_MANIFEST.encode(),), _cargo_toml),
    "crate": Parser(_CRATES, _crate),
    "deb822": Parser((_STANZAS, _SOURCES), _deb822),
    "lock.toml": Parser((render(test_lock.FULL).encode(),), lambda data, _: lock.parse(_text(data))),
    "DSSE": Parser(_STATEMENTS, _statement),
    "policy": Parser((test_policy.text(),), lambda data, _: Policy.parse(data, "p")),
    "version.json": Parser((_VERSION,), lambda data, _: metadata.parse(data, "here")),
    "cache records": Parser((_RECORD, b'{"entries":["a"]}'), _records),
    "S3 listing": Parser((test_s3_documents.LISTING,), _listing, (ValueError, AttemptFailed)),
    "evaluation": Parser((wire.dump(small_graph(Path("/nonexistent"))),), wire.load),
}


# --- rounds -----------------------------------------------------------------------------------------------------------


def fed(parser: Parser, batch: int = BATCH) -> Line:
    """Batches of inputs for one parser."""

    def line(round: Round) -> None:
        told = round.place / "told"
        number = round.chance.randrange(1 << 60)
        round.calmly(lambda: _batch(parser, batch, number, told, round.place), "reading", timed=False)
        refused, longest = json.loads(told.read_text())
        round.tally.rounds += batch - 1
        round.tally.faults += refused
        round.tally.longest_secs = max(round.tally.longest_secs, longest)

    return line


def _batch(parser: Parser, batch: int, number: int, told: Path, place: Path) -> None:
    """Read the inputs that follow from a number; writes how many were refused, and the longest time of one."""
    refused, longest = 0, 0.0

    @settings(
        max_examples=batch,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @seed(number)
    @given(st.sampled_from(parser.samples), EDITS, st.booleans())
    def reads(sample: bytes, edits: list[tuple[str, int, bytes | int]], sums: bool) -> None:
        nonlocal refused, longest
        data = edited(sample, edits)
        note(f"the input: {base64.b64encode(data[:20_000]).decode()}")
        if parser.tars and sums:
            data = summed(data)
        folder = place / "inside" / "here"
        folder.mkdir(parents=True)
        begun = time.monotonic()
        try:
            parser.read(data, folder)
        except parser.refuses:
            refused += 1
        finally:
            took = time.monotonic() - begun
            inside = [path.name for path in folder.parent.iterdir()]
            disk.remove_tree(folder.parent)
        longest = max(longest, took)
        if took > SLOW_SECS:
            raise Wrong(f"it takes {took:.1f} s")
        if inside != ["here"]:
            raise Wrong("something was written elsewhere")

    reads()
    told.write_text(json.dumps([refused, longest]))


LINES: dict[str, Line] = {name: fed(parser) for name, parser in PARSERS.items()}

if __name__ == "__main__":
    main(LINES, 25)
