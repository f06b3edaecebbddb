"""Images from today's real trixie, for tests that may use the network: a shell and coreutils; its Nix client."""

from __future__ import annotations

import datetime as dt
import functools
import os
import tempfile
from pathlib import Path

import platformdirs

from vzrepro import fetch, sandbox
from vzrepro.debian import Deb, Index, suites
from vzrepro.image import IMAGE_FORMAT, ImageId, image_id, write_image
from vzrepro.model import FileHash

KEYRING = Path(__file__).parents[1] / "recipes/toolchain/debian-archive.asc"
TINY = ("coreutils", "dash", "libc-bin", "sed")
WITHOUT = {"debianutils": "which, run-parts: no test runs them", "libsystemd0": "only who, users and pinky use it"}
NIX_WITHOUT = {
    **dict.fromkeys(("bash-static", "bzip2", "xz-utils"), "for builds, and nothing is built"),
    **dict.fromkeys(("curl", "perl", "libdbd-sqlite3-perl", "libdbi-perl", "libwww-curl-perl"), "for nix-channel"),
    **dict.fromkeys(("base-passwd", "passwd"), "an image has its users"),
    "libc-bin": "for maintainer scripts",
}


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


def nix_image() -> ImageId:
    """The image with trixie's Nix, loaded. Written once per state of its packages, and kept in the user's cache."""
    debs = index().resolve(("nix-bin",), without=NIX_WITHOUT)
    state = FileHash.of(f"{IMAGE_FORMAT} {' '.join(deb.sha256.hex for deb in debs)}".encode())
    archive = Path(platformdirs.user_cache_dir("vzrepro"), "tests", f"nix-{state.hex[:16]}.tar")
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            made = Path(folder, "nix.tar")
            write_image(download(debs, Path(folder, "debs")), made, platform="linux/amd64")
            for earlier in set(archive.parent.glob("nix-*.tar")) - {archive}:
                earlier.unlink(missing_ok=True)
            made.rename(archive)
    identity = image_id(archive)
    sandbox.load_image(archive, str(identity))
    return identity
