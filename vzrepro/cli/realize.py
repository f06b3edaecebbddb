"""`vzrepro realize` and `vzrepro shell`: the verbs that build."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import click

from vzrepro import console, sandbox
from vzrepro.cli.options import json_option, signatures_option
from vzrepro.cli.session import Session
from vzrepro.errors import UsageError
from vzrepro.events import Result
from vzrepro.plan import Plan, make_plan
from vzrepro.realize import Substitute


@click.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Print the plan: what, why, how long, how many bytes. Do nothing.")
@click.option("--jobs", type=click.IntRange(1), help="Builds that run at the same time.")
@click.option("--cores", type=click.IntRange(1), help="Cores one build may use.")
@click.option("--keep-failed", is_flag=True, help="Keep /build of a failed build and print how to enter it.")
@click.option("--no-substitute", is_flag=True, help="Take nothing from caches: build everything that is not here.")
@click.option("--sources-from-cache", is_flag=True, help="With --no-substitute: downloads may come from caches.")
@signatures_option
@click.option("--out-link", type=click.Path(path_type=Path), help="Make this symbolic link to the (only) result.")
@json_option
@click.pass_obj
def realize(
    session: Session,
    targets: tuple[str, ...],
    dry_run: bool,
    jobs: int | None,
    cores: int | None,
    keep_failed: bool,
    no_substitute: bool,
    sources_from_cache: bool,
    require_signatures: int | None,
    out_link: Path | None,
) -> None:
    """Make TARGETS valid in the store and print where they are, one path per line."""
    session.override(jobs=jobs, cores=cores, require_signatures=require_signatures)
    if sources_from_cache and not no_substitute:
        raise UsageError(
            "--sources-from-cache without --no-substitute", reason="without it everything may come from caches"
        )
    substitute: Substitute = "all" if not no_substitute else "sources" if sources_from_cache else "none"
    if out_link is not None and len(targets) != 1:
        raise UsageError("--out-link needs exactly one target", hint="realize the targets one by one")
    nodes = [session.target(name) for name in targets]
    realizer = session.realizer(substitute=substitute, keep_failed=keep_failed)
    if dry_run:
        _print_plan(session, make_plan(session.graph, nodes, realizer))
        return
    found = realizer.realize(nodes)
    if out_link is not None:
        session.store.add_root(Path.cwd() / out_link, found[0].path)
    for node, info in zip(nodes, found, strict=True):
        session.console.report(Result(node.target, str(info.path), str(session.store.location(info.path))))
    session.remember(nodes, found)


def _print_plan(session: Session, plan: Plan) -> None:
    rows = [
        (
            step.verb,
            step.node.target,
            console.size(step.download_bytes) if step.download_bytes else None,
            console.duration(step.expected_secs) if step.expected_secs is not None else None,
            step.reason,
        )
        for step in plan.todo()
    ]
    if not rows:
        session.console.print_text("nothing to do: all of it is in the store")
        return
    session.console.print_table(("action", "target", "download", "expected", "why"), rows)


@click.command()
@click.argument("target")
@click.pass_obj
def shell(session: Session, target: str) -> int:
    """Open a shell in TARGET's sandbox, with its inputs, environment and limits."""
    node = session.target(target)
    if node.drv.builder != "sandbox":
        raise UsageError(f"{target!r} is not built in a sandbox", hint="see: vzrepro targets")
    realizer = session.realizer()
    realizer.realize([session.graph.nodes[dep] for dep in node.drv.dependencies()])
    with session.store.scratch(f"shell {node.target}") as scratch:
        job = realizer.job(node, scratch)
        realizer.load_image(node)
        sandbox.prepare(job)
        command = sandbox.shell_command(job)
        session.console.close()
        if shutil.which(command[0]) is None:
            raise UsageError(f"{command[0]} is not installed")
        try:
            return subprocess.run(command, env=os.environ, check=False).returncode
        finally:
            sandbox.discard(job)
            session.console.print_text(f"the command was: {shlex.join(node.drv.command)}")
