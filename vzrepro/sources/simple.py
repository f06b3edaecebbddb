"""A project's page in an index of Python packages: in JSON (PEP 691, 700) or HTML (PEP 503, 592).

Names and versions are `packaging`'s, the library that pip and every index go by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, ValidationError

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import FileHash

ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
"""What an index is asked for."""

MAX_PAGE = 64 << 20
"""Bytes that a project's page may have."""


@dataclass(frozen=True, slots=True)
class PythonFile:
    """A file that a project has published: `url` is absolute, `sha256` None where the index tells no such hash.

    `tags` are a wheel's (`py3-none-any`, each of a compressed set by itself); a source distribution has none.
    """

    name: str
    url: str
    version: Version
    sha256: FileHash | None
    yanked: bool
    tags: frozenset[str] = frozenset()


def canonical(project: str) -> str:
    """The one spelling of a project's name (PEP 503)."""
    return str(canonicalize_name(project))


def page_of(index: str, project: str) -> str:
    """The URL of a project's page in the index."""
    return f"{index.rstrip('/')}/{canonical(project)}/"


def files(page: bytes, url: str, project: str) -> tuple[PythonFile, ...]:
    """The source distributions and wheels that the page at `url` names, in its order; other files are passed over.

    Raises RemoteError when it is no such page.
    """
    rows = _json(page, url) if page.lstrip()[:1] == b"{" else _html(page, url)
    return tuple(file for row in rows if (file := _file(*row, url, project)) is not None)


def _file(name: str, link: str, sha256: str | None, yanked: bool, url: str, project: str) -> PythonFile | None:
    try:
        if name.endswith(".whl"):
            found, version, _build, tags = parse_wheel_filename(name)
            names = frozenset(map(str, tags))
        else:
            found, version = parse_sdist_filename(name)
            names = frozenset()
        absolute = urldefrag(urljoin(url, link)).url
        if found != canonicalize_name(project) or urlsplit(absolute).scheme not in ("http", "https", "file"):
            return None
        return PythonFile(name, absolute, version, FileHash(sha256) if sha256 else None, yanked, names)
    except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion, ValueError):
        return None


# --- JSON -------------------------------------------------------------------------------------------------------------


class _Linked(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    filename: str
    url: str
    hashes: dict[str, Any] = {}
    yanked: bool | str = False


class _Page(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    meta: dict[str, Any]
    files: list[_Linked]


_Row = tuple[str, str, str | None, bool]
"""File name, link, sha256 in hex, whether it is yanked."""


def _json(page: bytes, url: str) -> Iterator[_Row]:
    try:
        document = _Page.model_validate_json(page)
    except ValidationError as error:
        raise RemoteError(f"{url} is no page of a package index", reason=str(error).partition("\n")[0]) from error
    # A reader refuses another major version (PEP 691, "API version").
    if not str(document.meta.get("api-version", "")).startswith("1."):
        raise RemoteError(f"{url} is of another version of the index's format", reason=str(document.meta)[:200])
    for each in document.files:
        sha256 = each.hashes.get("sha256")
        # An empty reason is a reason as well.
        yield each.filename, each.url, sha256 if isinstance(sha256, str) else None, each.yanked is not False


# --- HTML -------------------------------------------------------------------------------------------------------------


def _html(page: bytes, url: str) -> Iterator[_Row]:
    parser = Links()
    try:
        parser.feed(page.decode(errors="replace"))
    except AssertionError as error:  # what `html.parser` raises of declarations that are none: `<![ `
        raise RemoteError(f"{url} is no page of a package index", reason=str(error)) from error
    if not parser.links:
        raise RemoteError(f"{url} is no page of a package index", reason="it has no links")
    for link, yanked in parser.links:
        try:
            plain, fragment = urldefrag(link)
            path = urlsplit(plain).path
        except ValueError:  # a link that leads nowhere: `http://[`
            continue
        sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        yield unquote(path).rpartition("/")[2], link, sha256, yanked


class Links(HTMLParser):
    """The `href` of every link, and whether the link says that its file is yanked."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "a" and told.get("href"):
            self.links.append((told["href"] or "", "data-yanked" in told))
