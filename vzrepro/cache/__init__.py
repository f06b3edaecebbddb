"""Binary caches: `CacheReader` and `CacheWriter` over a `Backend`; `machine_cache` is the one that this machine's
workspaces share."""

from vzrepro.base.signing import PublicKey, SigningKey, TrustedKeys
from vzrepro.cache.backend import Backend, Damaged, Entry, Stream, check_key
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.machine import DEFAULT_MAX_BYTES, machine_cache
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.push import PushOutcome, PushResult
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.writer import CacheWriter

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Backend",
    "CacheReader",
    "CacheWriter",
    "Damaged",
    "DirectoryBackend",
    "Entry",
    "NarInfo",
    "PublicKey",
    "PushOutcome",
    "PushResult",
    "SigningKey",
    "Stream",
    "TrustedKeys",
    "check_key",
    "machine_cache",
]
