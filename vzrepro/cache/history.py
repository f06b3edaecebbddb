"""The derivations that a cache has seen, for "why is it not there?": `plan.Remembered` over its `drv/` entries."""

from __future__ import annotations

import heapq
import json
from concurrent.futures import ThreadPoolExecutor

from vzrepro.cache.backend import Entry
from vzrepro.cache.binary import BinaryCache
from vzrepro.model import DrvHash

_PREFIX, _SUFFIX = "drv/", ".json"
_MAX_BYTES = 4 << 20
_NEWEST = 5000  # entries that are looked at for one name
_LOOK_UPS = 16


class CacheHistory:
    """See `plan.Remembered`. Bad entries count as absent.

    Raises RemoteError when the cache fails, UsageError when it is a place that cannot be listed.
    """

    def __init__(self, cache: BinaryCache) -> None:
        self._cache = cache
        self._entries: list[Entry] | None = None

    def derivation(self, drv: DrvHash) -> bytes | None:
        """The canonical JSON that hashes to `drv`, if the cache has it."""
        data = self._cache.read(f"{_PREFIX}{drv}{_SUFFIX}", _MAX_BYTES)
        return data if data is not None and DrvHash.of(data) == drv else None

    def derivations_named(self, name: str) -> list[tuple[DrvHash, bytes, float]]:
        """The newest derivations of recipes called `name`, whatever their version, and when they were written."""
        if self._entries is None:
            entries = (entry for entry in self._cache.backend.list(_PREFIX) if _drv_of(entry) is not None)
            self._entries = heapq.nlargest(_NEWEST, entries, key=lambda entry: entry.mtime)
        with ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="look-up") as pool:
            read = list(pool.map(self._read, self._entries))
        return [each for each in read if each is not None and _stem(each[1]) == name]

    def _read(self, entry: Entry) -> tuple[DrvHash, bytes, float] | None:
        drv = _drv_of(entry)
        data = None if drv is None else self.derivation(drv)
        return None if drv is None or data is None else (drv, data, entry.mtime)


def _drv_of(entry: Entry) -> DrvHash | None:
    try:
        return DrvHash(entry.key.removeprefix(_PREFIX).removesuffix(_SUFFIX))
    except ValueError:
        return None


def _stem(canonical: bytes) -> str:
    """The recipe's name: that of the derivation without its version."""
    document = json.loads(canonical)
    name, version = str(document["name"]), document["version"]
    return name.removesuffix(f"-{version}") if version else name
