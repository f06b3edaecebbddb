"""lock.toml ⇄ `Lock`: every pinned file, one line each, sorted so that two branches merge.

The format is specified in docs/formats.md. Reading uses the standard library; writing goes through tomlkit, so
that a person's comments survive `vzrepro lock`. No host name is ever written: files are named `mirror://…`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from tomlkit.items import Comment, InlineTable, Item, Key, Table, Whitespace

from vzrepro.errors import UsageError, first_fault
from vzrepro.model import FORMAT, FileHash

HEADER = "Written by `vzrepro lock`. Comments are kept; edit recipes, not pins."


@dataclass(frozen=True, slots=True)
class PinnedFile:
    """One file to download: where (`mirror://…`), its sha256 and its size in bytes."""

    url: str
    sha256: FileHash
    size: int


@dataclass(frozen=True, slots=True)
class SourcePin:
    """A source's exact version and file. `request` is the digest of what the recipe asked for."""

    request: str
    version: str
    file: PinnedFile


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


class _Source(_Record):
    request: Hex
    version: str
    url: str
    sha256: Hex
    size: Size


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
        document = _Document.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: not valid TOML", reason=str(error), hint=hint) from error
    except ValidationError as error:
        raise UsageError(f"{name}: {first_fault(error)}", hint=hint) from error
    if document.format != FORMAT:
        raise UsageError(f"{name}: format {document.format}, this vzrepro reads {FORMAT}", hint="upgrade vzrepro")

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
        sources={k: SourcePin(v.request, v.version, _file(v.url, v)) for k, v in document.source.items()},
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


def _file(url: str, record: _Source | _Deb | _Crate) -> PinnedFile:
    return PinnedFile(url, FileHash(record.sha256), record.size)


def render(lock: Lock, previous: str = "") -> str:
    """The text of `lock`; comments of `previous` stay with the lines they stood before or behind."""
    document = tomlkit.parse(previous)
    fresh = not previous.strip()
    if fresh:
        document.add(tomlkit.comment(HEADER))
        document.add(tomlkit.nl())
    document["format"] = FORMAT
    for section, content in _plain(lock).items():
        if content:
            _merge(document, section, content, inline=section in ("deb", "crate"))
        elif section in document:
            del document[section]
    return tomlkit.dumps(document)


def _plain(lock: Lock) -> dict[str, dict[str, Any]]:
    """The lock as nested plain tables, unsorted."""

    def pin(file: PinnedFile) -> dict[str, Any]:
        return {"sha256": file.sha256.hex, "size": file.size}

    images: dict[str, dict[str, Any]] = {}
    debs: dict[str, Any] = {}
    for (name, platform), image in lock.images.items():
        files = {}
        for deb in image.debs:
            url = deb.file.url.removeprefix("mirror://")
            files[deb.key] = url
            debs[url] = {"name": deb.name, "version": deb.version, "arch": deb.arch, **pin(deb.file)}
        images.setdefault(name, {})[platform] = {"request": image.request, "snapshot": image.snapshot, "debs": files}
    crates: dict[str, Any] = {}
    sets: dict[str, Any] = {}
    for name, crate_set in lock.crate_sets.items():
        keys = {crate.key: f"{crate.name}/{crate.version}" for crate in crate_set.crates}
        sets[name] = {"request": crate_set.request, "files": keys}
        crates.update({f"{crate.name}/{crate.version}": pin(crate.file) for crate in crate_set.crates})
    sources = {
        name: {"request": source.request, "version": source.version, "url": source.file.url, **pin(source.file)}
        for name, source in lock.sources.items()
    }
    return {"source": sources, "image": images, "deb": debs, "crates": sets, "crate": crates}


def _merge(parent: Any, name: str, content: Mapping[str, Any], *, inline: bool) -> None:
    """Write `content` into the table `parent[name]`, sorted, each key with the comments it had."""
    old = parent.get(name)
    table = tomlkit.table()
    notes, trailing = _comments(old) if isinstance(old, Table) else ({}, [])
    for key in _ordered(content):
        value = content[key]
        for note in notes.get(key, []):
            table.add(note)
        if not isinstance(value, Mapping):
            item = tomlkit.item(value)
        elif inline:
            item = _inline(value)
        else:
            existing = old.get(key) if isinstance(old, Table) else None
            holder = tomlkit.table()
            if isinstance(existing, Table):
                holder[key] = existing
            _merge(holder, key, value, inline=False)
            item = holder[key]
        if isinstance(old, Table) and key in old:
            # A comment behind the old value stays on its line; a table's stays in its header.
            previous = old[key].trivia
            item.trivia.comment, item.trivia.comment_ws = previous.comment, previous.comment_ws
        table.add(key, item)
    if trailing:
        table.add(tomlkit.nl())
    for note in trailing:
        table.add(note)
    if isinstance(old, Table):
        table.trivia.comment, table.trivia.comment_ws = old.trivia.comment, old.trivia.comment_ws
    if all(isinstance(value, Mapping) for value in content.values()) and not inline:
        table = _super(table)
    parent[name] = table


def _super(table: Table) -> Table:
    """The same table, whose own `[header]` is left out because it only holds tables."""
    return Table(table.value, table.trivia, table.is_aot_element(), is_super_table=True)


def _ordered(content: Mapping[str, Any]) -> list[str]:
    """Plain values before tables (TOML demands it), each group sorted."""
    return sorted(content, key=lambda key: (isinstance(content[key], Mapping), key))


def _inline(value: Mapping[str, Any]) -> InlineTable:
    table = tomlkit.inline_table()
    for key in value:
        table.append(key, value[key])
    return table


def _comments(table: Table) -> tuple[dict[str, list[Comment]], list[Comment]]:
    """Comment lines by the key they stand before, and those after the last key."""
    notes: dict[str, list[Comment]] = {}
    pending: list[Comment] = []
    body: Iterable[tuple[Key | None, Item]] = table.value.body
    for key, item in body:
        if isinstance(item, Comment):
            pending.append(item)
        elif key is not None and not isinstance(item, Whitespace):
            notes[key.key] = pending
            pending = []
    return notes, pending
