"""Taking from a binary cache: store objects, signed, in Nix's layout, and the records that early cutoff needs.

Whatever comes out of a cache is distrusted: signatures and sizes before the first byte, hashes before the result is
used. A cache that errs is a miss, and not asked again in this process. docs/cache.md describes the layout.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import RemoteError, Untrusted
from vzrepro.base.model import BuildKey, DrvHash, ObjectInfo, Realization, StorePath
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.access import Access, Warn, quiet
from vzrepro.cache.backend import Backend, Damaged, Entry
from vzrepro.cache.content import TransferProgress, take
from vzrepro.cache.layout import kind_of
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.parallel import in_order
from vzrepro.cache.records import (
    MAX_RECORD,
    BuildRecord,
    DifferenceRecord,
    build_key_record,
    is_attestation,
    read_difference,
)
from vzrepro.cache.statements import statements

MAX_LOG = 64 << 20
"""Bytes of the largest log that is read."""


class CacheReader:
    """What a cache gives, and what it says of what it has; usable from any thread.

    `trusted` are the keys whose objects are taken. `warn` gets at most one line in this object's life. An `own` cache
    holds nothing but what this machine has made: what comes from it counts as made here.
    """

    def __init__(self, backend: Backend, trusted: TrustedKeys, *, warn: Warn = quiet, own: bool = False) -> None:
        self.access = Access(backend, trusted, warn)
        self.own = own

    @property
    def url(self) -> str:
        """What a person calls the cache."""
        return self.access.url

    # --- what is believed ---------------------------------------------------------------------------------------------

    def query(self, path: StorePath) -> NarInfo | None:
        """What the cache has under this path, if enough trusted keys vouch for it; None for every kind of miss.

        The first thing that is wrong with the cache is reported through `warn`; a cache that cannot be reached or
        belongs to another store is not asked again. Never raises for anything the cache does.
        """
        with self.access.as_miss():
            return self.ask(path)
        return None

    def ask(self, path: StorePath) -> NarInfo | None:
        """As `query`, but what stands in the way is raised: Untrusted, Damaged, or RemoteError when the cache fails.

        None also when the cache is not asked any more.
        """
        access = self.access
        found = access.verified.get(path)
        if found is not None or not access.may_ask():
            return found
        data = access.read(narinfo_key(path), MAX_SIZE)
        if data is None:
            return None
        info = NarInfo.parse(data)
        if info.path != path:
            raise Untrusted(f"{self.url} has {info.path} where {path} belongs")
        info.verify(access.trusted, self.url)
        access.verified[path] = info
        return info

    def fetch(self, info: NarInfo, dest: Path, progress: TransferProgress = quiet) -> ObjectInfo:
        """Unpack a queried object at `dest`, which must not exist, in a directory private to the caller.

        Size and hash of the compressed NAR and of the NAR are all checked before this returns; when it raises,
        nothing is left at `dest`. Raises RemoteError, which the caller treats as a miss: Damaged when the entry is
        lost or not what was promised, else the cache has failed and is not asked again. OSError and other
        VzreproErrors are this machine's own.
        """
        if os.path.lexists(dest):
            raise FileExistsError(f"{dest} is there already")  # and not ours to remove
        try:
            self._unpack(info, dest, progress)
        except BaseException as error:
            disk.remove_tree(dest)
            self.access.verified.pop(info.path, None)
            if isinstance(error, Damaged):
                self.access.wrong_nars.add(info.url)
                self.access.complain(error)
            elif isinstance(error, RemoteError):
                self.access.disable(error)
            raise
        return info.as_object(None if self.own else info.render())

    def by_build_key(self, key: BuildKey) -> Realization | None:
        """What building with exactly these inputs gave, if a trusted key says so; None for every kind of miss."""
        access = self.access
        with access.as_miss():
            if not access.may_ask():
                return None
            data = access.read(build_key_record(key), MAX_RECORD)
            if data is None:
                return None
            record = BuildRecord.parse(data, self.url)
            access.trusted.verify(record.message, record.signatures, f"a build record in {self.url}")
            realization = record.realization
            if realization.build_key != key:
                raise Untrusted(f"the record {build_key_record(key)} is that of another build key")
            return realization
        return None

    def _unpack(self, info: NarInfo, dest: Path, progress: TransferProgress) -> None:
        opened = self.access.backend.get(info.url)
        if opened is None:
            raise Damaged(f"{self.url} has lost {info.url}", reason=f"it is the content of {info.path}")
        with opened as stream:
            take(stream, info, self.url, lambda read: nar.unpack(read, dest, max_size=info.nar_size), progress)

    # --- what the cache says, whoever signed it -----------------------------------------------------------------------

    def log(self, path: StorePath) -> bytes | None:
        """The log of this object's build, if the cache has object and log. Logs are plain text that nobody signs."""
        info = self.query(path)
        if info is None or info.deriver is None:
            return None
        with self.access.as_miss():
            return self.access.read(f"log/{info.deriver}", MAX_LOG)
        return None

    def objects(self) -> Iterator[tuple[NarInfo, float]]:
        """The narinfos in the cache, trusted or not, and when each was last written, in seconds since the epoch.

        What cannot be read is left out: `check.verify` tells of it. Raises RemoteError.
        """

        def read(entry: Entry) -> tuple[NarInfo, float] | None:
            with contextlib.suppress(Damaged):
                data = self.access.read(entry.key, MAX_SIZE)
                return None if data is None else (NarInfo.parse(data), entry.mtime)
            return None

        entries = (entry for entry in self.access.backend.list() if kind_of(entry.key) == "narinfo")
        return (found for found in in_order(read, entries) if found is not None)

    def differences(self, info: NarInfo) -> list[DifferenceRecord]:
        """Who has told this cache that the object's derivation gave other bytes. Raises RemoteError."""
        subject = info.drv_hash.hex if info.drv_hash is not None else info.path.hash_part
        trusted = self.access.trusted
        found = (read_difference(data, info.path, trusted) for data in statements(self.access, subject))
        return [each for each in found if each is not None]

    def attestations(self, drv_hash: DrvHash) -> list[bytes]:
        """The DSSE envelopes that this cache has about a derivation, sorted; nobody has verified them.

        Raises RemoteError when the cache fails. What is too large, is not what its name says, or is no envelope is left
        out. Of more than MAX_ATTESTATIONS, or more than 64 MiB, some are.
        """
        if not self.access.may_ask():
            return []
        return sorted(data for data in statements(self.access, drv_hash.hex) if is_attestation(data))
