"""What evaluation gives: the graph of a workspace's derivations, whose nodes know what stands beside a derivation."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from vzrepro.base.errors import UsageError
from vzrepro.base.model import Derivation, DrvHash, FileHash, StorePath, canonical_json, origin_digest, store_path
from vzrepro.recipe.lock import PinnedFile, PinnedTree

NodeKind = Literal["recipe", "image", "source"]

WantKind = Literal["debian-source", "crate-source", "url-source", "git-source", "pypi-source", "image", "crates"]


@dataclass(frozen=True, slots=True)
class Node:
    """A derivation, and what stands beside it without entering its hash.

    `target` is the name users type; `place` is `file:line` of the recipe; `files` maps each downloaded file's
    relative name to its pin, `checkout` is the commit whose tree it is instead; `tree` maps each local file's relative
    name to the workspace file, or to the bytes themselves; `timeout_secs`, `memory_bytes` and `disk_bytes` limit a
    build. `build_only` names the inputs of which nothing is in the output, `linked` the .deb files of the image of
    which something is. `constant` maps axes of an audit that the recipe does not allow to be varied to its reasons.
    """

    target: str
    kind: NodeKind
    place: str
    version: str
    drv: Derivation
    drv_hash: DrvHash
    path: StorePath
    files: Mapping[str, PinnedFile] = field(default_factory=dict)
    tree: Mapping[str, Path | bytes] = field(default_factory=dict)
    timeout_secs: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    build_only: frozenset[str] = frozenset()
    linked: tuple[str, ...] = ()
    constant: Mapping[str, str] = field(default_factory=dict)
    checkout: PinnedTree | None = None

    @property
    def origin(self) -> FileHash | None:
        """The digest of the URLs a download comes from; None for everything else."""
        if self.drv.builder != "fetch":
            return None
        if self.checkout is not None:
            return origin_digest({"": self.checkout.place})
        return origin_digest({name: file.place for name, file in self.files.items()})

    def check(self) -> None:
        """Raise UsageError unless hash and path are those of what the node holds now; before it is made."""
        pins = {name: file.sha256.hex for name, file in self.files.items()}
        if self.checkout is not None:
            pins[""] = self.checkout.nar_hash.hex
        content = {name: digest.hex for name, digest in self.drv.content.items()}
        hashed = self.drv.drv_hash() == self.drv_hash and store_path(self.drv_hash, self.drv.name) == self.path
        if not hashed or (self.drv.builder == "fetch" and pins != content):
            raise UsageError(f"{self.place}: {self.target!r} was changed after its hash had been taken")

    @property
    def download_bytes(self) -> int:
        """The sum of the sizes of the files to download, as far as they are known; a commit's is that of its tree."""
        return sum(file.size or 0 for file in self.files.values()) + (self.checkout.size if self.checkout else 0)


@dataclass(frozen=True, slots=True)
class Want:
    """Something a recipe needs pinned: `vzrepro lock` resolves it, `lock --check` compares it.

    `kind` says which index; `ask` is plain data whose digest is kept in the lock beside the answer. `unpack` says that
    it is to be an archive, which is looked at, but changes no answer.
    """

    kind: WantKind
    name: str
    place: str
    ask: Mapping[str, object]
    unpack: bool = False

    @property
    def request(self) -> str:
        """The digest (hex) of what was asked: another value in the lock means the pin is out of date."""
        return hashlib.sha256(canonical_json({"kind": self.kind, "name": self.name, **self.ask})).hexdigest()


@dataclass(frozen=True)
class DrvGraph:
    """All derivations of a workspace: `targets` by the name users type, `nodes` by drv hash, inputs included.

    `reads` are the files and directories the evaluation depends on; `wants` is everything recipes need pinned.
    """

    root: Path
    targets: Mapping[str, Node]
    nodes: Mapping[DrvHash, Node]
    wants: Sequence[Want]
    reads: frozenset[Path]

    def find(self, target: str) -> Node:
        """The node users call `target`. Raises UsageError with the nearest names."""
        if target in self.targets:
            return self.targets[target]
        near = difflib.get_close_matches(target, self.targets, n=3, cutoff=0.4)
        raise UsageError(
            f"no target is called {target!r}",
            reason=f"the nearest are: {', '.join(near)}" if near else None,
            hint="list all with: vzrepro targets",
        )

    def at(self, base: str) -> Node | None:
        """The node whose object has the base name `base`: `<32 chars>-<name>`, as the last part of a path has it."""
        return self._by_base.get(base)

    @cached_property
    def _by_base(self) -> Mapping[str, Node]:
        return {node.path.base: node for node in self.nodes.values()}

    def inputs(self, node: Node) -> list[Node]:
        """What `node` is made from: its image's node, then its inputs', without repetition."""
        return [self.nodes[drv] for drv in node.drv.dependencies()]

    def input_paths(self, node: Node) -> dict[DrvHash, StorePath]:
        """Where what `node` is made from is in the store."""
        return {each.drv_hash: each.path for each in self.inputs(node)}

    def closure(self, roots: Sequence[Node]) -> list[Node]:
        """`roots` and everything they are built from, each once, inputs before what needs them."""
        order: dict[DrvHash, Node] = {}
        pending: list[tuple[Node, bool]] = [(node, False) for node in reversed(roots)]
        while pending:
            node, expanded = pending.pop()
            if node.drv_hash in order:
                continue
            if expanded:
                order[node.drv_hash] = node
                continue
            pending.append((node, True))
            pending.extend((self.nodes[dep], False) for dep in reversed(node.drv.dependencies()) if dep not in order)
        return list(order.values())
