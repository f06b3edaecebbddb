"""Modules import only downwards, and each library has one owner: the contracts of pyproject.toml, enforced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(root: Path) -> subprocess.CompletedProcess[str]:
    command = [LINT, "--no-cache", "--config", root / "pyproject.toml"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


BREACHES = {
    "base/errors": ("import vzrepro.base.model", "vzrepro.base.errors -> vzrepro.base.model"),
    "base/disk": ("import vzrepro.nar", "vzrepro.base.disk -> vzrepro.nar"),
    "store/__init__": ("import vzrepro.sandbox", "vzrepro.store -> vzrepro.sandbox"),
    "recipe/plan": ("import vzrepro.realize.realizer", "vzrepro.recipe.plan -> vzrepro.realize.realizer"),
    "realize/realizer": ("import vzrepro.console", "vzrepro.realize.realizer -> vzrepro.console"),
    "realize/transfer": ("import vzrepro.proof.attest.witness", "realize.transfer -> vzrepro.proof.attest.witness"),
    "proof/attest/shelf": ("import vzrepro.guest.vm.qemu", "vzrepro.proof.attest.shelf -> vzrepro.guest.vm.qemu"),
    "guest/metadata": ("import vzrepro.sources.deb", "vzrepro.guest.metadata -> vzrepro.sources.deb"),
    "cache/layout": ("if False:\n    import vzrepro.cache.writer", ".layout -> .writer"),
    "recipe/lock/writing": ("import sqlite3", "vzrepro.recipe.lock.writing"),
    "cli/vm/boot": ("import rich.table", "vzrepro.cli.vm.boot"),
}
"""A line that breaks a rule, by the module where it stands, and what the linter says of it."""


def broken(tmp_path: Path, lines: dict[str, str]) -> str:
    """What the linter says of a copy of the tree with these lines added to its modules."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    for source in (ROOT / "vzrepro").rglob("*.py"):
        copy = tmp_path / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    for module, line in lines.items():
        with (tmp_path / "vzrepro" / f"{module}.py").open("a") as file:
            file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    return done.stdout


@pytest.fixture(scope="module")
def breaches(tmp_path_factory: pytest.TempPathFactory) -> str:
    return broken(tmp_path_factory.mktemp("breaches"), {module: line for module, (line, _) in BREACHES.items()})


@pytest.mark.parametrize("module", BREACHES)
def test_a_breach_is_found(breaches: str, module: str) -> None:
    assert BREACHES[module][1] in breaches, breaches


def test_each_room_has_its_place(tmp_path: Path) -> None:
    said = broken(tmp_path, {"new": "", "base/new": "", "proof/new": ""})
    for module in ("vzrepro.new", "vzrepro.base.new", "vzrepro.proof.new"):
        assert f"- {module}\n" in said
