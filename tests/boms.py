"""A small workspace whose downloads are made here: two images' packages, crates, a source tree; and what is asserted of
every bill of materials, by the validators of the formats' own projects."""

from __future__ import annotations

import gzip
import io
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from tests import debs
from vzrepro import nar
from vzrepro.base.model import FileHash, ObjectInfo
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import CratePin, CrateSetPin, DebPin, ImagePin, Lock, PinnedFile, SourcePin
from vzrepro.store import LocalStore

PLATFORM = "linux/amd64"

RECIPES = """
from vzrepro import build, cargo_crates, debian_image, debian_source, local, text

C = debian_image("c", suite="trixie", packages=["gcc"])
LOW = build("low", version="1.0", image=C, command=["sh", "/in/src/build.sh"], build_only=["src"], linked=["libc-dev"],
            inputs={"low.tar.gz": debian_source("low", series="1", suite="trixie"), "src": local("build.sh")})
APP = build("app", image=C, command=["cargo", "build it"],
            inputs={"source": local("Cargo.toml", "main.rs"), "crates": cargo_crates("app", lock=".", targets=["x"])})
CHECK = build("check", image=C, command=["check"], inputs={"low": LOW})
build("all", image=C, command=["cat"], build_only=["check"],
      inputs={"low": LOW, "app": APP, "check": CHECK,
              "note": text("note", "a note")})
"""


def assert_valid_cyclonedx(text: str) -> None:
    # Loaded here, since that takes seconds, of each worker that only looks which tests there are.
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator
    from jsonschema import Draft7Validator
    from rfc3986_validator import validate_rfc3986
    from rfc3987_syntax import is_valid_syntax

    @Draft7Validator.FORMAT_CHECKER.checks("iri-reference", raises=ValueError)
    def _is_iri_reference(value: object) -> bool:
        """Every URI reference is an IRI reference. Only what is none is given to the parser that jsonschema would ask
        for all: it takes a tenth of a second for each, and a bundle has hundreds."""
        if not isinstance(value, str):
            return True
        return bool(validate_rfc3986(value, rule="URI_reference")) or is_valid_syntax("iri_reference", value)

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


def assert_valid_spdx(file: Path) -> None:
    from spdx_tools.spdx.parser.parse_anything import parse_file
    from spdx_tools.spdx.validation.document_validator import validate_full_spdx_document

    found = validate_full_spdx_document(parse_file(str(file)))
    assert [(each.validation_message, each.context.spdx_id) for each in found] == []


CARGO = """
[package]
name = "app"
version = "0.1.0"
license = "MIT/Apache-2.0"
[dependencies]
used = "1"
renamed = { package = "derive", version = "1" }
[build-dependencies]
builder = "1"
[target.'cfg(unix)'.dependencies]
unix = "1"
"""

CRATES = {
    "used-1.0.0": '[package]\nlicense = "MIT"\n[dependencies]\ndeep = "1"\n',
    "deep-1.2.0": '[package]\nlicense = "Apache-2.0 OR MIT"\n',
    "derive-1.0.1": '[package]\nlicense = "MIT"\n[lib]\nproc-macro = true\n[dependencies]\nsyn = "2"\n',
    "syn-2.0.0": '[package]\nlicense-file = "LICENSE"\n',
    "unix-1.0.0": '[package]\nlicense = "Custom"\n',
    "builder-1.0.0": '[package]\nlicense = "GPL-3.0"\n[dependencies]\ndeep = "1"\n',
}

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: x

Files: *
Copyright: 2020 Somebody
License: GPL-2+ or Artistic, and Expat

Files: debian/*
Copyright: 2021 Else
License: public-domain
 Whoever wants it.

License: GPL-2+
 The text.
"""


def _archive(top: str, **files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    return gzip.compress(buffer.getvalue(), mtime=0)


def _package(name: str, *items: debs.Item) -> bytes:
    return debs.deb(debs.file(f"usr/lib/{name}", b"code"), *items)


def _documents(name: str, text: str) -> debs.Item:
    return debs.file(f"usr/share/doc/{name}/copyright", text.encode())


def downloads() -> dict[str, bytes]:
    """URL without `mirror://` → content."""
    packages = {
        "gcc_14-1_amd64.deb": _package("gcc", debs.symlink("usr/share/doc/gcc", "gcc-base")),
        "gcc-base_14-1_amd64.deb": _package("gcc-base", _documents("gcc-base", COPYRIGHT)),
        "libc-dev_2%3a1.0+b1~1_amd64.deb": _package(
            "libc-dev", _documents("libc-dev", COPYRIGHT.replace(", and", " and"))
        ),
        "prose_1_all.deb": _package("prose", _documents("prose", "This is free software.\n")),
        "silent_1_all.deb": _package("silent"),
    }
    return {
        **{f"debian/pool/main/x/{name}": content for name, content in packages.items()},
        "debian/pool/main/l/low/low_1.0.orig.tar.gz": _archive(
            "low-1.0", README="hello", COPYING="Terms:\n\n\tSPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note\n"
        ),
        **{
            f"crates/{name}/{version}": _archive(f"{name}-{version}", **{"Cargo.toml": manifest})
            for (name, _, version), manifest in ((key.partition("-"), text) for key, text in CRATES.items())
        },
    }


@dataclass(frozen=True)
class Shop:
    """The workspace in `root`, its lock, and the content of everything that is pinned."""

    root: Path
    lock: Lock
    content: dict[FileHash, bytes] = field(default_factory=dict)

    @property
    def graph(self) -> DrvGraph:
        return evaluate(self.root, self.lock, PLATFORM)

    def put(self, store: LocalStore, node: Node) -> None:
        """Register a download as if it had been fetched."""
        with store.scratch("test") as scratch:
            source = scratch / "source"
            if "" in node.files:
                source.write_bytes(self.content[node.files[""].sha256])
            else:
                source.mkdir()
                for name, pin in node.files.items():
                    (source / name).write_bytes(self.content[pin.sha256])
            nar_hash, nar_size, _ = nar.canonical_copy(source, scratch / "out")
            store.add(scratch / "out", ObjectInfo(node.path, nar_hash, nar_size, drv_hash=node.drv_hash))

    def put_all(self, store: LocalStore) -> None:
        for node in self.graph.nodes.values():
            if node.drv.builder == "fetch":
                self.put(store, node)


def shop(root: Path, recipes: str = RECIPES, changed: dict[str, bytes] | None = None) -> Shop:
    """Make the workspace; `changed` are downloads with another content."""
    folder = root / "recipes" / "small"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(recipes)
    (folder / "build.sh").write_text("make\n")
    (folder / "main.rs").write_text("fn main() {}\n")
    (folder / "Cargo.toml").write_text(CARGO)
    (folder / "Cargo.lock").write_text("")
    content = downloads() | (changed or {})
    pins = {url: PinnedFile(f"mirror://{url}", FileHash.of(data), len(data)) for url, data in content.items()}
    requests = {want.kind: want.request for want in evaluate(root, Lock(), PLATFORM, lenient=True).wants}
    lock = Lock(
        sources={
            "low": SourcePin(requests["debian-source"], "1.0", pins["debian/pool/main/l/low/low_1.0.orig.tar.gz"])
        },
        images={
            ("c", PLATFORM): ImagePin(
                requests["image"],
                "20260101T000000Z",
                tuple(_deb(pin) for url, pin in sorted(pins.items()) if url.endswith(".deb")),
            )
        },
        crate_sets={
            "app": CrateSetPin(
                requests["crates"],
                tuple(CratePin(*url.split("/")[1:], pin) for url, pin in sorted(pins.items()) if "crates/" in url),
            )
        },
    )
    return Shop(root, lock, {pins[url].sha256: data for url, data in content.items()})


def _deb(pin: PinnedFile) -> DebPin:
    name, version, arch = pin.url.rpartition("/")[2].removesuffix(".deb").split("_")
    return DebPin(name, version.replace("%3a", ":"), arch, pin)
