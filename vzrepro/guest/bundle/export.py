"""Writes the archives that installers download: `vz-linux-<profile>-v<V>-arm64.tar.gz`, each with its `.sha256`.

Beside each is what is attested of its bundle, `vz-linux-<profile>-v<V>-arm64.intoto.jsonl`, where anything is.

The same bundle gives the same bytes: a ustar of the four files in fixed order, owner 0, modes 0644 and 0755, every time
that of `built`; then gzip without name and time, level 9. The tar layer is the format; the compressed bytes also depend
on the deflate of the zlib that Python was built with (docs/bundle.md).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from vzrepro.base import disk
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.bundle.files import FILES, Bundle, check_digests, examine, has_any
from vzrepro.guest.metadata import OLDEST_HOST, VERSION_FILE, KernelProfile, unknown_to

_LEVEL = 9
_SUFFIX = ".tar.gz"
_MAX_ATTESTED = 256 << 20
_VERSION = re.compile(r"[0-9]+(\.[0-9]+)*([.+-][0-9A-Za-z]+)*")


@dataclass(frozen=True, slots=True)
class BundleArchive:
    """An archive that is there now. `sha256` in hex, `size` in bytes; `written` is False when it was there before.
    `attestations` is how many of them lie beside it, `unknown` the declared capabilities that the oldest host does not
    know, `left_out` those that were left out for the host that was named."""

    path: Path
    profile: str
    sha256: str
    size: int
    written: bool
    attestations: int = 0
    unknown: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


FilesOf = Callable[[bytes], Mapping[str, str]]
"""What an attestation says of files: the sha256 in hex of each that it names, none where it cannot be read."""


def export(
    directory: Path,
    version: str,
    out: Path,
    envelopes: Collection[bytes] = (),
    host_version: str | None = None,
    files_of: FilesOf = lambda _envelope: {},
) -> list[BundleArchive]:
    """Write the archives of the bundle in `directory`, or of each bundle in a directory below it, into `out`.

    With `host_version` (`0.3.15`), capabilities that such a host does not know are left out of version.json.

    Of `envelopes`, those that name (`files_of`) all files of a bundle with the digests they have are written beside its
    archives, one per line, sorted, together with those that are there already: attestations become more with time, and
    are the one thing that may change under a version. Nobody's signature is verified.

    Raises UsageError (no bundle, a version that cannot be one or a host's that is too old, another archive has the
    name), HashMismatch (a bundle is damaged), VzreproError (the system refuses). What is written is whole or not there.
    """
    if not _VERSION.fullmatch(version):
        raise UsageError(
            f"{version!r} is not a version", reason="wanted: numbers and dots, such as 1.2.0 or 1.2.0-rc1, without v"
        )
    bundles = [examine(place).for_host(host_version) for place in _bundles(directory)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # All is made and compared before anything gets its name: a conflict or a full disk leaves `out` as it was.
            made = [file for bundle in bundles for file in _make(bundle, version, out, stack)]
            for _, file in made:
                _refuse_conflict(file)
                if file.path.suffix == ".gz":
                    _lines(attested(file.path))
            published = [(bundle, file, _publish(file)) for bundle, file in made]
            return [
                BundleArchive(
                    file.path,
                    bundle.metadata.kind,
                    file.sha256,
                    file.path.stat().st_size,
                    written,
                    _attest(bundle, attested(file.path), envelopes, files_of),
                    unknown_to(bundle.metadata.capabilities, OLDEST_HOST),
                    bundle.left_out,
                )
                for bundle, file, written in published
                if file.path.suffix == ".gz"
            ]
    except OSError as error:
        raise VzreproError(
            f"the archives cannot be written to {out}",
            reason=f"{error.filename or out}: {error.strerror or error}",
            hint="make room or name another directory: --out DIR",
        ) from error


def attested(archive: Path) -> Path:
    """Where the attestations of an archive's bundle are: beside it, `<stem>.intoto.jsonl`."""
    return archive.with_name(archive.name.removesuffix(_SUFFIX) + ".intoto.jsonl")


def _attest(bundle: Bundle, path: Path, envelopes: Collection[bytes], files_of: FilesOf) -> int:
    """Add to the attestations at `path`; how many there are then."""
    there = _lines(path)
    about = {each for each in (*there, *envelopes) if b"\n" not in each and _names_all(files_of(each), bundle)}
    lines = sorted(about)
    if lines and lines != there:
        with disk.whole_file(path) as opened:
            opened.write(b"".join(line + b"\n" for line in lines))
            os.fchmod(opened.fileno(), 0o644)
    return len(lines)


def _lines(path: Path) -> list[bytes]:
    """The lines of a file of attestations, none where there is none. Raises UsageError when something else is there."""
    if not os.path.lexists(path):
        return []
    if not path.is_file() or path.stat().st_size > _MAX_ATTESTED:
        raise UsageError(
            f"{path} is no file of attestations", hint="choose another directory with --out, or move it away"
        )
    return path.read_bytes().splitlines()


def _names_all(files: Mapping[str, str], bundle: Bundle) -> bool:
    """Whether a statement about `files` is about these very files."""
    return all(files.get(name) == bundle.digests[name] for name in FILES)


def write_tar(bundle: Bundle, sink: BinaryIO) -> None:
    """The archive's tar layer. Raises HashMismatch when the bundle changed meanwhile; OSError."""
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in FILES:
            with _opened(bundle, name) as file:
                entry = tarfile.TarInfo(name)
                entry.size = file.seek(0, os.SEEK_END)
                file.seek(0)
                entry.mode = 0o755 if name == "youki" else 0o644
                entry.mtime = bundle.metadata.built_secs
                reader = _Hashing(file)
                archive.addfile(entry, cast(BinaryIO, reader))
            check_digests(bundle.directory, {name: bundle.digests[name]}, {name: reader.digest.hexdigest()})


def _opened(bundle: Bundle, name: str) -> BinaryIO:
    return io.BytesIO(bundle.content) if name == VERSION_FILE else (bundle.directory / name).open("rb")


class _Hashing:
    """A file that is read once, from the beginning, and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(count)
        self.digest.update(data)
        return data


def _bundles(directory: Path) -> list[Path]:
    if has_any(directory):
        return [directory]
    try:
        found = [child for child in sorted(directory.iterdir()) if child.is_dir() and has_any(child)]
    except OSError:
        found = []
    if not found:
        raise UsageError(
            f"{directory} is not a boot bundle",
            reason="neither it nor a directory in it has a bundle's files",
            hint="name a bundle, its target, or both: vzrepro bundle export bundles --version V --out DIR",
        )
    return found


def _names(bundle: Bundle, version: str) -> list[str]:
    profile = bundle.metadata.kind
    historical = [f"vz-linux-v{version}-arm64.tar.gz"] if profile == KernelProfile.DEVELOPER else []
    return [f"vz-linux-{profile}-v{version}-arm64.tar.gz", *historical]


@dataclass(frozen=True, slots=True)
class _File:
    """A finished file that waits for its name; `sha256` in hex."""

    temporary: Path
    path: Path
    sha256: str


def _make(bundle: Bundle, version: str, out: Path, stack: contextlib.ExitStack) -> Iterator[tuple[Bundle, _File]]:
    """The bundle's archives and their checksum files under temporary names, which go with `stack`."""
    packed: _File | None = None
    for name in _names(bundle, version):
        temporary = stack.enter_context(_temporary(out))
        if packed is None:
            _pack(bundle, temporary)
        else:
            shutil.copyfile(packed.temporary, temporary)
        packed = _finished(temporary, out / name)
        yield bundle, packed
        temporary = stack.enter_context(_temporary(out))
        temporary.write_text(f"{packed.sha256}  {name}\n", encoding="ascii")
        yield bundle, _finished(temporary, out / f"{name}.sha256")


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    path = folder / f".vz-linux-{secrets.token_hex(8)}.tmp"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _pack(bundle: Bundle, path: Path) -> None:
    # An empty name and time 0 leave both out of the header.
    with path.open("xb") as file, gzip.GzipFile("", "wb", _LEVEL, file, 0) as packed:
        write_tar(bundle, cast(BinaryIO, packed))


def _finished(temporary: Path, path: Path) -> _File:
    temporary.chmod(0o644)
    disk.sync(temporary)
    return _File(temporary, path, _sha256(temporary))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_conflict(file: _File) -> None:
    if os.path.lexists(file.path) and (not file.path.is_file() or _sha256(file.path) != file.sha256):
        raise UsageError(
            f"{file.path} is there already, and is another one",
            reason="what was published under a version must not change",
            hint=f"choose another version or directory, or remove it: rm {file.path}",
        )


def _publish(file: _File) -> bool:
    """Give the file its name if nothing has it; False if the same one has."""
    try:
        os.link(file.temporary, file.path)  # which never replaces, as a rename would
    except OSError:
        _refuse_conflict(file)
        if file.path.exists():
            return False
        file.temporary.rename(file.path)  # a file system without hard links
    disk.sync(file.path.parent)
    return True
