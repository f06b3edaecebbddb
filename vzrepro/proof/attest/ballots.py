"""Which signed statements are votes: envelopes as they were found in, votes and refusals with their reasons out.

Nothing here asks anybody. An envelope that is broken, of an unknown key or out of its time is told of, since somebody
who counts on it should learn why it does not count; one with another kind of statement is left out.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, StorePath, store_path
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest import audit, dsse, provenance
from vzrepro.proof.attest.audit import AuditResult
from vzrepro.proof.attest.dsse import Malformed
from vzrepro.proof.attest.policy import Policy
from vzrepro.proof.attest.provenance import Provenance, builder_id
from vzrepro.proof.attest.signers import Keys, SignerStanding
from vzrepro.proof.attest.statement import Statement
from vzrepro.proof.attest.votes import RefusedVote, Vote, VoteKind

_KINDS = {provenance.PREDICATE_TYPE: VoteKind.PROVENANCE, audit.PREDICATE_TYPE: VoteKind.AUDIT}
_MAX_WHO = 64


@dataclass(frozen=True, slots=True)
class FoundEnvelope:
    """An envelope as it was found: its bytes, and the place, for people."""

    source: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """What a statement of ours says, whoever has signed it. `nar_hash` is what came of the build, None for a rebuild
    that gave nothing; `builder` is the id that provenance gives its builder; `when` is RFC 3339."""

    kind: VoteKind
    path: StorePath
    drv_hash: DrvHash
    build_key: BuildKey
    nar_hash: NarHash | None
    files: tuple[tuple[str, str], ...]
    varied: tuple[str, ...]
    builder: str | None
    when: str | None


@dataclass(frozen=True, slots=True)
class Ballots:
    """All that was found, sorted: votes, what is none and why, and the envelopes that the votes were in, by their
    sha256 in hex (`Vote.envelope`)."""

    votes: tuple[Vote, ...]
    refused: tuple[RefusedVote, ...]
    envelopes: Mapping[str, bytes]


def read(found: Iterable[FoundEnvelope], policy: Policy) -> Ballots:
    """Sort out envelopes by a policy. Equal ones from several places are one."""
    sources: defaultdict[bytes, set[str]] = defaultdict(set)
    for each in found:
        sources[each.data].add(each.source)
    votes, refused, envelopes = [], [], {}
    for data in sorted(sources):
        outcome = _judged(data, tuple(sorted(sources[data])), policy)
        if isinstance(outcome, RefusedVote):
            refused.append(outcome)
        elif outcome is not None:
            votes.append(outcome)
            envelopes[outcome.envelope] = data
    return Ballots(tuple(votes), tuple(refused), envelopes)


def claim_of(statement: Statement) -> Claim | None:
    """What a statement says of a result; None when it is about something else. Raises Malformed."""
    kind = _KINDS.get(statement.predicate_type)
    files = tuple(sorted(statement.files.items()))
    if kind is VoteKind.PROVENANCE:
        told = Provenance.of(statement)
        builder = statement.predicate["runDetails"].get("builder")
        named = builder.get("id") if isinstance(builder, dict) else None
        return Claim(
            kind, told.path, told.drv_hash, told.build_key, told.nar_hash, files, (), str(named), told.finished
        )
    if kind is VoteKind.AUDIT:
        result = AuditResult.of(statement)
        assert statement.output is not None  # it has been compared with the result
        path, registered = statement.output
        if store_path(result.drv_hash, path.name) != path:
            raise Malformed("this audit's statement contradicts itself", reason="its subject is another derivation's")
        rebuilt = None if result.rebuilt is None else result.rebuilt.nar_hash
        return Claim(
            kind,
            path,
            result.drv_hash,
            result.build_key,
            rebuilt,
            files if rebuilt == registered else (),  # the subjects are the registered output's
            (*result.axes, *result.held),
            None,
            result.finished,
        )
    return None


def _judged(data: bytes, sources: tuple[str, ...], policy: Policy) -> Vote | RefusedVote | None:
    try:
        envelope = dsse.parse(data)
        claim = claim_of(Statement.of(envelope))
    except Malformed as error:
        return RefusedVote("somebody", error.in_a_line, sources)
    if claim is None:
        return None
    signers = Keys(trusted=policy.keys).signers(envelope)
    signed = [each.key for each in signers if each.key is not None]
    if not signed:
        who = ", ".join(sorted({each.name or f"key {each.keyid[:_MAX_WHO] or 'without an id'}" for each in signers}))
        wrong = any(each.standing is SignerStanding.FORGED for each in signers)
        why = "the signature is wrong" if wrong else "nobody whom the policy knows has signed it"
        return RefusedVote(who, why, sources)
    if len(signed) > 1:
        who = ", ".join(sorted(key.name for key in signed))
        return RefusedVote(who, "several have signed it, so it does not say which of them has built it", sources)
    [key] = signed
    owner = policy.owner(key)
    assert owner is not None  # its key is one of the policy's
    operator, its_key = owner
    try:
        when = _time(claim.when)
    except ValueError:
        return RefusedVote(operator.name, "its time is none", sources)
    why_not = _why_not(claim, key) or its_key.refusal(when)
    if why_not is not None or claim.nar_hash is None:
        return RefusedVote(operator.name, why_not or "the rebuild gave nothing", sources)
    return Vote(
        operator=operator.name,
        key=key,
        kind=claim.kind,
        path=claim.path,
        drv_hash=claim.drv_hash,
        build_key=claim.build_key,
        nar_hash=claim.nar_hash,
        files=claim.files,
        when=when,
        varied=bool(claim.varied),
        sources=sources,
        envelope=FileHash.of(data).hex,
        machine=its_key.machine,
    )


def _why_not(claim: Claim, key: PublicKey) -> str | None:
    if claim.kind is VoteKind.PROVENANCE and claim.builder != builder_id(key):
        return f"{key.name} has signed what another has built: {claim.builder}"
    return None


def _time(text: str | None) -> dt.datetime | None:
    """A time of day with its zone; None for None. Raises ValueError."""
    if text is None:
        return None
    when = dt.datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError("no time zone")
    try:
        return when.astimezone(dt.UTC)
    except OverflowError as error:
        raise ValueError("out of range") from error
