"""The derivations that a cache has seen, for "why is it not there?": a `plan.DerivationHistory` of its `drv/`."""

from __future__ import annotations

import heapq
from contextlib import suppress

from vzrepro.base.model import Derivation, DrvHash
from vzrepro.cache.access import Access
from vzrepro.cache.backend import Damaged, Entry
from vzrepro.cache.parallel import in_order

_PREFIX, _SUFFIX = "drv/", ".json"
_MAX_SIZE = 4 << 20  # bytes of an entry that is read
_NEWEST = 5000  # entries that are looked at for one name
_MAX_BYTES = 64 << 20  # of those that have the name, but for one entry


class CacheHistory:
    """See `plan.DerivationHistory`. Nobody signs these entries: what is not a derivation, or another than its key says,
    counts as absent.

    Raises RemoteError when the cache fails, UsageError when it is a place that cannot be listed.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._entries: list[Entry] | None = None

    def derivation(self, drv: DrvHash) -> bytes | None:
        """The canonical JSON that hashes to `drv`, if the cache has it."""
        found = self._read(drv)
        return None if found is None else found[0]

    def derivations_named(self, name: str) -> list[tuple[DrvHash, bytes, float]]:
        """The newest derivations of recipes called `name`, whatever their version, and when they were written."""
        if self._entries is None:
            entries = (entry for entry in self._access.backend.list(_PREFIX) if _drv_of(entry) is not None)
            self._entries = heapq.nlargest(_NEWEST, entries, key=lambda entry: entry.mtime)

        def read(entry: Entry) -> tuple[DrvHash, bytes, float] | None:
            drv = _drv_of(entry)
            found = None if drv is None else self._read(drv)
            if drv is None or found is None or _stem(found[1]) != name:
                return None
            return drv, found[0], entry.mtime

        named, size = [], 0
        for each in in_order(read, self._entries):
            if each is not None:
                named.append(each)
                size += len(each[1])
                if size > _MAX_BYTES:
                    break
        return named

    def _read(self, drv: DrvHash) -> tuple[bytes, Derivation] | None:
        """The canonical JSON and what it says, if that is what hashes to `drv`."""
        with suppress(Damaged, ValueError):
            data = self._access.read(f"{_PREFIX}{drv}{_SUFFIX}", _MAX_SIZE)
            if data is not None and DrvHash.of(data) == drv:
                return data, Derivation.parse(data)
        return None


def _drv_of(entry: Entry) -> DrvHash | None:
    try:
        return DrvHash(entry.key.removeprefix(_PREFIX).removesuffix(_SUFFIX))
    except ValueError:
        return None


def _stem(derivation: Derivation) -> str:
    """The recipe's name: that of the derivation without its version."""
    version = derivation.version
    return derivation.name.removesuffix(f"-{version}") if version else derivation.name
