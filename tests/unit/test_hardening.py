"""Hardening checks: a failure needs a reason, a reason needs a failure; and what is checked is what guests get."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vzrepro.guest.vm import qemu

RECIPES = Path(__file__).parents[2] / "recipes"
HARDENING = RECIPES / "hardening"
SCRIPT = RECIPES.parent / "vzrepro/recipes/files/hardening/check.py"


def load(path: Path) -> ModuleType:
    """A file of a recipe as a module, without evaluating the recipe itself."""
    spec = importlib.util.spec_from_file_location(f"hardening_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load(SCRIPT)


def result(option: str, wanted: str, *, holds: bool, kind: str = "kconfig") -> dict[str, Any]:
    said = "OK" if holds else 'FAIL: "n"'
    return {
        "option_name": option,
        "type": kind,
        "reason": "self_protection",
        "decision": "kspp",
        "desired_val": wanted,
        "check_result": said,
        "check_result_bool": holds,
    }


def test_a_failure_with_its_reason_is_reported() -> None:
    reasons, wrong = check.parse_reasons("x.reasons", "# why\n\nsysctl a.b = is not set: nobody: really\n")
    assert (reasons, wrong) == ({("sysctl", "a.b", "is not set"): "nobody: really"}, [])
    results = [result("A", "y", holds=True), result("a.b", "is not set", holds=False, kind="sysctl")]
    report, problems = check.judge(results, reasons)
    assert problems == []
    assert (report["checked"], report["hold"], report["fail"]) == (2, 1, 1)
    assert [line.get("reason") for line in report["checks"]] == [None, "nobody: really"]


def test_a_failure_and_a_reason_that_stand_alone() -> None:
    results = [result("A", "y", holds=False), result("B", "y", holds=True), result("C", "2", holds=False)]
    reasons = {
        ("kconfig", "B", "y"): "no",
        ("kconfig", "C", "1"): "another value",
        ("sysctl", "A", "y"): "another type",
    }
    _, problems = check.judge(results, reasons)
    assert problems == [
        'kconfig A = y: FAIL: "n", and no reason',
        "kconfig B = y: does not fail; drop its reason",
        "kconfig C = 1: does not fail; drop its reason",
        'kconfig C = 2: FAIL: "n", and no reason',
        "sysctl A = y: does not fail; drop its reason",
    ]


@pytest.mark.parametrize(
    "line", ["CONFIG_A = y: why", "kconfig CONFIG_A: why", "kconfig CONFIG_A = y", "kconfig CONFIG_A = y:"]
)
def test_a_line_that_is_no_reason(line: str) -> None:
    reasons, [problem] = check.parse_reasons("x.reasons", f"\n{line}\n")
    assert reasons == {}
    assert problem.startswith("x.reasons:2: not a reason")


def test_a_reason_is_given_once() -> None:
    _, [problem] = check.parse_reasons("x.reasons", "kconfig A = y: why\nkconfig A = y: because\n")
    assert problem == "x.reasons:2: A = y has a reason already"


def test_the_recipes_reasons_are_readable() -> None:
    reasons, wrong = check.parse_reasons("container.reasons", (HARDENING / "container.reasons").read_text())
    assert wrong == []
    assert {kind for kind, _, _ in reasons} == {"kconfig", "cmdline", "sysctl"}


def test_no_sysctl_is_both_set_and_a_default() -> None:
    set_by_init, defaults = (
        check.settings([path.read_text()])
        for path in (RECIPES / "initramfs/sysctl.conf", HARDENING / "sysctl.defaults")
    )
    assert set_by_init
    assert defaults
    assert not set_by_init.keys() & defaults.keys()


def test_the_checked_command_line_is_the_one_guests_get() -> None:
    checked = (HARDENING / "command-line").read_text(encoding="utf-8").strip()
    assert qemu.Guest(Path("k"), Path("i")).command_line == checked


CHECKER = """\
import json, sys
text = open(sys.argv[sys.argv.index("-s") + 1]).read()
holds = text == "a.b = 1\\n"
print(json.dumps([dict(option_name="a.b", type="sysctl", reason="", decision="", desired_val="1",
                       check_result="OK" if holds else "FAIL: " + repr(text), check_result_bool=holds)]))
"""


def test_the_program_writes_a_report_only_of_what_is_explained(tmp_path: Path) -> None:
    (tmp_path / "checker/bin").mkdir(parents=True)
    (tmp_path / "checker/bin/kernel-hardening-checker").write_text(CHECKER)
    for name, text in {"config": "", "line": "quiet\n", "one": "# comment\na.b = 0\n", "two": "a.b = 1\n"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "reasons").write_text("")
    command = [sys.executable, str(SCRIPT), "--checker", "checker", "--config", "config"]
    command += ["--command-line", "line", "--reasons", "reasons", "--out", "report.json", "--sysctl"]

    done = subprocess.run([*command, "one"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "sysctl a.b = 1: FAIL" in done.stdout
    assert not (tmp_path / "report.json").exists()

    subprocess.run([*command, "one", "two"], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "report.json").read_text())["hold"] == 1
