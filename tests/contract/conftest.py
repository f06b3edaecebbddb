"""The implementations of `Backend` that every contract suite runs over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.memory import MemoryBackend
from vzrepro.cache import Backend, DirectoryBackend


@pytest.fixture(params=["memory", "directory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """A new, empty place."""
    if request.param == "memory":
        return MemoryBackend()
    return DirectoryBackend(tmp_path / "caches" / "one")
