"""Declaring: what every recipe function does with the current evaluation, and the nodes it makes for it.

`dsl` has the functions that recipes call. What they give is made of Python's own types here, hashed, and sealed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TypeVar

from vzrepro.base.errors import UsageError
from vzrepro.base.model import (
    Derivation,
    Digest,
    DrvHash,
    FileHash,
    NarHash,
    check_name,
    store_name,
    store_path,
)
from vzrepro.recipe.graph import Node, NodeKind, Want
from vzrepro.recipe.lock import CrateSetPin, ImagePin, Lock, PinnedFile, PinnedTree, SourcePin

D = TypeVar("D", bound=Digest)
P = TypeVar("P", SourcePin, ImagePin, CrateSetPin)


@dataclass(slots=True)
class EvaluationContext:
    """What one evaluation knows and collects.

    `lenient` is for `vzrepro lock`: a missing pin gives an empty node in place of an error. `trusted` suspends
    the purity guard while the DSL itself reads a file. `seals` holds every node that was made, by its id, with its
    place and all it held then; `shared` what functions of `vzrepro.recipes` have declared.
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
    seals: dict[int, tuple[Node, str, tuple[object, ...]]] = field(default_factory=dict)
    shared: dict[Callable[[], Node], Node] = field(default_factory=dict)

    def seal(self, node: Node) -> Node:
        """Note what `node` holds; a recipe that changes it later is refused by `check_seals`."""
        self.seals[id(node)] = node, f"{node.place}: {node.target!r}", tuple(_held(node))
        return node

    def check_seals(self) -> None:
        """Raise UsageError unless every node is one that a recipe function made, and holds what it held then."""
        for node, what, before in self.seals.values():
            if not _holds(node, before):
                raise UsageError(
                    f"{what} was changed after it was declared, when its hash had been taken",
                    hint="a declaration is final: give the recipe function what the artifact is to have",
                )
        for node in (*self.nodes.values(), *self.parts.values()):
            if id(node) not in self.seals or any(drv not in self.parts for drv in node.drv.dependencies()):
                raise UsageError(
                    f"{node.place}: {node.target!r}, or an input of it, was made by no recipe function",
                    hint="only what build(), local(), text() and their like return can be an input",
                )

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


_node_fields = attrgetter(*(each.name for each in fields(Node)))
_drv_fields = attrgetter(*(each.name for each in fields(Derivation)))


def _held(node: Node) -> Iterator[object]:
    """Every value that is reached from `node`, down to those that no assignment can change, and every type.

    What is inside a value comes after the value.
    """
    yield type(node)
    yield from _node_fields(node)
    drv, path = node.drv, node.path
    yield from (type(drv), *_drv_fields(drv), type(path), path.hash_part, path.name)
    for mapping in (drv.env, drv.inputs, drv.content, node.files, node.tree, node.constant):
        yield from (*mapping, *mapping.values())
    for file in node.files.values():
        yield from (type(file), file.url, file.sha256, file.size, file.others, *file.others)
    pins: list[Digest] = [file.sha256 for file in node.files.values()]
    if (tree := node.checkout) is not None:
        yield from (type(tree), tree.url, tree.commit, tree.nar_hash, tree.size, tree.submodules)
        pins.append(tree.nar_hash)
    for digest in (node.drv_hash, drv.image, *drv.inputs.values(), *drv.content.values(), *pins):
        yield type(digest)
        if digest is not None:
            yield digest.hex


def _holds(node: Node, before: tuple[object, ...]) -> bool:
    """Whether `node` holds what it held `before`, by identity: what takes a value's place may say that it equals it."""
    try:
        return all(one is other for one, other in zip(before, _held(node), strict=True))
    except (AttributeError, ValueError):
        return False


_evaluation: ContextVar[EvaluationContext] = ContextVar("vzrepro recipe context")


def enter(context: EvaluationContext) -> Callable[[], None]:
    """Make `context` the one the DSL works in; returns the function that ends it."""
    token = _evaluation.set(context)
    return lambda: _evaluation.reset(token)


def current() -> EvaluationContext:
    try:
        return _evaluation.get()
    except LookupError:
        raise UsageError(
            "recipe functions work only inside recipes/", hint="run: vzrepro targets, or read docs/recipes.md"
        ) from None


def shared(declare: Callable[[], Node]) -> Callable[[], Node]:
    """Have `declare` give one node in an evaluation, however many recipes ask for it. For `vzrepro.recipes`."""

    @functools.wraps(declare)
    def once() -> Node:
        made = current().shared
        if declare not in made:
            made[declare] = declare()
        return made[declare]

    return once


def add(node: Node) -> Node:
    context = current()
    first = context.nodes.setdefault(node.target, node)
    if first is not node and first != node:
        raise UsageError(f"{node.place}: {node.target!r} is already the name of the recipe at {first.place}")
    context.parts[node.drv_hash] = node
    return node


def make_node(
    target: str,
    kind: NodeKind,
    drv: Derivation,
    place: str,
    *,
    files: Mapping[str, PinnedFile] | None = None,
    tree: Mapping[str, Path | bytes] | None = None,
    timeout_secs: int | None = None,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    build_only: Iterable[str] = (),
    linked: Iterable[str] = (),
    constant: Mapping[str, str] | None = None,
    checkout: PinnedTree | None = None,
) -> Node:
    try:
        target = _text(target, "a name")
        drv = _plain(drv)
        check_name(target)
        check_name(drv.name)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", hint=error.hint) from None
    drv_hash = drv.drv_hash()
    return current().seal(
        Node(
            target=target,
            kind=kind,
            place=place,
            version=drv.version or "",
            drv=drv,
            drv_hash=drv_hash,
            path=store_path(drv_hash, drv.name),
            files=MappingProxyType(dict(files or {})),
            tree=MappingProxyType(dict(tree or {})),
            timeout_secs=timeout_secs,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            build_only=frozenset(build_only),
            linked=tuple(linked),
            constant=MappingProxyType(dict(constant or {})),
            checkout=checkout,
        )
    )


def _plain(drv: Derivation) -> Derivation:
    """`drv` of Python's own types and read-only mappings alone: what is hashed is then what is used.

    A recipe's own kind of text or mapping could say one thing to the hash and another to the builder.
    """
    if drv.source_date_epoch is not None and type(drv.source_date_epoch) is not int:
        raise UsageError(f"source_date_epoch is {type(drv.source_date_epoch).__name__}, not a whole number")
    return Derivation(
        name=_text(drv.name, "a name"),
        builder=drv.builder,
        version=None if drv.version is None else _text(drv.version, "version"),
        platform=None if drv.platform is None else _text(drv.platform, "platform"),
        image=None if drv.image is None else _digest(drv.image),
        command=tuple([_text(word, "a word of command") for word in drv.command]),
        env=MappingProxyType(
            {_text(key, "a name in env"): _text(each, "a value in env") for key, each in drv.env.items()}
        ),
        inputs=MappingProxyType({_text(key, "an input's name"): _digest(each) for key, each in drv.inputs.items()}),
        content=MappingProxyType({_text(key, "a file's name"): _digest(each) for key, each in drv.content.items()}),
        source_date_epoch=drv.source_date_epoch,
    )


def _digest(digest: D) -> D:
    if type(digest) not in (DrvHash, FileHash, NarHash) or type(digest.hex) is not str:
        raise UsageError(f"a digest is {type(digest).__name__}, which no recipe function gives")
    return digest


def _text(value: object, what: str) -> str:
    """`value` as a `str` and no kind of it. Raises UsageError for what is none."""
    if type(value) is str:
        return value
    if not isinstance(value, str):
        raise UsageError(f"{what} is {type(value).__name__}, not text")
    return str.__str__(value)


def read_file(path: Path, place: str) -> bytes:
    context = current()
    context.reads.add(path)
    try:
        with context.trusted():
            if path.exists() and not path.is_file():
                raise UsageError(f"{place}: {path.relative_to(context.root)} is no file")
            return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{place}: {path.relative_to(context.root)}: {error.strerror}") from error


def require_texts(place: str, **given: object) -> None:
    for what, value in given.items():
        if value is not None and not isinstance(value, str):
            numbers = isinstance(value, int | float) and not isinstance(value, bool)
            raise UsageError(
                f"{place}: {what} is {value!r}, which is {type(value).__name__}, not text",
                hint=f'write it in quotes: {what}="{value}"' if numbers else None,
            )


def require_lists(place: str, **given: Iterable[str]) -> None:
    for what, value in given.items():
        if isinstance(value, str):
            raise UsageError(f"{place}: {what} is text, not a list of texts", hint=f"{what}=[{value!r}]")


def check_relative(name: str, place: str, what: str) -> None:
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name:
        raise UsageError(f"{place}: {what} {name!r} must be a relative path without '.' or '..'")


def pinned(want: Want, pin: P | None) -> P | None:
    context = current()
    context.wants[want.kind, want.name] = want
    if isinstance(pin, SourcePin) and (want.kind == "git-source") != isinstance(pin.file, PinnedTree):
        if pin.request == want.request:
            raise UsageError(
                f"{want.place}: lock.toml has something else than a {want.kind} as {want.name!r}",
                reason="only a git source has a commit, and only that",
                hint=f"remove [source.{want.name}] from lock.toml, and run: vzrepro lock",
            )
        pin = None
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


def empty(target: str, place: str) -> Node:
    return make_node(target, "source", Derivation(name=target, builder="fetch", version="0"), place)


def download(
    target: str,
    file_name: str | None,
    files: Mapping[str, PinnedFile],
    place: str,
    *,
    version: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Node:
    drv = Derivation(
        name=store_name(file_name) if file_name else target,
        builder="fetch",
        version=version,
        env=env or {},
        content={name: file.sha256 for name, file in files.items()},
    )
    return add(make_node(target, "source", drv, place, files=files))


def part(node: Node) -> Node:
    """Register a node that has no name of its own for users."""
    return current().parts.setdefault(node.drv_hash, node)
