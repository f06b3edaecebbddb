"""From a Debian suite to exact files: signed indexes, the packages an image needs, the source a series names.

Formats: Debian repository format (InRelease, by-hash, Packages, Sources), deb822(5), Debian Policy chapter 7
(relationships) and the Multi-Arch specification. Only `lock` uses this; what it returns is pinned from then on.
"""

from __future__ import annotations

import datetime as dt
import difflib
import email.utils
import hashlib
import lzma
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import pysequoia
from debian.deb822 import Deb822
from debian.debian_support import NativeVersion

from vzrepro.base.errors import HashMismatch, RemoteError, Untrusted, UsageError
from vzrepro.base.model import FileHash
from vzrepro.sources.signature import first_line

Downloader = Callable[[str], bytes]
"""Gives the bytes behind a `mirror://<archive>/<path>` URL, or raises a VzreproError."""

ArchiveName = Literal["debian", "debian-security"]


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite and the archive its `dists/` directory and pool paths are relative to."""

    name: str
    archive: ArchiveName


def suites(release: str) -> tuple[Suite, ...]:
    """A stable release with its updates and its security fixes, e.g. of `trixie`."""
    return (
        Suite(release, "debian"),
        Suite(f"{release}-updates", "debian"),
        Suite(f"{release}-security", "debian-security"),
    )


@dataclass(frozen=True, slots=True, order=True)
class Deb:
    """One exact .deb. `pool_path` is relative to the archive, `size` is in bytes, `arch` may be `all`."""

    name: str
    version: str
    arch: str
    archive: ArchiveName
    pool_path: str
    size: int
    sha256: FileHash

    @property
    def url(self) -> str:
        """Where it lies, mirror unresolved."""
        return f"mirror://{self.archive}/{self.pool_path}"


@dataclass(frozen=True, slots=True, order=True)
class SourcePackage:
    """A source package's `.orig.tar.*`: `version` is Debian's, `upstream` the part of it that upstream chose."""

    name: str
    version: str
    upstream: str
    archive: ArchiveName
    pool_path: str
    size: int
    sha256: FileHash

    @property
    def url(self) -> str:
        """Where it lies, mirror unresolved."""
        return f"mirror://{self.archive}/{self.pool_path}"


# --- relationships ------------------------------------------------------------------------------------------------


_WANT = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9+.\-]*)(?::(?P<arch>[a-z0-9\-]+))?"
    r"(?:\s*\(\s*(?P<op><<|<=|=|>=|>>)\s*(?P<version>[^\s)]+)\s*\))?"
)
_MAX_VERSION = 1000
_OPERATORS: Mapping[str, Callable[[NativeVersion, NativeVersion], bool]] = {
    "<<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    ">=": operator.ge,
    ">>": operator.gt,
}


@dataclass(frozen=True, slots=True, order=True)
class _Want:
    """One alternative of a relationship, or one provided name (where `op` can only be `=`)."""

    name: str
    arch: str = ""
    op: str = ""
    version: str = ""

    def allows(self, version: str) -> bool:
        if not self.op:
            return True
        # Comparing is slow, and "(= the same)" is the most frequent case by far.
        if self.op in ("=", "<=", ">=") and version == self.version:
            return True
        return bool(version) and _OPERATORS[self.op](NativeVersion(version), NativeVersion(self.version))

    def __str__(self) -> str:
        arch = f":{self.arch}" if self.arch else ""
        return f"{self.name}{arch}" + (f" ({self.op} {self.version})" if self.op else "")


_Group = tuple[_Want, ...]


def _version(text: str) -> str:
    """`text`, when it is a version that can be compared. Raises ValueError."""
    if len(text) > _MAX_VERSION:
        raise ValueError(f"{text[:40]}… is no version")
    return str(NativeVersion(text))


def _wants(text: str) -> _Group:
    """Alternatives separated by `|`."""
    found = []
    for part in text.split("|"):
        match = _WANT.fullmatch(part.strip())
        try:
            if match is None or (match["version"] and not _version(match["version"])):
                raise ValueError("it cannot be parsed")
        except ValueError as error:
            raise RemoteError(f"the package index has the relationship {part.strip()!r}", reason=str(error)) from error
        found.append(_Want(*(match[name] or "" for name in ("name", "arch", "op", "version"))))
    return tuple(found)


def _groups(text: str) -> tuple[_Group, ...]:
    return tuple(_wants(part) for part in text.split(",") if part.strip())


_PRIORITIES = {"required": 0, "important": 1, "standard": 2}


@dataclass(frozen=True, slots=True)
class _Package:
    deb: Deb
    multi_arch: str
    rank: int
    depends: tuple[_Group, ...]
    provides: tuple[_Want, ...]

    def __str__(self) -> str:
        return self.deb.name if self.deb.arch == "all" else f"{self.deb.name}:{self.deb.arch}"


# --- indexes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Text:
    """One unpacked Packages or Sources file, searched in place: of 65,000 stanzas a few hundred are ever parsed."""

    archive: ArchiveName
    data: bytes
    by_name: dict[str, list[int]]
    by_provided: dict[str, list[int]]

    def stanza(self, position: int) -> dict[str, str]:
        before = self.data.rfind(b"\n\n", 0, position)
        start = before + 2 if before >= 0 else 0
        end = self.data.find(b"\n\n", position)
        return dict(Deb822(self.data[start : end if end >= 0 else None].decode("utf-8", "replace")))


def _text(archive: ArchiveName, data: bytes) -> _Text:
    text = _Text(archive, data, {}, {})
    for match in re.finditer(rb"^Package: *(\S+)$", data, re.MULTILINE):
        text.by_name.setdefault(match[1].decode("utf-8", "replace"), []).append(match.start())
    for match in re.finditer(rb"^Provides:([^\n]*(?:\n[ \t][^\n]*)*)", data, re.MULTILINE):
        for part in match[1].decode("utf-8", "replace").split(","):
            text.by_provided.setdefault(re.split(r"[\s(:]", part.strip(), maxsplit=1)[0], []).append(match.start())
    return text


@dataclass(frozen=True, slots=True)
class _Release:
    """A verified InRelease: when it was made and what it says each index file holds (path → sha256, size)."""

    suite: Suite
    date: dt.datetime
    by_hash: bool
    files: Mapping[str, tuple[str, int]]


class Index:
    """The signed indexes of a few suites. InRelease files are fetched and checked at once, the rest when needed.

    `keyring` holds OpenPGP certificates, armoured or binary; one good signature by any of them suffices. `now` is
    an aware time. `allow_expired` accepts an InRelease past its Valid-Until (old snapshots); signatures are checked
    all the same. Raises Untrusted (signature, wrong suite, expired), HashMismatch, RemoteError (malformed), and
    what `download` raises.
    """

    def __init__(
        self,
        download: Downloader,
        keyring: bytes,
        *,
        suites: Sequence[Suite],
        now: dt.datetime,
        components: Sequence[str] = ("main",),
        allow_expired: bool = False,
    ) -> None:
        self._download = download
        self._components = tuple(components)
        try:
            certificates = pysequoia.Cert.split_bytes(keyring)
        except RuntimeError as error:
            raise UsageError("the archive keyring cannot be read", reason=first_line(error)) from error
        self._releases = tuple(_release(download, suite, certificates, now, allow_expired) for suite in suites)
        self._texts: dict[str, tuple[_Text, ...]] = {}
        self._candidates: dict[tuple[str, str], _Package | None] = {}

    @property
    def dates(self) -> Mapping[str, dt.datetime]:
        """Suite name → the Date of its InRelease (UTC)."""
        return {release.suite.name: release.date for release in self._releases}

    @property
    def snapshot(self) -> str:
        """The newest of `dates` as `YYYYMMDDTHHMMSSZ`: the state of the archive that the results belong to."""
        return max(release.date for release in self._releases).strftime("%Y%m%dT%H%M%SZ")

    def resolve(
        self,
        packages: Iterable[str],
        *,
        native: str = "amd64",
        without: Mapping[str, str] | None = None,
        foreign_depends: bool = False,
    ) -> tuple[Deb, ...]:
        """The packages and all they need (Pre-Depends and Depends, nothing recommended), sorted.

        `packages` are `name` or `name:arch`; `native` is the build platform's Debian architecture. `without` maps
        packages to leave out, though others depend on them, to the reason. Dependencies of another architecture's
        packages are followed only with `foreign_depends`: static libraries need none. Always the highest version
        of all suites; the result does not depend on the order of `packages`. Essential packages are not implied,
        Conflicts are not looked at (two packages that ship the same path stop the image later).
        Raises UsageError for unknown packages and for dependencies nothing satisfies, naming the chain.
        """
        resolution = _Resolution(self, native, without or {}, foreign_depends)
        for request in sorted(set(packages)):
            resolution.request(request)
        return resolution.close()

    def sources(self, name: str, series: str) -> tuple[SourcePackage, ...]:
        """The versions of source package `name` whose upstream version is in `series`, newest first.

        `6.12` holds 6.12.117; of several Debian revisions of an upstream version the newest counts. Raises UsageError
        when there is no such package, no such version, or none of them has an upstream tarball.
        """
        versions: dict[str, tuple[ArchiveName, dict[str, str]]] = {}
        known: set[str] = set()
        for text in self._load("source"):
            known.update(text.by_name)
            for position in text.by_name.get(name, ()):
                stanza = text.stanza(position)
                with _described(stanza):
                    versions.setdefault(_version(stanza["Version"]), (text.archive, stanza))
        if not versions:
            _unknown("source package", name, known)
        fitting = [v for v in versions if re.match(rf"{re.escape(series)}(?![0-9A-Za-z~])", _upstream(v))]
        if not fitting:
            raise UsageError(
                f"source package {name} has no version in the series {series}",
                reason=f"the suites have {', '.join(sorted(versions, key=NativeVersion))}",
                hint="declare the series of one of these versions",
            )
        found: dict[str, SourcePackage] = {}
        for version in sorted(fitting, key=NativeVersion, reverse=True):
            package = _source_package(name, version, *versions[version])
            if package is not None:
                found.setdefault(package.upstream, package)
        if not found:
            raise UsageError(f"source package {name} {max(fitting, key=NativeVersion)} has no upstream tarball")
        return tuple(found.values())

    def candidate(self, name: str, arch: str) -> _Package | None:
        """The highest version of a package in one architecture's indexes; the first suite wins a tie."""
        key = (name, arch)
        if key not in self._candidates:
            found = [
                _package(text.archive, text.stanza(position))
                for text in self._load(f"binary-{arch}")
                for position in text.by_name.get(name, ())
            ]
            best = found[0] if found else None
            for other in found[1:]:
                if best and NativeVersion(best.deb.version) < NativeVersion(other.deb.version):
                    best = other
            self._candidates[key] = best
        return self._candidates[key]

    def providers(self, name: str, arch: str) -> list[_Package]:
        """Candidates that provide `name`, most important first, then by name."""
        names = {
            text.stanza(position)["Package"]
            for text in self._load(f"binary-{arch}")
            for position in text.by_provided.get(name, ())
        }
        packages = [package for each in names if (package := self.candidate(each, arch))]
        return sorted(packages, key=lambda package: (package.rank, package.deb.name))

    def names(self, arch: str) -> set[str]:
        """Every package name of one architecture."""
        return {name for text in self._load(f"binary-{arch}") for name in text.by_name}

    def _load(self, kind: str) -> tuple[_Text, ...]:
        if kind not in self._texts:
            file = "Sources" if kind == "source" else "Packages"
            self._texts[kind] = tuple(
                _text(release.suite.archive, _index_file(self._download, release, f"{component}/{kind}/{file}"))
                for release in self._releases
                for component in self._components
            )
        return self._texts[kind]


def _release(
    download: Downloader, suite: Suite, certificates: list[pysequoia.Cert], now: dt.datetime, allow_expired: bool
) -> _Release:
    """Fetch and check one InRelease. Only the text under the signature is ever looked at."""
    where = f"mirror://{suite.archive}/dists/{suite.name}/InRelease"
    try:
        signed = pysequoia.verify(bytes=download(where), store=lambda _key_ids: certificates).bytes
    except RuntimeError as error:
        known = ", ".join(certificate.fingerprint for certificate in certificates)
        raise Untrusted(
            f"{where} is not signed by a known key",
            reason=f"{first_line(error)} The keyring has {known}.",
            hint="a mirror that alters files, or new archive keys: compare with the debian-archive-keyring package",
        ) from error
    try:
        fields = Deb822((signed or b"").decode())
        if suite.name not in (fields["Suite"], fields["Codename"]):
            raise Untrusted(
                f"{where} is of another suite", reason=f"it says {fields['Suite']}, codename {fields['Codename']}"
            )
        date, files = _date(fields["Date"]), {}
        for line in fields["SHA256"].split("\n"):
            if line.strip():
                digest, size, path = line.split()
                files[path] = (FileHash(digest).hex, _size(size))
        until = _date(fields["Valid-Until"]) if "Valid-Until" in fields else None
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise RemoteError(f"{where} is malformed", reason=f"{type(error).__name__}: {error}") from error
    if until is not None and until < now and not allow_expired:
        raise Untrusted(
            f"{where} expired on {until:%Y-%m-%d %H:%M} UTC",
            reason="the mirror is stale or is kept from showing you newer fixes; or this is an old snapshot",
            hint="try another mirror; for a snapshot that is meant to be old, allow it (allow_expired)",
        )
    return _Release(suite, date, fields.get("Acquire-By-Hash") == "yes", files)


def _date(text: str) -> dt.datetime:
    date = email.utils.parsedate_to_datetime(text)
    return date.replace(tzinfo=dt.UTC) if date.tzinfo is None else date.astimezone(dt.UTC)


def _index_file(download: Downloader, release: _Release, path: str) -> bytes:
    """The unpacked index file at `path` (without .xz) below the suite's directory, checked against its InRelease."""
    where = f"mirror://{release.suite.archive}/dists/{release.suite.name}"
    try:
        (_, plain_size), (digest, size) = release.files[path], release.files[f"{path}.xz"]
    except KeyError as error:
        raise UsageError(
            f"suite {release.suite.name} has no {path}.xz", hint="check the architecture and the component"
        ) from error
    folder = path.rpartition("/")[0]
    url = f"{where}/{folder}/by-hash/SHA256/{digest}" if release.by_hash else f"{where}/{path}.xz"
    packed = download(url)
    found = hashlib.sha256(packed).hexdigest()
    if (len(packed), found) != (size, digest):
        raise HashMismatch(
            f"{url} is not the file that the suite's InRelease names",
            reason=f"wanted {size} bytes, sha256 {digest}\nfound  {len(packed)} bytes, sha256 {found}",
            hint="the mirror is being updated or is broken: try again, or another mirror",
        )
    try:
        # One byte more than promised, so that a longer file is seen and none is unpacked beyond measure.
        plain = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(packed, plain_size + 1)
    except lzma.LZMAError as error:
        raise RemoteError(f"{url} cannot be unpacked", reason=str(error)) from error
    if len(plain) != plain_size:
        raise HashMismatch(
            f"{url} does not unpack to {plain_size} bytes",
            reason=f"found {len(plain)} bytes",
            hint="try another mirror",
        )
    return plain


def _source_package(name: str, version: str, archive: ArchiveName, stanza: Mapping[str, str]) -> SourcePackage | None:
    tarball = re.compile(re.escape(f"{name}_{_upstream(version)}.orig.tar.") + r"[a-z0-9]+")
    for line in stanza.get("Checksums-Sha256", "").splitlines():
        if len(parts := line.split()) == 3 and tarball.fullmatch(parts[2]):
            with _described(stanza):
                path, size = _pool_path(f"{stanza['Directory']}/{parts[2]}"), _size(parts[1])
                return SourcePackage(name, version, _upstream(version), archive, path, size, FileHash(parts[0]))
    return None


def _pool_path(path: str) -> str:
    if not re.fullmatch(r"pool/[A-Za-z0-9+.~_/%:\-]+", path) or ".." in path.split("/"):
        raise RemoteError(f"the package index names the file {path!r}", reason="that is no path in a pool")
    return path


def _upstream(version: str) -> str:
    return NativeVersion(version).upstream_version or ""


@contextmanager
def _described(stanza: Mapping[str, str]) -> Iterator[None]:
    """A field that is missing in an index, or is no version, number or hash, is a fault of the mirror."""
    try:
        yield
    except (KeyError, ValueError) as error:
        raise RemoteError(
            f"the package index describes {stanza.get('Package', 'a package')} badly", reason=repr(error)
        ) from error


def _size(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{text[:40]!r} is no size")
    return int(text)


def _package(archive: ArchiveName, stanza: Mapping[str, str]) -> _Package:
    with _described(stanza):
        deb = Deb(
            stanza["Package"],
            _version(stanza["Version"]),
            stanza["Architecture"],
            archive,
            _pool_path(stanza["Filename"]),
            _size(stanza["Size"]),
            FileHash(stanza["SHA256"]),
        )
    return _Package(
        deb,
        stanza.get("Multi-Arch", "no"),
        _PRIORITIES.get(stanza.get("Priority", ""), len(_PRIORITIES)),
        _groups(stanza.get("Pre-Depends", "")) + _groups(stanza.get("Depends", "")),
        tuple(want for group in _groups(stanza.get("Provides", "")) for want in group),
    )


def _unknown(what: str, name: str, known: Iterable[str]) -> NoReturn:
    near = difflib.get_close_matches(name, sorted(known), 3)
    raise UsageError(
        f"there is no {what} {name} in these suites",
        hint=f"did you mean {' or '.join(near)}?" if near else "check the spelling and the suites",
    )


# --- resolution ---------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Resolution:
    """A growing set of chosen packages.

    What can be met in one way only is chosen first, and choices are made in sorted order after that; so the outcome
    is a function of the set of requests.
    """

    index: Index
    native: str
    without: Mapping[str, str]
    foreign_depends: bool
    chosen: dict[str, _Package] = field(default_factory=dict)
    named: dict[str, list[_Package]] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    forced: list[tuple[str, _Group]] = field(default_factory=list)
    choices: set[tuple[_Group, str]] = field(default_factory=set)

    def request(self, spec: str) -> None:
        name, _, arch = spec.partition(":")
        if name in self.without:
            raise UsageError(
                f"package {name} is both asked for and left out", reason=f"left out because: {self.without[name]}"
            )
        package = self.index.candidate(name, arch or self.native)
        if package is None:
            _unknown("package", spec, self.index.names(arch or self.native))
        self._choose(package, "")

    def close(self) -> tuple[Deb, ...]:
        while self.forced or self.choices:
            if self.forced:
                parent, group = self.forced.pop()
            else:
                self.choices.remove(least := min(self.choices))
                group, parent = least
                if self._is_met(group, parent):
                    continue
            if (package := self._select(group, parent)) is not None:
                self._choose(package, parent)
        return tuple(sorted(package.deb for package in self.chosen.values()))

    def _choose(self, package: _Package, parent: str) -> None:
        key = str(package)
        if key in self.chosen:
            return
        self.chosen[key] = package
        self.parents[key] = parent
        for name in {package.deb.name, *(want.name for want in package.provides)}:
            self.named.setdefault(name, []).append(package)
        if package.deb.arch not in ("all", self.native) and not self.foreign_depends:
            return
        for group in package.depends:
            if len(group) == 1 and any(self._real(group[0], key)):
                self.forced.append((key, group))
            else:
                self.choices.add((group, key))

    def _arch(self, key: str) -> str:
        """The architecture a chosen package's unqualified dependencies are of: `all` counts as native."""
        arch = self.chosen[key].deb.arch
        return self.native if arch == "all" else arch

    def _fits(self, package: _Package, want: _Want, parent: str) -> bool:
        """Whether `package` meets `want` of the chosen package `parent`, by name or by Provides."""
        arch = self.native if package.deb.arch == "all" else package.deb.arch
        if want.arch in ("", "any", "native"):
            anywhere = package.multi_arch == "foreign" or (want.arch == "any" and package.multi_arch == "allowed")
            if arch != self._arch(parent) and not anywhere:
                return False
        elif arch != want.arch:
            return False
        if package.deb.name == want.name and want.allows(package.deb.version):
            return True
        return any(given.name == want.name and want.allows(given.version) for given in package.provides)

    def _is_met(self, group: _Group, parent: str) -> bool:
        return any(self._fits(package, want, parent) for want in group for package in self.named.get(want.name, ()))

    def _arches(self, want: _Want, parent: str) -> tuple[str, ...]:
        if want.arch not in ("", "any", "native"):
            return (want.arch,)
        # Native first: of a Multi-Arch: foreign tool, that is the one which runs here.
        return tuple(dict.fromkeys((self.native, self._arch(parent))))

    def _real(self, want: _Want, parent: str) -> Iterator[_Package]:
        for arch in self._arches(want, parent):
            package = self.index.candidate(want.name, arch)
            if package is not None and self._fits(package, want, parent):
                yield package

    def _select(self, group: _Group, parent: str) -> _Package | None:
        """The package to take for a dependency, None if it is met by something left out on purpose."""
        for want in group:
            if want.name in self.without:
                return None
            left_out = False
            for package in self._real(want, parent):
                return package
            for arch in self._arches(want, parent):
                for package in self.index.providers(want.name, arch):
                    if not self._fits(package, want, parent):
                        continue
                    if package.deb.name not in self.without:
                        return package
                    left_out = True
            if left_out:
                return None
        raise self._unsatisfied(group, parent)

    def _unsatisfied(self, group: _Group, parent: str) -> UsageError:
        chain = [parent]
        while above := self.parents[chain[0]]:
            chain.insert(0, above)
        there = [
            f"{package} is {package.deb.version}"
            for want in group
            for arch in self._arches(want, parent)
            if (package := self.index.candidate(want.name, arch))
        ]
        return UsageError(
            f"{parent} needs {' | '.join(map(str, group))}, which nothing in these suites satisfies",
            reason=f"wanted by {' → '.join(chain)}; " + ("; ".join(dict.fromkeys(there)) or "no package has that name"),
            hint=f"add the suite that has it, or leave {group[0].name} out with a reason if it is not needed to run",
        )
