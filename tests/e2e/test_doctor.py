"""`vzrepro doctor` says what is here, what is missing, and what is slow."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli

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
