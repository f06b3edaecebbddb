"""A `DrvGraph` as bytes, and back, believing nothing: they come from a process that runs recipes.

What is read is made of Python's own types and of ours, every hash is taken anew, and no path leads out of the workspace
or of what comes with vzrepro.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, get_args

import vzrepro
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.model import (
    Builder,
    Derivation,
    Digest,
    DrvHash,
    FileHash,
    NarHash,
    check_name,
    store_path,
)
from vzrepro.recipe.graph import DrvGraph, Node, NodeKind, Want, WantKind
from vzrepro.recipe.lock import PinnedFile, PinnedTree

T = TypeVar("T")

_DIGESTS: dict[str, type[Digest]] = {kind.__name__: kind for kind in (DrvHash, FileHash, NarHash)}


def dump(graph: DrvGraph) -> bytes:
    """The graph's bytes, for `load`."""
    every = {id(node): node for node in (*graph.nodes.values(), *graph.targets.values())}
    numbers = {key: number for number, key in enumerate(every)}
    document = {
        "all": [_node_document(node) for node in every.values()],
        "nodes": [numbers[id(node)] for node in graph.nodes.values()],
        "targets": [numbers[id(node)] for node in graph.targets.values()],
        "wants": [[want.kind, want.name, want.place, dict(want.ask), want.unpack] for want in graph.wants],
        "reads": [str(path) for path in graph.reads],
    }
    return json.dumps(document).encode()


def dump_error(error: VzreproError) -> bytes:
    """The bytes that make `load` raise this error."""
    usage = isinstance(error, UsageError)
    return json.dumps({"error": [usage, error.message, error.reason, error.hint]}).encode()


def load(data: bytes, root: Path) -> DrvGraph:
    """The graph of the workspace `root`, or the error, that the bytes say. Raises VzreproError, too, for what is
    neither."""
    try:
        document = json.loads(data)
        if "error" in document:
            usage, message, reason, hint = document["error"]
            kind = UsageError if usage else VzreproError
            raise kind(_text(message), reason=_or_none(_text, reason), hint=_or_none(_text, hint))
        return _graph(document, root)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise VzreproError(
            "the process that evaluates the recipes answered with something else", reason=str(error)
        ) from error


def _node_document(node: Node) -> dict[str, object]:
    drv, tree = node.drv, node.checkout
    return {
        "target": node.target,
        "kind": node.kind,
        "place": node.place,
        "version": node.version,
        "drv": [
            drv.name,
            drv.builder,
            drv.version,
            drv.platform,
            None if drv.image is None else drv.image.hex,
            drv.command,
            dict(drv.env),
            {name: digest.hex for name, digest in drv.inputs.items()},
            {name: [type(digest).__name__, digest.hex] for name, digest in drv.content.items()},
            drv.source_date_epoch,
        ],
        "files": {name: [file.url, file.sha256.hex, file.size, file.others] for name, file in node.files.items()},
        "tree": {
            name: [base64.b64encode(content).decode()] if isinstance(content, bytes) else str(content)
            for name, content in node.tree.items()
        },
        "limits": [node.timeout_secs, node.memory_bytes, node.disk_bytes],
        "build_only": sorted(node.build_only),
        "linked": node.linked,
        "constant": dict(node.constant),
        "checkout": tree and [tree.url, tree.commit, tree.nar_hash.hex, tree.size, tree.submodules],
    }


def _graph(document: Mapping[str, Any], root: Path) -> DrvGraph:
    places = (root, Path(vzrepro.__file__).parent / "recipes")
    every = [_node(each, places) for each in document["all"]]
    nodes = {every[number].drv_hash: every[number] for number in document["nodes"]}
    targets = {every[number].target: every[number] for number in document["targets"]}
    for node in every:
        if any(drv not in nodes for drv in (node.drv_hash, *node.drv.dependencies())):
            raise ValueError(f"{node.target} has an input that is not there")
    return DrvGraph(
        root=root,
        targets=targets,
        nodes=nodes,
        wants=tuple(_want(each) for each in document["wants"]),
        reads=frozenset(Path(_text(each)) for each in document["reads"]),
    )


def _want(document: Any) -> Want:
    kind, name, place, ask, unpack = document
    found: WantKind = _one_of(WantKind, kind)
    return Want(found, _text(name), _text(place), _mapping(ask, lambda value: value), _flag(unpack))


def _node(document: Any, places: tuple[Path, ...]) -> Node:
    drv = _derivation(*document["drv"])
    drv_hash = drv.drv_hash()
    timeout_secs, memory_bytes, disk_bytes = document["limits"]
    kind: NodeKind = _one_of(NodeKind, document["kind"])
    return Node(
        target=check_name(_text(document["target"])),
        kind=kind,
        place=_text(document["place"]),
        version=_text(document["version"]),
        drv=drv,
        drv_hash=drv_hash,
        path=store_path(drv_hash, drv.name),
        files=_mapping(document["files"], _file, _inside),
        tree=_mapping(document["tree"], lambda content: _content(content, places), _inside),
        timeout_secs=_or_none(_number, timeout_secs),
        memory_bytes=_or_none(_number, memory_bytes),
        disk_bytes=_or_none(_number, disk_bytes),
        build_only=frozenset(map(_text, document["build_only"])),
        linked=tuple(map(_text, document["linked"])),
        constant=_mapping(document["constant"], _text),
        checkout=_or_none(_checkout, document["checkout"]),
    )


def _derivation(
    name: Any,
    builder: Any,
    version: Any,
    platform: Any,
    image: Any,
    command: Any,
    env: Any,
    inputs: Any,
    content: Any,
    epoch: Any,
) -> Derivation:
    known: Builder = _one_of(Builder, builder)
    return Derivation(
        name=check_name(_text(name)),
        builder=known,
        version=_or_none(_text, version),
        platform=_or_none(_text, platform),
        image=_or_none(DrvHash, image),
        command=tuple(map(_text, command)),
        env=_mapping(env, _text),
        inputs=_mapping(inputs, DrvHash, _input),
        content=_mapping(content, lambda digest: _DIGESTS[digest[0]](digest[1]), _inside),
        source_date_epoch=_or_none(_number, epoch),
    )


def _file(document: Any) -> PinnedFile:
    url, sha256, size, others = document
    return PinnedFile(_text(url), FileHash(sha256), _or_none(_number, size), tuple(map(_text, others)))


def _checkout(document: Any) -> PinnedTree:
    url, commit, nar_hash, size, submodules = document
    return PinnedTree(_text(url), _text(commit), NarHash(nar_hash), _number(size), _flag(submodules))


def _content(document: Any, places: tuple[Path, ...]) -> Path | bytes:
    if isinstance(document, list):
        [data] = document
        return base64.b64decode(_text(data), validate=True)
    path = Path(_text(document))
    if ".." in path.parts or not any(path.is_relative_to(place) for place in places):
        raise ValueError(f"{path} is outside the workspace")
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _mapping(document: Any, value: Callable[[Any], T], key: Callable[[Any], str] = _text) -> Mapping[str, T]:
    return MappingProxyType({key(name): value(each) for name, each in document.items()})


def _number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not a whole number")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{value!r} is not true or false")
    return value


def _or_none(kind: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else kind(value)


def _one_of(names: Any, value: Any) -> Any:
    if value not in get_args(names):
        raise ValueError(f"{value!r} is none of {get_args(names)}")
    return value


def _inside(name: Any) -> str:
    """The relative name of a file, or "" for the only one."""
    if (name and any(part in ("", ".", "..") for part in _text(name).split("/"))) or "\0" in name:
        raise ValueError(f"{name!r} is no relative path")
    return _text(name)


def _input(name: Any) -> str:
    if name in ("", ".", "..") or "/" in _text(name) or "\0" in name:
        raise ValueError(f"{name!r} is no name below /in")
    return _text(name)
