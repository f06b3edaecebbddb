"""What an audit found, as values: the report, its nodes, cells and rebuilds, and the explanation of a difference.

A report's JSON form is specified in docs/formats.md. Times of day are RFC 3339 in UTC, durations milliseconds, sizes
bytes, hashes of trees NAR hashes in hex.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vzrepro.base.errors import UsageError
from vzrepro.base.model import FORMAT
from vzrepro.proof.sbom.seed import Seed

REPEAT = "repeat"
"""The first column of every matrix: a rebuild with nothing varied on purpose."""


class Verdict(enum.StrEnum):
    """What one comparison showed. None is ever counted as another."""

    REPRODUCED = "REPRODUCED"
    DIFFERS = "DIFFERS"
    BUILD_FAILED = "BUILD_FAILED"
    INCONCLUSIVE = "INCONCLUSIVE"
    UNTESTED = "UNTESTED"


WORST_FIRST = (
    Verdict.DIFFERS,
    Verdict.BUILD_FAILED,
    Verdict.INCONCLUSIVE,
    Verdict.UNTESTED,
    Verdict.REPRODUCED,
)


def worst(verdicts: Mapping[Verdict, int]) -> Verdict:
    """The one that stands for several: the first of the above that occurs; UNTESTED for none at all."""
    return next((verdict for verdict in WORST_FIRST if verdicts.get(verdict)), Verdict.UNTESTED)


@dataclass(frozen=True, slots=True)
class Cell:
    """One node on one axis.

    `reason` says why, for everything but REPRODUCED. `rebuilds` are the ids of the rebuilds it rests on; `together`
    is how many axes those varied at once (1: this one alone, so that a difference is its own). `held` is the recipe's
    reason for keeping the axis constant. `reused` marks a verdict of an earlier audit by the same builder.
    """

    verdict: Verdict
    reason: str | None = None
    rebuilds: tuple[str, ...] = ()
    together: int = 1
    held: str | None = None
    reused: bool = False
    milliseconds: int = 0


@dataclass(frozen=True, slots=True)
class Rebuild:
    """One build made for the audit: what was varied (axes by name), what was held constant, and what came out.

    `observed` maps an axis to the value seen inside the sandbox without and with it. `nar_hash` is None when nothing
    came out. `statement` is the sha256 of the signed statement, `log` the last lines of the build's output.
    """

    id: str
    axes: tuple[str, ...]
    held: tuple[str, ...]
    round: int
    verdict: Verdict
    nar_hash: str | None
    nar_size: int | None
    started: str
    milliseconds: int
    observed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reason: str | None = None
    log: tuple[str, ...] = ()
    statement: str | None = None
    explanation: str | None = None


@dataclass(frozen=True, slots=True)
class Guess:
    """What probably caused a difference: `cause` is one word (timestamp, path, order, random, user, parallelism,
    host, locale, build-id, process-id, inode, umask, environment, compression, unknown), `evidence` what was seen,
    `fix` what to do about it."""

    cause: str
    evidence: str
    fix: str


@dataclass(frozen=True, slots=True)
class Detail:
    """One place where two outputs differ.

    `file` is relative to the output; `member` the path inside archives and files (`etc/passwd`, `.text`,
    `CONFIG_HZ`), outermost first; `kind` what was compared there (bytes, ELF section, cpio member, tar member,
    compression, text line, metadata, listing). `offset` and `count` are of differing bytes where known. `excerpt` is a
    cut unified diff.
    """

    file: str
    member: tuple[str, ...]
    kind: str
    offset: int | None
    count: int | None
    excerpt: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why two trees differ: `tool` made it (`diffoscope 295`, `bytes`); `truncated` says why this is not all."""

    id: str
    tool: str
    details: tuple[Detail, ...]
    guesses: tuple[Guess, ...]
    truncated: str | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """An axis that changes a node's output, and what it does there."""

    axis: str
    guess: Guess | None = None
    explanation: str | None = None


@dataclass(frozen=True, slots=True)
class AuditedNode:
    """One node of the targets' closure. `kind` is the derivation's builder (sandbox, image, fetch, local); `inputs`
    maps an input's name to the drv hash, the image under `image`. `origin` says whether it is to blame itself: it
    differs although its inputs were the registered ones."""

    target: str
    kind: str
    drv_hash: str
    path: str
    build_key: str | None
    nar_hash: str
    nar_size: int
    inputs: Mapping[str, str]
    verdict: Verdict
    cells: Mapping[str, Cell] = field(default_factory=dict)
    rebuilds: tuple[Rebuild, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def origin(self) -> bool:
        """Whether this node itself is to blame; every node is built on registered inputs, so nothing is inherited."""
        return self.verdict is Verdict.DIFFERS


@dataclass(frozen=True, slots=True)
class AxisInfo:
    """An axis as the report's readers need it."""

    name: str
    about: str
    applied: str
    proof: str


@dataclass(frozen=True, slots=True)
class Against:
    """What another cache has for a node: `nar_hash` None when it has nothing."""

    cache: str
    target: str
    nar_hash: str | None
    signers: tuple[str, ...]
    agrees: bool | None


@dataclass(frozen=True, slots=True)
class PastAudit:
    """A row of the history: `nodes` counts nodes per verdict."""

    id: str
    finished: str
    targets: tuple[str, ...]
    mode: str
    verdict: Verdict
    nodes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """A whole audit. `mode` is `alone` (one axis per rebuild) or `together` (`--quick`); `builder` describes who and
    on what (key, engine, kernel, cores). `complete` is False when it was interrupted."""

    id: str
    targets: tuple[str, ...]
    mode: str
    deep: bool
    rounds: int
    started: str
    finished: str
    complete: bool
    builder: Mapping[str, str]
    axes: tuple[AxisInfo, ...]
    nodes: tuple[AuditedNode, ...]
    seed: Seed
    against: tuple[Against, ...] = ()
    explanations: Mapping[str, Explanation] = field(default_factory=dict)
    history: tuple[PastAudit, ...] = ()
    format: int = FORMAT

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many of the nodes got each verdict."""
        return dict(Counter(node.verdict for node in self.nodes))

    @property
    def verdict(self) -> Verdict:
        """The worst of the nodes' verdicts, and DIFFERS when another cache has other bytes.

        Images, downloads and local files count only where they were made again: without `--deep` none is.
        """
        if any(each.agrees is False for each in self.against):
            return Verdict.DIFFERS
        return worst(Counter(node.verdict for node in self.nodes if node.kind == "sandbox" or node.rebuilds))

    def document(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        document: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return {**document, "verdict": self.verdict, "counts": {str(key): n for key, n in self.counts.items()}}

    def encoded(self) -> bytes:
        """The bytes of report.json."""
        return (json.dumps(self.document(), ensure_ascii=False, indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, place: str) -> AuditReport:
        """Read what `encoded` gave. Raises UsageError naming `place` when it is something else."""
        try:
            return _adapter().validate_json(data)
        except ValidationError as error:
            raise UsageError(f"{place} is not an audit report", reason=str(error.errors()[0]["msg"])) from error


@cache
def _adapter() -> TypeAdapter[AuditReport]:
    """Made when it is needed: that takes longer than most commands may."""
    return TypeAdapter(AuditReport)
