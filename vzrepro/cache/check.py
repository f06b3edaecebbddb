"""Checking a whole cache: whether every entry is what it should be, and mending what is not.

`verify` only reads. `repair` writes damaged objects again from a place where they are valid; where there is none, it
removes the narinfo that nobody can use, so that the object is built and pushed anew.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Protocol

from vzrepro.base.errors import HashMismatch, Untrusted, UsageError
from vzrepro.base.model import DrvHash, ObjectInfo, StorePath
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.backend import FRESH_SECS, Damaged
from vzrepro.cache.content import hashed, take
from vzrepro.cache.layout import MAX_DERIVATION, KeySet, claim_of, kind_of, needs_of, open_entry, read_entry
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, OtherCompression, narinfo_key
from vzrepro.cache.notice import announced
from vzrepro.cache.parallel import WORKERS, in_order
from vzrepro.cache.push import PushOutcome
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.records import INDEX, MAX_ATTESTATION, MAX_RECORD, BuildRecord, build_key_record, is_intact
from vzrepro.cache.writer import CacheWriter

_NAR_WORKERS = 4  # NARs that are read at once: each is decoded in parallel as well

FindingKind = Literal["damaged", "missing-nar", "damaged-nar", "missing-reference", "untrusted", "foreign", "orphan"]
"""What is wrong: a narinfo or record that nobody can use · a narinfo whose NAR is not there · a NAR that is not what a
narinfo says · a path that a narinfo refers to is not there · too few trusted keys have signed, but none wrongly ·
an object that some Nix client has written in a form that we do not read · no narinfo needs the entry, and it is not
one of a push that is under way."""

CheckProgress = Callable[[int, int], object]
"""Bytes that have been checked, and how many there are to check; called in any thread, never twice at once."""


def _quiet(*_anything: object) -> None:
    return


@dataclass(frozen=True, slots=True)
class CacheFinding:
    """Something wrong with the entry `key`; `path` is the object it belongs to, if that is known (for
    `missing-reference`, the object that is not there)."""

    key: str
    path: StorePath | None
    kind: FindingKind
    detail: str


@dataclass(frozen=True, slots=True)
class CheckSummary:
    """What a verification has looked at: objects (narinfos), all entries of ours, bytes of NARs that were read."""

    objects: int
    entries: int
    nar_bytes: int


@dataclass(frozen=True, slots=True)
class HeldObject:
    """An object where it is valid: what `CacheWriter.push` takes."""

    info: ObjectInfo
    tree: Path
    derivation: bytes | None = None
    log: Path | None = None


class ObjectSource(Protocol):
    """Where objects are valid, for `repair`: the local store."""

    def __call__(self, path: StorePath, /) -> HeldObject | None:
        """The object, None when it is not here or not valid."""


@dataclass(frozen=True, slots=True)
class RepairResult:
    """What `repair` did about a finding: `pushed` again from the source · `removed` what nobody can use · `sound` by
    now, so nothing · `left` as it was. `detail` says what or why."""

    finding: CacheFinding
    action: Literal["pushed", "removed", "sound", "left"]
    detail: str


def verify(
    cache: CacheReader,
    *,
    deep: bool,
    found: Callable[[CacheFinding], object],
    progress: CheckProgress = _quiet,
    workers: int = WORKERS,
) -> CheckSummary:
    """Check every object of the cache as this machine trusts it; `found` is called with each finding, in this thread.

    For each narinfo: its form, that it is its own path's, its signatures, that its NAR is there with the announced size
    (and hash, where the place tells), that what it refers to is there, that its derivation has its hash and its build
    record is signed and agrees with it. With `deep`, every NAR is read: both hashes and both sizes; nothing is
    unpacked; and every statement below `attest/`, whose name is its hash. Then what no narinfo needs. What others push,
    remove or mend meanwhile is no finding.

    The place is listed once; memory is about 30 bytes for each entry, besides what a few NARs that are read at once
    take. Raises RemoteError when the place fails.
    """
    check = _Check(cache, deep, found, progress)
    return check.run(workers)


def repair(cache: CacheWriter, findings: Iterable[CacheFinding], source: ObjectSource) -> Iterator[RepairResult]:
    """Mend what one `verify` has found; yields what was done about each finding.

    Everything is looked at again before it is touched. What `source` holds is pushed again, so the cache needs a key
    to sign with. Else narinfos and records that nobody can use are removed, and a damaged NAR once every narinfo that
    was found to name it is gone, so `findings` should be all of them. What unknown keys have signed and what nobody
    needs stays as it is.

    Raises RemoteError when the place fails, UsageError when there is no key to sign with.
    """
    return _Repair(cache, source).run(findings)


# --- judging ----------------------------------------------------------------------------------------------------------


def _signed(trusted: TrustedKeys, message: bytes, signatures: Iterable[str]) -> tuple[FindingKind, str] | None:
    """What is wrong with the signatures of a message: `damaged` when there is none, or none is good and one is wrong in
    the name of a trusted key; `untrusted` when others have signed, or too few."""
    signatures = tuple(signatures)
    try:
        trusted.verify(message, signatures, "it")
    except UsageError as error:
        return "damaged", error.message
    except Untrusted as error:
        kind: FindingKind = "damaged" if trusted.is_void(message, signatures) else "untrusted"
        return kind, error.in_a_line
    return None


def _judged(info: NarInfo, trusted: TrustedKeys) -> tuple[FindingKind, str] | None:
    wrong = _signed(trusted, info.fingerprint, info.signatures)
    own = info.own_message
    if own is not None and (wrong is None or wrong[0] != "damaged"):
        wrong_own = _signed(trusted, own, info.own_signatures)
        if wrong_own is not None:
            return wrong_own[0], f"its Vz fields: {wrong_own[1]}"
    return wrong


@dataclass(frozen=True, slots=True)
class _Look:
    """What one narinfo looked like: None as `info` when nobody can use it; nothing at all when it is gone."""

    info: NarInfo | None
    findings: tuple[CacheFinding, ...]
    keys: tuple[str, ...] = ()  # what it needs


class _Examiner:
    """Looks at single objects of a cache."""

    def __init__(self, cache: CacheReader, read: Callable[[int], object] = _quiet) -> None:
        self._trusted = cache.access.trusted
        self._backend = cache.access.backend
        self._read = read

    def narinfo(self, key: str) -> _Look:
        """The narinfo at `key`, by itself."""
        hash_part = key.removesuffix(".narinfo")
        data: bytes | None = None
        try:
            data = read_entry(self._backend, key, MAX_SIZE)
            info = None if data is None else NarInfo.parse(data)
        except Damaged as error:
            needs = None if data is None else needs_of(data, hash_part)
            detail = error.in_a_line
            path = None if needs is None else needs.path
            kind: FindingKind = "foreign" if isinstance(error, OtherCompression) and needs is not None else "damaged"
            return _Look(None, (CacheFinding(key, path, kind, detail),), () if needs is None else needs.keys)
        if data is None or info is None:
            return _Look(None, ())
        needs = needs_of(data, hash_part)
        if needs is None:
            return _Look(None, (CacheFinding(key, None, "damaged", f"it is the narinfo of {info.path}"),))
        wrong = _judged(info, self._trusted)
        findings = () if wrong is None else (CacheFinding(key, info.path, *wrong),)
        return _Look(info if wrong is None or wrong[0] != "damaged" else None, findings, needs.keys)

    def nar(self, info: NarInfo, *, deep: bool) -> CacheFinding | None:
        """The NAR of a narinfo. Raises RemoteError when the place fails."""
        entry = self._backend.head(info.url)
        if entry is None:
            return self._missing(info)
        if info.file_size not in (None, entry.size):
            return _damaged_nar(info, f"wanted {info.file_size} bytes, found {entry.size}")
        if info.file_hash is not None and entry.sha256 not in (None, info.file_hash):
            return _damaged_nar(info, f"wanted {info.file_hash.nix}, and the place says {entry.sha256.nix}")
        return self.content(info) if deep else None

    def derivation(self, info: NarInfo) -> CacheFinding | None:
        """The `drv/` record of a narinfo, if there is one."""
        if info.drv_hash is None:
            return None
        key = f"drv/{info.drv_hash}.json"
        try:
            data = read_entry(self._backend, key, MAX_DERIVATION)
        except Damaged as error:
            return CacheFinding(key, info.path, "damaged", error.message)
        if data is None or DrvHash.of(data) == info.drv_hash:
            return None
        return CacheFinding(key, info.path, "damaged", "its hash is not the one it is filed under")

    def build_record(self, info: NarInfo) -> CacheFinding | None:
        """The `build/` record of a narinfo, if there is one."""
        if info.build_key is None:
            return None
        key = build_key_record(info.build_key)
        try:
            data = read_entry(self._backend, key, MAX_RECORD)
            if data is None:
                return None
            found = BuildRecord.parse(data, self._backend.url)
        except Damaged as error:
            return CacheFinding(key, info.path, "damaged", error.reason or error.message)
        record = found.realization
        if record.build_key != info.build_key:
            return CacheFinding(key, info.path, "damaged", "it is that of another build key")
        wrong = _signed(self._trusted, found.message, found.signatures)
        if wrong is not None:
            return CacheFinding(key, record.path, *wrong)
        if record.path == info.path:
            if (record.nar_hash, record.nar_size, record.drv_hash) != (info.nar_hash, info.nar_size, info.drv_hash):
                return CacheFinding(key, info.path, "damaged", "it does not agree with the narinfo of its path")
        elif self._backend.head(narinfo_key(record.path)) is None:
            # Nobody gains anything by it, and as records are written only where there is none, it would stay.
            return CacheFinding(key, info.path, "damaged", f"it names {record.path}, which is not there")
        return None

    def statement(self, key: str) -> CacheFinding | None:
        """The `attest/` entry at `key`: whether it is what its name says. Who signed what in it is not asked."""
        if key.endswith(f"/{INDEX}"):
            return None
        try:
            data = read_entry(self._backend, key, MAX_ATTESTATION)
        except Damaged as error:
            return CacheFinding(key, None, "damaged", error.message)
        if data is None or is_intact(key, data):
            return None
        return CacheFinding(key, None, "damaged", "its hash is not the one it is named after")

    def _missing(self, info: NarInfo) -> CacheFinding | None:
        # Narinfos go first: if this one is there still, the NAR is not merely being collected.
        if self._backend.head(narinfo_key(info.path)) is None:
            return None
        return CacheFinding(narinfo_key(info.path), info.path, "missing-nar", f"{info.url} is not there")

    def content(self, info: NarInfo) -> CacheFinding | None:
        """The NAR of a narinfo, read from the first byte to the last, whatever the place says of it."""
        opened = open_entry(self._backend, info.url)
        if opened is None:
            return self._missing(info)
        done = 0

        def progress(size: int, _total: int | None) -> None:
            nonlocal done
            self._read(size - done)
            done = size

        with opened as stream:
            try:
                take(stream, info, self._backend.url, lambda read: hashed(read, info.nar_size), progress)
            except Damaged as error:
                return _damaged_nar(info, error.in_a_line)
        return None


def _damaged_nar(info: NarInfo, detail: str) -> CacheFinding:
    return CacheFinding(info.url, info.path, "damaged-nar", detail)


# --- verifying --------------------------------------------------------------------------------------------------------


class _Check:
    """One verification."""

    def __init__(
        self, cache: CacheReader, deep: bool, found: Callable[[CacheFinding], object], progress: CheckProgress
    ) -> None:
        self._backend = cache.access.backend
        self._deep = deep
        self._found = found
        self._progress = progress
        self._examiner = _Examiner(cache, self._arrived)
        self._lock = threading.Lock()
        self._done = self._total = self._nar_bytes = 0
        self._there = KeySet()
        self._needed = KeySet()
        self._sound = KeySet()  # NARs, with what was wanted of them
        self._told: set[str] = set()  # keys of findings that several objects may share

    def run(self, workers: int) -> CheckSummary:
        old = self._backend.now() - FRESH_SECS
        objects = entries = 0
        with tempfile.TemporaryFile("w+", prefix="vzrepro-") as spool:
            for entry in self._backend.list():
                kind = kind_of(entry.key)
                if kind is None:
                    continue
                entries += 1
                objects += kind == "narinfo"
                self._there.update((entry.key,))
                self._total += entry.size if kind == "narinfo" or (kind == "nar" and self._deep) else 0
                spool.write(f"{entry.key} {entry.size} {int(entry.mtime < old)}\n")
            self._narinfos(_lines(spool), min(workers, _NAR_WORKERS) if self._deep else workers)
            self._orphans(_lines(spool), workers)
            if self._deep:
                self._statements(_lines(spool), workers)
        self._progress(self._total, self._total)
        return CheckSummary(objects, entries, self._nar_bytes)

    def _narinfos(self, lines: Iterable[_Line], workers: int) -> None:
        narinfos = ((key, size) for key, size, _ in lines if kind_of(key) == "narinfo")
        for look in in_order(self._examined, narinfos, workers):
            self._needed.update(look.keys)
            for finding in look.findings:
                if kind_of(finding.key) not in ("drv", "build"):
                    self._found(finding)
                elif finding.key not in self._told:
                    self._told.add(finding.key)
                    self._found(finding)
            if look.info is not None:
                self._references(look.info)

    def _examined(self, narinfo: tuple[str, int]) -> _Look:
        """All that is to be said about an object but whether what it refers to is there."""
        key, size = narinfo
        look = self._examiner.narinfo(key)
        self._advance(size)
        info = look.info
        if info is None:
            return look
        findings: list[CacheFinding | None] = [*look.findings]
        wanted = f"{info.url} {info.file_hash} {info.file_size} {info.nar_hash} {info.nar_size}"
        with self._lock:
            known = wanted in self._sound
        if not known:
            wrong = self._examiner.nar(info, deep=self._deep)
            findings.append(wrong)
            if wrong is None:
                with self._lock:
                    self._sound.update((wanted,))
        findings += [self._examiner.derivation(info), self._examiner.build_record(info)]
        return _Look(info, tuple(each for each in findings if each is not None), look.keys)

    def _references(self, info: NarInfo) -> None:
        for reference in info.references:
            key = narinfo_key(reference)
            if key in self._there or key in self._told:
                continue
            if self._backend.head(key) is None:
                self._told.add(key)
                self._found(CacheFinding(key, reference, "missing-reference", f"{info.path} refers to it"))

    def _orphans(self, lines: Iterable[_Line], workers: int) -> None:
        def unneeded() -> Iterator[str]:
            for key, _, old in lines:
                if old and kind_of(key) != "narinfo" and claim_of(key) not in self._needed:
                    yield key

        for entry in in_order(self._backend.head, unneeded(), workers):
            if entry is not None:
                self._found(CacheFinding(entry.key, None, "orphan", f"no narinfo needs its {entry.size} bytes"))

    def _statements(self, lines: Iterable[_Line], workers: int) -> None:
        keys = (key for key, _, _ in lines if kind_of(key) == "attest")
        for finding in in_order(self._examiner.statement, keys, workers):
            if finding is not None:
                self._found(finding)

    def _arrived(self, size: int) -> None:
        with self._lock:
            self._nar_bytes += size
        self._advance(size)

    def _advance(self, size: int) -> None:
        with self._lock:
            self._done = min(self._done + size, self._total)
            self._progress(self._done, self._total)


_Line = tuple[str, int, bool]
"""An entry that was listed: key, size in bytes, whether it is older than what a push may be writing."""


def _lines(spool: IO[str]) -> Iterator[_Line]:
    spool.seek(0)
    for line in spool:
        key, size, old = line.split(" ")
        yield key, int(size), old == "1\n"


# --- mending ----------------------------------------------------------------------------------------------------------


class _Repair:
    """One repair."""

    def __init__(self, cache: CacheWriter, source: ObjectSource) -> None:
        self._cache = cache
        self._access = cache.access
        self._backend = self._access.backend
        self._source = source
        self._examiner = _Examiner(cache.reader)

    def run(self, findings: Iterable[CacheFinding]) -> Iterator[RepairResult]:
        useless: dict[str, NarInfo] = {}  # damaged NARs whose narinfos had to go
        for finding in findings:
            if finding.kind == "untrusted":
                yield RepairResult(finding, "left", "keys that are not trusted here have signed it")
            elif finding.kind == "foreign":
                yield RepairResult(finding, "left", "others can read it")
            elif finding.kind == "orphan":
                yield RepairResult(finding, "left", "collecting garbage removes it when it is old")
            else:
                yield self._mended(finding, useless)
        for url, info in useless.items():
            self._remove_nar(url, info)

    def _mended(self, finding: CacheFinding, useless: dict[str, NarInfo]) -> RepairResult:
        if self._again(finding, deep=True) is None:
            return RepairResult(finding, "sound", "it has been mended or removed since")
        held = None if finding.path is None else self._source(finding.path)
        if held is not None:
            pushed = self._pushed(finding, held)
            if pushed is not None:
                return pushed
        if finding.kind == "missing-reference":
            return RepairResult(finding, "left", "there is no valid copy of it here")
        return self._removed(finding, useless)

    def _again(self, finding: CacheFinding, *, deep: bool) -> CacheFinding | None:
        """The same finding, if it holds still; without `deep`, what needs a NAR to be read is believed."""
        if finding.kind == "missing-reference":
            return finding if self._backend.head(finding.key) is None else None
        if kind_of(finding.key) == "attest":
            return self._examiner.statement(finding.key)
        if kind_of(finding.key) == "narinfo" and finding.kind == "damaged":
            found = self._examiner.narinfo(finding.key).findings
            return next((each for each in found if each.kind == "damaged"), None)
        info = self._info(finding)
        if info is None:
            return None
        if finding.kind == "missing-nar":
            return self._examiner.nar(info, deep=False)
        if finding.kind == "damaged-nar":
            if info.url != finding.key:
                return None
            return self._examiner.nar(info, deep=True) if deep else finding
        record = self._examiner.derivation(info) if kind_of(finding.key) == "drv" else self._examiner.build_record(info)
        return record if record is not None and record.kind == "damaged" else None

    def _info(self, finding: CacheFinding) -> NarInfo | None:
        return None if finding.path is None else self._examiner.narinfo(narinfo_key(finding.path)).info

    def _pushed(self, finding: CacheFinding, held: HeldObject) -> RepairResult | None:
        """Push the object anew; None when it is not valid where it was said to be."""
        if finding.kind == "damaged-nar":
            self._access.wrong_nars.add(finding.key)
        elif kind_of(finding.key) in ("drv", "build"):
            self._backend.delete([finding.key])  # records are written only where there is none

        def push() -> PushOutcome:
            return self._cache.push(held.info, held.tree, derivation=held.derivation, log=held.log, mend=True).kept

        try:
            kept = push()
            if kept is PushOutcome.DIFFERENT and finding.kind in ("missing-nar", "damaged-nar"):
                # Another result than ours, which nobody can have any more.
                self._remove(finding, narinfo_key(held.info.path))
                kept = push()
        except (HashMismatch, OSError):
            return None
        if kept is PushOutcome.DIFFERENT:
            return RepairResult(finding, "removed", "the cache keeps another result for this path than the one here")
        return RepairResult(finding, "pushed", f"{held.info.path} was pushed again")

    def _removed(self, finding: CacheFinding, useless: dict[str, NarInfo]) -> RepairResult:
        key = finding.key
        if finding.kind in ("missing-nar", "damaged-nar"):
            assert finding.path is not None
            key = narinfo_key(finding.path)
        info = self._info(finding)
        if not self._remove(finding, key):
            return RepairResult(finding, "sound", "it has been mended or removed since")
        if finding.kind == "damaged-nar" and info is not None:
            useless[info.url] = info
        return RepairResult(
            finding, "removed", f"{key} is gone, for nobody could use it, and there is no valid copy here"
        )

    def _remove(self, finding: CacheFinding, key: str) -> bool:
        """Remove an entry if the finding holds still; whether it did."""
        with self._backend.lock(exclusive=True), announced(self._backend) as notice:
            if self._again(finding, deep=False) is None:
                return False
            notice.check()
            self._backend.delete([key])
        return True

    def _remove_nar(self, url: str, info: NarInfo) -> None:
        """Remove a damaged NAR, so that no push takes it for what it should be, unless it has been written anew."""
        before = self._backend.head(url)
        if before is None or self._examiner.content(info) is None:
            return
        with self._backend.lock(exclusive=True), announced(self._backend) as notice:
            now = self._backend.head(url)
            if now is None:
                return
            # Where reading is use, it has changed the time as well, and only reading again tells.
            if now.mtime == before.mtime or self._examiner.content(info) is not None:
                notice.check()
                self._backend.delete([url])
