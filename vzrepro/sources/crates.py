"""From a Cargo.lock to the crates that a Linux build reaches; only `vzrepro lock` asks.

A lock names every crate that any platform and any optional feature could need. `reached` walks the dependency graph
as Cargo's resolver does (Cargo book, "Dependency Resolution", "Features"): it unifies features, evaluates `cfg()`
tables, follows build dependencies and leaves development dependencies out. Where Cargo would know more than we do
(features of the host and of the target apart, `target_feature`) the walk takes the larger set: a crate too many is a
small download, a crate too few is a failed build.
"""

from __future__ import annotations

import io
import operator
import re
import tarfile
import tomllib
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from vzrepro.base.errors import RemoteError, UsageError, VzreproError, first_fault
from vzrepro.base.model import FileHash
from vzrepro.base.tar import TarHeader
from vzrepro.sources.cfg import Cfg, linux_cfg
from vzrepro.sources.semver import Version

MAX_TEXT = 16 << 20
"""Bytes: no Cargo.toml or Cargo.lock is larger; a crate that says otherwise is hostile."""


@dataclass(frozen=True, slots=True, order=True)
class Crate:
    """One published crate: `sha256` is that of its `.crate` file, as Cargo.lock records it."""

    name: str
    version: str
    sha256: FileHash

    @property
    def file_name(self) -> str:
        """`<name>-<version>.crate`: the name Cargo's own downloads carry."""
        return f"{self.name}-{self.version}.crate"


GetManifests = Callable[[Sequence[Crate]], Mapping[Crate, str]]
"""Given the crates of one wave, the text of each one's Cargo.toml (`manifest_of` reads it from the download)."""

LINUX_TARGETS = ("aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu")
"""Target triples: what is built for the guest, and what build scripts and procedural macros run on."""


def reached(
    cargo_lock: str,
    manifest: str,
    get_manifests: GetManifests,
    *,
    features: Iterable[str] = (),
    default_features: bool = True,
    targets: Sequence[str] = LINUX_TARGETS,
) -> tuple[Crate, ...]:
    """The crates of `cargo_lock` that building the root package needs, sorted by name and version.

    `manifest` is the root's Cargo.toml; `features` and `default_features` are what Cargo is called with; `targets` are
    target triples with GNU/Linux environment. `get_manifests` is called once per wave, with the crates first reached
    in it, so that a caller can download a wave in parallel; no crate is asked for twice.

    Raises UsageError when the lock does not belong to the manifest or names a crate that no registry has.
    """
    walk = _Walk(_parse_lock(cargo_lock), tuple(linux_cfg(target) for target in targets))
    root = _Manifest.parse(manifest, "the root package")
    key = walk.add_root(root)
    for feature in features:
        if not root.has_feature(feature):
            raise UsageError(f"{root.name} {root.version} has no feature {feature!r}")
        walk.enable(key, feature)
    if default_features:
        walk.enable(key, "default")
    while wave := walk.missing():
        texts = get_manifests(wave)
        for crate in wave:
            walk.supply((crate.name, crate.version), _Manifest.parse(texts[crate], crate.file_name))
    return walk.crates()


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A published version as the registry's index has it; one that is `yanked` is for old locks only."""

    version: Version
    sha256: FileHash
    yanked: bool


class _IndexLine(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    vers: str
    cksum: str
    yanked: bool = False


def index_entries(lines: bytes, crate: str) -> tuple[IndexEntry, ...]:
    """The versions in a crate's index file, in its order. A line that is not understood is passed over, as Cargo does.

    Raises RemoteError when no line is.
    """
    found: list[IndexEntry] = []
    lines_read = 0
    for line in lines.splitlines():
        lines_read += 1
        try:
            entry = _IndexLine.model_validate_json(line)
            found.append(IndexEntry(Version.parse(entry.vers), FileHash(entry.cksum), entry.yanked))
        except ValueError:  # pydantic's ValidationError is one
            continue
    if lines_read and not found:
        raise RemoteError(f"the index's entry for crate {crate} cannot be read", hint="check the index's place")
    return tuple(found)


def manifest_of(crate: bytes) -> str:
    """The Cargo.toml inside a `.crate` file (a gzipped tar with one top directory). Raises VzreproError if none."""
    return _text_in(crate, "Cargo.toml")


def lock_of(crate: bytes) -> str:
    """The Cargo.lock inside a `.crate` file, which published programs carry. Raises VzreproError if none."""
    return _text_in(crate, "Cargo.lock")


def _text_in(crate: bytes, wanted: str) -> str:
    try:
        with tarfile.open(fileobj=io.BytesIO(crate), mode="r|gz", tarinfo=TarHeader) as archive:
            for member in archive:
                parts = member.name.split("/")
                if len(parts) != 2 or parts[1] != wanted or not member.isreg():
                    continue
                if member.size > MAX_TEXT:
                    raise VzreproError(f"the crate's {wanted} claims {member.size} bytes", reason="none is that large")
                reader = archive.extractfile(member)
                assert reader is not None  # a regular file always has one
                return reader.read().decode()
    except (tarfile.TarError, OSError, EOFError, TypeError, zlib.error, UnicodeDecodeError) as error:
        # A TypeError is what `tarfile` makes of a gzip header that is cut off.
        raise VzreproError("a crate file cannot be read", reason=str(error)) from error
    raise VzreproError(f"the crate has no {wanted}")


# --- Cargo.lock -------------------------------------------------------------------------------------------------------

_Key = tuple[str, str]
"""Name and version: what identifies a package in a lock that has one registry."""

_INDEX = "crates.io-index"
_PUBLIC = (f"registry+https://github.com/rust-lang/{_INDEX}", f"sparse+https://index.{_INDEX.removesuffix('-index')}/")
"""The `source` of a package that the public registry has, in both of its spellings."""


class _Table(BaseModel):
    """A table of a TOML document; keys that nothing here asks for are not looked at."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _LockPackage(_Table):
    name: str
    version: str
    source: str | None = None
    checksum: str | None = None
    dependencies: list[str] = []


class _LockFile(_Table):
    """Cargo.lock, formats 1 to 4. Format 1 has checksums in [metadata], its oldest files the root package in [root]."""

    root: _LockPackage | None = None
    package: list[_LockPackage] = []
    metadata: dict[str, str] = {}

    def checksum(self, package: _LockPackage) -> FileHash | None:
        key = f"checksum {package.name} {package.version} ({package.source})"
        found = package.checksum or self.metadata.get(key)
        return None if found in (None, "<none>") else FileHash(found)


@dataclass(frozen=True, slots=True)
class _Locked:
    """One `[[package]]` of a lock: `checksum` is None for path and git packages."""

    key: _Key
    source: str | None
    checksum: FileHash | None
    dependencies: tuple[_Key, ...]


def _parse_lock(text: str) -> dict[_Key, _Locked]:
    document = _read_toml(_LockFile, text, "Cargo.lock")
    packages = [*([document.root] if document.root else []), *document.package]
    versions: defaultdict[str, list[str]] = defaultdict(list)
    for package in packages:
        versions[package.name].append(package.version)
    locked: dict[_Key, _Locked] = {}
    for package in packages:
        key = (package.name, package.version)
        if key in locked:
            raise UsageError(f"Cargo.lock has {key[0]} {key[1]} from two sources", reason="only one can be vendored")
        edges: list[_Key] = []
        for line in package.dependencies:
            # `name`, `name version` when several versions are locked, `name version (source)` in old locks.
            name, *rest = line.split(" ")
            found = [(name, version) for version in versions[name] if not rest or version == rest[0]]
            if not found:
                raise UsageError(
                    f"Cargo.lock has no package {line!r}, which {key[0]} {key[1]} depends on", hint=_GENERATE
                )
            edges += found
        try:
            checksum = document.checksum(package)
        except ValueError as error:
            raise UsageError(f"Cargo.lock: the checksum of {key[0]} {key[1]} is none", reason=str(error)) from error
        locked[key] = _Locked(key, package.source, checksum, tuple(edges))
    return locked


_GENERATE = "write the lock again: cargo generate-lockfile"

_T = TypeVar("_T", bound=_Table)


def _read_toml(kind: type[_T], text: str, place: str) -> _T:
    """The document `text`; a byte order mark before it is no part of it. Raises UsageError with the first fault."""
    try:
        return kind.model_validate(tomllib.loads(text.removeprefix("\ufeff")))
    except ValidationError as error:
        raise UsageError(f"{place} cannot be read", reason=first_fault(error)) from error
    except (ValueError, RecursionError) as error:  # bad TOML, a number of more than 4,300 digits, [[[[…
        raise UsageError(f"{place} cannot be read", reason=str(error)) from error


# --- Cargo.toml -------------------------------------------------------------------------------------------------------


class _Inherited(_Table):
    """`version.workspace = true`."""

    workspace: Literal[True]


class _PackageTable(_Table):
    name: str
    version: str | _Inherited = "0.0.0"
    """Cargo 1.75 and later take a package without a version for this one."""


class _WorkspacePackage(_Table):
    version: str | None = None


class _Workspace(_Table):
    package: _WorkspacePackage = _WorkspacePackage()


class _DependencyTable(_Table):
    """One line of a dependency table, under its key in this manifest; `package` is the name in the registry."""

    package: str | None = None
    version: str = "*"
    workspace: bool = False
    optional: bool = False
    features: list[str] = []
    default_features: bool = Field(default=True, validation_alias=AliasChoices("default-features", "default_features"))


_Dependencies = dict[str, str | _DependencyTable]


class _Tables(_Table):
    """The dependencies of every platform, or of one; Cargo accepts the old spelling with an underscore as well."""

    dependencies: _Dependencies = {}
    build_dependencies: _Dependencies = Field(
        {}, validation_alias=AliasChoices("build-dependencies", "build_dependencies")
    )


class _ManifestFile(_Tables):
    package: _PackageTable = Field(validation_alias=AliasChoices("package", "project"))
    workspace: _Workspace = _Workspace()
    features: dict[str, list[str]] = {}
    target: dict[str, _Tables] = {}


@dataclass(frozen=True, slots=True)
class _Dependency:
    """One line of a dependency table. `key` is the name in this manifest, `package` the name in the registry."""

    key: str
    package: str
    requirement: str
    optional: bool
    default_features: bool
    features: tuple[str, ...]
    target: str | None


@dataclass(frozen=True, slots=True)
class _Manifest:
    """What of a Cargo.toml decides about dependencies."""

    name: str
    version: str
    features: Mapping[str, tuple[str, ...]]
    dependencies: Mapping[str, tuple[_Dependency, ...]]

    @classmethod
    def parse(cls, text: str, place: str) -> _Manifest:
        document = _read_toml(_ManifestFile, text, f"the Cargo.toml of {place}")
        version = document.package.version
        if isinstance(version, _Inherited):
            if document.workspace.package.version is None:
                raise UsageError(
                    f"{document.package.name} inherits its version from a workspace that is in another file",
                    reason="a package is locked on its own, as published crates are",
                    hint="write the version into the package's own Cargo.toml",
                )
            version = document.workspace.package.version
        dependencies: defaultdict[str, list[_Dependency]] = defaultdict(list)
        for target, tables in ((None, document), *document.target.items()):
            for table in (tables.dependencies, tables.build_dependencies):
                for key, value in table.items():
                    dependencies[key].append(_dependency(key, value, target))
        return cls(
            document.package.name,
            version,
            {name: tuple(values) for name, values in document.features.items()},
            {key: tuple(values) for key, values in dependencies.items()},
        )

    def has_feature(self, name: str) -> bool:
        """Whether `name` may be enabled: declared, or implied by an optional dependency."""
        return name in self.features or any(dep.optional for dep in self.dependencies.get(name, ()))


def _dependency(key: str, value: str | _DependencyTable, target: str | None) -> _Dependency:
    table = _DependencyTable(version=value) if isinstance(value, str) else value
    if table.workspace:
        raise UsageError(
            f"dependency {key!r} is inherited from a workspace",
            reason="a package is locked on its own, as published crates are",
            hint=f"write the version of {key!r} into the package's own Cargo.toml",
        )
    return _Dependency(
        key,
        table.package or key,
        table.version,
        table.optional,
        table.default_features,
        tuple(table.features),
        target,
    )


# --- the walk ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Node:
    """A reached package: `enabled` holds feature names, `active` the dependency keys in use."""

    manifest: _Manifest | None = None
    enabled: set[str] = field(default_factory=set)
    active: set[str] = field(default_factory=set)
    weak: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


class _Walk:
    """The fixpoint: packages and features only ever join; features wait in a node until its manifest is there."""

    def __init__(self, locked: Mapping[_Key, _Locked], cfgs: tuple[Cfg, ...]) -> None:
        self._locked = locked
        self._cfgs = cfgs
        self._nodes: dict[_Key, _Node] = {}
        self._root: _Key | None = None
        self._queue: deque[tuple[_Key, str]] = deque()

    def add_root(self, manifest: _Manifest) -> _Key:
        key = (manifest.name, manifest.version)
        if key not in self._locked:
            raise UsageError(
                f"Cargo.lock does not have {manifest.name} {manifest.version}",
                reason="lock and Cargo.toml do not belong together",
                hint=_GENERATE,
            )
        self._root = key
        self._nodes[key] = _Node()
        self.supply(key, manifest)
        return key

    def missing(self) -> tuple[Crate, ...]:
        """The packages reached so far whose manifest is not known."""
        return tuple(sorted(self._crate(key) for key, node in self._nodes.items() if node.manifest is None))

    def crates(self) -> tuple[Crate, ...]:
        return tuple(sorted(self._crate(key) for key in self._nodes if key != self._root))

    def _crate(self, key: _Key) -> Crate:
        """Raises UsageError for what the public registry does not have: its name is asked of nobody."""
        locked = self._locked[key]
        kind = (locked.source or "").partition("+")[0]
        if kind in ("registry", "sparse") and locked.source not in _PUBLIC:
            raise UsageError(
                f"{key[0]} {key[1]} is of the registry {locked.source}",
                reason="crates of the public registry can be pinned, no others",
                hint=f"put the source of {key[0]} beside the recipe, or depend on a published crate",
            )
        if locked.checksum is None:
            raise UsageError(
                f"Cargo.lock has no checksum for {key[0]} {key[1]}",
                reason=f"its source is {locked.source or 'a path'}, which is not a registry",
                hint="depend on a published version",
            )
        return Crate(*key, locked.checksum)

    def supply(self, key: _Key, manifest: _Manifest) -> None:
        """Give a reached package its manifest and go on from there."""
        node = self._nodes[key]
        node.manifest = manifest
        waiting, node.enabled = node.enabled, set()
        for name, specs in manifest.dependencies.items():
            if any(not spec.optional for spec in specs):
                self._activate(key, name)
        for feature in sorted(waiting):
            self.enable(key, feature)

    def enable(self, key: _Key, feature: str) -> None:
        """Enable a feature of a reached package, with all that follows from it."""
        # A queue, not recursion: chains of features through chains of crates grow longer than Python's stack.
        self._queue.append((key, feature))
        if len(self._queue) > 1:
            return
        while self._queue:
            self._enable_one(*self._queue[0])
            self._queue.popleft()

    def _enable_one(self, key: _Key, feature: str) -> None:
        node = self._nodes[key]
        if feature in node.enabled:
            return
        node.enabled.add(feature)
        manifest = node.manifest
        if manifest is None:
            return
        if feature not in manifest.features:
            # Either the implied feature of an optional dependency, or `default` which a package need not declare.
            self._activate(key, feature, optional=True)
            return
        for value in manifest.features[feature]:
            if value.startswith("dep:"):
                self._activate(key, value.removeprefix("dep:"), optional=True)
            elif "/" in value:
                name, _, theirs = value.partition("/")
                weak = name.endswith("?")
                name = name.removesuffix("?")
                node.weak[name].add(theirs)
                if not weak:
                    self._activate(key, name, optional=True)
                    if name in manifest.features:
                        self.enable(key, name)
                if name in node.active:
                    self._pass_on(key, name, {theirs})
            else:
                self.enable(key, value)

    def _activate(self, key: _Key, name: str, optional: bool = False) -> None:
        """Use the dependencies called `name`; those that are optional only when `optional`."""
        node = self._nodes[key]
        assert node.manifest is not None
        specs = [spec for spec in node.manifest.dependencies.get(name, ()) if optional or not spec.optional]
        if not specs:
            return
        node.active.add(name)
        for spec in specs:
            for target in self._resolve(key, spec):
                if target not in self._nodes:
                    self._nodes[target] = _Node()
                for feature in (*spec.features, *(("default",) if spec.default_features else ())):
                    self.enable(target, feature)
        self._pass_on(key, name, node.weak[name])

    def _pass_on(self, key: _Key, name: str, features: Iterable[str]) -> None:
        node = self._nodes[key]
        assert node.manifest is not None
        for spec in node.manifest.dependencies.get(name, ()):
            for target in self._resolve(key, spec):
                if target in self._nodes:
                    for feature in sorted(features):
                        self.enable(target, feature)

    def _resolve(self, key: _Key, spec: _Dependency) -> tuple[_Key, ...]:
        """The locked packages that `spec` may mean: none when its platform is another one, rarely more than one."""
        if spec.target is not None and not any(cfg.may_match(spec.target) for cfg in self._cfgs):
            return ()
        candidates = tuple(edge for edge in self._locked[key].dependencies if edge[0] == spec.package)
        if not candidates and not spec.optional:
            raise UsageError(
                f"Cargo.lock lacks {spec.package}, which {key[0]} {key[1]} depends on",
                reason="the lock is older than the Cargo.toml",
                hint="cargo update --workspace",
            )
        matching = tuple(edge for edge in candidates if _satisfies(edge[1], spec.requirement))
        return matching or candidates


# --- versions ---------------------------------------------------------------------------------------------------------

_Numbers = tuple[int, int, int]

_COMPARE: Mapping[str, Callable[[_Numbers, _Numbers], bool]] = {
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
_NUMBER = r"(?:[0-9]{1,20}|[*xX])"
_COMPARATOR = re.compile(rf"(\^|~|=|>=|<=|>|<)?\s*({_NUMBER}(?:\.{_NUMBER}){{0,2}})(?:[-+][0-9A-Za-z.+-]*)?")


def _satisfies(version: str, requirement: str) -> bool:
    """Whether `version` meets a Cargo requirement (Cargo book, "Specifying Dependencies").

    Pre-release tags are ignored: this only tells apart the versions of one name that one package's lock entry lists,
    and those differ in their numbers.
    """
    try:
        found = Version.parse(version).numbers
    except ValueError as error:
        raise UsageError("Cargo.lock cannot be read", reason=str(error), hint=_GENERATE) from error
    return all(_meets(found, part.strip()) for part in requirement.split(","))


def _meets(version: _Numbers, comparator: str) -> bool:
    match = _COMPARATOR.fullmatch(comparator)
    if match is None:
        raise UsageError(f"{comparator!r} is not a version requirement Cargo knows")
    sign = match[1] or "^"
    given = [int(part) for part in match[2].split(".") if part not in ("*", "x", "X")]
    if not given:
        return True
    wildcard = len(given) < len(match[2].split("."))
    low = _padded(given)
    if wildcard or sign == "=":
        return low <= version < _bumped(given, len(given) - 1)
    if sign == "^":
        # The left-most number that is not zero may not change; of `0` and `0.0` the last one given.
        fixed = next((i for i, number in enumerate(given) if number), len(given) - 1)
        return low <= version < _bumped(given, fixed)
    if sign == "~":
        return low <= version < _bumped(given, min(1, len(given) - 1))
    if sign in (">", "<="):
        # `>1.2` is above every 1.2.x, `<=1.2` takes every 1.2.x.
        above = version >= _bumped(given, len(given) - 1)
        return above if sign == ">" else not above
    return _COMPARE[sign](version, low)


def _padded(numbers: Sequence[int]) -> _Numbers:
    major, minor, patch = (*numbers, 0, 0, 0)[:3]
    return major, minor, patch


def _bumped(numbers: Sequence[int], index: int) -> _Numbers:
    """The first version whose number at `index` is one higher."""
    return _padded([*numbers[:index], numbers[index] + 1])
