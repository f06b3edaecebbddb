"""The files that audits leave for ever: golden bytes, and docs/formats.md names every key and no other."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vzrepro.proof.audit.blame import Ending
from vzrepro.proof.audit.model import (
    Against,
    AuditedNode,
    AuditReport,
    AxisInfo,
    Cause,
    Cell,
    Detail,
    Explanation,
    Guess,
    PastAudit,
    Rebuild,
    Verdict,
)
from vzrepro.proof.audit.records import RebuildRequest, Record, Records
from vzrepro.proof.sbom.seed import Seed, SeedImage

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "audit"
FORMATS = (
    Record, RebuildRequest, Explanation, Detail, Guess, AuditReport, AxisInfo, AuditedNode, Cell, Rebuild, Cause, Seed,
    SeedImage, Against, PastAudit,
)  # fmt: skip

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
GUESS = Guess("timestamp", "2026-11-24 became 2027-12-29 – grüße", "write SOURCE_DATE_EPOCH")
EXPLANATION = Explanation(
    "0123456789abcdef",
    "bytes",
    (
        Detail("boot/a.cpio", ("etc", "passwd"), "cpio member", 17, 4, "-old\n+new\n"),
        Detail("b", (), "bytes", None, None, ""),
    ),
    (GUESS,),
    "stopped at 2 places",
)
PAST = PastAudit("00112233aabb", "2026-11-23T10:00:00Z", ("a",), "together", Verdict.REPRODUCED, {"REPRODUCED": 3})
RECORD = Record(
    asked=RebuildRequest(
        A, B, C, "0f1e2d3c4b5a6978", {"clock": 2, "user": 1}, {"randomness": 1}, 1, 0, True, "1-audit-tools"
    ),
    ending=Ending.BUILT,
    nar_hash=A,
    nar_size=4096,
    started="2026-11-24T10:00:00Z",
    finished="2026-11-24T10:00:07Z",
    milliseconds=7001,
    reason="none",
    observed={"clock": "1795514400"},
    log=("make", "done"),
    statement=B,
    explanation=EXPLANATION.id,
    tools="2-audit-tools",
)
REPORT = AuditReport(
    id="445566ccddee",
    targets=("a", "b"),
    mode="alone",
    deep=True,
    rounds=2,
    started="2026-11-24T10:00:00Z",
    finished="2026-11-24T11:00:00Z",
    complete=False,
    builder={"key": "k-1:AAAA", "cores": "2"},
    axes=(AxisInfo("clock", "the time of day", "a preloaded library", "clock_gettime"),),
    nodes=(
        AuditedNode(
            target="a",
            kind="sandbox",
            drv_hash=A,
            path=f"/nix/store/{'0' * 32}-a",
            build_key=B,
            nar_hash=C,
            nar_size=120,
            inputs={"image": B, "src": C},
            verdict=Verdict.DIFFERS,
            cells={"user": Cell(Verdict.REPRODUCED), "clock": Cell(Verdict.DIFFERS, "why", ("1",), 2, "held", True, 5)},
            rebuilds=(
                Rebuild(
                    "1", ("clock",), ("user",), 1, Verdict.DIFFERS, A, 121, "2026-11-24T10:00:00Z", 5,
                    {"clock": ("1", "2")}, "why", ("line",), B, EXPLANATION.id,
                ),
            ),
            causes=(Cause("clock", GUESS, EXPLANATION.id), Cause("user")),
        ),
    ),
    seed=Seed(2, 300, (SeedImage("image-c", 2, 300),)),
    against=(Against("https://example.org", "a", None, ("k-1",), None),),
    explanations={EXPLANATION.id: EXPLANATION},
    history=(PAST,),
)  # fmt: skip


@pytest.fixture
def records(tmp_path: Path) -> Records:
    """The sample's files."""
    records = Records(tmp_path, pytest.fail)
    records.save(RECORD)
    records.keep_explanation(EXPLANATION)
    records.keep_report(REPORT, None)
    return records


FILES = {
    "rebuild.json": f"rebuilds/{A}/{RECORD.asked.id}.json",
    "explanation.json": f"explanations/{EXPLANATION.id}.json",
    "report.json": f"reports/{REPORT.id}/report.json",
    "summary.json": f"reports/{REPORT.id}/summary.json",
}


@pytest.mark.parametrize("name", FILES)
def test_the_bytes_are_golden(records: Records, name: str) -> None:
    """Accept new ones, on purpose only, with VZREPRO_ACCEPT=1: old audits must still be read."""
    written = (records.root / FILES[name]).read_bytes()
    if os.environ.get("VZREPRO_ACCEPT"):
        (GOLDEN / name).write_bytes(written)
    assert written == (GOLDEN / name).read_bytes()


def test_golden_files_are_read(records: Records) -> None:
    for name, file in FILES.items():
        (records.root / file).write_bytes((GOLDEN / name).read_bytes())
    assert records.rebuilds(A) == [RECORD]
    assert RECORD.asked.id == "71c3af419f76"
    assert records.explanation(EXPLANATION.id) == EXPLANATION
    assert AuditReport.parse((GOLDEN / "report.json").read_bytes(), "it") == REPORT
    assert [past.id for past in records.history()] == [REPORT.id]


def documented() -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """Each table of docs/formats.md about a type: its name, and its keys with whether they may be missing."""
    for table in (ROOT / "docs/formats.md").read_text().split("\n\n"):
        head, *rows = table.splitlines()
        if named := re.fullmatch(r"\| `(\w+)` \| value \| if missing \|", head):
            cells = [row.split("|") for row in rows[1:]]
            keys = [
                (key, bool(last.strip())) for _, names, _, last, _ in cells for key in re.findall(r"`(\w+)`", names)
            ]
            yield named[1], keys


def test_the_documented_keys_are_those_of_the_code() -> None:
    def keys(kind: Any) -> list[tuple[str, bool]]:
        missing = dataclasses.MISSING
        return [
            (field.name, field.default is not missing or field.default_factory is not missing)
            for field in dataclasses.fields(kind)
        ]

    assert dict(documented()) == {kind.__name__: keys(kind) for kind in FORMATS}
