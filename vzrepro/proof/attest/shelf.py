"""Attestations beside the store: what was signed here, whether or not a cache has it too.

`store/.vzrepro/attest/<drv hash>/<key id>/<sha256>.json`, the keys of a cache. Files are written whole and never
changed; `store gc` removes those of objects that have long been gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from vzrepro.base import disk
from vzrepro.base.errors import RemoteError, VzreproError
from vzrepro.base.model import DrvHash
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.records import MAX_ATTESTATION, attestation_key, is_intact
from vzrepro.store import LocalStore

HERE = "here"
"""The name of this machine among the places of an envelope."""


class Shelf:
    """The attestations beside `store`; usable from any thread and process."""

    def __init__(self, store: LocalStore) -> None:
        self._root = store.private

    def put(self, drv_hash: DrvHash, envelope: bytes) -> bool:
        """Keep a DSSE envelope about a derivation; whether it was not there.

        Raises UsageError when it is none, OSError when it cannot be written.
        """
        file = self._root / attestation_key(drv_hash, envelope)
        if file.exists():
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write_file(file, envelope, durable=False)  # signing again gives the same
        return True

    def envelopes(self, drv_hash: DrvHash) -> list[bytes]:
        """What is kept about a derivation, sorted, without what has been damaged since. Nobody has verified it."""
        found = []
        for file in (self._root / "attest" / drv_hash.hex).glob("*/*.json"):
            with contextlib.suppress(OSError):
                data = _read(file)
                if is_intact(file.as_posix(), data):
                    found.append(data)
        return sorted(found)


def gather(
    drv_hash: DrvHash, shelf: Shelf, caches: Iterable[CacheReader], failed: Callable[[str, VzreproError], object]
) -> dict[bytes, tuple[str, ...]]:
    """Every envelope about a derivation, and where it is: `HERE`, or the URLs of caches.

    `failed` is told of each cache that could not be asked, which is otherwise as good as one that has nothing.
    """
    found = {envelope: [HERE] for envelope in shelf.envelopes(drv_hash)}
    for cache in caches:
        try:
            for envelope in cache.attestations(drv_hash):
                found.setdefault(envelope, []).append(cache.url)
        except RemoteError as error:
            failed(cache.url, error)
    return {envelope: tuple(places) for envelope, places in sorted(found.items())}


def _read(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MAX_ATTESTATION + 1)
