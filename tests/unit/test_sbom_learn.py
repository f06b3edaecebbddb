"""What a bill of materials says of a small workspace: who is in the target, who only built it, under which licence."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests import boms, debs
from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.proof.sbom import facts
from vzrepro.proof.sbom.components import Bill, describe
from vzrepro.proof.sbom.facts import Fact, Facts
from vzrepro.proof.sbom.learn import _from_source, learn
from vzrepro.proof.sbom.output import read_output
from vzrepro.proof.sbom.seed import seed
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.lock import Lock
from vzrepro.store import LocalStore

GPL_AND_MIT = "(GPL-2.0-or-later OR LicenseRef-Debian-Artistic) AND LicenseRef-Debian-public-domain AND MIT"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "store") as store:
        yield store


@pytest.fixture
def shop(tmp_path: Path) -> boms.Shop:
    return boms.shop(tmp_path / "shop")


def read(shop: boms.Shop, store: LocalStore, known: Facts | None = None) -> tuple[Facts, int, tuple[str, ...]]:
    graph = shop.graph
    learned = learn(graph, list(graph.targets.values()), store, known or {}, progress=lambda done, total: None)
    return learned.facts, learned.read, learned.absent


def bill_of(shop: boms.Shop, target: str, known: Facts) -> Bill:
    graph = shop.graph
    return describe(graph, shop.lock, graph.find(target), known)


def names(bill: Bill, *, contained: bool) -> list[str]:
    return sorted(each.name for each in bill.components if each.contained is contained and each.kind != "image")


def roles(bill: Bill, user: str) -> dict[str, str]:
    by_ref = {each.ref: each for each in bill.components}
    ref = next(each.ref for each in bill.components if each.name == user)
    return {by_ref[used].name: role for used, role in bill.uses[ref]}


def test_licences_are_read_from_the_files_themselves(shop: boms.Shop, store: LocalStore) -> None:
    shop.put_all(store)
    found, count, absent = read(shop, store)
    assert (count, absent) == (12, ())
    by_name = {fact.file.partition("_")[0]: fact for fact in found.values()}
    assert by_name["gcc-base"].license == GPL_AND_MIT
    assert by_name["gcc"].license == GPL_AND_MIT
    assert by_name["libc-dev"].license == (
        "(GPL-2.0-or-later OR (LicenseRef-Debian-Artistic AND MIT)) AND LicenseRef-Debian-public-domain"
    )
    assert by_name["prose"].note == "usr/share/doc/prose/copyright names no licence that a machine can read"
    assert by_name["silent"].note == "it has no copyright file"
    assert by_name["low"].license == "GPL-2.0-only WITH Linux-syscall-note"
    assert by_name["used-1.0.0.crate"] == Fact("used-1.0.0.crate", "MIT", needs=("deep",))
    assert by_name["derive-1.0.1.crate"].macro
    assert by_name["builder-1.0.0.crate"].license == "GPL-3.0-only"
    assert by_name["syn-2.0.0.crate"].note == "Cargo.toml names no licence"
    assert by_name["unix-1.0.0.crate"].note == "Cargo.toml: license = 'Custom'"


def test_facts_survive_their_file(shop: boms.Shop, store: LocalStore, tmp_path: Path) -> None:
    shop.put_all(store)
    found, _, _ = read(shop, store)
    file = tmp_path / "sbom.toml"
    file.write_text(facts.render(found))
    assert facts.load(file) == found
    assert facts.render(dict(reversed(found.items()))) == facts.render(found)
    odd = {next(iter(found)): Fact('a "b" \\ \x7f é\n', note="\t")}
    file.write_text(facts.render(odd))
    assert facts.load(file) == odd


@pytest.mark.parametrize(
    "text",
    [
        "reader = ",
        "reader = " + "9" * 5000,
        "reader = " + "[" * 5000,
        "reader = 1\n[files]\n12 = {}",
        'reader = 1\n[files]\n"aa" = 1',
        "x = 1",
    ],
)
def test_a_damaged_facts_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sbom.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"sbom\.toml") as raised:
        facts.load(file)
    assert "vzrepro sbom --learn" in str(raised.value.hint)


def test_what_another_reader_found_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "sbom.toml"
    file.write_text(facts.render({}).replace(f"reader = {facts.READER}", "reader = 0"))
    assert facts.load(file) == facts.load(tmp_path / "none") == {}


def test_only_what_is_new_is_read_and_only_what_is_pinned_is_kept(
    shop: boms.Shop, store: LocalStore, tmp_path: Path
) -> None:
    shop.put_all(store)
    found, _, _ = read(shop, store)
    assert read(shop, store, found) == (found, 0, ())
    url = "debian/pool/main/x/prose_1_all.deb"
    newer = boms.shop(
        tmp_path / "newer", changed={url: debs.deb(debs.file("usr/share/doc/prose/copyright", b"Format:"))}
    )
    newer.put_all(store)
    after, count, _ = read(newer, store, found)
    assert count == 1
    assert len(after) == len(found)
    assert after.keys() - found.keys() == {
        next(sha256 for sha256, data in newer.content.items() if sha256 not in shop.content)
    }


def test_a_package_that_shares_documents_is_read_when_its_fellow_is_known(shop: boms.Shop, store: LocalStore) -> None:
    shop.put_all(store)
    found, _, _ = read(shop, store)
    less = {sha256: fact for sha256, fact in found.items() if not fact.file.startswith("gcc_")}
    assert read(shop, store, less) == (found, 1, ())


def test_absent_downloads_are_named_and_the_rest_is_read(shop: boms.Shop, store: LocalStore) -> None:
    shop.put(store, shop.graph.find("crates-app"))
    found, count, absent = read(shop, store)
    assert (count, absent) == (6, ("debs-c", "source-low"))
    assert {fact.file.endswith(".crate") for fact in found.values()} == {True}


def test_a_damaged_object_is_not_believed(shop: boms.Shop, store: LocalStore) -> None:
    shop.put_all(store)
    file = store.location(shop.graph.find("source-low").path)
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(HashMismatch, match=r"low_1\.0\.orig\.tar\.gz is not the file that is pinned"):
        read(shop, store)


def test_an_archive_that_is_none_is_said(tmp_path: Path, store: LocalStore) -> None:
    shop = boms.shop(tmp_path / "shop", changed={"debian/pool/main/l/low/low_1.0.orig.tar.gz": b"\x1f\x8b nothing"})
    shop.put_all(store)
    with pytest.raises(VzreproError, match="is not an archive that can be read"):
        read(shop, store)


def test_an_archive_whose_numbers_are_none_is_said(tmp_path: Path, store: LocalStore) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("low/COPYING")
        info.pax_headers = {"GNU.sparse.size": "x"}
        archive.addfile(info)
    file = gzip.compress(out.getvalue())
    shop = boms.shop(tmp_path / "shop", changed={"debian/pool/main/l/low/low_1.0.orig.tar.gz": file})
    shop.put_all(store)
    with pytest.raises(VzreproError, match="is not an archive that can be read"):
        read(shop, store)


def test_what_is_in_a_target_and_what_only_built_it(shop: boms.Shop, store: LocalStore) -> None:
    shop.put_all(store)
    known, _, _ = read(shop, store)
    bill = bill_of(shop, "all", known)
    assert names(bill, contained=True) == [
        "all",
        "app",
        "deep",
        "files-small",
        "libc-dev",
        "low",
        "low",
        "note",
        "unix",
        "used",
    ]
    assert names(bill, contained=False) == [
        *("builder", "check", "derive", "files-small", "gcc", "gcc-base", "prose", "silent", "syn")
    ]
    assert roles(bill, "all") == {
        "low": "contains",
        "app": "contains",
        "check": "tool",
        "note": "from",
        "image-c": "tool",
    }
    assert roles(bill, "app") == {
        **dict.fromkeys(("used", "deep", "unix"), "links"),
        **dict.fromkeys(("builder", "derive", "syn", "image-c"), "tool"),
        "files-small": "from",
    }
    assert roles(bill, "image-c")["libc-dev"] == "contains"
    assert bill.unread == ()


def test_without_facts_every_crate_counts_as_contained(shop: boms.Shop) -> None:
    bill = bill_of(shop, "app", {})
    crates = [each for each in bill.components if each.kind == "crate"]
    assert [each.contained for each in crates] == [True] * 6
    assert {each.license for each in crates} == {None}
    assert len(bill.unread) == 11  # all but the source of `low`, which `app` is not made from


def test_components_are_named_as_the_world_names_them(shop: boms.Shop, store: LocalStore) -> None:
    shop.put_all(store)
    known, _, _ = read(shop, store)
    bill = bill_of(shop, "all", known)
    found = {each.purl: each for each in bill.components if each.purl}
    libc = found["pkg:deb/debian/libc-dev@2:1.0%2Bb1~1?arch=amd64&distro=trixie"]
    assert libc.pin is not None
    assert (libc.pin.size, libc.pin.sha256) == (len(shop.content[libc.pin.sha256]), libc.pin.sha256)
    assert found["pkg:cargo/used@1.0.0"].license == "MIT"
    assert any(purl.startswith("pkg:generic/low@1.0?checksum=sha256:") for purl in found)
    low = next(each for each in bill.components if each.name == "low" and each.kind == "build")
    assert (low.license, low.command) == ("GPL-2.0-only WITH Linux-syscall-note", ("sh", "/in/src/build.sh"))
    app = next(each for each in bill.components if each.name == "app")
    assert app.license == "MIT OR Apache-2.0"


def test_the_seed_counts_every_package_once(shop: boms.Shop) -> None:
    graph = shop.graph
    found = seed(graph, [graph.find("all"), graph.find("low")])
    total = sum(len(data) for data in shop.content.values() if data.startswith(b"!<arch>"))
    assert (found.packages, found.bytes) == (5, total)
    assert [(image.target, image.packages, image.bytes) for image in found.images] == [("image-c", 5, total)]
    assert seed(graph, [graph.find("source-low")]).packages == 0


def test_what_came_out_is_part_of_a_bill_when_asked_for(shop: boms.Shop, store: LocalStore) -> None:
    graph = shop.graph
    node = graph.find("source-low")
    with pytest.raises(UsageError, match="source-low is not in the store") as raised:
        read_output(store, node)
    assert raised.value.hint == "vzrepro realize source-low"
    shop.put_all(store)
    output = read_output(store, node)
    (file,) = output.files
    assert (file.path, file.sha256) == ("low_1.0.orig.tar.gz", node.files[""].sha256.hex)
    bill = describe(graph, shop.lock, node, {}, output)
    assert bill.target.files == (file,)
    crates = read_output(store, graph.find("crates-app"))
    assert [each.path for each in crates.files] == sorted(f"{name}.crate" for name in boms.CRATES)
    damaged = store.location(node.path)
    damaged.chmod(0o644)
    damaged.write_bytes(b"else")
    with pytest.raises(HashMismatch, match="is not what was registered"):
        read_output(store, node)


# --- the recipe's words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('build_only=["src"]', 'build_only=["srk"]', "build_only names srk, which 'low' has no input of"),
        ('linked=["libc-dev"]', 'linked=["libz-dev"]', "linked: image-c has no package 'libz-dev'"),
        ('linked=["libc-dev"]', 'linked=["libc-dev:arm64"]', "image-c has no package 'libc-dev:arm64'"),
    ],
)
def test_wrong_words_in_a_recipe(shop: boms.Shop, before: str, after: str, complaint: str) -> None:
    recipe = shop.root / "recipes/small/__init__.py"
    recipe.write_text(recipe.read_text().replace(before, after))
    with pytest.raises(UsageError, match=complaint) as raised:
        evaluate(shop.root, shop.lock, boms.PLATFORM)
    assert raised.value.message.startswith("recipes/small/__init__.py:")


def test_packages_that_are_not_pinned_yet_do_not_keep_vzrepro_lock_from_pinning_them(shop: boms.Shop) -> None:
    recipe = shop.root / "recipes/small/__init__.py"
    recipe.write_text(recipe.read_text().replace('linked=["libc-dev"]', 'linked=["libz-dev"]'))
    assert evaluate(shop.root, shop.lock, boms.PLATFORM, lenient=True).find("low").linked == ()
    assert evaluate(shop.root, Lock(), boms.PLATFORM, lenient=True).find("low").linked == ()


def test_what_is_for_the_bill_only_changes_no_hash(tmp_path: Path, shop: boms.Shop) -> None:
    plain = boms.RECIPES.replace(' build_only=["src"], linked=["libc-dev"],', "").replace(' build_only=["check"],', "")
    assert "build_only" not in plain
    other = boms.shop(tmp_path / "plain", plain)
    hashes = {
        name: replace(node, place="", build_only=frozenset(), linked=()) for name, node in shop.graph.targets.items()
    }
    assert {name: node.drv_hash for name, node in hashes.items()} == {
        name: node.drv_hash for name, node in other.graph.targets.items()
    }


def test_a_source_whose_gzip_header_is_cut_off_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b\x08\xff")
    with pytest.raises(VzreproError, match="is not an archive that can be read"):
        _from_source(tmp_path / "a.tar.gz", "a.tar.gz")
