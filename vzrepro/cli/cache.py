"""`vzrepro cache …`: set up a shared cache, fill it, take from it, look into it, keep it clean."""

from __future__ import annotations

import datetime as dt
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vzrepro.base import words
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice, Result
from vzrepro.cli.options import cache_option, complete_targets, json_option, signatures_option
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs

if TYPE_CHECKING:
    from vzrepro.base.model import ObjectInfo, StorePath
    from vzrepro.cache.check import CacheFinding, HeldObject
    from vzrepro.cache.reader import CacheReader
    from vzrepro.recipe.graph import Node

_JOBS = 8
_HARMLESS = frozenset({"orphan", "untrusted", "foreign"})  # what others do, or have begun, is no fault of the cache
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@click.group(cls=Verbs)
def cache() -> None:
    """Share what was built, in a bucket or a directory. It is a binary cache, which stock Nix clients can read.

    Caches are named by URL: s3://BUCKET[/PREFIX]?endpoint=…, https://…, file:///…; by default by the configuration
    (caches, push-to). OBJECT is a store path, its directory, or a target.
    """


# --- setting up -------------------------------------------------------------------------------------------------------


@cache.command()
@click.argument("url", required=False)
@json_option
@click.pass_obj
def init(session: Session, url: str | None) -> None:
    """Make the cache at URL ready. That is the bucket, nix-cache-info, and a record of what its server can do, found
    out by trying.

    It is safe to run again. Nothing that is there is changed.
    """
    from vzrepro.cache.places import is_writable, prepare

    url = session.chosen_cache(url)
    if not is_writable(url):
        raise UsageError(f"{url} cannot be written", hint="use s3://… or a directory; HTTP is for reading")
    place = session.cache(url)
    found = prepare(place.access)
    for name, value in found.items():
        session.console.report(Notice("info", f"{name.replace('_', ' ')}: {words.in_words(value)}"))
    if not found.get("conditional_writes", True):
        session.warn(
            "two who push the same object at once may both write it: the server cannot keep the second one out"
        )
    settings = f'[tool.vzrepro]\ncaches = ["{url}"]'
    session.console.report(Notice("info", f"{place.url} is ready; name it in pyproject.toml or your config file:"))
    session.console.print_text(settings, {"cache": place.url, **found})


# --- moving objects ---------------------------------------------------------------------------------------------------


@cache.command()
@click.argument("objects", metavar="[OBJECT...]", nargs=-1, shell_complete=complete_targets)
@click.option("--to", "url", help="The cache to push to.")
@click.option("--all", "everything", is_flag=True, help="Push all that is in the store.")
@click.option("--with-inputs", is_flag=True, help="Also everything here that OBJECTs were made from: sources, images.")
@click.option("--jobs", type=click.IntRange(1), default=_JOBS, show_default=True, help="Objects pushed at once.")
@json_option
@click.pass_obj
def push(
    session: Session, objects: tuple[str, ...], url: str | None, everything: bool, with_inputs: bool, jobs: int
) -> None:
    """Have OBJECTs and all that they refer to in the cache. Nothing that is there, and right, is sent again."""
    from vzrepro.proof.attest.witness import pushed_along
    from vzrepro.realize.transfer import Pusher

    if bool(objects) == everything:
        raise UsageError("name objects to push, or --all", hint="vzrepro cache push container-bundle")
    place = session.writer(session.chosen_cache(url), session.upload_key)
    infos = session.store.objects() if everything else _wanted(session, objects, with_inputs)
    session.store.hold([info.path for info in infos])
    pusher = Pusher(session.store, session.console.report, session.stop, lambda info: pushed_along(session.store, info))
    summary = pusher.push_all(place, infos, jobs)
    counts = {kept.value: len(paths) for kept, paths in summary.kept.items() if paths}
    told = ", ".join(f"{count} {kept}" for kept, count in counts.items()) or "nothing to push"
    session.console.print_text(
        f"{place.url}: {told}, {words.size(summary.written_bytes)} written",
        {"cache": place.url, "objects": counts, "written_bytes": summary.written_bytes},
    )


def _wanted(session: Session, names: Sequence[str], with_inputs: bool) -> list[ObjectInfo]:
    paths = []
    for name in names:
        path = session.path(name)
        if session.store.query(path) is None:
            raise UsageError(f"{path.base} is not in the store", hint=f"realize it: vzrepro realize {name}")
        paths.append(path)
        if with_inputs:
            # Local files come from the workspace: whoever could use them has them.
            inputs = session.graph.closure([session.target(name)])
            paths += [node.path for node in inputs if node.drv.builder != "local"]
    found = session.store.query_many(session.store.closure(dict.fromkeys(paths)))
    return list(found.values())


@cache.command()
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True, shell_complete=complete_targets)
@click.option("--from", "url", help="The cache to take from, instead of all that are configured.")
@signatures_option
@json_option
@click.pass_obj
def pull(session: Session, targets: tuple[str, ...], url: str | None, require_signatures: int | None) -> None:
    """Take TARGETs from the caches into the store; nothing is built."""
    session.override(require_signatures=require_signatures)
    nodes = [session.target(name) for name in targets]
    realizer = session.realizer(caches=None if url is None else [session.cache(url)])
    for node, info in zip(nodes, realizer.pull(nodes), strict=True):
        session.console.report(Result(node.target, str(info.path), str(session.store.location(info.path))))


# --- looking ----------------------------------------------------------------------------------------------------------


@cache.command()
@click.argument("object", metavar="[OBJECT]", required=False, shell_complete=complete_targets)
@cache_option
@json_option
@click.pass_obj
def info(session: Session, object: str | None, url: str | None) -> None:
    """Print what the cache is and holds, or what it says of OBJECT. Of an object it says who signed it, and who got
    something else."""
    place = session.cache(session.chosen_cache(url))
    if object is None:
        _print_cache(session, place)
    else:
        _print_object(session, place, session.path(object))


def _print_cache(session: Session, place: CacheReader) -> None:
    from vzrepro.cache.layout import kind_of

    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for entry in place.access.backend.list():
        kind = kind_of(entry.key) or entry.key.partition("/")[0]
        count[kind] += 1
        size[kind] += entry.size
    rows = [(kind, count[kind], words.size(size[kind])) for kind in sorted(count, key=lambda kind: -size[kind])]
    rows.append(("all", count.total(), words.size(size.total())))
    session.console.print_table(("kind", "entries", "size"), rows)


def _print_object(session: Session, place: CacheReader, path: StorePath) -> None:
    found, damaged = place.access.look(path)
    if found is None:
        state = "a narinfo that nobody can use" if damaged else "nothing"
        raise VzreproError(f"{place.url} has {state} under {path}", hint=f"vzrepro cache why-missing {path.name}")
    signers = session.trusted.signers(found.fingerprint, found.signatures)
    nar = place.access.backend.head(found.url)
    differences = place.differences(found)
    document: dict[str, Any] = {
        "path": str(found.path),
        "cache": place.url,
        "trusted": found.is_trusted(session.trusted),
        "signed_by": [text.partition(":")[0] for text in found.signatures],
        "trusted_signers": sorted(key.name for key in signers),
        "nar": found.url,
        "nar_there": nar is not None,
        "nar_hash": found.nar_hash.nix,
        "nar_size": found.nar_size,
        "file_size": found.file_size,
        "references": [str(reference) for reference in found.references],
        "deriver": found.deriver,
        "drv_hash": found.drv_hash and found.drv_hash.hex,
        "build_key": found.build_key and found.build_key.hex,
        "differences": [{"by": each.by, "trusted": each.trusted, "nar_hash": each.found.nix} for each in differences],
    }
    lines = [f"{name + ':':17}{words.in_words(value)}" for name, value in document.items() if name != "differences"]
    lines += [
        f"not deterministic: {each.by} ({'trusted' if each.trusted else 'unknown here'}) got {each.found.nix}"
        for each in differences
    ]
    session.console.print_text("\n".join(lines), document)


@cache.command()
@cache_option
@json_option
@click.pass_obj
def ls(session: Session, url: str | None) -> None:
    """List the cache's objects: size, signers, age in days."""
    place = session.cache(session.chosen_cache(url))
    now = place.access.backend.now()
    rows = [
        (
            found.path.base,
            words.size(found.file_size or found.nar_size),
            " ".join(text.partition(":")[0] for text in found.signatures),
            "yes" if found.is_trusted(session.trusted) else "no",
            round(max(0.0, now - mtime) / 86400, 1),
        )
        for found, mtime in place.objects()
    ]
    session.console.print_table(("object", "size", "signed by", "trusted", "days"), sorted(rows, key=_by_name))


def _by_name(row: tuple[str, ...] | Sequence[object]) -> str:
    return str(row[0]).partition("-")[2]


@cache.command("why-missing")
@click.argument("target", shell_complete=complete_targets)
@cache_option
@json_option
@click.pass_obj
def why_missing(session: Session, target: str, url: str | None) -> None:
    """Explain why TARGET does not come from the cache. Where none is shared, that is this machine's own. Tells what
    differs from the nearest of its name that is there."""
    from vzrepro.cache.history import CacheHistory
    from vzrepro.cli.inspect import changes_document, changes_lines
    from vzrepro.recipe import plan

    node = session.target(target)
    place = session.asked_cache(url)
    reason, found = _why_missing(place, node), []
    if reason is None:
        found = plan.why(session.graph, node, CacheHistory(place.access), plan.nearest)
        reason = f"{place.url} has no {node.path.base}"
        reason += "" if found else f", and never saw a recipe called {node.target}"
    lines = [reason, *changes_lines(found, "the nearest one in the cache")]
    document = {"target": node.target, "path": str(node.path), "reason": reason, "changes": changes_document(found)}
    session.console.print_text("\n".join(lines), document)


def _why_missing(place: CacheReader, node: Node) -> str | None:
    """What stands in the way although something is there; None when nothing is."""
    from vzrepro.recipe import plan

    path = node.path
    try:
        found = place.ask(path)
    except VzreproError as error:
        return error.in_a_line + (f" ({error.hint})" if error.hint else "")
    if found is None:
        return None
    if place.access.backend.head(found.url) is None:
        return f"{place.url} has lost the NAR of {path.base}: vzrepro cache push mends it"
    if (why := plan.objection(node, found.origin, place.url)) is not None:
        return f"{why}; realize downloads it, and takes this one only where no place of the recipe can be asked"
    return f"nothing is missing: {place.url} has {path.base}"


# --- keeping it right -------------------------------------------------------------------------------------------------


@cache.command("verify")
@click.option("--deep", is_flag=True, help="Read every NAR and compare its hashes, too.")
@click.option("--repair", "mend", is_flag=True, help="Push again what is valid here; remove what nobody can use.")
@cache_option
@json_option
@click.pass_obj
def verify_cache(session: Session, deep: bool, mend: bool, url: str | None) -> None:
    """Check all objects: signatures, sizes, references, records. With --deep, every byte."""
    from vzrepro.cache.check import repair, verify

    place = session.writer(session.chosen_cache(url), session.upload_key)
    findings: list[CacheFinding] = []
    with session.long_work("check", place.url) as work:
        checked = verify(place.reader, deep=deep, found=findings.append, progress=work.progress)
    rows = [(each.kind, each.key, each.path.base if each.path else None, each.detail) for each in findings]
    if rows:
        session.console.print_table(("kind", "entry", "object", "detail"), rows)
    bad = [each for each in findings if each.kind not in _HARMLESS]
    session.console.report(
        Notice(
            "info",
            f"{place.url}: {words.plural(checked.objects, 'object')} and {_entries(checked.entries)} checked, "
            f"{words.size(checked.nar_bytes)} read, {len(bad)} wrong",
        )
    )
    if mend and findings:
        done = list(repair(place, findings, lambda path: _held(session, path)))
        session.console.print_table(
            ("entry", "action", "detail"), [(each.finding.key, each.action, each.detail) for each in done]
        )
        bad = [each.finding for each in done if each.action == "left" and each.finding.kind not in _HARMLESS]
    if bad:
        raise VzreproError(
            f"{place.url} has {_entries(len(bad))} that should be otherwise",
            hint="mend what can be mended: vzrepro cache verify --deep --repair",
        )


def _entries(count: int) -> str:
    return words.plural(count, "entry", "entries")


def _held(session: Session, path: StorePath) -> HeldObject | None:
    """The object, if it is valid here; it is hashed again, since it may be damaged as well."""
    from vzrepro.cache.check import HeldObject

    info = session.store.query(path)
    if info is None or session.store.verify([path]):
        return None
    derivation = None if info.drv_hash is None else session.store.derivation(info.drv_hash)
    return HeldObject(info, session.store.location(path), derivation, session.store.log_path(path))


@cache.group()
def root() -> None:
    """Roots: what `cache gc` keeps, each set of objects under a name."""


@root.command("add")
@click.argument("name")
@click.argument("objects", metavar="OBJECT...", nargs=-1, required=True, shell_complete=complete_targets)
@click.option("--with-inputs", is_flag=True, help="Also what OBJECTs were made from, as far as it is in the store.")
@cache_option
@json_option
@click.pass_obj
def root_add(session: Session, name: str, objects: tuple[str, ...], with_inputs: bool, url: str | None) -> None:
    """Have the cache keep OBJECTs, and all they refer to, under NAME. A root of that name is replaced."""
    from vzrepro.cache.roots import add_root

    place = session.cache(session.chosen_cache(url))
    paths = [session.path(each) for each in objects]
    if with_inputs:
        paths += [info.path for info in _wanted(session, objects, with_inputs)]
    made = add_root(place.access.backend, name, paths)
    session.console.report(Notice("info", f"{place.url} keeps {words.plural(len(made.paths), 'object')} as {name}"))


@root.command("list")
@cache_option
@json_option
@click.pass_obj
def root_list(session: Session, url: str | None) -> None:
    """List the roots and what they keep."""
    from vzrepro.cache.roots import read_roots

    place = session.cache(session.chosen_cache(url))
    rows = [(each.name, _day(each.made), path.base) for each in read_roots(place.access.backend) for path in each.paths]
    session.console.print_table(("root", "made", "object"), rows)


def _day(secs: int) -> str:
    return dt.datetime.fromtimestamp(secs, dt.UTC).strftime("%Y-%m-%d %H:%M")


@root.command("remove")
@click.argument("name")
@cache_option
@json_option
@click.pass_obj
def root_remove(session: Session, name: str, url: str | None) -> None:
    """Forget the root NAME. What only it kept goes with a later `cache gc`."""
    from vzrepro.cache.roots import remove_root

    place = session.cache(session.chosen_cache(url))
    if not remove_root(place.access.backend, name):
        raise UsageError(f"{place.url} has no root {name!r}", hint="see: vzrepro cache root list")
    session.console.report(Notice("info", f"{place.url}: the root {name} is gone"))


@cache.command()
@click.option(
    "--keep-roots/--ignore-roots",
    default=True,
    show_default=True,
    help="Whether what roots reach stays whatever its age.",
)
@click.option("--older-than", metavar="AGE", required=True, help="What is younger stays: 30d, 12w, at least 2d.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@cache_option
@json_option
@click.pass_obj
def gc(session: Session, keep_roots: bool, older_than: str, dry_run: bool, url: str | None) -> None:
    """Delete objects that no root keeps and nobody used for AGE. Safe while others push."""
    from vzrepro.cache.collect import collect

    place = session.cache(session.chosen_cache(url))
    with session.long_work("collect", place.url) as work:
        done = collect(
            place.access.backend,
            older_than_secs=_seconds(older_than),
            keep_roots=keep_roots,
            dry_run=dry_run,
            progress=lambda step, count: work.line(f"{step}: {count}"),
        )
    rows = [(name, amount.count, words.size(amount.size)) for name, amount in done.roots.items()]
    session.console.print_table(
        ("root", "objects", "keeps"), [*rows, ("all roots", done.kept.count, words.size(done.kept.size))]
    )
    verb = "would delete" if dry_run else "deleted"
    lines = [
        f"{verb} {words.plural(done.narinfos.count, 'object')}: "
        f"{_entries(done.deleted.count)}, {words.size(done.deleted.size)}",
        f"left: {_entries(done.young.count)} too young, {words.size(done.young.size)}; {done.foreign} not ours",
        *(f"warning: {each} is kept by a root, and the cache lacks it" for each in done.missing),
    ]
    document = {
        "dry_run": dry_run,
        "deleted_objects": done.narinfos.count,
        "deleted_entries": done.deleted.count,
        "deleted_bytes": done.deleted.size,
        "young_entries": done.young.count,
        "foreign_entries": done.foreign,
        "missing": [str(each) for each in done.missing],
    }
    session.console.print_text("\n".join(lines), document)


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not an age", hint="say a number and s, m, h, d or w: --older-than 30d")
    return float(match[1]) * _UNITS[match[2]]


# --- serving ----------------------------------------------------------------------------------------------------------


@cache.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for a LAN.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any that is free.")
@json_option
@click.pass_obj
def serve(session: Session, directory: Path, host: str, port: int) -> None:
    """Serve the cache in DIRECTORY over HTTP until Ctrl-C. Nix clients can read it as vzrepro can; nobody can write."""
    from vzrepro.cache.serve import serve as listen

    with listen(directory, host, port) as server:
        session.console.print_text(server.url, {"url": server.url})
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            session.console.report(Notice("info", "stopped"))
