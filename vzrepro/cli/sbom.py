"""`vzrepro sbom`: write a target's bill of materials, compare two, and read the facts that they rest on."""

from __future__ import annotations

from pathlib import Path

import click

from vzrepro.base import disk, words
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice, Progress, Started, working
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.proof.sbom import compare, facts, formats, licences, output
from vzrepro.proof.sbom.components import Bill, describe
from vzrepro.proof.sbom.learn import learn


@click.command()
@click.argument("names", metavar="TARGET…", nargs=-1, shell_complete=complete_targets)
@click.option("--format", "form", type=click.Choice(list(formats.FORMATS)), help="[default: cyclonedx]")
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write there, not to stdout.")
@click.option("--built", is_flag=True, help="With the hashes of what was built; TARGET must be in the store.")
@click.option("--diff", is_flag=True, help="Compare two, each a target or a file of either format; exit 1 if unequal.")
@click.option("--learn", "reading", is_flag=True, help="Read licences from downloads that are here into sbom.toml.")
@json_option
@click.pass_obj
def sbom(
    session: Session,
    names: tuple[str, ...],
    form: str | None,
    file: Path | None,
    built: bool,
    diff: bool,
    reading: bool,
) -> int | None:
    """Write TARGET's bill of materials. It tells all that TARGET is made of, and all that built it.

    A function of the workspace alone: the same on every machine, whether or not anything was built or downloaded
    there. With --diff, compare two bills. With --learn, look into the downloads of TARGETs (or of everything) for
    licences, and keep them in sbom.toml.
    """
    licences.check_installed()
    if diff or reading:
        if form or file or built or (diff and reading):
            raise UsageError("--diff and --learn go with no other option but --json", hint="see: vzrepro sbom --help")
        if diff:
            return _compare(session, names)
        _learn(session, names)
        return None
    if len(names) != 1:
        raise UsageError(
            "name one target", hint="vzrepro sbom container-bundle --format spdx --output bundle.spdx.json"
        )
    target = session.target(names[0])
    came_out = output.read_output(session.store, target) if built else None
    known = facts.load(session.root / facts.FILE)
    bill = describe(session.graph, session.lock, target, known, came_out)
    _warn(session, bill)
    document = formats.FORMATS[form or "cyclonedx"](bill)
    text = formats.render(document)
    if file is None:
        session.console.print_text(text, document)
    else:
        _write(file, text)
        session.console.report(Notice("info", f"{file}: {words.plural(len(bill.components), 'component')}"))
    return None


def _warn(session: Session, bill: Bill) -> None:
    if bill.unread:
        session.warn(
            f"{len(bill.unread)} of {words.plural(len(bill.components), 'component')} without a licence, since nobody "
            "has looked there yet, and build dependencies of crates count as contained: vzrepro sbom --learn "
            f"{bill.target.name}"
        )


def _write(file: Path, text: str) -> None:
    try:
        disk.write_file(file, text.encode(), durable=False)
    except OSError as error:
        raise VzreproError(f"{file} cannot be written", reason=error.strerror) from error


# --- --learn ----------------------------------------------------------------------------------------------------------


def _learn(session: Session, names: tuple[str, ...]) -> None:
    targets = [session.target(name) for name in names] or list(session.graph.targets.values())
    file = session.root / facts.FILE
    known = facts.load(file)
    report = session.console.report
    with working(report, Started(facts.FILE, str(file), "check")):
        learned = learn(
            session.graph,
            targets,
            session.store,
            known,
            progress=lambda done, total: report(Progress(facts.FILE, str(file), done, total)),
        )
    text = facts.render(learned.facts)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        _write(file, text)
    session.console.report(
        Notice("info", f"{facts.FILE}: {words.plural(len(learned.facts), 'file')}, {learned.read} of them new")
    )
    if learned.absent:
        raise VzreproError(
            words.plural(len(learned.absent), "download is", "downloads are") + " not in the store, so not read",
            reason=", ".join(learned.absent),
            hint=f"vzrepro realize {' '.join(learned.absent)} && vzrepro sbom --learn {' '.join(names)}".rstrip(),
        )


# --- --diff -----------------------------------------------------------------------------------------------------------


def _compare(session: Session, names: tuple[str, ...]) -> int:
    if len(names) != 2:
        raise UsageError("--diff compares two", hint="vzrepro sbom --diff old.cdx.json container-bundle")
    before, after = (_items(session, name) for name in names)
    changes = compare.compare(before, after)
    rows: list[tuple[str, str, str, str | None, str | None]] = []
    for change in changes:
        if change.verb == "changed":
            rows += [(change.verb, change.key, name, *values) for name, values in change.differences.items()]
        else:
            item = change.before or change.after
            assert item is not None  # one of the two
            what, value = ("version", item.version) if item.version else ("hash", item.hash)
            rows.append((change.verb, change.key, what, *((value, None) if change.before else (None, value))))
    if rows:
        session.console.print_table(("change", "component", "what", "before", "after"), rows)
    else:
        session.console.report(Notice("info", f"{names[0]} and {names[1]} are made of the same"))
    return 1 if changes else 0


def _items(session: Session, name: str) -> list[compare.Item]:
    path = Path(name)
    if path.is_file():
        return compare.parse(path.read_bytes(), name)
    bill = describe(session.graph, session.lock, session.target(name), facts.load(session.root / facts.FILE))
    return compare.parse(formats.render(formats.FORMATS["cyclonedx"](bill)).encode(), name)
