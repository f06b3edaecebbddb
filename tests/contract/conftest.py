"""The implementations of `Backend` that every contract suite runs over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.memory import MemoryBackend
from tests.contract.served import ServedBackend, Serving
from vzrepro.cache import Backend, DirectoryBackend


@pytest.fixture(params=["memory", "directory", "http"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """A new, empty place."""
    root = tmp_path / "caches" / "one"
    if request.param == "memory":
        yield MemoryBackend()
    elif request.param == "directory":
        yield DirectoryBackend(root)
    else:
        with Serving(root) as serving:
            yield ServedBackend(root, serving.url)
