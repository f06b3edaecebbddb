"""What one envelope is worth here: who signed it, what it states, and whether it agrees with our output."""

from __future__ import annotations

from dataclasses import dataclass

from vzrepro.base.model import FileHash, NarHash, ObjectInfo, StorePath
from vzrepro.proof.attest import audit, dsse, provenance, vsa
from vzrepro.proof.attest.audit import AuditResult
from vzrepro.proof.attest.dsse import Malformed
from vzrepro.proof.attest.provenance import Provenance
from vzrepro.proof.attest.signers import Keys, Signer
from vzrepro.proof.attest.statement import Statement


@dataclass(frozen=True, slots=True)
class ReviewedEnvelope:
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


def review(data: bytes, keys: Keys, ours: ObjectInfo | None, about: StorePath | None = None) -> ReviewedEnvelope:
    """Look at one envelope about the output `about`, that is `ours` if we have it. Never raises for anything that is in
    it; a statement about another output, as somebody may have copied it to where this one was found, says nothing."""
    sha256 = FileHash.of(data)
    signers: tuple[Signer, ...] = ()
    try:
        envelope = dsse.parse(data)
        signers = keys.signers(envelope)
        statement = Statement.of(envelope)
        return _said(statement, sha256, signers, ours, about if ours is None else ours.path)
    except Malformed as error:
        return ReviewedEnvelope(sha256, signers, None, wrong=error.in_a_line)


def _said(
    statement: Statement,
    sha256: FileHash,
    signers: tuple[Signer, ...],
    ours: ObjectInfo | None,
    about: StorePath | None,
) -> ReviewedEnvelope:
    def agrees(result: NarHash | None) -> bool | None:
        return None if result is None or ours is None else result == ours.nar_hash

    match statement.predicate_type:
        case provenance.PREDICATE_TYPE:
            built = Provenance.of(statement)
            _check_subject(built.path, about)
            found = built.nar_hash
            return ReviewedEnvelope(sha256, signers, "provenance", found, agrees(found), None, built.finished)
        case audit.PREDICATE_TYPE:
            result = AuditResult.of(statement)
            _check_subject(result.path, about)
            rebuilt = None if result.rebuilt is None else result.rebuilt.nar_hash
            varied = ", ".join(result.axes) or "nothing"
            detail = f"{result.verdict}, varied: {varied}"
            return ReviewedEnvelope(sha256, signers, "audit", rebuilt, agrees(rebuilt), detail, result.finished)
        case vsa.PREDICATE_TYPE:
            found_output = statement.output
            if found_output is not None:
                _check_subject(found_output[0], about)
            subject = None if found_output is None else found_output[1]
            verdict, when = (statement.predicate.get(name) for name in ("verificationResult", "timeVerified"))
            return ReviewedEnvelope(
                sha256,
                signers,
                "summary",
                subject,
                agrees(subject),
                verdict if isinstance(verdict, str) else None,
                when if isinstance(when, str) else None,
            )
    return ReviewedEnvelope(sha256, signers, statement.predicate_type)


def _check_subject(path: StorePath, about: StorePath | None) -> None:
    if about is not None and path != about:
        raise Malformed("this statement is about something else", reason=f"its subject is {path}")
