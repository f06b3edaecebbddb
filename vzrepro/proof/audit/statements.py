"""A rebuild's signed statement: made, kept beside the store, and given to every cache that can be written."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vzrepro import nar
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import BuildKey, DrvHash, NarHash, ObjectInfo, StorePath
from vzrepro.base.signing import SigningKey
from vzrepro.cache.writer import CacheWriter
from vzrepro.proof.attest.audit import AuditResult, OutputTree, audit_statement
from vzrepro.proof.attest.shelf import Shelf
from vzrepro.proof.attest.statement import Subject as Named
from vzrepro.proof.attest.statement import subjects_of
from vzrepro.proof.audit.axes import Axis
from vzrepro.proof.audit.engine import AuditSubject, observed, seen_in, verdict_of
from vzrepro.proof.audit.observed import Observed
from vzrepro.proof.audit.records import Record
from vzrepro.store import LocalStore


@dataclass(slots=True)
class StatementSigner:
    """Signs whatever came out, equal or not. `builder` describes who and on what; a cache that fails is a warning."""

    store: LocalStore
    key: SigningKey
    builder: Mapping[str, str]
    axes: Mapping[str, Axis]
    caches: Sequence[CacheWriter]
    warn: Callable[[str], None]
    _subjects: dict[StorePath, tuple[Named, ...]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def sign(self, subject: AuditSubject, record: Record) -> str:
        """Sign one rebuild and return the envelope's sha256 in hex. Raises OSError when it cannot be kept here."""
        return self.state(subject.info, seen_in(subject.without), record)

    def state(self, info: ObjectInfo, without: Observed | None, record: Record) -> str:
        """The same for a rebuild of `info`, where `without` is what is seen with nothing varied."""
        asked = record.asked
        rebuilt = None if record.nar_hash is None else OutputTree(NarHash(record.nar_hash), record.nar_size or 0)
        result = AuditResult(
            path=info.path,
            drv_hash=DrvHash(asked.drv_hash),
            build_key=BuildKey(asked.build_key),
            registered=OutputTree(info.nar_hash, info.nar_size),
            rebuilt=rebuilt,
            verdict=verdict_of(record),
            reason=record.reason,
            axes=tuple(asked.axes),
            held=tuple(asked.held),
            together=max(len(asked.axes), 1),
            axis_version=max((*asked.axes.values(), *asked.held.values()), default=1),
            observed=observed(asked.axes, without, record.observed, self.axes),
            started=record.started,
            finished=record.finished,
            milliseconds=record.milliseconds,
            builder=self.builder,
        )
        envelope = audit_statement(result, self._named(info)).signed(self.key)
        Shelf(self.store).put(result.drv_hash, envelope)
        for cache in self.caches:
            if cache.writable:
                try:
                    cache.put_attestation(result.drv_hash, envelope)
                except VzreproError as error:
                    self.warn(f"{cache.url}: a statement was not pushed: {error.message}")
                    cache.access.disable(error)
        return hashlib.sha256(envelope).hexdigest()

    def _named(self, info: ObjectInfo) -> tuple[Named, ...]:
        path = info.path
        with self._lock:
            if self.store.query(path) is None:  # who builds for others need not have it
                return subjects_of(path, info.nar_hash, None)
            if path not in self._subjects:
                tree = self.store.location(path)
                sound = nar.nar_hash(tree)[0] == info.nar_hash
                if not sound:  # what is signed of its files would be believed of those that lie here
                    self.warn(
                        f"{path.base} is corrupt; signed is what came of the rebuild, but its files are not named: "
                        f"vzrepro store repair {path.base}"
                    )
                self._subjects[path] = subjects_of(path, info.nar_hash, tree if sound else None)
            return self._subjects[path]
