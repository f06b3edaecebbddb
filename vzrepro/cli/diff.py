"""`vzrepro diff`: where two results differ, and what probably made them differ."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from vzrepro.base.errors import UsageError
from vzrepro.base.events import Notice
from vzrepro.base.model import NarHash, StorePath
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.console import clean
from vzrepro.proof.audit.diff import LIMITS, explain
from vzrepro.proof.audit.model import Detail, Explanation

DIFFERENT = 1
"""The exit code for trees that differ, as diff(1) has it; trouble is 2."""

_WHY = "diffoscope's page needs diffoscope"


@click.command()
@click.argument("a", metavar="A", shell_complete=complete_targets)
@click.argument("b", metavar="B", shell_complete=complete_targets)
@click.option("--html", is_flag=True, help="Write diffoscope's own HTML page, one file, to --output or stdout.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Where the page of --html goes.")
@click.option("--bytes", "plain", is_flag=True, help="Without diffoscope: exact, at once, needs no Docker.")
@click.option("--limit", type=click.IntRange(1), help=f"Places that are told of (default {LIMITS.details}).")
@click.option("--limit-files", type=click.IntRange(1), help=f"Files that are looked into (default {LIMITS.files}).")
@click.option("--limit-seconds", type=click.IntRange(1), help=f"Time for diffoscope (default {LIMITS.seconds:.0f}).")
@click.option(
    "--limit-memory", type=click.IntRange(64), metavar="MIB", help=f"Its memory (default {LIMITS.memory_bytes >> 20})."
)
@click.option(
    "--limit-excerpt",
    type=click.IntRange(80),
    metavar="BYTES",
    default=1000,
    show_default=True,
    help="Of each excerpt.",
)
@json_option
@click.pass_obj
def diff(
    session: Session,
    a: str,
    b: str,
    html: bool,
    output: Path | None,
    plain: bool,
    limit: int | None,
    limit_files: int | None,
    limit_seconds: int | None,
    limit_memory: int | None,
    limit_excerpt: int,
) -> int:
    """Tell where A and B differ, and what probably made them differ.

    A and B are targets, store paths, or any files or directories. Exit codes: 0 equal, 1 different, 2 trouble.
    """
    if output is not None and not html:
        raise UsageError("--output goes with --html", hint=f"vzrepro diff {a} {b} --html --output {output}")
    if html and plain:
        raise UsageError("--html and --bytes exclude each other", reason=_WHY)
    if output is not None and not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        # Before diffoscope's ten minutes.
        raise UsageError(f"no page can be written to {output}", reason=f"{output.parent} is no directory to write into")
    sides = _side(session, a), _side(session, b)
    if _known_equal(*sides):
        return _tell(session, sides, None)
    asked = {
        "details": limit,
        "files": limit_files,
        "seconds": limit_seconds,
        "memory_bytes": None if limit_memory is None else limit_memory << 20,
        "excerpt_bytes": limit_excerpt,
    }
    limits = replace(LIMITS, **{name: value for name, value in asked.items() if value is not None})
    known = session.has_workspace()
    if not known and not plain:
        session.console.report(Notice("info", "without diffoscope: its image is made in a workspace, and this is none"))
    deep = session.tools if known and not plain else None
    try:
        with _scratch(session, known) as scratch:
            page = scratch / "page.html" if html else None
            found = explain(
                sides[0].place,
                sides[1].place,
                realizer=deep,
                scratch=scratch,
                limits=limits,
                page=page,
                names=(sides[0].name, sides[1].name),
            )
            if page is not None and found.details:
                _deliver(session, page, output, found)
                if output is None:
                    return DIFFERENT
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UsageError(f"{where}{error.strerror or error}", hint="both sides must be readable") from error
    return _tell(session, sides, found)


# --- the two sides ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two: as it was named, where it is, and its hash if it is an object of the store."""

    name: str
    place: Path
    nar_hash: NarHash | None = None


def _side(session: Session, name: str) -> _Side:
    """What `name` means: a file or directory that is there, else a store path or a target."""
    place = Path(name)
    if os.path.lexists(name):
        try:
            place = place.resolve(strict=True)
        except OSError as error:
            raise UsageError(f"{name}: the symbolic link leads nowhere", reason=error.strerror) from error
        return _Side(name, place, _registered(session, place))
    if not session.has_workspace() or (not _is_store_path(place) and len(place.parts) > 1):
        raise UsageError(f"{name}: no such file or directory")
    path = session.path(name)
    info = session.store.query(path)
    if info is None:
        raise UsageError(f"{name} is not in the store", hint=f"make it with: vzrepro realize {name}")
    session.store.hold([path])
    return _Side(name, session.store.location(path), info.nar_hash)


def _is_store_path(place: Path) -> bool:
    try:
        StorePath.parse(place.name)
    except UsageError:
        return False
    return True


def _registered(session: Session, place: Path) -> NarHash | None:
    """The hash of an object of this workspace's store."""
    if not _is_store_path(place) or not session.has_workspace() or place.parent != session.config.store.resolve():
        return None
    path = StorePath.parse(place.name)
    info = session.store.query(path)
    if info is None:
        return None
    session.store.hold([path])
    return info.nar_hash


def _known_equal(a: _Side, b: _Side) -> bool:
    return a.place == b.place or (a.nar_hash is not None and a.nar_hash == b.nar_hash)


@contextmanager
def _scratch(session: Session, known: bool) -> Iterator[Path]:
    if known:
        with session.store.scratch("diff") as scratch:
            yield scratch
    else:
        with tempfile.TemporaryDirectory(prefix="vzrepro-diff-") as folder:
            yield Path(folder)


# --- telling ------------------------------------------------------------------------------------------------------


def _deliver(session: Session, page: Path, output: Path | None, found: Explanation) -> None:
    if not page.is_file():
        raise UsageError(
            "there is no page to write",
            reason=found.truncated or f"{_WHY}, and this is no workspace that has its image",
            hint="without a page it works everywhere: leave out --html; what is missing tells: vzrepro doctor",
        )
    text = page.read_text()
    if output is None:
        session.console.print_text(text, {"html": text})
        return
    try:
        output.write_text(text)
    except OSError as error:
        raise UsageError(f"no page can be written to {output}", reason=error.strerror) from error
    session.console.report(Notice("info", f"wrote {output}"))


def _tell(session: Session, sides: tuple[_Side, _Side], found: Explanation | None) -> int:
    a, b = sides
    document: dict[str, Any] = {"a": a.name, "b": b.name, "equal": found is None or not found.details}
    if found is None or not found.details:
        session.console.print_text(f"{clean(a.name)} and {clean(b.name)} are equal", document)
        return 0
    session.console.print_text("\n".join(_lines(a, b, found)), {**document, "explanation": asdict(found)})
    return DIFFERENT


def _lines(a: _Side, b: _Side, found: Explanation) -> list[str]:
    count = len(found.details)
    least = "at least " if found.truncated else ""
    lines = [f"{clean(a.name)} and {clean(b.name)} differ in {least}{count} place{'' if count == 1 else 's'}"]
    for detail in found.details:
        lines += ["", _heading(detail)]
        lines += [f"    {clean(line)}" for line in detail.excerpt.split("\n")]
    lines += ["", "probable causes, from what was seen:"]
    for guess in found.guesses:
        lines += [f"  {guess.cause}: {clean(guess.evidence)}", f"    {guess.fix}"]
    if found.truncated:
        lines += ["", f"not all of it: {clean(found.truncated)}"]
    return lines


def _heading(detail: Detail) -> str:
    parts = detail.member if detail.file == "." else (detail.file, *detail.member)
    where = " › ".join(map(clean, parts)) or "the file"
    known = [detail.kind]
    if detail.count is not None:
        known.append(f"{detail.count} byte{'' if detail.count == 1 else 's'}")
    if detail.offset is not None:
        known.append(f"from offset {detail.offset:#x}")
    return f"{where} ({', '.join(known)})"
