"""What linters and house rules say about the whole tree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import LONGEST

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "vzrepro").rglob("*.py"))


def run(*command: str | Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_mypy(platform: str) -> None:
    # A cache for each: one for both would be written anew every time.
    run(sys.executable, "-m", "mypy", "--platform", platform, "--cache-dir", f".mypy_cache/{platform}")


@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    interpreter = (ROOT / script).read_text().splitlines()[0].removeprefix("#!").split()
    run(*interpreter, "-n", ROOT / script)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["run", ".ci/run"])
def test_shellcheck(script: str) -> None:
    run("shellcheck", ROOT / script)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.relative_to(ROOT)))
def test_a_module_says_its_job_and_has_a_telling_name(module: Path) -> None:
    tree = ast.parse(module.read_bytes())
    assert ast.get_docstring(tree), "has no docstring"
    assert module.stem not in {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}


def test_only_the_console_and_the_no_op_path_print() -> None:
    printing = re.compile(r"\bprint\(|\bsys\.(?:stdout|stderr)\.write\b")
    found = {str(module.relative_to(ROOT)) for module in MODULES if printing.search(module.read_text())}
    # Programs that are put into a sandbox, and never imported.
    in_a_sandbox = {"vzrepro/proof/audit/looker.py", *(name for name in found if "/recipes/files/" in name)}
    assert found <= {"vzrepro/console.py", "vzrepro/__main__.py", *in_a_sandbox}


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []


def locked(name: str) -> dict[str, str]:
    """Package → version of a lock; fails on an entry without a hash and on anything that names an index."""
    text = (ROOT / name).read_text()
    packages = {}
    for entry in re.split(r"\n(?=[a-z])", re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE).strip()):
        match = re.match(r"([a-z0-9-]+)==(\S+)(?: ; [^\\]+)? \\\n", entry)
        assert match, entry
        assert re.search(r"--hash=sha256:[0-9a-f]{64}$", entry), entry
        packages[match[1]] = match[2]
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE), "an option"
    return packages


def test_the_locks_answer_what_pyproject_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    plain, test = locked("requirements.lock"), locked("requirements-test.lock")
    extras = project["optional-dependencies"]
    declared = [(plain, line) for line in (*project["dependencies"], *extras["sbom"])]
    declared += [(test, line) for line in (*extras["farm"], *extras["test"])]
    for lock, line in declared:
        wanted = Requirement(line)
        if wanted.marker is None or Marker(str(wanted.marker)).evaluate():
            assert wanted.specifier.contains(Version(lock[canonicalize_name(wanted.name)])), line
    # `./run test` installs the second lock into the environment made from the first.
    assert test | plain == test
