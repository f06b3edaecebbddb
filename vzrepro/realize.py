"""Execute a `Plan`: fetch, import, write images, build, copy, substitute and push, in parallel.

What a step does is in `Realizer`, which knows the store, the caches and the sandbox, but no graph beyond a step's
inputs; when it is done is `schedule`'s to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vzrepro import events, fetch, image, nar, sandbox, transfer
from vzrepro.attest.witness import pushed_along
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.narinfo import NarInfo, has_lost_trust
from vzrepro.cache.signing import TrustedKeys
from vzrepro.config import Config
from vzrepro.errors import HashMismatch, Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.evaluate import DrvGraph
from vzrepro.lock import PinnedFile
from vzrepro.model import BuildKey, DrvHash, FileHash, ObjectInfo, Outcome, StorePath, canonical_json, store_path
from vzrepro.plan import Offer, Plan, Step, make_plan
from vzrepro.recipe import Node
from vzrepro.schedule import Gone, Schedule
from vzrepro.store import LocalStore

_ACTIONS: Mapping[str, events.Action] = {
    "copy": "copy",
    "substitute": "substitute",
    "fetch": "fetch",
    "import": "import",
    "image": "build",
    "build": "build",
}
_LOOK_UPS = 16
"""Questions to caches that are under way at once."""

Substitute = Literal["all", "sources", "none"]
"""What may come from caches: everything · downloads only, so that all else is built · nothing."""

_PULLED = frozenset({"have", "substitute", "import"})


@dataclass(slots=True)
class Realizer:
    """What realizing needs besides a plan: a graph, a store, caches to take from and to push to, and limits.

    `trusted` says which keys are revoked: what was taken on their word is made again. `snapshot` is the lock's, for
    public archives. Setting `stop` ends running builds and downloads.
    """

    graph: DrvGraph
    store: LocalStore
    caches: Sequence[BinaryCache]
    config: Config
    mirrors: fetch.Mirrors
    snapshot: str | None
    report: events.Report = events.ignore
    substitute: Substitute = "all"
    trusted: TrustedKeys = field(default_factory=TrustedKeys)
    keep_failed: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    _lost: set[StorePath] = field(default_factory=set)
    _mending: set[StorePath] = field(default_factory=set)
    _distrusted: set[StorePath] = field(default_factory=set)
    _tainted: set[StorePath] = field(default_factory=set)
    _load_lock: threading.Lock = field(default_factory=threading.Lock)

    # --- what planning asks -------------------------------------------------------------------------------------

    def have(self, paths: Sequence[StorePath]) -> dict[StorePath, ObjectInfo]:
        """The valid local objects (see `plan.Known`); what is to be replaced counts as absent until it is."""
        replaced = self._replaced()
        return self.store.query_many(path for path in paths if path not in replaced)

    def _replaced(self) -> set[StorePath]:
        return self._mending | self._distrusted | self._tainted

    def _here(self, path: StorePath) -> ObjectInfo | None:
        return self.have([path]).get(path)

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        """Whether the object was verified from these URLs."""
        return self.store.known_origin(path, origin)

    def offers(self, nodes: Sequence[Node]) -> dict[StorePath, Offer]:
        """The first trusted cache's offer for each node, asked for in parallel."""
        # What is tainted is wherever it was pushed, too; only the same inputs, byte for byte, make it good again.
        absent = self._lost | self._tainted
        asked = [node for node in nodes if self._may_substitute(node) and node.path not in absent]
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
        for cache in self.caches:
            info = cache.query(node.path)
            if info is not None:
                return Offer(info.file_size or info.nar_size, info.origin, cache.url)
        return None

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        """A valid local object of the same build key. One that is tainted serves as well: its inputs, byte for byte,
        are those of the key, and they have been made again."""
        equal = self.store.by_build_key(key)
        absent = self._mending | self._distrusted | self._lost
        return None if equal is None or equal.path in absent else equal

    def expected_secs(self, target: str, verb: str) -> float | None:
        """The median of the last times."""
        return self.store.expected_secs(target, verb)

    # --- the whole ----------------------------------------------------------------------------------------------

    def realize(self, targets: Sequence[Node]) -> list[ObjectInfo]:
        """Make every target valid in the store and return what the store knows of them, in order.

        Plans again when a cache breaks its promise. Raises the first step's VzreproError; everything that
        was finished until then stays in the store.
        """
        return self._reach(targets, lambda _plan: None)

    def pull(self, targets: Sequence[Node]) -> list[ObjectInfo]:
        """As `realize`, but nothing is built or downloaded from mirrors.

        Raises a cache's objection to a target (Untrusted, Damaged), or RemoteError when no cache has it.
        """
        return self._reach(targets, self._refuse_to_make)

    def _reach(self, targets: Sequence[Node], check: Callable[[Plan], None]) -> list[ObjectInfo]:
        """Plan and execute until all is there; `check` raises for a plan that is not to be executed."""
        self.store.sweep()
        # Held first, then looked at: what the plan finds then stays until it has been used.
        closure = self.graph.closure(targets)
        self.store.hold([node.path for node in closure])
        self._judge(closure)
        while True:
            plan = make_plan(self.graph, targets, self)
            check(plan)
            if plan.todo():
                self.report(events.Planned(plan.actions(), plan.download_bytes() or None, plan.expected_secs()))
            try:
                self.execute(plan)
            except Gone:
                continue
            self._clear_downloads()
            found = self.store.query_many([node.path for node in targets])
            return [found[node.path] for node in targets]

    def _refuse_to_make(self, plan: Plan) -> None:
        """Raise when a target would not come from a cache."""
        wanted = {node.drv_hash for node in plan.targets}
        missing = [step.node for step in plan.steps if step.node.drv_hash in wanted and step.verb not in _PULLED]
        for node in missing:
            for cache in self.caches:
                cache.ask(node.path)
        if missing:
            names = ", ".join(node.target for node in missing)
            raise RemoteError(
                f"no cache has {names}",
                reason="asked: " + (", ".join(cache.url for cache in self.caches) or "none is configured"),
                hint=f"vzrepro cache why-missing {missing[0].target}",
            )

    def _judge(self, closure: Sequence[Node]) -> None:
        """Find what was taken on the word of a key that is revoked since, and what was made here from that."""
        if not self.trusted.revoked:
            return
        infos = self.store.query_many([node.path for node in closure])
        for node in closure:
            info = infos.get(node.path)
            if info is not None and info.voucher is not None:
                if has_lost_trust(info.voucher, self.trusted):
                    self._distrusted.add(info.path)
            elif {self.graph.nodes[drv].path for drv in node.drv.dependencies()} & (self._distrusted | self._tainted):
                self._tainted.add(node.path)
        for cache in self.caches:
            if cache.own:
                cache.forget([*self._distrusted, *self._tainted])
        if self._distrusted:
            names = ", ".join(sorted(path.name for path in self._distrusted))
            message = f"not trusted any more, because the key that vouched for it is revoked: {names}"
            self.report(events.Notice("warning", message))

    def repair(self, paths: Sequence[StorePath]) -> list[ObjectInfo]:
        """Replace corrupt objects by right ones, from a cache or by building them again; the old ones stay until then.

        Raises UsageError for objects that neither a cache nor a recipe of this workspace can give.
        """
        by_path = {node.path: node for node in self.graph.nodes.values()}
        unknown = [path for path in paths if path not in by_path]
        if unknown:
            raise UsageError(
                f"{unknown[0].base} cannot be repaired: no recipe of this workspace makes it",
                hint="remove what nothing needs any more with: vzrepro store gc",
            )
        self._mending = set(paths)
        return self.realize([by_path[path] for path in paths])

    def _clear_downloads(self) -> None:
        """Files are kept during a run, since images share packages; afterwards the store objects hold them.

        Of several runs at once, the last one to end removes them: the others may be in the middle of some.
        """
        if self.store.is_shared():
            return
        shutil.rmtree(self._downloads, ignore_errors=True)

    def execute(self, plan: Plan) -> None:
        """Run all steps, inputs first. Raises the first failure after what was running has ended."""
        todo = plan.todo()
        if any(step.verb == "build" for step in todo):
            sandbox.check()
            sandbox.sweep()
        Schedule(plan, self, self.config.build_jobs()).run()

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
            there = self._here(path)
            if there is not None and (node.origin is None or self.store.known_origin(path, node.origin)):
                self._finished(step, action, Outcome.ALREADY_VALID, begun, there.nar_size)
                return there
            self.report(events.Started(node.target, str(path), action, step.expected_secs, step.download_bytes or None))
            try:
                info = self._outcome(step, inputs)
            except BaseException as error:
                outcome = Outcome.INTERRUPTED if isinstance(error, Interrupted) else Outcome.FAILED
                self._finished(step, action, outcome, begun, None)
                raise
            self.store.put_derivation(node.drv_hash, node.target, canonical_json(node.drv.document()))
            verb = "copy" if info.outcome is Outcome.COPIED else step.verb
            self.store.record_history(node.target, verb, time.monotonic() - begun, info.nar_size)
            self._finished(step, action, info.outcome, begun, info.nar_size)
        return info

    def _finished(self, step: Step, action: events.Action, outcome: Outcome, begun: float, size: int | None) -> None:
        secs = time.monotonic() - begun
        self.report(events.Finished(step.node.target, str(step.node.path), action, outcome.value, secs, size))

    def _outcome(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        node = step.node
        match step.verb:
            case "import":
                return self._import(node)
            case "fetch":
                return self._fetch(node)
            case "substitute":
                return self._substitute(node)
            case "copy":
                assert step.info is not None
                return self._copy(node, step.info)
            case _:
                return self._make(step, inputs)

    def _import(self, node: Node) -> ObjectInfo:
        """Local files: copied as they are now; evaluation has hashed them a moment ago."""
        with self.store.scratch(node.target) as scratch:
            tree = scratch / "tree"
            for name, content in node.tree.items():
                target = tree / name if name else tree
                target.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, bytes):
                    target.write_bytes(content)
                elif content.is_symlink():
                    target.symlink_to(content.readlink())
                else:
                    target.write_bytes(content.read_bytes())
                    target.chmod(0o755 if content.stat().st_mode & 0o100 else 0o644)
                if nar.nar_hash(target)[0].hex != node.drv.content[name].hex:
                    raise UsageError(
                        f"{content if isinstance(content, Path) else name} changed while it was being read",
                        hint="run the command again",
                    )
            return self._register(node, tree, scratch, Outcome.FETCHED)

    def _fetch(self, node: Node) -> ObjectInfo:
        self._seed(node)
        total = node.download_bytes

        def progress(done: int, _total: int | None) -> None:
            self.report(events.Progress(node.target, str(node.path), done, total))

        fetch.download_all(
            [
                fetch.Download(
                    self.mirrors.urls(file.url, snapshot=self.snapshot),
                    self._download_of(file),
                    file.sha256,
                    file.size,
                )
                for file in node.files.values()
            ],
            report=progress,
            cancel=self.stop,
        )
        origin = node.origin
        assert origin is not None
        existing = self._here(node.path)
        if existing is not None:
            # The object was there; only its new URLs had to be seen to give the same bytes.
            self.store.add_origin(node.path, origin)
            return existing
        with self.store.scratch(node.target) as scratch:
            tree = scratch / "tree"
            if "" not in node.files:
                tree.mkdir()
            for name, file in node.files.items():
                _copy_file(self._download_of(file), tree / name if name else tree)
            return self._register(node, tree, scratch, Outcome.FETCHED, origin=origin)

    @property
    def _downloads(self) -> Path:
        return self.store.root / ".vzrepro" / "downloads"

    def _download_of(self, file: PinnedFile) -> Path:
        """Where a file waits for its object. Named after URL and hash: what came from elsewhere must not stand in."""
        return self._downloads / FileHash.of(f"{file.url} {file.sha256}".encode()).hex

    def _seed(self, node: Node) -> None:
        """Take files that an earlier set of the same recipe has under the same name, instead of downloading them."""
        if self._here(node.path) is not None or "" in node.files:
            return
        for drv_hash, canonical, _seen in self.store.derivations_named(node.target):
            earlier = json.loads(canonical)
            folder = self.store.location(store_path(drv_hash, earlier["name"]))
            for name, sha256 in earlier["content"].items():
                file = node.files.get(name)
                if file is None or file.sha256.hex != sha256 or not (folder / name).is_file():
                    continue
                target = self._download_of(file)
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _copy_file(folder / name, target)

    def _substitute(self, node: Node) -> ObjectInfo:
        for cache in self.caches:
            info = cache.query(node.path)
            if info is None:
                continue
            # A cache that breaks its promise has warned of it once; here it is only a miss.
            with contextlib.suppress(RemoteError):
                return self._from_cache(node, cache, info, Outcome.SUBSTITUTED)
        self._lost.add(node.path)
        raise Gone

    def _from_cache(
        self, node: Node, cache: BinaryCache, info: NarInfo, outcome: Outcome, key: BuildKey | None = None
    ) -> ObjectInfo:
        """Unpack a cache's object, which may have been made under an earlier name, as the node's own."""
        path = str(node.path)

        def progress(done: int, total: int | None) -> None:
            self._stop_here()
            self.report(events.Progress(node.target, path, done, total))

        with self.store.scratch(node.target) as scratch:
            tree = scratch / "tree"
            got = cache.fetch(info, tree, progress=progress)
            found = replace(
                got, path=node.path, drv_hash=node.drv_hash, build_key=key or got.build_key, outcome=outcome
            )
            return self._keep(tree, found)

    def _copy(self, node: Node, equal: ObjectInfo, key: BuildKey | None = None) -> ObjectInfo:
        with self.store.scratch(node.target) as scratch:
            tree = scratch / "tree"
            try:
                self.store.copy_object(equal.path, tree)
            except HashMismatch as error:
                message = f"{error.message}; building {node.target} instead of copying it"
                self.report(events.Notice("warning", message))
                self._lost.add(equal.path)
                raise Gone from error
            found = replace(
                equal,
                path=node.path,
                drv_hash=node.drv_hash,
                build_key=key or equal.build_key,
                outcome=Outcome.COPIED,
            )
            return self._keep(tree, found)

    def _make(self, step: Step, inputs: Mapping[DrvHash, ObjectInfo]) -> ObjectInfo:
        """Build or write an image, unless the very same work was done before: here, or in a cache."""
        node = step.node
        key = node.drv.build_key({drv: inputs[drv].nar_hash for drv in node.drv.dependencies()})
        equal = self.equal(key)
        if equal is not None:
            return self._copy(node, equal, key)
        remote = self._equal_remote(node, key)
        if remote is not None:
            return remote
        with self.store.scratch(node.target) as scratch:
            if step.verb == "image":
                debs = self.store.location(inputs[node.drv.inputs["debs"]].path)
                archive = scratch / "archive"
                packages = [(deb.name, deb) for deb in debs.iterdir()]
                image.write_image(packages, archive, platform=node.drv.platform or "", stop=self.stop)
                return self._register(node, archive, scratch, Outcome.BUILT, key=key)
            return self._build(node, scratch, key)

    def _equal_remote(self, node: Node, key: BuildKey) -> ObjectInfo | None:
        for cache in self.caches if self.substitute == "all" else ():
            record = cache.by_build_key(key)
            info = cache.query(record.path) if record is not None else None
            # The narinfo must say so itself: the object's voucher stands for this, too.
            if record is None or info is None or (info.nar_hash, info.build_key) != (record.nar_hash, key):
                continue
            with contextlib.suppress(RemoteError):
                return self._from_cache(node, cache, info, Outcome.COPIED, key)
        return None

    # --- the sandbox --------------------------------------------------------------------------------------------

    def job(self, node: Node, scratch: Path) -> sandbox.Job:
        """The sandbox job of a node whose inputs are valid; `scratch` is a private directory."""
        drv = node.drv
        assert drv.image is not None
        nodes = self.graph.nodes
        log = self.store.log_path(node.path)
        log.parent.mkdir(parents=True, exist_ok=True)
        return sandbox.Job(
            label=node.target,
            image=str(image.image_id(self.store.location(nodes[drv.image].path))),
            command=drv.command,
            scratch=scratch,
            log=log,
            source_date_epoch=drv.source_date_epoch or 0,
            cores=self.config.build_cores(),
            env=drv.env,
            inputs={name: self.store.location(nodes[dep].path) for name, dep in drv.inputs.items()},
            memory_bytes=self.config.memory_bytes(node.memory_bytes),
            timeout_secs=node.timeout_secs,
            platform=drv.platform or "",
            keep_failed=self.keep_failed,
        )

    def load_image(self, node: Node) -> None:
        """Have the node's toolchain image loaded in the container engine."""
        assert node.drv.image is not None
        archive = self.store.location(self.graph.nodes[node.drv.image].path)
        with self._load_lock:
            sandbox.load_image(archive, str(image.image_id(archive)))

    def _build(self, node: Node, scratch: Path, key: BuildKey) -> ObjectInfo:
        if self.keep_failed:
            # Kept from the start: the command that reopens the sandbox names this directory.
            scratch = self.store.keep(scratch)
        job = self.job(node, scratch / "sandbox")
        job.scratch.mkdir(mode=0o700)
        job.log.unlink(missing_ok=True)
        self.load_image(node)

        def line(text: str) -> None:
            self.report(events.LogLine(node.target, str(node.path), text))

        try:
            sandbox.run(job, on_line=line, stop=self.stop)
            info = self._register(node, job.out, scratch, Outcome.BUILT, key=key)
        except BaseException:
            if not self.keep_failed:
                sandbox.discard(job)
            raise
        sandbox.discard(job)
        if self.keep_failed:
            shutil.rmtree(scratch)
        return info

    def _stop_here(self, *_progress: int | None) -> None:
        """Called now and then by what takes long: raises Interrupted once `stop` is set."""
        if self.stop.is_set():
            raise Interrupted("interrupted")

    # --- keeping what was made ----------------------------------------------------------------------------------

    def _register(
        self,
        node: Node,
        made: Path,
        scratch: Path,
        outcome: Outcome,
        *,
        key: BuildKey | None = None,
        origin: FileHash | None = None,
    ) -> ObjectInfo:
        """Copy what was made into canonical form, hash it, look for references, and put it into the store."""
        inputs = {self.graph.nodes[drv].path for drv in node.drv.dependencies()}
        needles = {path.hash_part: path for path in (*inputs, node.path)}
        tree = scratch / "canonical"
        nar_hash, nar_size, found = nar.canonical_copy(made, tree, needles=list(needles))
        info = ObjectInfo(
            path=node.path,
            nar_hash=nar_hash,
            nar_size=nar_size,
            references=tuple(sorted(needles[part] for part in found)),
            drv_hash=node.drv_hash,
            build_key=key,
            origin=origin,
            outcome=outcome,
        )
        return self._keep(tree, info)

    def _keep(self, tree: Path, info: ObjectInfo) -> ObjectInfo:
        if info.path not in self._replaced():
            return self.store.add(tree, info)
        kept = self.store.replace(tree, info, distrusted=info.path not in self._mending)
        for each in (self._mending, self._distrusted, self._tainted):
            each.discard(info.path)
        return kept

    def push(self, node: Node, info: ObjectInfo) -> None:
        """Write a new object to every cache that can be written; a failure is a warning, the object stays here."""
        attest = pushed_along(self.store, info)
        pusher = transfer.Pusher(self.store, self.report, self.stop, lambda _info: attest)
        for cache in self.caches:
            if not cache.writable or self.stop.is_set() or (cache.own and info.voucher is not None):
                continue
            try:
                pusher.push(cache, node.target, info)
            except Interrupted:
                return
            except RemoteError:
                continue  # the cache has told of it
            except (VzreproError, OSError) as error:
                self.report(events.Notice("warning", f"{cache.url}: {node.target} was not pushed: {error}"))


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes, sharing blocks where the file system can."""
    with source.open("rb") as reader, target.open("xb") as writer:
        remaining = os.fstat(reader.fileno()).st_size
        while remaining:
            done = os.copy_file_range(reader.fileno(), writer.fileno(), remaining)
            if not done:
                raise OSError(f"{source} became shorter while it was copied")
            remaining -= done
