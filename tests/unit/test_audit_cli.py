"""What `vzrepro audit` and its neighbours say when they are asked wrongly, or cannot write what they found."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from vzrepro import cli, sandbox
from vzrepro.base.errors import NotDeterministic
from vzrepro.base.signing import SigningKey
from vzrepro.cli import audit
from vzrepro.proof.audit.records import Records
from vzrepro.recipe import lock
from vzrepro.recipe.evaluate import evaluate

PROJECT = Path(__file__).resolve().parents[2]
RECIPE = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, text

build("thing", image=TOOLS_IMAGE, command=["true"], inputs={"note": text("note", "hello")})
"""
RUNTIME = sandbox.Runtime("docker", "docker", "28", "28", 2, "overlay2", False, 2, 8 << 30)


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store path of a text in a workspace of its own: what can be audited in no time, without Docker."""
    root = tmp_path / "work"
    shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
    shutil.copy(PROJECT / "lock.toml", root)
    (root / "recipes" / "thing").mkdir()
    (root / "recipes" / "thing" / "__init__.py").write_text(RECIPE)
    for name in [name for name in os.environ if name.startswith("VZREPRO_")]:
        monkeypatch.delenv(name)
    for name, value in (
        ("VZREPRO_STORE", tmp_path / "store"),
        ("VZREPRO_MACHINE_CACHE", "false"),
        ("VZREPRO_KEY_DIR", tmp_path / "keys"),
        ("XDG_CACHE_HOME", tmp_path / "xdg"),
        ("XDG_CONFIG_HOME", tmp_path / "config"),
        ("VZREPRO_CACHE_PATIENCE_SECS", "1"),
    ):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(root)
    monkeypatch.setattr(sandbox, "check", lambda: RUNTIME)
    graph = evaluate(root, lock.load(root / "lock.toml"), "linux/amd64")
    return next(str(node.path) for node in graph.nodes.values() if node.path.name == "note")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    code = ended.value.code
    assert isinstance(code, int)
    return code


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_report_is_named_where_it_was_asked_for(
    note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", note, "--report", str(tmp_path / "report")) == 0
    said = capsys.readouterr().out
    assert f"report in {tmp_path / 'report' / 'index.html'}" in said
    assert "UNTESTED: 1 local tree (" in said
    assert {each.name for each in (tmp_path / "report").iterdir()} == {"index.html", "report.json"}
    assert run("audit", "show", "", "--report", "/proc/report") == 2


@pytest.mark.parametrize("verb", [[], ["show"]])
def test_a_directory_that_cannot_be_written_is_told_first(
    note: str, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    assert run("audit", *verb, note, "--report", "/proc/report") == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: no report can be written to /proc/report\n  reason: No such file or directory\n")
    assert told.out == ""


def test_a_report_that_cannot_be_written_loses_neither_table_nor_verdict(
    note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = ("--report", str(tmp_path / "report"))
    monkeypatch.setattr(shutil, "copyfile", full)
    assert run("audit", note, *report) == 1
    told = capsys.readouterr()
    assert "audit " in told.out
    assert f"error: the report cannot be written to {tmp_path / 'report'}\n  reason: No space left" in told.err
    assert "hint: it is kept: vzrepro audit show" in told.err
    monkeypatch.setattr(audit, "_failure", lambda *_: NotDeterministic("not reproducible: note"))
    assert run("audit", note, *report) == 104
    told = capsys.readouterr()
    assert f"warning: the report cannot be written to {tmp_path / 'report'}: No space left" in told.err
    assert "error: not reproducible: note" in told.err


def test_a_report_that_cannot_even_be_kept(
    note: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Records, "keep_report", full)
    assert run("audit", note) == 1
    told = capsys.readouterr()
    assert told.out.splitlines()[-1].endswith(": UNTESTED")
    assert "No space left" in told.err


def test_a_cache_that_was_to_be_compared_with_and_does_not_answer(
    note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("audit", note, "--against", "http://127.0.0.1:9/x") == 105
    told = capsys.readouterr()
    assert "error: not everything could be compared with --against\n  reason: http://127.0.0.1:9/x " in told.err
    assert "report in " in told.out


def test_errors_are_objects_under_json(note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("audit", note, "--json", "--axes", ",") == 2
    told = capsys.readouterr()
    assert json.loads(told.out) | {"time": ""} == {
        "event": "error",
        "time": "",
        "message": "--axes names no axis",
        "reason": None,
        "hint": "with nothing varied: --axes repeat",
        "exit_code": 2,
    }
    assert told.err == ""


def test_keys_that_are_none(note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.key"
    assert run("audit", note, "--key", str(file)) == 2
    assert f"hint: make one: vzrepro key generate NAME --out {file}\n" in capsys.readouterr().err
    file.touch(mode=0o600)
    file.write_text("junk")
    assert run("audit", note, "--key", str(file)) == 2
    assert f"error: {file}: this is not a secret key\n" in capsys.readouterr().err
    file.write_text(str(SigningKey.generate("me-1").public))
    assert run("audit", note, "--key", str(file)) == 2
    assert f"error: {file}: this is not a secret key\n" in capsys.readouterr().err


def test_what_cannot_be_written_is_named(note: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sbom", "thing", "--format", "spdx", "--output", "/proc/bill") == 1
    assert "error: /proc/bill cannot be written\n" in capsys.readouterr().err
    # Trouble, not a difference: as diff(1).
    assert run("diff", "recipes", "lock.toml", "--html", "--output", "/nowhere/page.html") == 2
    assert "error: no page can be written to /nowhere/page.html\n" in capsys.readouterr().err
