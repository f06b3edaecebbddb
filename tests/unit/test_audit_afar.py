"""Audits whose rebuilds others make: two machines with stores of their own, and sandboxes that are functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from tests.contract.memory import MemoryBackend
from tests.unit.test_audit_run import GOOD, Lab, verdicts
from vzrepro import sandbox
from vzrepro.base.errors import HashMismatch, RemoteError, Untrusted, UsageError
from vzrepro.base.model import BuildKey, DrvHash, NarHash, ObjectInfo, StorePath
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.cache.reader import CacheReader
from vzrepro.cache.writer import CacheWriter
from vzrepro.farm.livelog import report_key
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.audit import AuditResult
from vzrepro.proof.attest.statement import Statement
from vzrepro.proof.audit import engine
from vzrepro.proof.audit.afar import Rebuilding, RemoteRebuilds, asked_by, question_of
from vzrepro.proof.audit.axes import AXES
from vzrepro.proof.audit.engine import Audit, AuditOutcome, Request
from vzrepro.proof.audit.records import RebuildRequest
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import Step

WORKER, OTHER = SigningKey.generate("worker-1"), SigningKey.generate("other-1")


class Team:
    """A client, which has nothing but the cache, and a worker with the node's inputs; orders are calls."""

    def __init__(self, place: Path) -> None:
        for name in ("client", "worker"):
            (place / name).mkdir()
        self.client, self.worker = Lab(place / "client"), Lab(place / "worker")
        self.backend = MemoryBackend()
        self.key, self.trusted = WORKER, TrustedKeys([WORKER.public])
        self.asked: list[str] = []
        self.compared: list[tuple[str, Mapping[str, tuple[str, str]]]] = []
        self.change: Callable[[bytes], bytes] = lambda report: report
        writer = self.cache(WORKER)
        for node in (self.worker.source, self.worker.thing):
            info = self.worker.store.query(node.path)
            assert info is not None
            writer.push(info, self.worker.store.location(node.path))

    def cache(self, key: SigningKey) -> CacheWriter:
        return CacheWriter(CacheReader(self.backend, self.trusted), key)

    def keep(self, node: Node, what: bytes | Path) -> str:
        data = what if isinstance(what, bytes) else what.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        self.backend.put(report_key(node.drv_hash, node.path.name, sha256), data)
        return sha256

    def kept(self, node: Node, sha256: str) -> bytes | None:
        return self.cache(self.key).access.read(report_key(node.drv_hash, node.path.name, sha256), 1 << 20)

    def place(
        self, node: Node, _infos: Mapping[StorePath, ObjectInfo], question: str, say: Callable[[str], None]
    ) -> bytes:
        self.asked.append(question)
        info = self.cache(self.key).reader.query(node.path)
        assert info is not None
        registered = info.as_object(info.render())
        rebuilding = Rebuilding(self.key, self.worker.world.runtime, 1, lambda: self.worker.world.tools, print)
        sha256 = rebuilding.rebuild(
            self.worker.realizer(),
            self.cache(self.key),
            node,
            registered,
            question,
            say=say,
            keep=partial(self.keep, node),
        )
        report = self.kept(node, sha256)
        assert report is not None
        return self.change(report)

    def explain(
        self, registered: Path, rebuilt: Path, _scratch: Path, context: Mapping[str, tuple[str, str]]
    ) -> str | None:
        assert (registered / "x").read_text() == "from source"
        self.compared.append(((rebuilt / "x").read_text(), context))
        return "0123456789ab"

    def run(self) -> AuditOutcome:
        realizer = self.client.realizer()
        cache = self.cache(OTHER)

        def supply(nodes: object) -> dict[StorePath, ObjectInfo]:
            found = [cache.reader.query(node.path) for node in (self.client.source, self.client.thing)]
            return {info.path: info.as_object(info.render()) for info in found if info is not None}

        def perform(step: Step, _inputs: object) -> None:
            assert step.verb == "substitute"

        realizer.perform = perform  # type: ignore[method-assign, assignment]
        remote = RemoteRebuilds(
            realizer, cache, self.trusted.keys, 4, supply, self.place, self.kept, f"asked {len(self.asked)}"
        )
        request = Request((self.client.thing,), self.client.axes)
        others = frozenset(key.id for key in self.trusted.keys)

        def sign(*_: object) -> str:
            raise AssertionError("who has not built it signs nothing")

        return Audit(request, remote, self.client.records, OTHER.public.id, self.explain, sign, others).run()

    def statements(self) -> list[AuditResult]:
        envelopes = self.cache(self.key).reader.attestations(self.client.thing.drv_hash)
        return [AuditResult.of(Statement.of(dsse.parse(each))) for each in envelopes]


@pytest.fixture
def team(memory: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    team = Team(memory)
    monkeypatch.setattr(sandbox, "run", team.worker.run_sandbox)
    monkeypatch.setattr(engine, "_APART_SECS", 0.0)
    monkeypatch.setattr(sandbox, "sharing_of", lambda *_: sandbox.Sharing(True, ""))
    return team


def test_others_rebuild_and_sign_what_they_found(team: Team) -> None:
    found = team.run()
    assert found.error is None
    assert verdicts(found) == GOOD
    assert sorted(team.worker.made) == ["host-name", "repeat", "umask"]
    assert team.client.made == []
    said = {result.axes: result for result in team.statements()}
    assert set(said) == {(), ("host-name",), ("umask",)}
    assert {result.verdict for result in said.values()} == {"REPRODUCED"}
    assert said["umask",].observed == {"umask": ("022", "077")}
    assert said["umask",].builder["keyId"] == WORKER.public.id
    again = team.run()
    assert verdicts(again) == GOOD
    assert len(team.worker.made) == 3, "what a trusted key has found is not asked again"


def test_what_differs_comes_here_to_be_compared(team: Team) -> None:
    def build(what: str, job: sandbox.Job) -> None:
        job.out.mkdir()
        (job.out / "x").write_text("other" if what == "umask" else "from source")

    team.worker.build = build
    found = team.run()
    assert found.error is None
    assert verdicts(found) == {**GOOD, "umask": "DIFFERS"}
    assert team.compared == [("other", {"umask": ("022", "077")})]
    (record,) = [each for each in found.subjects[0].records.values() if each.explanation]
    assert team.client.records.log(record.asked.id).read_text() == "a log\n"
    assert record.asked.builder == WORKER.public.id


def test_what_a_machine_does_not_have_it_says(team: Team) -> None:
    team.client.axes = (next(each for each in AXES if each.name == "runtime"), *team.client.axes)
    found = team.run()
    judgement = found.subjects[0].judgement
    assert judgement is not None
    assert judgement.findings["runtime"].verdict.value == "INCONCLUSIVE"
    assert "no other OCI runtime" in str(judgement.findings["runtime"].reason)
    assert not any("runtime:" in question for question in team.asked)


def test_a_worker_whose_input_is_corrupt_blames_nobody(team: Team) -> None:
    team.worker.corrupt(team.worker.source)
    found = team.run()
    assert isinstance(found.error, HashMismatch)
    assert "source is corrupt" in found.error.message


def _signed(document: object, key: SigningKey) -> bytes:
    return dsse.sign("application/vnd.vzrepro.rebuild+json", json.dumps(document).encode(), key)


def _document(report: bytes) -> dict[str, object]:
    return dict(json.loads(dsse.parse(report).payload))


LIES: dict[str, Callable[[bytes], bytes]] = {
    "a stranger's key": lambda report: _signed(_document(report), OTHER),
    "other bytes": lambda report: report.replace(b'"payload":"e', b'"payload":"f'),
    "nothing": lambda _report: b"{}",
    "ten megabytes": lambda _report: b"x" * (10 << 20),
    "no record": lambda _report: _signed({"format": 1, "record": {}, "log": None}, WORKER),
    "another type": lambda report: dsse.sign("application/x", dsse.parse(report).payload, WORKER),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_no_trusted_key_has_signed_is_nobody_s_finding(team: Team, lie: str) -> None:
    team.change = LIES[lie]
    found = team.run()
    assert isinstance(found.error, Untrusted)
    assert found.subjects[0].judgement is None
    assert team.client.records.rebuilds(team.client.thing.drv_hash.hex) == []


def test_an_answer_to_another_question_is_none(team: Team) -> None:
    """A queue may swap answers that are all rightly signed."""
    first: list[bytes] = []

    def swap(report: bytes) -> bytes:
        first.append(report)
        return first[0]

    team.change = swap
    found = team.run()
    assert isinstance(found.error, Untrusted)
    assert "another rebuild" in found.error.message


def test_what_was_not_pushed_cannot_be_compared(team: Team) -> None:
    def build(what: str, job: sandbox.Job) -> None:
        job.out.mkdir()
        (job.out / "x").write_text(what)

    def lose(report: bytes) -> bytes:
        team.backend.delete([key for key, data in team.backend.entries.items() if b"-rebuilt-thing\n" in data])
        return report

    team.worker.build, team.change = build, lose
    found = team.run()
    assert isinstance(found.error, RemoteError)
    assert "has no" in found.error.message


def test_a_question_is_the_same_on_the_other_side() -> None:
    every = {axis.name: axis.version for axis in AXES if axis.vary is not None}
    held = {axis.name: axis.version for axis in AXES if axis.hold is not None}
    drv, key, nar_hash = DrvHash("a" * 64), BuildKey.of(b"key"), NarHash("c" * 64)
    for asked in (
        RebuildRequest("a" * 64, key.hex, nar_hash.hex, "b", {}, {}, 0, 0),
        RebuildRequest("a" * 64, key.hex, nar_hash.hex, "b", every, {}, 3, 1, builds=False),
        RebuildRequest("a" * 64, key.hex, nar_hash.hex, "b", {}, held, 0, 7),
    ):
        assert asked_by(question_of(asked), drv, key, nar_hash, "b") == asked
    for question in ("", "umask:1", "umask:9//0/0/1", "nothing:1//0/0/1", "/umask:1/0/0/1", "//0/0/2", "//x/0/1"):
        with pytest.raises(UsageError):
            asked_by(question, drv, key, nar_hash, "b")
