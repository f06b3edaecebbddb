"""`vzrepro audit`: rebuild targets beside the store, one thing varied at a time, and show what came of it."""

from __future__ import annotations

import datetime as dt
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from vzrepro import console, sandbox
from vzrepro.base import words
from vzrepro.base.errors import BuildFailed, Interrupted, NotDeterministic, RemoteError, UsageError, VzreproError
from vzrepro.base.signing import SigningKey
from vzrepro.cache.machine import machine_key
from vzrepro.cli.options import DefaultVerb, complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.proof.audit import diff
from vzrepro.proof.audit.axes import AXES, TOOLS_TARGET, Axis
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.engine import Audit, AuditSubject, Request
from vzrepro.proof.audit.model import REPEAT, AuditedNode, AuditReport, Cell, Verdict
from vzrepro.proof.audit.rebuild import Rebuilder, memory_directory
from vzrepro.proof.audit.records import Record, Records
from vzrepro.proof.audit.report import Around, builder, compare_with_caches, make_report
from vzrepro.proof.audit.statements import StatementSigner
from vzrepro.recipe.graph import Node

_SHORT = 160  # characters of a reason in a table


@click.group(cls=DefaultVerb, default="run")
def audit() -> None:
    """Rebuild TARGETS and compare with what the store has.

    Every node is built on its registered inputs, so only a true origin is blamed. Exit code 104 when something differs,
    100 when something could not be built, else 0. A target that is called like a command: vzrepro audit -- NAME
    """


@audit.command("run")
@click.argument("targets", nargs=-1, required=True, shell_complete=complete_targets)
@click.option("--axes", "names", default="all", metavar="all|A,B,…", help="What is varied (see docs/audit.md).")
@click.option("--quick", is_flag=True, help="One rebuild with everything varied at once; it cannot tell causes.")
@click.option("--deep", is_flag=True, help="Write images and fetch downloads again, too.")
@click.option("--rounds", type=click.IntRange(1, 100), default=1, help="Different values for each axis.")
@click.option("--against", multiple=True, metavar="URL", help="Also compare with what this cache has; repeatable.")
@click.option(
    "--report",
    "folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write report.json and index.html there, too.",
)
@click.option("--fresh", is_flag=True, help="Rebuild what an earlier audit has rebuilt, too.")
@click.option(
    "--key", type=click.Path(path_type=Path), help="Sign with this secret key; else upload-key, or the machine's."
)
@click.option("--on", metavar="URL", help="Have the farm at URL rebuild, side by side (docs/farm.md).")
@click.option("--jobs", type=click.IntRange(1), help="Rebuilds that run at the same time.")
@click.option("--cores", type=click.IntRange(1), help="Cores one rebuild may use.")
@json_option
@click.pass_obj
def run(
    session: Session,
    targets: tuple[str, ...],
    names: str,
    quick: bool,
    deep: bool,
    rounds: int,
    against: tuple[str, ...],
    folder: Path | None,
    fresh: bool,
    key: Path | None,
    on: str | None,
    jobs: int | None,
    cores: int | None,
) -> None:
    """Rebuild TARGETS and compare with what is registered. All that they are built from is rebuilt, too.

    Every node is built on its registered inputs, so only a true origin is blamed. Exit code 104 when something differs,
    100 when something could not be built, else 0.
    """
    session.override(jobs=jobs, cores=cores)
    axes_asked = _chosen(names)
    if on is not None and (deep or cores):
        raise UsageError("--deep and --cores are for audits on this machine", reason=f"{on} rebuilds")
    nodes = tuple(session.target(name) for name in targets)
    if folder is not None:
        _prepare(folder)
    signing = _key(session, key)
    caches = [session.cache(url) for url in against]
    session.check_repeatable()
    request = Request(nodes, axes_asked, quick=quick, deep=deep, rounds=rounds, fresh=fresh)
    closure = session.graph.closure(nodes)
    _warn_of_typos(session, closure)
    axes = {axis.name: axis for axis in AXES}
    records = _records(session)
    toolbox = session.tools

    def explain(registered: Path, rebuilt: Path, scratch: Path, context: Mapping[str, tuple[str, str]]) -> str | None:
        try:
            explanation = diff.explain(registered, rebuilt, realizer=toolbox, scratch=scratch, context=context)
        except Interrupted:
            raise
        except (VzreproError, OSError) as error:
            session.warn(f"a difference could not be explained: {error}")
            return None
        records.keep_explanation(explanation)
        return explanation.id

    unlike: list[str] = []

    def cannot_compare(message: str) -> None:
        unlike.append(message)
        session.warn(message)

    started = _now()
    if on is not None:
        from vzrepro.cli.farm import farm_rebuilds

        described = {"key": str(signing.public), "keyId": signing.public.id, "farm": on}
        with farm_rebuilds(session, on) as remote:
            others = frozenset(key.id for key in remote.keys)
            found = Audit(request, remote, records, signing.public.id, explain, _signed_by_others, others).run()
    else:
        runtime = sandbox.check()
        described = builder(signing.public, runtime, session.config.build_cores())
        with _rebuilder(session, runtime, axes) as rebuilder:
            signer = StatementSigner(session.store, signing, described, axes, session.writers, session.warn)
            found = Audit(request, rebuilder, records, signing.public.id, explain, signer.sign).run()
    infos = {**found.infos, **session.store.query_many([node.path for node in closure])}
    around = Around(
        id=records.new_id(),
        started=started,
        finished=_now(),
        builder=described,
        history=tuple(past for past in records.history() if set(past.targets) & {node.target for node in nodes}),
        # Once work is to end, no cache answers any more.
        against=() if session.stop.is_set() else compare_with_caches(closure, caches, infos, cannot_compare),
        explanation=records.explanation,
    )
    report = make_report(request, found, session.graph, infos, around)
    place, lost = None, None
    try:
        from vzrepro.proof.audit import page  # and with it jinja2

        place = records.keep_report(report, page.render(report))
        place = _written_out(place, folder, report.id)
    except (VzreproError, OSError) as error:
        lost = error
    _print(session, report, place)
    # What was found says more than that its report could not be written. What ended the audit, such as a full disk,
    # meets the report as well.
    failure = found.error or _failure(report, place)
    if lost is not None and failure is None:
        raise lost
    if lost is not None and found.error is None:
        session.warn(_in_a_line(lost))
    if failure is None and unlike:
        failure = RemoteError(
            "not everything could be compared with --against",
            reason="\n".join(unlike),
            hint="the same command compares again, and rebuilds nothing",
        )
    if failure is not None:
        raise failure


@contextmanager
def _rebuilder(session: Session, runtime: sandbox.Runtime, axes: Mapping[str, Axis]) -> Iterator[Rebuilder]:
    """Rebuilds on this machine."""
    realizer = session.realizer()
    tools_place = None
    if (toolbox := session.tools) is not None:
        [made] = toolbox.realize([toolbox.graph.find(TOOLS_TARGET)])
        tools_place = session.store.location(made.path)
    with session.store.scratch("engine") as scratch:
        sharing = sandbox.sharing_of(scratch, runtime)
    with memory_directory() as in_memory:
        unmounted = None if sharing.mounts else sharing.reason
        world = World(runtime, tools_place, session.config.build_cores(), in_memory, unmounted)
        yield Rebuilder(realizer, world, axes)


def _signed_by_others(subject: AuditSubject, _record: Record) -> str | None:
    raise AssertionError(f"a worker has rebuilt {subject.node.target}, and signed that")


@audit.command()
@click.argument("target", required=False, shell_complete=complete_targets)
@json_option
@click.pass_obj
def history(session: Session, target: str | None) -> None:
    """List past audits of TARGET, or all of them, newest last."""
    name = None if target is None else session.target(target).target
    rows = [
        (past.id, past.finished, " ".join(past.targets), past.mode, past.verdict, _counts(past.nodes))
        for past in _records(session).history()
        if name is None or name in past.targets
    ]
    if not rows:
        session.console.print_text("no audit is known here" if name is None else f"no audit of {name} is known here")
        return
    session.console.print_table(("audit", "finished", "targets", "mode", "verdict", "nodes"), rows)


@audit.command()
@click.argument("audit_id", metavar="ID")
@click.option("--cells", is_flag=True, help="A line for each node and axis, with its reason.")
@click.option(
    "--report", "folder", type=click.Path(path_type=Path), metavar="DIR", help="Write report.json and index.html there."
)
@json_option
@click.pass_obj
def show(session: Session, audit_id: str, cells: bool, folder: Path | None) -> None:
    """Show a past audit again; ID may be the beginning of it."""
    if folder is not None:
        _prepare(folder)
    kept = _records(session).find(audit_id)
    file = kept / "report.json"
    report = AuditReport.parse(file.read_bytes(), str(file))
    if cells:
        rows = [
            (node.target, axis, str(cell.verdict), cell.together, _secs(cell.milliseconds), cell.reason)
            for node in report.nodes
            for axis, cell in node.cells.items()
        ]
        session.console.print_table(("node", "axis", "verdict", "together", "secs", "reason"), rows)
    place = _written_out(kept, folder, report.id)
    if not cells:
        _print(session, report, place)


def _records(session: Session) -> Records:
    return Records.beside(session.store, session.warn)


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _chosen(names: str) -> tuple[Axis, ...]:
    if names == "all":
        return AXES
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [axis.name for axis in AXES]
    if not wanted:
        raise UsageError("--axes names no axis", hint="with nothing varied: --axes repeat")
    for name in wanted:
        if name not in known and name != REPEAT:
            raise UsageError(f"no axis is called {name!r}", hint=f"there are: {', '.join((REPEAT, *known))}")
    return tuple(axis for axis in AXES if axis.name in wanted)


def _warn_of_typos(session: Session, nodes: Sequence[Node]) -> None:
    known = {axis.name for axis in AXES}
    for node in nodes:
        for name in sorted(node.constant.keys() - known):
            session.warn(f"{node.place}: constant: no axis is called {name!r}; there are: {', '.join(sorted(known))}")


def _key(session: Session, file: Path | None) -> SigningKey:
    if file is not None:
        return SigningKey.load(file)
    return session.upload_key or machine_key(session.config.key_dir)


# --- what is printed and written --------------------------------------------------------------------------------------


def _prepare(folder: Path) -> None:
    """Before hours of work: a directory to write into is new, empty, or an earlier report, and can be written."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is no directory", hint="name a new one: --report DIR")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").is_file():
            raise UsageError(f"{folder} has other files in it", hint="name a new directory: --report DIR")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"no report can be written to {folder}", reason=error.strerror, hint="name another directory: --report DIR"
        ) from error


def _in_a_line(error: VzreproError | OSError) -> str:
    return error.in_a_line if isinstance(error, VzreproError) else str(error)


def _written_out(kept: Path, folder: Path | None, audit_id: str) -> Path:
    """The directory where the user finds the report: the one asked for, else where it is kept."""
    if folder is None:
        return kept
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("report.json", "index.html"):
            if (kept / name).is_file():
                shutil.copyfile(kept / name, folder / name)
    except OSError as error:
        raise VzreproError(
            f"the report cannot be written to {folder}",
            reason=error.strerror,
            hint=f"it is kept: vzrepro audit show {audit_id} --report DIR",
        ) from error
    return folder


def _print(session: Session, report: AuditReport, place: Path | None) -> None:
    """The table for people; under `--json` the report as one object."""
    session.console.print_text("\n".join(_lines(report, place)), report.document())


def _lines(report: AuditReport, place: Path | None) -> list[str]:
    rows = [_row(node) for node in report.nodes if _is_audited(node)]
    lines = console.aligned(("node", "verdict", "axes", "causes", "time"), rows) if rows else []
    lines += [
        f"{node.target}: {cause.axis}: {cause.guess.evidence}; to mend it: {cause.guess.fix}"
        for node in report.nodes
        for cause in node.causes
        if cause.guess is not None
    ]
    lines += _notes(report)
    others = Counter(node.kind for node in report.nodes if not _is_audited(node))
    if others:
        named = ", ".join(words.plural(others[kind], each) for kind, each in _OTHERS.items() if others[kind])
        lines.append(f"UNTESTED: {named}" + ("" if report.deep else " (--deep makes images and downloads again)"))
    lines += _against(report)
    images = ", ".join(image.target for image in report.seed.images)
    lines.append(
        f"trusted binary seed: {report.seed.packages} .debs, {words.size(report.seed.bytes)}, in {images}"
        if report.seed.packages
        else "trusted binary seed: none"
    )
    if not report.complete:
        lines.append("incomplete: the same command goes on where this one ended")
    where = "" if place is None else f", report in {place / 'index.html'}"
    lines.append(f"audit {report.id}: {report.verdict}{where}")
    return lines


def _is_audited(node: AuditedNode) -> bool:
    return node.kind == "sandbox" or bool(node.rebuilds)


def _against(report: AuditReport) -> list[str]:
    lines = [
        f"{each.cache} has other bytes for {each.target}, signed by {', '.join(each.signers) or 'nobody'}"
        for each in report.against
        if each.agrees is False
    ]
    for cache in dict.fromkeys(each.cache for each in report.against):
        rows = [each for each in report.against if each.cache == cache]
        there = sum(each.nar_hash is not None for each in rows)
        same = sum(each.agrees is True for each in rows)
        lines.append(f"{cache} has {there} of {words.plural(len(rows), 'output')}, {same} of them equal to those here")
    return lines


_OTHERS = {"image": "toolchain image", "fetch": "download", "local": "local tree"}


def _row(node: AuditedNode) -> tuple[str, ...]:
    cells = Counter(str(cell.verdict) for cell in node.cells.values())
    causes = ", ".join(cause.axis for cause in node.causes)
    secs = sum(run.milliseconds for run in node.rebuilds) / 1000
    return node.target, str(node.verdict), _counts(cells), causes or "-", words.duration(secs)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict if counts.get(verdict))


def _notes(report: AuditReport) -> list[str]:
    """Every reason once, with the axes and nodes that it is of; but for differences that a cause is named for."""
    notes: dict[tuple[Verdict, str], dict[str, list[str]]] = {}
    for node in filter(_is_audited, report.nodes):
        causes = {cause.axis for cause in node.causes}
        for axis, cell in node.cells.items():
            if cell.reason is not None and axis not in causes:
                notes.setdefault((cell.verdict, cell.reason), {}).setdefault(axis, []).append(node.target)
    lines = []
    audited = sum(map(_is_audited, report.nodes))
    for (verdict, reason), places in notes.items():
        together: dict[tuple[str, ...], list[str]] = {}
        for axis, names in places.items():
            together.setdefault(tuple(names), []).append(axis)
        for targets, axes in together.items():
            of = "all nodes" if len(targets) == audited > 1 else ", ".join(targets)
            text = reason if len(reason) <= _SHORT else reason[:_SHORT] + " …"
            lines.append(f"{verdict}: {', '.join(axes)} of {of}: {text}")
    return lines


def _secs(milliseconds: int) -> float:
    return round(milliseconds / 1000, 1)


def _failure(report: AuditReport, place: Path | None) -> VzreproError | None:
    """The error that a finished audit ends with, whose page is in `place`; None when nothing differs and all could be
    built."""
    bad = [node for node in report.nodes if node.verdict is Verdict.DIFFERS]
    # Nothing to open when the report could not be written: why, a warning has said.
    hint = None if place is None else f"the report shows where and why: open {place / 'index.html'}"
    if bad:
        reasons = [f"{node.target}: {_why(node)}" for node in bad]
        names = ", ".join(node.target for node in bad)
        return NotDeterministic(f"not reproducible: {names}", reason="\n".join(reasons), hint=hint)
    other = [each for each in report.against if each.agrees is False]
    if other:
        names = ", ".join(dict.fromkeys(each.target for each in other))
        return NotDeterministic(
            f"a cache has other bytes: {names}",
            reason="\n".join(f"{each.cache}: {each.target} is {each.nar_hash}" for each in other),
            hint=hint,
        )
    failed = [node for node in report.nodes if node.verdict is Verdict.BUILD_FAILED]
    if failed:
        names = ", ".join(node.target for node in failed)
        reasons = [
            f"{node.target} with {axis} varied: {cell.reason}" if axis != REPEAT else f"{node.target}: {cell.reason}"
            for node in failed
            for axis, cell in node.cells.items()
            if cell.verdict is Verdict.BUILD_FAILED
        ]
        return BuildFailed(f"could not be built again: {names}", reason="\n".join(reasons) or None, hint=hint)
    return None


def _why(node: AuditedNode) -> str:
    if node.causes:
        return f"the cause is {' and '.join(cause.axis for cause in node.causes)}"
    cells: Sequence[Cell] = list(node.cells.values())
    return next((cell.reason for cell in cells if cell.reason and cell.rebuilds), "the cause is not known")
