"""One command's view of the world: workspace, configuration, lock, graph, store and realizer, each made when needed,
and what it is made of imported then: most commands need few of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Action, LogLine, Notice, Progress, Report, Started, working

if TYPE_CHECKING:
    from vzrepro.base.config import Config
    from vzrepro.base.model import DrvHash, ObjectInfo, StorePath
    from vzrepro.base.signing import PublicKey, SigningKey, TrustedKeys
    from vzrepro.cache.backend import Backend
    from vzrepro.cache.reader import CacheReader
    from vzrepro.cache.writer import CacheWriter
    from vzrepro.console import Console
    from vzrepro.net import Stop
    from vzrepro.realize.inventory import Inventory, Substitute
    from vzrepro.realize.pin import Pinner
    from vzrepro.realize.realizer import Realizer
    from vzrepro.recipe.graph import DrvGraph, Node
    from vzrepro.recipe.lock import Lock
    from vzrepro.sources.fetch import Mirrors
    from vzrepro.store import LocalStore

_SAY_SECS = 0.25


class Session:
    """Lazily made parts; `start` is where the workspace is looked for."""

    def __init__(self, console: Console, start: Path = Path()) -> None:
        self.console = console
        self.start = start
        self._overrides: dict[str, object] = {}
        self._begun_ns = time.time_ns()

    @cached_property
    def stop(self) -> Stop:
        """Set when the command is to end: what works or waits in other threads looks at it."""
        from vzrepro.net import Stop

        return Stop()

    def interrupt(self) -> None:
        """Have what works or waits in other threads end."""
        if "stop" in vars(self):  # else there is nothing that could look at it
            self.stop.set()

    def override(self, **settings: object) -> None:
        """Let options win over the configuration; None says nothing. Before the configuration is first used."""
        self._overrides.update({key: value for key, value in settings.items() if value is not None})

    @cached_property
    def root(self) -> Path:
        """The workspace."""
        from vzrepro.base.config import find_workspace

        return find_workspace(self.start)

    def has_workspace(self) -> bool:
        """Whether there is a workspace."""
        try:
            return self.root.is_dir()
        except UsageError:
            return False

    def do_without_workspace(self) -> bool:
        """Whether there is none. The start directory then stands in for it: for what needs the configuration alone."""
        if self.has_workspace():
            return False
        self.root = self.start.resolve()
        return True

    @cached_property
    def config(self) -> Config:
        """The settings, options included."""
        from vzrepro.base.config import load

        return load(self.root).model_copy(update=self._overrides)

    @property
    def lock_file(self) -> Path:
        """The workspace's lock."""
        return self.root / "lock.toml"

    @cached_property
    def lock(self) -> Lock:
        """All pins."""
        from vzrepro.recipe import lock as locks

        return locks.load(self.lock_file)

    @cached_property
    def graph(self) -> DrvGraph:
        """The evaluated recipes."""
        from vzrepro.recipe.confined import evaluate

        return evaluate(self.root, self.lock, self.config.platform)

    @cached_property
    def store(self) -> LocalStore:
        """The local store."""
        from vzrepro.store import LocalStore

        return LocalStore(self.config.store)

    @cached_property
    def mirrors(self) -> Mirrors:
        """Where `mirror://` names are."""
        from vzrepro.sources import fetch

        return fetch.Mirrors.of_host(self.config.mirrors, os.environ, get=fetch.get)

    @cached_property
    def trusted(self) -> TrustedKeys:
        """The keys whose objects are taken from shared caches, those that are revoked, and how many must agree."""
        from vzrepro.base.signing import TrustedKeys

        return TrustedKeys(
            _keys("trusted-keys", self.config.trusted_keys),
            revoked=_keys("revoked-keys", self.config.revoked_keys),
            required=self.config.require_signatures,
        )

    @cached_property
    def upload_key(self) -> SigningKey | None:
        """The key that signs what is pushed to a shared cache; None when there is none."""
        if self.config.upload_key is None:
            return None
        from vzrepro.base.signing import SigningKey

        return SigningKey.load(self.config.upload_key)

    @property
    def push_to(self) -> str | None:
        """The shared cache that is written to: the one configured, else the first that can be."""
        from vzrepro.cache.places import is_writable

        chosen = self.config.push_to
        if chosen is not None and not is_writable(chosen):
            raise UsageError(f"push-to: {chosen} cannot be written", hint="name an s3:// URL or a directory")
        return chosen or next(filter(is_writable, self.config.caches), None)

    def chosen_cache(self, url: str | None) -> str:
        """The URL of the shared cache to work on: the one given, else the one that is pushed to, else the first."""
        chosen = url or self.push_to or next(iter(self.config.caches), None)
        if chosen is None:
            raise UsageError(
                "no cache is configured",
                hint='name one (--cache URL), or set caches = ["s3://…"] in [tool.vzrepro] of pyproject.toml',
            )
        return chosen

    def backend(self, url: str) -> Backend:
        """The place that a cache's URL names, relative to the workspace."""
        from vzrepro.cache.places import open_backend
        from vzrepro.cache.remote import Patience

        patience = Patience(self.config.cache_patience_secs, stop=self.stop)
        return open_backend(url, patience, self.root)

    def cache(self, url: str) -> CacheReader:
        """The shared cache at `url`."""
        from vzrepro.cache.reader import CacheReader

        return CacheReader(self.backend(url), self.trusted, warn=self.warn)

    def writer(self, url: str, signer: SigningKey | None) -> CacheWriter:
        """The shared cache at `url`, to be written to; what was made here, only with a signer."""
        from vzrepro.cache.writer import CacheWriter

        return CacheWriter(self.cache(url), signer)

    @cached_property
    def shared_caches(self) -> list[CacheReader]:
        """The configured caches, in order, and the one that is pushed to, if there is an upload key."""
        return list(self._shared.values())

    @cached_property
    def _shared(self) -> dict[str, CacheReader]:
        """The `shared_caches` by their URLs."""
        urls = dict.fromkeys(self.config.caches)
        if self.push_to is not None and self.upload_key is not None:
            urls.setdefault(self.push_to)
        return {url: self.cache(url) for url in urls}

    @cached_property
    def caches(self) -> list[CacheReader]:
        """The machine's own cache, unless it is turned off, and the shared ones."""
        return [*(each.reader for each in self._machine_caches), *self.shared_caches]

    @cached_property
    def writers(self) -> list[CacheWriter]:
        """Those of `caches` to which goes what is made here: the machine's own and, with an upload key, `push_to`."""
        found = list(self._machine_caches)
        if self.push_to is not None and self.upload_key is not None:
            from vzrepro.cache.writer import CacheWriter

            found.append(CacheWriter(self._shared[self.push_to], self.upload_key))
        return found

    @cached_property
    def _machine_caches(self) -> list[CacheWriter]:
        if not self.config.machine_cache:
            return []
        from vzrepro.cache.machine import machine_cache

        return [
            machine_cache(
                self.config.machine_cache_dir,
                self.config.key_dir,
                max_bytes=self.config.machine_cache_gib << 30,
                warn=self.warn,
            )
        ]

    def asked_cache(self, url: str | None) -> CacheReader:
        """The cache to explain: the one that `chosen_cache` says; where none is shared, the machine's own."""
        shared = url is not None or self.config.caches or self.push_to is not None
        if not shared and self._machine_caches:
            return self._machine_caches[0].reader
        return self.cache(self.chosen_cache(url))

    @contextmanager
    def long_work(self, action: Action, path: str) -> Iterator[LongWork]:
        """Show the block as work on the cache at `path`."""
        with working(self.console.report, Started("cache", path, action)):
            yield LongWork(self.console.report, path)

    def warn(self, message: str) -> None:
        """Tell the user something that does not end the command."""
        self.console.report(Notice("warning", message))

    def attestations(self, drv_hash: DrvHash, url: str | None = None) -> dict[bytes, tuple[str, ...]]:
        """Every DSSE envelope about a derivation beside the store and in the caches (only that at `url`, if given), and
        where it is. Nobody has verified them; a cache that cannot be asked is told of."""
        from vzrepro.proof.attest.shelf import Shelf, gather

        caches = self.caches if url is None else [self.cache(url)]
        return gather(drv_hash, Shelf(self.store), caches, lambda place, error: self.warn(f"{place}: {error.message}"))

    def inventory(self, *, substitute: Substitute = "all", caches: Sequence[CacheReader] | None = None) -> Inventory:
        """What plans are made of: this session's store, and its caches or those that are named instead."""
        from vzrepro.realize.inventory import Inventory

        chosen = self.caches if caches is None else caches
        return Inventory(self.store, chosen, substitute, self.stop, self.config.reference_secs())

    def realizer(
        self,
        *,
        substitute: Substitute = "all",
        caches: Sequence[CacheReader] | None = None,
        keep_failed: bool = False,
    ) -> Realizer:
        """What executes plans, with this session's parts; where `caches` are named, it pushes to none."""
        inventory = self.inventory(substitute=substitute, caches=caches)
        writers = self.writers if caches is None else ()
        return self._realizer(self.graph, self.lock.snapshot(), inventory, writers, keep_failed=keep_failed)

    @cached_property
    def tools(self) -> Realizer | None:
        """What makes the tools of audits, which come with vzrepro, in this session's store; None, with a warning, where
        there are none for the build platform."""
        from vzrepro.proof.audit.toolbox import tools_graph

        try:
            graph, snapshot = tools_graph(self.config.platform)
        except UsageError as error:
            self.warn(f"{error.in_a_line}: nothing can be seen from inside, and diffoscope is not there")
            return None
        return self._realizer(graph, snapshot, self.inventory(), self.writers)

    def _realizer(
        self,
        graph: DrvGraph,
        snapshot: str | None,
        inventory: Inventory,
        writers: Sequence[CacheWriter],
        *,
        keep_failed: bool = False,
    ) -> Realizer:
        from vzrepro.proof.attest.witness import pushed_along
        from vzrepro.realize.maker import Maker
        from vzrepro.realize.realizer import Realizer

        maker = Maker(
            store=self.store,
            config=self.config,
            mirrors=self.mirrors,
            snapshot=snapshot,
            keep=inventory.keep,
            report=self.console.report,
            keep_failed=keep_failed,
            stop=self.stop,
        )
        return Realizer(graph, inventory, maker, writers, self.trusted, partial(pushed_along, self.store))

    def pinner(self, update: Sequence[str] | None, *, allow_expired: bool) -> Pinner:
        """What `vzrepro lock` resolves with."""
        import datetime as dt

        from vzrepro.base import disk
        from vzrepro.realize import pin
        from vzrepro.sources.keyring import KEYRING

        return pin.Pinner(
            root=self.root,
            platform=self.config.platform,
            mirrors=self.mirrors,
            keyring=self.config.debian_keyring or KEYRING,
            downloads=self.config.store / disk.PRIVATE / "downloads",
            now=dt.datetime.now(dt.UTC),
            update=update,
            allow_expired=allow_expired,
            say=lambda line: self.console.report(Notice("info", line)),
            report=self.console.report,
            max_bytes=self.config.download_bytes(),
            stop=self.stop,
        )

    def check_lock(self) -> tuple[int, list[str]]:
        """How many pins the recipes ask for, and what is wrong with the lock, a line each. Offline."""
        from vzrepro.realize import pin
        from vzrepro.recipe.confined import evaluate

        wants = evaluate(self.root, self.lock, self.config.platform, lenient=True).wants
        return len(wants), pin.check(wants, self.lock, self.config.platform)

    def check_repeatable(self) -> None:
        """Raise UsageError when a second evaluation, under other circumstances, does not give the same graph."""
        from vzrepro.recipe import repeat

        repeat.check(self.graph, self.lock_file, self.config.platform)

    def target(self, name: str) -> Node:
        """The node called `name`; a store path or object directory of this workspace's graph is understood too."""
        found = None if name in self.graph.targets else self.graph.at(Path(name).name)
        return found or self.graph.find(name)

    def path(self, name: str) -> StorePath:
        """The store path that `name` means: a store path, an object's directory, or a target."""
        from vzrepro.base.model import StorePath

        try:
            return StorePath.parse(Path(name).name)
        except UsageError:
            return self.graph.find(name).path

    def names(self) -> list[str]:
        """What can be realized, for a shell to complete: at once where nothing has changed. What is wrong with the
        workspace is for the command to say."""
        from vzrepro import noop

        found = noop.names(str(self.start), os.environ)
        if found is None:
            try:
                found = list(self.graph.targets)
                noop.remember_names(str(self.root), os.environ, self._begun_ns, self._reads(), found)
            except (VzreproError, OSError):
                return []
        return found

    def remember_realized(self, nodes: Sequence[Node], found: Sequence[ObjectInfo]) -> None:
        """Have `realize` of these targets answered at once next time."""
        from vzrepro import noop

        places = {
            node.target: str(self.store.location(info.path))
            for node, info in zip(nodes, found, strict=True)
            # Of a download that its URLs did not give, they are asked again each time.
            if node.origin is None or self.store.known_origin(info.path, node.origin)
        }
        noop.remember_realized(str(self.root), os.environ, self._begun_ns, self._reads(), places)

    def remember(self, words: Sequence[str], text: str) -> None:
        """Have the command `words`, which depends on the graph and on what is in the store, say `text` at once next
        time."""
        from vzrepro import noop

        noop.remember(
            str(self.root),
            os.environ,
            self._begun_ns,
            self._reads(),
            str(self.store.root),
            str(self.store.database_file),
            words,
            text,
            terminal=sys.stdout.isatty(),
        )

    def _reads(self) -> list[str]:
        """The files and directories that the graph and the configuration depend on, and the program's own."""
        import vzrepro
        from vzrepro.base.config import USER_FILE

        package = Path(vzrepro.__file__).parent.rglob("*.py")
        return list(map(str, (*self.graph.reads, self.lock_file, self.root / "pyproject.toml", USER_FILE, *package)))


@dataclass(slots=True)
class LongWork:
    """What `Session.long_work` shows while it lasts; most of what comes too often is left out. Call from any thread."""

    report: Report
    path: str
    said: float = 0.0

    def progress(self, done: int, total: int) -> None:
        """So many bytes of so many."""
        if self._may_say():
            self.report(Progress("cache", self.path, done, total))

    def line(self, text: str) -> None:
        """What is being done."""
        if self._may_say():
            self.report(LogLine("cache", self.path, text))

    def _may_say(self) -> bool:
        now = time.monotonic()
        if now - self.said < _SAY_SECS:
            return False
        self.said = now
        return True


def _keys(setting: str, texts: Sequence[str]) -> list[PublicKey]:
    from vzrepro.base.signing import PublicKey

    try:
        return [PublicKey.parse(text) for text in texts]
    except UsageError as error:
        raise UsageError(
            f"{setting}: {error.message}", reason=error.reason, hint="vzrepro key public FILE prints it"
        ) from error
