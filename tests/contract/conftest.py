"""The implementations of `Backend` that every contract suite runs over."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import servers
from tests.contract.agents import agent, agent_program, guest_side, host_side, realized, side  # noqa: F401
from tests.contract.memory import MemoryBackend
from tests.contract.served import ServedBackend, Serving
from vzrepro.cache import Backend, DirectoryBackend
from vzrepro.cache.remote import Patience
from vzrepro.cache.s3 import S3Backend


@pytest.fixture
def bucket() -> str:
    """The name of a bucket that nobody has."""
    return f"bucket-{uuid.uuid4().hex}"


@pytest.fixture(params=["memory", "directory", "http", "seaweed", "rclone"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """A new, empty place."""
    root = tmp_path / "caches" / "one"
    if request.param == "memory":
        yield MemoryBackend()
    elif request.param == "directory":
        yield DirectoryBackend(root)
    elif request.param == "seaweed":
        # A prefix is a place like a whole bucket, and made in no time.
        request.getfixturevalue("credentials")
        server: servers.S3Server = request.getfixturevalue("seaweed")
        yield S3Backend(server.url("common", uuid.uuid4().hex), Patience())
    elif request.param == "rclone":
        request.getfixturevalue("credentials")
        server = request.getfixturevalue("rclone")
        backend = S3Backend(server.url(request.getfixturevalue("bucket")), Patience())
        backend.create_bucket_if_missing()
        yield backend
    else:
        with Serving(root) as serving:
            yield ServedBackend(root, serving.url)
