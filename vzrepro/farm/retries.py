"""What follows a failed try of a build: nothing, or another try. Pure, and decided by how often what has happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vzrepro.farm.order import SizeClass

LOST = "LostWorker"
"""The kind of a try whose worker is not heard of any more; the other kinds are those of `order.KINDS`."""

TRIES = 3
"""How many workers may be lost, or have trouble of their own, with one build."""

_PATIENCE_SECS = (5.0, 10.0, 20.0, 40.0, 80.0)
_INTERRUPTS = 20


@dataclass(frozen=True, slots=True)
class Again:
    """Another try: after so many seconds, on a machine of this size."""

    after_secs: float
    size: SizeClass


def again(kind: str, failures: Mapping[str, int], size: SizeClass) -> Again | None:
    """Whether a build that has just failed is tried again. `failures` counts them by kind, this one included.

    A build's own failure, other bytes than those pinned, distrust and non-determinism would be the same elsewhere; a
    plain VzreproError is trouble of the worker's machine: no Docker, a full disk.
    """
    count = failures.get(kind, 1)
    if kind == LOST:
        return Again(0, size) if count < TRIES else None
    if kind == "VzreproError":
        return Again(1.0, size) if count < TRIES else None
    if kind == "Interrupted":
        return Again(0, size) if count < _INTERRUPTS else None
    if kind == "RemoteError":
        return Again(_PATIENCE_SECS[count - 1], size) if count <= len(_PATIENCE_SECS) else None
    if kind == "OutOfMemory" and size == "small":
        return Again(0, "large")
    return None
