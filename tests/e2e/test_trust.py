"""What another user put where vzrepro looks upwards is not used: as processes, with files that were really theirs."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bundles import make_bundle
from tests.crashing import ended, forked
from tests.e2e.conftest import Cli
from vzrepro import noop

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, and another user")

STRANGER = 54321
RECIPE = "raise ValueError('a recipe of somebody else is running')\n"


@pytest.fixture
def common() -> Iterator[Path]:
    """A directory like /tmp, which every user can reach and write to."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o1777)
        yield place


@pytest.fixture
def cli(common: Path, tmp_path: Path) -> Cli:
    """root's, who works in a directory of its own in the common one."""
    (tmp_path / "home").mkdir()
    here = common / "work" / "deep"
    here.mkdir(parents=True)
    home = {name: str(tmp_path / "home") for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")}
    none = {f"VZ_LINUX_{name}BUNDLE_DIR": "" for name in ("", "DEVELOPER_", "CONTAINER_")}
    return Cli(here, tmp_path / "store", {**home, **none, "SUDO_UID": ""})


def strangers(common: Path) -> None:
    """What another user does to whoever works there."""

    def work() -> None:
        os.setgid(STRANGER)
        os.setuid(STRANGER)
        make_bundle(common / "linux/out", kernel="evil")
        make_bundle(common / "linux/out/container", "container", kernel="evil")
        (common / "recipes/evil").mkdir(parents=True)
        (common / "recipes/evil/__init__.py").write_text(RECIPE)
        (common / "pyproject.toml").write_text('[tool.vzrepro]\ntrusted-keys = ["evil-1:AAAA"]\n')

    assert ended(forked(work)) == 0


@pytest.mark.parametrize("profile", ["developer", "container"])
@pytest.mark.parametrize("where", ["work/deep", "work", "."])
def test_no_bundle_of_another_user_is_installed(cli: Cli, common: Path, profile: str, where: str) -> None:
    strangers(common)
    words = ("-C", str(common / where), "bundle", "ensure", "--kernel-profile", profile)
    told = cli.run(*words, code=1).stderr
    assert f"there is no {profile} bundle" in told
    assert f"the workspace {common} is not trusted" in " ".join(told.split())
    assert not (Path(cli.env["HOME"]) / ".vz").exists()
    make_bundle(Path(cli.env["HOME"]) / ".vz/linux" / profile, profile, kernel="good")
    assert json.loads(cli.run(*words, "--json").stdout)["version"]["kernel"] == "good"
    rows = [json.loads(line) for line in cli.run(*words[:2], "bundle", "list", "--json").stdout.splitlines()]
    assert {row["source"]: row["state"] for row in rows if row["profile"] == profile} == {
        "workspace": "untrusted",
        "installed": "intact",
    }


def test_no_recipe_of_another_user_runs_until_it_is_trusted(cli: Cli, common: Path) -> None:
    strangers(common)
    for words in (("targets",), ("realize", "evil"), ("lock", "--check"), ("bundle", "install"), ("verify", ".")):
        told = cli.run(*words, code=103)
        assert "somebody else is running" not in told.stdout + told.stderr
        assert f"the workspace {common} is not trusted: " in " ".join(told.stderr.split())
    event = json.loads(cli.run("targets", "--json", code=103).stdout.splitlines()[-1])
    assert (event["event"], event["exit_code"]) == ("error", 103)
    [line] = [line.strip() for line in event["hint"].splitlines() if line.startswith("trusted-workspaces")]
    config = Path(cli.env["XDG_CONFIG_HOME"]) / "vzrepro/config.toml"
    assert str(config) in event["hint"]
    config.parent.mkdir(parents=True)
    config.write_text(f"{line}\n")
    assert "somebody else is running" in cli.run("targets", code=2).stderr
    config.unlink()
    cli.env["VZREPRO_TRUSTED_WORKSPACES"] = str(common)
    assert "somebody else is running" in cli.run("targets", code=2).stderr


def test_a_bundle_that_is_named_needs_no_workspace(cli: Cli, common: Path, tmp_path: Path) -> None:
    """The stranger hinders nobody who asks for nothing of his."""
    strangers(common)
    good = make_bundle(tmp_path / "good", kernel="good")
    cli.run("bundle", "install", "--bundle-dir", str(good))
    cli.run("bundle", "ensure")
    cli.run("bundle", "verify")


def test_settings_of_another_user_are_not_read_where_there_is_no_workspace(cli: Cli, common: Path) -> None:
    strangers(common)
    for path in sorted((common / "recipes").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (common / "recipes").rmdir()
    place = make_bundle(Path(cli.env["HOME"]) / "b")
    told = cli.run("-C", str(common), "verify", f"{place}/", code=103).stderr
    assert f"{common}/pyproject.toml: it belongs to uid {STRANGER}" in " ".join(told.split())


def test_the_no_op_path_answers_as_the_long_way_would(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What trust rests on is compared: owner, mode, and who asks."""
    root = cli.root
    (root / "recipes").mkdir()
    (root / "recipes/a.py").write_text("")
    read = root / "recipes/a.py"
    monkeypatch.chdir(root)

    def answer(**environ: str) -> str | None:
        return noop.answer(["realize", "a"], {**cli.env, **environ}, terminal=False)

    noop.remember_realized(str(root), cli.env, read.stat().st_ctime_ns + 10**9, [str(read)], {"a": str(read)})
    assert answer() == f"{read}\n"
    for change in (lambda: os.chown(root, STRANGER, 0), lambda: os.chown(root, 0, STRANGER), lambda: root.chmod(0o777)):
        change()
        assert answer() is None
        os.chown(root, 0, 0)
        root.chmod(0o755)
        assert answer() == f"{read}\n"
    assert answer(SUDO_UID=str(STRANGER)) is None
    assert answer(VZREPRO_TRUSTED_WORKSPACES="*") is None
