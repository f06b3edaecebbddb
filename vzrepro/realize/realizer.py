"""A run as a whole: plan, execute, and plan again until all is there; take from caches, and push what is new.

The `Inventory` says which objects count, `schedule` when a step is done; the `Maker` makes what is neither here nor
elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vzrepro import sandbox
from vzrepro.base import events
from vzrepro.base.config import Config
from vzrepro.base.errors import HashMismatch, Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.base.model import BuildKey, DrvHash, ObjectInfo, Outcome, StorePath, canonical_json, store_path
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.narinfo import NarInfo, has_lost_trust
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.writer import CacheWriter
from vzrepro.realize import schedule, transfer
from vzrepro.realize.inventory import Doubt, Inventory
from vzrepro.realize.maker import Maker
from vzrepro.realize.schedule import Gone
from vzrepro.realize.transfer import ProvenanceSource, nothing_stated
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.plan import Plan, Step, make_plan, objection
from vzrepro.sources.fetch import Unreachable
from vzrepro.store import LocalStore

_ACTIONS: Mapping[str, events.Action] = {
    "copy": "copy",
    "substitute": "substitute",
    "fetch": "fetch",
    "import": "import",
    "image": "build",
    "build": "build",
}
_PULLED = frozenset({"have", "substitute", "import"})


@dataclass(slots=True)
class Realizer:
    """Realizes nodes of a graph with an inventory and a maker, which share a store and a `stop`; what is new goes to
    `writers`.

    `trusted` says which keys are revoked: what was taken on their word is made again. `provenance` gives what is stated
    of an object that was made here, and pushed along with it.
    """

    graph: DrvGraph
    inventory: Inventory
    maker: Maker
    writers: Sequence[CacheWriter] = ()
    trusted: TrustedKeys = field(default_factory=TrustedKeys)
    provenance: ProvenanceSource = nothing_stated
    _weighs: bool = False

    @property
    def store(self) -> LocalStore:
        """Where objects go."""
        return self.maker.store

    @property
    def config(self) -> Config:
        """The limits of what is made."""
        return self.maker.config

    @property
    def report(self) -> events.Report:
        """Who is told of what happens."""
        return self.maker.report

    @property
    def stop(self) -> threading.Event:
        """Ends all that runs when it is set."""
        return self.maker.stop

    # --- the whole ----------------------------------------------------------------------------------------------

    def realize(self, targets: Sequence[Node]) -> list[ObjectInfo]:
        """Make every target valid in the store and return what the store knows of them, in order.

        Plans again when a cache breaks its promise. Raises the first step's VzreproError; everything that
        was finished until then stays in the store.
        """
        return self.reach(targets, lambda: make_plan(self.graph, targets, self.inventory), self.execute, self._jobs)

    def pull(self, targets: Sequence[Node]) -> list[ObjectInfo]:
        """As `realize`, but nothing is built or downloaded from mirrors.

        Raises a cache's objection to a target (Untrusted, Damaged), or RemoteError when no cache has it.
        """

        def plan() -> Plan:
            made = make_plan(self.graph, targets, self.inventory)
            self._refuse_to_make(made)
            return made

        return self.reach(targets, plan, self.execute, self._jobs)

    def repair(self, paths: Sequence[StorePath]) -> list[ObjectInfo]:
        """Replace corrupt objects by right ones, from a cache or by building them again; the old ones stay until then.

        Raises UsageError for objects that neither a cache nor a recipe of this workspace can give.
        """
        nodes = []
        for path in paths:
            node = self.graph.at(path.base)
            if node is None:
                raise UsageError(
                    f"{path.base} cannot be repaired: no recipe of this workspace makes it",
                    hint="remove what nothing needs any more with: vzrepro store gc",
                )
            nodes.append(node)
        self.inventory.doubt(paths, Doubt.CORRUPT)
        return self.realize(nodes)

    @property
    def _jobs(self) -> int:
        return self.config.build_jobs()

    def reach(
        self, targets: Sequence[Node], make: Callable[[], Plan], execute: Callable[[Plan], None], jobs: int | None
    ) -> list[ObjectInfo]:
        """Make a plan and execute it, until all targets are there: again when that raises Gone. `jobs` builds run at
        once, None where nobody knows."""
        self.store.sweep()
        # Held first, then looked at: what the plan finds then stays until it has been used.
        closure = self.graph.closure(targets)
        self.store.hold([node.path for node in closure])
        self._judge(closure)
        while True:
            plan = make()
            if plan.todo():
                self.report(schedule.planned(plan, jobs))
            try:
                execute(plan)
            except Gone:
                continue
            self.maker.clear_downloads()
            found = self.store.query_many([node.path for node in targets])
            return [found[node.path] for node in targets]

    def _refuse_to_make(self, plan: Plan) -> None:
        """Raise when a target would not come from a cache."""
        wanted = {node.drv_hash for node in plan.targets}
        missing = [step.node for step in plan.steps if step.node.drv_hash in wanted and step.verb not in _PULLED]
        caches = self.inventory.caches
        objections: list[str] = []
        for node in missing:
            for cache in caches:
                info = cache.ask(node.path)
                if info is not None and (why := objection(node, info.origin, cache.url)) is not None:
                    objections.append(why)
        if missing:
            names = ", ".join(node.target for node in missing)
            asked = "asked: " + (", ".join(cache.url for cache in caches) or "none is configured")
            raise RemoteError(
                f"no cache has a {names} that can be taken" if objections else f"no cache has {names}",
                reason="\n".join(objections) or asked,
                hint=f"vzrepro cache why-missing {missing[0].target}",
            )

    def _judge(self, closure: Sequence[Node]) -> None:
        """Find what was taken on the word of a key that is revoked since, and what was made here from that."""
        if not self.trusted.revoked:
            return
        infos = self.store.query_many([node.path for node in closure])
        unsound = Doubt.DISTRUSTED | Doubt.TAINTED
        for node in closure:
            info = infos.get(node.path)
            if info is not None and info.voucher is not None:
                if has_lost_trust(info.voucher, self.trusted):
                    self.inventory.doubt([node.path], Doubt.DISTRUSTED)
            elif any(self.inventory.doubts(each.path) & unsound for each in self.graph.inputs(node)):
                self.inventory.doubt([node.path], Doubt.TAINTED)
        for writer in self.writers:
            if writer.reader.own:
                writer.forget(self.inventory.doubted(unsound))
        distrusted = self.inventory.doubted(Doubt.DISTRUSTED)
        if distrusted:
            names = ", ".join(sorted(path.name for path in distrusted))
            message = f"not trusted any more, because the key that vouched for it is revoked: {names}"
            self.report(events.Notice("warning", message))

    def execute(self, plan: Plan) -> None:
        """Run all steps, inputs first. Raises the first failure after what was running has ended."""
        todo = plan.todo()
        if not any(step.verb == "build" for step in todo):
            schedule.run(plan, self, self._jobs)
            return
        runtime = sandbox.check()
        self._weighs = runtime.weighs
        sandbox.sweep()
        with self.store.scratch("engine") as scratch:
            sharing = sandbox.sharing_of(scratch, runtime)
        if not sharing.mounts:
            message = f"inputs of builds are sent to the container engine, outputs fetched: {sharing.reason}"
            self.report(events.Notice("info", message))
        try:
            schedule.run(plan, self, self._jobs)
        finally:
            # The engine may have been creating the container of a run that was killed just before this one began.
            with contextlib.suppress(VzreproError):
                sandbox.sweep()

    # --- one step -----------------------------------------------------------------------------------------------

    def perform(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        """Do what one step says and return the valid object. Other processes doing the same are waited for."""
        node, path = step.node, step.node.path
        if self.stop.is_set():
            raise Interrupted(f"interrupted before {node.target} was begun")
        begun = time.monotonic()
        action = _ACTIONS[step.verb]

        def waiting(holder: str) -> None:
            self.report(events.Waiting(node.target, str(path), holder))

        with self.store.lock(path, f"{step.verb} {node.target}", waiting, cancelled=self.stop):
            there = self.inventory.have([path]).get(path)
            if there is not None and (node.origin is None or self.store.known_origin(path, node.origin)):
                secs, valid = time.monotonic() - begun, Outcome.ALREADY_VALID.value
                self.report(events.Finished(node.target, str(path), action, valid, secs, there.nar_size))
                return there
            started = events.Started(node.target, str(path), action, step.expected_secs, step.download_bytes or None)
            with events.working(self.report, started, begun) as work:
                info = self._outcome(step, there, inputs)
                self.store.put_derivation(node.drv_hash, node.target, canonical_json(node.drv.document()))
                verb = "copy" if info.outcome is Outcome.COPIED else step.verb
                self.store.record_history(node.target, verb, time.monotonic() - begun, info.nar_size)
                work.outcome, work.nar_size = info.outcome.value, info.nar_size
        return info

    def _outcome(self, step: Step, there: ObjectInfo | None, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        """What a step came to; `there` is a download of the same bytes from other URLs, if there is one."""
        node = step.node
        match step.verb:
            case "import":
                return self.maker.take_in(node)
            case "fetch":
                return self._fetch(node, there)
            case "substitute":
                return self._substitute(node)
            case "copy":
                assert step.info is not None
                return self._copy(node, step.info)
            case _:
                return self._make(node, inputs, step.urgency if self._weighs else 1.0)

    def _fetch(self, node: Node, there: ObjectInfo | None) -> ObjectInfo:
        """Download it; where no place can be asked, the same bytes from elsewhere do: those here, or in a cache.

        A place that gives others is an error (HashMismatch), and so is one that has no such file: a mistyped URL looks
        like that. What comes from elsewhere is not remembered as verified from these URLs, so they are asked again the
        next time.
        """
        try:
            return self.maker.fetch(node) if there is None else self._see_origin(node, there)
        except Unreachable as error:
            found, where = (there, "this store") if there is not None else self._by_content(node)
            if found is None:
                raise
            message = f"{node.target} is taken by its hash from {where}: no place of the recipe can be asked"
            why = "; ".join(error.in_a_line.splitlines())
            warning = f"{message}, so that URL and hash belong together is not seen ({why})"
            self.report(events.Notice("warning", warning))
            return found
        except RemoteError as error:
            if there is not None or any(self.inventory.by_content(node)):
                where = "here" if there is not None else "in a cache"
                error.hint = f"a file of this hash is {where}, from other URLs: correct the URL, or else the hash"
            raise

    def _by_content(self, node: Node) -> tuple[ObjectInfo | None, str]:
        """A download as it is here under the name of another URL's file, or in a cache from wherever it came there; and
        where that was."""
        own = node.drv.document()
        for drv_hash, canonical, _seen in self.store.derivations_named(node.target):
            earlier = json.loads(canonical)
            if all(earlier[key] == own[key] for key in ("builder", "content", "env")):
                path = store_path(drv_hash, earlier["name"])
                with contextlib.suppress(KeyError, Gone):
                    return self._copy(node, self.inventory.have([path])[path]), "this store"
        for cache, info in self.inventory.by_content(node):
            with contextlib.suppress(RemoteError):
                return self._from_cache(node, cache, info, Outcome.SUBSTITUTED), cache.url
        return None, ""

    def _see_origin(self, node: Node, there: ObjectInfo) -> ObjectInfo:
        """See that new URLs give the bytes that are here."""
        assert node.origin is not None
        self.maker.see_origin(node)
        self.store.add_origin(node.path, node.origin)
        return there

    def _substitute(self, node: Node) -> ObjectInfo:
        for cache, info in self.inventory.in_caches(node):
            # A cache that breaks its promise has warned of it once; here it is only a miss.
            with contextlib.suppress(RemoteError):
                return self._from_cache(node, cache, info, Outcome.SUBSTITUTED)
        self.inventory.doubt([node.path], Doubt.LOST)
        raise Gone

    def _stop_here(self, _size: int = 0) -> None:
        """Called now and then by what takes long."""
        if self.stop.is_set():
            raise Interrupted("interrupted")

    def _from_cache(
        self, node: Node, cache: CacheReader, info: NarInfo, outcome: Outcome, key: BuildKey | None = None
    ) -> ObjectInfo:
        """Unpack a cache's object, which may have been made under an earlier name, as the node's own."""
        path = str(node.path)

        def progress(done: int, total: int | None) -> None:
            self._stop_here()
            self.report(events.Progress(node.target, path, done, total))

        with self.store.scratch(node.target, stop=self.stop) as scratch:
            tree = scratch / "tree"
            got = cache.fetch(info, tree, progress=progress)
            found = replace(
                got, path=node.path, drv_hash=node.drv_hash, build_key=key or got.build_key, outcome=outcome
            )
            return self.inventory.keep(tree, found)

    def _copy(self, node: Node, equal: ObjectInfo, key: BuildKey | None = None) -> ObjectInfo:
        with self.store.scratch(node.target, stop=self.stop) as scratch:
            tree = scratch / "tree"
            try:
                self.store.copy_object(equal.path, tree, self._stop_here)
            except HashMismatch as error:
                message = f"{error.message}; building {node.target} instead of copying it"
                self.report(events.Notice("warning", message))
                self.inventory.doubt([equal.path], Doubt.LOST)
                raise Gone from error
            found = replace(
                equal,
                path=node.path,
                drv_hash=node.drv_hash,
                build_key=key or equal.build_key,
                outcome=Outcome.COPIED,
            )
            return self.inventory.keep(tree, found)

    def _make(self, node: Node, inputs: Mapping[DrvHash, ObjectInfo], urgency: float) -> ObjectInfo:
        """Build or write an image, unless the very same work was done before: here, or in a cache."""
        key = node.drv.build_key({drv: inputs[drv].nar_hash for drv in node.drv.dependencies()})
        equal = self.inventory.equal(key)
        if equal is not None:
            return self._copy(node, equal, key)
        for cache, info in self.inventory.equal_in_caches(key):
            with contextlib.suppress(RemoteError):
                return self._from_cache(node, cache, info, Outcome.COPIED, key)
        return self.maker.make(node, {drv: info.path for drv, info in inputs.items()}, key, urgency)

    def push(self, node: Node, info: ObjectInfo) -> None:
        """Write a new object to every cache that can be written, after what it refers to; a failure is a warning, the
        object stays here."""
        # That may be here from a run that was killed before it had pushed it.
        found = self.store.query_many(self.store.closure(info.references)) | {info.path: info}
        attests = {path: self.provenance(each) for path, each in found.items()}
        pusher = transfer.Pusher(self.store, self.report, self.stop, lambda each: attests[each.path])
        for writer in self.writers:
            try:
                for each in (each for wave in transfer.waves(list(found.values())) for each in wave):
                    if not writer.writable or self.stop.is_set() or (writer.reader.own and each.voucher is not None):
                        continue
                    pusher.push(writer, node.target if each is info else each.path.name, each)
            except Interrupted:
                return
            except RemoteError:
                continue  # the cache has told of it
            except (VzreproError, OSError) as error:
                self.report(events.Notice("warning", f"{writer.url}: {node.target} was not pushed: {error}"))
