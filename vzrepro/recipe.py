"""The recipe DSL: plain functions that a recipe module calls, each giving a frozen `Node` of the graph.

Everything a recipe can say is here; docs/recipes.md is the guide. The functions work only while
`vzrepro.evaluate` runs a recipe: they find its workspace, its lock and its registry in the current `Context`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import FrameType
from typing import Literal, TypeVar

from vzrepro import nar
from vzrepro.errors import UsageError
from vzrepro.lock import CrateSetPin, ImagePin, Lock, PinnedFile, SourcePin
from vzrepro.model import (
    SOURCE_DATE_EPOCH,
    Derivation,
    Digest,
    DrvHash,
    FileHash,
    StorePath,
    canonical_json,
    check_name,
    origin_digest,
    store_path,
)

LOCAL_IGNORED = frozenset({"__pycache__", "target", ".DS_Store", ".git"})
"""Names that `local` leaves out of a directory: what tools drop into source trees."""

Kind = Literal["recipe", "image", "source"]

P = TypeVar("P", SourcePin, ImagePin, CrateSetPin)


@dataclass(frozen=True, slots=True)
class Node:
    """A derivation, and what stands beside it without entering its hash.

    `target` is the name users type; `place` is `file:line` of the recipe; `files` maps each downloaded file's
    relative name to its pin; `tree` maps each local file's relative name to the workspace file, or to the bytes
    themselves; `timeout_secs` and `memory_bytes` limit a build. `build_only` names the inputs of which nothing is in
    the output, `linked` the .deb files of the image of which something is. `constant` maps axes of an audit that the
    recipe does not allow to be varied to its reasons.
    """

    target: str
    kind: Kind
    place: str
    version: str
    drv: Derivation
    drv_hash: DrvHash
    path: StorePath
    files: Mapping[str, PinnedFile] = field(default_factory=dict)
    tree: Mapping[str, Path | bytes] = field(default_factory=dict)
    timeout_secs: int | None = None
    memory_bytes: int | None = None
    build_only: frozenset[str] = frozenset()
    linked: tuple[str, ...] = ()
    constant: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> FileHash | None:
        """The digest of the URLs a download comes from; None for everything else."""
        if self.drv.builder != "fetch":
            return None
        return origin_digest({name: file.url for name, file in self.files.items()})

    @property
    def download_bytes(self) -> int:
        """The sum of the sizes of the files to download."""
        return sum(file.size for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Want:
    """Something a recipe needs pinned: `vzrepro lock` resolves it, `lock --check` compares it.

    `kind` says which index; `ask` is plain data whose digest is kept in the lock beside the answer.
    """

    kind: Literal["debian-source", "crate-source", "image", "crates"]
    name: str
    place: str
    ask: Mapping[str, object]

    @property
    def request(self) -> str:
        """The digest (hex) of what was asked: another value in the lock means the pin is out of date."""
        return hashlib.sha256(canonical_json({"kind": self.kind, "name": self.name, **self.ask})).hexdigest()


@dataclass(slots=True)
class Context:
    """What one evaluation knows and collects.

    `lenient` is for `vzrepro lock`: a missing pin gives an empty node in place of an error. `trusted` suspends
    the purity guard while the DSL itself reads a file.
    """

    root: Path
    lock: Lock
    platform: str
    lenient: bool
    trusted: Callable[[], AbstractContextManager[None]]
    nodes: dict[str, Node] = field(default_factory=dict)
    parts: dict[DrvHash, Node] = field(default_factory=dict)
    wants: dict[tuple[str, str], Want] = field(default_factory=dict)
    reads: set[Path] = field(default_factory=set)

    def place(self) -> str:
        """`file:line` of the innermost recipe frame."""
        return place(self.root)

    def folder(self) -> Path:
        """The directory of the innermost recipe file."""
        return (self.root / self.place().rpartition(":")[0]).parent


def place(root: Path) -> str:
    """`file:line` of the innermost frame that runs a file below `root`/recipes, relative to `root`."""
    frame: FrameType | None = sys._getframe(1)
    recipes = f"{root / 'recipes'}/"
    while frame is not None:
        if frame.f_code.co_filename.startswith(recipes):
            return f"{frame.f_code.co_filename[len(str(root)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "recipes"


_current: ContextVar[Context] = ContextVar("vzrepro recipe context")


def enter(context: Context) -> Callable[[], None]:
    """Make `context` the one the DSL works in; returns the function that ends it."""
    token = _current.set(context)
    return lambda: _current.reset(token)


def _context() -> Context:
    try:
        return _current.get()
    except LookupError:
        raise UsageError(
            "recipe functions work only inside recipes/", hint="run: vzrepro targets, or read docs/recipes.md"
        ) from None


def _add(node: Node) -> Node:
    context = _context()
    first = context.nodes.setdefault(node.target, node)
    if first is not node and first != node:
        raise UsageError(f"{node.place}: {node.target!r} is already the name of the recipe at {first.place}")
    context.parts[node.drv_hash] = node
    return node


def _node(
    target: str,
    kind: Kind,
    drv: Derivation,
    place: str,
    *,
    files: Mapping[str, PinnedFile] | None = None,
    tree: Mapping[str, Path | bytes] | None = None,
    timeout_secs: int | None = None,
    memory_bytes: int | None = None,
    build_only: Iterable[str] = (),
    linked: Iterable[str] = (),
    constant: Mapping[str, str] | None = None,
) -> Node:
    try:
        check_name(target)
        check_name(drv.name)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", hint=error.hint) from None
    drv_hash = drv.drv_hash()
    return Node(
        target=target,
        kind=kind,
        place=place,
        version=drv.version or "",
        drv=drv,
        drv_hash=drv_hash,
        path=store_path(drv_hash, drv.name),
        files=files or {},
        tree=tree or {},
        timeout_secs=timeout_secs,
        memory_bytes=memory_bytes,
        build_only=frozenset(build_only),
        linked=tuple(linked),
        constant=dict(constant or {}),
    )


def build(
    name: str,
    *,
    image: Node,
    command: Sequence[str],
    inputs: Mapping[str, Node],
    version: str | None = None,
    env: Mapping[str, str] | None = None,
    source_date_epoch: int = SOURCE_DATE_EPOCH,
    timeout_secs: int = 3600,
    memory_gib: int = 8,
    build_only: Sequence[str] = (),
    linked: Sequence[str] = (),
    constant: Mapping[str, str] | None = None,
) -> Node:
    """An artifact built in the sandbox: `command` runs in `image` and sees each input at `/in/<input name>`.

    What the command leaves in `/out` is the store object
    `<hash>-<name>[-<version>]`. `timeout_secs` and `memory_gib` limit the build and stay outside its hash.

    So do these two, which are for `vzrepro sbom`. `build_only` names inputs of which nothing is in the output: scripts
    that run, proofs that are looked at; every other input counts as contained. `linked` names packages of the image
    (`name` or `name:arch`) of which something is in the output, such as static libraries; no other counts as contained.

    `constant` is for `vzrepro audit`, and outside the hash, too: it maps an axis, such as `build-path`, to the reason
    why this recipe relies on what the sandbox makes of it. That is then not varied, and reported as held constant.
    """
    context = _context()
    place = context.place()
    for key, value in inputs.items():
        if not isinstance(value, Node):
            raise UsageError(f"{place}: input {key!r} is {type(value).__name__}, not a recipe, source, local or text")
        if key in ("", ".", "..") or "/" in key or "\0" in key:
            raise UsageError(f"{place}: {key!r} cannot be the name of an input: it is a name below /in")
    if image.kind != "image":
        raise UsageError(f"{place}: image {image.target!r} is not an image")
    if not command:
        raise UsageError(f"{place}: {name!r} has an empty command")
    if foreign := sorted(set(build_only) - inputs.keys()):
        raise UsageError(f"{place}: build_only names {', '.join(foreign)}, which {name!r} has no input of")
    for axis, why in (constant or {}).items():
        if not isinstance(why, str) or not why.strip():
            raise UsageError(f"{place}: constant: {axis!r} needs a reason: a line that the audit's report repeats")
    drv = Derivation(
        name=f"{name}-{version}" if version else name,
        builder="sandbox",
        version=version,
        platform=image.drv.platform,
        image=image.drv_hash,
        command=tuple(command),
        env=dict(env or {}),
        inputs={key: node.drv_hash for key, node in inputs.items()},
        source_date_epoch=source_date_epoch,
    )
    return _add(
        _node(
            name,
            "recipe",
            drv,
            place,
            timeout_secs=timeout_secs,
            memory_bytes=memory_gib << 30,
            build_only=build_only,
            linked=[file for package in linked for file in _deb_files(image, package, place)],
            constant=constant,
        )
    )


def _deb_files(image: Node, package: str, place: str) -> list[str]:
    """The .deb of `package` (`name` or `name:arch`) in `image`; maybe none while pins may be out of date."""
    context = _context()
    files = context.parts[image.drv.inputs["debs"]].files
    wanted, _, arch = package.partition(":")
    # Pool names are <package>_<version>_<architecture>.deb, and none of the three has an underscore.
    parts = {file: file.removesuffix(".deb").split("_") for file in files}
    found = [file for file, words in parts.items() if words[0] == wanted and arch in ("", words[-1])]
    if len(found) != 1 and not context.lenient:
        what = "several architectures of" if found else "no package"
        raise UsageError(f"{place}: linked: {image.target} has {what} {package!r}", hint="name:arch names exactly one")
    return found


def debian_image(
    name: str,
    *,
    suite: str,
    packages: Sequence[str],
    foreign: Sequence[str] = (),
    without: Mapping[str, str] | None = None,
) -> Node:
    """A toolchain image: `packages` of a Debian `suite` and what they depend on, unpacked.

    `foreign` packages (`name:arch`) come without their dependencies: static libraries for cross builds.
    `without` maps a package that is left out to the reason why that is safe. The exact .debs are in the lock.
    """
    context = _context()
    place = context.place()
    want = Want(
        "image",
        name,
        place,
        {
            "platform": context.platform,
            "suite": suite,
            "packages": sorted(packages),
            "foreign": sorted(foreign),
            "without": sorted(without or {}),
        },
    )
    pin: ImagePin | None = _pinned(want, context.lock.images.get((name, context.platform)))
    files = {PurePosixPath(deb.file.url).name: deb.file for deb in pin.debs} if pin else {}
    debs = _download(f"debs-{name}", None, files, place)
    drv = Derivation(
        name=f"image-{name}",
        builder="image",
        platform=context.platform,
        # IMAGE_FORMAT is a number of vzrepro.image, a sibling of evaluation; tests hold the two together.
        env={"image_format": str(IMAGE_FORMAT)},
        inputs={"debs": debs.drv_hash},
    )
    return _add(_node(f"image-{name}", "image", drv, place))


IMAGE_FORMAT = 1
"""Must equal `vzrepro.image.IMAGE_FORMAT`: raised when the same .debs give other image bytes."""


def debian_source(name: str, *, series: str, suite: str) -> Node:
    """The upstream tarball of a Debian source package, the newest of `series` (`6.12`) when it was locked."""
    place = _context().place()
    return _source(Want("debian-source", name, place, {"series": series, "suite": suite}))


def crate_source(name: str, *, series: str) -> Node:
    """A published crate's tarball, the newest of `series` (`0.7`) when it was locked."""
    return _source(Want("crate-source", name, _context().place(), {"series": series}))


def _source(want: Want) -> Node:
    pin: SourcePin | None = _pinned(want, _context().lock.sources.get(want.name))
    if pin is None:
        return _add(_empty(f"source-{want.name}", want.place))
    file_name = PurePosixPath(pin.file.url).name
    if want.kind == "crate-source":
        file_name = f"{want.name}-{pin.version}.crate"
    return _download(f"source-{want.name}", file_name, {"": pin.file}, want.place, version=pin.version)


def cargo_crates(
    name: str,
    *,
    lock: Node | str,
    targets: Sequence[str],
    features: Sequence[str] = (),
    default_features: bool = True,
) -> Node:
    """The crates that a build for `targets` reaches, as a directory of `<name>-<version>.crate` files.

    `lock` is a `crate_source` (its own Cargo.lock counts) or a directory beside the recipe with Cargo.toml and
    Cargo.lock. `targets` are Rust target triples, the build platform's among them for build scripts.
    """
    context = _context()
    place = context.place()
    ask: dict[str, object] = {
        "targets": sorted(targets),
        "features": sorted(features),
        "default_features": default_features,
    }
    if isinstance(lock, Node):
        ask["source"] = lock.target.removeprefix("source-")
        ask["sha256"] = lock.files[""].sha256.hex if lock.files else None
    else:
        folder = context.folder() / lock
        ask["directory"] = folder.relative_to(context.root).as_posix()
        ask["sha256"] = {
            name: hashlib.sha256(_read(folder / name, place)).hexdigest() for name in ("Cargo.lock", "Cargo.toml")
        }
    pin: CrateSetPin | None = _pinned(Want("crates", name, place, ask), context.lock.crate_sets.get(name))
    files = {f"{crate.key}.crate": crate.file for crate in pin.crates} if pin else {}
    return _download(f"crates-{name}", None, files, place)


def local(*names: str, name: str | None = None) -> Node:
    """Files and directories beside the recipe, as one directory; contents and executable bits count, nothing else."""
    context = _context()
    place = context.place()
    folder = context.folder()
    tree: dict[str, Path | bytes] = {}
    content: dict[str, Digest] = {}
    for given in names:
        _check_relative(given, place, "file name")
        for path in _walk(folder / given, place):
            relative = path.relative_to(folder).as_posix()
            context.reads.add(path)
            with context.trusted():
                content[relative] = nar.nar_hash(path)[0]
            tree[relative] = path
    target = name or f"files-{folder.name}"
    drv = Derivation(name=target, builder="local", content=content)
    return _part(_node(target, "source", drv, place, tree=tree))


def text(name: str, content: str) -> Node:
    """A file called `name` in the store with this text, for what a recipe computes."""
    context = _context()
    data = content.encode()
    drv = Derivation(name=name, builder="local", content={"": nar.hash_of_file(data)})
    return _part(_node(name, "source", drv, context.place(), tree={"": data}))


def read(name: str) -> str:
    """The text of a file beside the recipe."""
    context = _context()
    place = context.place()
    _check_relative(name, place, "file name")
    return _read(context.folder() / name, place).decode()


def _read(path: Path, place: str) -> bytes:
    context = _context()
    context.reads.add(path)
    try:
        with context.trusted():
            return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{place}: {path.relative_to(context.root)}: {error.strerror}") from error


def _walk(path: Path, place: str) -> Iterable[Path]:
    context = _context()
    with context.trusted():
        if path.is_symlink() or path.is_file():
            return [path]
        if not path.is_dir():
            raise UsageError(f"{place}: {path.relative_to(context.root)}: no such file or directory")
        found: list[Path] = []
        pending = [path]
        while pending:
            folder = pending.pop()
            context.reads.add(folder)
            for entry in sorted(folder.iterdir()):
                if entry.name in LOCAL_IGNORED:
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    pending.append(entry)
                else:
                    found.append(entry)
        return sorted(found)


def _check_relative(name: str, place: str, what: str) -> None:
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise UsageError(f"{place}: {what} {name!r} must be a relative path without '.' or '..'")


def _pinned(want: Want, pin: P | None) -> P | None:
    context = _context()
    context.wants[want.kind, want.name] = want
    if context.lenient:
        return pin
    if pin is None:
        raise UsageError(f"{want.place}: lock.toml has no {want.kind} {want.name!r}", hint="run: vzrepro lock")
    if pin.request != want.request:
        raise UsageError(
            f"{want.place}: lock.toml is out of date for {want.kind} {want.name!r}",
            reason="the recipe asks for something else than when it was locked",
            hint="run: vzrepro lock",
        )
    return pin


def _empty(target: str, place: str) -> Node:
    return _node(target, "source", Derivation(name=target, builder="fetch", version="0"), place)


def _download(
    target: str, file_name: str | None, files: Mapping[str, PinnedFile], place: str, *, version: str | None = None
) -> Node:
    drv = Derivation(
        name=file_name or target,
        builder="fetch",
        version=version,
        content={name: file.sha256 for name, file in files.items()},
    )
    return _add(_node(target, "source", drv, place, files=files))


def _part(node: Node) -> Node:
    """Register a node that has no name of its own for users."""
    return _context().parts.setdefault(node.drv_hash, node)
