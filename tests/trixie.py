"""Images from today's real trixie, for tests that may use the network: a shell and coreutils; its Nix client; nginx."""

from __future__ import annotations

import datetime as dt
import functools
import os
import tempfile
from pathlib import Path

import platformdirs

from vzrepro import sandbox
from vzrepro.base.model import IMAGE_FORMAT, FileHash
from vzrepro.sources import fetch
from vzrepro.sources.debian import Deb, Index, suites
from vzrepro.sources.image import ImageId, image_id, write_image
from vzrepro.sources.keyring import KEYRING

TINY = ("coreutils", "dash", "libc-bin", "sed")
WITHOUT = {"debianutils": "which, run-parts: no test runs them", "libsystemd0": "only who, users and pinky use it"}
NIX_WITHOUT = {
    **dict.fromkeys(("bash-static", "bzip2", "xz-utils"), "for builds, and nothing is built"),
    **dict.fromkeys(("curl", "perl", "libdbd-sqlite3-perl", "libdbi-perl", "libwww-curl-perl"), "for nix-channel"),
    **dict.fromkeys(("base-passwd", "passwd"), "an image has its users"),
    "libc-bin": "for maintainer scripts",
}
SERVICE = ("busybox", "coreutils", "dash", "libc-bin", "nginx")
SERVICE_WITHOUT = {
    **dict.fromkeys(("debconf", "debianutils", "dpkg"), "for maintainer scripts"),
    "iproute2": "nginx wants it for its maintainer scripts",
    "libsystemd0": "only who, users and pinky use it",
    "openssl-provider-legacy": "obsolete ciphers, loaded on request only",
}
FIREWALL = ("iptables",)
FIREWALL_WITHOUT = {
    **dict.fromkeys(("debconf", "debianutils", "dpkg", "netbase"), "for maintainer scripts"),
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
    """The image with trixie's Nix, loaded."""
    archive = _kept("nix", index().resolve(("nix-bin",), without=NIX_WITHOUT), "linux/amd64")
    identity = image_id(archive)
    sandbox.load_image(archive, str(identity))
    return identity


def service_image() -> Path:
    """A docker-archive for arm64 with a shell, coreutils, busybox and nginx."""
    return _kept("service", index().resolve(SERVICE, native="arm64", without=SERVICE_WITHOUT), "linux/arm64")


def firewall_image() -> Path:
    """A docker-archive for arm64 with iptables."""
    return _kept("firewall", index().resolve(FIREWALL, native="arm64", without=FIREWALL_WITHOUT), "linux/arm64")


def _kept(name: str, debs: tuple[Deb, ...], platform: str) -> Path:
    """The packages' image, written once per state of them and kept in the user's cache."""
    state = FileHash.of(f"{IMAGE_FORMAT} {' '.join(deb.sha256.hex for deb in debs)}".encode())
    archive = Path(platformdirs.user_cache_dir("vzrepro"), "tests", f"{name}-{state.hex[:16]}.tar")
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
            made = Path(folder, "made.tar")
            write_image(download(debs, Path(folder, "debs")), made, platform=platform)
            for earlier in set(archive.parent.glob(f"{name}-*.tar")) - {archive}:
                earlier.unlink(missing_ok=True)
            made.rename(archive)
    return archive
