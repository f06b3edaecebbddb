"""./run from nothing: it makes .venv from the lock, once, keeps stdout clean, and mends what was interrupted.

Needs a package index or pip's cache; no Docker.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOME = "".join(re.findall(r"^(?:click|zstandard)==.*(?:\n    .*)*\n", (ROOT / "requirements.lock").read_text(), re.M))
SAYS = """\
    import site, sys
    site.main()  # the start script leaves it to the program
    import vzrepro, zstandard
    print(sys.argv[1:], vzrepro.__file__)
    """


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the launcher and the locks, with a program in vzrepro's place that says how it was called."""
    root = tmp_path_factory.mktemp("launcher") / "a clone"
    (root / "vzrepro").mkdir(parents=True)
    shutil.copy(ROOT / "run", root / "run")
    # Two of the lock's packages stand for all: those that run the tests came from the whole of it the same way.
    (root / "requirements.lock").write_text(SOME)
    (root / "vzrepro" / "__init__.py").write_text("")
    (root / "vzrepro" / "__main__.py").write_text(f"def main():\n{textwrap.indent(textwrap.dedent(SAYS), '    ')}")
    yield root
    shutil.rmtree(root)


def run(clone: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [clone / "run", *arguments],
        cwd=clone.parent,
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def said(clone: Path, *arguments: str) -> str:
    return f"{list(arguments)} {clone / 'vzrepro' / '__init__.py'}\n"


@pytest.mark.thorough
def test_set_up_is_done_once_mended_and_redone(clone: Path) -> None:
    first = subprocess.Popen(
        [clone / "run", "targets"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(clone.glob(".venv/lib/*/site-packages/pip")):
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.communicate()[0] == b""

    pair = [
        subprocess.Popen([clone / "run", "targets", word], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for word in ("a b", "*")
    ]
    outputs = [process.communicate() for process in pair]
    assert [out for out, _ in outputs] == [said(clone, "targets", "a b"), said(clone, "targets", "*")], outputs
    assert sum("making .venv" in err for _, err in outputs) == 1, "both made it, or none"

    start = clone / ".venv" / "bin" / "vzrepro"
    again = run(clone, "--help")
    assert (again.stdout, again.stderr, again.returncode) == (said(clone, "--help"), "", 0)
    direct = subprocess.run([start, "x"], capture_output=True, text=True, check=True, cwd="/")
    assert direct.stdout == said(clone, "x")

    # Nothing is installed while nothing changes, so a pip that cannot work is not noticed; after a change it is.
    with (clone / "requirements.lock").open("a") as lock:
        lock.write("not-hashed==1.0\n")
    changed = run(clone, "targets")
    assert (changed.stdout, changed.returncode) == ("", 105)
    assert "error: the Python packages of requirements.lock could not be installed" in changed.stderr
    (clone / "requirements.lock").write_text(SOME)
    mended = run(clone, "targets")
    assert mended.stdout == said(clone, "targets")
    assert "making .venv" in mended.stderr

    # The same folder elsewhere: scripts in a .venv hold its path.
    moved = clone.rename(clone.with_name("moved"))
    try:
        elsewhere = run(moved, "targets")
        assert elsewhere.stdout == said(moved, "targets")
        assert "making .venv" in elsewhere.stderr
    finally:
        moved.rename(clone)


@pytest.fixture
def bare_path(tmp_path: Path) -> str:
    """A PATH with a shell's usual programs, without Docker and without apt."""
    tools = ("sh", "cmp", "id", "sed", "tr", "cat", "rm", "cp", "flock", "sleep", "uname")
    for name in tools:
        found = shutil.which(name)
        assert found, name
        (tmp_path / name).symlink_to(found)
    return str(tmp_path)


def test_missing_programs_are_named_and_nothing_is_done(clone: Path, bare_path: str) -> None:
    done = run(clone, "realize", "busybox", PATH=bare_path, VZREPRO_DOCKER="")
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("error: missing on this machine: docker\n  hint: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="hides this machine's daemon, which needs root")
@pytest.mark.parametrize(
    ("context", "error"), [("far", "no Python 3.11 or later"), ("default", "missing on this machine: docker")]
)
def test_a_daemon_that_a_context_leads_to_is_not_looked_for_here(
    clone: Path, bare_path: str, context: str, error: str
) -> None:
    docker = Path(bare_path) / "docker"
    docker.write_text(f'#!/bin/sh\n[ "$1" = context ] && echo {context}\n')
    docker.chmod(0o755)
    script = 'mount -t tmpfs tmpfs /run && PATH=$1 exec "$2" shell busybox'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", bare_path, clone / "run"]
    environ = {**os.environ, "VZREPRO_DOCKER": "", "DOCKER_HOST": "", "DOCKER_CONTEXT": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.stderr.startswith(f"error: {error}"), done.stderr


def test_the_fast_tests_need_no_programs(clone: Path, bare_path: str) -> None:
    every = run(clone, "test", "--all", PATH=bare_path, VZREPRO_DOCKER="")
    qemu = "" if platform.machine() == "x86_64" else "qemu "  # there the store has one
    assert f"docker {qemu}git cpio nix chromium" in every.stderr.splitlines()[0]
    fast = run(clone, "test", "--fast", PATH=bare_path, VZREPRO_DOCKER="")
    assert fast.stderr.startswith("error: no Python 3.11 or later")  # the first thing that it needs


def test_a_machine_without_python_is_told_so(clone: Path, bare_path: str) -> None:
    shutil.rmtree(clone / ".venv", ignore_errors=True)
    done = run(clone, "targets", PATH=bare_path)
    assert (done.stdout, done.returncode) == ("", 2)
    assert done.stderr.startswith("error: no Python 3.11 or later")
