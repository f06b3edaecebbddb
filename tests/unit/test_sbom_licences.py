"""What authors write about licences → SPDX expressions, or nothing."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from license_expression import get_spdx_licensing

from vzrepro.proof.sbom import licences
from vzrepro.proof.sbom.components import crate_fact
from vzrepro.proof.sbom.facts import Fact
from vzrepro.proof.sbom.licences import from_cargo, from_copyright, from_tag, refs

LICENSING = get_spdx_licensing()
FORMAT = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"


@pytest.mark.parametrize(
    ("written", "expression"),
    [
        ("MIT", "MIT"),
        ("mit", "MIT"),
        ("MIT/Apache-2.0", "MIT OR Apache-2.0"),
        ("Unlicense / MIT", "Unlicense OR MIT"),
        ("Apache-2.0 WITH LLVM-exception OR MIT", "Apache-2.0 WITH LLVM-exception OR MIT"),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", "(MIT OR Apache-2.0) AND Unicode-3.0"),
        ("GPL-2.0", "GPL-2.0-only"),
        ("GPL-3.0+", "GPL-3.0-or-later"),
        ("non-standard", None),
        ("MIT OR", None),
        ("MIT WITH", None),
        ("(MIT", None),
        ("MIT ) OR", None),
        ("LicenseRef-scancode-public-domain", None),
        ("", None),
    ],
)
def test_cargo(written: str, expression: str | None) -> None:
    assert from_cargo(written) == expression


def test_threads_that_ask_first_all_get_an_answer() -> None:
    """The library makes its automaton in the first parse, and another thread's first parse could find it half made."""
    names = ["GPL-2.0 WITH Linux-syscall-note", "MIT", "Apache-2.0 OR MIT", "Zlib"]
    start = threading.Barrier(len(names))

    def ask(name: str) -> str | None:
        start.wait()
        return from_cargo(name)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(3):
            licences._licensing.cache_clear()
            licences._valid.cache_clear()
            licences._licensing()
            with ThreadPoolExecutor(len(names)) as pool:
                assert list(pool.map(ask, names)) == [
                    "GPL-2.0-only WITH Linux-syscall-note",
                    "MIT",
                    "Apache-2.0 OR MIT",
                    "Zlib",
                ]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize(
    ("short", "expression"),
    [
        ("GPL-2+", "GPL-2.0-or-later"),
        ("GPL-2", "GPL-2.0-only"),
        ("LGPL-2.1+", "LGPL-2.1-or-later"),
        ("AGPL-3", "AGPL-3.0-only"),
        ("GFDL-NIV-1.3+", "GFDL-1.3-no-invariants-or-later"),
        ("Expat", "MIT"),
        ("BSD-3-clause", "BSD-3-Clause"),
        ("zlib", "Zlib"),
        ("Apache-2", "Apache-2.0"),
        ("GPL-2.0-only", "GPL-2.0-only"),
        ("GPL-9+", "LicenseRef-Debian-GPL-9-or-later"),
        ("public-domain", "LicenseRef-Debian-public-domain"),
        ("GPL", "GPL-1.0-or-later"),
        # Several SPDX identifiers could be meant.
        ("Artistic", "LicenseRef-Debian-Artistic"),
        ("GPL-2 with Linux-syscall-note exception", "GPL-2.0-only WITH Linux-syscall-note"),
        ("GPL-3+ with Autoconf exception", "GPL-3.0-or-later WITH Autoconf-exception-3.0"),
        ("Apache-2.0 with LLVM exception", "Apache-2.0 WITH LLVM-exception"),
        ("GPL-2+ with OpenSSL exception", "LicenseRef-Debian-GPL-2-or-later-with-OpenSSL-exception"),
        ("GPL-1+ or Artistic", "GPL-1.0-or-later OR LicenseRef-Debian-Artistic"),
        ("MIT OR Apache-2.0 OR MIT", "Apache-2.0 OR MIT"),
        ("GPL-2 or MIT and ISC", "GPL-2.0-only OR (ISC AND MIT)"),
        ("GPL-2 or MIT, and ISC", "(GPL-2.0-only OR MIT) AND ISC"),
        ("GPL-2, MIT and ISC", "GPL-2.0-only AND ISC AND MIT"),
        ("(MIT or Zlib) and ISC", "ISC AND (MIT OR Zlib)"),
        ("MIT/X11", "LicenseRef-Debian-MIT-X11"),
        ("(MIT or", "LicenseRef-Debian-MIT-or"),
        ("MIT) or ISC", "LicenseRef-Debian-MIT-or-ISC"),
        ("+++", "LicenseRef-Debian-or-later-or-later-or-later"),
        ("((", "LicenseRef-Debian-unnamed"),
        ("(" * 5000 + "MIT", "LicenseRef-Debian-MIT"),
    ],
)
def test_debian(short: str, expression: str) -> None:
    assert from_copyright(f"{FORMAT}\nFiles: *\nCopyright: x\nLicense: {short}\n") == expression


def test_a_copyright_file_is_all_its_files_licences() -> None:
    text = (
        f"{FORMAT}Upstream-Name: x\nLicense: Zlib\n\n"
        "Files: *\nCopyright: x\nLicense: GPL-2+ and ISC\n The text\n .\n License: not this one\n\n"
        "# a comment\nfiles: a\n b\nlicense: Expat\n\n  \n"
        "Files: c\nCopyright: x\nLicense:\n\n"
        "Files: d\nCopyright: x\nLicense: ISC\n\n"
        "License: GPL-2+\n text\n"
    )
    assert from_copyright(text) == from_copyright(text.replace("\n", "\r\n")) == "GPL-2.0-or-later AND ISC AND MIT"


def test_a_header_speaks_where_no_files_are_named() -> None:
    assert from_copyright(f"{FORMAT}License: Zlib\n") == "Zlib"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n\n",
        "This package was debianized by hand.\nLicense: GPL-2\n",
        FORMAT,
        f"{FORMAT}\nFiles: *\nLicense:\n x\n",
    ],
)
def test_prose_and_silence_are_no_licence(text: str) -> None:
    assert from_copyright(text) is None


def test_a_copyright_file_of_any_size_is_not_read() -> None:
    assert from_copyright(f"{FORMAT}License: MIT\n" + " x\n" * (2 << 20)) is None


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from(["MIT", "GPL-2+", "odd!", "and", "or", ",", "(", ")", "with", "exception"]), max_size=12)
)
def test_every_debian_expression_becomes_valid_spdx(words: list[str]) -> None:
    found = from_copyright(f"{FORMAT}\nFiles: *\nLicense: {' '.join(words)}\n")
    if found is not None:
        for name in sorted(refs(found), key=len, reverse=True):
            found = found.replace(name, "MIT")
        LICENSING.parse(found, validate=True)


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("x\n\tSPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note\nmore", "GPL-2.0-only WITH Linux-syscall-note"),
        ("SPDX-License-Identifier: nonsense", None),
        (
            "Version 2 is the only\nversion of this license which\n\n GNU GENERAL PUBLIC LICENSE\n  Version 2, June\n",
            "GPL-2.0-only",
        ),
        ("Version 3 is the only version of this license\n GNU GENERAL PUBLIC LICENSE\n Version 2, June 1991\n", None),
        ("GNU GENERAL PUBLIC LICENSE\nVersion 3, 29 June 2007\n", None),
    ],
)
def test_a_source_tree_speaks_for_itself(text: str, expression: str | None) -> None:
    assert from_tag(text) == expression


@pytest.mark.parametrize(
    "manifest", ["", "[package", "package = 1", "[package]\nname='x'\n[target]\nx = 1", "x = " + "9" * 5000]
)
def test_a_manifest_that_says_nothing(manifest: str) -> None:
    assert crate_fact("x.crate", manifest) == Fact("x.crate", note="its Cargo.toml cannot be read")
