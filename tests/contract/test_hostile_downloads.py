"""Mirrors that break, stall and lie, over real sockets: the right file arrives, or an error, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import faults, servers
from tests.contract.served import Serving
from tests.contract.test_hostile import ON_THE_WAY, Comes, dripping_miss, flipped, little_memory
from tests.faults import Fault, FaultyProxy
from vzrepro.base.errors import HashMismatch, RemoteError
from vzrepro.base.model import FileHash
from vzrepro.sources.fetch import RetryPolicy, download

DATA = os.urandom(1000) * 700
SHA = FileHash.of(DATA)
HASTY = RetryPolicy(
    tries=2, backoff_secs=0.05, connect_secs=1.0, read_secs=0.4, total_secs=1.0, slow_secs=0.4, min_speed=1 << 20
)
"""For what must fail; the file's own transfer time, which it is given besides, is less than a second."""
PATIENT = RetryPolicy(backoff_secs=0.05, read_secs=1.0, slow_secs=3.0)

SAID_WITHOUT_NEED = ("a Content-Length that is none", "a Content-Length of 5,000 digits")
"""What is no fault where the file's size is known."""


@dataclass(frozen=True)
class Case:
    """Something that goes wrong on the way from a mirror; `right`: the file arrives all the same, if its `size` is
    known."""

    name: str
    right: bool
    each: tuple[Fault, ...]
    size: int | None = len(DATA)


CASES = [
    *(Case(name, comes is Comes.RIGHT or name in SAID_WITHOUT_NEED, tuple(each)) for name, comes, *each in ON_THE_WAY),
    *(
        Case(f"{name}, size unknown", False, tuple(each), None)
        for name, _comes, *each in ON_THE_WAY
        if name in SAID_WITHOUT_NEED
    ),
    Case("404", False, (faults.status(404),)),
    Case("410", False, (faults.status(410),)),
    Case("403", False, (faults.status(403),)),
    Case("cut off again and again", True, (faults.cuts(99_999),)),
    Case("cut short with a length that fits", False, (faults.shortens(200),)),
    Case("a byte of the 404 now and then", False, (dripping_miss,)),
    Case("knows no ranges", True, (faults.cuts(99_999), faults.ignores_ranges)),
    Case("tells no lengths", True, (faults.without_lengths,)),
    Case("another range than the one asked for", True, (faults.cuts(99_999), faults.shifts_ranges, faults.passes)),
    Case("an impossible Content-Range", False, (faults.headers(content_range="bytes ²-³/x"),)),
    Case("another ETag in the middle", True, (faults.cuts(99_999), faults.headers(etag='"another"'), faults.passes)),
    Case("an endless file", False, (faults.endless(bytes(1 << 16)),)),
    Case("cut short with a length that fits, size unknown", False, (faults.shortens(200),), None),
    Case("tells no lengths, size unknown", True, (faults.without_lengths,), None),
    Case("data after the end, size unknown", False, (faults.changes(lambda data: data + b"junk"),), None),
    Case("one bit flipped", False, (faults.changes(flipped),)),
    Case("empty", False, (faults.changes(lambda data: b""),)),
    Case("data after the end", False, (faults.changes(lambda data: data + b"junk"),)),
]


def tried(world: FaultyProxy, urls: list[str], dest: Path, policy: RetryPolicy, size: int | None) -> bool:
    """Whether the file arrives; asserts all that holds whatever happens."""
    begun = time.monotonic()
    try:
        with little_memory():
            download(urls, dest, sha256=SHA, size=size, policy=policy)
    except (RemoteError, HashMismatch) as error:
        assert not dest.exists()
        assert all(line.isprintable() and len(line) < 1000 for line in str(error).splitlines())
        return False
    finally:
        assert time.monotonic() - begun < 60, "waits and waits"
        assert not world.swallowed, "takes in what never ends"
    assert dest.read_bytes() == DATA
    return True


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    (tmp_path / "served" / "nar").mkdir(parents=True)
    (tmp_path / "served" / "nar" / "file").write_bytes(DATA)
    return Serving(tmp_path / "served")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_right_file_or_an_error(case: Case, serving: Serving, tmp_path: Path) -> None:
    with serving, FaultyProxy(serving.url) as world:
        world.on("*", *case.each)
        arrived = tried(world, [f"{world.url}/nar/file"], tmp_path / "f", PATIENT if case.right else HASTY, case.size)
        assert arrived is case.right


@pytest.mark.parametrize("case", [case for case in CASES if not case.right and case.size], ids=lambda case: case.name)
def test_the_next_mirror_has_it(case: Case, serving: Serving, tmp_path: Path) -> None:
    with serving, FaultyProxy(serving.url) as world:
        world.on("*", *case.each)
        assert tried(world, [f"{world.url}/nar/file", f"{serving.url}/nar/file"], tmp_path / "f", PATIENT, len(DATA))


def no_such_host(url: str) -> str:
    return "http://mirror.invalid/nar/file"


def no_tls(url: str) -> str:
    return url.replace("http:", "https:")


@pytest.mark.parametrize("change", [no_such_host, no_tls])
def test_no_server(change: Callable[[str], str], serving: Serving, tmp_path: Path) -> None:
    with serving, FaultyProxy(serving.url) as world, servers.refusing() as port:
        for url in (change(f"{world.url}/nar/file"), f"http://127.0.0.1:{port}/nar/file"):
            assert not tried(world, [url], tmp_path / "f", HASTY, len(DATA))
            assert tried(world, [url, f"{serving.url}/nar/file"], tmp_path / "g", PATIENT, len(DATA))
            (tmp_path / "g").unlink()


def test_a_redirect_to_another_host_is_followed_and_to_a_file_not(serving: Serving, tmp_path: Path) -> None:
    with serving, FaultyProxy(serving.url) as world:
        url = world.serve_at("elsewhere", faults.redirects(f"{serving.url}/nar/file"))
        assert tried(world, [url], tmp_path / "f", PATIENT, len(DATA))
        url = world.serve_at("file", faults.redirects((tmp_path / "f").as_uri()))
        assert not tried(world, [url], tmp_path / "g", HASTY, len(DATA))


def test_the_names_of_the_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
