"""Fixtures every kind of test shares."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import servers
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.lock import Lock

Workspace = Callable[..., Path]

# Tests may load gRPC before `vzrepro.guest.vm.agent` does, which says why this is so.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# How long an example takes says something of the machine and nothing of the code.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")


LONGEST = """
    e2e/test_audit.py contract/test_agent_load.py e2e/test_cache.py e2e/test_crates.py e2e/test_probe.py e2e/test_oci.py
    e2e/test_host_boot.py e2e/test_realize.py e2e/test_vm_exec.py contract/test_hostile.py e2e/test_audit_axes.py
    e2e/test_oci_kept.py contract/test_agent_exec.py contract/test_agent_oci.py contract/test_agent_attach.py
    e2e/test_votes.py e2e/test_sandbox.py contract/test_s3.py
""".split()
"""Files that take minutes, the longest first. What a full run says of its files tells whether this is still so."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, and end with the quick ones: so all workers end at about the same time,
    and none is left alone with a file of minutes."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}

    def rank(item: pytest.Item) -> int:
        name = item.nodeid.partition("::")[0].removeprefix("tests/")
        return ranks.get(name, len(ranks) + name.startswith("unit/"))

    items.sort(key=rank)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Archives that are made while tests are collected have times in them, and all workers must name a test alike."""
    return "bytes" if isinstance(val, bytes) and len(val) > 16 else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where pytest shows the slowest tests, show the slowest files, too: the seconds of all their tests and set-ups."""
    wanted: int | None = terminalreporter.config.getoption("durations")
    if wanted is None:
        return
    secs: Counter[str] = Counter()
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            secs[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.write_sep("=", f"slowest {wanted} files" if wanted else "slowest files")
    for name, spent in secs.most_common(wanted or None):
        terminalreporter.write_line(f"{spent:.2f}s {name}")
    terminalreporter.write_line(f"{secs.total():.2f}s in all")


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
