"""A stock Nix client reads a cache that `cache serve` serves, also through a connection that breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import faults
from tests.contract.served import Serving
from tests.e2e.test_nix_client import KEY, Nix, bundle
from tests.faults import FaultyProxy
from vzrepro import nar
from vzrepro.cache import BinaryCache, DirectoryBackend, TrustedKeys
from vzrepro.model import ObjectInfo


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path / "nix")


@pytest.fixture
def pushed(tmp_path: Path) -> ObjectInfo:
    info, tree, derivation = bundle(tmp_path)
    log = tmp_path / "log"
    log.write_text("make vmlinux\n")
    cache = BinaryCache(DirectoryBackend(tmp_path / "cache"), TrustedKeys([KEY.public]), KEY)
    cache.push(info, tree, derivation=derivation, log=log)
    return info


@pytest.fixture
def url(tmp_path: Path, pushed: ObjectInfo) -> Iterator[str]:
    with Serving(tmp_path / "cache") as serving:
        yield serving.url


def arrived(nix: Nix, info: ObjectInfo) -> bool:
    return nar.nar_hash(nix.root / str(info.path).lstrip("/")) == (info.nar_hash, info.nar_size)


def test_nix_reads_what_is_served(nix: Nix, pushed: ObjectInfo, url: str) -> None:
    path = pushed.path
    assert "vzrepro-test-1:" in nix.ok("nix", "path-info", "--store", url, "--sigs", path)
    nix.ok("nix", "copy", "--from", url, "--to", nix.root, path)
    nix.ok("nix", "store", "verify", "--store", nix.root, "-r", "--sigs-needed", "1", path)
    assert arrived(nix, pushed)
    assert nix.ok("nix", "log", "--store", url, path) == "make vmlinux\n"
    assert nix.ok("nix", "store", "cat", "--store", url, f"{path}/bin/run") == f"#!{path}/bin/run\n"
    assert nix.run("nix", "path-info", "--store", url, str(path).replace(path.hash_part, "0" * 32)).returncode != 0


def test_nix_goes_on_where_a_connection_broke(nix: Nix, pushed: ObjectInfo, url: str) -> None:
    with FaultyProxy(url) as proxy:
        proxy.on("/nar/*", faults.cuts(5000), faults.passes)
        nix.ok("nix", "copy", "--from", proxy.url, "--to", nix.root, pushed.path)
        assert arrived(nix, pushed)
        assert "bytes=5000-" in [seen.range for seen in proxy.requests]
