"""`url_source`: a file at a URL, its newest version, and its signature."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urljoin, urlsplit

from vzrepro.base.errors import HashMismatch, RemoteError, UsageError
from vzrepro.base.model import FileHash
from vzrepro.net import shown
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedFile, SourcePin
from vzrepro.sources import archive, fetch, signature, simple
from vzrepro.sources.lookup import Lookup

_MAX_LISTING = 16 << 20
_MAX_SIGNATURE = 1 << 20
_VERSION = r"[0-9]{1,9}(?:\.[0-9]{1,9})*"


def resolve(want: Want, old: SourcePin | None, lookup: Lookup) -> SourcePin:
    """Pin a `url_source` (`lookup.Resolver`). Raises UsageError, Untrusted, HashMismatch, RemoteError."""
    asked = want.ask["urls"]
    templates = [str(each) for each in asked] if isinstance(asked, list) else []
    version = str(want.ask["version"] or "")
    if want.ask["series"] is not None:
        version = _newest(templates[0], str(want.ask["series"]), lookup)
    places = [each.replace("{version}", version) for each in templates]
    wanted = None if want.ask["sha256"] is None else FileHash(str(want.ask["sha256"]))
    try:
        file, path = lookup.download(places, wanted)
    except fetch.NotFound:
        raise
    except HashMismatch as error:
        raise HashMismatch(
            error.message,
            reason=error.reason,
            hint=f'if the file was meant to change, write what was found into {want.place}: sha256="…"',
        ) from error
    except RemoteError as error:
        raise RemoteError(
            f"{want.name} cannot be pinned: {error.message}",
            reason=error.reason if wanted else f"its hash is not known, so it must be seen once\n{error.reason}",
            hint=f'{error.hint}\nor, if you know the hash, write it into the recipe: sha256="…"',
        ) from error
    if want.unpack:
        archive.check(path, shown(file.url))
    if "signature" in want.ask:
        signer = _verify(want, version, file, path, lookup)
        lookup.say(f"{want.name}: signed by {signer}")
    lookup.say(f"{want.name}: sha256 {file.sha256}, {file.size} bytes, {shown(file.url)}")
    before = None if old is None else old.file
    if isinstance(before, PinnedFile) and before.url == file.url and before.sha256 != file.sha256:
        lookup.warn(f"{shown(file.url)} has changed: sha256 was {before.sha256}, is {file.sha256}")
    return SourcePin(want.request, version, file)


def _newest(template: str, series: str, lookup: Lookup) -> str:
    """The highest version of `series` among the names in the directory where the URL first has `{version}`."""
    start = template.rfind("/", 0, template.index("{version}")) + 1
    segment, _, _ = template[start:].partition("/")
    below = template[start:].count("/") + 1
    folders = [url.rsplit("/", below)[0] + "/" for url in lookup.mirrors.urls(template.replace("{version}", "0"))]
    page = fetch.get(folders, _MAX_LISTING, cancel=lookup.cancel).decode(errors="replace")
    first, *rest = map(re.escape, segment.split("{version}"))
    pattern = rf"{first}({_VERSION})" + r"\1".join(rest)
    links = _links(page)
    if links:
        names = {name for link in links if (name := _below(link, folders)) is not None}
        found = {match[1] for name in names if (match := re.fullmatch(pattern, name))}
    else:  # as file servers and FTP list their names
        found = {match[1] for match in re.finditer(rf"(?<![\w.+-]){pattern}(?![\w.+-])", unquote(page))}
    fitting = [version for version in found if f"{version}.".startswith(f"{series}.")]
    if not fitting:
        there = sorted(found, key=rank)
        raise UsageError(
            f"{shown(folders[0])} names no {segment} of the series {series}",
            reason=f"it names {', '.join(there[-8:])}" if there else "it names no version of it at all",
            hint="name one that is there, or version= and sha256=",
        )
    return max(fitting, key=rank)


def _links(page: str) -> list[str]:
    parser = simple.Links()
    with contextlib.suppress(AssertionError):  # what `html.parser` raises of declarations that are none: `<![ `
        parser.feed(page)
    return [link for link, _yanked in parser.links]


def _below(link: str, folders: Sequence[str]) -> str | None:
    """The name, directly below one of these directories, that a link on the page of one leads to or through; None for
    links to elsewhere."""
    for folder in folders:
        try:
            here, there = urlsplit(folder), urlsplit(urljoin(folder, link))
        except ValueError:
            return None
        # A directory may have been moved to https.
        path, base = unquote(there.path), unquote(here.path)
        if there.netloc == here.netloc and path.startswith(base) and len(path) > len(base):
            return path[len(base) :].partition("/")[0]
    return None


def rank(version: str) -> tuple[int, ...]:
    """The order of versions that are numbers with dots."""
    return tuple(map(int, version.split(".")))


def _verify(want: Want, version: str, file: PinnedFile, path: Path, lookup: Lookup) -> str:
    where = str(want.ask["signature"]).replace("{version}", version)
    key_file = lookup.root / str(want.ask["key"])
    try:
        keys = key_file.read_bytes()
    except OSError as error:
        raise UsageError(f"{key_file}: the key cannot be read", reason=error.strerror) from error
    signed = lookup.get(where, _MAX_SIGNATURE)
    name = PurePosixPath(unquote(urlsplit(file.url).path))
    stem = PurePosixPath(unquote(urlsplit(where).path)).stem
    what = shown(file.url)
    if name.suffix not in archive.SUFFIXES or stem != name.stem:
        return signature.verify(path, signed, keys, what, str(want.ask["key"]))
    # A signature of the archive before it was compressed, as on kernel.org: `linux-6.12.tar.sign`.
    with tempfile.NamedTemporaryFile(dir=lookup.downloads) as plain:
        archive.decompress(path, plain, what)
        return signature.verify(Path(plain.name), signed, keys, what, str(want.ask["key"]))
