"""Fixtures every kind of test shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import servers
from vzrepro.evaluate import DrvGraph, evaluate
from vzrepro.lock import Lock

Workspace = Callable[..., Path]

# Tests may load gRPC before `vzrepro.vm.agent` does, which says why this is so.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# How long an example takes says something of the machine and nothing of the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


@pytest.fixture
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in memory where there is one, for what syncs: a kill is no power cut, so waiting for a disk proves
    nothing."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir=shm) as directory:
        yield Path(directory)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Make a workspace: `workspace(a="…", b="…")` writes recipes/a/__init__.py and so on, and returns its root."""

    def make(**recipes: str) -> Path:
        root = tmp_path / "workspace"
        for name, source in recipes.items():
            folder = root / "recipes" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text(source)
        return root

    return make


@pytest.fixture
def declare(workspace: Workspace) -> Callable[..., DrvGraph]:
    """Evaluate recipes without a lock: `declare(a="…")` gives the graph."""

    def run(**recipes: str) -> DrvGraph:
        return evaluate(workspace(**recipes), Lock(), "linux/amd64", lenient=True)

    return run


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """A SeaweedFS of this test worker's own; bucket `common` is there, for places with prefixes of their own."""
    with servers.seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        servers.make_bucket(server, "common")
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    """An rclone S3 server of this test worker's own, which asks nobody for credentials."""
    with servers.rclone(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the credentials for the S3 servers in the environment, and none of this machine's user."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in servers.CREDENTIALS.items():
        monkeypatch.setenv(name, value)
