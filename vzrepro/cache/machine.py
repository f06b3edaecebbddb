"""The cache that every workspace on this machine shares: a directory, a key made on first use, a bounded size."""

from __future__ import annotations

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.cache.backend import Damaged, Entry
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.layout import claim_of, keys_of, kind_of, read_entry
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.records import differences_prefix
from vzrepro.cache.writer import CacheWriter

DEFAULT_MAX_BYTES = 30_000_000_000
KEY_FILE = "machine.key"

_ROOM = 0.9  # trimmed down to this part of the bound, so that not every push trims
_GRACE_SECS = 3600.0  # a NAR without narinfo may be one whose narinfo is about to be written


def machine_cache(
    cache_dir: Path,
    key_dir: Path,
    max_bytes: int = DEFAULT_MAX_BYTES,
    *,
    warn: Callable[[str], None] = lambda _message: None,
) -> CacheWriter:
    """The cache in `cache_dir`, signed with the key in `key_dir` (made now if there is none) and trusting only it.

    Nothing is written to `cache_dir` before the first push; after a push that makes the cache larger than `max_bytes`
    it is trimmed. Never raises: without a usable key the cache is disabled, with a warning.
    """
    backend = DirectoryBackend(cache_dir)
    try:
        key = machine_key(key_dir)
    except (OSError, UsageError) as error:
        reader = CacheReader(backend, TrustedKeys(), warn=warn)
        failure = error if isinstance(error, UsageError) else UsageError(f"cannot make a key in {key_dir}: {error}")
        reader.access.disable(failure)
        return CacheWriter(reader)
    bound = _Bound(backend, max_bytes)
    reader = CacheReader(backend, TrustedKeys([key.public]), warn=warn, own=True)
    return CacheWriter(reader, key, after_push=bound.after_push)


def machine_key(key_dir: Path) -> SigningKey:
    """The key in `key_dir` that this machine signs with, made now if there is none. Raises OSError, UsageError."""
    path = key_dir / KEY_FILE
    if not path.exists():
        # Told apart by more than the machine's name, which says nothing to others and need not be unique.
        SigningKey.generate(f"vzrepro-machine-{secrets.token_hex(4)}").save(path)
    return SigningKey.load(path)


class _Bound:
    """Keeps a directory cache below its bound, counting what this process adds so that most pushes need no listing."""

    def __init__(self, backend: DirectoryBackend, max_bytes: int) -> None:
        self._backend = backend
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._estimate: int | None = None

    def after_push(self, written_bytes: int) -> None:
        """Trim if the cache may have become too large. A failure of it is not the push's: the next one tries again."""
        with self._lock:
            try:
                if self._estimate is None:
                    self._estimate = sum(entry.size for entry in self._backend.list())
                else:
                    self._estimate += written_bytes
                if self._estimate > self._max_bytes:
                    self._estimate = trim(self._backend, int(self._max_bytes * _ROOM))
            except RemoteError:
                self._estimate = None


def trim(backend: DirectoryBackend, max_bytes: int) -> int:
    """Remove the objects used least recently until the entries have at most `max_bytes`; returns what they have now.

    An object's narinfo goes first and its NAR last, when no other narinfo needs it, so that no reader and no crash
    ever meets a narinfo without NAR; what is stated about it goes with it. NARs that nothing names for an hour go too;
    entries of other kinds stay.
    Raises RemoteError when the directory cannot be read or written.
    """
    with backend.lock(exclusive=True):
        backend.sweep()
        entries = {entry.key: entry for entry in backend.list()}
        total = sum(entry.size for entry in entries.values())
        objects = [(entry, info) for entry in entries.values() if (info := _narinfo(backend, entry)) is not None]
        users = Counter(info.url for _, info in objects)

        def remove(key: str) -> int:
            entry = entries.pop(key, None)
            if entry is None:
                return 0
            backend.delete([key])
            return entry.size

        stated: dict[str, list[str]] = {}
        for key in entries:
            if kind_of(key) == "attest":
                stated.setdefault(claim_of(key), []).append(key)
        for entry in list(entries.values()):
            if entry.key.startswith("nar/") and not users[entry.key] and entry.mtime < time.time() - _GRACE_SECS:
                total -= remove(entry.key)
        for entry, info in sorted(objects, key=lambda each: (each[0].mtime, each[0].key)):
            if total <= max_bytes:
                break
            users[info.url] -= 1
            keys = [entry.key, *(key for key in keys_of(info) if not users[key])]
            if info.drv_hash is not None:
                keys += stated.pop(differences_prefix(info.drv_hash.hex), [])
            total -= sum(map(remove, keys))
        return total


def _narinfo(backend: DirectoryBackend, entry: Entry) -> NarInfo | None:
    """The narinfo in an entry; None when the entry is something else."""
    if not entry.key.endswith(".narinfo"):
        return None
    try:
        data = read_entry(backend, entry.key, MAX_SIZE)
        return None if data is None else NarInfo.parse(data)
    except Damaged:
        return None
