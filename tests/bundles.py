"""Boot bundles for tests: whole and valid, but of a few bytes, for profiles whose kernel takes long to build."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vzrepro.metadata import AGENT_PROTOCOL_REVISION, AGENT_VERSION, KernelProfile

CONTENT = {"vmlinux": b"a kernel\n" * 1000, "initramfs.img": b"an initramfs\n" * 500, "youki": b"a runtime\n" * 300}


def make_bundle(
    directory: Path, profile: str = "developer", *, content: dict[str, bytes] | None = None, **changes: Any
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
        "capabilities": sorted(KernelProfile(profile).default_capabilities),
        **changes,
    }
    known = {key: value for key, value in document.items() if value is not None}
    (directory / "version.json").write_text(json.dumps(known, indent=2) + "\n")
    return directory
