"""What a boot bundle says of itself: `version.json` as a type, and what each kernel profile promises.

The format is docs/formats.md's. Readers ignore keys they do not know, since new ones may follow.
"""

from __future__ import annotations

import datetime as dt
import enum
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vzrepro.errors import UsageError

AGENT_VERSION = "0.1.0"
"""The version of vzrepro's own guest agent (recipes/guest-agent/Cargo.toml; a test compares them)."""

AGENT_PROTOCOL_REVISION = 1
"""The revision of `vz.agent.v1` that vzrepro's client speaks."""

VERSION_FILE = "version.json"
CHECKSUMS = {"vmlinux": "sha256_vmlinux", "initramfs.img": "sha256_initramfs", "youki": "sha256_youki"}
"""The other files of a bundle, and the key of version.json that has each one's checksum."""

MAX_BYTES = 1 << 20
"""A version.json that is larger is none."""

LEGACY_CAPABILITIES = frozenset({"vsock", "virtiofs", "hvc0_serial", "ext4_root"})
"""What a bundle that names no capabilities counts as having."""

_COMMON = LEGACY_CAPABILITIES | {
    "overlayfs",
    "netns",
    "seccomp",
    "io_uring",
    "btrfs_snapshots",
    "device_mapper",
    "dm_crypt",
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)")


class KernelProfile(enum.StrEnum):
    """What a guest is for. The value is what version.json says."""

    DEVELOPER = "developer"
    CONTAINER = "container"

    @property
    def default_capabilities(self) -> frozenset[str]:
        """What every bundle of this profile must declare."""
        return _DEFAULTS[self]


_DEFAULTS = {
    KernelProfile.DEVELOPER: _COMMON | {"nested_virt", "tun"},
    KernelProfile.CONTAINER: _COMMON | {"nfsd", "container_sandbox"},
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """The content of a version.json; the fields are its keys, in its order.

    `kernel`, `busybox`, `agent` (the guest agent) and `youki` are versions; `built` is RFC 3339 in UTC. A checksum is
    64 lower-case hex digits, or None where an older bundle does not say; `capabilities` are sorted.
    """

    kernel: str
    profile: str
    security_profile: str
    busybox: str
    agent: str
    agent_protocol_revision: int
    youki: str
    built: str
    sha256_vmlinux: str | None
    sha256_initramfs: str | None
    sha256_youki: str | None
    capabilities: tuple[str, ...]

    @property
    def built_secs(self) -> int:
        """`built` in seconds since 1970."""
        return int(dt.datetime.fromisoformat(self.built).timestamp())

    def checksums(self) -> dict[str, str]:
        """File name → sha256, of the files whose checksum is known."""
        found = {name: getattr(self, key) for name, key in CHECKSUMS.items()}
        return {name: value for name, value in found.items() if value is not None}


def parse(content: bytes, place: str) -> Metadata:
    """The metadata in `content`; `place` is what errors call it.

    Raises UsageError: not a JSON object, keys missing, a value that cannot be.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refused(place, "is not JSON", str(error)) from error
    if not isinstance(document, dict):
        raise _refused(place, "is not a JSON object", f"found: {_shown(document)}")
    required = [field.name for field in fields(Metadata) if field.name not in (*CHECKSUMS.values(), "capabilities")]
    missing = [name for name in required if name not in document]
    if missing:
        raise _refused(place, f"lacks {', '.join(missing)}", "a bundle's version.json has at least these keys")
    values: dict[str, Any] = {
        name: _number(document, name, place) if name == "agent_protocol_revision" else _text(document, name, place)
        for name in required
    }
    values |= {key: _checksum(document, key, place) for key in CHECKSUMS.values()}
    _check_time(document["built"], place)
    if not _PROFILE.fullmatch(document["profile"]):  # archives are called after it
        raise _wrong(place, "profile", "a name of letters, digits, dots and dashes", document["profile"])
    return Metadata(**values, capabilities=_capabilities(document, place))


def read(directory: Path) -> Metadata:
    """The metadata of the bundle in `directory`. Raises UsageError as `parse`, or when there is none; OSError."""
    path = directory / VERSION_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits for who writes into a fifo
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise IsADirectoryError(path)
            with open(fd, "rb", closefd=False) as file:
                content = file.read(MAX_BYTES + 1)
        finally:
            os.close(fd)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UsageError(
            f"{directory} is not a boot bundle",
            reason=f"it has no {VERSION_FILE}",
            hint="name a bundle's directory; to build one: vzrepro realize container-bundle",
        ) from error
    if len(content) > MAX_BYTES:
        raise _refused(str(path), "is not a bundle's metadata", f"it is larger than {MAX_BYTES} bytes")
    return parse(content, str(path))


def render(metadata: Metadata) -> bytes:
    """The version.json that says this: keys in the contract's order, indented by two, a newline at the end."""
    document = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
    known = {name: value for name, value in document.items() if value is not None}
    return (json.dumps(known, indent=2) + "\n").encode()


def _text(document: Mapping[str, Any], name: str, place: str) -> str:
    value = document[name]
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _wrong(place, name, "a text of one line", value)
    return value


def _number(document: Mapping[str, Any], name: str, place: str) -> int:
    value = document[name]
    if type(value) is not int or not 0 <= value < 1 << 32:
        raise _wrong(place, name, "a number", value)
    return value


def _check_time(value: str, place: str) -> None:
    try:
        found = dt.datetime.fromisoformat(value) if _TIME.fullmatch(value) else None
    except ValueError:
        found = None
    if found is None or found.year < 1970:
        raise _wrong(place, "built", "a time in UTC such as 2026-01-01T00:00:00Z", value)


def _checksum(document: Mapping[str, Any], name: str, place: str) -> str | None:
    value = document.get(name)
    if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
        raise _wrong(place, name, "64 lower-case hex digits", value)
    return value


def _capabilities(document: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value = document.get("capabilities")
    if value is None:
        return tuple(sorted(LEGACY_CAPABILITIES))
    if not isinstance(value, list) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise _wrong(place, "capabilities", "a list of names", value)
    return tuple(sorted(set(value)))


def _wrong(place: str, name: str, wanted: str, found: object) -> UsageError:
    return _refused(place, f"has a wrong {name}", f"wanted: {wanted}; found: {_shown(found)}")


def _refused(place: str, what: str, reason: str) -> UsageError:
    return UsageError(
        f"{place} {what}",
        reason=reason,
        hint="the bundle is damaged or was not made by vzrepro; to build one: vzrepro realize container-bundle",
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
