"""Start-up: what a command imports before it answers, and what is told of verbs without importing them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vzrepro import noop
from vzrepro.cli import group
from vzrepro.cli.verbs import summary

PROJECT = Path(__file__).parents[2]
SITE = Path(click.__file__).parents[1]

# Ends with the modules on stderr: ours by their full names, those of other packages by their first.
RUN = f"""
import atexit, json, sys

def tell():
    found = set()
    for name, module in sys.modules.items():
        top = name.partition(".")[0]
        file = getattr(module, "__file__", None) or ""
        if top == "vzrepro":
            found.add(name)
        elif file.startswith({str(SITE)!r}) and top not in ("_distutils_hack", "sitecustomize"):
            found.add(top)
    sys.stderr.write(json.dumps(sorted(found)))

atexit.register(tell)
from vzrepro.__main__ import main
main()
"""

COMMAND_LINE = {
    "vzrepro",
    "vzrepro.__main__",
    "vzrepro.cli",
    "vzrepro.cli.session",
    "vzrepro.cli.verbs",
    "vzrepro.console",
    "vzrepro.base",
    "vzrepro.base.errors",
    "vzrepro.base.events",
    "vzrepro.base.words",
    "vzrepro.noop",
    "vzrepro.base.trust",
    "click",
}

LOOKING = {
    "vzrepro.cli.inspect",
    "vzrepro.recipe",
    "vzrepro.cli.options",
    "vzrepro.base.config",
    "vzrepro.base.disk",
    "vzrepro.base.landlock",
    "vzrepro.base.seccomp",
    "vzrepro.base.syscalls",
    "vzrepro.recipe.confined",
    "vzrepro.recipe.evaluate",
    "vzrepro.recipe.wire",
    "vzrepro.recipe.lock",
    "vzrepro.base.model",
    "vzrepro.nar",
    "vzrepro.nar.frames",
    "vzrepro.nar.packing",
    "vzrepro.nar.stream",
    "vzrepro.nar.tokens",
    "vzrepro.nar.unpacking",
    "vzrepro.recipe.declaring",
    "vzrepro.recipe.dsl",
    "vzrepro.recipe.graph",
    "vzrepro.store",
    "vzrepro.store.database",
    "vzrepro.store.local",
    "vzrepro.store.registrar",
    "annotated_types",
    "platformdirs",
    "pydantic",
    "pydantic_core",
    "typing_extensions",
    "typing_inspection",
    "zstandard",
}


def environment(root: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VZREPRO_", "XDG_", "COV_"))}
    return {**kept, "HOME": str(root / "home"), "COLUMNS": "80"}


def run(root: Path, *words: str) -> tuple[str, set[str]]:
    """What a command prints, and the modules that it has imported at its end."""
    command = [sys.executable, "-c", RUN, *words]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True, check=True)
    return done.stdout, set(json.loads(done.stderr))


RECIPE = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build

A = build("a", image=TOOLS_IMAGE, command=["true"], inputs={})
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A workspace with one target."""
    root = tmp_path / "workspace"
    shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
    shutil.copy(PROJECT / "lock.toml", root)
    (root / "recipes" / "a.py").write_text(RECIPE)
    return root


def test_the_version_is_told_without_the_command_line(root: Path) -> None:
    text, modules = run(root, "--version")
    assert modules == {"vzrepro", "vzrepro.__main__", "vzrepro.base", "vzrepro.base.version"}
    assert text == run(root, "-C", ".", "--version")[0]


def test_help_imports_no_verb(root: Path) -> None:
    text, modules = run(root, "--help")
    assert "targets" in text
    assert modules == COMMAND_LINE


def test_the_no_op_path_imports_itself_and_trust_alone(root: Path) -> None:
    recipe = root / "recipes/a.py"
    noop.remember_realized(str(root), environment(root), time.time_ns() + 10**9, [str(recipe)], {"a": str(recipe)})
    text, modules = run(root, "realize", "a")
    assert text == f"{recipe}\n"
    assert modules == {"vzrepro", "vzrepro.__main__", "vzrepro.noop", "vzrepro.base", "vzrepro.base.trust"}


def test_a_verb_that_only_looks_imports_no_network_no_cache_and_no_engine(root: Path) -> None:
    text, modules = run(root, "targets")
    assert text.splitlines()[1].split()[::3] == ["a", "no"]
    assert modules == COMMAND_LINE | LOOKING


def test_an_audit_that_writes_no_page_imports_no_templates(root: Path) -> None:
    _, modules = run(root, "audit", "history")
    assert "vzrepro.proof.audit.report" in modules
    assert not modules & {"jinja2", "markupsafe", "vzrepro.base.html"}


# --- what is told of verbs ---------------------------------------------------------------------------------------


def groups(command: click.Command, path: str = "vzrepro") -> Iterator[tuple[str, click.Group]]:
    """`command` and all below it that have verbs, with what is typed for them."""
    if isinstance(command, click.Group):
        yield path, command
        for name, verb in command.commands.items():
            yield from groups(verb, f"{path} {name}")


def test_what_is_told_of_a_verb_is_what_the_verb_says() -> None:
    assert {name: card.summary for name, card in group.cards.items()} == {
        name: summary(command) for name, command in group.commands.items()
    }
    for name, command in group.commands.items():
        assert command.name == name


@pytest.mark.parametrize(
    ("path", "verbs"), list(groups(group)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_summary_is_cut_off(path: str, verbs: click.Group) -> None:
    with click.Context(verbs, info_name=path, terminal_width=80) as context:
        lines = verbs.get_help(context).splitlines()
    assert max(map(len, lines)) <= 80
    shown = lines[lines.index("Commands:") + 1 :]
    assert [line.split()[0] for line in shown] == sorted(verbs.commands), "a line each"
    for name, command in verbs.commands.items():
        whole = (command.help or "").split("\n\n")[0].split()
        told = summary(command)
        assert "..." not in told
        assert " ".join(whole).startswith(told.removesuffix("."))
        assert f"{name} {told}" in [" ".join(line.split()) for line in shown]


@pytest.mark.parametrize(
    ("typed", "completions"),
    [("vzrepro st", ["store"]), ("vzrepro store re", ["references", "repair"]), ("vzrepro --vers", ["--version"])],
)
def test_the_shell_completes(root: Path, typed: str, completions: list[str]) -> None:
    asked = {"_VZREPRO_COMPLETE": "bash_complete", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    command = [sys.executable, "-m", "vzrepro"]
    done = subprocess.run(command, cwd=root, env=environment(root) | asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"plain,{each}" for each in completions]
