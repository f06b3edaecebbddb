"""A machine of the campaigns: its store, a cache that it shares, and the commands that it runs on a small workspace.

Everything is real but the sandbox (`tests.labs`). Commands are functions without arguments, to be run by a process of
their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tests.campaigns.frame import Lost, Wrong
from tests.labs import RUNTIME, grinds, played, realizer, small_graph, small_sources
from vzrepro.base.model import Derivation, NarHash, ObjectInfo, StorePath
from vzrepro.cache import Backend, CacheReader, CacheWriter, DirectoryBackend, SigningKey, TrustedKeys
from vzrepro.cache import check as checking
from vzrepro.cache.check import CacheFinding, HeldObject
from vzrepro.cache.collect import collect
from vzrepro.cache.roots import add_root
from vzrepro.proof.attest.witness import pushed_along
from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.engine import Audit, Request
from vzrepro.proof.audit.model import Verdict
from vzrepro.proof.audit.rebuild import Rebuilder
from vzrepro.proof.audit.records import Records
from vzrepro.realize.realizer import Realizer
from vzrepro.realize.transfer import Pusher
from vzrepro.recipe.graph import DrvGraph
from vzrepro.store import LocalStore

KEY = SigningKey.generate("mill-1")
HARMLESS = frozenset({"orphan", "untrusted", "foreign"})
ROOT = "release"
EVERY = ("notes", "archive", "left", "right", "whole")
KEPT = ("left", "right", "whole")
"""What `whole` refers to, and itself: what a root of it keeps."""

_known: dict[str, NarHash] = {}


@dataclass
class Mill:
    """`store` and `cache` are directories; `backend` opens another place instead of the cache's directory."""

    store: Path
    cache: Path
    sources: Path
    backend: Callable[[], Backend] | None = None
    trusted: TrustedKeys = field(default_factory=lambda: TrustedKeys([KEY.public]))

    @classmethod
    def at(cls, place: Path) -> Mill:
        """All of it below one directory."""
        return cls(place / "store", place / "cache", place / "sources")

    @cached_property
    def graph(self) -> DrvGraph:
        small_sources(self.sources)
        return small_graph(self.sources)

    def path(self, name: str) -> StorePath:
        return self.graph.targets[name].path

    def reader(self) -> CacheReader:
        return CacheReader(self.backend() if self.backend else DirectoryBackend(self.cache), self.trusted)

    def writer(self) -> CacheWriter:
        return CacheWriter(self.reader(), KEY)

    def realizer(self, store: LocalStore, *, taking: bool = False, giving: bool = False) -> Realizer:
        caches = [self.reader()] if taking else []
        return realizer(self.graph, store, caches, [self.writer()] if giving else [])

    # --- commands

    def realize(self, *, giving: bool = True) -> None:
        with played(grinds), LocalStore(self.store) as store:
            self.realizer(store, giving=giving).realize([self.graph.find("whole")])

    def root(self) -> None:
        with LocalStore(self.store) as store:
            store.add_root(self.store.with_name(f"{self.store.name}-result"), self.path("whole"))

    def push(self) -> None:
        with LocalStore(self.store) as store:
            store.sweep()
            infos = store.objects()
            store.hold([info.path for info in infos])
            realizer = self.realizer(store)
            pusher = Pusher(store, realizer.report, realizer.stop, lambda info: pushed_along(store, info))
            pusher.push_all(self.writer(), infos, 4)

    def pull(self) -> None:
        with LocalStore(self.store) as store:
            self.realizer(store, taking=True).pull([self.graph.find("whole")])

    def gc(self) -> None:
        """Of the store and, whatever age entries have, of the cache."""
        with LocalStore(self.store) as store:
            store.gc()
        collect(self.reader().access.backend, older_than_secs=0, fresh_secs=0)

    def repair(self) -> None:
        """As `store repair` and `cache verify --deep --repair`."""
        with played(grinds), LocalStore(self.store) as store:
            store.sweep()
            found = store.verify()
            paths = [each.path for each in found if each.kind in ("corrupt", "missing") and each.path is not None]
            if paths:
                self.realizer(store).repair(paths)
            writer = self.writer()
            damage: list[CacheFinding] = []
            checking.verify(writer.reader, deep=True, found=damage.append)
            for _ in checking.repair(writer, damage, lambda path: self._held(store, path)):
                pass

    def audit(self) -> None:
        axes = tuple(axis for axis in AXES if axis.name in ("host-name", "umask"))
        with played(grinds), LocalStore(self.store) as store:
            tools = self.store.with_name("tools")
            tools.mkdir(exist_ok=True)
            outcome = Audit(
                Request((self.graph.find("whole"),), axes),
                Rebuilder(self.realizer(store), World(RUNTIME, tools, 1, None), {axis.name: axis for axis in axes}),
                Records(store.private / "audit", print),
                "0123456789abcdef",
                lambda *_: None,
                lambda *_: "0" * 64,
            ).run()
            if outcome.error is not None:
                raise outcome.error
            for subject in outcome.subjects:
                if subject.judgement is None:
                    raise Wrong(f"{subject.node.target} was not judged")
                for name, finding in subject.judgement.findings.items():
                    if finding.verdict is not Verdict.REPRODUCED:
                        raise Wrong(f"{subject.node.target}: {name} is {finding.verdict.value}")

    # --- what is prepared, and what must hold

    def junk(self, count: int = 3) -> None:
        """Have objects that nothing keeps, in the store and in the cache."""
        with LocalStore(self.store) as store:
            writer = self.writer()
            for number in range(count):
                info = self._other(store, f"junk{number}")
                writer.push(info, store.location(info.path))

    def _other(self, store: LocalStore, name: str) -> ObjectInfo:
        from tests.labs import node
        from vzrepro import nar

        made = node(name, Derivation(name, "local"))
        with store.scratch(name) as scratch:
            (scratch / "made").write_bytes(name.encode() * 10_000)
            nar_hash, size, _ = nar.canonical_copy(scratch / "made", scratch / "tree")
            return store.add(scratch / "tree", ObjectInfo(made.path, nar_hash, size, drv_hash=made.drv_hash))

    def keep_in_cache(self) -> None:
        add_root(self.reader().access.backend, ROOT, [self.path("whole")])

    def damage(self) -> None:
        """Change a byte of an object in the store, and one of a NAR in the cache; lose a narinfo."""
        with LocalStore(self.store) as store:
            file = store.location(self.path("left")) / "bin" / "tool"
        _flip(file)
        reader = self.reader()
        found = reader.ask(self.path("right"))
        assert found is not None
        _flip(self.cache / found.url)

    def learn(self) -> None:
        """Remember what objects hold, when nothing was ever interrupted."""
        with LocalStore(self.store) as store:
            _known.update({name: store.query_many([self.path(name)])[self.path(name)].nar_hash for name in EVERY})

    def judge_store(self, kept: tuple[str, ...] = (), *, corrupt: tuple[str, ...] = ()) -> None:
        """Raise Lost unless `kept` are there, and Wrong when anything is there that is not what it should be; but
        `corrupt` may be. Nothing is left over."""
        with LocalStore(self.store) as store:
            store.sweep()
            for finding in store.verify():
                if not (finding.kind == "corrupt" and finding.path in [self.path(name) for name in corrupt]):
                    raise Wrong(f"in the store: {finding}")
            infos = {info.path: info for info in store.objects()}
            for name in kept:
                if self.path(name) not in infos:
                    raise Lost(f"{name} is not in the store any more")
            for name in EVERY:
                if (info := infos.get(self.path(name))) is not None and info.nar_hash != _known[name]:
                    raise Wrong(f"{name} holds {info.nar_hash.nix}")
            for folder in ("tmp", "lock"):
                place = store.private / folder
                if place.is_dir() and (left := [path.name for path in place.iterdir() if not _own(path)]):
                    raise Wrong(f"left in {folder}: {left}")

    def judge_cache(self, kept: tuple[str, ...] = (), *, damaged: bool = False) -> None:
        """As `judge_store`, of the cache: every entry that is there is right, all bytes are read."""
        reader = self.reader()
        found: list[CacheFinding] = []
        checking.verify(reader, deep=True, found=found.append)
        if not damaged and (bad := [each for each in found if each.kind not in HARMLESS]):
            raise Wrong(f"in the cache: {bad}")
        for name in kept:
            info = reader.ask(self.path(name))
            if info is None:
                raise Lost(f"{name} is not in the cache any more")
            if info.nar_hash != _known[name]:
                raise Wrong(f"{name} is offered as {info.nar_hash.nix}")

    def _held(self, store: LocalStore, path: StorePath) -> HeldObject | None:
        info = store.query(path)
        if info is None or store.verify([path]):
            return None
        drv = None if info.drv_hash is None else store.derivation(info.drv_hash)
        log = store.log_path(path)
        return HeldObject(info, store.location(path), drv, log if log.is_file() else None)


def _own(path: Path) -> bool:
    """Whether this is the mark of the process that looks."""
    return path.name.startswith("process-")


def _flip(file: Path) -> None:
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    file.chmod(0o555)
