"""Fixtures every kind of test shares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vzrepro.evaluate import DrvGraph, evaluate
from vzrepro.lock import Lock

Workspace = Callable[..., Path]


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
