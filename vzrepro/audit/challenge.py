"""Who built what with which result, by the records that builders keep in caches; nothing is built or downloaded.

Everything that somebody has signed about a node is evidence: a narinfo vouches for a result, as a build record does;
provenance and audit statements say that it was built; a record of a difference says that it came out otherwise. What
is signed by a key that is not known here is shown as that, since anybody who can write to a cache can write it.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vzrepro.attest import dsse
from vzrepro.attest.ballots import claim_of
from vzrepro.attest.dsse import Envelope, Malformed
from vzrepro.attest.statement import Statement
from vzrepro.attest.votes import SHORT
from vzrepro.cache.backend import CACHE_INFO, Damaged
from vzrepro.cache.binary import BinaryCache
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.parallel import in_order
from vzrepro.cache.records import MAX_RECORD, BuildRecord, build_key_record
from vzrepro.cache.signing import PublicKey, TrustedKeys, parse_signature
from vzrepro.errors import NotDeterministic, RemoteError, VzreproError
from vzrepro.model import BuildKey, NarHash, ObjectInfo, Outcome
from vzrepro.recipe import Node
from vzrepro.wire import printable

_WORKERS = 8  # nodes and caches that are asked about at once: each asks for several entries
_SHOWN = 5

HERE = "this store"
"""The builder that stands for what is in the local store."""


NOBODY = "nobody"
"""Who has built what nobody has."""


class Way(enum.StrEnum):
    """What kind of evidence something is."""

    STORE = "store"
    NARINFO = "narinfo"
    RECORD = "record"
    PROVENANCE = "provenance"
    AUDIT = "audit"
    DIFFERENCE = "difference"


class State(enum.StrEnum):
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
class Evidence:
    """One thing that `builder` says of a node, found in `place`. `known` says that its signature is good, by a key that
    is known here. `nar_hash` is None for what nobody can believe. `varied` are the axes that an audit had varied."""

    builder: str
    known: bool
    way: Way
    place: str
    nar_hash: NarHash | None
    build_key: BuildKey | None = None
    files: tuple[tuple[str, str], ...] = ()
    varied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a node, a builder, its results (several only if it contradicts itself), and by what."""

    node: str
    builder: str
    state: State
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
        if all(row.state in (State.ABSENT, State.FORGED) for row in self.rows):
            raise VzreproError(
                f"nobody has built {target}, so nothing was compared",
                hint="are the recipes those of the builders? vzrepro cache why-missing " + target,
            )


def challenge(
    nodes: Sequence[Node],
    caches: Sequence[BinaryCache],
    keys: Iterable[PublicKey],
    ours: Mapping[str, ObjectInfo],
    asking: Callable[[Node], object],
    revoked: Iterable[PublicKey] = (),
) -> Challenge:
    """Compare what caches have about nodes, with each other and with `ours` (by store path).

    `keys` are those that are known, and need not be trusted; `revoked` are known as that. `asking` is called with each
    node before its answers are waited for. A cache that fails is asked no further, and told of. Raises RemoteError when
    none answers.
    """
    found_keys = _Keys(keys, revoked)
    silent: dict[str, str] = {}
    for cache, why in zip(caches, in_order(_why_silent, caches), strict=True):
        if why is not None:
            silent[cache.url] = why
    if len(silent) == len(caches):
        raise RemoteError(
            "no cache answers",
            reason="\n".join(f"{url}: {why}" for url, why in silent.items()) or "none was named",
            hint="name one that does: --against URL",
        )

    def ask(job: tuple[Node, BinaryCache]) -> tuple[BinaryCache, list[Evidence] | str]:
        node, cache = job
        if cache.url in silent:
            return cache, []
        try:
            return cache, list(_evidence(node, cache, found_keys))
        except RemoteError as error:
            return cache, error.in_a_line

    jobs = [(node, cache) for node in nodes for cache in caches]
    answers = in_order(ask, jobs, _WORKERS)
    evidence: dict[str, list[Evidence]] = {}
    for node in nodes:
        asking(node)
        mine = ours.get(str(node.path))
        its = [] if mine is None else [_of_store(mine)]
        for _ in caches:
            cache, answer = next(answers)
            if isinstance(answer, str):
                silent[cache.url] = answer
            else:
                its += answer
        evidence[node.target] = its
    return compare(evidence, silent)


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
        return Row(node, builder, State.ABSENT)
    if not results:
        state = State.FORGED
    elif len(results) > 1:
        state = State.CONTRADICTORY
    elif len(supporters) == 1 and len(supporters[results[0]]) == 1:
        state = State.ALONE
    else:
        state = State.SAME if results[0] == common else State.DIFFERENT
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


# --- asking -----------------------------------------------------------------------------------------------------------


class _Keys:
    """The known keys, and what those are called who have signed something. What a revoked one has signed is shown, and
    is worth no more than a stranger's word."""

    def __init__(self, keys: Iterable[PublicKey], revoked: Iterable[PublicKey]) -> None:
        gone = tuple(revoked)
        self.all = tuple({key.raw: key for key in (*gone, *keys)}.values())
        self._revoked = {key.raw for key in gone}
        self._trusted = TrustedKeys(self.all)
        names: defaultdict[str, int] = defaultdict(int)
        for key in self.all:
            names[key.name] += 1
        self._shared = {name for name, number in names.items() if number > 1}

    def name(self, key: PublicKey) -> str:
        """A key's name, with its id where several are called so."""
        return f"{key.name} ({key.id})" if key.name in self._shared else key.name

    def of_signatures(self, message: bytes, signatures: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
        """Who signatures in Nix's form are by: name, whether it is known, whether it is right, as far as one knows."""
        known = {key.name for key in self.all}
        for text in signatures:
            signers = self._trusted.signers(message, [text])
            name = parse_signature(text)[0]
            if signers:
                yield from map(self._known, signers)
            else:
                yield (_forged(name), False, False) if name in known else (_stranger(name), False, True)

    def of_envelope(self, envelope: Envelope) -> Iterator[tuple[str, bool, bool]]:
        """The same for an envelope."""
        signers = envelope.signers(self.all)
        yield from map(self._known, signers)
        names = {key.id: self.name(key) for key in self.all}
        for keyid in sorted({keyid for keyid, _ in envelope.signatures} - {key.id for key in signers}):
            known = keyid in names
            yield (_forged(names[keyid]), False, False) if known else (_stranger(f"key {keyid}"), False, True)

    def _known(self, key: PublicKey) -> tuple[str, bool, bool]:
        revoked = key.raw in self._revoked
        return f"{self.name(key)} (revoked)" if revoked else self.name(key), not revoked, True


def _stranger(name: str) -> str:
    return f"{printable(name[:64])} (unknown)"


def _forged(name: str) -> str:
    return f"{name} (forged)"


def _why_silent(cache: BinaryCache) -> str | None:
    try:
        cache.reach()
        if cache.read(CACHE_INFO, MAX_RECORD) is None:
            return "there is no cache"
    except RemoteError as error:
        return error.in_a_line
    return None


def _of_store(info: ObjectInfo) -> Evidence:
    # What was taken from a cache is shown, and makes nobody's result more common than it is.
    return Evidence(HERE, info.outcome is Outcome.BUILT, Way.STORE, HERE, info.nar_hash, info.build_key)


def _evidence(node: Node, cache: BinaryCache, keys: _Keys) -> Iterator[Evidence]:
    """All that a cache has about a node. Raises RemoteError when it fails."""
    info = None
    try:
        data = cache.read(narinfo_key(node.path), MAX_SIZE)
        info = None if data is None else NarInfo.parse(data)
        if info is not None and info.path != node.path:
            raise Damaged("it is another path's")
    except Damaged:
        yield Evidence("damaged entry", False, Way.NARINFO, cache.url, None)
        info = None
    if info is not None:
        yield from _of_narinfo(info, cache, keys)
        for each in cache.differences(info):
            name = each.by if each.trusted else _stranger(each.by)
            yield Evidence(name, each.trusted, Way.DIFFERENCE, cache.url, each.found)
    for envelope in cache.attestations(node.drv_hash):
        yield from _of_envelope(envelope, node, cache.url, keys)


def _of_narinfo(info: NarInfo, cache: BinaryCache, keys: _Keys) -> Iterator[Evidence]:
    signed = list(keys.of_signatures(info.fingerprint, info.signatures)) or [("nobody", False, True)]
    for name, known, right in signed:
        result = info.nar_hash if right else None
        yield Evidence(name, known, Way.NARINFO, cache.url, result, info.build_key)
    if info.build_key is None:
        return
    try:
        data = cache.read(build_key_record(info.build_key), MAX_RECORD)
        record = None if data is None else BuildRecord.parse(data, cache.url)
    except Damaged:
        record = None
    if record is not None and record.realization.build_key == info.build_key:
        for name, known, right in keys.of_signatures(record.message, record.signatures):
            result = record.realization.nar_hash if right else None
            yield Evidence(name, known, Way.RECORD, cache.url, result, info.build_key)


def _of_envelope(data: bytes, node: Node, place: str, keys: _Keys) -> Iterator[Evidence]:
    try:
        envelope = dsse.parse(data)
        claim = claim_of(Statement.of(envelope))
    except Malformed:
        return
    if claim is None or claim.drv_hash != node.drv_hash or claim.nar_hash is None:
        return
    way = Way(claim.kind.value)
    for name, known, right in keys.of_envelope(envelope):
        result = claim.nar_hash if right else None
        yield Evidence(name, known, way, place, result, claim.build_key, claim.files, claim.varied)
