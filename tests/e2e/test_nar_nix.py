"""Our NARs against those of a stock Nix: the same bytes out, and its bytes in."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vzrepro import nar

pytestmark = pytest.mark.skipif(
    shutil.which("nix-store") is None, reason="needs Nix: apt-get install --no-install-recommends nix-bin"
)


def nix(*command: str | Path, stdin: bytes = b"") -> bytes:
    return subprocess.run(command, input=stdin, check=True, capture_output=True).stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Every kind of node, names whose order depends on how they are compared, sizes around the padding."""
    tree = tmp_path / "tree"
    (tree / "sub" / "empty").mkdir(parents=True)
    for size in (*range(18), (1 << 16) - 1, 1 << 16, (1 << 20) + 1, 3_000_000):
        (tree / f"size-{size}").write_bytes(os.urandom(size))
    for name in (b"a", b"a.b", b"a-b", b"B", b"\xff\xfe", "é".encode(), "\U0001f600".encode(), "\uffee".encode()):
        (tree / "sub" / os.fsdecode(name)).write_bytes(name)
    (tree / "tool").write_text("#!/bin/sh\n")
    (tree / "tool").chmod(0o755)
    (tree / "group-only").write_text("x")
    (tree / "group-only").chmod(0o454)
    (tree / "link").symlink_to("sub/../tool")
    (tree / "dangling").symlink_to("é")
    return tree


@pytest.mark.parametrize("part", ["", "tool", "size-0", "link", "sub/empty"])
def test_nix_dumps_the_same_bytes(tree: Path, part: str) -> None:
    dumped = nix("nix-store", "--dump", tree / part)
    assert b"".join(nar.pack(tree / part)) == dumped


def test_nix_gives_the_same_hash(tree: Path) -> None:
    digest, _ = nar.nar_hash(tree)
    assert nix("nix-hash", "--type", "sha256", "--base32", tree).decode().strip() == digest.nix.removeprefix("sha256:")


def test_nix_restores_what_we_pack(tree: Path, tmp_path: Path) -> None:
    nix("nix-store", "--restore", tmp_path / "restored", stdin=b"".join(nar.pack(tree)))
    assert nar.nar_hash(tmp_path / "restored") == nar.nar_hash(tree)


def test_we_unpack_what_nix_dumps(tree: Path, tmp_path: Path) -> None:
    dumped = nix("nix-store", "--dump", tree)
    found = nar.unpack(nar.reader([dumped]), tmp_path / "unpacked", max_size=len(dumped))
    assert found == nar.nar_hash(tree)
    assert nix("nix-store", "--dump", tmp_path / "unpacked") == dumped


def test_the_zstd_tool_reads_our_frames(tree: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("needs zstd")
    compressed = b"".join(nar.compress(nar.pack(tree), frame=1 << 20))
    assert nix("zstd", "-dc", stdin=compressed) == b"".join(nar.pack(tree))
