"""Giving to a binary cache: objects with their records, statements about them, and taking back what is not wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import DrvHash, ObjectInfo, Outcome, StorePath
from vzrepro.base.signing import SigningKey
from vzrepro.cache.access import quiet
from vzrepro.cache.backend import FRESH_SECS, Damaged
from vzrepro.cache.content import TransferProgress
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.notice import settle
from vzrepro.cache.push import Attest, Push, PushResult, Survey
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.records import attestation_key
from vzrepro.cache.statements import write_index


class CacheWriter:
    """A cache that can be written; usable from any thread.

    `reader` takes from the same cache; `access` is how both ask it. With a `signer`, what was made here can be pushed.
    `after_push` is called with the bytes that a push has written.
    """

    def __init__(
        self,
        reader: CacheReader,
        signer: SigningKey | None = None,
        *,
        after_push: Callable[[int], None] = quiet,
    ) -> None:
        self.reader = reader
        self.access = reader.access
        self._backend = reader.access.backend
        self._signer = signer
        self._after_push = after_push
        self._survey = Survey(self._backend)

    @property
    def url(self) -> str:
        """What a person calls the cache."""
        return self.access.url

    @property
    def writable(self) -> bool:
        """Whether what was made here can be pushed: there is a key to sign with, and the cache has not erred."""
        return self._signer is not None and not self.access.is_broken

    def push(
        self,
        info: ObjectInfo,
        tree: Path,
        *,
        derivation: bytes | None = None,
        log: Path | None = None,
        attest: Attest | None = None,
        progress: TransferProgress = quiet,
        mend: bool = False,
    ) -> PushResult:
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
        push = Push(self.access, self._survey, self._signer, info, tree, derivation, log, attest, progress, mend)
        try:
            pushed = push.run()
        except RemoteError as error:
            self.access.disable(error)
            raise
        self._after_push(pushed.written_bytes)
        return pushed

    @contextmanager
    def surveyed(self) -> Iterator[None]:
        """While the block runs, pushes know from one listing which keys were not there before it, and how old narinfos
        are, and do not ask for that: for pushing many. Raises RemoteError when the cache fails."""
        self._survey.list()
        try:
            yield
        finally:
            self._survey.forget()

    def put_attestation(self, drv_hash: DrvHash, envelope: bytes) -> bool:
        """Have a DSSE envelope about a derivation in the cache; whether it was not there. Needs no key of ours.

        Raises RemoteError when the cache fails, UsageError when it cannot be written or this is no envelope.
        """
        key = attestation_key(drv_hash, envelope)
        with self._backend.lock(exclusive=False):
            self.access.make_place()
            written = self._backend.put(key, envelope, if_absent=True)
            if not written and self._is_gone(key):
                written = self._backend.put(key, envelope, if_absent=True)
            write_index(self._backend, key)
        return written

    def put_derivation(self, drv_hash: DrvHash, canonical: bytes) -> None:
        """Have `drv/<hash>.json` in the cache, for a worker that is to build it; it stays for a day at least.

        Whatever else was there under that name is overwritten: the name says what belongs there. Raises RemoteError.
        """
        key = f"drv/{drv_hash}.json"
        with self._backend.lock(exclusive=False):
            self.access.make_place()
            if self._backend.put(key, canonical, if_absent=True):
                return
            with suppress(Damaged):
                if self.access.read(key, len(canonical)) == canonical and not self._is_gone(key):
                    return
            self._backend.put(key, canonical)

    def forget(self, paths: Collection[StorePath]) -> None:
        """Have none of these paths any more, so that the next push wins. Of no avail where the cache fails."""
        with self.access.as_miss():
            self._backend.delete([narinfo_key(path) for path in paths])
        for path in paths:
            self.access.verified.pop(path, None)

    def _is_gone(self, key: str) -> bool:
        """Whether an entry that was there a moment ago is being collected as garbage; if not, it stays for a while."""
        entry = self._backend.head(key)
        if entry is not None and entry.mtime < self._backend.now() - FRESH_SECS and self._backend.refresh(key):
            settle(self._backend)
            entry = self._backend.head(key)
        return entry is None
