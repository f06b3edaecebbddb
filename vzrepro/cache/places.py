"""Which backend a cache's URL means."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from vzrepro.cache.backend import Backend
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.remote import Patience
from vzrepro.errors import UsageError

SCHEMES = "s3://BUCKET[/PREFIX]?endpoint=…, https://HOST/PATH, http://HOST/PATH, file:///PATH"
"""The forms that `open_backend` knows, for people."""


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
