"""Downloads: from candidate URLs to a file whose sha256 and size were checked, resumed and retried on the way.

A download is written to `<dest>.part`, which survives interruption and which the next attempt goes on from; only
bytes with the right hash ever get the name `dest`. TLS trusts what the system trusts.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from vzrepro.base.errors import HashMismatch, RemoteError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.net import AttemptFailed, open_file, shown
from vzrepro.sources.fetch.mirroring import DownloadProgress, Mirror, RetryPolicy, Transfer, quiet
from vzrepro.sources.fetch.mirrors import ELSEWHERE
from vzrepro.sources.fetch.part import PART, Memory, Part, local_file, locked

if TYPE_CHECKING:
    from vzrepro.net.http import Http

MAX_UNKNOWN_SIZE = 2 << 30
"""Bytes: where a download without known size is cut off."""


class NotFound(RemoteError):
    """Every place answered that it does not have the file."""


class Unreachable(RemoteError):
    """No place could be asked, or none gave more than a part."""


def get(
    urls: Sequence[str],
    max_size: int,
    *,
    accept: str | None = None,
    cancel: threading.Event | None = None,
    policy: RetryPolicy | None = None,
    http: Http | None = None,
) -> bytes:
    """The content of the first of `urls` that has it: for indexes, whose hash nobody knows beforehand. `accept` names
    the media types that are understood.

    Raises NotFound when every place says that it has no such file, RemoteError when none of them gives it in at most
    `max_size` bytes, as Unreachable when none says that, Interrupted when `cancel` is set.
    """
    sink = Memory()
    failed = Transfer(
        urls,
        sink,
        size=None,
        cap=max_size,
        report=quiet,
        cancel=cancel or threading.Event(),
        policy=policy or RetryPolicy(),
        http=http or _shared_http(),
        accept=accept,
    ).run()
    if failed is not None:
        raise _explained(failed, shown(urls[0]) if urls else "a file", None, None)
    return sink.bytes()


def served(urls: Sequence[str], *, policy: RetryPolicy | None = None, http: Http | None = None) -> bool:
    """Whether one of `urls` has its file; nothing of it is read. A mirror's index may be ahead of its files.

    False only when every place says that it has none: a place that cannot be asked may have it.
    """
    policy, http = policy or RetryPolicy(), http or _shared_http()
    missing = []
    for url in urls:
        try:
            if url.startswith("file:"):
                body = open_file(url, 0)
            else:
                body = http.open(url, 0, None, policy.connect_secs, policy.read_secs)
        except AttemptFailed as failure:
            missing.append(failure.missing)
        else:
            body.close()
            return True
    return not all(missing)


def download(
    urls: Sequence[str],
    dest: Path,
    *,
    sha256: FileHash | None,
    size: int | None = None,
    max_size: int = MAX_UNKNOWN_SIZE,
    report: DownloadProgress = quiet,
    cancel: threading.Event | None = None,
    policy: RetryPolicy | None = None,
    http: Http | None = None,
) -> FileHash:
    """Have the file with this hash (and size in bytes, if known) at `dest`, from the first of `urls` that gives it.
    Returns its hash.

    A file that is there is verified, not trusted; a wrong one is replaced once the right one is complete. What is
    there of `<dest>.part` is used. Processes that want the same `dest` wait for each other. A file whose hash nobody
    knows (None) is always downloaded, as a whole. Where the size is not known, more than `max_size` bytes are an error.

    Raises HashMismatch when a place has other content and none has the right one; NotFound, RemoteError, Unreachable
    and Interrupted as `get` (the part is kept); VzreproError when the disk is full or cannot be written.
    """
    if sha256 is not None and _is_there(dest, sha256, report):
        return sha256
    with local_file(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
    cancel = cancel or threading.Event()
    part = dest.with_name(dest.name + PART)
    cap = max_size if size is None else size
    with locked(part, cancel) as file:
        if sha256 is not None and _is_there(dest, sha256, report):
            part.unlink()
            return sha256
        sink = Part(file, part, sha256, cap)
        failed = Transfer(
            urls,
            sink,
            size=size,
            cap=cap,
            report=report,
            cancel=cancel,
            policy=policy or RetryPolicy(),
            http=http or _shared_http(),
        ).run()
        if failed is not None:
            if not sink.size:
                part.unlink()
            raise _explained(failed, shown(urls[0]) if urls else dest.name, sha256, size)
        sink.commit(dest)
        return sink.digest


def _is_there(dest: Path, sha256: FileHash, report: DownloadProgress) -> bool:
    try:
        with dest.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256.hex:
                return False
            report(file.tell(), file.tell())
            return True
    except OSError:
        return False


def _explained(sources: Sequence[Mirror], name: str, wanted: FileHash | None, size: int | None) -> VzreproError:
    """The error for a download that no source could satisfy."""
    tried = [(source, source.failure) for source in sources if source.failure is not None]
    reason = "\n".join(f"{shown(source.url)} {failure.why}" for source, failure in tried)
    for source, failure in tried:
        if failure.found is not None and wanted is not None:
            pinned = f"sha256 {wanted}" if failure.found.startswith("sha256") else f"{size} bytes"
            return HashMismatch(
                f"{shown(source.url)} is not the file that is pinned: wanted {pinned}, found {failure.found}",
                reason=reason,
                hint=f"{ELSEWHERE}; or, if the file was meant to change, run: vzrepro lock --update",
            )
    if tried and all(failure.missing for _, failure in tried):
        return NotFound(f"no place has {name}", reason=reason, hint=ELSEWHERE)
    hint = next((failure.hint for _, failure in tried if failure.hint is not None), None)
    kind = RemoteError if any(failure.missing for _, failure in tried) else Unreachable
    return kind(
        f"cannot download {name}",
        reason=reason or "no place to download it from is known",
        hint=hint or f"check the network, or {ELSEWHERE}",
    )


@cache
def _shared_http() -> Http:
    from vzrepro.net.http import Http

    return Http()
