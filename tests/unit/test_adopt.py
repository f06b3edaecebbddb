"""Sources that somebody gives: `Maker.adopt` takes what the derivation pins, and nothing else."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from vzrepro import nar
from vzrepro.base.config import Config
from vzrepro.base.errors import HashMismatch, UsageError
from vzrepro.base.model import UNPACK_FORMAT, Derivation, Digest, store_path
from vzrepro.realize.maker import Maker
from vzrepro.recipe.graph import Node
from vzrepro.sources import fetch
from vzrepro.store import LocalStore


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    with LocalStore(tmp_path / "store") as store:
        yield Maker(store, Config(), fetch.Mirrors({}), None, store.add)


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """What somebody gives: a program, a link and a file below a directory, and something that nobody has asked for."""
    tree = tmp_path / "given"
    (tree / "sub").mkdir(parents=True)
    (tree / "run").write_text("run\n")
    (tree / "run").chmod(0o755)
    (tree / "sub" / "file").write_text("file\n")
    (tree / "link").symlink_to("./run")
    (tree / "more").write_text("nobody has asked for it\n")
    return tree


def node(builder: str, content: dict[str, Digest], env: dict[str, str] | None = None) -> Node:
    drv = Derivation("source", builder, content=content, env=env or {})  # type: ignore[arg-type]
    drv_hash = drv.drv_hash()
    return Node("source", "source", "here", "", drv, drv_hash, store_path(drv_hash, "source"))


def sha256(path: Path) -> Digest:
    return Digest(hashlib.sha256(path.read_bytes()).hexdigest())


def nar_of(path: Path) -> Digest:
    return Digest(nar.nar_hash(path)[0].hex)


def test_local_files_are_taken_with_links_and_executable_bits(maker: Maker, given: Path) -> None:
    names = ("run", "link", "sub/file")
    wanted = node("local", {name: nar_of(given / name) for name in names})
    info = maker.adopt(wanted, given)
    there = maker.store.location(info.path)
    assert {str(each.relative_to(there)) for each in there.rglob("*")} == {"run", "link", "sub", "sub/file"}
    assert (there / "run").stat().st_mode & 0o111
    assert os.readlink(there / "link") == "./run"  # noqa: PTH115 - as it is


def test_the_same_object_comes_out_as_where_it_was_made(maker: Maker, given: Path) -> None:
    content = {name: nar_of(given / name) for name in ("run", "link", "sub/file")}
    tree: dict[str, Path | bytes] = {name: given / name for name in content}
    drv = Derivation("source", "local", content=content)
    path = store_path(drv.drv_hash(), "source")
    made = maker.take_in(Node("source", "source", "here", "", drv, drv.drv_hash(), path, tree=tree))
    with LocalStore(maker.store.root / "another") as store:
        other = Maker(store, Config(), fetch.Mirrors({}), None, store.add)
        assert other.adopt(node("local", content), maker.store.location(made.path)).nar_hash == made.nar_hash


def test_a_download_loses_modes_that_nobody_has_pinned(maker: Maker, given: Path) -> None:
    info = maker.adopt(node("fetch", {"run": sha256(given / "run")}), given)
    assert not (maker.store.location(info.path) / "run").stat().st_mode & 0o111
    single = maker.adopt(node("fetch", {"": sha256(given / "run")}), given / "run")
    assert maker.store.location(single.path).read_text() == "run\n"


def test_a_commit_is_taken_as_a_whole(maker: Maker, given: Path) -> None:
    info = maker.adopt(node("fetch", {"": nar_of(given)}, {"git": "1"}), given)
    assert info.nar_hash.hex == nar_of(given).hex
    (given / "more").write_text("changed\n")
    with pytest.raises(HashMismatch):
        maker.adopt(
            node(
                "fetch",
                {
                    "": info.nar_hash,
                },
                {"git": "1", "other": "1"},
            ),
            given,
        )


def test_an_archive_is_unpacked_here(maker: Maker, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("top/file")
        member.size = 5
        tar.addfile(member, io.BytesIO(b"text\n"))
    env = {"unpack": str(UNPACK_FORMAT)}
    info = maker.adopt(node("fetch", {"": sha256(archive)}, env), archive)
    assert (maker.store.location(info.path) / "file").read_text() == "text\n"
    with pytest.raises(HashMismatch):
        maker.adopt(node("fetch", {"": Digest("0" * 64)}, env), archive)


@pytest.mark.parametrize("builder", ["fetch", "local"])
def test_other_bytes_are_refused(maker: Maker, given: Path, builder: str) -> None:
    for name in ("run", "absent", "sub"):
        with pytest.raises(HashMismatch, match=name):
            maker.adopt(node(builder, {name: Digest("1" * 64)}), given)


@pytest.mark.parametrize(
    "names",
    [("../outside",), ("/etc/passwd",), ("a//b",), ("a/./b",), ("link", "link/file"), ("", "run"), ("a\0b",)],
)
def test_names_that_lead_out_of_the_tree_are_refused(maker: Maker, given: Path, names: tuple[str, ...]) -> None:
    (given.parent / "outside").write_text("outside\n")
    content = {name: nar_of(given.parent / "outside") for name in names}
    with pytest.raises(UsageError, match="no name for a file"):
        maker.adopt(node("local", content), given)


def test_no_link_is_followed(maker: Maker, given: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("secret\n")
    (given / "way").symlink_to(secret)
    for builder, digest in (("local", nar_of(secret / "file")), ("fetch", sha256(secret / "file"))):
        with pytest.raises(HashMismatch, match="without way/file"):
            maker.adopt(node(builder, {"way/file": digest}), given)
    (given / "direct").symlink_to(secret / "file")
    with pytest.raises(HashMismatch, match="without direct"):
        maker.adopt(node("fetch", {"direct": sha256(secret / "file")}), given)
