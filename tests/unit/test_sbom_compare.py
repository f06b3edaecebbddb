"""What `vzrepro sbom --diff` finds, in our documents and in others'."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import boms
from vzrepro.base.errors import UsageError
from vzrepro.proof.sbom.compare import Item, compare, parse
from vzrepro.proof.sbom.components import describe
from vzrepro.proof.sbom.formats import FORMATS, render

A = Item("pkg:cargo/a", "1", "sha256:aa", "MIT", "contained")


def changes(before: list[Item], after: list[Item]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(each.verb, each.key, dict(each.differences)) for each in compare(before, after)]


def test_equal_in_any_order() -> None:
    b = replace(A, key="pkg:cargo/b")
    assert compare([A, b], [b, A]) == ()


@pytest.mark.parametrize(
    ("field", "value"), [("version", "2"), ("hash", "sha256:bb"), ("license", None), ("used", "built with")]
)
def test_each_field_counts(field: str, value: Any) -> None:
    other = replace(A, **{field: value})
    assert changes([A], [other]) == [("changed", A.key, {field: (getattr(A, field), value)})]


def test_added_and_removed() -> None:
    b = replace(A, key="pkg:cargo/b")
    assert [each[:2] for each in changes([A], [b])] == [("removed", A.key), ("added", b.key)]


def test_several_versions_are_told_apart() -> None:
    second = replace(A, version="2", hash="sha256:bb")
    third = replace(A, version="3", hash="sha256:cc")
    assert compare([A, second], [second, A]) == ()
    assert changes([A, second], [A, third]) == [
        ("changed", A.key, {"version": ("2", "3"), "hash": ("sha256:bb", "sha256:cc")})
    ]
    assert [each[:2] for each in changes([A, second], [third])] == [("removed", A.key)] * 2 + [("added", A.key)]
    relicensed = replace(second, license="ISC")
    assert changes([A, second], [relicensed, A]) == [("changed", A.key, {"license": ("MIT", "ISC")})]


def test_what_has_neither_hash_nor_version_is_not_alike_for_that() -> None:
    bare = Item("notes", None, None, None, "contained")
    assert [each[0] for each in changes([bare, replace(bare, license="MIT")], [replace(bare, license="ISC")])] == [
        "removed",
        "removed",
        "added",
    ]


@pytest.mark.parametrize("form", FORMATS)
def test_a_changed_workspace(tmp_path: Path, form: str) -> None:
    def items(shop: boms.Shop) -> list[Item]:
        graph = shop.graph
        document = FORMATS[form](describe(graph, shop.lock, graph.find("low"), {}))
        return parse(render(document).encode(), "x")

    before = items(boms.shop(tmp_path / "one"))
    other = boms.shop(tmp_path / "other", changed={"debian/pool/main/x/prose_1_all.deb": b"!<arch>\nelse"})
    (other.root / "recipes/small/build.sh").write_text("make all\n")
    found = changes(before, items(other))
    assert [each[:2] for each in found] == [
        ("changed", "files-small"),
        ("changed", "files-small/build.sh"),
        ("changed", "image-c"),
        ("changed", "low"),
        ("changed", "pkg:deb/debian/prose?arch=all"),
    ]
    assert {name for each in found for name in each[2]} == {"hash"}


def test_an_update_is_one_change(tmp_path: Path) -> None:
    purl = "pkg:deb/debian/bash@{}?arch=amd64&distro={}"
    one, other = (
        parse(
            json.dumps(
                {
                    "bomFormat": "CycloneDX",
                    "components": [
                        {"type": "library", "name": "bash", "version": version, "purl": purl.format(version, suite)}
                    ],
                }
            ).encode(),
            "x",
        )
        for version, suite in (("5.2-1", "trixie"), ("5.3-1", "forky"))
    )
    assert changes(one, other) == [("changed", "pkg:deb/debian/bash?arch=amd64", {"version": ("5.2-1", "5.3-1")})]


def test_documents_of_others() -> None:
    cyclonedx = {
        "bomFormat": "CycloneDX",
        "metadata": {"component": {"name": "app", "type": "application"}},
        "components": [
            {"group": "@scope", "name": "x", "type": "library", "scope": "excluded"},
            {
                "name": "y",
                "type": "library",
                "hashes": [{"alg": "MD5", "content": "1"}, {"alg": "SHA-1", "content": "2"}],
                "licenses": [{"license": {"id": "MIT"}}, {"license": {"name": "Odd"}}],
                "components": [{"name": "z", "type": "file"}],
            },
        ],
    }
    assert parse(json.dumps(cyclonedx).encode(), "x") == [
        Item("app", None, None, None, "contained"),
        Item("@scope/x", None, None, None, "built with"),
        Item("y", None, "md5:1", "MIT AND Odd", "contained"),
        Item("y/z", None, None, None, "contained"),
    ]
    spdx = {
        "spdxVersion": "SPDX-2.2",
        "documentDescribes": ["SPDXRef-a"],
        "packages": [
            {"SPDXID": "SPDXRef-a", "name": "a", "licenseConcluded": "MIT", "licenseDeclared": "NOASSERTION"},
            {"SPDXID": "SPDXRef-b", "name": "b", "versionInfo": "1"},
            {"SPDXID": "SPDXRef-c", "name": "c", "checksums": [{"algorithm": "SHA1", "checksumValue": "12"}]},
        ],
        "files": [{"SPDXID": "SPDXRef-f", "fileName": "./f", "licenseConcluded": "NONE"}],
        "relationships": [
            {"spdxElementId": "SPDXRef-b", "relationshipType": "DEPENDENCY_OF", "relatedSpdxElement": "SPDXRef-a"},
            {"spdxElementId": "SPDXRef-c", "relationshipType": "TEST_TOOL_OF", "relatedSpdxElement": "SPDXRef-a"},
        ],
    }
    assert parse(json.dumps(spdx).encode(), "x") == [
        Item("a", None, None, "MIT", "contained"),
        Item("b", "1", None, None, "contained"),
        Item("c", None, "sha1:12", None, "built with"),
        Item("f", None, None, None, "contained"),
    ]
    spdx["relationships"] = []
    assert {item.used for item in parse(json.dumps(spdx).encode(), "x")} == {"contained"}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "x is not JSON"),
        (b"\xff", "x is not JSON"),
        (b"[" * 100_000, "x is not JSON"),
        (b"{}", "x is neither CycloneDX nor SPDX 2"),
        (b"[]", "x is neither"),
        (b'{"spdxVersion": "SPDX-3.0"}', "x is neither"),
        (b'{"bomFormat": "CycloneDX", "components": [{}]}', "x is not a bill of materials that can be read"),
        (b'{"bomFormat": "CycloneDX", "components": 1}', "x is not a bill of materials"),
        (b'{"bomFormat": "CycloneDX", "components": ["a"]}', "x is not a bill of materials"),
        (b'{"spdxVersion": "SPDX-2.3", "packages": [{"name": 1}]}', "x is not a bill of materials"),
        (b'{"spdxVersion": "SPDX-2.3", "packages": [{"SPDXID": "a", "name": 1}]}', "x is not a bill of materials"),
        (b'{"bomFormat": "CycloneDX", "components": [{"name": "a", "version": 1}]}', "x is not a bill of materials"),
        (
            b'{"bomFormat": "CycloneDX", "components": [{"name": "a", "version": ["1"]}]}',
            "x is not a bill of materials",
        ),
    ],
)
def test_what_is_no_bill(data: bytes, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        parse(data, "x")


ANY = st.recursive(
    st.sampled_from([None, True, -1, 1e400, "", "a", "\ud800", "pkg:deb/debian/a@1?arch=x", "SHA-256", "0" * 64]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["name", "version", "hashes", "licenses", "license", "alg", "checksums", "referenceType"]),
            inner,
        )
    ),
    max_leaves=5,
)


@settings(max_examples=100)
@given(
    st.sampled_from([{"bomFormat": "CycloneDX"}, {"spdxVersion": "SPDX-2.3"}]),
    st.dictionaries(
        st.sampled_from(["metadata", "components", "dependencies", "packages", "relationships", "files"]),
        ANY,
        max_size=3,
    ),
)
def test_any_document_is_read_or_an_error(kind: dict[str, str], parts: dict[str, Any]) -> None:
    with contextlib.suppress(UsageError):
        assert all(isinstance(each, Item) for each in parse(json.dumps(kind | parts).encode(), "x"))
