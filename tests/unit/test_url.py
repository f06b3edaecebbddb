"""Files at URLs: the hash that nobody knew, the newest of a series, signatures, and what is said when it fails."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import FaultyProxy, cuts, endless, passes, redirects, serves, status
from tests.servers import refusing
from tests.unit.test_signature import HASHED, MINISIGN_KEY
from vzrepro.base.errors import HashMismatch, RemoteError, Untrusted, UsageError
from vzrepro.base.model import FileHash
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedFile, SourcePin
from vzrepro.sources import fetch, url
from vzrepro.sources.lookup import Lookup

Resolve = Callable[..., SourcePin]


@pytest.fixture
def server() -> Iterator[FaultyProxy]:
    with FaultyProxy() as found:
        yield found


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def resolve(tmp_path: Path, said: list[str]) -> Resolve:
    def run(
        *urls: str,
        old: SourcePin | None = None,
        max_bytes: int = 1 << 20,
        mirrors: str = "",
        unpack: bool = False,
        **ask: object,
    ) -> SourcePin:
        named = {"kernel": [mirrors]} if mirrors else {}
        want = Want(
            "url-source",
            "thing",
            "here",
            {"urls": list(urls), "version": None, "series": None, "sha256": None, **ask},
            unpack,
        )
        lookup = Lookup(fetch.Mirrors(named), tmp_path, tmp_path / "downloads", max_bytes, said.append, said.append)
        return url.resolve(want, old, lookup)

    return run


def _file(pin: SourcePin) -> PinnedFile:
    assert isinstance(pin.file, PinnedFile)
    return pin.file


def test_the_hash_is_found_and_shown(server: FaultyProxy, resolve: Resolve, said: list[str], tmp_path: Path) -> None:
    place = server.serve_at("thing-1.0.tar", serves(b"content"))
    pin = resolve(place)
    digest = hashlib.sha256(b"content").hexdigest()
    assert (_file(pin).sha256.hex, _file(pin).size, pin.version) == (digest, 7, "")
    assert said == [f"thing: sha256 {digest}, 7 bytes, {place}"]
    # Where a run looks for it before it downloads it.
    assert (tmp_path / "downloads" / _file(pin).slot).read_bytes() == b"content"
    assert len(list((tmp_path / "downloads").iterdir())) == 1


def test_places_are_tried_in_order_and_redirects_followed(server: FaultyProxy, resolve: Resolve) -> None:
    gone = server.serve_at("gone", status(404))
    moved = server.serve_at("moved", redirects("/new"))
    server.serve_at("new", serves(b"x"))
    pin = resolve(gone, moved)
    assert _file(pin).sha256 == FileHash.of(b"x")
    assert _file(pin).others == (moved,)


def test_a_connection_that_breaks_starts_over(server: FaultyProxy, resolve: Resolve) -> None:
    """Without a hash nobody can say whether the second half belongs to the first."""
    with FaultyProxy(server.url) as proxy:
        server.on("*", serves(bytes(200_000)))
        proxy.on("*", cuts(100_000), passes)
        assert _file(resolve(f"{proxy.url}/x")).size == 200_000
        assert [seen.range for seen in proxy.requests] == [None, None]


def test_a_download_without_end(server: FaultyProxy, resolve: Resolve) -> None:
    with FaultyProxy(server.url) as proxy:
        server.on("*", serves(b"x"))
        proxy.on("*", endless(bytes(1 << 16)))
        with pytest.raises(RemoteError, match="thing cannot be pinned") as caught:
            resolve(f"{proxy.url}/x")
        assert "has more than 1048576 bytes" in (caught.value.reason or "")
        assert "VZREPRO_DOWNLOAD_GIB" in (caught.value.hint or "")
        assert not proxy.swallowed


def test_a_missing_hash_while_offline(resolve: Resolve) -> None:
    with refusing() as port, pytest.raises(RemoteError, match="thing cannot be pinned") as caught:
        resolve(f"http://127.0.0.1:{port}/thing.tar")
    assert "its hash is not known, so it must be seen once" in (caught.value.reason or "")
    assert 'sha256="…"' in (caught.value.hint or "")


def test_another_file_than_the_recipe_names(server: FaultyProxy, resolve: Resolve) -> None:
    place = server.serve_at("x", serves(b"found"))
    with pytest.raises(HashMismatch) as caught:
        resolve(place, sha256="0" * 64)
    said = str(caught.value)
    assert "0" * 64 in said
    assert hashlib.sha256(b"found").hexdigest() in said
    assert place in said
    assert "sha256=" in (caught.value.hint or "")


def test_a_url_that_gives_another_file_than_before(server: FaultyProxy, resolve: Resolve, said: list[str]) -> None:
    place = server.serve_at("x", serves(b"new"))
    before = SourcePin("", "", PinnedFile(place, FileHash.of(b"old"), 3))
    resolve(place, old=before)
    assert f"{place} has changed: sha256 was {FileHash.of(b'old')}, is {FileHash.of(b'new')}" in said


LISTING = "".join(
    f'<a href="{name}">{name}</a>  2026-01-01  1M\n'
    for name in (
        *(f"linux-6.{number}.tar.xz" for number in ("1.9", "12", "12.9", "12.10", "120", "13-rc1")),
        "linux-6.12.11.tar.sign",
        "xlinux-6.12.99.tar.xz",
        "linux-6.12.12.tar.xz.part",
    )
).encode()


@pytest.mark.parametrize(("series", "version"), [("6.12", "6.12.10"), ("6", "6.120"), ("6.12.9", "6.12.9")])
def test_the_newest_of_a_series_in_a_mirror(server: FaultyProxy, resolve: Resolve, series: str, version: str) -> None:
    server.serve_at("pub/linux/v6.x/", serves(LISTING))
    server.serve_at(f"pub/linux/v6.x/linux-{version}.tar.xz", serves(version.encode()))
    pin = resolve("mirror://kernel/linux/v6.x/linux-{version}.tar.xz", series=series, mirrors=f"{server.url}/pub")
    assert pin.version == version
    assert _file(pin).url == f"mirror://kernel/linux/v6.x/linux-{version}.tar.xz"
    assert _file(pin).sha256 == FileHash.of(version.encode())


def test_versions_in_directories(server: FaultyProxy, resolve: Resolve) -> None:
    server.serve_at("dist/", serves(b'<a href="v1.2/">v1.2/</a> <a href="v1.10/">v1.10/</a>'))
    server.serve_at("dist/v1.10/thing-1.10.tar", serves(b"x"))
    assert resolve(f"{server.url}/dist/v{{version}}/thing-{{version}}.tar", series="1").version == "1.10"


def test_a_series_that_is_not_there(server: FaultyProxy, resolve: Resolve) -> None:
    server.serve_at("d/", serves(b'<a href="x-1.0.tar">'))
    with pytest.raises(UsageError, match="of the series 2") as caught:
        resolve(f"{server.url}/d/x-{{version}}.tar", series="2")
    assert "it names 1.0" in (caught.value.reason or "")


def test_versions_are_those_of_the_directory_itself(server: FaultyProxy, resolve: Resolve) -> None:
    links = [
        "x-1.1.tar",
        f"{server.url}/d/x-1.2.tar",
        "/d/x-1.3.tar?mirror=1#top",
        "./x-1.4.tar",
        "https://evil.example/d/x-1.5.tar",
        "//evil.example/d/x-1.6.tar",
        "../x-1.7.tar",
        "/old/x-1.8.tar",
        "old/x-1.9.tar",
        "http://[/x-1.10.tar",
    ]
    page = "".join(f'<a href="{link}">{link.rpartition("/")[2]}</a>' for link in links)
    server.serve_at("d/", serves(page.encode()))
    server.serve_at("d/x-1.4.tar", serves(b"x"))
    assert resolve(f"{server.url}/d/x-{{version}}.tar", series="1").version == "1.4"
    # A server that lists names without links means its own.
    server.heal()
    server.serve_at("d/", serves(b"x-1.1.tar\nx-1.2.tar\n"))
    server.serve_at("d/x-1.2.tar", serves(b"x"))
    assert resolve(f"{server.url}/d/x-{{version}}.tar", series="1").version == "1.2"


@pytest.mark.parametrize("content", [b"", b"text", gzip.compress(b"no tar"), b"\x1f\x8bno gzip", b"PK\x03\x04no zip"])
def test_what_is_no_archive_is_found_when_it_is_locked(server: FaultyProxy, resolve: Resolve, content: bytes) -> None:
    place = server.serve_at("x.tar.gz", serves(content))
    with pytest.raises(UsageError, match=r"x\.tar\.gz cannot be unpacked"):
        resolve(place, unpack=True)
    resolve(place)


def test_what_is_no_file_is_not_waited_for(resolve: Resolve, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(RemoteError) as caught:
            resolve(place.as_uri())
        assert "is no regular file" in (caught.value.reason or "")


def test_signatures(server: FaultyProxy, resolve: Resolve, said: list[str], tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(MINISIGN_KEY)
    place = server.serve_at("x", serves(b"test"))
    server.serve_at("x.minisig", serves(HASHED))
    resolve(place, signature=f"{place}.minisig", key="key.pub")
    assert "thing: signed by minisign-E7620F1842B4E81F" in said
    wrong = server.serve_at("y", serves(b"Test"))
    with pytest.raises(Untrusted, match="not signed by a key that the recipe names"):
        resolve(wrong, signature=f"{place}.minisig", key="key.pub")
    with pytest.raises(fetch.NotFound):
        server.on("/none", status(404))
        resolve(place, signature=f"{server.url}/none", key="key.pub")


def test_a_signature_of_the_archive_before_it_was_compressed(
    server: FaultyProxy, resolve: Resolve, tmp_path: Path
) -> None:
    (tmp_path / "key.pub").write_bytes(MINISIGN_KEY)
    server.serve_at("linux-1.tar.xz", serves(lzma.compress(b"test")))
    server.serve_at("linux-1.tar.sign", serves(HASHED))
    ask = {"signature": f"{server.url}/linux-{{version}}.tar.sign", "key": "key.pub"}
    resolve(f"{server.url}/linux-{{version}}.tar.xz", version="1", **ask)
    server.heal()
    server.serve_at("linux-2.tar.xz", serves(b"no xz"))
    server.serve_at("linux-2.tar.sign", serves(HASHED))
    with pytest.raises(Untrusted, match="not signed"):
        resolve(f"{server.url}/linux-{{version}}.tar.xz", version="2", **ask)
