"""A binary cache: store objects, signed, in Nix's layout, plus the records that early cutoff and `why` need.

Whatever comes out of a cache is distrusted: signatures and sizes before the first byte, hashes before the result is
used. A cache that errs is a miss, and not asked again in this process. docs/cache.md describes the layout.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from vzrepro import disk, nar
from vzrepro.cache.backend import CACHE_INFO, FRESH_SECS, Backend, Damaged, Entry, read_whole
from vzrepro.cache.content import Progress, take
from vzrepro.cache.layout import claim_of, kind_of
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.notice import settle
from vzrepro.cache.parallel import WORKERS, in_order
from vzrepro.cache.push import Attest, Push, Pushed
from vzrepro.cache.records import (
    INDEX,
    MAX_ATTESTATION,
    MAX_ATTESTATIONS,
    MAX_RECORD,
    BuildRecord,
    Difference,
    attestation_key,
    build_key_record,
    differences_prefix,
    is_attestation,
    is_intact,
    read_difference,
    read_index,
    statements_index,
)
from vzrepro.cache.signing import SigningKey, TrustedKeys
from vzrepro.errors import RemoteError, Untrusted, UsageError, VzreproError
from vzrepro.model import STORE_DIR, BuildKey, DrvHash, ObjectInfo, Outcome, Realization, StorePath
from vzrepro.wire import printable

_ITS_INFO = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: 40\n".encode()
_MAX_LOG = 64 << 20
_MAX_STATEMENTS = 64 << 20  # bytes that are read about one derivation, but for one entry

Warn = Callable[[str], None]


def _quiet(*_anything: object) -> None:
    return


class BinaryCache:
    """A cache behind a backend, as this machine trusts it; usable from any thread.

    `trusted` are the keys whose objects are taken; with a `signer`, what was made here can be pushed. `warn` gets at
    most one line in this object's life. `after_push` is called with the bytes that a push has written. An `own` cache
    holds nothing but what this machine has made: what comes from it counts as made here.
    """

    def __init__(
        self,
        backend: Backend,
        trusted: TrustedKeys,
        signer: SigningKey | None = None,
        *,
        warn: Warn = _quiet,
        after_push: Callable[[int], None] = _quiet,
        own: bool = False,
    ) -> None:
        self.backend = backend
        self.own = own
        self.trusted = trusted
        self._signer = signer
        self._warn = warn
        self._after_push = after_push
        self._lock = threading.Lock()
        self._warned = False
        self._broken = False
        self._place: bool | None = None
        self._found: dict[StorePath, NarInfo] = {}  # misses are not kept: another may push meanwhile
        self._suspects: set[str] = set()
        self._surveyed: dict[str, Entry | None] | None = None
        self._stated: set[str] = set()  # prefixes below `attest/` that had entries when the place was listed

    @property
    def url(self) -> str:
        """What a person calls the cache."""
        return self.backend.url

    @property
    def writable(self) -> bool:
        """Whether what was made here can be pushed: there is a key to sign with, and the cache has not erred."""
        return self._signer is not None and not self._broken

    def reach(self) -> None:
        """Raise RemoteError when the cache cannot be asked, or is another store's."""
        self._has_info()

    def disable(self, error: VzreproError) -> None:
        """Stop asking this cache, and say why, once."""
        self._broken = True
        self._complain(error)

    # --- taking -------------------------------------------------------------------------------------------------------

    def query(self, path: StorePath) -> NarInfo | None:
        """What the cache has under this path, if enough trusted keys vouch for it; None for every kind of miss.

        The first thing that is wrong with the cache is reported through `warn`; a cache that cannot be reached or
        belongs to another store is not asked again. Never raises for anything the cache does.
        """
        with self._as_miss():
            return self.ask(path)
        return None

    def ask(self, path: StorePath) -> NarInfo | None:
        """As `query`, but what stands in the way is raised: Untrusted, Damaged, or RemoteError when the cache fails.

        None also when the cache is not asked any more.
        """
        found = self._found.get(path)
        if found is not None or not self._may_ask():
            return found
        data = self.read(narinfo_key(path), MAX_SIZE)
        if data is None:
            return None
        info = NarInfo.parse(data)
        if info.path != path:
            raise Untrusted(f"{self.url} has {info.path} where {path} belongs")
        info.verify(self.trusted, self.url)
        self._found[path] = info
        return info

    def fetch(self, info: NarInfo, dest: Path, progress: Progress = _quiet) -> ObjectInfo:
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
            self._found.pop(info.path, None)
            if isinstance(error, Damaged):
                self.suspect(info.url)
                self._complain(error)
            elif isinstance(error, RemoteError):
                self.disable(error)
            raise
        return ObjectInfo(
            path=info.path,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            references=info.references,
            drv_hash=info.drv_hash,
            build_key=info.build_key,
            origin=info.origin,
            outcome=Outcome.SUBSTITUTED,
            voucher=None if self.own else info.render(),
        )

    def by_build_key(self, key: BuildKey) -> Realization | None:
        """What building with exactly these inputs gave, if a trusted key says so; None for every kind of miss."""
        with self._as_miss():
            if not self._may_ask():
                return None
            data = self.read(build_key_record(key), MAX_RECORD)
            if data is None:
                return None
            record = BuildRecord.parse(data, self.url)
            self.trusted.verify(record.message, record.signatures, f"a build record in {self.url}")
            realization = record.realization
            if realization.build_key != key:
                raise Untrusted(f"the record {build_key_record(key)} is that of another build key")
            return realization
        return None

    def log(self, path: StorePath) -> bytes | None:
        """The log of this object's build, if the cache has object and log. Logs are plain text that nobody signs."""
        info = self.query(path)
        if info is None or info.deriver is None:
            return None
        with self._as_miss():
            return self.read(f"log/{info.deriver}", _MAX_LOG)
        return None

    # --- giving -------------------------------------------------------------------------------------------------------

    def push(
        self,
        info: ObjectInfo,
        tree: Path,
        *,
        derivation: bytes | None = None,
        log: Path | None = None,
        attest: Attest | None = None,
        progress: Progress = _quiet,
        mend: bool = False,
    ) -> Pushed:
        """Have the valid object `info`, which lies at `tree`, in the cache: the NAR first, the narinfo last.

        `derivation` is the canonical JSON that hashes to `info.drv_hash`; `log` is the build log, a plain text file;
        `attest` gives the provenance of what was made here, signed with the key that it is called with; `progress`
        counts bytes of the NAR, then of its upload. The first result wins: when the cache holds another one for this
        path that is sound, it stays. With `mend`, records that an object there has lost are written as well.

        What was made here is signed with our key; what came from elsewhere keeps the signatures that it came with, and
        needs no key.

        Raises RemoteError when the cache fails (it is then not asked again), UsageError when there is no key to sign
        with, HashMismatch when `tree` is not what `info` says, OSError when `tree` cannot be read.
        """
        if self._signer is None and (info.voucher is None or info.outcome is Outcome.COPIED):
            raise UsageError(f"cannot push to {self.url}", reason="no key to sign with is configured")
        if derivation is not None and (info.drv_hash is None or DrvHash.of(derivation) != info.drv_hash):
            raise ValueError("the derivation is not the one that the object was made from")
        try:
            pushed = Push(self, self._signer, info, tree, derivation, log, attest, progress, mend).run()
        except RemoteError as error:
            self.disable(error)
            raise
        self._after_push(pushed.written_bytes)
        return pushed

    def look(self, path: StorePath) -> tuple[NarInfo | None, bool]:
        """For a push: what the cache has under this path, trusted or not, and whether that is damaged.

        Damaged is what no reader can use, and so nobody's result: unreadable, for another path, not signed, or with
        a wrong signature by a key that is trusted here. Raises RemoteError when the cache fails.
        """
        data = self.read(narinfo_key(path), MAX_SIZE)
        if data is None:
            return None, False
        try:
            info = NarInfo.parse(data)
        except Damaged:
            return None, True
        if info.path != path:
            return None, True
        return (None, True) if info.is_void(self.trusted) else (info, False)

    def is_trusted(self, info: NarInfo) -> bool:
        """Whether `query` would return this."""
        try:
            info.verify(self.trusted, self.url)
        except Untrusted:
            return False
        return True

    def objects(self) -> Iterator[tuple[NarInfo, float]]:
        """The narinfos in the cache, trusted or not, and when each was last written, in seconds since the epoch.

        What cannot be read is left out: `check.verify` tells of it. Raises RemoteError.
        """

        def read(entry: Entry) -> tuple[NarInfo, float] | None:
            with contextlib.suppress(Damaged):
                data = self.read(entry.key, MAX_SIZE)
                return None if data is None else (NarInfo.parse(data), entry.mtime)
            return None

        entries = (entry for entry in self.backend.list() if kind_of(entry.key) == "narinfo")
        return (found for found in in_order(read, entries) if found is not None)

    def made_of(self, info: ObjectInfo) -> NarInfo | None:
        """For a push: the narinfo, trusted or not, of an object that came of the same work under another name."""
        if info.build_key is None or self.was_absent(build_key_record(info.build_key)):
            return None
        try:
            data = self.read(build_key_record(info.build_key), MAX_RECORD)
            return None if data is None else self.look(BuildRecord.parse(data, self.url).realization.path)[0]
        except Damaged:
            return None

    def suspect(self, url: str) -> None:
        """The NAR at this key is wrong, whatever the place says of it: the next push writes it anew."""
        self._suspects.add(url)

    def is_suspect(self, url: str) -> bool:
        """Whether this process knows that the NAR at this key is wrong."""
        return url in self._suspects

    def has_written(self, url: str) -> None:
        """The NAR at this key has been written, perhaps anew."""
        self._suspects.discard(url)
        if self._surveyed is not None:
            self._surveyed.setdefault(url)

    @contextmanager
    def surveyed(self) -> Iterator[None]:
        """While the block runs, pushes know from one listing which keys were not there before it, and how old narinfos
        are, and do not ask for that: for pushing many. Raises RemoteError when the cache fails."""
        self._surveyed = {
            entry.key: entry if kind_of(entry.key) == "narinfo" else None for entry in self.backend.list()
        }
        self._stated = {claim_of(key) for key in self._surveyed if kind_of(key) == "attest"}
        try:
            yield
        finally:
            self._surveyed = None

    def head(self, key: str) -> Entry | None:
        """For a push: what the place says of an entry, now or, where that does, when it was listed."""
        if self._surveyed is None:
            return self.backend.head(key)
        return (self._surveyed[key] or self.backend.head(key)) if key in self._surveyed else None

    def was_absent(self, key: str) -> bool:
        """Whether it is known that there was no such entry a moment ago. Others may have written it since."""
        return self._surveyed is not None and key not in self._surveyed

    def differences(self, info: NarInfo) -> list[Difference]:
        """Who has told this cache that the object's derivation gave other bytes. Raises RemoteError."""
        subject = info.drv_hash.hex if info.drv_hash is not None else info.path.hash_part
        found = (read_difference(data, info.path, self.trusted) for data in self._statements(subject))
        return [each for each in found if each is not None]

    def attestations(self, drv_hash: DrvHash) -> list[bytes]:
        """The DSSE envelopes that this cache has about a derivation, sorted; nobody has verified them.

        Raises RemoteError when the cache fails. What is too large, is not what its name says, or is no envelope is left
        out. Of more than MAX_ATTESTATIONS, or more than 64 MiB, some are.
        """
        if not self._may_ask():
            return []
        return sorted(data for data in self._statements(drv_hash.hex) if is_attestation(data))

    def put_attestation(self, drv_hash: DrvHash, envelope: bytes) -> bool:
        """Have a DSSE envelope about a derivation in the cache; whether it was not there. Needs no key of ours.

        Raises RemoteError when the cache fails, UsageError when it cannot be written or this is no envelope.
        """
        key = attestation_key(drv_hash, envelope)
        with self.backend.lock(exclusive=False):
            self.make_place()
            written = self.backend.put(key, envelope, if_absent=True)
            if not written and self._is_gone(key):
                written = self.backend.put(key, envelope, if_absent=True)
            self.index_statement(key)
        return written

    def _is_gone(self, key: str) -> bool:
        """Whether an entry that was there a moment ago is being collected as garbage; if not, it stays for a while."""
        entry = self.backend.head(key)
        if entry is not None and entry.mtime < self.backend.now() - FRESH_SECS and self.backend.refresh(key):
            settle(self.backend)
            entry = self.backend.head(key)
        return entry is None

    def index_statement(self, key: str) -> None:
        """Have an entry below `attest/` in the list of those about its derivation, for who reads them over HTTP.

        Two who write that at once may leave one's entry out, until somebody writes it again. Raises RemoteError.
        """
        prefix = claim_of(key)
        entries = [key]
        if self._surveyed is None or prefix in self._stated:
            entries += [entry.key for entry in islice(self.backend.list(prefix), MAX_ATTESTATIONS)]
        self.backend.put(prefix + INDEX, statements_index({each.removeprefix(prefix) for each in entries}))

    def _statements(self, subject: str) -> list[bytes]:
        """The intact entries about a derivation, in no order."""
        prefix = differences_prefix(subject)

        def small(key: str) -> bytes | None:
            with contextlib.suppress(Damaged):
                return self.read(key, MAX_ATTESTATION)
            return None

        try:
            listed = (entry.key for entry in self.backend.list(prefix) if entry.size <= MAX_ATTESTATION)
            keys = [key for key in islice(listed, MAX_ATTESTATIONS) if key != prefix + INDEX]
        except UsageError:  # over HTTP, nothing can be listed
            keys = [prefix + entry for entry in read_index(small(prefix + INDEX) or b"")[:MAX_ATTESTATIONS]]

        def read(key: str) -> bytes | None:
            data = small(key)
            return data if data is not None and is_intact(key, data) else None

        found, size = [], 0
        for data in in_order(read, keys, 1 if len(keys) < 2 else WORKERS):
            found += [] if data is None else [data]
            size += 0 if data is None else len(data)
            if size > _MAX_STATEMENTS:
                break
        return found

    def forget(self, paths: Collection[StorePath]) -> None:
        """Have none of these paths any more, so that the next push wins. Of no avail where the cache fails."""
        with self._as_miss():
            self.backend.delete([narinfo_key(path) for path in paths])
        for path in paths:
            self._found.pop(path, None)

    def make_place(self) -> None:
        """Write nix-cache-info if there is none. Raises RemoteError when the cache fails or is another store's."""
        if not self._has_info():
            self.backend.put(CACHE_INFO, _ITS_INFO, if_absent=True)
            self._place = True

    # --- what both need -----------------------------------------------------------------------------------------------

    def _has_info(self) -> bool:
        """Whether the cache says which store it is for. Raises RemoteError when that is not ours."""
        if self._place is None:
            try:
                data = self.read(CACHE_INFO, MAX_RECORD)
            except Damaged as error:
                # Whoever sends megabytes instead of a line or two would do so at every question.
                raise RemoteError(f"{self.url} is not a binary cache", reason=error.message) from error
            for line in (data or b"").decode(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == "StoreDir" and value.strip() != STORE_DIR:
                    raise RemoteError(
                        f"{self.url} is a cache for another store",
                        reason=f"its StoreDir is {value.strip()!r}, not {STORE_DIR}",
                        hint="remove it from the configured caches",
                    )
            self._place = data is not None
        return self._place

    def _may_ask(self) -> bool:
        if not self._broken:
            self._has_info()
        return not self._broken

    def read(self, key: str, limit: int) -> bytes | None:
        """An entry's bytes; None when there is none. Raises RemoteError; Damaged when there are more than `limit`."""
        opened = self.backend.get(key)
        return None if opened is None else read_whole(opened, limit, f"{key} in {self.url}")

    def _unpack(self, info: NarInfo, dest: Path, progress: Progress) -> None:
        opened = self.backend.get(info.url)
        if opened is None:
            raise Damaged(f"{self.url} has lost {info.url}", reason=f"it is the content of {info.path}")
        with opened as stream:
            take(stream, info, self.url, lambda read: nar.unpack(read, dest, max_size=info.nar_size), progress)

    @contextmanager
    def _as_miss(self) -> Iterator[None]:
        try:
            yield
        except (Untrusted, Damaged) as error:
            self._complain(error)
        except RemoteError as error:
            self.disable(error)

    def _complain(self, error: VzreproError) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            what = printable(error.message)
            reason = f": {printable(error.reason)}" if error.reason else ""
            ending = "it is not asked again" if self._broken else "what is wrong there is built here"
            hint = f" ({error.hint})" if error.hint else ""
            self._warn(f"cache {self.url}: {what}{reason}; {ending}{hint}")
