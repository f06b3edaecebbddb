"""What one envelope is worth here: who signed it, what it states, and whether it agrees with our output."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from vzrepro.attest import audit, dsse, provenance, vsa
from vzrepro.attest.audit import AuditResult
from vzrepro.attest.dsse import Envelope, Malformed
from vzrepro.attest.provenance import Provenance
from vzrepro.attest.statement import Statement
from vzrepro.cache.signing import PublicKey, TrustedKeys
from vzrepro.model import FileHash, NarHash, ObjectInfo, StorePath


class Standing(enum.StrEnum):
    """What a signer is to this machine."""

    OWN = "own"
    """This machine's or this user's own key."""
    TRUSTED = "trusted"
    REVOKED = "revoked"
    UNKNOWN = "unknown"
    """Nobody that is known here: the key id is what the envelope claims."""
    FORGED = "forged"
    """It carries the id of a key that is known here, which has not signed it."""


@dataclass(frozen=True, slots=True)
class Keys:
    """The public keys that are known here."""

    own: tuple[PublicKey, ...]
    trusted: TrustedKeys

    def standing(self, key: PublicKey) -> Standing:
        """What a key is here, by its bytes. A revoked one is nothing else."""
        if key.raw in {each.raw for each in self.trusted.revoked}:
            return Standing.REVOKED
        return Standing.OWN if key.raw in {each.raw for each in self.own} else Standing.TRUSTED

    @property
    def all(self) -> tuple[PublicKey, ...]:
        """All of them."""
        return (*self.own, *self.trusted.keys, *self.trusted.revoked)


@dataclass(frozen=True, slots=True)
class Signer:
    """Who has signed an envelope, or is said to have: `name` is None where the key is not known."""

    name: str | None
    keyid: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class Reviewed:
    """An envelope: `sha256` of its bytes; `kind` is `provenance`, `audit`, `summary`, another predicate's type, or None
    when it says nothing (`wrong` says why). `result` is what came out of the (re)build, as far as it tells of one;
    `agrees` whether that is our output, None where one of the two is not known. `detail` is an audit's verdict with its
    axes, or a summary's result. `when` is RFC 3339.
    """

    sha256: FileHash
    signers: tuple[Signer, ...]
    kind: str | None
    result: NarHash | None = None
    agrees: bool | None = None
    detail: str | None = None
    when: str | None = None
    wrong: str | None = None


def review(data: bytes, keys: Keys, ours: ObjectInfo | None, about: StorePath | None = None) -> Reviewed:
    """Look at one envelope about the output `about`, that is `ours` if we have it. Never raises for anything that is in
    it; a statement about another output, as somebody may have copied it to where this one was found, says nothing."""
    sha256 = FileHash.of(data)
    signers: tuple[Signer, ...] = ()
    try:
        envelope = dsse.parse(data)
        signers = tuple(_signers(envelope, keys))
        statement = Statement.of(envelope)
        return _said(statement, sha256, signers, ours, about if ours is None else ours.path)
    except Malformed as error:
        return Reviewed(sha256, signers, None, wrong=error.in_a_line)


def _signers(envelope: Envelope, keys: Keys) -> Iterable[Signer]:
    signed = sorted(envelope.signers(keys.all))
    yield from (Signer(key.name, key.id, keys.standing(key)) for key in signed)
    seen = {key.id for key in signed}
    known = {key.id: key.name for key in keys.all}
    for keyid, _ in envelope.signatures:
        if keyid not in seen:
            seen.add(keyid)
            yield Signer(known.get(keyid), keyid, Standing.FORGED if keyid in known else Standing.UNKNOWN)


def _said(
    statement: Statement,
    sha256: FileHash,
    signers: tuple[Signer, ...],
    ours: ObjectInfo | None,
    about: StorePath | None,
) -> Reviewed:
    def agrees(result: NarHash | None) -> bool | None:
        return None if result is None or ours is None else result == ours.nar_hash

    match statement.predicate_type:
        case provenance.PREDICATE_TYPE:
            built = Provenance.of(statement)
            _check_subject(built.path, about)
            found = built.nar_hash
            return Reviewed(sha256, signers, "provenance", found, agrees(found), None, built.finished)
        case audit.PREDICATE_TYPE:
            result = AuditResult.of(statement)
            _check_subject(result.path, about)
            rebuilt = None if result.rebuilt is None else result.rebuilt.nar_hash
            varied = ", ".join(result.axes) or "nothing"
            detail = f"{result.verdict}, varied: {varied}"
            return Reviewed(sha256, signers, "audit", rebuilt, agrees(rebuilt), detail, result.finished)
        case vsa.PREDICATE_TYPE:
            found_output = statement.output
            if found_output is not None:
                _check_subject(found_output[0], about)
            subject = None if found_output is None else found_output[1]
            verdict, when = (statement.predicate.get(name) for name in ("verificationResult", "timeVerified"))
            return Reviewed(
                sha256,
                signers,
                "summary",
                subject,
                agrees(subject),
                verdict if isinstance(verdict, str) else None,
                when if isinstance(when, str) else None,
            )
    return Reviewed(sha256, signers, statement.predicate_type)


def _check_subject(path: StorePath, about: StorePath | None) -> None:
    if about is not None and path != about:
        raise Malformed("this statement is about something else", reason=f"its subject is {path}")
