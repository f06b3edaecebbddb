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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vzrepro.base.errors import UsageError

AGENT_VERSION = "0.2.0"
"""The version of vzrepro's own guest agent (recipes/guest-agent/Cargo.toml; a test compares them)."""

AGENT_PROTOCOL_REVISION = 1
"""The revision of `vz.agent.v1` that vzrepro's client speaks."""

VERSION_FILE = "version.json"
CHECKSUMS = {"vmlinux": "sha256_vmlinux", "initramfs.img": "sha256_initramfs", "youki": "sha256_youki"}
"""The other files of a bundle, and the key of version.json that has each one's checksum."""

MAX_BYTES = 1 << 20
"""A version.json that is larger is none."""

OLDEST_HOST = (0, 3, 15)
"""The oldest released host that anything is known of, and the oldest that a bundle works with."""
OLDEST_HOST_TEXT = ".".join(map(str, OLDEST_HOST))

_HOST_VERSION = re.compile(r"v?([0-9]{1,6}(?:\.[0-9]{1,6}){1,3})")
_REQUIRED = ("kernel", "busybox", "agent", "youki", "built")
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|\+00:00)")


class KernelProfile(enum.StrEnum):
    """What a guest is for. The value is what version.json says."""

    DEVELOPER = "developer"
    CONTAINER = "container"

    @property
    def default_capabilities(self) -> frozenset[str]:
        """What every bundle of this profile must declare: its names that the oldest host knows.

        Its kernel can do more. What later names stand for must be asked for by name, because bundles made before them,
        and bundles for hosts that do not know them, declare them not.
        """
        known = (each for each in CAPABILITIES if each.since is not None and each.since <= OLDEST_HOST)
        return frozenset(each.name for each in known if self in each.profiles)


@dataclass(frozen=True, slots=True)
class Capability:
    """Something that a bundle can do. `since` is the oldest released host that knows the name, None where none is known
    to; `profiles` are those that have it; `legacy` whether a bundle that names no capabilities counts as having it.

    A host refuses a bundle that declares a name it does not know, however good the bundle is otherwise.
    """

    name: str
    since: tuple[int, ...] | None = OLDEST_HOST
    profiles: tuple[KernelProfile, ...] = tuple(KernelProfile)
    legacy: bool = False


CAPABILITIES = (
    Capability("vsock", legacy=True),
    Capability("virtiofs", legacy=True),
    Capability("hvc0_serial", legacy=True),
    Capability("ext4_root", legacy=True),
    Capability("overlayfs"),
    Capability("netns"),
    Capability("seccomp"),
    Capability("io_uring"),
    Capability("btrfs_snapshots"),
    Capability("nested_virt", profiles=(KernelProfile.DEVELOPER,)),
    Capability("tun", profiles=(KernelProfile.DEVELOPER,)),
    Capability("nfsd", profiles=(KernelProfile.CONTAINER,)),
    Capability("container_sandbox", profiles=(KernelProfile.CONTAINER,)),
    Capability("device_mapper", since=None),
    Capability("dm_crypt", since=None),
    Capability("memory_reclaim", since=None),
    Capability("snapshot_safe", since=None),
)
"""All of them; how each is built and proven is recipes/kernel/capabilities.py's."""

KNOWN_SINCE = {each.name: each.since for each in CAPABILITIES}
LEGACY_CAPABILITIES = frozenset(each.name for each in CAPABILITIES if each.legacy)


@dataclass(frozen=True, slots=True)
class Metadata:
    """The content of a version.json; the fields are its keys, in its order.

    `kernel`, `busybox`, `agent` (the guest agent) and `youki` are versions; `built` is RFC 3339 in UTC. A checksum is
    what the file's sha256 must be, in lower case. What older bundles do not say is None; `capabilities` are sorted.
    """

    kernel: str
    profile: str | None
    security_profile: str | None
    busybox: str
    agent: str
    agent_protocol_revision: int | None
    youki: str
    built: str
    sha256_vmlinux: str | None
    sha256_initramfs: str | None
    sha256_youki: str | None
    capabilities: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The profile; the developer's where none is declared, since that one was there before there were profiles."""
        return self.profile or KernelProfile.DEVELOPER

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
        raise _refused(place, "is not a JSON object", f"found: {_quoted(document)}")
    missing = [name for name in _REQUIRED if name not in document]
    if missing:
        raise _refused(place, f"lacks {', '.join(missing)}", "a bundle's version.json has at least these keys")
    values: dict[str, Any] = {name: _text(document, name, place) for name in _REQUIRED}
    for name in ("profile", "security_profile"):
        values[name] = None if document.get(name) is None else _text(document, name, place)
    values |= {key: _checksum(document, key, place) for key in CHECKSUMS.values()}
    _check_time(document["built"], place)
    if values["profile"] is not None and not _PROFILE.fullmatch(values["profile"]):  # archives are called after it
        raise _wrong(place, "profile", "a name of letters, digits, dots and dashes", document["profile"])
    revision = _number(document, "agent_protocol_revision", place)
    return Metadata(**values, agent_protocol_revision=revision, capabilities=_capabilities(document, place))


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


def host_version(text: str) -> tuple[int, ...]:
    """The version of a host, `0.3.15` or `v0.3.15`. Raises UsageError for what is none, and for hosts so old that it is
    not known what they take."""
    found = _HOST_VERSION.fullmatch(text)
    if found is None:
        raise UsageError(f"{text!r} is not the version of a host", reason="wanted: numbers, such as 0.3.15")
    version = tuple(map(int, found[1].split(".")))
    if version < OLDEST_HOST:
        raise UsageError(
            f"nothing is known of hosts as old as {text}",
            reason=f"the oldest that bundles are made for is {OLDEST_HOST_TEXT}",
            hint=f"update the host, then: --host-version {OLDEST_HOST_TEXT}",
        )
    return version


def unknown_to(capabilities: Collection[str], host: tuple[int, ...]) -> tuple[str, ...]:
    """Those of `capabilities` that a host of this version does not know, or is not known to know, sorted.

    A newer host than the table has any line for counts as the newest there: one name too many costs every caller the
    bundle, a name that is left out only those who demand it.
    """
    since = {name: KNOWN_SINCE.get(name) for name in capabilities}
    return tuple(sorted(name for name, first in since.items() if first is None or first > host))


def without(content: bytes, capabilities: Collection[str]) -> bytes:
    """The version.json `content` with these capabilities left out, and every other key as it is."""
    document = json.loads(content)
    document["capabilities"] = [name for name in document["capabilities"] if name not in capabilities]
    return (json.dumps(document, indent=2) + "\n").encode()


def _text(document: Mapping[str, Any], name: str, place: str) -> str:
    value = document[name]
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _wrong(place, name, "a text of one line", value)
    return value


def _number(document: Mapping[str, Any], name: str, place: str) -> int | None:
    value = document.get(name)
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
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
    """As hosts read it: a text that the file's checksum must be equal to, whatever the case. One that is none at all is
    no fault of this file: no content has it."""
    value = document.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not value.isprintable():
        raise _wrong(place, name, "64 hex digits", value)
    return value.strip().lower()


def _capabilities(document: Mapping[str, Any], place: str) -> tuple[str, ...]:
    value = document.get("capabilities")
    if value is None:
        return tuple(sorted(LEGACY_CAPABILITIES))
    if not isinstance(value, list) or not all(isinstance(name, str) and name.isidentifier() for name in value):
        raise _wrong(place, "capabilities", "a list of names", value)
    return tuple(sorted(set(value)))


def _wrong(place: str, name: str, wanted: str, found: object) -> UsageError:
    return _refused(place, f"has a wrong {name}", f"wanted: {wanted}; found: {_quoted(found)}")


def _refused(place: str, what: str, reason: str) -> UsageError:
    return UsageError(
        f"{place} {what}",
        reason=reason,
        hint="the bundle is damaged or was not made by vzrepro; to build one: vzrepro realize container-bundle",
    )


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
