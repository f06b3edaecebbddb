"""`DrvGraph` + what is valid → `Plan`, a value that can be printed, tested and then executed; and `why`.

Planning asks questions through the `PlanningFacts` protocol and starts nothing. It goes from the targets downwards and
stops at every object that is there or can be had, so a kernel in the cache means no toolchain is planned.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from vzrepro.base.model import BuildKey, DrvHash, FileHash, ObjectInfo, StorePath
from vzrepro.recipe.graph import DrvGraph, Node

Verb = Literal["have", "copy", "substitute", "fetch", "import", "image", "build"]
"""What a step does: nothing · copy an equal object under its new name · take from a cache · download · import a
local tree · write a toolchain image · build in the sandbox."""

MADE: frozenset[Verb] = frozenset({"build", "image"})
"""What makes an object from its inputs, and so waits for them."""

_UNKNOWN_SECS = 60.0
"""What making an object is taken to last, to order the steps, when nothing is known."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a cache holds under a store path: its download size in bytes, and the URLs' digest."""

    download_bytes: int
    origin: FileHash | None
    cache: str


def objection(node: Node, origin: FileHash | None, cache: str) -> str | None:
    """Why the object of `origin` in `cache` is not taken for `node`, although trusted keys vouch for it, if so.

    A download is taken when it was verified from the URLs that the recipe has now: what says so is `VzOrigin`.
    """
    if node.origin in (None, origin):
        return None
    said = f"{cache} has {node.path.base}, but "
    if origin is None:
        return f"{said}does not say where it was downloaded (VzOrigin is lost where other Nix programs copy)"
    return f"{said}it was downloaded from another URL than the recipe's"


class PlanningFacts(Protocol):
    """What planning may ask about the world."""

    def have(self, paths: Sequence[StorePath]) -> Mapping[StorePath, ObjectInfo]:
        """Those of these objects that are valid here, asked for all at once."""

    def origin_known(self, path: StorePath, origin: FileHash) -> bool:
        """Whether the local object was verified from these URLs."""

    def offers(self, nodes: Sequence[Node]) -> Mapping[StorePath, Offer]:
        """What trusted caches offer of these nodes, asked for all at once; those that no cache has are left out."""

    def equal(self, key: BuildKey) -> ObjectInfo | None:
        """A valid local object that the same work gave before, under another name."""

    def expected_secs(self, target: str, verb: str) -> float | None:
        """How long this takes, as far as it is known."""


@dataclass(frozen=True, slots=True)
class Step:
    """What to do for one node, and why. `info` is the object that is there, or for `copy` the one to copy.

    `urgency` is how much waits for it: the expected seconds of the longest chain that begins with it, of itself and
    what is made from it one after the other, over those of the plan's longest; 1 for what must not be late.
    """

    node: Node
    verb: Verb
    reason: str
    info: ObjectInfo | None = None
    download_bytes: int = 0
    expected_secs: float | None = None
    urgency: float = 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps for `targets`, inputs before what needs them; `have` steps are those that others rely on."""

    targets: tuple[Node, ...]
    steps: tuple[Step, ...]

    def todo(self) -> tuple[Step, ...]:
        """The steps that do something."""
        return tuple(step for step in self.steps if step.verb != "have")

    def actions(self) -> dict[str, int]:
        """How many steps of each verb there are to do."""
        return dict(Counter(step.verb for step in self.todo()))

    def download_bytes(self) -> int:
        """Bytes that will be downloaded, from mirrors and caches."""
        return sum(step.download_bytes for step in self.todo())


def make_plan(graph: DrvGraph, targets: Sequence[Node], known: PlanningFacts) -> Plan:
    """Decide for every node that is needed. Never raises for what the world lacks: then the step is to build."""
    direct = _direct_steps(graph, targets, known)
    steps: dict[DrvHash, Step] = {}
    # An explicit stack: a graph of 10,000 derivations in a row is deeper than Python's recursion limit.
    pending: list[tuple[Node, bool]] = [(node, False) for node in reversed(targets)]
    while pending:
        node, inputs_done = pending.pop()
        if node.drv_hash in steps:
            continue
        if inputs_done:
            steps[node.drv_hash] = _from_inputs(node, steps, known)
            continue
        step = direct[node.drv_hash]
        if step is not None:
            steps[node.drv_hash] = step
            continue
        pending.append((node, True))
        for dep in reversed(node.drv.dependencies()):
            if dep not in steps:
                pending.append((graph.nodes[dep], False))
    return Plan(tuple(targets), _with_urgency(tuple(steps.values())))


def _with_urgency(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps, inputs before what needs them, each with its urgency."""
    longest: dict[DrvHash, float] = {}
    behind: dict[DrvHash, float] = {}
    for step in reversed(steps):
        drv = step.node.drv_hash
        unknown = _UNKNOWN_SECS if step.verb in MADE else 0.0
        longest[drv] = behind.get(drv, 0.0) + (unknown if step.expected_secs is None else step.expected_secs)
        for need in step.node.drv.dependencies() if step.verb in MADE else ():
            behind[need] = max(behind.get(need, 0.0), longest[drv])
    most = max(longest.values(), default=0.0)
    return tuple(replace(step, urgency=longest[step.node.drv_hash] / most) for step in steps) if most else steps


def _direct_steps(graph: DrvGraph, targets: Sequence[Node], known: PlanningFacts) -> dict[DrvHash, Step | None]:
    """The steps that need no inputs, for every node that is looked at; None where the inputs must be realized first.

    Level by level from the targets downwards, so that store and caches are asked about a whole level at once.
    """
    direct: dict[DrvHash, Step | None] = {}
    level = {node.drv_hash: node for node in targets}
    while level:
        have = known.have([node.path for node in level.values()])
        local = {drv: _here(node, have.get(node.path), known) for drv, node in level.items()}
        offers = known.offers([node for drv, node in level.items() if local[drv] is None])
        for drv, node in level.items():
            direct[drv] = local[drv] or _elsewhere(node, offers.get(node.path), known)
        level = {
            dep: graph.nodes[dep]
            for drv, node in level.items()
            if direct[drv] is None
            for dep in node.drv.dependencies()
            if dep not in direct
        }
    return direct


def _here(node: Node, info: ObjectInfo | None, known: PlanningFacts) -> Step | None:
    """The step for a node that is in the store, as `info`, or comes from the workspace."""
    if info is not None:
        if node.origin is None or known.origin_known(node.path, node.origin):
            return Step(node, "have", "it is in the store", info)
        return Step(
            node,
            "fetch",
            "its URL changed while its hash did not: fetched once again to see that both belong together",
            download_bytes=node.download_bytes,
        )
    return Step(node, "import", "local files") if node.drv.builder == "local" else None


def _elsewhere(node: Node, offer: Offer | None, known: PlanningFacts) -> Step | None:
    """The step for a node that a cache or a mirror has."""
    if offer is not None and objection(node, offer.origin, offer.cache) is None:
        return Step(
            node,
            "substitute",
            f"{offer.cache} has it",
            download_bytes=offer.download_bytes,
            expected_secs=known.expected_secs(node.target, "substitute"),
        )
    if node.drv.builder == "fetch":
        expected = known.expected_secs(node.target, "fetch")
        return Step(node, "fetch", "not here yet", download_bytes=node.download_bytes, expected_secs=expected)
    return None


def _from_inputs(node: Node, steps: Mapping[DrvHash, Step], known: PlanningFacts) -> Step:
    """The step for a node whose inputs are planned: copy when the same work was done before, else build."""
    inputs = [steps[dep] for dep in node.drv.dependencies()]
    nar_hashes = {step.node.drv_hash: step.info.nar_hash for step in inputs if step.verb == "have" and step.info}
    if len(nar_hashes) == len(inputs):
        equal = known.equal(node.drv.build_key(nar_hashes))
        if equal is not None:
            return Step(node, "copy", f"the same inputs gave {equal.path.base}", equal)
    changing = sorted({step.node.target for step in inputs if step.verb in ("build", "copy")})
    verb: Verb = "image" if node.drv.builder == "image" else "build"
    reason = "no output for these inputs is here or in a cache"
    if changing and verb == "build":
        reason += f" (unless {', '.join(changing)} come out as they were)"
    return Step(node, verb, reason, expected_secs=known.expected_secs(node.target, verb))


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One difference between two derivations: a dotted `field`, its value `before` and `after` (None: absent)."""

    field: str
    before: Any
    after: Any


def diff(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[FieldChange]:
    """The structural difference of two canonical documents, field by field, in the order of the fields."""
    changes: list[FieldChange] = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += diff(old, new, f"{prefix}{key}.")
        else:
            changes.append(FieldChange(f"{prefix}{key}", old, new))
    return changes


class DerivationHistory(Protocol):
    """What `why` may ask about the past."""

    def derivation(self, drv: DrvHash) -> bytes | None:
        """The canonical JSON kept for a drv hash."""

    def derivations_named(self, name: str) -> Iterable[tuple[DrvHash, bytes, float]]:
        """Kept derivations of a name: hash, canonical JSON, last seen (unix seconds), newest first."""


def newest(node: Node, past: DerivationHistory) -> dict[str, Any] | None:
    """The newest kept derivation of the node's recipe that is not the node's own."""
    return next(_others(node, past), None)


def nearest(node: Node, past: DerivationHistory) -> dict[str, Any] | None:
    """The kept derivation of the node's recipe that differs in the fewest fields; of several, the newest."""
    own = node.drv.document()
    return min(_others(node, past), key=lambda other: len(diff(other, own)), default=None)


def _others(node: Node, past: DerivationHistory) -> Iterator[dict[str, Any]]:
    for drv_hash, canonical, _seen in past.derivations_named(node.target):
        if drv_hash != node.drv_hash:
            yield json.loads(canonical)


def why(
    graph: DrvGraph,
    node: Node,
    past: DerivationHistory,
    choose: Callable[[Node, DerivationHistory], dict[str, Any] | None] = newest,
) -> list[tuple[str, list[FieldChange]]]:
    """What changed since the kept derivation that is chosen: (target, changes) from `node` down to the origin.

    Inputs are followed where both sides name one by the same key. An empty list: nothing was kept to compare with.
    """
    before = choose(node, past)
    if before is None:
        return []
    found: list[tuple[str, list[FieldChange]]] = []
    pending: list[tuple[Node, Mapping[str, Any]]] = [(node, before)]
    seen: set[DrvHash] = set()
    while pending:
        current, old = pending.pop(0)
        if current.drv_hash in seen:
            continue
        seen.add(current.drv_hash)
        changes = diff(old, current.drv.document())
        found.append((current.target, changes))
        for change in changes:
            follows = change.field == "image" or change.field.startswith("inputs.")
            if not follows or change.before is None or change.after is None:
                continue
            kept = past.derivation(DrvHash(change.before))
            if kept is not None:
                pending.append((graph.nodes[DrvHash(change.after)], json.loads(kept)))
    return found
