"""Builds without a container engine: the maker and the realizer are real, sandboxes are functions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from vzrepro import nar, sandbox
from vzrepro.base.config import Config
from vzrepro.base.model import Derivation, DrvHash, FileHash, store_path
from vzrepro.cache import CacheReader, CacheWriter
from vzrepro.proof.attest.witness import pushed_along
from vzrepro.realize.inventory import Inventory
from vzrepro.realize.maker import Inputs, Maker
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import DrvGraph, Node, NodeKind
from vzrepro.recipe.lock import PinnedFile
from vzrepro.sandbox.log import Log
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import LocalStore

RUNTIME = sandbox.Runtime("docker", "docker", "28", "28", 2, "overlay2", False, 2, 8 << 30)

Run = Callable[..., sandbox.RunLimits]
"""What `sandbox.run` is."""


def node(name: str, drv: Derivation, kind: str = "build") -> Node:
    """A node whose derivation is this one."""
    drv_hash = drv.drv_hash()
    return Node(name, cast(NodeKind, kind), "recipes/thing.py:1", "", drv, drv_hash, store_path(drv_hash, name))


@contextlib.contextmanager
def played(run: Run) -> Iterator[None]:
    """Have `run` stand in for the sandbox, until the end of the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "check", lambda: RUNTIME)
        patch.setattr(sandbox, "sweep", list)
        patch.setattr(sandbox, "sharing_of", lambda *_: sandbox.Sharing(True, ""))
        patch.setattr(sandbox, "run", run)
        yield


def observed(job: sandbox.Job) -> str:
    """What the program that audits put into a sandbox says of a job's surroundings."""
    around = job.surroundings
    seen = {"umask": f"{around.umask:03o}", "host": around.hostname, "domain": str(around.domainname)}
    return f"vzrepro-observed {json.dumps(seen)}"


class LabMaker(Maker):
    """A maker whose jobs have no image."""

    loaded: list[str]

    def job(self, node: Node, inputs: Inputs, scratch: Path) -> sandbox.Job:
        log = self.store.log_path(node.path)
        log.parent.mkdir(parents=True, exist_ok=True)
        mounted = {name: self.store.location(inputs[drv]) for name, drv in node.drv.inputs.items()}
        return sandbox.Job(node.target, "sha256:0", node.drv.command, scratch, log, 0, 1, inputs=mounted)

    def load_image(self, node: Node, inputs: Inputs) -> None:
        self.loaded.append(node.target)


# --- a small workspace ------------------------------------------------------------------------------------------------

_ARCHIVE = hashlib.shake_256(b"archive").digest(1_200_000)
LOG = b"a line of a log\n" * 4096


def grinds(job: sandbox.Job, *, on_line: Callable[[str], None], stop: threading.Event) -> sandbox.RunLimits:
    """A sandbox whose result is a function of the job's command and inputs, and refers to the inputs."""
    on_line(observed(job))
    with Log(job.log) as log:
        log.write(LOG)
    mixed = hashlib.sha256(repr(job.command).encode())
    for name, place in sorted(job.inputs.items()):
        mixed.update(name.encode() + bytes.fromhex(nar.nar_hash(place)[0].hex))
    (job.out / "bin").mkdir(parents=True)
    (job.out / "bin" / "tool").write_bytes(hashlib.shake_256(mixed.digest()).digest(200_000))
    (job.out / "made-from").write_text("".join(f"{place.name}\n" for _, place in sorted(job.inputs.items())))
    (job.out / "link").symlink_to("bin/tool")
    return sandbox.RunLimits(job, stop)


def small_sources(place: Path) -> None:
    """Write what is downloaded for `small_graph`."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "archive").write_bytes(_ARCHIVE)


def small_graph(place: Path) -> DrvGraph:
    """A text and a download from `place` (`small_sources`), two builds of them, and `whole`, built from these."""
    text = b"local\n"
    sha256 = FileHash(hashlib.sha256(_ARCHIVE).hexdigest())
    archive = node("archive", Derivation("archive", "fetch", content={"": sha256}), "source")
    files = {"": PinnedFile((place / "archive").as_uri(), sha256, len(_ARCHIVE))}
    archive = replace(archive, files=files)
    notes = node("notes", Derivation("notes", "local", content={"": nar.hash_of_file(text)}), "source")
    notes = replace(notes, tree={"": text})

    def built(name: str, inputs: Sequence[Node]) -> Node:
        given: dict[str, DrvHash] = {each.target: each.drv_hash for each in inputs}
        drv = Derivation(
            name, "sandbox", platform="linux/amd64", image=notes.drv_hash, inputs=given, command=("make", name)
        )
        return node(name, drv, "recipe")

    left, right = built("left", [notes, archive]), built("right", [archive])
    whole = built("whole", [left, right])
    nodes = {each.drv_hash: each for each in (notes, archive, left, right, whole)}
    return DrvGraph(place, {each.target: each for each in nodes.values()}, nodes, (), frozenset())


def realizer(
    graph: DrvGraph, store: LocalStore, caches: Sequence[CacheReader] = (), writers: Sequence[CacheWriter] = ()
) -> Realizer:
    """What executes plans of `graph`; under `played`, without a container engine."""
    inventory = Inventory(store, caches)
    maker = LabMaker(store, Config(), Mirrors({}), None, inventory.keep)
    maker.loaded = []
    return Realizer(graph, inventory, maker, writers, provenance=lambda info: pushed_along(store, info))
