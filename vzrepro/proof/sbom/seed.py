"""The trusted binary seed of a graph: the .debs that its toolchain images are written from, which no build makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vzrepro.base.model import FileHash
from vzrepro.recipe.graph import DrvGraph, Node


@dataclass(frozen=True, slots=True)
class SeedImage:
    """One toolchain image: its target, how many .debs it is written from, and their sizes' sum in bytes."""

    target: str
    packages: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Seed:
    """The whole seed: a .deb that several images share counts once; `bytes` are those of the .deb files."""

    packages: int
    bytes: int
    images: tuple[SeedImage, ...]


def seed(graph: DrvGraph, targets: Sequence[Node]) -> Seed:
    """What `targets` rest on: the .debs of every image in their closure, images sorted by name."""
    unique: dict[FileHash, int] = {}
    images = []
    for image in graph.closure(targets):
        if image.kind != "image":
            continue
        debs = {file.sha256: file.size or 0 for each in graph.inputs(image) for file in each.files.values()}
        unique |= debs
        images.append(SeedImage(image.target, len(debs), sum(debs.values())))
    return Seed(len(unique), sum(unique.values()), tuple(sorted(images, key=lambda each: each.target)))
