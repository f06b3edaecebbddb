"""What the world is like: the objects that are here, what caches offer, and which of them do not count.

It answers the questions of planning (`plan.PlanningFacts`). What a run learns to doubt is kept in one map, and
`counts` alone says what a doubt means.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from vzrepro.base.model import BuildKey, FileHash, ObjectInfo, StorePath
from vzrepro.cache.narinfo import NarInfo
from vzrepro.cache.reader import CacheReader
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import MADE, Offer, objection
from vzrepro.store import LocalStore

_LOOK_UPS = 16
"""Questions to caches that are under way at once."""

_TELLING_SECS = 10.0
"""What takes less by the reference tells of the container engine, not of the machine's speed."""

Substitute = Literal["all", "sources", "none"]
"""What may come from caches: everything · downloads only, so that all else is built · nothing."""


class Doubt(enum.Flag):
    """Why an object does not count; several reasons may hold at once."""

    NONE = 0
    LOST = enum.auto()
    """Who offered it did not give it: a cache, or the store, where the copy of it was another one."""
    CORRUPT = enum.auto()
    """It is damaged here, and is to be repaired."""
    DISTRUSTED = enum.auto()
    """It was taken on the word of a key that is revoked since."""
    TAINTED = enum.auto()
    """It was made here from what is distrusted."""


class Counts(NamedTuple):
    """As what an object counts: as one that is here, as a cache's offer, as the equal of another (early cutoff)."""

    here: bool
    offered: bool
    equal: bool


def counts(doubt: Doubt) -> Counts:
    """What a doubt leaves of an object. One that does not count as here is replaced when it is made again."""
    return Counts(
        here=not doubt & (Doubt.CORRUPT | Doubt.DISTRUSTED | Doubt.TAINTED),
        # What is tainted is wherever it was pushed, too; only the same inputs, byte for byte, make it good again.
        offered=not doubt & (Doubt.LOST | Doubt.TAINTED),
        # So what is tainted serves as an equal: its inputs are those of the build key, and they have been made again.
        equal=not doubt & (Doubt.LOST | Doubt.CORRUPT | Doubt.DISTRUSTED),
    )


@dataclass(slots=True)
class Inventory:
    """What a store has and `caches` offer, as far as `substitute` lets them. `stop` is set when asking them fails.

    `reference` is how long builds and images take on another machine, in seconds by target, for those that this one has
    not built yet.
    """

    store: LocalStore
    caches: Sequence[CacheReader]
    substitute: Substitute = "all"
    stop: threading.Event = field(default_factory=threading.Event)
    reference: Mapping[str, float] = field(default_factory=dict)
    _scale: float | None = None
    _doubts: dict[StorePath, Doubt] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    # --- what does not count

    def doubt(self, paths: Iterable[StorePath], why: Doubt) -> None:
        """Let these objects not count any more, for one reason more than until now."""
        with self._lock:
            for path in paths:
                self._doubts[path] = self.doubts(path) | why

    def doubts(self, path: StorePath) -> Doubt:
        """All that is held against an object."""
        return self._doubts.get(path, Doubt.NONE)

    def doubted(self, why: Doubt) -> list[StorePath]:
        """The objects against which one of these reasons is held."""
        return [path for path, doubt in list(self._doubts.items()) if doubt & why]

    def keep(self, tree: Path, info: ObjectInfo) -> ObjectInfo:
        """Register what was made (`LocalStore.add`), in the place of the one that did not count, if there is one."""
        doubt = self.doubts(info.path)
        if counts(doubt).here:
            return self.store.add(tree, info)
        kept = self.store.replace(tree, info, distrusted=Doubt.CORRUPT not in doubt)
        with self._lock:
            # What a cache did not give it will not give the next time.
            self._doubts[info.path] &= Doubt.LOST
        return kept

    # --- what planning asks

    def have(self, paths: Sequence[StorePath]) -> dict[StorePath, ObjectInfo]:
        """The valid local objects (see `plan.PlanningFacts`); what is to be replaced counts as absent until it is."""
        return self.store.query_many(path for path in paths if counts(self.doubts(path)).here)

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        """Whether the object was verified from these URLs."""
        return self.store.known_origin(path, origin)

    def offers(self, nodes: Sequence[Node]) -> dict[StorePath, Offer]:
        """The first trusted cache's offer for each node, asked for in parallel."""
        asked = [node for node in nodes if self._may_substitute(node) and counts(self.doubts(node.path)).offered]
        if len(asked) <= 1:
            found = list(map(self._offer, asked))
        else:
            with ThreadPoolExecutor(min(_LOOK_UPS, len(asked)), thread_name_prefix="look-up") as pool:
                try:
                    found = list(pool.map(self._offer, asked))
                except BaseException:
                    self.stop.set()  # leaving the pool waits for those who ask
                    raise
        return {node.path: offer for node, offer in zip(asked, found, strict=True) if offer is not None}

    def _may_substitute(self, node: Node) -> bool:
        return self.substitute == "all" or (self.substitute == "sources" and node.drv.builder == "fetch")

    def _offer(self, node: Node) -> Offer | None:
        found = next(self.in_caches(node), None)
        if found is None:
            return None
        cache, info = found
        return Offer(info.file_size or info.nar_size, info.origin, cache.url)

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        """A valid local object of the same build key."""
        equal = self.store.by_build_key(key)
        return None if equal is None or not counts(self.doubts(equal.path)).equal else equal

    def expected_secs(self, target: str, verb: str) -> float | None:
        """The median of the last times; where there are none, the reference, as long as this machine takes for it."""
        known = self.store.expected_secs(target, verb)
        if known is None and verb in MADE and target in self.reference:
            return self.reference[target] * self._slowness()
        return known

    def _slowness(self) -> float:
        """How many times as long as by the reference the builds took that this machine has made: all of them together,
        1 as long as there are none."""
        if self._scale is None:
            own, reference = 0.0, 0.0
            for target, secs in self.reference.items():
                known = [self.store.expected_secs(target, verb) for verb in MADE] if secs >= _TELLING_SECS else []
                for each in known:
                    if each is not None:
                        own, reference = own + each, reference + secs
            self._scale = own / reference if reference else 1.0
        return self._scale

    # --- what taking from caches asks

    def in_caches(self, node: Node) -> Iterator[tuple[CacheReader, NarInfo]]:
        """The caches that have an object which can be taken for `node` (`plan.objection`), each with what it says of
        it, in their order; asked one after the other."""
        for cache in self.caches:
            info = cache.query(node.path)
            if info is not None and objection(node, info.origin, cache.url) is None:
                yield cache, info

    def by_content(self, node: Node) -> Iterator[tuple[CacheReader, NarInfo]]:
        """The same for a download whose places cannot be asked: caches that have it from wherever, since it is pinned
        to its hash and trusted keys vouch for it."""
        if self._may_substitute(node) and counts(self.doubts(node.path)).offered:
            for cache in self.caches:
                info = cache.query(node.path)
                if info is not None:
                    yield cache, info

    def equal_in_caches(self, key: BuildKey) -> Iterator[tuple[CacheReader, NarInfo]]:
        """The same for objects of a build key, if everything may come from caches."""
        for cache in self.caches if self.substitute == "all" else ():
            record = cache.by_build_key(key)
            info = cache.query(record.path) if record is not None else None
            # The narinfo must say so itself: the object's voucher stands for this, too.
            if record is not None and info is not None and (info.nar_hash, info.build_key) == (record.nar_hash, key):
                yield cache, info
