"""`vzrepro store …`: look at the local store, check it, mend it, clean it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vzrepro.base import words
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice, Result
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs

if TYPE_CHECKING:
    from vzrepro.base.model import ObjectInfo, StorePath


@click.group(cls=Verbs)
def store() -> None:
    """Work on the local store. OBJECT is a store path, its directory, or a target."""


def _info(session: Session, name: str) -> ObjectInfo:
    path = session.path(name)
    info = session.store.query(path)
    if info is None:
        raise UsageError(f"{path.base} is not in the store", hint=f"realize it: vzrepro realize {name}")
    return info


@store.command()
@click.argument("object", metavar="OBJECT", shell_complete=complete_targets)
@json_option
@click.pass_obj
def path(session: Session, object: str) -> None:
    """Print where OBJECT lies on this machine."""
    info = _info(session, object)
    place = str(session.store.location(info.path))
    session.console.report(Result(object, str(info.path), place))
    if Path(object).name != info.path.base:  # it is a target's name
        session.remember(["store", "path", object], place)


@store.command()
@click.argument("object", metavar="OBJECT", shell_complete=complete_targets)
@json_option
@click.pass_obj
def info(session: Session, object: str) -> None:
    """Print what is known of OBJECT."""
    found = _info(session, object)
    document = {
        "path": str(found.path),
        "location": str(session.store.location(found.path)),
        "nar_hash": found.nar_hash.nix,
        "nar_size": found.nar_size,
        "drv_hash": found.drv_hash.hex if found.drv_hash else None,
        "build_key": found.build_key.hex if found.build_key else None,
        "outcome": found.outcome.value,
        "references": [str(reference) for reference in found.references],
    }
    text = "\n".join(f"{name + ':':12}{words.in_words(value)}" for name, value in document.items())
    session.console.print_text(text, document)


@store.command()
@click.argument("object", metavar="OBJECT", shell_complete=complete_targets)
@click.option("--reverse", is_flag=True, help="What refers to OBJECT instead.")
@json_option
@click.pass_obj
def references(session: Session, object: str, reverse: bool) -> None:
    """Print the store paths named inside OBJECT."""
    path = _info(session, object).path
    found = session.store.referrers(path) if reverse else session.store.references(path)
    _print_paths(session, found)


@store.command()
@click.argument("objects", metavar="OBJECT...", nargs=-1, required=True, shell_complete=complete_targets)
@json_option
@click.pass_obj
def closure(session: Session, objects: tuple[str, ...]) -> None:
    """Print OBJECTS and everything they refer to."""
    _print_paths(session, session.store.closure([_info(session, name).path for name in objects]))


def _print_paths(session: Session, paths: tuple[StorePath, ...]) -> None:
    for found in paths:
        session.console.print_text(str(found), {"path": str(found)})


@store.command()
@click.argument("objects", metavar="[OBJECT...]", nargs=-1, shell_complete=complete_targets)
@json_option
@click.pass_obj
def verify(session: Session, objects: tuple[str, ...]) -> None:
    """Hash OBJECTS (else all) again; look for foreign entries. Changes nothing."""
    paths = [_info(session, name).path for name in objects] if objects else None
    findings = session.store.verify(paths)
    if not findings:
        session.console.report(Notice("info", "the store is intact"))
        return
    session.console.print_table(
        ("entry", "kind", "detail"), [(finding.name, finding.kind, finding.detail) for finding in findings]
    )
    raise VzreproError(
        f"{len(findings)} of the store's entries are not what they should be",
        hint="mend corrupt and missing objects with: vzrepro store repair",
    )


@store.command()
@click.argument("objects", metavar="[OBJECT...]", nargs=-1, shell_complete=complete_targets)
@json_option
@click.pass_obj
def repair(session: Session, objects: tuple[str, ...]) -> None:
    """Replace corrupt OBJECTS from a cache, or build them again. If none is named, that is all that are corrupt."""
    paths = [session.path(name) for name in objects] or None
    findings = session.store.verify(paths)
    broken = [
        finding.path for finding in findings if finding.kind in ("corrupt", "missing") and finding.path is not None
    ]
    if not broken:
        session.console.report(Notice("info", "nothing to mend"))
        return
    for mended in session.realizer().repair(broken):
        session.console.report(Result(mended.path.name, str(mended.path), str(session.store.location(mended.path))))


@store.command()
@json_option
@click.pass_obj
def roots(session: Session) -> None:
    """List out-links and running processes that keep objects. What they name, and all it refers to, is not
    collected."""
    session.console.print_table(
        ("root", "store path"), [(root.source, str(root.path)) for root in session.store.roots()]
    )


@store.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@click.option("--keep-days", type=click.FloatRange(0), help="Keep what was registered in the last DAYS.")
@json_option
@click.pass_obj
def gc(session: Session, dry_run: bool, keep_days: float | None) -> None:
    """Delete objects that no root keeps, and needless audit files. Those are what is left of old audits that nobody
    needs."""
    from vzrepro.proof.audit.records import Records

    newer = None if keep_days is None else time.time() - keep_days * 86400
    report = session.store.gc(dry_run=dry_run, keep_newer_than=newer)
    deleted = set(report.deleted)
    left = [each for each in session.store.objects() if each.path not in deleted and each.drv_hash is not None]
    audits = Records.beside(session.store, session.warn).collect({str(each.drv_hash) for each in left}, dry_run=dry_run)
    document = {
        "deleted": [str(found) for found in report.deleted],
        "freed_bytes": report.freed,
        "kept": report.kept,
        "audit_files": list(audits.files),
        "audit_bytes": audits.freed,
        "dry_run": dry_run,
    }
    verb = "would delete" if dry_run else "deleted"
    kept = ", ".join(f"{count} {reason}" for reason, count in sorted(report.kept.items()))
    lines = [
        *map(str, report.deleted),
        f"{verb} {words.plural(len(report.deleted), 'object')}, {words.size(report.freed)}",
    ]
    if audits.files:
        lines.append(f"{verb} {words.plural(len(audits.files), 'file')} of old audits, {words.size(audits.freed)}")
    session.console.print_text("\n".join([*lines, f"kept: {kept}"] if kept else lines), document)
