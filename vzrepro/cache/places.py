"""Which backend a cache's URL means, and what makes a place ready to be a cache.

A backend is a file with a class and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from vzrepro.base.errors import UsageError
from vzrepro.base.model import canonical_json
from vzrepro.cache.access import Access
from vzrepro.cache.backend import PROBED, Backend
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.remote import Patience
from vzrepro.net import scheme_of


def _s3(url: str, patience: Patience, _base: Path) -> Backend:
    from vzrepro.cache.s3 import S3Backend

    return S3Backend(url, patience)


def _http(url: str, patience: Patience, _base: Path) -> Backend:
    from vzrepro.cache.http import HttpBackend

    return HttpBackend(url, patience)


def _file(url: str, _patience: Patience, base: Path) -> Backend | None:
    parsed = urlsplit(url)
    if not parsed.scheme:
        return DirectoryBackend(base / Path(url).expanduser()) if url else None
    return DirectoryBackend(Path(unquote(parsed.path))) if parsed.netloc in ("", "localhost") and parsed.path else None


@dataclass(frozen=True, slots=True)
class PlaceKind:
    """A kind of place: the forms of its URLs, which have the schemes; what it is, for people; if it can be written.
    `open` gives None for what is no such URL, and imports what it takes: only who names such a place pays for boto3."""

    forms: tuple[str, ...]
    about: str
    writable: bool
    open: Callable[[str, Patience, Path], Backend | None]

    @property
    def schemes(self) -> set[str]:
        """The URLs' schemes; an empty one for what is no URL."""
        return {form.partition("://")[0] if "://" in form else "" for form in self.forms}


KINDS = (
    PlaceKind(
        ("s3://BUCKET[/PREFIX]?endpoint=…",),
        "a bucket; also `region=…`, `addressing=path` or `virtual`, `profile=…`",
        True,
        _s3,
    ),
    PlaceKind(("https://HOST/PATH", "http://HOST/PATH"), "what a server of files has", False, _http),
    PlaceKind(("file:///PATH", "PATH"), "a directory, relative to the workspace", True, _file),
)

SCHEMES = ", ".join(form for kind in KINDS for form in kind.forms if "://" in form)
"""The forms that `open_backend` knows, for people."""


class _Findings(Protocol):
    def document(self) -> dict[str, Any]: ...


@runtime_checkable
class ProbedBackend(Protocol):
    """A backend whose server may lack what others have: it finds out by trying (`S3Backend`)."""

    def create_bucket_if_missing(self) -> bool:
        """Whether there was none."""

    def probe(self) -> _Findings:
        """What the server really does."""


def prepare(access: Access) -> dict[str, Any]:
    """Make the place, write its nix-cache-info, and keep in it what its server can do, which is returned.

    Safe to repeat. Raises RemoteError when the place cannot be made, or belongs to another store.
    """
    found: dict[str, Any] = {}
    backend = access.backend
    if isinstance(backend, ProbedBackend):
        created = backend.create_bucket_if_missing()
        document = backend.probe().document()
        backend.put(PROBED, canonical_json(document))
        found = {"bucket_created": created}
        found |= {name: value for name, value in document.items() if name not in ("format", "type")}
    access.make_place()
    return found


def is_writable(url: str) -> bool:
    """Whether entries can be written to such a place at all."""
    return any(kind.writable for kind in KINDS if scheme_of(url) in kind.schemes)


def open_backend(url: str, patience: Patience, base: Path) -> Backend:
    """The place that `url` names; what has no scheme is a directory, relative to `base`. Nothing is asked of it yet.

    Raises UsageError when it is none of `KINDS`.
    """
    for kind in KINDS:
        if scheme_of(url) in kind.schemes and (backend := kind.open(url, patience, base)) is not None:
            return backend
    raise UsageError(f"{url!r} is not the URL of a cache", hint=f"use {SCHEMES}")
