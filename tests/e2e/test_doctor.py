"""`vzrepro doctor` says what is here, what is missing, and what is slow."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from tests.e2e.conftest import PROJECT, Cli

INFO = {"ServerVersion": "20.10.24", "CgroupVersion": "1", "NCPU": 2, "MemTotal": 8 << 30}


def _doctor(cli: Cli, engine: str) -> tuple[str, str]:
    """What is said of the container engine, and the error. The rest of a small workspace may be out of order."""
    cli.env["VZREPRO_DOCKER"] = engine
    with cli.start("doctor") as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode in (0, 1)
    [line] = [line for line in out.splitlines() if line.startswith("container engine")]
    return line, err


@pytest.mark.parametrize(("driver", "slow"), [("overlay2", False), ("fuse-overlayfs", True), ("vfs", True)])
def test_a_slow_storage_driver_is_told(small: Cli, tmp_path: Path, driver: str, slow: bool) -> None:
    script = tmp_path / "docker"
    script.write_text(f"#!/bin/sh\necho {shlex.quote(json.dumps({**INFO, 'Driver': driver}))}\n")
    script.chmod(0o755)
    line, error = _doctor(small, str(script))
    assert f"docker 20.10.24, {driver}" in line
    assert ("slow" in line and "docs/sandbox.md" in line) == slow
    assert "container engine" not in error


def test_a_missing_engine_is_told_with_what_to_type(small: Cli) -> None:
    line, error = _doctor(small, "no-such-client-anywhere")
    assert "FAILED" in line and "apt-get install" in line
    assert "not in order: container engine" in error


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("dockerd") is None or "\toverlay\n" not in Path("/proc/filesystems").read_text(),
    reason="only root can start a Docker daemon, and the kernel must have overlayfs",
)
def test_a_second_daemon_is_started_as_the_page_says() -> None:
    [block] = re.findall(r"```sh\n(.*?)```", (PROJECT / "docs/sandbox.md").read_text(), re.DOTALL)
    # On a disk, since overlayfs does not lie on itself; short, since a socket's path is.
    with tempfile.TemporaryDirectory(prefix="vz", dir="/var/tmp") as folder:
        script = block.replace("/var/lib/docker2", f"{folder}/lib").replace("/run/docker2", f"{folder}/run")
        assert script.count(folder) == 7
        answers = "until docker info --format '{{.Driver}}' 2>/dev/null; do kill -0 $! || exit; sleep 0.1; done"
        shell = f"{script}\n{answers}\nkill $!\nwait $!\n"
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=PATIENCE_SECS, check=False)
    assert done.stdout.strip() == "overlay2", done.stderr
