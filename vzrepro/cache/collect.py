"""Collecting garbage in a shared cache: what no root keeps and nobody has touched for long goes, while others push.

Nobody is locked out, and places like S3 could not lock anybody out, so safety rests on order, ages and notices:

* A push writes NAR, records, narinfo in this order, and what it relies on instead of writing it is younger than
  FRESH_SECS by then or made young. A NAR that is deleted was last used `older_than_secs + FRESH_SECS` before the
  collection began, so a push that relied on it did so `older_than_secs` before: its narinfo has been there since before
  the listing (no push takes two days), however long the collection takes.
* Narinfos that the listing shows as young are read, and keep what they need and what they refer to, however old
  that is. For not everybody makes young what he relies on: a Nix client leaves a NAR as old as it finds it, and
  reading makes a directory's narinfos young, not their NARs.
* Narinfos go before all NARs and records, and a NAR only after the listing has ended: whatever narinfo could name it
  is gone, or was read, or is new and therefore keeps the NAR young. No reader and no crash ever sees a narinfo whose
  NAR this has taken; what a crash leaves are NARs that nothing names, and the next collection takes those.
* Before each batch a notice is written (`notice`); then the roots are read anew and every age is asked for again.
  Who adds a root, or makes an old entry young, looks for notices afterwards, so either this sees the root or the new
  age, or they wait for the batch to end and see what is gone.

Two collections at once do no harm for the same reasons: neither deletes what the other one must keep, since both
decide by roots and ages alone.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, Literal, Protocol, runtime_checkable

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import StorePath
from vzrepro.cache.backend import CACHE_INFO, FRESH_SECS, PROBED, Backend, Damaged, Entry
from vzrepro.cache.layout import EntryKind, KeySet, Needs, claim_of, kind_of, needs_of, number_of, read_entry
from vzrepro.cache.narinfo import MAX_SIZE
from vzrepro.cache.notice import NOTICE_SECS, NOTICES, announced
from vzrepro.cache.parallel import WORKERS, in_order
from vzrepro.cache.roots import ROOTS, CacheRoot, read_roots

_BATCH = 500  # entries that are looked at again and deleted under one notice

CollectionProgress = Callable[[Literal["mark", "list", "delete"], int], object]
"""What is being done, and to how many narinfos or entries it has been done so far."""


def _quiet(*_anything: object) -> None:
    return


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of entries or objects, and their bytes in the cache."""

    count: int = 0
    size: int = 0

    def plus(self, size: int) -> Amount:
        """With one more, of `size` bytes."""
        return Amount(self.count + 1, self.size + size)


@dataclass(frozen=True, slots=True)
class CollectionResult:
    """What a collection kept and deleted (with `dry_run`: what it would have deleted).

    `roots` are the objects that each root keeps, shared ones under each, and `kept` those of all roots, each once;
    their bytes are those of narinfos and NARs as the narinfos tell them. `missing` are paths that a root should keep
    and the cache lacks. `narinfos`, `nars` and `records` are what was deleted; `young` are entries that no root keeps
    and that stay because they, or what needs them, are too young. `foreign` counts entries that are not ours to delete.
    """

    dry_run: bool
    roots: dict[str, Amount]
    kept: Amount
    missing: tuple[StorePath, ...]
    narinfos: Amount
    nars: Amount
    records: Amount
    young: Amount
    foreign: int
    uploads: int | None

    @property
    def deleted(self) -> Amount:
        """All entries that were deleted."""
        parts = (self.narinfos, self.nars, self.records)
        return Amount(sum(part.count for part in parts), sum(part.size for part in parts))


@runtime_checkable
class Uploads(Protocol):
    """A backend whose uploads, broken off, leave something behind that no listing shows."""

    def abort_stale_uploads(self, older_than_secs: float) -> int:
        """Remove what is left of uploads that began longer ago than that; how many there were. Raises RemoteError."""


def collect(
    backend: Backend,
    *,
    older_than_secs: float,
    keep_roots: bool = True,
    dry_run: bool = False,
    progress: CollectionProgress = _quiet,
    fresh_secs: float = FRESH_SECS,
    workers: int = WORKERS,
) -> CollectionResult:
    """Delete the objects that no root keeps and that are older than `older_than_secs`; safe beside pushes and others
    that do the same.

    NARs and records that no narinfo needs any more go when they are `fresh_secs` older than that. Ages are those of
    `Entry.mtime`. Without `keep_roots`, roots keep nothing. Memory is bounded by the number of objects that are kept,
    about 700 bytes for each, and the place is listed once.

    Raises UsageError when `older_than_secs` is less than twice `fresh_secs` (which is for tests; it must not be lowered
    where anybody pushes), or when there are no roots to keep anything; Damaged when a root or the narinfo of an object
    that a root keeps cannot be read, because what it keeps is then unknown; RemoteError when the place fails, or is so
    slow that a batch cannot be deleted safely. Whenever it ends, what is left is whole.
    """
    if older_than_secs < 2 * fresh_secs:
        raise UsageError(
            f"{older_than_secs:.0f} s is too young for garbage",
            reason="an upload may be under way for that long",
            hint=f"say at least {2 * fresh_secs / 3600:.0f}h",
        )
    work = _Collection(backend, older_than_secs, keep_roots, dry_run, progress, fresh_secs, workers)
    return work.run()


@dataclass(slots=True)
class _Graph:
    """What is reachable, as numbers: memory counts here. Objects are numbered in the order in which they were found."""

    numbers: dict[str, int] = field(default_factory=dict)  # hash part → number
    starts: array[int] = field(default_factory=lambda: array("L"))  # number → where its references begin in `edges`
    edges: array[int] = field(default_factory=lambda: array("L"))
    narinfo_sizes: array[int] = field(default_factory=lambda: array("L"))  # 0: the cache lacks it
    nar_sizes: array[int] = field(default_factory=lambda: array("Q"))
    nars: array[int] = field(default_factory=lambda: array("Q"))  # `number_of` its NAR's key

    def numbered(self, hash_part: str) -> tuple[int, bool]:
        """The object's number, and whether it is new."""
        new = len(self.numbers)
        number = self.numbers.setdefault(hash_part, new)
        return number, number == new

    def add(self, needs: Needs | None, references: Iterable[int]) -> None:
        """What was found about the next object; called once for each, in the order of their numbers."""
        self.starts.append(len(self.edges))
        self.edges.extend(references)
        self.narinfo_sizes.append(0 if needs is None else needs.narinfo_size)
        self.nar_sizes.append(0 if needs is None else needs.nar_size)
        self.nars.append(0 if needs is None else number_of(needs.url))

    def amount(self, starts: Collection[int]) -> Amount:
        """The objects in the closure of `starts`; a NAR that several share counts once."""
        seen = bytearray(len(self.starts))
        nars: set[int] = set()
        count = size = 0
        waiting = list(starts)
        while waiting:
            number = waiting.pop()
            if seen[number]:
                continue
            seen[number] = 1
            end = self.starts[number + 1] if number + 1 < len(self.starts) else len(self.edges)
            waiting += self.edges[self.starts[number] : end]
            if self.narinfo_sizes[number]:
                count += 1
                size += self.narinfo_sizes[number]
                if self.nars[number] not in nars:
                    nars.add(self.nars[number])
                    size += self.nar_sizes[number]
        return Amount(count, size)


class _Spool:
    """Entries waiting in a temporary file until the listing has ended."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.count = 0

    def add(self, entry: Entry) -> None:
        self._file.write(f"{entry.key} {entry.size}\n")
        self.count += 1

    def __iter__(self) -> Iterator[Entry]:
        """What was added; when it was last used has to be asked for again, so that is not kept."""
        self._file.seek(0)
        for line in self._file:
            key, size = line.split(" ")
            yield Entry(key, int(size), 0.0)


class _Collection:
    """One collection."""

    def __init__(
        self,
        backend: Backend,
        older_than_secs: float,
        keep_roots: bool,
        dry_run: bool,
        progress: CollectionProgress,
        fresh_secs: float,
        workers: int,
    ) -> None:
        self._backend = backend
        self._older_than_secs = older_than_secs
        self._keep_roots = keep_roots
        self._dry_run = dry_run
        self._progress = progress
        self._workers = workers
        self._started = backend.now()
        self._old = self._started - older_than_secs  # last used before: an old narinfo
        self._stale = self._old - fresh_secs  # last used before: an old NAR or record
        self._graph = _Graph()
        self._live = KeySet()
        self._roots: dict[str, tuple[int, ...]] = {}
        self._missing: dict[str, StorePath] = {}
        self._kept = 0  # of what is in `_graph`, what roots keep
        self._report = CollectionResult(dry_run, {}, Amount(), (), Amount(), Amount(), Amount(), Amount(), 0, None)

    def run(self) -> CollectionResult:
        roots = read_roots(self._backend, workers=self._workers) if self._keep_roots else []
        if self._keep_roots and not roots:
            raise UsageError(
                f"{self._backend.url} has no roots",
                reason=f"everything older than {self._older_than_secs / 86400:.3g} days would go",
                hint="add a root (vzrepro cache root add), or say --ignore-roots",
            )
        self._keep(roots)
        with (
            tempfile.TemporaryFile("w+", prefix="vzrepro-") as narinfos,
            tempfile.TemporaryFile("w+", prefix="vzrepro-") as others,
            tempfile.TemporaryFile("w+", prefix="vzrepro-") as young,
        ):
            self._sweep(_Spool(narinfos), _Spool(others), _Spool(young))
        everything = {number for numbers in self._roots.values() for number in numbers}
        return replace(
            self._report,
            roots={name: self._graph.amount(numbers) for name, numbers in sorted(self._roots.items())},
            kept=self._graph.amount(everything),
            missing=tuple(sorted(self._missing.values())),
            uploads=None if self._dry_run else self._aborted(),
        )

    def _aborted(self) -> int | None:
        if not isinstance(self._backend, Uploads):
            return None
        try:
            return self._backend.abort_stale_uploads(self._older_than_secs)
        except RemoteError:
            return None  # some servers cannot list them; what was collected is collected all the same

    # --- marking ------------------------------------------------------------------------------------------------------

    def _keep(self, roots: Iterable[CacheRoot]) -> None:
        """Mark what these roots keep."""
        for root in roots:
            self._mark(((path.hash_part, path) for path in root.paths), rooted=True)
            self._roots[root.name] = tuple(self._graph.numbers[path.hash_part] for path in root.paths)

    def _mark(self, found: Iterable[tuple[str, StorePath | None]], *, rooted: bool) -> None:
        """Mark these objects and all they refer to, so that their entries are in `_live`."""
        level: list[tuple[str, StorePath | None]] = []

        def number(hash_part: str, path: StorePath | None) -> int:
            number, new = self._graph.numbered(hash_part)
            if new:
                level.append((hash_part, path))
            return number

        for each in found:
            number(*each)
        while level:
            reading, level = level, []
            answers = in_order(lambda each: self._read(each[0], rooted), reading, self._workers)
            for (hash_part, path), needs in zip(reading, answers, strict=True):
                if needs is None and rooted and path is not None:
                    self._missing[hash_part] = path
                self._graph.add(needs, [number(each.hash_part, each) for each in needs.references] if needs else ())
                # Also of what is missing: whoever is about to write it may rely on that.
                self._live.update((f"{hash_part}.narinfo", *(needs.keys if needs else ())))
                self._progress("mark", len(self._graph.starts))

    def _read(self, hash_part: str, rooted: bool) -> Needs | None:
        key = f"{hash_part}.narinfo"
        try:
            data = read_entry(self._backend, key, MAX_SIZE)
        except Damaged:
            data = b""
        needs = None if data is None else needs_of(data, hash_part)
        if data is not None and needs is None and rooted:
            raise Damaged(
                f"{key} in {self._backend.url} is damaged, and a root keeps it",
                reason="what it refers to is not known, so nothing can be deleted safely",
                hint="vzrepro cache verify --repair",
            )
        return needs

    # --- sweeping -----------------------------------------------------------------------------------------------------

    def _sweep(self, narinfos: _Spool, others: _Spool, young: _Spool) -> None:
        notices = self._list(narinfos, others, young)
        if narinfos.count or others.count:
            self._mark(((_hash_part(entry.key), None) for entry in young), rooted=False)
        survivors: list[str] = []
        for batch in _batches(narinfos):
            survivors += self._delete(batch, self._old)
            if len(survivors) >= _BATCH:
                self._mark(((hash_part, None) for hash_part in survivors), rooted=False)
                survivors.clear()
        self._mark(((hash_part, None) for hash_part in survivors), rooted=False)
        for batch in _batches(others):
            self._delete(batch, self._stale)
        if notices and not self._dry_run:
            self._backend.delete(notices)

    def _list(self, narinfos: _Spool, others: _Spool, young: _Spool) -> list[str]:
        """Tell apart what there is; returns what crashed collections have left of their notices."""
        notices: list[str] = []
        report = self._report
        for number, entry in enumerate(self._backend.list(), 1):
            self._progress("list", number)
            kind = kind_of(entry.key)
            if kind is None:
                if entry.key.startswith(NOTICES):
                    notices += [entry.key] if entry.mtime < self._started - NOTICE_SECS else []
                elif not entry.key.startswith(ROOTS) and entry.key not in (CACHE_INFO, PROBED):
                    report = replace(report, foreign=report.foreign + 1)
            elif claim_of(entry.key) in self._live:
                pass
            elif entry.mtime < (self._old if kind == "narinfo" else self._stale):
                (narinfos if kind == "narinfo" else others).add(entry)
            else:
                report = replace(report, young=report.young.plus(entry.size))
                if kind == "narinfo":
                    young.add(entry)
        self._report = report
        return notices

    def _delete(self, batch: list[Entry], before: float) -> list[str]:
        """Delete what of the batch is still nobody's and last used before this time; returns the hash parts of the
        narinfos among it that others have used or written meanwhile."""
        if self._dry_run:
            self._count(batch, {entry.key for entry in batch if claim_of(entry.key) not in self._live})
            return []
        # Roots that were added meanwhile may keep much: they are read before the notice, under which time is short.
        self._roots_anew()
        with self._backend.lock(exclusive=True), announced(self._backend) as notice:
            self._roots_anew()
            asked = [entry.key for entry in batch if claim_of(entry.key) not in self._live]
            found = [entry for entry in in_order(self._backend.head, asked, self._workers) if entry is not None]
            gone = {entry.key for entry in found if entry.mtime < before}
            if gone:
                notice.check()
                self._backend.delete(sorted(gone))
        self._count(batch, gone)
        stay = (entry.key for entry in found if entry.key not in gone and kind_of(entry.key) == "narinfo")
        return [_hash_part(key) for key in stay]

    def _roots_anew(self) -> None:
        if self._keep_roots:
            self._keep(read_roots(self._backend, workers=self._workers))

    def _count(self, batch: list[Entry], gone: set[str]) -> None:
        amounts = {"narinfo": self._report.narinfos, "nar": self._report.nars, "record": self._report.records}
        young = self._report.young
        for entry in batch:
            if entry.key in gone:
                kind = _counted_as(kind_of(entry.key))
                amounts[kind] = amounts[kind].plus(entry.size)
            else:
                young = young.plus(entry.size)
        self._report = replace(
            self._report, narinfos=amounts["narinfo"], nars=amounts["nar"], records=amounts["record"], young=young
        )
        self._progress("delete", self._report.deleted.count)


def _counted_as(kind: EntryKind | None) -> str:
    return kind if kind in ("narinfo", "nar") else "record"


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    for entry in entries:
        batch.append(entry)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _hash_part(key: str) -> str:
    return key.removesuffix(".narinfo")
