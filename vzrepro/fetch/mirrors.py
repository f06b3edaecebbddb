"""Where the files behind `mirror://` names are: turns one name into the URLs to try, in order.

Configured places come first, then those the host's own clients use (apt's sources, Cargo's source replacement), then
public archives. Nothing here enters a hash: every file is pinned by its sha256, so a place is only ever convenient.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote, urlsplit

from vzrepro.errors import UsageError, VzreproError

VARIABLE = "VZREPRO_MIRRORS"
"""Environment: `<name>=<URL>` separated by blanks; a name may come several times, in the order of preference."""

ARCHIVES = ("debian", "debian-security")
CRATES = "crates"
CRATES_INDEX = "crates-index"

# The registry is named after its index, as every Cargo.lock spells it; package registries' host names are derived
# from such names here, never written down.
_CRATE_REGISTRY = "crates.io-index".removesuffix("-index")
_VENDOR = "debian"

_MAX_INDEX_CONFIG = 1 << 16
_SNAPSHOT = re.compile(r"\d{8}T\d{6}Z")
_CRATE_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CRATE_VERSION = re.compile(r"[0-9][0-9A-Za-z.+-]*")

Get = Callable[[Sequence[str], int], bytes]
"""Reads a small file: candidate URLs and the most bytes it may have (`fetch.get`)."""


def parse(text: str) -> dict[str, tuple[str, ...]]:
    """Read the value of `$VZREPRO_MIRRORS`: name → places. Raises UsageError for a word of another form."""
    found: dict[str, tuple[str, ...]] = {}
    for word in text.split():
        name, equals, place = word.partition("=")
        if not equals or not re.fullmatch(r"[a-z][a-z0-9-]*", name) or urlsplit(place).scheme not in _SCHEMES:
            raise UsageError(
                f"${VARIABLE} has {word!r}, which is not <name>=<URL>",
                hint=f"export {VARIABLE}='debian=https://mirror.example/debian crates=https://mirror.example/crates'",
            )
        found[name] = (*found.get(name, ()), place)
    return found


_SCHEMES = ("http", "https", "file")


def apt_places(etc_apt: Path) -> dict[str, tuple[str, ...]]:
    """The Debian archives that apt's sources below `etc_apt` (`/etc/apt`) name: archive → URLs, as written there.

    An archive is recognised by the last part of its URL's path. What cannot be read is left out (sources.list(5)).
    """
    uris: list[str] = []
    parts = etc_apt / "sources.list.d"
    for path in (etc_apt / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))):
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        uris += _deb822_uris(text) if path.suffix == ".sources" else _one_line_uris(text)
    found: dict[str, tuple[str, ...]] = {}
    for uri in dict.fromkeys(uris):
        parsed = urlsplit(uri)
        archive = parsed.path.rstrip("/").rpartition("/")[2]
        if parsed.scheme in _SCHEMES and archive in ARCHIVES:
            found[archive] = (*found.get(archive, ()), uri)
    return found


def _one_line_uris(text: str) -> list[str]:
    pattern = re.compile(r"^[ \t]*deb(?:-src)?[ \t]+(?:\[[^\]\n]*\][ \t]*)?(\S+)", re.MULTILINE)
    return pattern.findall(text)


def _deb822_uris(text: str) -> list[str]:
    uris: list[str] = []
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
            uris += fields.get("uris", "").split()
    return uris


def cargo_index(cargo_home: Path) -> str | None:
    """The sparse index that Cargo's configuration in `cargo_home` puts in the public registry's place, if any.

    Follows `[source.<registry>] replace-with` chains (Cargo book, "Source Replacement"); the URL ends in a slash.
    """
    for name in ("config.toml", "config"):
        try:
            document = tomllib.loads((cargo_home / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
            continue
        sources = document.get("source", {})
        source = _CRATE_REGISTRY.replace(".", "-")
        for _ in range(len(sources) + 1):
            entry = sources.get(source, {})
            if "replace-with" in entry:
                source = entry["replace-with"]
                continue
            registry = entry.get("registry", "")
            if not registry and source in document.get("registries", {}):
                registry = document["registries"][source].get("index", "")
            if registry.startswith("sparse+"):
                return str(registry.removeprefix("sparse+").rstrip("/")) + "/"
            return None
        return None
    return None


class Mirrors:
    """Answers where a name may be downloaded; a function of what it was made with.

    `configured` maps a mirror's name to its places, best first: a prefix for the path, for `crates` also a template
    with `{name}` and `{version}`. `apt` and `crate_index` are what `apt_places` and `cargo_index` found; `get` reads
    the index's `config.json` the first time a crate is asked for, and a failure of it only loses that place.
    """

    def __init__(
        self,
        configured: Mapping[str, Sequence[str]],
        *,
        apt: Mapping[str, Sequence[str]] | None = None,
        crate_index: str | None = None,
        get: Get | None = None,
    ) -> None:
        self._configured = configured
        self._apt = apt or {}
        self._index = crate_index
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
        return cls(places, apt=apt_places(etc_apt), crate_index=cargo_index(Path(home)), get=get)

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
        found = self._crate(url, segments) if name == CRATES else self._file(name, path, snapshot)
        if not found:
            raise UsageError(
                f"no place is known for mirror://{name}",
                reason=f"{url} is to be fetched",
                hint=f"export {VARIABLE}='{name}=https://…'",
            )
        return tuple(dict.fromkeys(found))

    def _file(self, name: str, path: str, snapshot: str | None) -> list[str]:
        # apt escapes `+` as well: some servers take a bare one for a blank.
        path = quote(path, safe="/~:")
        prefixes = [*self._configured.get(name, ()), *self._apt.get(name, ())]
        if name == CRATES_INDEX:
            prefixes += [*filter(None, [self._index]), f"https://index.{_CRATE_REGISTRY}"]
        if snapshot is not None and name in ARCHIVES:
            prefixes.append(f"https://snapshot.{_VENDOR}.org/archive/{name}/{snapshot}")
        return [f"{prefix.rstrip('/')}/{path}" for prefix in prefixes]

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
    except (VzreproError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(place, str) or urlsplit(place).scheme not in _SCHEMES or "{sha256-checksum}" in place:
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
