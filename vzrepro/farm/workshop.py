"""A worker's side: one derivation is built from what the shared cache has, and goes there, signed.

Nothing is believed of who orders. The derivation is what its hash says; downloads and local files are what the
derivation pins, so it does not matter who pushed them; everything else is taken only if keys that this worker trusts
have signed it; and all of that together must give the order's build key.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from vzrepro.base import events
from vzrepro.base.config import Config
from vzrepro.base.errors import (
    HashMismatch,
    Interrupted,
    NotDeterministic,
    RemoteError,
    Untrusted,
    UsageError,
    VzreproError,
)
from vzrepro.base.model import (
    UNPACK_FORMAT,
    BuildKey,
    Derivation,
    DrvHash,
    ObjectInfo,
    Outcome,
    canonical_json,
    store_path,
)
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.layout import MAX_DERIVATION
from vzrepro.cache.push import PushOutcome
from vzrepro.cache.writer import CacheWriter
from vzrepro.farm.livelog import LiveLog, report_key, whole_key
from vzrepro.farm.order import Order, OrderAnswer
from vzrepro.realize.inventory import Doubt, Inventory
from vzrepro.realize.maker import Maker
from vzrepro.realize.realizer import Realizer
from vzrepro.realize.schedule import Gone
from vzrepro.realize.transfer import ProvenanceSource, Pusher, nothing_stated
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.plan import Step
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import LocalStore

FIXED = ("fetch", "local")
"""The builders whose outputs a derivation pins."""


def given(node: Node) -> Node:
    """The node of what a client gives a worker for a source: of one that is unpacked, the archive, since only that is
    pinned; else the source itself."""
    if "unpack" not in node.drv.env:
        return node
    archive = Derivation(name=node.drv.name, builder="fetch", content=node.drv.content)
    return replace(node, drv=archive, drv_hash=archive.drv_hash(), path=store_path(archive.drv_hash(), archive.name))


def _forget(inventory: Inventory, node: Node, key: BuildKey) -> None:
    """Have the node built, although it or what the same work gave is here or in a cache: only who has built it may say
    what comes out."""
    inventory.substitute = "sources"
    for there in (inventory.store.query(node.path), inventory.store.by_build_key(key)):
        if there is not None:
            inventory.doubt([there.path], Doubt.DISTRUSTED)


@dataclass(slots=True)
class Attempt:
    """One build under way. Setting `stop` ends it; `report` is told of what happens; `phase` says what is being done,
    `stream` and `pieces` how far its live log is (`livelog`)."""

    stop: threading.Event = field(default_factory=threading.Event)
    report: events.Report = events.ignore
    phase: str = "begins"
    log: LiveLog | None = None

    @property
    def beat(self) -> dict[str, object]:
        """What a watcher is told."""
        log = self.log
        return {"phase": self.phase[:200], "stream": log.stream if log else "", "pieces": log.pieces if log else 0}


class AuditRebuild(Protocol):
    """Builds a node again for an audit (`proof.audit.afar.Rebuilding.rebuild`)."""

    def __call__(
        self,
        realizer: Realizer,
        cache: CacheWriter,
        node: Node,
        registered: ObjectInfo,
        question: str,
        *,
        say: Callable[[str], None],
        keep: Callable[[bytes | Path], str],
    ) -> str:
        """Do what the question says with a node whose inputs are in the store. `keep` puts something into the cache and
        returns its sha256; that of the signed report is returned."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Builds one order in `store` with the limits of `config`; `cache` is where inputs come from, as far as `trusted`
    keys vouch for them, and where outputs go, signed with the cache's own signer.

    A cache that has erred is not asked again, so each build has a workshop of its own. `name` is the worker's; with
    `clients`, only what one of these keys has ordered is built. `rebuild` is for the orders of audits.
    """

    name: str
    store: LocalStore
    config: Config
    cache: CacheWriter
    trusted: TrustedKeys
    mirrors: Mirrors
    provenance: ProvenanceSource = nothing_stated
    clients: TrustedKeys | None = None
    platforms: tuple[str, ...] = ()
    rebuild: AuditRebuild | None = None

    def build(self, order: Order, attempt: Attempt) -> OrderAnswer:
        """Build what is ordered, unless it is there; it is in the cache when this returns.

        Raises what the order, its inputs or its build came to: UsageError, Untrusted, HashMismatch, BuildFailed and its
        kin, NotDeterministic when the cache has other bytes, RemoteError for the cache, Interrupted for `attempt.stop`.
        """
        if self.clients is not None:
            order.check_client(self.clients)
        return self._build(order.drv, attempt, order)

    def build_drv(self, drv: DrvHash, attempt: Attempt) -> OrderAnswer:
        """The same for a derivation alone, with the inputs that the cache has for it."""
        return self._build(drv, attempt, None)

    def _build(self, drv: DrvHash, attempt: Attempt, order: Order | None) -> OrderAnswer:
        attempt.phase = "reads the derivation"
        node = self._node(drv, order)
        if node.drv.builder in FIXED:
            raise UsageError(
                f"{node.path.base} is no build", reason="downloads and local files are the client's affair"
            )
        if self.platforms and node.drv.platform not in self.platforms:
            raise UsageError(f"{self.name} does not build for {node.drv.platform}")
        if order is not None and (order.name, order.platform) != (node.drv.name, node.drv.platform):
            raise UsageError("the order has another name or platform than its derivation")
        needed = [self._node(each, None) for each in node.drv.dependencies()]
        graph = DrvGraph(Path(), {}, {each.drv_hash: each for each in (node, *needed)}, (), frozenset())
        with LiveLog(self.cache.access.backend, drv, node.path.name) as log:
            attempt.log = log
            realizer = self._realizer(graph, node, attempt)
            self.store.hold([each.path for each in (node, *needed)])
            inputs: dict[DrvHash, ObjectInfo] = {}
            for each in needed:
                attempt.phase = f"takes {each.path.name}"
                inputs[each.drv_hash] = self._input(realizer, each)
                # Provenance names what a build was made from.
                self.store.put_derivation(each.drv_hash, each.target, canonical_json(each.drv.document()))
            key = node.drv.build_key({each: info.nar_hash for each, info in inputs.items()})
            if order is not None and key != order.key:
                raise Untrusted(
                    "the order's build key is not that of its inputs", reason=f"{self.name} has hashed them"
                )
            if order is not None and order.question is not None:
                return self._rebuilt(realizer, node, order.question, attempt)
            again = order is not None and order.turn > 0
            offered = None if again else self.cache.reader.query(node.path)
            if offered is not None and offered.build_key == key:
                return OrderAnswer(node.path, offered.nar_hash, self.name, Outcome.SUBSTITUTED.value)
            if again:
                _forget(realizer.inventory, node, key)
            try:
                info = self._made(realizer, node, inputs, attempt)
            except VzreproError:
                self._keep_log(node)
                raise
            except ValueError as error:
                # Names of inputs and variables are the derivation's, and what it may not have the sandbox says.
                raise UsageError(f"the derivation of {node.path.base} cannot be built", reason=str(error)) from error
            return OrderAnswer(info.path, info.nar_hash, self.name, info.outcome.value)

    def _made(self, realizer: Realizer, node: Node, inputs: dict[DrvHash, ObjectInfo], attempt: Attempt) -> ObjectInfo:
        attempt.phase = "builds"
        step = Step(node, "image" if node.drv.builder == "image" else "build", "it was ordered")
        info = realizer.perform(step, inputs)
        attempt.phase = "pushes"
        pusher = Pusher(self.store, realizer.report, attempt.stop, self.provenance)
        pushed = pusher.push(self.cache, node.target, info)
        if pushed.kept is PushOutcome.DIFFERENT:
            raise NotDeterministic(
                f"{node.path.base} came out differently on {self.name}",
                reason=f"the cache has NAR {pushed.other and pushed.other.nix}\nbuilt here:   {info.nar_hash.nix}\n"
                f"signed record: {pushed.record}",
                hint="vzrepro cache why-missing tells who has built what; vzrepro audit finds out why it differs",
            )
        return info

    def _rebuilt(self, realizer: Realizer, node: Node, question: str, attempt: Attempt) -> OrderAnswer:
        """For an audit: nothing of it gets into the store, or into the cache under its own name."""
        if self.rebuild is None or node.drv.builder != "sandbox":
            raise UsageError(f"{self.name} does not build {node.path.base} again for audits")
        registered = self.cache.reader.ask(node.path)
        if registered is None:
            raise UsageError(
                f"{self.cache.url} has no {node.path.base} to compare with", hint="realize it on the farm first"
            )

        def say(line: str) -> None:
            if attempt.log is not None:
                attempt.log.line(line)

        def keep(what: bytes | Path) -> str:
            if isinstance(what, bytes):
                sha256 = hashlib.sha256(what).hexdigest()
            else:
                with what.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            self.cache.access.backend.put(report_key(node.drv_hash, node.path.name, sha256), what)
            return sha256

        attempt.phase = "builds"
        info = registered.as_object(registered.render())
        report = self.rebuild(realizer, self.cache, node, info, question, say=say, keep=keep)
        return OrderAnswer(node.path, registered.nar_hash, self.name, "rebuilt", report)

    def _realizer(self, graph: DrvGraph, node: Node, attempt: Attempt) -> Realizer:
        path = str(node.path)

        def report(event: events.Event) -> None:
            if isinstance(event, events.LogLine) and event.path == path and attempt.log is not None:
                attempt.log.line(event.line)
            attempt.report(event)

        inventory = Inventory(self.store, [self.cache.reader], "all", attempt.stop)
        maker = Maker(self.store, self.config, self.mirrors, None, inventory.keep, report, stop=attempt.stop)
        return Realizer(graph, inventory, maker, (), self.trusted)

    # --- what it is made from

    def _node(self, drv: DrvHash, order: Order | None) -> Node:
        """The derivation of this hash, as the cache has it. The hash is that of its bytes, so nobody need vouch."""
        key = f"drv/{drv}.json"
        data = self.store.derivation(drv) or self.cache.access.read(key, MAX_DERIVATION)
        if data is None:
            raise UsageError(
                f"{self.cache.url} has no {key}",
                hint="clients and workers must have the same cache: compare push-to and caches in their configuration",
            )
        if DrvHash.of(data) != drv:
            raise HashMismatch(f"{key} in {self.cache.url} is something else than its name says")
        try:
            derivation = Derivation.parse(data)
            path = store_path(drv, derivation.name)
        except ValueError as error:
            raise UsageError(f"{key} is no derivation that this vzrepro understands") from error
        limits = order or Order(drv, BuildKey(drv.hex), derivation.name, "")
        return Node(
            target=derivation.name,
            kind="image" if derivation.builder == "image" else "source" if derivation.builder in FIXED else "recipe",
            place="the farm",
            version=derivation.version or "",
            drv=derivation,
            drv_hash=drv,
            path=path,
            timeout_secs=limits.longest_secs,
            memory_bytes=limits.memory_bytes,
            disk_bytes=limits.disk_bytes,
        )

    def _input(self, realizer: Realizer, node: Node) -> ObjectInfo:
        """An input, in the store: from there, pinned by its derivation, or on the word of who is trusted here."""
        there = realizer.inventory.have([node.path]).get(node.path)
        if node.drv.builder in FIXED:
            # What a trusted key has unpacked need not be unpacked again.
            ready = there is None and "unpack" in node.drv.env and self.cache.reader.query(node.path) is not None
            if not ready:
                return there or self._adopted(realizer, node)
        offered = self.cache.reader.ask(node.path)
        if there is not None:
            if offered is None or offered.nar_hash == there.nar_hash:
                return there
            # It came out differently here, once: what the cache has is what everybody else builds with.
            realizer.inventory.doubt([node.path], Doubt.DISTRUSTED)
        elif offered is None:
            raise RemoteError(f"{self.cache.url} has no {node.path.base}, which the build needs")
        try:
            return realizer.perform(Step(node, "substitute", "an input"), {})
        except Gone as error:
            raise RemoteError(f"{self.cache.url} did not give {node.path.base}, which the build needs") from error

    def _adopted(self, realizer: Realizer, node: Node) -> ObjectInfo:
        """What the derivation pins, whoever has signed it; what is unpacked is unpacked here."""
        if node.drv.env.get("unpack", str(UNPACK_FORMAT)) != str(UNPACK_FORMAT):
            raise UsageError(f"this vzrepro unpacks {node.path.base} by other rules", hint="update this worker")
        path = given(node).path
        info, _ = self.cache.access.look(path)
        if info is None:
            raise RemoteError(f"{self.cache.url} has no {path.base}, which the client should have pushed")

        def progress(_done: int, _total: int | None) -> None:
            if realizer.stop.is_set():
                raise Interrupted("interrupted")

        with (
            self.store.lock(node.path, f"take {node.target}", lambda _: None, cancelled=realizer.stop),
            self.store.scratch(node.target, stop=realizer.stop) as scratch,
        ):
            there = realizer.inventory.have([node.path]).get(node.path)
            if there is not None:
                return there
            self.cache.reader.fetch(info, scratch / "given", progress)
            return realizer.maker.adopt(node, scratch / "given")

    def _keep_log(self, node: Node) -> None:
        """Have the log of a failed build in the cache."""
        log = self.store.log_path(node.path)
        if log.is_file():
            with contextlib.suppress(RemoteError, OSError):
                self.cache.access.backend.put(whole_key(node.drv_hash, node.path.name, failed=True), log)
