"""What came out of a target's build, for a bill that is to be tied to the very files that are shipped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from vzrepro import nar
from vzrepro.base.errors import HashMismatch, UsageError
from vzrepro.proof.sbom.components import BuildOutput, File
from vzrepro.recipe.graph import Node
from vzrepro.store import LocalStore

_CHUNK = 1 << 20


def read_output(store: LocalStore, node: Node) -> BuildOutput:
    """The hashes of `node`'s object and of the regular files in it.

    Raises UsageError when the store does not have it, HashMismatch when it is not what was registered.
    """
    info = store.query(node.path)
    if info is None:
        raise UsageError(
            f"{node.target} is not in the store, so what came out of its build is not known",
            hint=f"vzrepro realize {node.target}",
        )
    place = store.location(node.path)
    found, size = nar.nar_hash(place)
    if found != info.nar_hash:
        raise HashMismatch(
            f"{place} is not what was registered",
            reason=f"wanted: NAR hash {info.nar_hash.hex}\nfound:  NAR hash {found.hex}",
            hint=f"vzrepro store repair {node.path.base}",
        )
    return BuildOutput(found, size, tuple(_files(place, node.path.name)))


def _files(place: Path, name: str) -> Iterator[File]:
    if place.is_file() and not place.is_symlink():
        yield _hashed(place, name)
        return
    for path in sorted(place.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield _hashed(path, path.relative_to(place).as_posix())


def _hashed(path: Path, name: str) -> File:
    sha1, sha256, size = hashlib.sha1(usedforsecurity=False), hashlib.sha256(), 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            sha1.update(chunk)
            sha256.update(chunk)
            size += len(chunk)
    return File(name, sha1.hexdigest(), sha256.hexdigest(), size)
