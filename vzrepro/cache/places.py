"""Which backend a cache's URL means, and what makes a place ready to be a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import unquote, urlsplit

from vzrepro.cache.backend import PROBED, Backend
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.remote import Patience
from vzrepro.errors import UsageError
from vzrepro.model import canonical_json

SCHEMES = "s3://BUCKET[/PREFIX]?endpoint=…, https://HOST/PATH, http://HOST/PATH, file:///PATH"
"""The forms that `open_backend` knows, for people."""


class _Findings(Protocol):
    def document(self) -> dict[str, Any]: ...


@runtime_checkable
class Probed(Protocol):
    """A backend whose server may lack what others have: it finds out by trying (`S3Backend`)."""

    def create_bucket_if_missing(self) -> bool:
        """Whether there was none."""

    def probe(self) -> _Findings:
        """What the server really does."""


def prepare(cache: BinaryCache) -> dict[str, Any]:
    """Make the place, write its nix-cache-info, and keep in it what its server can do, which is returned.

    Safe to repeat. Raises RemoteError when the place cannot be made, or belongs to another store.
    """
    found: dict[str, Any] = {}
    backend = cache.backend
    if isinstance(backend, Probed):
        created = backend.create_bucket_if_missing()
        document = backend.probe().document()
        backend.put(PROBED, canonical_json(document))
        found = {"bucket_created": created}
        found |= {name: value for name, value in document.items() if name not in ("format", "type")}
    cache.make_place()
    return found


def is_writable(url: str) -> bool:
    """Whether entries can be written to such a place at all; HTTP is for reading."""
    return urlsplit(url).scheme in ("s3", "file", "")


def open_backend(url: str, patience: Patience, base: Path) -> Backend:
    """The place that `url` names; what has no scheme is a directory, relative to `base`. Nothing is asked of it yet.

    Raises UsageError when it is none of `SCHEMES`.
    """
    parsed = urlsplit(url)
    # Each client costs its import, boto3 the most: only who names such a place pays for it.
    match parsed.scheme:
        case "s3":
            from vzrepro.cache.s3 import S3Backend

            return S3Backend(url, patience)
        case "http" | "https":
            from vzrepro.cache.http import HttpBackend

            return HttpBackend(url, patience)
        case "file" if parsed.netloc in ("", "localhost") and parsed.path:
            return DirectoryBackend(Path(unquote(parsed.path)))
        case "" if url:
            return DirectoryBackend(base / Path(url).expanduser())
    raise UsageError(f"{url!r} is not the URL of a cache", hint=f"use {SCHEMES}")
