"""Binary caches: `BinaryCache` over a `Backend`; `machine_cache` is the one that this machine's workspaces share."""

from vzrepro.cache.backend import Backend, Damaged, Entry, Stream, check_key
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.machine import DEFAULT_MAX_BYTES, machine_cache
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.push import Kept, Pushed
from vzrepro.cache.signing import PublicKey, SigningKey, TrustedKeys

__all__ = [
    "DEFAULT_MAX_BYTES",
    "Backend",
    "BinaryCache",
    "Damaged",
    "DirectoryBackend",
    "Entry",
    "Kept",
    "NarInfo",
    "PublicKey",
    "Pushed",
    "SigningKey",
    "Stream",
    "TrustedKeys",
    "check_key",
    "machine_cache",
]
