"""The predicate `urn:vzrepro:audit:v1`: somebody built an output again from the registered inputs, and this came out.

It is signed whether the two are equal or not. What was rebuilt is a vote for a result as good as a build's; what did
not come out, or was not tried, is none. docs/formats.md has the fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from vzrepro.base.errors import first_fault
from vzrepro.base.model import BuildKey, DrvHash, NarHash, StorePath, store_path
from vzrepro.proof.attest.dsse import Malformed
from vzrepro.proof.attest.statement import NAR_DIGEST, Statement, Subject

PREDICATE_TYPE = "urn:vzrepro:audit:v1"


@dataclass(frozen=True, slots=True)
class OutputTree:
    """A whole output: the hash of its NAR, and that NAR's size in bytes."""

    nar_hash: NarHash
    nar_size: int


@dataclass(frozen=True, slots=True)
class AuditResult:
    """One rebuild and its comparison with the registered output.

    `axes` are the axes that were varied, by name (none: nothing was), `held` those held constant, `together` how many
    were varied at once; `observed` maps an axis to the values seen inside the sandbox without and with it. `verdict` is
    one of `audit.model.Verdict`, `reason` says why it is not REPRODUCED. `rebuilt` is None when nothing came out.
    `axis_version` changes when an axis comes to mean something else. `started` and `finished` are RFC 3339 in UTC.
    `builder` describes on what it was done.
    """

    path: StorePath
    drv_hash: DrvHash
    build_key: BuildKey
    registered: OutputTree
    rebuilt: OutputTree | None
    verdict: str
    reason: str | None
    axes: tuple[str, ...]
    held: tuple[str, ...]
    together: int
    axis_version: int
    observed: Mapping[str, tuple[str, str]]
    started: str
    finished: str
    milliseconds: int
    builder: Mapping[str, str]

    @classmethod
    def of(cls, statement: Statement) -> AuditResult:
        """What a statement says. Raises Malformed when it is no audit's, or is about another output than it tells."""
        if statement.predicate_type != PREDICATE_TYPE:
            raise Malformed("this is not the statement of an audit", reason=f"wanted {PREDICATE_TYPE}")
        output = statement.output
        if output is None:
            raise Malformed("this audit's statement is malformed", reason="it is not about one output")
        try:
            said = _Predicate.model_validate(dict(statement.predicate), strict=True)
            result = cls(
                path=output[0],
                drv_hash=DrvHash(said.drv_hash),
                build_key=BuildKey(said.build_key),
                registered=said.registered.value(),
                rebuilt=None if said.rebuilt is None else said.rebuilt.value(),
                verdict=said.verdict,
                reason=said.reason,
                axes=tuple(said.axes),
                held=tuple(said.held),
                together=said.together,
                axis_version=said.axis_version,
                observed={axis: (values[0], values[1]) for axis, values in said.observed.items()},
                started=said.started_on,
                finished=said.finished_on,
                milliseconds=said.milliseconds,
                builder=said.builder,
            )
        except ValidationError as error:
            raise Malformed("this audit's statement is malformed", reason=first_fault(error)) from error
        except ValueError as error:
            raise Malformed("this audit's statement is malformed", reason=str(error)) from error
        if output[1] != result.registered.nar_hash or store_path(result.drv_hash, output[0].name) != output[0]:
            raise Malformed("this audit's statement contradicts itself", reason="its subject is not what it compared")
        return result


def audit_statement(result: AuditResult, subjects: Sequence[Subject]) -> Statement:
    """The statement to sign. `subjects` are those of the registered output (`statement.subjects_of`): `result.path`."""
    predicate = {
        "drvHash": result.drv_hash.hex,
        "buildKey": result.build_key.hex,
        "registered": _tree_document(result.registered),
        "rebuilt": None if result.rebuilt is None else _tree_document(result.rebuilt),
        "verdict": result.verdict,
        "reason": result.reason,
        "axes": list(result.axes),
        "held": list(result.held),
        "together": result.together,
        "axisVersion": result.axis_version,
        "observed": {axis: list(values) for axis, values in result.observed.items()},
        "startedOn": result.started,
        "finishedOn": result.finished,
        "milliseconds": result.milliseconds,
        "builder": dict(result.builder),
    }
    return Statement(tuple(subjects), PREDICATE_TYPE, predicate)


def _tree_document(tree: OutputTree) -> dict[str, Any]:
    return {NAR_DIGEST: tree.nar_hash.hex, "size": tree.nar_size}


class _Read(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="ignore")


class _Tree(_Read):
    nar_sha256: str  # that is NAR_DIGEST
    size: int = Field(ge=0)

    def value(self) -> OutputTree:
        return OutputTree(NarHash(self.nar_sha256), self.size)


class _Predicate(_Read):
    drv_hash: str
    build_key: str
    registered: _Tree
    rebuilt: _Tree | None
    verdict: str
    reason: str | None
    axes: list[str]
    held: list[str]
    together: int = Field(ge=0)
    axis_version: int
    observed: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    started_on: str
    finished_on: str
    milliseconds: int = Field(ge=0)
    builder: dict[str, str]
