"""Attestations for tests: a store with a build whose inputs are there, and keys to sign with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vzrepro import nar
from vzrepro.base.model import (
    Derivation,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    Outcome,
    canonical_json,
    store_path,
)
from vzrepro.cache import SigningKey
from vzrepro.store import LocalStore

TEST_KEY = SigningKey("golden-1", bytes(range(32)))
"""Everybody can sign with this one: only golden files do."""


@dataclass(frozen=True)
class Shop:
    """A store with the output `built` of a derivation, made from the image and the source `inputs`."""

    store: LocalStore
    built: ObjectInfo
    inputs: tuple[ObjectInfo, ...]

    @property
    def drv_hash(self) -> DrvHash:
        assert self.built.drv_hash is not None
        return self.built.drv_hash


def put(
    store: LocalStore,
    drv: Derivation,
    files: dict[str, bytes],
    *,
    fed: dict[DrvHash, NarHash] | None = None,
    outcome: Outcome = Outcome.BUILT,
) -> ObjectInfo:
    """Register an output with these files (`{"": …}`: one that is a file) and keep its derivation."""
    with store.scratch(drv.name) as scratch:
        made = scratch / "made"
        for name, content in files.items():
            target = made / name if name else made
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        nar_hash, size, _ = nar.canonical_copy(made, scratch / "tree")
        key = None if fed is None else drv.build_key(fed)
        path = store_path(drv.drv_hash(), drv.name)
        info = store.add(
            scratch / "tree",
            ObjectInfo(path, nar_hash, size, (), drv.drv_hash(), key, outcome=outcome),
        )
    store.put_derivation(drv.drv_hash(), drv.name.partition("-")[0], canonical_json(drv.document()))
    return info


def open_shop(root: Path, *, files: dict[str, bytes] | None = None, name: str = "agent-1.0") -> Shop:
    """A store in which `name` was built; `files` are what came out."""
    store = LocalStore(root, clock=lambda: 1_800_000_000.0)
    tarball = b"a tarball"
    source = Derivation(name="source.tar.xz", builder="fetch", content={"": FileHash.of(tarball)})
    image = Derivation(name="image-c", builder="image", platform="linux/amd64", env={"image_format": "1"})
    drv = Derivation(
        name=name,
        builder="sandbox",
        version="1.0",
        platform="linux/amd64",
        image=image.drv_hash(),
        command=("sh", "/in/build"),
        env={"GREETING": "grüß dich"},
        inputs={"source": source.drv_hash()},
        source_date_epoch=1_767_225_600,
    )
    inputs = (
        put(store, image, {"": b"an image"}, fed={}),
        put(store, source, {"": tarball}, outcome=Outcome.FETCHED),
    )
    fed = {info.drv_hash: info.nar_hash for info in inputs if info.drv_hash is not None}
    built = put(store, drv, files or {"agent": b"a program\n", "share/readme": b"read me\n"}, fed=fed)
    return Shop(store, built, inputs)
