"""`vzrepro realize` and `vzrepro shell`: the verbs that build."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vzrepro.base import words
from vzrepro.base.errors import UsageError
from vzrepro.base.events import Result
from vzrepro.cli.options import complete_targets, json_option, signatures_option
from vzrepro.cli.session import Session

if TYPE_CHECKING:
    from vzrepro.realize.inventory import Substitute
    from vzrepro.recipe.plan import Plan, Step


@click.command()
@click.argument("targets", nargs=-1, required=True, shell_complete=complete_targets)
@click.option("--dry-run", is_flag=True, help="Print the plan: what, why, how long, how many bytes. Do nothing.")
@click.option("--jobs", type=click.IntRange(1), help="Builds that run at the same time.")
@click.option("--cores", type=click.IntRange(1), help="Cores one build may use.")
@click.option("--keep-failed", is_flag=True, help="Keep /build of a failed build and print how to enter it.")
@click.option("--on", metavar="URL", help="Have it built by the farm at URL (docs/farm.md); `here`: on this machine.")
@click.option(
    "--builders",
    type=click.IntRange(1, 8),
    default=1,
    show_default=True,
    help="With a farm: workers with different keys that must get the same.",
)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --builders: who they are, and what must differ (docs/policy.md).",
)
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
    on: str | None,
    builders: int,
    policy_file: Path | None,
    no_substitute: bool,
    sources_from_cache: bool,
    require_signatures: int | None,
    out_link: Path | None,
) -> None:
    """Make TARGETS valid in the store and print where they are. One path per line."""
    session.override(jobs=jobs, cores=cores, require_signatures=require_signatures)
    if sources_from_cache and not no_substitute:
        raise UsageError(
            "--sources-from-cache without --no-substitute", reason="without it everything may come from caches"
        )
    substitute: Substitute = "all" if not no_substitute else "sources" if sources_from_cache else "none"
    if out_link is not None and len(targets) != 1:
        raise UsageError("--out-link needs exactly one target", hint="realize the targets one by one")
    nodes = [session.target(name) for name in targets]
    place = None if on == "here" else on or session.config.farm
    if place is not None and (no_substitute or keep_failed):
        raise UsageError(
            "--no-substitute and --keep-failed are for builds on this machine",
            reason=f"{place} builds, and what it gives comes through the cache",
            hint="add: --on here",
        )
    if builders > 1 and place is None:
        raise UsageError(
            "--builders needs a farm", reason="this machine is one builder", hint="name one: --on temporal://…"
        )
    if policy_file is not None and builders == 1:
        raise UsageError("--policy says who several builders are", hint="add: --builders 2")
    if place is not None:
        from vzrepro.cli.farm import farm_run

        policy = None
        if policy_file is not None:
            from vzrepro.cli.verify import read_policy

            policy, _ = read_policy(session, session.has_workspace(), policy_file)
        run = farm_run(session, place, builders=builders, policy=policy, dry_run=dry_run)
        if dry_run:
            _print_plan(session, run.plan(nodes), None, place)
            return
        found = run.realize(nodes)
    elif dry_run:
        from vzrepro.recipe.plan import make_plan

        plan = make_plan(session.graph, nodes, session.inventory(substitute=substitute))
        _print_plan(session, plan, session.config.build_jobs())
        return
    else:
        found = session.realizer(substitute=substitute, keep_failed=keep_failed).realize(nodes)
    if out_link is not None:
        session.store.add_root(Path.cwd() / out_link, found[0].path)
    for node, info in zip(nodes, found, strict=True):
        session.console.report(Result(node.target, str(info.path), str(session.store.location(info.path))))
    session.remember_realized(nodes, found)


def _print_plan(session: Session, plan: Plan, jobs: int | None, farm: str | None = None) -> None:
    """Print what is to be done, and how long it takes with `jobs` builds at once; with a `farm`, what goes there."""
    from vzrepro.farm.order import size_class
    from vzrepro.realize.schedule import planned

    def where(step: Step) -> str:
        if farm is None or step.verb not in ("build", "image"):
            return step.reason
        return f"{step.reason}; a worker for {step.node.drv.platform} ({size_class(step.node)}) builds it"

    rows = [
        (
            step.verb,
            step.node.target,
            words.size(step.download_bytes) if step.download_bytes else None,
            words.duration(step.expected_secs) if step.expected_secs is not None else None,
            where(step),
        )
        for step in plan.todo()
    ]
    if not rows:
        session.console.print_text("nothing to do: all of it is in the store")
        return
    session.console.print_table(("action", "target", "download", "expected", "why"), rows)
    session.console.report(planned(plan, jobs))


@click.command()
@click.argument("target", shell_complete=complete_targets)
@click.pass_obj
def shell(session: Session, target: str) -> int:
    """Open a shell in TARGET's sandbox. It has the build's inputs, environment and limits."""
    import shlex
    import shutil
    import subprocess

    from vzrepro import sandbox

    node = session.target(target)
    if node.drv.builder != "sandbox":
        raise UsageError(f"{target!r} is not built in a sandbox", hint="see: vzrepro targets")
    realizer = session.realizer()
    realizer.realize(session.graph.inputs(node))
    with session.store.scratch(f"shell {node.target}") as scratch:
        inputs = session.graph.input_paths(node)
        job = realizer.maker.job(node, inputs, scratch)
        realizer.maker.load_image(node, inputs)
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
