"""What builders say that they got, by the records that they keep in caches; nothing is built or downloaded.

Everything that somebody has signed about a node is evidence: a narinfo vouches for a result, as a build record does;
provenance and audit statements say that it was built; a record of a difference says that it came out otherwise. What
is signed by a key that is not known here is shown as that, since anybody who can write to a cache can write it.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import BuildKey, NarHash, ObjectInfo, Outcome
from vzrepro.cache.backend import CACHE_INFO, Damaged
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.parallel import in_order
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.records import MAX_RECORD, BuildRecord, build_key_record
from vzrepro.net import printable
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.ballots import claim_of
from vzrepro.proof.attest.dsse import Envelope, Malformed
from vzrepro.proof.attest.signers import Keys, Signer, SignerStanding
from vzrepro.proof.attest.statement import Statement
from vzrepro.recipe.graph import Node

_WORKERS = 8  # nodes and caches that are asked about at once: each asks for several entries

HERE = "this store"
"""The builder that stands for what is in the local store."""


class Way(enum.StrEnum):
    """What kind of evidence something is."""

    STORE = "store"
    NARINFO = "narinfo"
    RECORD = "record"
    PROVENANCE = "provenance"
    AUDIT = "audit"
    DIFFERENCE = "difference"


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


def collect(
    nodes: Sequence[Node],
    caches: Sequence[CacheReader],
    keys: Keys,
    ours: Mapping[str, ObjectInfo],
    asking: Callable[[Node], object],
) -> tuple[dict[str, list[Evidence]], dict[str, str]]:
    """What caches have about nodes, and what is here (`ours`, by store path): evidence by the node's name, and why
    caches did not answer, by URL.

    `keys` are those that are known, and need not be trusted. `asking` is called with each node before its answers are
    waited for. A cache that fails is asked no further. Raises RemoteError when none answers.
    """
    signers = _Signers(keys)
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

    def ask(job: tuple[Node, CacheReader]) -> tuple[CacheReader, list[Evidence] | str]:
        node, cache = job
        if cache.url in silent:
            return cache, []
        try:
            return cache, list(_evidence(node, cache, signers))
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
    return evidence, silent


class _Signers:
    """Who has signed something, as a challenge shows them. What a revoked key has signed is worth no more than a
    stranger's word, what is forged nothing."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        names = Counter(name for name, _ in {(key.name, key.raw) for key in keys.all})
        self._shared = {name for name, number in names.items() if number > 1}

    def of_signatures(self, message: bytes, signatures: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
        """Who signatures in Nix's form are by: name, whether it is known, whether it is right, as far as one knows."""
        return map(self._shown, self._keys.nix_signers(message, signatures))

    def of_envelope(self, envelope: Envelope) -> Iterator[tuple[str, bool, bool]]:
        """The same for an envelope."""
        return map(self._shown, self._keys.signers(envelope))

    def _shown(self, signer: Signer) -> tuple[str, bool, bool]:
        # Where several keys are called so, the id tells them apart.
        name = signer.name or f"key {signer.keyid}"
        full = f"{name} ({signer.keyid})" if signer.keyid and name in self._shared else name
        match signer.standing:
            case SignerStanding.UNKNOWN:
                return _stranger(name), False, True
            case SignerStanding.FORGED:
                return f"{full} (forged)", False, False
            case SignerStanding.REVOKED:
                return f"{full} (revoked)", False, True
        return full, True, True


def _stranger(name: str) -> str:
    return f"{printable(name[:64])} (unknown)"


def _why_silent(cache: CacheReader) -> str | None:
    try:
        cache.access.reach()
        if cache.access.read(CACHE_INFO, MAX_RECORD) is None:
            return "there is no cache"
    except RemoteError as error:
        return error.in_a_line
    return None


def _of_store(info: ObjectInfo) -> Evidence:
    # What was taken from a cache is shown, and makes nobody's result more common than it is.
    return Evidence(HERE, info.outcome is Outcome.BUILT, Way.STORE, HERE, info.nar_hash, info.build_key)


def _evidence(node: Node, cache: CacheReader, signers: _Signers) -> Iterator[Evidence]:
    """All that a cache has about a node. Raises RemoteError when it fails."""
    info = None
    try:
        data = cache.access.read(narinfo_key(node.path), MAX_SIZE)
        info = None if data is None else NarInfo.parse(data)
        if info is not None and info.path != node.path:
            raise Damaged("it is another path's")
    except Damaged:
        yield Evidence("damaged entry", False, Way.NARINFO, cache.url, None)
        info = None
    if info is not None:
        yield from _of_narinfo(info, cache, signers)
        for each in cache.differences(info):
            name = each.by if each.trusted else _stranger(each.by)
            yield Evidence(name, each.trusted, Way.DIFFERENCE, cache.url, each.found)
    for envelope in cache.attestations(node.drv_hash):
        yield from _of_envelope(envelope, node, cache.url, signers)


def _of_narinfo(info: NarInfo, cache: CacheReader, signers: _Signers) -> Iterator[Evidence]:
    signed = list(signers.of_signatures(info.fingerprint, info.signatures)) or [("nobody", False, True)]
    for name, known, right in signed:
        result = info.nar_hash if right else None
        yield Evidence(name, known, Way.NARINFO, cache.url, result, info.build_key)
    if info.build_key is None:
        return
    try:
        data = cache.access.read(build_key_record(info.build_key), MAX_RECORD)
        record = None if data is None else BuildRecord.parse(data, cache.url)
    except Damaged:
        record = None
    if record is not None and record.realization.build_key == info.build_key:
        for name, known, right in signers.of_signatures(record.message, record.signatures):
            result = record.realization.nar_hash if right else None
            yield Evidence(name, known, Way.RECORD, cache.url, result, info.build_key)


def _of_envelope(data: bytes, node: Node, place: str, signers: _Signers) -> Iterator[Evidence]:
    try:
        envelope = dsse.parse(data)
        claim = claim_of(Statement.of(envelope))
    except Malformed:
        return
    if claim is None or claim.drv_hash != node.drv_hash or claim.nar_hash is None:
        return
    way = Way(claim.kind.value)
    for name, known, right in signers.of_envelope(envelope):
        result = claim.nar_hash if right else None
        yield Evidence(name, known, way, place, result, claim.build_key, claim.files, claim.varied)
