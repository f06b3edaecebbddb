"""Verification summaries: somebody has verified an output by a policy, and tells how that ended.

The predicate is SLSA's, version 1 (https://slsa.dev/spec/v1.0/verification_summary). Who trusts the verifier need not
see the policy or the statements that it went by; the digests of both are named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from vzrepro.base.model import FileHash
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest.provenance import builder_id
from vzrepro.proof.attest.statement import Statement, Subject

PREDICATE_TYPE = "https://slsa.dev/verification_summary/v1"
SLSA_VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class Summary:
    """How a verification ended.

    `resource` is the name under which the output was verified (its store path), `policy` the policy's file name and its
    bytes, None when there was none. `inputs` are the bytes of the envelopes that counted. `levels` are what it reaches:
    SLSA's names, or ones of another prefix than `SLSA_` (`VZREPRO_BUILDERS_2`); what has failed reaches the one level
    FAILED, as SLSA has it. `verified` is RFC 3339 in UTC.
    """

    resource: str
    passed: bool
    verified: str
    levels: tuple[str, ...] = ()
    policy: tuple[str, bytes] | None = None
    inputs: tuple[bytes, ...] = ()


def summary_statement(summary: Summary, subjects: Sequence[Subject], verifier: PublicKey) -> Statement:
    """The statement to sign. `subjects` are those of the output that was verified (`statement.subjects_of`)."""
    name, policy = summary.policy or (None, b"")
    levels = list(summary.levels) if summary.passed else ["FAILED"]
    predicate: dict[str, Any] = {
        "verifier": {"id": builder_id(verifier)},
        "timeVerified": summary.verified,
        "resourceUri": _urn("object", summary.resource),
        "policy": {
            "uri": _urn("no-policy") if name is None else _urn("policy", name),
            "digest": {"sha256": FileHash.of(policy).hex},
        },
        "inputAttestations": [
            {"digest": {"sha256": digest}} for digest in sorted(FileHash.of(each).hex for each in summary.inputs)
        ],
        "verificationResult": "PASSED" if summary.passed else "FAILED",
        "verifiedLevels": levels,
        "slsaVersion": SLSA_VERSION,
    }
    return Statement(tuple(subjects), PREDICATE_TYPE, predicate)


def _urn(*parts: str) -> str:
    """Only a name: SLSA wants a URI here, and where a file was on the verifier's disk is nobody's affair."""
    return ":".join(("urn:vzrepro", *(quote(part, safe="/", errors="surrogateescape") for part in parts)))
