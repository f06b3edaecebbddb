"""`vzrepro sbom` as a command: what it writes, compares and reads. Evaluates what we ship; builds nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import boms
from tests.e2e.conftest import PROJECT, Cli


@pytest.fixture
def bare(tmp_path: Path) -> Cli:
    """What we ship, in a place of its own, with nothing in its store: a colleague who has just cloned."""
    root = tmp_path / "clone"
    shutil.copytree(PROJECT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("target", "__pycache__"))
    for name in ("lock.toml", "sbom.toml"):
        shutil.copy(PROJECT / name, root)
    cache = {"VZREPRO_MACHINE_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    return Cli(root, tmp_path / "store", cache)


def test_the_whole_bundle_is_valid_in_both_formats_and_says_the_same(bare: Cli, tmp_path: Path) -> None:
    cyclonedx, spdx = tmp_path / "bundle.cdx.json", tmp_path / "bundle.spdx.json"
    printed = bare.run("sbom", "container-bundle")
    assert "warning" not in printed.stderr
    result = bare.run("sbom", "container-bundle", "--format", "cyclonedx", "--output", str(cyclonedx))
    assert result.stdout == ""
    assert cyclonedx.read_text() == printed.stdout
    bare.run("sbom", "container-bundle", "--format", "spdx", "--output", str(spdx))
    boms.assert_valid_cyclonedx(cyclonedx.read_text())
    boms.assert_valid_spdx(spdx)
    assert bare.run("sbom", "--diff", str(cyclonedx), str(spdx)).stdout == ""
    assert "are made of the same" in bare.run("sbom", "--diff", str(spdx), "container-bundle").stderr


def test_a_change_is_seen(bare: Cli, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    bare.run("sbom", "initramfs", "--format", "spdx", "--output", str(old))
    fstab = bare.root / "recipes/initramfs/fstab"
    fstab.write_text(fstab.read_text() + "# more\n")
    shown = bare.run("sbom", "--diff", str(old), "initramfs", code=1).stdout
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["changed", "files-initramfs", "hash"],
        ["changed", "files-initramfs/fstab", "hash"],
        ["changed", "initramfs", "hash"],
    ]
    events = [
        json.loads(line)
        for line in bare.run("sbom", "--diff", str(old), "busybox", "--json", code=1).stdout.splitlines()
    ]
    removed = next(each for each in events if each.get("component") == "guest-agent")
    assert removed == {
        "change": "removed",
        "component": "guest-agent",
        "what": "version",
        "before": "0.2.0",
        "after": None,
    }


def test_without_facts_it_says_what_is_missing_and_how_to_get_it(bare: Cli) -> None:
    (bare.root / "sbom.toml").unlink()
    result = bare.run("sbom", "busybox")
    assert "vzrepro sbom --learn busybox" in result.stderr
    assert json.loads(result.stdout)["metadata"]["component"]["name"] == "busybox"
    failed = bare.run("sbom", "--learn", "busybox", code=1)
    assert "2 downloads are not in the store" in failed.stderr
    assert "vzrepro realize debs-c source-busybox && vzrepro sbom --learn busybox" in failed.stderr


def test_learning_what_is_here_gives_what_is_committed(bare: Cli, project: Cli) -> None:
    """The source tarball of the project's own store, read anew."""
    project.realize("source-busybox")
    bare.env |= {"VZREPRO_STORE": str(project.store)}
    committed = (bare.root / "sbom.toml").read_text()
    line = next(line for line in committed.splitlines() if "busybox_1" in line)
    (bare.root / "sbom.toml").write_text(committed.replace(line + "\n", ""))
    result = bare.run("sbom", "--learn", "source-busybox")
    assert "1 of them new" in result.stderr
    assert (bare.root / "sbom.toml").read_text() == committed


def test_what_was_built_ties_the_bill_to_files(bare: Cli, project: Cli) -> None:
    refused = bare.run("sbom", "source-busybox", "--built", code=2)
    assert "hint: vzrepro realize source-busybox" in refused.stderr
    project.realize("source-busybox")
    bare.env |= {"VZREPRO_STORE": str(project.store)}
    document = json.loads(bare.run("sbom", "source-busybox", "--built").stdout)
    (file,) = document["metadata"]["component"]["components"]
    assert document["metadata"]["lifecycles"] == [{"phase": "build"}]
    assert file["hashes"][1]["content"] == document["metadata"]["component"]["hashes"][0]["content"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "name one target"),
        (("busybox", "youki"), "name one target"),
        (("bussybox",), "no target is called 'bussybox'"),
        (("--diff", "busybox"), "--diff compares two"),
        (("--diff", "busybox", "nowhere.json"), "no target is called 'nowhere.json'"),
        (("--diff", "--format", "spdx", "busybox", "youki"), "go with no other option"),
        (("--diff", "--learn"), "go with no other option"),
        (("--diff", "busybox", "lock.toml"), "lock.toml is not JSON"),
        (("busybox", "--format", "swid"), "'swid' is not one of"),
    ],
)
def test_wrong_requests(bare: Cli, words: tuple[str, ...], complaint: str) -> None:
    assert complaint in bare.run("sbom", *words, code=2).stderr


def test_a_place_that_cannot_be_written_is_said(bare: Cli, tmp_path: Path) -> None:
    assert "No such file or directory" in bare.run("sbom", "busybox", "--output", str(tmp_path / "no/x"), code=1).stderr
    assert not (tmp_path / "no").exists()
