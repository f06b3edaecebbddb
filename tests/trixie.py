"""A tiny toolchain image from today's real trixie: a shell and coreutils, for tests that may use the network."""

from __future__ import annotations

import datetime as dt
import functools
import os
from pathlib import Path

from vzrepro import fetch
from vzrepro.debian import Deb, Index, suites
from vzrepro.image import ImageId, write_image

KEYRING = Path(__file__).parents[1] / "recipes/toolchain/debian-archive.asc"
TINY = ("coreutils", "dash", "libc-bin", "sed")
WITHOUT = {"debianutils": "which, run-parts: no test runs them", "libsystemd0": "only who, users and pinky use it"}


@functools.cache
def index() -> Index:
    """The three suites of trixie, from where this host's apt gets them. A stale mirror is good enough for a test."""
    mirrors = fetch.Mirrors.of_host({}, os.environ)
    return Index(
        lambda url: fetch.get(mirrors.urls(url), 1 << 28),
        KEYRING.read_bytes(),
        suites=suites("trixie"),
        now=dt.datetime.now(dt.UTC),
        allow_expired=True,
    )


def download(debs: tuple[Deb, ...], folder: Path) -> list[tuple[str, Path]]:
    """The packages as files, checked, in the form `write_image` takes."""
    mirrors = fetch.Mirrors.of_host({}, os.environ)
    wanted = [
        fetch.Download(mirrors.urls(deb.url), folder / deb.pool_path.rpartition("/")[2], deb.sha256, deb.size)
        for deb in debs
    ]
    fetch.download_all(wanted)
    return [(each.dest.name, each.dest) for each in wanted]


def tiny_image(folder: Path) -> tuple[ImageId, Path]:
    """Resolve, download and write the image; its id and the docker-archive in `folder`."""
    debs = download(index().resolve(TINY, without=WITHOUT), folder / "debs")
    archive = folder / "tiny.tar"
    return write_image(debs, archive, platform="linux/amd64"), archive
