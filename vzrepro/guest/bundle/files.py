"""A boot bundle on the disk: its four files read and checked against what `version.json` says of them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vzrepro.base.errors import HashMismatch, UsageError, VzreproError
from vzrepro.guest import metadata
from vzrepro.guest.metadata import CHECKSUMS, VERSION_FILE, KernelProfile, Metadata

FILES = (*CHECKSUMS, VERSION_FILE)
"""A bundle's files, in the order of its archive."""

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete bundle whose files have the checksums that it declares. `digests`: file name → sha256 in hex.

    `content` is that of version.json; for an older host it is not what lies in the directory, but declares fewer
    capabilities: `left_out` are the others.
    """

    directory: Path
    metadata: Metadata
    digests: Mapping[str, str]
    content: bytes
    left_out: tuple[str, ...] = ()

    def for_host(self, version: str | None) -> Bundle:
        """This bundle as a host of `version` takes it: version.json without the capabilities that it does not know.

        Itself when there are none, or with None. Raises UsageError for what is no version, or one that is too old.
        """
        if version is None:
            return self
        unknown = metadata.unknown_to(self.metadata.capabilities, metadata.host_version(version))
        if not unknown:
            return self
        content = metadata.without(self.content, unknown)
        declared = metadata.parse(content, str(self.directory / VERSION_FILE))
        digests = {**self.digests, VERSION_FILE: hashlib.sha256(content).hexdigest()}
        return replace(self, metadata=declared, digests=digests, content=content, left_out=unknown)


@dataclass(frozen=True, slots=True)
class BundleRequirements:
    """What a caller asks of a bundle; None and the empty set ask nothing."""

    profile: KernelProfile | None = None
    capabilities: frozenset[str] = frozenset()
    exact_agent: bool = False

    def check(self, found: Bundle) -> None:
        """Raises VzreproError saying which wish the bundle does not fulfil."""
        where, declared = found.directory, found.metadata
        if self.profile is not None and declared.profile != self.profile:
            raise another_profile(where, self.profile, declared.profile)
        if self.exact_agent:
            revision, spoken = metadata.AGENT_PROTOCOL_REVISION, declared.agent_protocol_revision
            hint = _another(declared.profile)
            if spoken is not None and spoken != revision:
                hint = f"it needs a host that speaks revision {spoken}, and this one speaks {revision}; {hint}"
            for what, wanted, there in (
                ("has another guest agent", metadata.AGENT_VERSION, declared.agent),
                ("speaks another revision of the agent's protocol", revision, spoken),
            ):
                if there != wanted:
                    shown = "none that is declared" if there is None else there
                    raise VzreproError(f"{where} {what}", reason=f"wanted: {wanted}; found: {shown}", hint=hint)
        missing = sorted(self.capabilities - set(declared.capabilities))
        if missing:
            raise VzreproError(
                f"{where} does not declare {', '.join(missing)}",
                reason=f"declared: {', '.join(declared.capabilities) or 'nothing'}",
                hint=_another(declared.profile),
            )


def another_profile(where: Path, wanted: KernelProfile, found: str | None) -> VzreproError:
    """The error for a bundle that is not of the profile that it must be."""
    chosen = f"if this one is meant: --kernel-profile {found}; else " if found in set(KernelProfile) else ""
    return VzreproError(
        f"{where} is of another profile",
        reason=f"wanted: {wanted}; found: {found or 'none that is declared'}",
        hint=f"{chosen}{_another(wanted)}",
    )


def has_any(directory: Path) -> bool:
    """Whether the directory has a file of a bundle, be it whole or not."""
    return any(os.path.lexists(directory / name) for name in FILES)


def has_all(directory: Path) -> bool:
    """Whether all files of a bundle are there, be they right or not."""
    return all(os.path.isfile(directory / name) for name in FILES)  # noqa: PTH113 (which never raises)


def examine(directory: Path) -> Bundle:
    """The bundle in `directory`, read whole.

    Raises UsageError (files are missing, version.json cannot be understood), HashMismatch, VzreproError (unreadable).
    """
    while True:
        # An installer may put another bundle in this one's place meanwhile: then what was read counts for nothing.
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
    return Bundle(directory, declared, digests, content)


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


def _identity(directory: Path) -> list[tuple[int, int] | None]:
    """The directory and, since a bundle can change within one, its version.json, which is put there last."""
    found: list[tuple[int, int] | None] = []
    for path in (directory, directory / VERSION_FILE):
        try:
            status = path.stat()
            found.append((status.st_dev, status.st_ino))
        except OSError:
            found.append(None)
    return found


def _no_bundle(directory: Path, reason: str) -> UsageError:
    return UsageError(f"{directory} is not a boot bundle", reason=reason, hint=_another(None))


def _unreadable(path: Path, error: OSError) -> VzreproError:
    return VzreproError(f"{path} cannot be read", reason=error.strerror, hint=f"look at its rights: ls -lad {path}")


def _another(profile: str | None) -> str:
    known: Collection[str] = set(KernelProfile)
    option = f" --kernel-profile {profile}" if profile in known else ""
    return f"in a checkout of vzrepro, build and install a good one: vzrepro bundle install{option}"
