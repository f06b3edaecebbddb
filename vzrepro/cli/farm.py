"""`vzrepro farm …`: serve a farm, see what it does, and have it build; and how `realize` comes to one."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vzrepro.base import version
from vzrepro.base.errors import Interrupted, UsageError, VzreproError
from vzrepro.base.events import Notice, Result
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs

if TYPE_CHECKING:
    from vzrepro.base.model import ObjectInfo, StorePath
    from vzrepro.base.signing import TrustedKeys
    from vzrepro.cache.writer import CacheWriter
    from vzrepro.farm.order import Order, OrderAnswer
    from vzrepro.farm.run import Count, FarmRun, Queue
    from vzrepro.farm.temporal.client import FarmClient
    from vzrepro.farm.temporal.server import FarmServer
    from vzrepro.farm.workshop import Attempt, AuditRebuild, Workshop
    from vzrepro.proof.attest.policy import Policy
    from vzrepro.proof.audit.afar import RemoteRebuilds
    from vzrepro.recipe.graph import Node
    from vzrepro.sandbox import Runtime

F = TypeVar("F", bound=Callable[..., Any])

_COMMAND = "command:"
_ENOUGH = 1 << 30  # bytes without which a machine takes no builds after one has failed for want of something


@click.group(cls=Verbs)
def farm() -> None:
    """Build on other machines, or for others. Orders go through a Temporal server, everything else through the cache.

    URL is temporal://HOST:PORT/NAMESPACE; by default the setting farm. ID is what `farm list` shows.
    """


def on_option(function: F) -> F:
    """`--on URL`, which `_server` completes."""
    return click.option("--on", metavar="URL", help="The farm; by default the setting farm.")(function)


# --- for realize ------------------------------------------------------------------------------------------------------


def farm_run(
    session: Session, place: str, *, builders: int = 1, policy: Policy | None = None, dry_run: bool = False
) -> FarmRun:
    """A run whose builds go to the farm at `place`, each to `builders` of it, as the `policy` tells them apart. With
    `dry_run`, none is connected to."""
    from vzrepro.farm.run import JOBS, FarmRun

    cache = _shared_cache(session)
    if builders > 1 and place.startswith(_COMMAND):
        raise UsageError("--builders needs a farm on Temporal", reason="a command does not say who has built it")
    count = counting(session.trusted, cache, builders, policy) if builders > 1 else None
    queue = _NoQueue() if dry_run else _queue(session, place)
    return FarmRun(session.realizer(), cache, queue, session.upload_key, session.config.jobs or JOBS, count)


@contextmanager
def farm_rebuilds(session: Session, on: str) -> Iterator[RemoteRebuilds]:
    """Rebuilds by the workers of a farm, for an audit."""
    import secrets

    from vzrepro.farm.run import Lines
    from vzrepro.proof.audit.afar import RemoteRebuilds

    if on.startswith(_COMMAND):
        raise UsageError("audits need a farm on Temporal", reason="a command does not say what it has found")
    run = farm_run(session, on)

    def place(node: Node, infos: Mapping[StorePath, ObjectInfo], question: str, say: Callable[[str], None]) -> bytes:
        worker, report = run.rebuild(node, infos, question, Lines(say, run.cache, node))
        say(f"({worker} has rebuilt it)")
        return report

    try:
        yield RemoteRebuilds(
            run.realizer,
            run.cache,
            [key for key in session.trusted.keys if key.raw not in {each.raw for each in session.trusted.revoked}],
            run.jobs,
            run.supply,
            place,
            run.kept,
            f"workers, asked by {secrets.token_hex(8)}",
        )
    finally:
        run.queue.close()


def counting(trusted: TrustedKeys, cache: CacheWriter, builders: int, policy: Policy | None = None) -> Count:
    """Counts the votes that the cache has, of which so many must agree: by the policy's operators or, without one, each
    trusted key is a builder. Raises UsageError when there are fewer."""
    from dataclasses import replace

    from vzrepro.farm.run import Standing
    from vzrepro.proof.attest.ballots import FoundEnvelope, read
    from vzrepro.proof.attest.policy import Policy
    from vzrepro.proof.attest.votes import count, unanimous

    if policy is None:
        rules = Policy.of_keys(trusted.keys, revoked=trusted.revoked, threshold=builders)
    else:
        rules = replace(policy, threshold=builders, thresholds=())

    def standing(node: Node) -> Standing:
        found = [FoundEnvelope(cache.url, data) for data in cache.reader.attestations(node.drv_hash)]
        tally = count(read(found, rules).votes, rules, node.target, node.drv_hash)
        agreed = unanimous(tally)
        if agreed is None:
            return Standing(None, 0, ())
        keys = rules.beside(vote.key for votes in agreed.voters.values() for vote in votes)
        ids = tuple(sorted({key.id for key in keys}))
        return Standing(agreed.nar_hash if tally.enough else None, agreed.weight, ids)

    return standing


def _queue(session: Session, place: str) -> Queue:
    if place.startswith(_COMMAND):
        from vzrepro.farm.command import CommandQueue

        return CommandQueue(place.removeprefix(_COMMAND).strip())
    return _client(session, place)


class _NoQueue:
    """For plans, which order nothing."""

    def place(self, *_anything: object) -> OrderAnswer | None:
        raise AssertionError("a plan orders nothing")

    def farewell(self, *_anything: object) -> str | None:
        return None

    def close(self) -> None:
        pass


def _shared_cache(session: Session) -> CacheWriter:
    """The cache through which clients and workers give each other everything. Each time a new one: a cache that erred
    is not asked again, and a worker goes on for weeks."""
    if session.upload_key is None or session.push_to is None:
        missing = "upload-key" if session.upload_key is None else "push-to"
        raise UsageError(
            "a farm needs a shared cache that this machine can write to",
            reason=f"{missing} is not configured",
            hint="vzrepro key generate NAME --out FILE, then upload-key, caches and trusted-keys (docs/farm.md)",
        )
    return session.writer(session.push_to, session.upload_key)


def _server(session: Session, on: str | None) -> FarmServer:
    """The Temporal server that is meant; temporalio is imported from here on."""
    url = on or session.config.farm
    if url is None:
        raise UsageError("no farm is configured", hint='name one (--on URL), or set farm = "temporal://…"')
    if url.startswith(_COMMAND):
        raise UsageError(
            "this farm is a command, and knows nothing of its builds", hint="ask what the command hands builds to"
        )
    try:
        from vzrepro.farm.temporal.server import FarmServer
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "temporalio":
            raise
        raise UsageError(
            "a farm on Temporal needs a package that is not installed: temporalio",
            reason="it is an extra, which nothing else needs",
            hint=f"install it with: {version.adding('temporalio')}",
        ) from error
    return FarmServer.of(url, session.config)


def _client(session: Session, on: str | None) -> FarmClient:
    server = _server(session, on)
    from vzrepro.farm.temporal.client import FarmClient

    return FarmClient(server)


# --- building for others ----------------------------------------------------------------------------------------------


def _clients(session: Session) -> TrustedKeys | None:
    from vzrepro.base.signing import PublicKey, TrustedKeys

    keys = session.config.farm_clients
    return TrustedKeys([PublicKey.parse(text) for text in keys]) if keys else None


def _workshop(
    session: Session, name: str, platforms: tuple[str, ...] = (), rebuild: AuditRebuild | None = None
) -> Workshop:
    from functools import partial

    from vzrepro.farm.workshop import Workshop
    from vzrepro.proof.attest.witness import pushed_along

    return Workshop(
        name=name,
        store=session.store,
        config=session.config,
        cache=_shared_cache(session),
        trusted=session.trusted,
        mirrors=session.mirrors,
        provenance=partial(pushed_along, session.store),
        clients=_clients(session),
        platforms=platforms,
        rebuild=rebuild,
    )


def _rebuilding(session: Session, runtime: Runtime) -> AuditRebuild:
    """How this machine builds again for audits; the tools are made by the first one."""
    from vzrepro.proof.audit.afar import Rebuilding
    from vzrepro.proof.audit.axes import TOOLS_TARGET

    lock = threading.Lock()

    def tools() -> Path | None:
        with lock:
            if (toolbox := session.tools) is None:
                return None
            [made] = toolbox.realize([toolbox.graph.find(TOOLS_TARGET)])
            return session.store.location(made.path)

    assert session.upload_key is not None  # a worker has one
    return Rebuilding(session.upload_key, runtime, session.config.build_cores(), tools, session.warn).rebuild


def _name(given: str | None) -> str:
    from vzrepro.farm.order import worker_name

    return worker_name(given or socket.gethostname().partition(".")[0])


@farm.command()
@on_option
@click.option("--platform", "platforms", multiple=True, metavar="P", help="Build for P (linux/amd64); may be repeated.")
@click.option(
    "--class", "sizes", multiple=True, type=click.Choice(["small", "large"]), help="Take this class of builds."
)
@click.option("--jobs", type=click.IntRange(1), help="Builds that run at the same time.")
@click.option("--cores", type=click.IntRange(1), help="Cores one build may use.")
@click.option("--name", help="What this worker is called; by default as its host.")
@click.option("--metrics", metavar="HOST:PORT", help="Serve the SDK's metrics for Prometheus there.")
@json_option
@click.pass_obj
def worker(
    session: Session,
    on: str | None,
    platforms: tuple[str, ...],
    sizes: tuple[str, ...],
    jobs: int | None,
    cores: int | None,
    name: str | None,
    metrics: str | None,
) -> None:
    """Build what clients order.

    SIGTERM, Ctrl-C or `farm drain` end it when what it builds is finished. A second Ctrl-C ends the builds too, and
    gives them back. Inputs are taken on the word of trusted-keys alone, and outputs signed with upload-key.
    """
    from vzrepro import sandbox
    from vzrepro.farm.order import SIZES

    session.do_without_workspace()
    session.override(jobs=jobs, cores=cores)
    server = _server(session, on)
    name = _name(name)
    chosen = platforms or (session.config.platform,)
    _workshop(session, name)  # says what is missing before anything is taken
    runtime = sandbox.check()
    sandbox.sweep()
    from vzrepro.farm.temporal.worker import FarmWorker

    rebuild = _rebuilding(session, runtime)

    def build(order: Order, attempt: Attempt) -> OrderAnswer:
        return _workshop(session, name, chosen, rebuild).build(order, attempt)

    def healthy() -> None:
        sandbox.check()
        if shutil.disk_usage(session.config.store).free < _ENOUGH:
            raise VzreproError(f"the disk of {session.config.store} is full", hint="vzrepro store gc")

    serving = FarmWorker(
        server=server,
        name=name,
        platforms=chosen,
        sizes=[size for size in SIZES if not sizes or size in sizes],
        jobs=session.config.build_jobs(),
        build=build,
        healthy=healthy,
        memory_bytes=runtime.memory_bytes,
        key_id=session.upload_key.public.id if session.upload_key is not None else "",
        metrics=metrics,
        say=lambda line: session.console.report(Notice("info", line)),
    )
    with _guard():
        serving.serve()


@contextmanager
def _guard() -> Iterator[None]:
    """While the block runs, a process waits for this one to die, whatever kills it, and removes its containers then."""
    command = [sys.executable, "-c", "from vzrepro.farm.guard import main; main()"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(b"all containers are gone")


@farm.command()
@click.argument("drv")
@json_option
@click.pass_obj
def build(session: Session, drv: str) -> None:
    """Build one derivation, from and to the cache. It is what a command adapter runs on some machine.

    DRV is the hash of a derivation, which the cache has; `farm build` ends with the exit codes of `realize`.
    """
    from vzrepro import sandbox
    from vzrepro.base.model import DrvHash
    from vzrepro.farm.workshop import Attempt

    try:
        wanted = DrvHash(drv)
    except ValueError as error:
        raise UsageError(
            f"{drv!r} is not the hash of a derivation", hint="64 hex digits; vzrepro show TARGET"
        ) from error
    session.do_without_workspace()
    workshop = _workshop(session, _name(None))
    sandbox.check()
    sandbox.sweep()
    session.console.verbose = True  # whoever has ordered it reads the build's lines there
    answer = workshop.build_drv(wanted, Attempt(stop=session.stop, report=session.console.report))
    location = session.store.location(answer.path)
    session.console.report(Result(answer.path.name, str(answer.path), str(location)))


# --- seeing and saying ------------------------------------------------------------------------------------------------


@farm.command()
@on_option
@json_option
@click.pass_obj
def status(session: Session, on: str | None) -> None:
    """Show the workers, and what runs and waits for them."""
    session.do_without_workspace()
    with _client(session, on) as client:
        from vzrepro.farm.temporal import overview

        rows = overview.queues(client)
    columns = ("queue", "workers", "building", "waiting", "names")
    session.console.print_table(columns, [tuple(row) for row in rows])


@farm.command("list")
@on_option
@click.option("--all", "ended", is_flag=True, help="Also builds that have ended, the latest first.")
@json_option
@click.pass_obj
def list_(session: Session, on: str | None, ended: bool) -> None:
    """List the builds that are under way."""
    session.do_without_workspace()
    with _client(session, on) as client:
        from vzrepro.farm.temporal import overview

        rows = overview.builds(client, ended=ended)
    session.console.print_table(("id", "state", "worker", "since", "phase"), [tuple(row) for row in rows])


@farm.command()
@click.argument("id_", metavar="ID")
@on_option
@json_option
@click.pass_obj
def attach(session: Session, id_: str, on: str | None) -> None:
    """Follow a build to its end. Ctrl-C leaves it alone."""
    from vzrepro.farm.run import following_build

    session.do_without_workspace()
    cache = _shared_cache(session)
    with _client(session, on) as client:
        from vzrepro.farm.temporal import overview

        try:
            with following_build(session.console.report, cache, overview.order_of(client, id_)) as display:
                answer = client.follow(id_, display, session.stop)
                display.done(None, answer)
        except (Interrupted, KeyboardInterrupt):
            session.stop.set()
            session.console.report(Notice("info", f"cancel it with: vzrepro farm cancel {id_}"))
            raise
    session.console.print_text(str(answer.path), answer.document())


@farm.command()
@click.argument("id_", metavar="ID")
@on_option
@json_option
@click.pass_obj
def cancel(session: Session, id_: str, on: str | None) -> int:
    """End a build, unless others wait for it. Its container is gone when this is done."""
    session.do_without_workspace()
    with _client(session, on) as client:
        others = client.cancel(id_)
    if others:
        session.console.report(Notice("warning", f"{id_} goes on: {', '.join(others)} wait for it"))
        return 1
    session.console.report(Notice("info", f"{id_} is cancelled"))
    return 0


@farm.command()
@click.argument("worker_name", metavar="WORKER")
@on_option
@json_option
@click.pass_obj
def drain(session: Session, worker_name: str, on: str | None) -> None:
    """Have WORKER finish what it builds, take nothing more, and end."""
    session.do_without_workspace()
    from vzrepro.farm.order import worker_name as checked

    with _client(session, on) as client:
        running = client.drain(checked(worker_name))
    rest = f"; it still builds {', '.join(running)}" if running else ""
    session.console.report(Notice("info", f"{worker_name} takes nothing more{rest}"))
