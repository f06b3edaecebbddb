"""lock.toml → `Lock`: every pinned file, one line each, sorted so that two branches merge.

The format is specified in docs/formats.md; `writing` is the other direction. Files are named `mirror://…`, or by the
URL that a recipe has: no other host name is ever written.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vzrepro.base.errors import UsageError, first_fault
from vzrepro.base.model import FORMAT, FileHash, NarHash


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file to download: where (`mirror://…`, or what a recipe names), its sha256 and its size in bytes (None where
    only a recipe pins it). `others` are further places of the same bytes."""

    url: str
    sha256: FileHash
    size: int | None
    others: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where it comes from, all of it: another place under the same hash is looked at once again."""
        return " ".join((self.url, *self.others))

    @property
    def slot(self) -> str:
        """What the download is called until its object is there: what came from elsewhere must not stand in."""
        return FileHash.of(f"{self.url} {self.sha256}".encode()).hex


@dataclass(frozen=True, slots=True)
class PinnedTree:
    """The tree of one commit: the repository's URL, the commit's id in hex, hash and size in bytes of the tree's NAR;
    and whether the trees of submodules are in it, which only the recipe says."""

    url: str
    commit: str
    nar_hash: NarHash
    size: int
    submodules: bool = False

    @property
    def place(self) -> str:
        """Where it comes from, as `PinnedFile.place`."""
        return f"git+{self.url}@{self.commit}"


@dataclass(frozen=True, slots=True)
class SourcePin:
    """A source's exact version (`""` where it has none) and what it is. `request` is the digest of what the recipe
    asked for."""

    request: str
    version: str
    file: PinnedFile | PinnedTree


@dataclass(frozen=True, slots=True)
class DebPin:
    """One .deb: `name`, `version` and `arch` as in its control file."""

    name: str
    version: str
    arch: str
    file: PinnedFile

    @property
    def key(self) -> str:
        """`name:arch`: unique in an image, and the order in the lock."""
        return f"{self.name}:{self.arch}"


@dataclass(frozen=True, slots=True)
class ImagePin:
    """The exact .debs of one toolchain image on one build platform, and the suites' snapshot time."""

    request: str
    snapshot: str
    debs: tuple[DebPin, ...]


@dataclass(frozen=True, slots=True)
class CratePin:
    """One published crate."""

    name: str
    version: str
    file: PinnedFile

    @property
    def key(self) -> str:
        """`name-version`: unique in a set, and the order in the lock."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True, slots=True)
class CrateSetPin:
    """The crates that a Linux build of one Cargo.lock reaches."""

    request: str
    crates: tuple[CratePin, ...]


@dataclass(frozen=True, slots=True)
class Lock:
    """All pins. Images are keyed by `(image name, build platform)`."""

    sources: Mapping[str, SourcePin] = field(default_factory=dict)
    images: Mapping[tuple[str, str], ImagePin] = field(default_factory=dict)
    crate_sets: Mapping[str, CrateSetPin] = field(default_factory=dict)

    def snapshot(self) -> str | None:
        """The newest snapshot time of any image, `YYYYMMDDTHHMMSSZ`: where a public archive still has the files."""
        return max((image.snapshot for image in self.images.values()), default=None)


Hex = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _url(text: str) -> str:
    urlsplit(text)  # raises ValueError
    return text


class _Source(_Record):
    request: Hex
    version: str
    url: Annotated[str, AfterValidator(_url)]
    sha256: Hex
    size: Size
    commit: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")] | None = None


class _Deb(_Record):
    name: str
    version: str
    arch: str
    sha256: Hex
    size: Size


class _Crate(_Record):
    sha256: Hex
    size: Size


class _Image(_Record):
    request: Hex
    snapshot: Annotated[str, StringConstraints(pattern=r"^\d{8}T\d{6}Z$")]
    debs: dict[str, str]


class _CrateSet(_Record):
    request: Hex
    files: dict[str, str]


class _Document(_Record):
    format: int
    source: dict[str, _Source] = {}
    image: dict[str, dict[str, _Image]] = {}
    deb: dict[str, _Deb] = {}
    crates: dict[str, _CrateSet] = {}
    crate: dict[str, _Crate] = {}


def load(path: Path) -> Lock:
    """Read a lock file; a missing one is an empty lock.

    Raises UsageError naming the file and the first fault: not TOML, an unknown key, a malformed hash, an image or
    crate set that names a file which has no record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Lock()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the lock cannot be read", reason=str(error)) from error
    return parse(text, str(path))


def parse(text: str, name: str = "lock.toml") -> Lock:
    """The `Lock` that `text` holds; `name` stands in errors. Raises UsageError as `load` does."""
    hint = "restore lock.toml from version control, or write it again with: vzrepro lock"
    try:
        data = tomllib.loads(text)
        if isinstance(found := data.get("format"), int) and found > FORMAT:  # before keys that only it knows
            from vzrepro.base import version

            raise UsageError(
                f"{name} was written by a newer vzrepro: it has format {found}, and this one reads {FORMAT}",
                hint=f"install a newer one: {version.upgrading()}",
            )
        document = _Document.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{name}: {first_fault(error)}", hint=hint) from error
    except (ValueError, RecursionError) as error:  # bad TOML, a number of more than 4,300 digits, [[[[…
        raise UsageError(f"{name}: not valid TOML", reason=str(error), hint=hint) from error
    if document.format != FORMAT:
        raise UsageError(f"{name}: format {document.format}, this vzrepro reads {FORMAT}", hint=hint)

    def deb(key: str, url: str) -> DebPin:
        if url not in document.deb:
            raise UsageError(f"{name}: {key} names {url}, which has no [deb] record", hint=hint)
        record = document.deb[url]
        return DebPin(record.name, record.version, record.arch, _file(f"mirror://{url}", record))

    def crate(key: str, url: str) -> CratePin:
        if url not in document.crate:
            raise UsageError(f"{name}: {key} names {url}, which has no [crate] record", hint=hint)
        crate_name, _, version = url.partition("/")
        return CratePin(crate_name, version, _file(f"mirror://crates/{url}", document.crate[url]))

    return Lock(
        sources={k: SourcePin(v.request, v.version, _source(v)) for k, v in document.source.items()},
        images={
            (image, platform): ImagePin(pin.request, pin.snapshot, tuple(deb(k, u) for k, u in pin.debs.items()))
            for image, platforms in document.image.items()
            for platform, pin in platforms.items()
        },
        crate_sets={
            k: CrateSetPin(v.request, tuple(crate(f, u) for f, u in v.files.items()))
            for k, v in document.crates.items()
        },
    )


def _source(record: _Source) -> PinnedFile | PinnedTree:
    if record.commit is None:
        return _file(record.url, record)
    return PinnedTree(record.url, record.commit, NarHash(record.sha256), record.size)


def _file(url: str, record: _Source | _Deb | _Crate) -> PinnedFile:
    return PinnedFile(url, FileHash(record.sha256), record.size)
