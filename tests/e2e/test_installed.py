"""vzrepro as others install it: the wheel, in a venv of its own, without this checkout; and what they do with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import PROJECT, Cli


@dataclass(frozen=True)
class Installed:
    """A venv that has vzrepro from a wheel. Its store is the project's, where the images are that it needs."""

    programs: Path
    store: Path

    def __call__(self, folder: Path, *words: str, code: int = 0) -> str:
        return self.sh(folder, '"$@"', "vzrepro", *words, code=code)

    def sh(self, folder: Path, script: str, *words: str, code: int = 0) -> str:
        """What a shell that stops at the first failure prints in `folder`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VZREPRO_", "PYTHON"))}
        path = f"{self.programs}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-euc", script, "sh", *words],
            cwd=folder,
            env={**kept, "PATH": path, "VZREPRO_STORE": str(self.store)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, f"exit {done.returncode}, wanted {code}\n{done.stdout}{done.stderr}"
        return done.stdout


def _built(out: Path, umask: int) -> dict[str, Path]:
    """sdist and wheel of this checkout, as `python -m build` makes them with the packages of the tests' venv."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(PROJECT)]
    kept = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(command, env=kept, umask=umask, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(tmp_path_factory.mktemp("dist"), 0o022)[".whl"]


@pytest.fixture(scope="module")
def installed(wheel: Path, project: Cli, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, with_pip=True)
    # What pip would choose today need not be what the locks have been tested with.
    pins = re.findall(r"^([a-z0-9-]+==[^ \\]+)", (PROJECT / "requirements.lock").read_text(), re.MULTILINE)
    (place / "constraints").write_text("\n".join(pins))
    pip = [
        str(place / "bin/pip"),
        "install",
        "--quiet",
        "--no-compile",
        "--only-binary",
        ":all:",
        "-c",
        str(place / "constraints"),
    ]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    project.realize("image-c", "image-rust", "image-tools", "audit-tools")
    return Installed(place / "bin", project.store)


def test_sdist_and_wheel_are_the_same_bytes_twice(wheel: Path, tmp_path: Path) -> None:
    first, second = _built(tmp_path / "one", 0o022), _built(tmp_path / "two", 0o077)
    assert first.keys() == {".gz", ".whl"}
    for kind, path in first.items():
        assert path.read_bytes() == second[kind].read_bytes(), path.name
    assert first[".whl"].read_bytes() == wheel.read_bytes()


def test_the_wheel_has_what_recipes_and_audits_need_and_nothing_of_the_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        build_sh = archive.getinfo("vzrepro/recipes/files/kernel/build.sh")
    tracked = subprocess.run(["git", "-C", PROJECT, "ls-files", "vzrepro"], capture_output=True, text=True, check=True)
    assert {name for name in names if ".dist-info/" not in name} == {*tracked.stdout.split(), "vzrepro/COMMIT"}
    assert build_sh.external_attr >> 16 & 0o111, "its bit is part of what is hashed"


def test_the_version_names_the_commit(installed: Installed, tmp_path: Path) -> None:
    here = subprocess.run([sys.executable, "-m", "vzrepro", "--version"], capture_output=True, text=True, check=True)
    assert installed(tmp_path, "--version") == here.stdout
    assert re.search(r"\([0-9a-f]{12}(-dirty)?\)\n$", here.stdout)


def test_it_is_not_this_checkout(installed: Installed, tmp_path: Path) -> None:
    told = installed.sh(tmp_path, f'"{installed.programs}/python" -c "import vzrepro; print(vzrepro.__file__)"')
    assert Path(told.strip()).is_relative_to(installed.programs.parent)


def test_without_its_extra_a_bill_of_materials_says_what_to_install(installed: Installed, tmp_path: Path) -> None:
    installed(tmp_path, "init", "w")
    assert "pip install license-expression" in installed.sh(tmp_path / "w", "vzrepro sbom hello 2>&1", code=2)


def test_the_page_about_the_first_artifact_works(installed: Installed, tmp_path: Path) -> None:
    page = (PROJECT / "docs/first-artifact.md").read_text()
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    assert script.count("vzrepro ") > 6
    said = installed.sh(tmp_path, script)
    assert "hello\n" in said
    assert re.search(r"^hello +REPRODUCED", said, re.MULTILINE), said
    assert "src" in said, "why names the input that changed"


def test_the_example_is_built_and_audited(installed: Installed, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    shutil.copytree(PROJECT / "examples/static-tools", root, ignore=shutil.ignore_patterns("store"))
    installed(root, "lock", "--check")
    release = Path(installed(root, "realize", "release").strip())
    sums = dict(reversed(line.split()) for line in (release / "SHA256SUMS").read_text().splitlines())
    page = (release / "index.html").read_text()
    for name in ("crc", "rot13"):
        program = release / name
        assert sums[name] == hashlib.sha256(program.read_bytes()).hexdigest()
        assert sums[name] in page
        kind = subprocess.run(["file", "-b", program], capture_output=True, text=True, check=False).stdout
        assert not kind or "statically linked" in kind or "static-pie" in kind
    turned = subprocess.run([release / "rot13"], input="Hello, 1!\n", capture_output=True, text=True, check=True)
    assert turned.stdout == "Uryyb, 1!\n"
    counted = subprocess.run([release / "crc"], input="123456789", capture_output=True, text=True, check=True)
    assert counted.stdout == "cbf43926\n"  # the check value of CRC-32 in every catalogue
    report = tmp_path / "report"
    installed(root, "audit", "release", "--quick", "--fresh", "--report", str(report))
    nodes = {node["target"]: node for node in json.loads((report / "report.json").read_text())["nodes"]}
    for name in ("crc", "rot13", "release"):
        assert nodes[name]["verdict"] == "REPRODUCED", nodes[name]
