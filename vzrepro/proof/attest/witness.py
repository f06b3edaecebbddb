"""What this machine testifies: provenance of what it has built itself, signed, kept here, and pushed along."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from vzrepro import nar
from vzrepro.base.errors import HashMismatch
from vzrepro.base.model import ObjectInfo
from vzrepro.base.signing import SigningKey
from vzrepro.cache.push import Attest
from vzrepro.proof.attest.provenance import Build, NotBuiltHere, build_of
from vzrepro.proof.attest.shelf import Shelf
from vzrepro.proof.attest.statement import Subject, subjects_of
from vzrepro.store import LocalStore


@dataclass(frozen=True, slots=True)
class Testimony:
    """A signed statement that is kept beside the store now; `new` is False when the same was there before."""

    envelope: bytes
    new: bool


def attest(store: LocalStore, info: ObjectInfo, key: SigningKey) -> Testimony:
    """Sign the provenance of a valid object that was built here, and keep it.

    Equal provenance gives an equal envelope, so doing it again changes nothing. The object is hashed first. Raises
    NotBuiltHere, HashMismatch when the object is damaged, OSError.
    """
    build = build_of(store, info)
    tree = store.location(info.path)
    found, _ = nar.nar_hash(tree)
    if found != info.nar_hash:
        raise HashMismatch(
            f"{info.path.name} is damaged and was not signed",
            reason=f"wanted NAR {info.nar_hash.nix}, found {found.nix}",
            hint=f"vzrepro store repair {info.path.base}",
        )
    subjects = subjects_of(info.path, info.nar_hash, tree)
    envelope = build.statement(subjects, key.public).signed(key)
    return Testimony(envelope, Shelf(store).put(build.drv_hash, envelope))


def pushed_along(store: LocalStore, info: ObjectInfo) -> Attest:
    """What `CacheWriter.push` asks for the provenance of `info`, of which it hashes the NAR itself.

    It answers None for what was not built here. The object is looked into when it is first asked; a copy is kept beside
    the store, where that can be written. Raises OSError when asked.
    """
    known: tuple[Build, tuple[Subject, ...]] | None = None

    def provenance(key: SigningKey) -> bytes | None:
        nonlocal known
        if known is None:
            try:
                build = build_of(store, info)
            except NotBuiltHere:
                return None
            known = build, subjects_of(info.path, info.nar_hash, store.location(info.path))
        build, subjects = known
        envelope = build.statement(subjects, key.public).signed(key)
        with contextlib.suppress(OSError):
            Shelf(store).put(build.drv_hash, envelope)
        return envelope

    return provenance
