"""Store objects → `Fact`s: reads, of each pinned file, only the few bytes that say what it is licensed under.

Of a .deb the copyright file, streamed; of a crate its Cargo.toml; of a source tree the licence file at its top. A file
is hashed before it is believed. 190 .debs take 20 s on one core, once: what is known is not read again.
"""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from vzrepro.base.config import host_cores
from vzrepro.base.errors import HashMismatch, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.base.tar import TarHeader
from vzrepro.proof.sbom.components import crate_fact, pinned_hashes
from vzrepro.proof.sbom.facts import Fact, Facts
from vzrepro.proof.sbom.licences import from_copyright, from_tag
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import PinnedFile
from vzrepro.sources.crates import manifest_of
from vzrepro.sources.deb import read_deb
from vzrepro.store import LocalStore

_MAX_UNPACKED = 16 << 30
_MAX_TEXT = 4 << 20
_MAX_MEMBERS = 20_000
"""A licence file at the top of a tree comes this early in its archive, or is not looked for."""
_MAX_LINKS = 8


@dataclass(frozen=True, slots=True)
class LearnedFacts:
    """What is known now: `facts` of all pinned files of the graph that are, old and new; `read` counts the new ones;
    `absent` are the targets whose objects are not here, sorted."""

    facts: Facts
    read: int
    absent: tuple[str, ...]


def learn(
    graph: DrvGraph,
    targets: Sequence[Node],
    store: LocalStore,
    known: Facts,
    *,
    progress: Callable[[int, int], None],
) -> LearnedFacts:
    """Read what is not `known` of the downloads that `targets` are built from and that are in the store.

    `progress` is told bytes read and bytes to read. Facts of files that the graph no longer has are dropped.
    Raises HashMismatch for an object that is not what was pinned, VzreproError for a file that cannot be read; a
    KeyboardInterrupt ends after the files that are being read.
    """
    absent = []
    here: list[tuple[Node, Path]] = []
    for node in graph.closure(targets):
        if node.drv.builder != "fetch" or all(sha256 in known for sha256 in pinned_hashes(node).values()):
            continue
        if store.query(node.path) is None:
            absent.append(node.target)
        else:
            here.append((node, store.location(node.path)))
    files: dict[FileHash, tuple[Path, PinnedFile]] = {}
    trees: dict[FileHash, Fact] = {}
    for node, place in here:
        if "unpack" in node.drv.env or "git" in node.drv.env:
            trees |= {sha256: _from_tree(place, node.path.name) for sha256 in pinned_hashes(node).values()}
            continue
        for name, pin in node.files.items():
            if pin.sha256 not in known:
                files[pin.sha256] = (place / name if name else place, pin)
    total, done = sum(pin.size or 0 for _, pin in files.values()), 0
    found: dict[FileHash, _Found] = {}
    with ThreadPoolExecutor(max_workers=host_cores()) as pool:
        try:
            # lzma and sha256 let go of the interpreter while they work.
            work = pool.map(lambda item: _read(*item), files.values())
            for sha256, result in zip(files, work, strict=True):
                found[sha256] = result
                done += files[sha256][1].size or 0
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pinned = {sha256 for node in graph.nodes.values() for sha256 in pinned_hashes(node).values()}
    facts = {sha256: fact for sha256, fact in known.items() if sha256 in pinned}
    for node, _ in here:
        facts |= _resolved(node, found, facts)
    facts |= trees
    return LearnedFacts(facts, len(found) + len(trees), tuple(sorted(set(absent))))


@dataclass(frozen=True, slots=True)
class _Found:
    """A file's fact, or the name of the package whose copyright file stands for it."""

    fact: Fact
    same_as: str | None = None


def _resolved(node: Node, found: Mapping[FileHash, _Found], facts: Facts) -> Iterator[tuple[FileHash, Fact]]:
    """The new facts of one set of downloads; packages that share another's documentation (Debian policy 12.3: of the
    same source) take its licence."""
    by_package = {name.partition("_")[0]: pin.sha256 for name, pin in node.files.items()}
    for pin in node.files.values():
        if pin.sha256 not in found:
            continue
        at, fact = pin.sha256, found[pin.sha256].fact
        for _ in range(_MAX_LINKS):
            package = found[at].same_as if at in found else None
            if package is None:
                break
            if package not in by_package:
                fact = replace(fact, note=f"its copyright file is that of {package}, which is not here")
                break
            at = by_package[package]
            other = facts[at] if at in facts else found[at].fact
            fact = replace(fact, license=other.license, note=other.note)
        yield pin.sha256, fact


def _read(path: Path, pin: PinnedFile) -> _Found:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != pin.sha256.hex:
        raise HashMismatch(
            f"{path} is not the file that is pinned",
            reason=f"wanted: sha256 {pin.sha256.hex}\nfound:  sha256 {digest}",
            hint="find what is damaged with: vzrepro store verify",
        )
    name = pin.url.rpartition("/")[2]
    if name.endswith(".deb"):
        return _from_deb(path, name)
    if pin.url.startswith("mirror://crates/"):
        crate = "-".join(pin.url.split("/")[-2:]) + ".crate"
        return _Found(crate_fact(crate, manifest_of(path.read_bytes())))
    return _Found(_from_source(path, name))


def _from_deb(path: Path, name: str) -> _Found:
    package = name.partition("_")[0]
    documents = f"usr/share/doc/{package}"
    with path.open("rb") as stream:
        for entry in read_deb(stream, name, max_bytes=_MAX_UNPACKED):
            if entry.kind == "symlink" and entry.path in (documents, f"{documents}/copyright"):
                other = re.fullmatch(r"(?:\.\./|/usr/share/doc/)?([a-z0-9.+-]+)(?:/copyright)?", entry.target)
                return _Found(Fact(name, note=f"{entry.path} leads to {entry.target}"), other[1] if other else None)
            if entry.path == f"{documents}/copyright":
                if entry.kind != "file" or entry.size > _MAX_TEXT:
                    break
                license_ = from_copyright(b"".join(entry.body).decode(errors="replace"))
                note = None if license_ else f"{entry.path} names no licence that a machine can read"
                return _Found(Fact(name, license_, note))
    return _Found(Fact(name, note="it has no copyright file"))


def _from_source(path: Path, name: str) -> Fact:
    if not re.search(r"\.(tar(\.\w+)?|t[gbx]z2?)$", name):
        return Fact(name, note="it is no tar archive")
    try:
        with tarfile.open(path, "r|*", tarinfo=TarHeader) as archive:
            for number, member in enumerate(archive):
                if number > _MAX_MEMBERS:
                    break
                top, _, file = member.name.removeprefix("./").partition("/")
                if not top or not member.isreg() or not _LICENCE_FILE.match(file):
                    continue
                reader = archive.extractfile(member)
                text = "" if reader is None else reader.read(_MAX_TEXT).decode(errors="replace")
                if license_ := from_tag(text):
                    return Fact(name, license_)
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, TypeError) as error:
        # A TypeError is what `tarfile` makes of a gzip header that is cut off.
        raise VzreproError(f"{path} is not an archive that can be read", reason=str(error)) from error
    return Fact(name, note=_NO_LICENCE)


def _from_tree(tree: Path, name: str) -> Fact:
    """As `_from_source`, of what it has become; the store vouches for its bytes."""
    for file in sorted(tree.iterdir()) if tree.is_dir() else ():
        if file.is_file() and not file.is_symlink() and _LICENCE_FILE.match(file.name):
            with file.open("rb") as reader:
                if license_ := from_tag(reader.read(_MAX_TEXT).decode(errors="replace")):
                    return Fact(name, license_)
    return Fact(name, note=_NO_LICENCE)


_LICENCE_FILE = re.compile(r"(COPYING|LICEN[CS]E)(\.\w+)?$")
_NO_LICENCE = "no licence file at its top names a licence that a machine can read"
