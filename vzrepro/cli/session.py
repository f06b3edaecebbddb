"""One command's view of the world: workspace, configuration, lock, graph, store and realizer, each made when needed."""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import vzrepro
from vzrepro import fetch, noop
from vzrepro import lock as locks
from vzrepro.cache.backend import Backend
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.machine import machine_cache
from vzrepro.cache.places import is_writable, open_backend
from vzrepro.cache.remote import Patience
from vzrepro.cache.signing import PublicKey, SigningKey, TrustedKeys
from vzrepro.config import USER_FILE, Config, find_workspace, load
from vzrepro.console import Console
from vzrepro.errors import UsageError
from vzrepro.evaluate import DrvGraph, evaluate
from vzrepro.events import Action, Finished, LogLine, Notice, Progress, Report, Started
from vzrepro.lock import Lock
from vzrepro.model import DrvHash, ObjectInfo, Outcome, StorePath
from vzrepro.realize import Realizer, Substitute
from vzrepro.recipe import Node
from vzrepro.store import LocalStore
from vzrepro.wire import Stop

if TYPE_CHECKING:
    from vzrepro.pin import Pinner


_SAY_SECS = 0.25


class Session:
    """Lazily made parts; `start` is where the workspace is looked for. What works or waits in other threads looks at
    `stop`, which is set when the command is to end."""

    def __init__(self, console: Console, stop: Stop, start: Path) -> None:
        self.console = console
        self.stop = stop
        self.start = start
        self._overrides: dict[str, object] = {}
        self._begun_ns = time.time_ns()

    def override(self, **settings: object) -> None:
        """Let options win over the configuration; None says nothing. Before the configuration is first used."""
        self._overrides.update({key: value for key, value in settings.items() if value is not None})

    @cached_property
    def root(self) -> Path:
        """The workspace."""
        return find_workspace(self.start)

    def in_workspace(self) -> bool:
        """Whether there is a workspace. Where there is none, the start directory stands in for it from now on: for
        what needs the configuration alone."""
        try:
            return self.root.is_dir()
        except UsageError:
            self.root = self.start.resolve()
            return False

    @cached_property
    def config(self) -> Config:
        """The settings, options included."""
        return load(self.root).model_copy(update=self._overrides)

    @property
    def lock_file(self) -> Path:
        """The workspace's lock."""
        return self.root / "lock.toml"

    @cached_property
    def lock(self) -> Lock:
        """All pins."""
        return locks.load(self.lock_file)

    @cached_property
    def graph(self) -> DrvGraph:
        """The evaluated recipes."""
        return evaluate(self.root, self.lock, self.config.platform)

    @cached_property
    def store(self) -> LocalStore:
        """The local store."""
        return LocalStore(self.config.store)

    @cached_property
    def mirrors(self) -> fetch.Mirrors:
        """Where `mirror://` names are."""
        return fetch.Mirrors.of_host(self.config.mirrors, os.environ, get=fetch.get)

    @cached_property
    def trusted(self) -> TrustedKeys:
        """The keys whose objects are taken from shared caches, those that are revoked, and how many must agree."""
        return TrustedKeys(
            _keys("trusted-keys", self.config.trusted_keys),
            revoked=_keys("revoked-keys", self.config.revoked_keys),
            required=self.config.require_signatures,
        )

    @cached_property
    def upload_key(self) -> SigningKey | None:
        """The key that signs what is pushed to a shared cache; None when there is none."""
        return None if self.config.upload_key is None else SigningKey.load(self.config.upload_key)

    @property
    def push_to(self) -> str | None:
        """The shared cache that is written to: the one configured, else the first that can be."""
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
        patience = Patience(self.config.cache_patience_secs, stop=self.stop)
        return open_backend(url, patience, self.root)

    def cache(self, url: str, signer: SigningKey | None = None) -> BinaryCache:
        """The shared cache at `url`, to be written to if there is a signer."""
        return BinaryCache(self.backend(url), self.trusted, signer, warn=self.warn)

    @cached_property
    def shared_caches(self) -> list[BinaryCache]:
        """The configured caches, in order; the one that is pushed to can be written if there is an upload key."""
        urls = list(dict.fromkeys(self.config.caches))
        if self.push_to is not None and self.upload_key is not None and self.push_to not in urls:
            urls.append(self.push_to)
        return [self.cache(url, self.upload_key if url == self.push_to else None) for url in urls]

    @cached_property
    def caches(self) -> list[BinaryCache]:
        """The machine's own cache, unless it is turned off, and the shared ones."""
        return [*self._machine_caches(), *self.shared_caches]

    def _machine_caches(self) -> list[BinaryCache]:
        if not self.config.machine_cache:
            return []
        return [
            machine_cache(
                self.config.machine_cache_dir,
                self.config.key_dir,
                max_bytes=self.config.machine_cache_gib << 30,
                warn=self.warn,
            )
        ]

    @contextmanager
    def long_work(self, action: Action, path: str) -> Iterator[LongWork]:
        """Show the block as work on the cache at `path`."""
        begun = time.monotonic()
        report = self.console.report
        report(Started("cache", path, action))
        outcome = "failed"
        try:
            yield LongWork(report, path)
            outcome = "done"
        except KeyboardInterrupt:
            outcome = Outcome.INTERRUPTED.value
            raise
        finally:
            report(Finished("cache", path, action, outcome, time.monotonic() - begun))

    def warn(self, message: str) -> None:
        """Tell the user something that does not end the command."""
        self.console.report(Notice("warning", message))

    def attestations(self, drv_hash: DrvHash, url: str | None = None) -> dict[bytes, tuple[str, ...]]:
        """Every DSSE envelope about a derivation beside the store and in the caches (only that at `url`, if given), and
        where it is. Nobody has verified them; a cache that cannot be asked is told of."""
        from vzrepro.attest.shelf import Shelf, gather

        caches = self.caches if url is None else [self.cache(url)]
        return gather(drv_hash, Shelf(self.store), caches, lambda place, error: self.warn(f"{place}: {error.message}"))

    def realizer(self, *, substitute: Substitute = "all", keep_failed: bool = False) -> Realizer:
        """What executes plans, with this session's parts."""
        return Realizer(
            graph=self.graph,
            store=self.store,
            caches=self.caches,
            config=self.config,
            mirrors=self.mirrors,
            snapshot=self.lock.snapshot(),
            report=self.console.report,
            substitute=substitute,
            trusted=self.trusted,
            keep_failed=keep_failed,
            stop=self.stop,
        )

    def pinner(self, update: Sequence[str] | None, *, allow_expired: bool) -> Pinner:
        """What `vzrepro lock` resolves with."""
        from vzrepro import pin  # OpenPGP and the resolvers: only `lock` needs them

        return pin.Pinner(
            root=self.root,
            platform=self.config.platform,
            mirrors=self.mirrors,
            keyring=self.config.debian_keyring,
            downloads=self.config.store / ".vzrepro" / "downloads",
            now=dt.datetime.now(dt.UTC),
            update=update,
            allow_expired=allow_expired,
            say=lambda line: self.console.report(Notice("info", line)),
        )

    def check_lock(self) -> tuple[int, list[str]]:
        """How many pins the recipes ask for, and what is wrong with the lock, a line each. Offline."""
        from vzrepro import pin

        wants = evaluate(self.root, self.lock, self.config.platform, lenient=True).wants
        return len(wants), pin.check(wants, self.lock, self.config.platform)

    def target(self, name: str) -> Node:
        """The node called `name`; a store path or object directory of this workspace's graph is understood too."""
        if name not in self.graph.targets:
            base = Path(name).name
            for node in self.graph.nodes.values():
                if node.path.base == base:
                    return node
        return self.graph.find(name)

    def path(self, name: str) -> StorePath:
        """The store path that `name` means: a store path, an object's directory, or a target."""
        try:
            return StorePath.parse(Path(name).name)
        except UsageError:
            return self.graph.find(name).path

    def remember(self, nodes: Sequence[Node], found: Sequence[ObjectInfo]) -> None:
        """Write the evaluation cache, so that the same command is answered at once next time."""
        package = Path(vzrepro.__file__).parent
        reads = {
            *self.graph.reads,
            self.lock_file,
            self.root / "pyproject.toml",
            USER_FILE,
            *package.glob("*.py"),
        }
        noop.remember(
            str(self.root),
            os.environ,
            self._begun_ns,
            map(str, reads),
            {node.target: str(self.store.location(info.path)) for node, info in zip(nodes, found, strict=True)},
        )


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
    try:
        return [PublicKey.parse(text) for text in texts]
    except UsageError as error:
        raise UsageError(
            f"{setting}: {error.message}", reason=error.reason, hint="vzrepro key public FILE prints it"
        ) from error
