"""Boot bundles for tests: whole and valid, but of a few bytes, for profiles whose kernel takes long to build."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vzrepro.guest.bundle import HostSurroundings, KernelBundleOptions, Resolution, resolve
from vzrepro.guest.metadata import AGENT_PROTOCOL_REVISION, AGENT_VERSION, KernelProfile

DEVELOPER, CONTAINER = KernelProfile.DEVELOPER, KernelProfile.CONTAINER
FOUR = ["initramfs.img", "version.json", "vmlinux", "youki"]
CONTENT = {"vmlinux": b"a kernel\n" * 1000, "initramfs.img": b"an initramfs\n" * 500, "youki": b"a runtime\n" * 300}


def make_bundle(
    directory: Path, profile: str | None = "developer", *, content: dict[str, bytes] | None = None, **changes: Any
) -> Path:
    """Write a bundle. `changes` are keys of version.json that are to be different; None leaves one out."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {**CONTENT, **(content or {})}
    for name, data in files.items():
        (directory / name).write_bytes(data)
    document = {
        "kernel": "6.12.107",
        "profile": profile,
        "security_profile": f"{profile}-test",
        "busybox": "1.37.0",
        "agent": AGENT_VERSION,
        "agent_protocol_revision": AGENT_PROTOCOL_REVISION,
        "youki": "0.7.0",
        "built": "2026-01-01T00:00:00Z",
        "sha256_vmlinux": hashlib.sha256(files["vmlinux"]).hexdigest(),
        "sha256_initramfs": hashlib.sha256(files["initramfs.img"]).hexdigest(),
        "sha256_youki": hashlib.sha256(files["youki"]).hexdigest(),
        "capabilities": sorted(KernelProfile(profile or "developer").default_capabilities),
        **changes,
    }
    known = {key: value for key, value in document.items() if value is not None}
    (directory / "version.json").write_text(json.dumps(known, indent=2) + "\n")
    return directory


def names(directory: Path) -> list[str]:
    """What is in a directory."""
    return sorted(path.name for path in directory.iterdir())


def make_surroundings(place: Path) -> HostSurroundings:
    """A home and a workspace with nothing in them, and a directory below that one to start from."""
    start = place / "workspace" / "below"
    start.mkdir(parents=True)
    (start.parent / "recipes").mkdir()
    (place / "home").mkdir()
    return HostSurroundings({"HOME": str(place / "home")}, start, place / "home/config.toml")


def find(around: HostSurroundings, options: KernelBundleOptions, **environ: Path | str) -> Resolution:
    """Resolve, with these variables in the environment besides."""
    named = {name: str(value) for name, value in environ.items()}
    return resolve(options, surroundings=HostSurroundings({**around.environ, **named}, around.start, around.user_file))
