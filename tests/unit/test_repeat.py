"""`lock --check` evaluates twice: what a recipe makes of anything but its files is found and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vzrepro import cli
from vzrepro.base import seccomp
from vzrepro.base.errors import UsageError
from vzrepro.base.model import Derivation, DrvHash
from vzrepro.recipe import repeat
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.lock import Lock

WORDS = "{'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten', 'eleven', 'twelve'}"


def check(root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """`vzrepro lock --check` in `root`; the exit code."""
    for name in [name for name in os.environ if name.startswith("VZREPRO_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(root)
    with pytest.raises(SystemExit) as ended:
        cli.main(["lock", "--check"])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "value",
    [
        f"' '.join({WORDS})",
        "str(hash('x'))",
        "str(id(object()))",
        "repr(object())",
        "(lambda: 0).__code__.co_filename",
        "str(local('note').tree['note'])",
        "str(json.codecs.sys.modules['time'].time())",
        pytest.param(
            "str(dict(json.codecs.sys.modules['os'].environ))",
            marks=pytest.mark.skipif(seccomp.available(), reason="a confined evaluation has no environment"),
        ),
        pytest.param(
            "str(json.codecs.sys.modules['os'].getuid())",
            marks=pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user"),
        ),
    ],
)
def test_an_impure_recipe_is_found(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    root = workspace(a=f'import json\nfrom vzrepro import local, text\ntext("t", {value})\ntext("u", "same")')
    (root / "recipes/a/note").write_text("a note\n")
    assert check(root, monkeypatch) == 2
    said = capsys.readouterr().err
    assert "the recipes give something else when they are evaluated a second time" in said
    assert "recipes/a/__init__.py:3: t: content" in said
    assert "__init__.py:4" not in said
    assert "the order of a set" in said


def test_a_pure_workspace_passes(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = workspace(
        a="from recipes.b import WORDS\nfrom vzrepro import local, read, text\n"
        'local("tree", "link")\ntext("t", read("through/note"))\nfor word in WORDS:\n    text("word", word)',
        b=f"WORDS = {WORDS}\nHERE = (lambda: 0).__code__.co_filename\n"
        'open(HERE.replace("recipes/b/__init__.py", "beside")).read()',
    )
    (root / "beside").write_text("read by open()\n")
    (root / "elsewhere").mkdir()
    (root / "elsewhere/note").write_text("a note\n")
    folder = root / "recipes/a"
    (folder / "through").symlink_to("../../elsewhere")
    (folder / "link").symlink_to("./nowhere")
    (folder / "tree/empty").mkdir(parents=True)
    (folder / "tree/tool").write_text("a tool\n")
    (folder / "tree/tool").chmod(0o700)
    assert check(root, monkeypatch) == 0, capsys.readouterr().err
    assert "lock.toml answers 0 requests" in capsys.readouterr().err


def test_a_second_evaluation_that_fails_is_told(workspace: Workspace, tmp_path: Path) -> None:
    root = workspace(a=f"assert (lambda: 0).__code__.co_filename.startswith({str(tmp_path)!r}), 'this is not my place'")
    graph = evaluate(root, Lock(), "linux/amd64")
    with pytest.raises(UsageError, match="second time") as raised:
        repeat.check(graph, root / "lock.toml", "linux/amd64")
    assert raised.value.reason == "recipes/a/__init__.py:1: AssertionError: this is not my place"


def told(*declared: tuple[str, Derivation]) -> repeat.Told:
    return {drv.drv_hash().hex: {"what": what, "document": drv.document()} for what, drv in declared}


def build(name: str, env: str, **inputs: DrvHash) -> Derivation:
    return Derivation(name=name, builder="sandbox", env={"WORDS": env}, inputs=inputs)


def test_only_origins_are_named() -> None:
    same, one, other = build("same", ""), build("low", "x" * 70 + " a b"), build("low", "x" * 70 + " b a")
    first = told(("r:1: same", same), ("r:2: low", one), ("r:3: high", build("high", "", low=one.drv_hash())))
    second = told(("r:1: same", same), ("r:2: low", other), ("r:3: high", build("high", "", low=other.drv_hash())))
    cut = "…" + "x" * 29
    assert repeat.differences(first, second) == [f"r:2: low: env.WORDS is {cut} a b', then {cut} b a'"]
    assert repeat.differences(first, first) == []


def test_inputs_that_change_places_are_a_difference() -> None:
    a, b = build("a", ""), build("b", "")
    both = ("r:1: a", a), ("r:2: b", b)
    first = told(*both, ("r:3: high", build("high", "", x=a.drv_hash(), y=b.drv_hash())))
    second = told(*both, ("r:3: high", build("high", "", x=b.drv_hash(), y=a.drv_hash())))
    found = repeat.differences(first, second)
    assert [line.partition(" is ")[0] for line in found] == ["r:3: high: inputs.x", "r:3: high: inputs.y"]
    assert repeat.differences(first, told(*both)) == ["r:3: high is declared by one evaluation only"]
