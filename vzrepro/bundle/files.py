"""A boot bundle on the disk: its four files read and checked against what `version.json` says of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vzrepro import metadata
from vzrepro.errors import HashMismatch, UsageError, VzreproError
from vzrepro.metadata import CHECKSUMS, VERSION_FILE, KernelProfile, Metadata

FILES = (*CHECKSUMS, VERSION_FILE)
"""A bundle's files, in the order of its archive."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete bundle whose files have the checksums that it declares. `digests`: file name → sha256 in hex."""

    directory: Path
    metadata: Metadata
    digests: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller asks of a bundle; None and the empty set ask nothing."""

    profile: KernelProfile | None = None
    capabilities: frozenset[str] = frozenset()
    exact_agent: bool = False

    def check(self, found: Bundle) -> None:
        """Raises VzreproError saying which wish the bundle does not fulfil."""
        where, declared = found.directory, found.metadata
        if self.profile is not None and declared.profile != self.profile:
            raise VzreproError(
                f"{where} is of another profile",
                reason=f"wanted: {self.profile}; found: {declared.profile}",
                hint=f"if this one is meant: --kernel-profile {declared.profile}; else {_another(self.profile)}",
            )
        if self.exact_agent:
            version = metadata.AGENT_VERSION
            if declared.agent != version:
                raise _unfit(where, "has another guest agent", version, declared.agent, declared.profile)
            revision = metadata.AGENT_PROTOCOL_REVISION
            if declared.agent_protocol_revision != revision:
                number = declared.agent_protocol_revision
                raise _unfit(
                    where, "speaks another revision of the agent's protocol", revision, number, declared.profile
                )
        missing = sorted(self.capabilities - set(declared.capabilities))
        if missing:
            raise VzreproError(
                f"{where} does not declare {', '.join(missing)}",
                reason=f"declared: {', '.join(declared.capabilities) or 'nothing'}",
                hint=_another(declared.profile),
            )


def has_any(directory: Path) -> bool:
    """Whether the directory has a file of a bundle, be it whole or not."""
    return any(os.path.lexists(directory / name) for name in FILES)


def examine(directory: Path) -> Bundle:
    """The bundle in `directory`, read whole.

    Raises UsageError (files are missing, version.json cannot be understood), HashMismatch, VzreproError (unreadable).
    """
    while True:
        # An installer may put another directory in this one's place meanwhile: then what was read counts for nothing.
        before = _identity(directory)
        try:
            found, fault = _examine(directory), None
        except VzreproError as error:
            found, fault = None, error
        if _identity(directory) != before:
            continue
        if found is None:
            assert fault is not None
            raise fault
        return found


def _examine(directory: Path) -> Bundle:
    content = b""
    digests = {}
    with contextlib.ExitStack() as stack:
        opened = _open(directory, stack)
        for name, fd in opened.items():
            digest = hashlib.sha256()
            try:
                while chunk := os.read(fd, _CHUNK):
                    digest.update(chunk)
                    if name == VERSION_FILE and len(content) <= metadata.MAX_BYTES:
                        content += chunk
            except OSError as error:
                raise _unreadable(directory / name, error) from error
            digests[name] = digest.hexdigest()
    declared = metadata.parse(content, str(directory / VERSION_FILE))
    check_digests(directory, declared.checksums(), digests, declared.profile)
    return Bundle(directory, declared, digests)


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, int]:
    """Descriptors of all four files, all of them of one directory."""
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _no_bundle(directory, "there is no such directory") from error
    except OSError as error:
        raise _unreadable(directory, error) from error
    stack.callback(os.close, top)
    opened, missing = {}, []
    for name in FILES:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=top)
        except FileNotFoundError:
            missing.append(name)
            continue
        except OSError as error:
            raise _unreadable(directory / name, error) from error
        stack.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _no_bundle(directory, f"{name} is not a regular file")
        opened[name] = fd
    if missing:
        raise _no_bundle(directory, f"it lacks {', '.join(missing)}")
    return opened


def check_digests(
    directory: Path, expected: Mapping[str, str], found: Mapping[str, str], profile: str | None = None
) -> None:
    """Raises HashMismatch naming the first file that is not the expected one. Both: file name → sha256 in hex."""
    for name, wanted in expected.items():
        if found[name] != wanted:
            raise HashMismatch(
                f"{name} is damaged or another one: {directory / name}",
                reason=f"expected: sha256 {wanted}\nfound:    sha256 {found[name]}",
                hint=_another(profile),
            )


def _identity(directory: Path) -> tuple[int, int] | None:
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _no_bundle(directory: Path, reason: str) -> UsageError:
    return UsageError(f"{directory} is not a boot bundle", reason=reason, hint=_another(None))


def _unreadable(path: Path, error: OSError) -> VzreproError:
    return VzreproError(f"{path} cannot be read", reason=error.strerror, hint=f"look at its rights: ls -lad {path}")


def _unfit(where: Path, what: str, wanted: object, found: object, profile: str) -> VzreproError:
    return VzreproError(f"{where} {what}", reason=f"wanted: {wanted}; found: {found}", hint=_another(profile))


def _another(profile: str | None) -> str:
    known: Collection[str] = set(KernelProfile)
    option = f" --kernel-profile {profile}" if profile in known else ""
    return f"in a checkout of vzrepro, build and install a good one: vzrepro bundle install{option}"
