"""`DrvGraph` + lock + facts → `Bill`: what a target is made of and how it came about, as one value.

Nothing here depends on the machine: not on what is in the store, not on the clock. The two writers
(`vzrepro.proof.sbom.cyclonedx`, `vzrepro.proof.sbom.spdx`) only spell it.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import quote

from vzrepro.base.model import SOURCE_DATE_EPOCH, FileHash, NarHash
from vzrepro.proof.sbom.facts import Fact, Facts
from vzrepro.proof.sbom.licences import from_cargo
from vzrepro.proof.sbom.seed import Seed, seed
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.recipe.lock import CratePin, DebPin, Lock, PinnedFile, PinnedTree

ComponentKind = Literal["build", "image", "deb", "crate", "source", "local", "set"]
"""Built in the sandbox · a toolchain image · a Debian package · a crate · another download · files of the workspace ·
a set of downloads (only as the target itself; elsewhere its files stand for it)."""

Role = Literal["contains", "links", "from", "tool"]
"""How one component uses another: has it inside · has it linked in · is made from it · was only built with it."""

_STRONGEST: Sequence[Role] = ("contains", "links", "from", "tool")


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of a component: `path` relative to it, digests in hex, `size` in bytes."""

    path: str
    sha1: str
    sha256: str
    size: int

    @classmethod
    def of(cls, path: str, content: bytes) -> File:
        """The file that holds `content`."""
        digest = hashlib.sha1(content, usedforsecurity=False)  # SPDX 2.3 demands it
        return cls(path, digest.hexdigest(), hashlib.sha256(content).hexdigest(), len(content))


@dataclass(frozen=True, slots=True)
class BuildOutput:
    """What came out of a target's build: its NAR hash and size in bytes, and its files."""

    nar_hash: NarHash
    nar_size: int
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True)
class Component:
    """One part. `ref` names it in the bill: its purl, or its store path when it has none.

    `pin` is the download it is, `place` where that, or a commit, is to be had, if a recipe says so; `license` an SPDX
    expression. `drv_hash` (hex) and `store_path` are those of the node
    it is, `command` what built it. `contained` says that something of it is in the target.
    """

    ref: str
    kind: ComponentKind
    name: str
    version: str | None = None
    purl: str | None = None
    pin: PinnedFile | None = None
    place: str | None = None
    license: str | None = None
    note: str | None = None
    drv_hash: str | None = None
    store_path: str | None = None
    command: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    contained: bool = False


@dataclass(frozen=True, slots=True)
class Bill:
    """A whole bill of materials. `components` are sorted by `ref` and hold the target too, `root`; `uses` maps a `ref`
    to what it uses, sorted. `epoch` is the target's date in seconds since 1970. `unread` are the pinned files that no
    fact is known of."""

    root: str
    drv_hash: str
    epoch: int
    components: tuple[Component, ...]
    uses: Mapping[str, Sequence[tuple[str, Role]]]
    seed: Seed
    output: BuildOutput | None = None
    unread: tuple[FileHash, ...] = ()

    @property
    def target(self) -> Component:
        """The component that the bill is of."""
        return next(component for component in self.components if component.ref == self.root)


def describe(graph: DrvGraph, lock: Lock, target: Node, facts: Facts, output: BuildOutput | None = None) -> Bill:
    """The bill of `target`. Reads the workspace's files, for their digests; raises OSError when one is gone."""
    drawing = _Drawing(graph, _Pins.of(graph, lock), facts)
    root = drawing.node(target)
    contained = _contained(root, drawing.uses)
    if output is not None:
        drawing.components[root] = replace(drawing.components[root], files=output.files)
    components = (
        replace(component, contained=ref in contained) for ref, component in sorted(drawing.components.items())
    )
    epoch = target.drv.source_date_epoch
    return Bill(
        root=root,
        drv_hash=target.drv_hash.hex,
        epoch=SOURCE_DATE_EPOCH if epoch is None else epoch,
        components=tuple(components),
        uses={ref: tuple(sorted(used.items())) for ref, used in sorted(drawing.uses.items())},
        seed=seed(graph, [target]),
        output=output,
        unread=tuple(sorted(drawing.unread)),
    )


def _contained(root: str, uses: Mapping[str, Mapping[str, Role]]) -> set[str]:
    found, pending = {root}, [root]
    while pending:
        for ref, role in uses.get(pending.pop(), {}).items():
            if role != "tool" and ref not in found:
                found.add(ref)
                pending.append(ref)
    return found


def purl(kind: str, name: str, version: str, **qualifiers: str) -> str:
    """`pkg:<kind>/<name>@<version>?<qualifiers>` as the package URL specification escapes it; `name` may hold a
    namespace, and `version` be empty."""
    named = "/".join(quote(part, safe=".-_~") for part in name.split("/"))
    tail = "&".join(f"{key}={quote(value, safe='.-_~:')}" for key, value in sorted(qualifiers.items()))
    at = f"@{quote(version, safe='.-_~:')}" if version else ""
    return f"pkg:{kind}/{named}{at}{'?' if tail else ''}{tail}"


@dataclass(frozen=True, slots=True)
class _Pins:
    """Who is who among the downloads: each by the sha256 of its file."""

    debs: Mapping[FileHash, tuple[DebPin, str | None]]
    crates: Mapping[FileHash, CratePin]

    @classmethod
    def of(cls, graph: DrvGraph, lock: Lock) -> _Pins:
        suites = {want.name: str(want.ask["suite"]) for want in graph.wants if want.kind == "image"}
        debs: dict[FileHash, tuple[DebPin, str | None]] = {}
        # A package that several suites have is named after the first by alphabet.
        for (image, _platform), pin in sorted(lock.images.items(), key=lambda item: suites.get(item[0][0], "~")):
            for deb in pin.debs:
                debs.setdefault(deb.file.sha256, (deb, suites.get(image)))
        return cls(debs, {crate.file.sha256: crate for pin in lock.crate_sets.values() for crate in pin.crates})


@dataclass(slots=True)
class _Drawing:
    """The walk over the graph: components and uses, growing."""

    graph: DrvGraph
    pins: _Pins
    facts: Facts
    components: dict[str, Component] = field(default_factory=dict)
    uses: defaultdict[str, dict[str, Role]] = field(default_factory=lambda: defaultdict(dict))
    unread: set[FileHash] = field(default_factory=set)

    def node(self, target: Node) -> str:
        """Draw a target with everything below it; its ref."""
        refs: dict[str, str] = {}
        for node in self.graph.closure([target]):
            if not _is_set(node) or node.drv_hash == target.drv_hash:
                refs[node.drv_hash.hex] = self._component(node)
        for node in self.graph.closure([target]):
            if ref := refs.get(node.drv_hash.hex):
                self._draw_uses(node, ref, refs)
        return refs[target.drv_hash.hex]

    def _component(self, node: Node) -> str:
        if node.drv.builder == "fetch" and not _is_set(node):
            return self._download(node.files[""], node) if node.checkout is None else self._commit(node, node.checkout)
        own = Component(
            ref=str(node.path),
            kind="build",
            name=node.target,
            version=node.version or None,
            drv_hash=node.drv_hash.hex,
            store_path=str(node.path),
        )
        match node.drv.builder:
            case "local":
                files = tuple(_local_files(node))
                license_, _needs = _own_crate(node)
                own = replace(own, kind="local", files=files, license=license_)
            case "image":
                own = replace(own, kind="image")
            case "fetch":
                own = replace(own, kind="set")
            case "sandbox":
                own = replace(own, command=node.drv.command, license=self._license_of_source(node))
        self.components[own.ref] = own
        return own.ref

    def _license_of_source(self, node: Node) -> str | None:
        """What the one source says that a program is made from; nothing when there are several, or none."""
        sources = [dep for dep in self._shipped(node) if dep.kind == "source" and not _is_set(dep)]
        found = {license_ for dep in sources if (license_ := self._license(dep)) is not None}
        return found.pop() if len(found) == 1 else None

    def _license(self, source: Node) -> str | None:
        if source.drv.builder == "local":
            return _own_crate(source)[0]
        fact = self._fact(pinned_hashes(source)[""])
        return fact.license if fact else None

    def _shipped(self, node: Node) -> Iterator[Node]:
        for name, drv in node.drv.inputs.items():
            if name not in node.build_only:
                yield self.graph.nodes[drv]

    def _fact(self, sha256: FileHash) -> Fact | None:
        fact = self.facts.get(sha256)
        if fact is None:
            self.unread.add(sha256)
        return fact

    def _commit(self, node: Node, tree: PinnedTree) -> str:
        """The component that a commit is, from `node`."""
        fact = self._fact(pinned_hashes(node)[""])
        named = node.target.removeprefix("source-")
        ref = purl("generic", named, node.version, vcs_url=tree.place)
        self.components[ref] = Component(
            ref=ref,
            kind="source",
            name=named,
            version=node.version,
            purl=ref,
            place=tree.place,
            license=fact.license if fact else None,
            note=fact.note if fact else None,
            drv_hash=node.drv_hash.hex,
            store_path=str(node.path),
        )
        return ref

    def _download(self, pin: PinnedFile, node: Node | None = None) -> str:
        """The component that a pinned file is; `node` when it is a node of its own."""
        fact = self._fact(pin.sha256)
        base = Component(ref="", kind="source", name=PurePosixPath(pin.url).name, pin=pin)
        if pin.sha256 in self.pins.debs:
            deb, suite = self.pins.debs[pin.sha256]
            qualifiers = {"arch": deb.arch, **({"distro": suite} if suite else {})}
            name = purl("deb", f"debian/{deb.name}", deb.version, **qualifiers)
            base = replace(base, kind="deb", name=deb.name, version=deb.version, purl=name)
        elif pin.sha256 in self.pins.crates or pin.url.startswith("mirror://crates/"):
            crate, version = pin.url.split("/")[-2:]
            base = replace(base, kind="crate", name=crate, version=version, purl=purl("cargo", crate, version))
        elif node is not None and pin.url.startswith("mirror://pypi/"):
            project, file = pin.url.split("/")[-2:]
            name = purl("pypi", project, node.version, file_name=file)
            base = replace(base, name=project, version=node.version, purl=name)
        elif node is not None and (node.version or not pin.url.startswith("mirror://")):
            named = node.target.removeprefix("source-")
            place = {} if pin.url.startswith("mirror://") else {"download_url": pin.url}
            name = purl("generic", named, node.version, checksum=f"sha256:{pin.sha256.hex}", **place)
            base = replace(base, name=named, version=node.version or None, purl=name, place=place.get("download_url"))
        ref = base.purl or f"{pin.url}#{pin.sha256.hex}"
        known = self.components.get(ref)
        if known is not None and known.pin != pin:
            ref = f"{ref}#{pin.sha256.hex}"  # the same name for other bytes, from another archive
        if node is not None or ref not in self.components:
            self.components[ref] = replace(
                base,
                ref=ref,
                license=fact.license if fact else None,
                note=fact.note if fact else None,
                drv_hash=node.drv_hash.hex if node else None,
                store_path=str(node.path) if node else None,
            )
        return ref

    def _draw_uses(self, node: Node, ref: str, refs: Mapping[str, str]) -> None:
        if node.drv.image is not None:
            image = self.graph.nodes[node.drv.image]
            self._use(ref, refs[image.drv_hash.hex], "tool")
            for debs in self.graph.inputs(image):
                for name in node.linked:
                    if name in debs.files:
                        self._use(ref, self._download(debs.files[name]), "links")
        if _is_set(node):
            for pin in node.files.values():
                self._use(ref, self._download(pin), "contains")
        for name, drv in node.drv.inputs.items():
            given = self.graph.nodes[drv]
            only = name in node.build_only
            if _is_set(given):
                self._draw_set(node, ref, given, only)
            elif given.kind == "source":
                self._use(ref, refs[drv.hex], "tool" if only else "from")
            else:
                self._use(ref, refs[drv.hex], "tool" if only else "contains")

    def _draw_set(self, node: Node, ref: str, files: Node, only: bool) -> None:
        crates = {pin.sha256 for pin in files.files.values() if pin.sha256 in self.pins.crates}
        linked = self._linked_crates(node, crates) if crates else set()
        for pin in files.files.values():
            role: Role = "contains"
            if only or (pin.sha256 in crates and pin.sha256 not in linked):
                role = "tool"
            elif pin.sha256 in crates:
                role = "links"
            self._use(ref, self._download(pin), role)

    def _linked_crates(self, node: Node, crates: set[FileHash]) -> set[FileHash]:
        """Those of `crates` that the program's own code reaches: not its build scripts, not what runs in the compiler.

        By names alone: of a crate in several versions all are taken, so nothing that is linked in is left out. All of
        them when it is not known what the program or a crate needs.
        """
        pending = [need for dep in self._shipped(node) for need in self._needs(dep) or ()]
        if not pending or any(sha256 not in self.facts for sha256 in crates):
            return crates
        named: defaultdict[str, list[FileHash]] = defaultdict(list)
        for sha256 in crates:
            named[self.pins.crates[sha256].name].append(sha256)
        found: set[FileHash] = set()
        while pending:
            for sha256 in named.pop(pending.pop(), ()):
                fact = self.facts[sha256]
                if not fact.macro:
                    found.add(sha256)
                    pending += fact.needs
        return found

    def _needs(self, source: Node) -> Iterable[str] | None:
        if source.drv.builder == "local":
            return _own_crate(source)[1]
        if _is_set(source) or source.drv.builder != "fetch":
            return None
        fact = self.facts.get(pinned_hashes(source)[""])
        return fact.needs if fact else None

    def _use(self, ref: str, used: str, role: Role) -> None:
        before = self.uses[ref].get(used, role)
        self.uses[ref][used] = min(before, role, key=_STRONGEST.index)


def _is_set(node: Node) -> bool:
    """Whether a node is a directory of downloads."""
    return node.drv.builder == "fetch" and "" not in node.drv.content


def pinned_hashes(node: Node) -> Mapping[str, FileHash]:
    """What the facts of a node's downloads are kept under, by their names ("" for a single one): the hashes that pin
    them, a commit's that of its tree. Empty for what is no download."""
    pinned = node.drv.content.items() if node.drv.builder == "fetch" else ()
    return {name: FileHash(digest.hex) for name, digest in pinned}


def _local_files(node: Node) -> Iterator[File]:
    for name, content in sorted(node.tree.items()):
        if isinstance(content, bytes):
            yield File.of(name or node.target, content)
        elif not content.is_symlink():
            yield File.of(name, content.read_bytes())


def _own_crate(node: Node) -> tuple[str | None, tuple[str, ...]]:
    """Licence and needs of a crate that lies in the workspace; nothing when it is none."""
    manifest = node.tree.get("Cargo.toml")
    if not isinstance(manifest, Path):
        return None, ()
    fact = crate_fact(node.target, manifest.read_text(encoding="utf-8"))
    return fact.license, fact.needs


def crate_fact(file: str, manifest: str) -> Fact:
    """What a Cargo.toml says of its crate. Never raises: one that cannot be read says nothing."""
    try:
        document = tomllib.loads(manifest)
        package = document["package"]
        tables = [document, *document.get("target", {}).values()]
        needs = {
            dep.get("package", name) if isinstance(dep, dict) else name
            for table in tables
            for name, dep in table.get("dependencies", {}).items()
        }
        license_ = package.get("license")
        library = document.get("lib", {})
        macro = bool(library.get("proc-macro", library.get("proc_macro", False)))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return Fact(file, note="its Cargo.toml cannot be read")
    found = from_cargo(license_) if isinstance(license_, str) else None
    note = None
    if found is None:
        note = f"Cargo.toml: license = {license_!r}" if license_ else "Cargo.toml names no licence"
    return Fact(file, found, note, tuple(sorted(map(str, needs))), macro)
