"""Names that a file system takes for one: said before anything is lost, never merged."""

from __future__ import annotations

import io
import unicodedata
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.folding import IGNORED, fold
from tests.unit.test_nar import Tree, archive
from tests.unit.test_rootfs import docker_archive, entry, tar
from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.config import Config
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import rootfs
from vzrepro.realize.maker import Maker
from vzrepro.sandbox import Job, Surroundings, staging
from vzrepro.sources.archive import unpack
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import LocalStore

NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
PAIRS = {"case": ("xt_TCPMSS.h", "xt_tcpmss.h"), "form": (NFC, NFD), "form, and writes another": (NFC, NFD)}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.mark.parametrize("pair", PAIRS.values())
def test_here_names_are_told_apart(place: Path, pair: tuple[str, str]) -> None:
    assert not disk.same_name(place, *pair)
    disk.require_distinct(place, pair)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("ignored", IGNORED)
def test_the_file_system_itself_is_asked(monkeypatch: pytest.MonkeyPatch, place: Path, ignored: str) -> None:
    one, other = PAIRS[ignored]
    with monkeypatch.context() as context:
        fold(context, place, ignored)
        assert disk.same_name(place, one, other)
        assert not disk.same_name(place, one, "another")
        for names in ([one, other], [f"{one}/x", f"{other}/y"], [one, f"{other}/y"]):
            with pytest.raises(VzreproError, match="exists already, as ") as raised:
                disk.require_distinct(place, names)
            assert "VZREPRO_STORE" in (raised.value.hint or "")
        disk.require_distinct(place, [one, f"a/{other}", "a/b", "b"])
    assert list(place.iterdir()) == []


NODES: dict[str, tuple[Tree, Tree]] = {
    "small files": (b"one", b"other"),
    "large files": (bytes(1 << 17), bytes(1 << 18)),
    "links": ("one", "other"),
    "directories": ({b"x": b"one"}, {b"y": b"other"}),
    "directory and link to one": ("one", {b"y": b"other"}),
}


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_an_object_with_both_names_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, ignored: str, nodes: tuple[Tree, Tree]
) -> None:
    pair: Tree = {name.encode(): node for name, node in zip(PAIRS[ignored], nodes, strict=True)}
    packed = archive({b"sub": pair})
    copied = tmp_path / "source"
    nar.unpack(io.BytesIO(packed), copied)
    with monkeypatch.context() as context:
        fold(context, place, ignored)
        with pytest.raises(VzreproError, match="exists already") as raised:
            nar.unpack(io.BytesIO(packed), place / "dest")
        assert "ignores" in (raised.value.reason or "")
        with pytest.raises(VzreproError, match="exists already"):
            nar.canonical_copy(copied, place / "copy")


@pytest.mark.parametrize("node", [b"small", bytes(1 << 17), "link", {b"x": b"in a directory"}])
def test_a_name_that_is_written_in_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, place: Path, node: Tree
) -> None:
    with monkeypatch.context() as context:
        fold(context, place, "form, and writes another")
        nar.unpack(io.BytesIO(archive({NFD.encode(): node})), place / "same form")
        with pytest.raises(VzreproError, match="cannot be kept under its name"):
            nar.unpack(io.BytesIO(archive({NFC.encode(): node})), place / "dest")


def test_nothing_is_built_where_case_is_ignored(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    job = Job(
        label="t", image="sha256:0", command=("true",), scratch=place, log=place / "log", source_date_epoch=0, cores=1
    )
    with monkeypatch.context() as context:
        fold(context, place, "case")
        with pytest.raises(VzreproError, match="cannot hold a build"):
            staging.Mounts(job).fill(lambda: None)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("below", ["", "/x"], ids=["files", "directories"])
def test_an_archive_with_both_names_is_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path, ignored: str, below: str
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        for name in PAIRS[ignored]:
            packed.writestr(f"include/{name}{below}", name)
    with monkeypatch.context() as context:
        fold(context, place, ignored)
        with pytest.raises(VzreproError, match="exists already"):
            unpack(tmp_path / "x.zip", place / "tree", "x.zip")


@pytest.mark.parametrize("ignored", IGNORED)
@pytest.mark.parametrize("step", ["take_in", "fetch", "make_again"])
def test_files_of_a_recipe_are_not_merged(
    monkeypatch: pytest.MonkeyPatch, place: Path, ignored: str, step: str
) -> None:
    one, other = PAIRS[ignored]
    names = {f"include/{one}": b"one", f"include/{other}": b"other"}
    node: Any = SimpleNamespace(
        target="t",
        check=lambda: None,
        tree=names,
        files=names,
        checkout=None,
        drv=SimpleNamespace(builder="fetch", env={}),
    )
    with LocalStore(place / "store") as store:
        maker = Maker(store, cast(Config, None), cast(Mirrors, None), None, store.add)
        # Its files need not be there: the names are looked at before.
        monkeypatch.setattr(Maker, "_seed", lambda _self, _node: None)
        monkeypatch.setattr(Maker, "download", lambda _self, _node: None)
        with monkeypatch.context() as context:
            fold(context, place, ignored)
            with pytest.raises(VzreproError, match="exists already, as include/"):
                maker.make_again(node, {}, place / "tree") if step == "make_again" else getattr(maker, step)(node)
        assert not (place / "tree").exists()


def test_an_input_is_not_written_through_anothers_link(place: Path) -> None:
    """A name that is taken is a link to the file of an input, which a copy would change in the store."""
    one, other, target = place / "one", place / "other", place / "target"
    one.write_text("one")
    other.write_text("other")
    put = staging._Staging(Surroundings()).put
    put(one, target)
    with pytest.raises(FileExistsError):
        put(other, target)
    assert one.read_text() == "one"


def test_no_image_is_unpacked_where_case_is_ignored(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    image = docker_archive(tmp_path / "image.tar", tar(entry("a"), entry("A")))
    with monkeypatch.context() as context:
        fold(context, place, "case")
        with pytest.raises(VzreproError, match="cannot be unpacked to"), rootfs.image_root(image, cache=place):
            pass
    with rootfs.image_root(image, cache=place) as found:
        assert {path.name for path in found.root.iterdir()} >= {"a", "A"}
