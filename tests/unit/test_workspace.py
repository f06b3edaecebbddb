"""A new workspace, and one that a newer vzrepro has made; two vzrepros; what tells a shell and man(1) of the verbs."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

import vzrepro
from tests.test_docs import _verbs
from vzrepro import noop
from vzrepro.base import config, version
from vzrepro.base.errors import UsageError
from vzrepro.base.model import FileHash
from vzrepro.cli import group
from vzrepro.cli.man import page
from vzrepro.cli.session import Session
from vzrepro.console import Console
from vzrepro.proof.audit.toolbox import tools_graph
from vzrepro.recipe import lock as locks
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.lock.writing import render

PROJECT = Path(__file__).parents[2]


def run(root: Path, *words: str, code: int = 0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VZREPRO_", "XDG_", "_VZ"))}
    command = [sys.executable, "-m", "vzrepro", *words]
    environment = {"PYTHONPATH": str(PROJECT), **kept, "HOME": str(root / "home"), "COLUMNS": "100", **(env or {})}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


# --- vzrepro init -------------------------------------------------------------------------------------------------


def test_a_new_workspace_is_locked_and_its_image_is_that_of_audits(tmp_path: Path) -> None:
    said = run(tmp_path, "init", "my-board").stdout
    assert said == "my-board is a workspace; go on with: cd my-board && vzrepro realize hello && vzrepro audit hello\n"
    root = tmp_path / "my-board"
    assert {path.name for path in root.iterdir()} == {
        ".gitignore",
        "README.md",
        "lock.toml",
        "pyproject.toml",
        "recipes",
    }
    run(root, "lock", "--check")
    graph = evaluate(root, locks.load(root / "lock.toml"), "linux/amd64")
    assert graph.find("hello").drv.image == tools_graph("linux/amd64")[0].find("audit-tools").drv.image


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    assert "go on with: vzrepro realize hello" in run(tmp_path, "init", ".").stdout
    assert (tmp_path / "recipes/hello/hello.c").is_file()


def test_the_next_commands_can_be_typed_as_they_are(tmp_path: Path) -> None:
    assert "go on with: cd 'a board' && vzrepro realize" in run(tmp_path, "init", "a board").stdout


def test_where_something_is_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    error = run(tmp_path, "init", "full", code=2).stderr
    assert "error: full is not empty, and a workspace is made in an empty directory only\n" in error
    assert "hint: name a new one: vzrepro init DIR" in error
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for place, told in (
        ("full/mine", "full/mine is a file"),
        ("full/mine/below", "full/mine is a file"),
        ("link", "link is a link to nowhere, which is no directory"),
        ("link/below", "link is a link to nowhere"),
        ("loop", "loop is a link to loop"),
    ):
        error = run(tmp_path, "init", place, code=2).stderr
        assert f"error: {told}" in error
        assert "so no workspace can be made there\n  hint: name a new directory" in error


def test_without_shared_caches_the_machines_own_is_explained(tmp_path: Path) -> None:
    run(tmp_path, "init", "board")
    board = tmp_path / "board"
    said = run(board, "cache", "why-missing", "hello").stdout
    assert re.fullmatch(r"file://\S+ has no \S+-hello-1\.0, and never saw a recipe called hello\n", said)
    error = run(board, "cache", "why-missing", "hello", env={"VZREPRO_MACHINE_CACHE": "false"}, code=2).stderr
    assert "no cache is configured" in error


def test_a_pin_has_another_name_than_its_target(tmp_path: Path) -> None:
    run(tmp_path, "init", "board")
    assert run(tmp_path / "board", "lock", "--check").stderr.endswith("lock.toml answers 1 request\n")
    error = run(tmp_path / "board", "lock", "--update", "image-c", code=2).stderr
    assert "nothing called 'image-c' is pinned" in error
    assert "reason: the pins are: c\n" in error
    assert "vzrepro lock --update c\n" in error


def test_for_another_platform_the_packages_are_still_to_be_pinned(tmp_path: Path) -> None:
    said = run(tmp_path, "init", "there", env={"VZREPRO_PLATFORM": "linux/arm64"}).stdout
    assert said.endswith("cd there && vzrepro lock\n")
    assert not (tmp_path / "there/lock.toml").exists()


# --- another vzrepro ----------------------------------------------------------------------------------------------


def test_a_workspace_of_a_newer_vzrepro_says_so_in_a_sentence(tmp_path: Path) -> None:
    run(tmp_path, "init", ".")
    project = tmp_path / "pyproject.toml"
    assert f'required-version = ">={vzrepro.__version__}"' in project.read_text()
    project.write_text('[tool.vzrepro]\nrequired-version = ">=99.1"\na-setting-of-then = true\n')
    error = run(tmp_path, "targets", code=2).stderr
    assert f"{tmp_path} is a workspace for vzrepro 99.1 or later, and this is {vzrepro.__version__}\n" in error
    assert f"hint: install a newer one: git -C {PROJECT} pull\n" in error


@pytest.mark.parametrize("oldest", [">=0", ">=0.1", f">={vzrepro.__version__}"])
def test_an_older_workspace_is_used(tmp_path: Path, oldest: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[tool.vzrepro]\nrequired-version = "{oldest}"\n')
    assert config.load(tmp_path, {}, tmp_path / "none").required_version == oldest


@pytest.mark.parametrize("odd", ['"0.1"', '"==1"', '">=1.x"', "1", '">=0.1,<2"', "[]", '""'])
def test_what_is_no_oldest_version_is_an_error(tmp_path: Path, odd: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.vzrepro]\nrequired-version = {odd}\n")
    with pytest.raises(UsageError, match=r"required-version is .*, and not the oldest vzrepro that will do") as caught:
        config.load(tmp_path, {}, tmp_path / "none")
    assert caught.value.hint == f'write it as: required-version = ">={vzrepro.__version__}"'


def test_a_lock_of_a_newer_vzrepro_says_so_whatever_else_it_has() -> None:
    with pytest.raises(UsageError, match=r"^lock\.toml was written by a newer vzrepro: it has format 2, and") as caught:
        locks.parse("format = 2\n[wheel.of.then]\nkey = 1\n")
    assert "install a newer one" in (caught.value.hint or "")


def test_two_vzrepros_do_not_answer_for_each_other(tmp_path: Path) -> None:
    """The second one has another formula for store paths: its answer must not be what the first one remembered."""
    root = tmp_path / "workspace"
    run(tmp_path, "init", str(root))
    other = tmp_path / "other"
    shutil.copytree(PROJECT / "vzrepro", other / "vzrepro", ignore=shutil.ignore_patterns("__pycache__"))
    model = other / "vzrepro/base/model.py"
    text = model.read_text()
    assert "output:out:sha256:" in text
    model.write_text(text.replace("output:out:sha256:", "another:out:sha256:"))
    for place in sorted(root.rglob("*")):  # a file that has just been written is not trusted to stay as it is
        os.utime(place, (time.time() - 10,) * 2)
    home = {"HOME": str(tmp_path / "home")}
    for _ in range(2):
        first = run(root, "targets", env=home).stdout
        second = run(root, "targets", env={**home, "PYTHONPATH": str(other)}).stdout
        assert first != second
        assert "-hello-1.0" in first


# --- version, completion, man -------------------------------------------------------------------------------------


def test_the_version_names_the_commit_of_a_checkout() -> None:
    commit = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert version.full().removesuffix(")").removesuffix("-dirty") == f"{vzrepro.__version__} ({commit.stdout[:12]}"


def test_the_version_names_the_commit_that_a_wheel_was_built_from(tmp_path: Path) -> None:
    copy = tmp_path / "site/vzrepro"
    (copy / "base").mkdir(parents=True)
    for name in ("__init__.py", "__main__.py", "base/__init__.py", "base/version.py"):
        shutil.copy(PROJECT / "vzrepro" / name, copy / name)
    there = {"PYTHONPATH": str(copy.parent)}
    assert run(tmp_path, "--version", env=there).stdout == f"vzrepro, version {vzrepro.__version__}\n"
    (copy / "COMMIT").write_text("0123456789ab 1700000000\n")
    assert run(tmp_path, "--version", env=there).stdout == f"vzrepro, version {vzrepro.__version__} (0123456789ab)\n"


@pytest.mark.parametrize(
    ("prefix", "adds", "brings"),
    [
        ("/home/u/.local/share/pipx/venvs/vzrepro", "pipx inject vzrepro x", "pipx upgrade vzrepro"),
        ("/home/u/.local/share/uv/tools/vzrepro", "/py -m pip install x", "uv tool upgrade vzrepro"),
        ("/srv/venvs/venv", "/py -m pip install x", "/py -m pip install --upgrade WHEEL"),
    ],
)
def test_hints_name_what_works_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, prefix: str, adds: str, brings: str
) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "executable", "/py")
    assert version.adding("x") == adds
    assert version.upgrading() == f"git -C {PROJECT} pull"
    monkeypatch.setattr(vzrepro, "__file__", "/nowhere/site-packages/vzrepro/__init__.py")
    assert version.upgrading() == brings
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)  # as in an environment that uv has made
    assert version.adding("x") == (adds if "pipx" in prefix else "uv pip install --python /py x")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(tmp_path: Path, shell: str) -> None:
    script = run(tmp_path, "completion", shell).stdout
    assert f"_VZREPRO_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


NAMED = """
from vzrepro import build, debian_image, text, url_source
IMAGE = debian_image("tools", suite="trixie", packages=["dash"])
THING = url_source("thing", "https://example.org/thing", sha256="0" * 64)
for name in ("hello", "help", "other"):
    build(name, image=IMAGE, command=["x"], inputs={"thing": THING})
"""


def completed(root: Path, *words: str) -> list[str]:
    """What a shell offers in the place of the last word."""
    session = Session(Console("auto", stdout=io.StringIO(), stderr=io.StringIO()))
    asked = ShellComplete(group, {"obj": session}, "vzrepro", "_VZREPRO_COMPLETE")
    return [item.value for item in asked.get_completions(["-C", str(root), *words[:-1]], words[-1])]


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with targets, locked."""
    for name in [name for name in os.environ if name.startswith(("VZREPRO_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "named"
    (root / "recipes").mkdir(parents=True)
    (root / "recipes/a.py").write_text(NAMED)
    platform = config.load(root).platform
    (want,) = evaluate(root, locks.Lock(), platform, lenient=True).wants
    deb = locks.DebPin("dash", "1", "all", locks.PinnedFile("mirror://debian/dash.deb", FileHash.of(b""), 1))
    pin = locks.ImagePin(want.request, "20260101T000000Z", (deb,))
    (root / "lock.toml").write_text(render(locks.Lock(images={("tools", platform): pin})))
    return root


def test_targets_are_completed(named: Path) -> None:
    assert completed(named, "realize", "he") == ["hello", "help"]
    assert completed(named, "realize", "hello", "o") == ["other"]
    assert completed(named, "audit", "h") == ["history", "hello", "help"]
    assert completed(named, "store", "path", "source-") == ["source-thing"]
    assert completed(named, "cache", "push", "nothing") == []
    assert completed(named, "lock", "--update", "t") == ["thing", "tools"]
    assert completed(named, "show", "./") == ["./"]  # of which the shell makes files


@pytest.mark.parametrize("fault", ["1 +", "import os", None])
def test_what_is_wrong_is_not_for_the_shell_to_say(named: Path, fault: str | None) -> None:
    if fault is None:
        shutil.rmtree(named)
    else:
        (named / "recipes/a.py").write_text(fault)
    assert completed(named, "realize", "h") == []


def test_targets_are_evaluated_once(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(40):  # a file that has just been written is not trusted to stay as it is
        assert completed(named, "realize", "he") == ["hello", "help"]
        if noop.names(str(named), os.environ) is not None:
            break
    with monkeypatch.context() as patch:
        patch.delattr(Session, "graph")
        assert completed(named, "realize", "he") == ["hello", "help"]
    (named / "recipes/a.py").write_text(NAMED.replace('"help"', '"heap"'))
    assert completed(named, "realize", "he") == ["heap", "hello"]


def test_bash_completes_a_verb(tmp_path: Path) -> None:
    script = run(tmp_path, "completion", "bash").stdout
    (tmp_path / "vzrepro").write_text(f'#!/bin/sh\nexec {sys.executable} -m vzrepro "$@"\n')
    (tmp_path / "vzrepro").chmod(0o755)
    asked = f'{script}\nCOMP_WORDS=(vzrepro stor)\nCOMP_CWORD=1\n_vzrepro_completion vzrepro\necho "${{COMPREPLY[@]}}"'
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(["bash", "-c", asked], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "store\n"


def test_the_manual_page_has_every_verb_and_option() -> None:
    lines = list(page(group))
    assert lines[0].startswith('.TH VZREPRO 1 "" "vzrepro ')
    # As man-pages(7) has it: a phrase, which begins small and has no full stop.
    assert lines[2] == "vzrepro \\- reproducible builds of what recipes declare, such as Linux boot bundles"
    text = "\n".join(lines).replace("\\-", "-")
    for verb in _verbs(group):
        assert f"\n.SS vzrepro {verb} " in text or f"\n.SS vzrepro {verb}\n" in text, verb
    assert "\n.B --out-link PATH\n" in text
    assert "130 interrupted" in text
    assert not [line for line in lines if line.startswith("'")]
    requests = {line.split()[0] for line in lines if line.startswith(".")}
    assert requests == {".TH", ".SH", ".SS", ".TP", ".PP", ".B"}


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_manual_page_is_what_groff_understands() -> None:
    text = "\n".join(page(group)) + "\n"
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8"], input=text, text=True, capture_output=True, check=True)
    assert done.stderr == ""
    assert "realize" in done.stdout
