"""Writing one object to a cache: what is there decides what has to be written, the NAR goes first, the narinfo last."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from vzrepro import nar
from vzrepro.base.errors import HashMismatch, RemoteError
from vzrepro.base.model import FileHash, NarHash, ObjectInfo, Outcome, Realization
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.cache.access import Access
from vzrepro.cache.backend import FRESH_SECS, Backend, Damaged, Entry
from vzrepro.cache.layout import claim_of, kind_of
from vzrepro.cache.narinfo import NarInfo, deriver_of, narinfo_key
from vzrepro.cache.notice import settle
from vzrepro.cache.records import (
    MAX_RECORD,
    BuildRecord,
    attestation_key,
    build_key_record,
    signed_difference,
    signed_realization,
)
from vzrepro.cache.statements import write_index

_SMALL = 1 << 20  # NARs up to this are made ready in memory, and at once
_COSIGN_TRIES = 4  # each beaten by somebody else who signs at the same time


Attest = Callable[[SigningKey], bytes | None]
"""Gives the DSSE envelope of an object's provenance, signed with this key; None when there is nothing to state."""


class PushOutcome(enum.Enum):
    """What a push found in the cache and left there."""

    NEW = "new"
    """Nothing was there; the object is now."""
    PRESENT = "present"
    """The same object was there already, whole."""
    HEALED = "healed"
    """A damaged or half object was there and has been replaced, or our signature has joined others."""
    DIFFERENT = "different"
    """Another result was there and stays; a signed record of the difference has been written."""


@dataclass(frozen=True, slots=True)
class PushResult:
    """How a push ended: what is in the cache now, how many bytes were written for it, and, when the cache keeps another
    result, its NAR hash and the key of the record that says so (None: what came from elsewhere is not ours to state).
    """

    kept: PushOutcome
    written_bytes: int
    other: NarHash | None = None
    record: str | None = None


class Survey:
    """What a place holds: asked for entry by entry or, between `list` and `forget`, known from one listing."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._entries: dict[str, Entry | None] | None = None  # of narinfos, all is kept; of others, that they are there
        self._stated: set[str] = set()  # prefixes below `attest/` that had entries

    def list(self) -> None:
        """List the place. Raises RemoteError."""
        self._entries = {
            entry.key: entry if kind_of(entry.key) == "narinfo" else None for entry in self._backend.list()
        }
        self._stated = {claim_of(key) for key in self._entries if kind_of(key) == "attest"}

    def forget(self) -> None:
        """Ask again from now on."""
        self._entries = None

    def head(self, key: str) -> Entry | None:
        """What the place says of an entry, now or, where that does, when it was listed."""
        if self._entries is None:
            return self._backend.head(key)
        return (self._entries[key] or self._backend.head(key)) if key in self._entries else None

    def was_absent(self, key: str) -> bool:
        """Whether it is known that there was no such entry a moment ago. Others may have written it since."""
        return self._entries is not None and key not in self._entries

    def was_stated(self, key: str) -> bool:
        """Whether there may be others beside this entry below `attest/`."""
        return self._entries is None or claim_of(key) in self._stated

    def add(self, key: str) -> None:
        """The entry has been written, perhaps anew."""
        if self._entries is not None:
            self._entries.setdefault(key)


class Push:
    """One push. What was made here, or copied here under a new name, is signed with `signer`; what came from elsewhere
    keeps the signatures that it came with."""

    def __init__(
        self,
        access: Access,
        survey: Survey,
        signer: SigningKey | None,
        info: ObjectInfo,
        tree: Path,
        derivation: bytes | None,
        log: Path | None,
        attest: Attest | None,
        progress: Callable[[int, int | None], None],
        mend: bool,
    ) -> None:
        self._access = access
        self._backend = access.backend
        self._survey = survey
        self._info = info
        self._tree = tree
        self._derivation = derivation
        self._log = log
        self._attest = attest
        self._progress = progress
        self._mend = mend
        self._written = 0
        self._voucher = None if info.voucher is None else NarInfo.parse(info.voucher)
        ours = self._voucher is None or self._voucher.path != info.path
        self._signer = signer if ours else None

    def run(self) -> PushResult:
        """Do it. Raises RemoteError, and HashMismatch when the tree is not the object announced."""
        with self._backend.lock(exclusive=False):
            self._access.make_place()
            existing, damaged = None, False
            if not self._survey.was_absent(narinfo_key(self._info.path)):
                existing, damaged = self._access.look(self._info.path)
            pushed = self._settled(existing, damaged) or self._renamed(existing, damaged)
            if pushed is None and self._info.nar_size <= _SMALL:
                pieces: list[bytes] = []
                ready = self._compressed(pieces.append)
                pushed = self._written_anew(ready, b"".join(pieces), existing, damaged)
        if pushed is not None:
            return pushed
        # Compressing takes long: nothing is held meanwhile, so what is there is looked at again.
        with self._backend.spool() as spool:
            # Not buffered, so that closing has nothing left to write and to fail at.
            with spool.open("wb", buffering=0) as file:
                ready = self._compressed(lambda piece: self._spool(file, piece))
            return self._finished(ready, spool)

    def _finished(self, ready: NarInfo, compressed: bytes | Path) -> PushResult:
        with self._backend.lock(exclusive=False):
            existing, damaged = self._access.look(self._info.path)
            return self._settled(existing, damaged) or self._written_anew(ready, compressed, existing, damaged)

    # --- what is there already ----------------------------------------------------------------------------------------

    def _settled(self, existing: NarInfo | None, damaged: bool) -> PushResult | None:
        """The end of the push if what is in the cache makes the NAR unnecessary."""
        if existing is None or damaged:
            return None
        if existing.nar_hash != self._info.nar_hash:
            return self._different(existing)
        if not self._serves(existing, narinfo_key(existing.path)):
            return None
        if self._signer is not None and not self._vouched_for_by_us(existing):
            return self._cosigned(existing, self._signer)
        # The narinfo came last, so its records were there; only a log may come later.
        self._records(existing, *(() if self._mend else ("log",)))
        return PushResult(PushOutcome.PRESENT, self._written)

    def _serves(self, info: NarInfo, *also: str) -> bool:
        """Whether the NAR that `info` names is there and, as far as can be told, right, and so are the entries `also`.

        Then they are young, since from now on somebody relies on them.
        """
        entries = [self._survey.head(key) for key in (info.url, *also)]
        there = [entry for entry in entries if entry is not None]
        if len(there) < len(entries) or info.url in self._access.wrong_nars or not _is_announced(there[0], info):
            return False
        return not self._made_young(there)

    def _made_young(self, entries: Sequence[Entry]) -> list[str]:
        """Have what is older than FRESH_SECS count as just used; the keys of what was collected meanwhile."""
        stale = self._backend.now() - FRESH_SECS
        old = [entry.key for entry in entries if entry.mtime < stale]
        if not old:
            return []
        gone = [key for key in old if not self._backend.refresh(key)]
        settle(self._backend)
        return [key for key in old if key in gone or self._backend.head(key) is None]

    def _renamed(self, existing: NarInfo | None, damaged: bool) -> PushResult | None:
        """For a copy made here of an object whose NAR the cache has: only its new name travels."""
        info = self._info
        if existing is not None or info.outcome is not Outcome.COPIED or self._signer is None:
            return None
        originals = (self._voucher, self._made_of(info))
        original = next((each for each in originals if each is not None and self._has_content(each)), None)
        if original is None:
            return None
        fresh = self._described(original.url, original.compression, original.file_hash, original.file_size)
        return self._published(fresh, None, damaged)

    def _made_of(self, info: ObjectInfo) -> NarInfo | None:
        """The narinfo, trusted or not, of an object that came of the same work under another name."""
        if info.build_key is None or self._survey.was_absent(build_key_record(info.build_key)):
            return None
        try:
            data = self._access.read(build_key_record(info.build_key), MAX_RECORD)
            if data is None:
                return None
            return self._access.look(BuildRecord.parse(data, self._access.url).realization.path)[0]
        except Damaged:
            return None

    def _has_content(self, other: NarInfo) -> bool:
        return other.nar_hash == self._info.nar_hash and self._serves(other)

    def _vouched_for_by_us(self, existing: NarInfo) -> bool:
        """Whether our signature is on all that we have to say."""
        assert self._signer is not None
        us = TrustedKeys([self._signer.public])
        if not us.signers(existing.fingerprint, existing.signatures):
            return False
        ours = self._with_our_fields(existing).own_message
        if ours is not None and ours == existing.own_message:
            return bool(us.signers(ours, existing.own_signatures))
        return ours is None or not self._lacks_fields(existing)

    def _lacks_fields(self, existing: NarInfo) -> bool:
        """Whether it has no fields of ours and should: a Nix client that copies a narinfo keeps the signatures only.

        Where several must sign, readers would refuse fields that only we have signed, and do without if there are none.
        """
        return existing.own_message is None and self._access.trusted.required <= 1

    def _with_our_fields(self, existing: NarInfo) -> NarInfo:
        info = self._info
        return replace(existing, drv_hash=info.drv_hash, build_key=info.build_key, origin=info.origin)

    def _cosigned(self, existing: NarInfo, signer: SigningKey) -> PushResult:
        """Others have pushed the same bytes: vouch for them too."""
        info = self._info
        for _ in range(_COSIGN_TRIES):
            ours = self._with_our_fields(existing)
            same = ours.own_message == existing.own_message
            if same or self._lacks_fields(existing) or not existing.is_trusted(self._access.trusted):
                if not same:
                    ours = replace(ours, own_signatures=())
                signed = ours.signed(signer)
            else:
                # They fed in something else, and are trusted: what they say of it stays theirs.
                signed = replace(existing, signatures=existing.signed(signer).signatures)
            self._records(signed)
            self._put(narinfo_key(info.path), signed.render(), if_absent=False)
            # Two that sign at once would overwrite each other.
            found, damaged = self._access.look(info.path)
            if found is None or damaged or found.nar_hash != info.nar_hash or self._vouched_for_by_us(found):
                break
            existing = found
        return PushResult(PushOutcome.HEALED, self._written)

    def _different(self, existing: NarInfo) -> PushResult:
        """Record that the same derivation gave other bytes here."""
        if self._signer is None:
            return PushResult(PushOutcome.DIFFERENT, self._written, existing.nar_hash)
        key, record = signed_difference(self._info, existing, self._signer)
        self._put(key, record)
        for attested, envelope in self._attestation():
            self._put(attested, envelope)
        self._index(key)
        return PushResult(PushOutcome.DIFFERENT, self._written, existing.nar_hash, key)

    # --- writing ------------------------------------------------------------------------------------------------------

    def _written_anew(
        self, ready: NarInfo, compressed: bytes | Path, existing: NarInfo | None, damaged: bool
    ) -> PushResult:
        if not self._serves(ready):
            self._backend.put(
                ready.url,
                compressed,
                sha256=ready.file_hash,
                progress=lambda sent: self._progress(sent, ready.file_size),
            )
            self._written += ready.file_size or 0
            self._access.wrong_nars.discard(ready.url)
            self._survey.add(ready.url)
        return self._published(ready, existing, damaged)

    def _published(self, ready: NarInfo, existing: NarInfo | None, damaged: bool) -> PushResult:
        """The NAR is there: write the records, and the narinfo last."""
        self._records(ready)
        if existing is not None:
            # The same bytes, whose NAR was lost: whoever vouched for them still does.
            ready = replace(ready, signatures=tuple(dict.fromkeys((*ready.signatures, *existing.signatures))))
        replaces = damaged or existing is not None
        if self._put(narinfo_key(ready.path), ready.render(), if_absent=not replaces):
            return PushResult(PushOutcome.HEALED if replaces else PushOutcome.NEW, self._written)
        # Somebody else was first, just now.
        return self._settled(*self._access.look(self._info.path)) or PushResult(PushOutcome.PRESENT, self._written)

    def _compressed(self, write: Callable[[bytes], object]) -> NarInfo:
        """Pack and compress the object. Raises HashMismatch when it is not the one announced."""
        info = self._info
        digest, nar_digest, nar_size, file_size = hashlib.sha256(), hashlib.sha256(), 0, 0

        def counted() -> Iterator[bytes]:
            nonlocal nar_size
            for chunk in nar.pack(self._tree):
                nar_digest.update(chunk)
                nar_size += len(chunk)
                yield chunk
                self._progress(nar_size, info.nar_size)

        for piece in nar.compress(counted()):
            digest.update(piece)
            file_size += len(piece)
            write(piece)
        if (nar_digest.hexdigest(), nar_size) != (info.nar_hash.hex, info.nar_size):
            raise HashMismatch(
                f"{info.path} is damaged and was not pushed",
                reason=f"wanted NAR {info.nar_hash.nix}, found {NarHash(nar_digest.hexdigest()).nix}",
                hint="vzrepro store verify",
            )
        file_hash = FileHash(digest.hexdigest())
        url = f"nar/{file_hash.nix.removeprefix('sha256:')}.nar.zst"
        return self._described(url, "zstd", file_hash, file_size)

    def _described(self, url: str, compression: str, file_hash: FileHash | None, file_size: int | None) -> NarInfo:
        """The object's narinfo, signed, for a NAR that travels like this."""
        info = self._info
        described = NarInfo(
            path=info.path,
            url=url,
            compression=compression,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            file_hash=file_hash,
            file_size=file_size,
            references=tuple(sorted(set(info.references))),
            deriver=None if info.drv_hash is None else deriver_of(info.drv_hash, info.path.name),
            drv_hash=info.drv_hash,
            build_key=info.build_key,
            origin=info.origin,
        )
        if self._signer is not None:
            return described.signed(self._signer)
        assert self._voucher is not None
        return replace(self._voucher, url=url, compression=compression, file_hash=file_hash, file_size=file_size)

    def _spool(self, file: FileIO, piece: bytes) -> None:
        left = memoryview(piece)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise RemoteError(
                f"cannot prepare an upload to {self._access.url}",
                reason=error.strerror,
                hint="for a bucket, that is done in $TMPDIR, else in the cache's directory: make room there",
            ) from error

    def _records(self, info: NarInfo, *only: str) -> None:
        """Have what goes with the narinfo and is written before it: derivation, log, build record, or `only` these.

        What is there already may be garbage that is about to be collected, so it is made young or written again.
        """
        documents = (*self._documents(info), *(() if only else self._attestation()))
        records = {key: data for key, data in documents if not only or key.partition("/")[0] in only}
        left = [key for key, data in records.items() if not self._put(key, data)]
        entries = [self._backend.head(key) for key in left]
        there = [entry for entry in entries if entry is not None]
        for key in {*left} - {entry.key for entry in there} | {*self._made_young(there)}:
            self._put(key, records[key])
        for key in records:
            if key.startswith("attest/"):
                self._index(key)

    def _attestation(self) -> Iterator[tuple[str, bytes]]:
        """Key and content of what this push states about how the object was made, if it does."""
        drv_hash = self._info.drv_hash
        envelope = self._attest(self._signer) if self._attest and self._signer and drv_hash else None
        if envelope is not None and drv_hash is not None:
            yield attestation_key(drv_hash, envelope), envelope

    def _documents(self, info: NarInfo) -> Iterator[tuple[str, bytes | Path]]:
        """Keys and contents of the records that this push can write for a narinfo."""
        if self._derivation is not None and info.drv_hash is not None:
            yield f"drv/{info.drv_hash}.json", self._derivation
        if self._log is not None and info.deriver is not None and self._log.is_file():
            yield f"log/{info.deriver}", self._log
        ours = self._info
        if self._signer is not None and ours.build_key is not None and ours.drv_hash is not None:
            realization = Realization(ours.build_key, ours.drv_hash, ours.path, ours.nar_hash, ours.nar_size)
            yield build_key_record(ours.build_key), signed_realization(realization, self._signer)

    def _index(self, key: str) -> None:
        write_index(self._backend, key, None if self._survey.was_stated(key) else ())

    def _put(self, key: str, data: bytes | Path, *, if_absent: bool = True) -> bool:
        written = self._backend.put(key, data, if_absent=if_absent)
        if written:
            self._written += len(data) if isinstance(data, bytes) else data.stat().st_size
        return written


def _is_announced(entry: Entry, info: NarInfo) -> bool:
    """Whether what the place says of a NAR agrees with its narinfo."""
    return info.file_size in (None, entry.size) and entry.sha256 in (None, info.file_hash or entry.sha256)
