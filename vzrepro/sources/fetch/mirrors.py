"""Where the files behind `mirror://` names are: turns one name into the URLs to try, in order.

Configured places come first, then those the host's own clients use (apt's sources, Cargo's source replacement), then
public archives. Nothing here enters a hash: every file is pinned by its sha256, so a place is only ever convenient.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from vzrepro.base.errors import RemoteError, UsageError, VzreproError
from vzrepro.net import scheme_of, shown

VARIABLE = "VZREPRO_MIRRORS"
"""Environment: `<name>=<URL>` separated by blanks; a name may come several times, in the order of preference."""

ELSEWHERE = f"name another place: a further URL in the recipe, or, where it has none, {VARIABLE}='<name>=https://…'"
"""What to do about a file that no place gives as it should be. Recipes have no URLs of Debian's packages, of crates, of
Python packages, and of what is behind `mirror://` names."""

ARCHIVES = ("debian", "debian-security")
CRATES = "crates"
CRATES_INDEX = "crates-index"
PYPI = "pypi"

# The registry is named after its index, as every Cargo.lock spells it; package registries' host names are derived
# from such names here, never written down.
_CRATE_REGISTRY = "crates.io-index".removesuffix("-index")
_VENDOR = "debian"
_PYTHON_INDEX = f"https://{PYPI}.org/simple"

PUBLIC: Mapping[str, Sequence[str]] = {
    "gnu": ("https://ftpmirror.gnu.org", "https://ftp.gnu.org/gnu"),
    "kernel": ("https://cdn.kernel.org/pub", "https://mirrors.edge.kernel.org/pub"),
}
"""The places of names that nobody need configure, after those that are: name → URLs."""

_MAX_INDEX_CONFIG = 1 << 16
_SNAPSHOT = re.compile(r"\d{8}T\d{6}Z")
_CRATE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CRATE_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]*")


class Get(Protocol):
    """Reads a small file: candidate URLs, the most bytes it may have, and the media types that are understood
    (`fetch.get`)."""

    def __call__(self, urls: Sequence[str], max_size: int, *, accept: str | None = None) -> bytes:
        """The file. Raises VzreproError."""


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Read the value of `$VZREPRO_MIRRORS`: name → places. Raises UsageError for a word of another form."""
    found: dict[str, tuple[str, ...]] = {}
    for word in text.split():
        name, equals, place = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", name) or scheme_of(place) not in _SCHEMES:
            raise UsageError(
                f"${VARIABLE} has {word!r}, which is not <name>=<URL>",
                hint=f"export {VARIABLE}='debian=https://mirror.example/debian crates=https://mirror.example/crates'",
            )
        found[name] = (*found.get(name, ()), place)
    return found


_SCHEMES = ("http", "https", "file")


def apt_places(etc_apt: Path) -> dict[str, tuple[str, ...]]:
    """The Debian archives that apt's sources below `etc_apt` (`/etc/apt`) name: archive → URLs, as written there.

    An archive is recognised by the last part of its URL's path. Whoever else publishes for Debian calls that part so,
    too, but has a key of his own (`Signed-By`) or no component `main`. `mirror+file:` stands for the URLs in that file
    (apt-transport-mirror(1)). What cannot be read is left out (sources.list(5)).
    """
    sources: list[_AptSource] = []
    parts = etc_apt / "sources.list.d"
    for path in (etc_apt / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))):
        text = _read(path)
        sources += _deb822_sources(text) if path.suffix == ".sources" else _one_line_sources(text)
    uris = [uri for source in sources if source.is_debians() for each in source.uris for uri in _listed(each)]
    found: dict[str, tuple[str, ...]] = {}
    for uri in dict.fromkeys(uris):
        if scheme_of(uri) not in _SCHEMES:
            continue
        archive = urlsplit(uri).path.rstrip("/").rpartition("/")[2]
        if archive in ARCHIVES:
            found[archive] = (*found.get(archive, ()), uri)
    return found


@dataclass(frozen=True, slots=True)
class _AptSource:
    """A line or stanza of apt's sources; `signed_by` is "" when any key of the system's will do."""

    uris: Sequence[str]
    components: Sequence[str]
    signed_by: str

    def is_debians(self) -> bool:
        keys = not self.signed_by or f"{_VENDOR}-archive" in self.signed_by
        return keys and (not self.components or "main" in self.components)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # the second for a name that no file can have
        return ""


def _listed(uri: str) -> list[str]:
    """The URLs that an URI of apt's stands for, those of the smallest `priority:` number first."""
    if not uri.startswith(_MIRROR_FILE):
        return [uri]
    found: list[tuple[int, str]] = []
    for line in _read(Path("/", unquote(uri.removeprefix(_MIRROR_FILE)).lstrip("/"))).splitlines():
        place, *notes = line.split()[:20] or ["#"]
        ranks = [int(note[9:]) for note in notes if re.fullmatch(r"priority:[0-9]{1,9}", note)]
        if not place.startswith("#"):
            found.append((min(ranks, default=_UNRANKED), place))
    return [place for _, place in sorted(found, key=lambda each: each[0])]


_MIRROR_FILE = "mirror+file:"
_UNRANKED = 10**9


def _one_line_sources(text: str) -> list[_AptSource]:
    pattern = re.compile(
        r"^[ \t]*deb(?:-src)?[ \t]+(?:\[([^\]\n]*)\][ \t]*)?(\S+)(?:[ \t]+\S+)?([^#\n]*)", re.MULTILINE
    )
    found = []
    for options, uri, components in pattern.findall(text):
        keys = [word.partition("=")[2] for word in options.split() if word.lower().startswith("signed-by=")]
        found.append(_AptSource([uri], components.split(), " ".join(keys)))
    return found


def _deb822_sources(text: str) -> list[_AptSource]:
    found: list[_AptSource] = []
    # Comment lines count as if they were not there, also between the lines of one field.
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for stanza in re.split(r"\n[ \t]*\n", lines):
        fields: dict[str, str] = {}
        name = ""
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            else:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        if fields.get("enabled", "yes").lower() not in ("no", "false", "without", "off", "disable", "0"):
            found.append(
                _AptSource(
                    fields.get("uris", "").split(), fields.get("components", "").split(), fields.get("signed-by", "")
                )
            )
    return found


def cargo_index(cargo_home: Path) -> str | None:
    """The sparse index that Cargo's configuration in `cargo_home` puts in the public registry's place, if any.

    Follows `[source.<registry>] replace-with` chains (Cargo book, "Source Replacement"); the URL ends in a slash.
    """
    for name in ("config.toml", "config"):
        try:
            document = tomllib.loads((cargo_home / name).read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            continue
        sources = _table(document, "source")
        source = _CRATE_REGISTRY.replace(".", "-")
        for _ in range(len(sources) + 1):
            entry = _table(sources, source)
            replaced = entry.get("replace-with")
            if isinstance(replaced, str):
                source = replaced
                continue
            registry = entry.get("registry") or _table(_table(document, "registries"), source).get("index")
            if isinstance(registry, str) and registry.startswith("sparse+"):
                return registry.removeprefix("sparse+").rstrip("/") + "/"
            return None
        return None
    return None


def _table(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The table at `key`; an empty one for none, and for a value that is no table: Cargo says what is wrong with it."""
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def python_index(environ: Mapping[str, str]) -> str | None:
    """The package index that pip's own settings name, if any: `PIP_INDEX_URL`, else `index-url` in its configuration
    (pip's documentation, "Configuration": the user's file, then the system's)."""
    if found := environ.get("PIP_INDEX_URL"):
        return found
    home = Path(environ.get("HOME") or "/nonexistent")
    config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    named = [environ["PIP_CONFIG_FILE"]] if environ.get("PIP_CONFIG_FILE") else []
    for name in (*named, f"{config}/pip/pip.conf", f"{home}/.pip/pip.conf", "/etc/pip.conf"):
        path = Path(name)
        if not path.is_file():
            continue
        from configparser import ConfigParser, Error  # a few milliseconds that hardly anybody needs

        parser = ConfigParser(interpolation=None)
        try:
            parser.read_string(path.read_text(encoding="utf-8"))
            return parser["global"]["index-url"]
        except (Error, OSError, UnicodeDecodeError, KeyError):
            continue
    return None


class Mirrors:
    """Answers where a name may be downloaded; a function of what it was made with.

    `configured` maps a mirror's name to its places, best first: a prefix for the path, for `crates` also a template
    with `{name}` and `{version}`, for `pypi` the address of an index. `apt`, `crate_index` and `python_index` are what
    the functions of (about) these names found; `get` reads `config.json` of the index of crates the first time a crate
    is asked for, and a Python project's page for each of its files; a failure of it only loses that place.
    """

    def __init__(
        self,
        configured: Mapping[str, Sequence[str]],
        *,
        apt: Mapping[str, Sequence[str]] | None = None,
        crate_index: str | None = None,
        python_index: str | None = None,
        get: Get | None = None,
    ) -> None:
        self._configured = configured
        self._apt = apt or {}
        self._index = crate_index
        self._get = get
        self.python_indexes = (*configured.get(PYPI, ()), *filter(None, [python_index]), _PYTHON_INDEX)
        self._index_template = cache(lambda: _template_of(crate_index, get))

    @classmethod
    def of_host(
        cls,
        configured: Mapping[str, Sequence[str]],
        environ: Mapping[str, str],
        *,
        get: Get | None = None,
        etc_apt: Path = Path("/etc/apt"),
    ) -> Mirrors:
        """The mirrors of this machine: `$VZREPRO_MIRRORS`, then `configured`, then apt's and Cargo's own.

        Raises UsageError when the variable is malformed.
        """
        places = parse(environ.get(VARIABLE, ""))
        for name, more in configured.items():
            places[name] = (*places.get(name, ()), *more)
        home = environ.get("CARGO_HOME") or f"{environ.get('HOME', '/nonexistent')}/.cargo"
        return cls(
            places,
            apt=apt_places(etc_apt),
            crate_index=cargo_index(Path(home)),
            python_index=python_index(environ),
            get=get,
        )

    def urls(self, url: str, *, snapshot: str | None = None) -> tuple[str, ...]:
        """The URLs to try for `url`, best first; never empty.

        `mirror://<name>/<path>` is looked up; `http:`, `https:` and `file:` URLs stand for themselves. `snapshot` is
        the lock's time stamp, `YYYYMMDDTHHMMSSZ`, that names the public Debian archive of that moment.
        Raises UsageError for another scheme, a malformed name or time stamp, or a name that has no place.
        """
        if snapshot is not None and not _SNAPSHOT.fullmatch(snapshot):
            raise UsageError(f"{snapshot!r} is not a snapshot time", hint="write it as YYYYMMDDTHHMMSSZ")
        scheme, _, rest = url.partition("://")
        if scheme in _SCHEMES and rest:
            return (url,)
        name, slash, path = rest.partition("/")
        segments = path.split("/")
        if scheme != "mirror" or not name or not slash or any(part in ("", ".", "..") for part in segments):
            raise UsageError(
                f"{url!r} is not a URL that can be fetched",
                hint="use mirror://<name>/<path>, https://…, http://… or file:///…",
            )
        if name == CRATES:
            found = self._crate(url, segments)
        elif name == PYPI:
            found = self._python(url, segments)
        else:
            found = self._file(name, path, snapshot)
        if not found:
            raise UsageError(
                f"no place is known for mirror://{name}",
                reason=f"{url} is to be fetched",
                hint=f"export {VARIABLE}='{name}=https://…'",
            )
        return tuple(dict.fromkeys(found))

    def urls_of_all(self, places: Sequence[str], *, snapshot: str | None = None) -> tuple[str, ...]:
        """The URLs to try for a file that is at several places, best first; never empty.

        What `urls` raises for one of them counts only if none of the others gives any.
        """
        found: list[str] = []
        failure: VzreproError | None = None
        for place in places:
            try:
                found += self.urls(place, snapshot=snapshot)
            except (UsageError, RemoteError) as error:
                failure = failure or error
        if failure is not None and not found:
            raise failure
        return tuple(dict.fromkeys(found))

    def _file(self, name: str, path: str, snapshot: str | None) -> list[str]:
        # apt escapes `+` as well: some servers take a bare one for a blank.
        path = quote(path, safe="/~:")
        prefixes = [*self._configured.get(name, ()), *self._apt.get(name, ())]
        if name == CRATES_INDEX:
            prefixes += [*filter(None, [self._index]), f"https://index.{_CRATE_REGISTRY}"]
        prefixes += PUBLIC.get(name, ())
        if snapshot is not None and name in ARCHIVES:
            prefixes.append(f"https://snapshot.{_VENDOR}.org/archive/{name}/{snapshot}")
        if not prefixes and name in ARCHIVES:  # a host that is no Debian, with nothing set
            prefixes.append(f"https://deb.{_VENDOR}.org/{name}")
        return [f"{prefix.rstrip('/')}/{path}" for prefix in prefixes]

    def _python(self, url: str, segments: Sequence[str]) -> list[str]:
        """Where the indexes say that a project's file is: asked for, since only they know."""
        if len(segments) != 2:
            raise UsageError(f"{url!r} does not name a Python package", hint=f"write mirror://{PYPI}/<name>/<file>")
        from vzrepro.sources import simple

        project, name = segments
        found: list[str] = []
        failures: list[str] = []
        for index in self.python_indexes:
            page = simple.page_of(index, project)
            try:
                if self._get is None:
                    break
                files = simple.files(self._get([page], simple.MAX_PAGE, accept=simple.ACCEPT), page, project)
                found += [file.url for file in files if file.name == name]
            except VzreproError as error:
                failures.append(error.in_a_line)
        if not found:
            raise RemoteError(
                f"no package index has {project}/{name}",
                reason="\n".join(failures) or f"asked: {', '.join(map(shown, self.python_indexes))}",
                hint=f"name one that has it: export {VARIABLE}='{PYPI}=https://…/simple'",
            )
        return found

    def _crate(self, url: str, segments: Sequence[str]) -> list[str]:
        if len(segments) != 2 or not _CRATE_NAME.fullmatch(segments[0]) or not _CRATE_VERSION.fullmatch(segments[1]):
            raise UsageError(f"{url!r} does not name a crate", hint="write mirror://crates/<name>/<version>")
        name, version = segments
        version = quote(version, safe="")
        default = "/{name}/{name}-{version}.crate"
        templates = [
            place if "{name}" in place else place.rstrip("/") + default for place in self._configured.get(CRATES, ())
        ]
        if (template := self._index_template()) is not None:
            templates.append(template)
        templates.append(f"https://static.{_CRATE_REGISTRY}/crates{default}")
        return [
            template.replace("{name}", name)
            .replace("{version}", version)
            .replace("{prefix}", _index_prefix(name))
            .replace("{lowerprefix}", _index_prefix(name.lower()))
            for template in templates
        ]


def _template_of(crate_index: str | None, get: Get | None) -> str | None:
    """Where a sparse index says that its crates are (Cargo book, "Index Format", `config.json`)."""
    if crate_index is None or get is None:
        return None
    try:
        place = json.loads(get([crate_index + "config.json"], _MAX_INDEX_CONFIG))["dl"]
    except (VzreproError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(place, str) or scheme_of(place) not in _SCHEMES or "{sha256-checksum}" in place:
        return None
    markers = ("{crate}", "{version}", "{prefix}", "{lowerprefix}")
    if not any(marker in place for marker in markers):
        place = place.rstrip("/") + "/{crate}/{version}/download"
    return place.replace("{crate}", "{name}")


def index_url(name: str) -> str:
    """The `mirror://` URL of a crate's file in the sparse index (Cargo book, "Index Files")."""
    return f"mirror://{CRATES_INDEX}/{_index_prefix(name.lower())}/{name.lower()}"


def _index_prefix(name: str) -> str:
    """The directory of a crate in an index (Cargo book, "Index Files")."""
    if len(name) <= 2:
        return str(len(name))
    return f"3/{name[0]}" if len(name) == 3 else f"{name[:2]}/{name[2:4]}"
