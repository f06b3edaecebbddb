"""Who built what with which result: evidence by node in, a table and its differences out; nothing is built."""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vzrepro.base.errors import NotDeterministic, VzreproError
from vzrepro.base.model import BuildKey, NarHash, ObjectInfo
from vzrepro.cache.reader import CacheReader
from vzrepro.proof.attest.evidence import HERE, Evidence, Way, collect
from vzrepro.proof.attest.signers import Keys
from vzrepro.proof.attest.votes import SHORT
from vzrepro.recipe.graph import Node

_SHOWN = 5

NOBODY = "nobody"
"""Who has built what nobody has."""


class ResultState(enum.StrEnum):
    """How a builder's result compares with the others'."""

    SAME = "same"
    """All others have it too, or it is the one that more builders have than any other."""
    ALONE = "alone"
    """Nobody else has a result."""
    DIFFERENT = "different"
    ABSENT = "absent"
    CONTRADICTORY = "contradictory"
    """The builder itself has signed several results."""
    FORGED = "forged"
    """It is signed in the name of a known key, which has not signed it, or it is damaged: nobody's result."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a node, a builder, its results (several only if it contradicts itself), and by what."""

    node: str
    builder: str
    state: ResultState
    results: tuple[NarHash, ...] = ()
    ways: tuple[Way, ...] = ()
    places: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """A node with several results: result → builders. `inherited` says that they were fed different inputs, so that
    the difference may come from those, None where that is not known; `files` are those that differ, as far as it is
    told."""

    node: str
    results: Mapping[NarHash, tuple[str, ...]]
    inherited: bool | None
    files: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.node} has {len(self.results)} results:"
        for nar_hash, builders in self.results.items():
            yield f"  {nar_hash.hex[:SHORT]} by {', '.join(builders)}"
        if self.files:
            more = f" and {len(self.files) - _SHOWN} more" if len(self.files) > _SHOWN else ""
            yield f"  files that differ: {', '.join(self.files[:_SHOWN])}{more}"
        if self.inherited is not None:
            yield "  their inputs differed" if self.inherited else "  from the same inputs: it arises here"

    def document(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "node": self.node,
            "results": {str(nar_hash): list(builders) for nar_hash, builders in self.results.items()},
            "inherited": self.inherited,
            "files": list(self.files),
        }


@dataclass(frozen=True, slots=True)
class Challenge:
    """What was found: rows in the nodes' order, nodes with several results, caches that did not answer and why."""

    rows: tuple[Row, ...]
    splits: tuple[Split, ...]
    silent: Mapping[str, str]

    def check(self, target: str) -> None:
        """Raise NotDeterministic when results differ, VzreproError when there was nothing to compare."""
        if self.splits:
            names = ", ".join(each.node for each in self.splits)
            first = next((each for each in self.splits if each.inherited is False), self.splits[0])
            raise NotDeterministic(
                f"builders have different results of {names}",
                reason="\n".join(line for each in self.splits for line in each.lines()),
                hint=f"who is right? build it here from the same inputs: vzrepro audit {first.node}",
            )
        if all(row.state in (ResultState.ABSENT, ResultState.FORGED) for row in self.rows):
            raise VzreproError(
                f"nobody has built {target}, so nothing was compared",
                hint="are the recipes those of the builders? vzrepro cache why-missing " + target,
            )


def challenge(
    nodes: Sequence[Node],
    caches: Sequence[CacheReader],
    keys: Keys,
    ours: Mapping[str, ObjectInfo],
    asking: Callable[[Node], object],
) -> Challenge:
    """Compare what caches have about nodes, with each other and with what is here; raises as `collect` does."""
    return compare(*collect(nodes, caches, keys, ours, asking))


def compare(evidence: Mapping[str, Sequence[Evidence]], silent: Mapping[str, str]) -> Challenge:
    """Turn evidence, by node, into a table and its differences."""
    # A stranger is no row where it has nothing: strangers may be as many as somebody likes to write.
    everywhere = {each.builder for its in evidence.values() for each in its if each.known or each.builder == HERE}
    rows, splits = [], []
    for node, its in evidence.items():
        by_builder: defaultdict[str, list[Evidence]] = defaultdict(list)
        for each in its:
            by_builder[each.builder].append(each)
        results = {name: _results(each) for name, each in by_builder.items()}
        supporters: defaultdict[NarHash, set[str]] = defaultdict(set)
        for name, hashes in results.items():
            for nar_hash in hashes:
                supporters[nar_hash].add(name)
        common = _common(supporters, {each.builder for each in its if each.known})
        for name in sorted(everywhere | set(by_builder), key=_place_of) if its else [NOBODY]:
            rows.append(_row(node, name, by_builder.get(name, []), results.get(name, ()), supporters, common))
        if len(supporters) > 1:
            splits.append(_split(node, supporters, its))
    return Challenge(tuple(rows), tuple(splits), dict(silent))


def _place_of(builder: str) -> tuple[bool, str]:
    return builder != HERE, builder


def _results(its: Sequence[Evidence]) -> tuple[NarHash, ...]:
    """What a builder got, experiments left out where it has something else."""
    sound = [each for each in its if each.nar_hash is not None]
    plain = [each for each in sound if not each.varied]
    return tuple(sorted({each.nar_hash for each in plain or sound if each.nar_hash is not None}))


def _common(supporters: Mapping[NarHash, set[str]], known: set[str]) -> NarHash | None:
    """The result that more builders have than any other; strangers are asked only where nobody else has one."""
    counts = {nar_hash: len(names & known) for nar_hash, names in supporters.items()}
    if not any(counts.values()):
        counts = {nar_hash: len(names) for nar_hash, names in supporters.items()}
    most = max(counts.values(), default=0)
    first = [nar_hash for nar_hash, number in counts.items() if number == most]
    return first[0] if len(first) == 1 else None


def _row(
    node: str,
    builder: str,
    its: Sequence[Evidence],
    results: tuple[NarHash, ...],
    supporters: Mapping[NarHash, set[str]],
    common: NarHash | None,
) -> Row:
    if not its:
        return Row(node, builder, ResultState.ABSENT)
    if not results:
        state = ResultState.FORGED
    elif len(results) > 1:
        state = ResultState.CONTRADICTORY
    elif len(supporters) == 1 and len(supporters[results[0]]) == 1:
        state = ResultState.ALONE
    else:
        state = ResultState.SAME if results[0] == common else ResultState.DIFFERENT
    ways = tuple(sorted({each.way for each in its}))
    return Row(node, builder, state, results, ways, tuple(sorted({each.place for each in its})))


def _split(node: str, supporters: Mapping[NarHash, set[str]], its: Sequence[Evidence]) -> Split:
    ordered = sorted(supporters, key=lambda nar_hash: (-len(supporters[nar_hash]), nar_hash))
    fed: dict[NarHash, set[BuildKey]] = {nar_hash: set() for nar_hash in ordered}
    files: dict[NarHash, set[tuple[str, str]]] = {nar_hash: set() for nar_hash in ordered}
    for each in its:
        if each.nar_hash in fed:
            if each.build_key is not None:
                fed[each.nar_hash].add(each.build_key)
            files[each.nar_hash].update(each.files)
    known = [keys for keys in fed.values() if keys]
    # Where one and the same input gave two results, it arises here, whatever else was fed in.
    inherited = None if len(known) < 2 else not any(a & b for i, a in enumerate(known) for b in known[i + 1 :])
    told = [each for each in files.values() if each]
    differing = set().union(*told) - set(told[0]).intersection(*told) if len(told) > 1 else set()
    return Split(
        node,
        {nar_hash: tuple(sorted(supporters[nar_hash])) for nar_hash in ordered},
        inherited,
        tuple(sorted({name for name, _ in differing})),
    )
