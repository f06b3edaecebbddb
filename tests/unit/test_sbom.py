"""Both formats: valid by their own validators, the same bytes everywhere, true to the graph.

The whole container-bundle goes through CycloneDX's validator in tests/e2e/test_sbom.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from packageurl import PackageURL

from tests import boms
from vzrepro.base.model import NarHash
from vzrepro.proof.sbom import facts
from vzrepro.proof.sbom.compare import compare, parse
from vzrepro.proof.sbom.components import Bill, BuildOutput, File, describe
from vzrepro.proof.sbom.facts import Fact, Facts
from vzrepro.proof.sbom.formats import FORMATS, render
from vzrepro.recipe import lock as locks
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.lock import Lock

PROJECT = Path(__file__).resolve().parents[2]
PLATFORM = "linux/amd64"
TARGETS = ("container-bundle", "bundles", "virtiofsd", "initramfs", "image-c", "crates-youki", "source-linux", "debs-c")


@pytest.fixture(scope="module")
def lock() -> Lock:
    return locks.load(PROJECT / "lock.toml")


@pytest.fixture(scope="module")
def graph(lock: Lock) -> DrvGraph:
    return evaluate(PROJECT, lock, PLATFORM)


@pytest.fixture(scope="module")
def known() -> Facts:
    return facts.load(PROJECT / facts.FILE)


@pytest.fixture(scope="module")
def bundle(graph: DrvGraph, lock: Lock, known: Facts) -> Bill:
    return describe(graph, lock, graph.find("container-bundle"), known)


def validate(form: str, text: str, place: Path) -> None:
    """By the format's own validator."""
    if form == "cyclonedx":
        boms.assert_valid_cyclonedx(text)
    else:
        file = place / "x.spdx.json"
        file.write_text(text)
        boms.assert_valid_spdx(file)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("target", ["all", "image-c", "crates-app", "source-low", "debs-c"])
def test_valid(target: str, form: str, tmp_path: Path) -> None:
    shop = boms.shop(tmp_path / "shop")
    learned = {sha256: Fact("x", "MIT OR LicenseRef-Debian-x") for sha256 in sorted(shop.content)[::2]}
    learned |= {sha256: Fact("x", note="silent") for sha256 in sorted(shop.content)[1::4]}
    bill = describe(shop.graph, shop.lock, shop.graph.find(target), learned)
    validate(form, render(FORMATS[form](bill)), tmp_path)
    output = BuildOutput(NarHash.of(b"nar"), 3, (File.of("vmlinux", b"kernel"), File.of("sub/ein é", b"")))
    text = render(FORMATS[form](describe(shop.graph, shop.lock, shop.graph.find(target), {}, output)))
    validate(form, text, tmp_path)
    assert NarHash.of(b"nar").hex in text
    assert output.files[0].sha256 in text


def test_all_that_we_ship_is_valid_spdx(graph: DrvGraph, lock: Lock, known: Facts, tmp_path: Path) -> None:
    validate("spdx", render(FORMATS["spdx"](describe(graph, lock, graph.find("bundles"), known))), tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_workspace_gives_the_same_bytes_wherever_it_lies(form: str, tmp_path: Path) -> None:
    def written(root: Path) -> str:
        lock = locks.load(root / "lock.toml")
        graph = evaluate(root, lock, PLATFORM)
        return render(FORMATS[form](describe(graph, lock, graph.find("bundles"), facts.load(root / facts.FILE))))

    here, elsewhere = tmp_path / "here", tmp_path / "another" / "place"
    shutil.copytree(PROJECT / "recipes", here / "recipes", ignore=shutil.ignore_patterns("target", "__pycache__"))
    for name in ("lock.toml", facts.FILE):
        shutil.copy(PROJECT / name, here)
    shutil.copytree(here, elsewhere)
    first = written(here)
    assert written(elsewhere) == written(here) == first
    assert str(tmp_path) not in first


def test_every_pinned_file_has_been_read(graph: DrvGraph, known: Facts) -> None:
    """Fails when the lock has moved on: run `vzrepro sbom --learn` and commit sbom.toml."""
    files = {pin.sha256: pin.url for node in graph.nodes.values() for pin in node.files.values()}
    assert sorted(url for sha256, url in files.items() if sha256 not in known) == []


def test_nothing_of_the_graph_is_left_out(graph: DrvGraph, bundle: Bill) -> None:
    closure = graph.closure([graph.find("container-bundle")])
    files = {pin.sha256 for node in closure for pin in node.files.values()}
    assert {each.pin.sha256 for each in bundle.components if each.pin} == files
    hashes = {node.drv_hash.hex for node in closure if node.drv.builder != "fetch" or "" in node.files}
    assert {each.drv_hash for each in bundle.components if each.drv_hash} == hashes
    refs = {each.ref for each in bundle.components}
    assert len(refs) == len(bundle.components)
    assert {ref for used in bundle.uses.values() for ref, _ in used} | {bundle.root} == refs


def test_purls_are_canonical(bundle: Bill) -> None:
    purls = [each.purl for each in bundle.components if each.purl]
    assert [PackageURL.from_string(purl).to_string() for purl in purls] == purls
    assert {purl.partition("/")[0] for purl in purls} == {"pkg:deb", "pkg:cargo", "pkg:generic"}


def test_what_is_in_the_bundle(bundle: Bill) -> None:
    contained = {each.name: each for each in bundle.components if each.contained}
    assert contained["linux"].license == contained["kernel-container"].license == "GPL-2.0-only WITH Linux-syscall-note"
    assert contained["busybox"].license == "GPL-2.0-only"
    assert contained["libseccomp-dev"].license == "LGPL-2.1-only"
    assert {"libc6-dev-arm64-cross", "libstd-rust-web-dev", "youki", "guest-agent", "tokio", "nix"} <= contained.keys()
    outside = {each.name for each in bundle.components if not each.contained}
    assert {"gcc-14", "qemu-system-arm", "virtiofsd", "syn", "kernel-hardening-checker", "prost-build"} <= outside
    assert all(each.license for each in contained.values() if each.kind == "crate" and each.name != "rust-criu")


def test_scanners_see_what_is_shipped_and_the_rest_is_told_apart(bundle: Bill) -> None:
    document = FORMATS["cyclonedx"](bundle)
    inside = {each["name"] for each in document["components"]}
    built_with = {each["name"] for each in document["formulation"][0]["components"]}
    assert "libc6-dev-arm64-cross" in inside
    assert "gcc-14-aarch64-linux-gnu" in built_with
    assert inside.isdisjoint({"gcc-14", "qemu-system-arm"})
    workflow = next(each for each in document["formulation"][0]["workflows"] if each["name"] == "busybox")
    assert workflow["steps"] == [{"commands": [{"executed": "sh /in/src/build.sh"}]}]
    assert document["metadata"]["timestamp"] == "2026-01-01T00:00:00Z"
    names = {each["name"]: each["value"] for each in document["metadata"]["properties"]}
    assert int(names["vzrepro:seed:packages"]) == bundle.seed.packages


def test_spdx_relations(bundle: Bill) -> None:
    document = FORMATS["spdx"](bundle)
    ids = {each["SPDXID"]: each["name"] for each in document["packages"]}
    found = {
        (ids.get(each["spdxElementId"]), each["relationshipType"], ids.get(each["relatedSpdxElement"]))
        for each in document["relationships"]
    }
    assert {
        (None, "DESCRIBES", "container-bundle"),
        ("container-bundle", "CONTAINS", "kernel-container"),
        ("kernel-container", "GENERATED_FROM", "linux"),
        ("busybox", "STATIC_LINK", "libc6-dev-arm64-cross"),
        ("youki", "STATIC_LINK", "nix"),
        ("image-c", "BUILD_TOOL_OF", "kernel-container"),
        ("container-probes", "BUILD_TOOL_OF", "container-bundle"),
        ("image-c", "CONTAINS", "gcc-14"),
    } <= found
    assert f"{bundle.seed.packages} Debian packages, {bundle.seed.bytes} bytes" in document["comment"]


@pytest.mark.parametrize("target", TARGETS)
def test_both_formats_say_the_same(graph: DrvGraph, lock: Lock, known: Facts, target: str) -> None:
    output = BuildOutput(NarHash.of(b"nar"), 3, (File.of("a/b", b"c"),))
    bill = describe(graph, lock, graph.find(target), known, output)
    one, other = (parse(render(FORMATS[form](bill)).encode(), form) for form in FORMATS)
    assert compare(one, other) == ()


@pytest.mark.parametrize(("form", "key"), [("cyclonedx", "serialNumber"), ("spdx", "documentNamespace")])
def test_another_content_is_another_document(
    graph: DrvGraph, lock: Lock, known: Facts, bundle: Bill, form: str, key: str
) -> None:
    bills = [
        bundle,
        *(
            describe(graph, lock, graph.find(target), facts)
            for target, facts in (("container-bundle", {}), ("initramfs", known), ("initramfs", {}))
        ),
    ]
    documents: list[dict[str, Any]] = [FORMATS[form](bill) for bill in bills]
    assert len({document[key] for document in documents}) == len(documents)
    assert json.loads(render(documents[0])) == documents[0]
