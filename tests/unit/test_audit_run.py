"""An audit from start to end on a store of its own, with sandboxes that are functions."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests import PATIENCE_SECS
from tests.labs import RUNTIME, LabMaker, node, observed, played
from vzrepro import nar, sandbox
from vzrepro.base.errors import BuildFailed, HashMismatch, Interrupted, RemoteError, TimedOut, UsageError, VzreproError
from vzrepro.base.model import Derivation, ObjectInfo
from vzrepro.base.signing import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.shelf import Shelf
from vzrepro.proof.attest.statement import Statement
from vzrepro.proof.audit import blame, rebuild
from vzrepro.proof.audit.axes import AXES, Axis
from vzrepro.proof.audit.blame import Ending
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.engine import Audit, AuditOutcome, AuditSubject, Request
from vzrepro.proof.audit.model import Verdict
from vzrepro.proof.audit.rebuild import Rebuilder
from vzrepro.proof.audit.records import RebuildRequest, Record, Records
from vzrepro.proof.audit.statements import StatementSigner
from vzrepro.realize.inventory import Inventory
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import DrvGraph, Node
from vzrepro.sources.fetch import Mirrors
from vzrepro.store import LocalStore

HOST, UMASK = (axis for axis in AXES if axis.name in ("host-name", "umask"))

Build = Callable[[str, sandbox.Job], None]
"""Gets what is rebuilt (`repeat`, `umask`, `host-name`), and writes /out."""


def _write(tree: Path, content: str) -> None:
    tree.mkdir()
    (tree / "x").write_text(content)


class Lab:
    """A store with the node `thing`, which is made from `source`, and audits of it."""

    def __init__(self, place: Path) -> None:
        self.store = LocalStore(place / "store")
        self.source = node("source", Derivation("source", "local"))
        self.thing = node("thing", self._drv("sandbox"))
        tools = place / "tools"
        tools.mkdir()
        self.world = World(RUNTIME, tools, 1, None)
        self.axes: tuple[Axis, ...] = (HOST, UMASK)
        self.fresh = False
        self.builder = "0123456789abcdef"
        self.explain: Callable[..., str | None] = lambda *_: None
        self.sign: Callable[[AuditSubject, Record], str] = lambda *_: "0" * 64
        self.made: list[str] = []
        self.loaded: list[str] = []
        self.warnings: list[str] = []
        self.build: Build = self.good
        self.put(self.source, "source")
        self.put(self.thing, "from source")

    def _drv(self, builder: Any) -> Derivation:
        return Derivation(
            "thing",
            builder,
            platform="linux/amd64",
            image=self.source.drv_hash if builder == "sandbox" else None,
            inputs={"debs": self.source.drv_hash},
            command=("make",),
        )

    def put(self, node: Node, content: str) -> None:
        with self.store.scratch(node.target) as scratch:
            _write(scratch / "made", content)
            nar_hash, size, _ = nar.canonical_copy(scratch / "made", scratch / "tree")
            self.store.add(scratch / "tree", ObjectInfo(node.path, nar_hash, size, drv_hash=node.drv_hash))

    def corrupt(self, node: Node) -> None:
        file = self.store.location(node.path) / "x"
        file.chmod(0o644)
        file.write_text("something else")

    def good(self, _what: str, job: sandbox.Job) -> None:
        _write(job.out, f"from {(self.store.location(self.source.path) / 'x').read_text()}")

    def run_sandbox(
        self, job: sandbox.Job, *, on_line: Callable[[str], None], stop: threading.Event
    ) -> sandbox.RunLimits:
        around = job.surroundings
        varied = [HOST.name] * (around.hostname != "localhost") + [UMASK.name] * (around.umask != 0o022)
        on_line(observed(job))
        job.log.write_text("a log\n")
        if job.command == ("make",):
            what = varied[0] if varied else "repeat"
            self.made.append(what)
            self.build(what, job)
        return sandbox.RunLimits(job, stop)

    def realizer(self) -> Realizer:
        nodes = {node.drv_hash: node for node in (self.source, self.thing)}
        maker = LabMaker(
            self.store, cast(Any, SimpleNamespace(build_jobs=lambda: 2)), Mirrors({}), None, self.store.add
        )
        maker.loaded = self.loaded
        made = SimpleNamespace(
            graph=DrvGraph(self.store.root, {"thing": self.thing}, nodes, (), frozenset()),
            inventory=Inventory(self.store, ()),
            maker=maker,
            store=self.store,
            config=maker.config,
            stop=maker.stop,
            report=maker.report,
            realize=lambda nodes: nodes,
        )
        return cast(Realizer, made)

    def audit(self) -> Audit:
        axes = {axis.name: axis for axis in self.axes}
        return Audit(
            Request((self.thing,), self.axes, fresh=self.fresh, deep=self.thing.drv.builder != "sandbox"),
            Rebuilder(self.realizer(), self.world, axes),
            self.records,
            self.builder,
            self.explain,
            self.sign,
        )

    @property
    def records(self) -> Records:
        return Records(self.store.root / ".vzrepro" / "audit", self.warnings.append)

    def run(self) -> AuditOutcome:
        self.made.clear()
        return self.audit().run()


def verdicts(found: AuditOutcome) -> Mapping[str, str]:
    judgement = found.subjects[0].judgement
    assert judgement is not None
    return {name: finding.verdict.value for name, finding in judgement.findings.items()}


def _registered(lab: Lab) -> str:
    return lab.store.query_many([lab.thing.path])[lab.thing.path].nar_hash.hex


@pytest.fixture
def tmp_path(memory: Path) -> Path:
    return memory


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    with played(lab.run_sandbox):
        yield lab


GOOD = {"repeat": "REPRODUCED", "host-name": "REPRODUCED", "umask": "REPRODUCED"}


def test_what_was_found_is_taken_over(lab: Lab) -> None:
    assert verdicts(lab.run()) == GOOD
    assert sorted(lab.made) == ["host-name", "repeat", "umask"]
    again = lab.run()
    assert verdicts(again) == GOOD
    assert lab.made == []
    assert len(again.subjects[0].reused) == 4, "three rebuilds and a look"
    assert lab.warnings == []
    assert not list((lab.store.root / ".vzrepro" / "tmp").iterdir())


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (lambda lab: setattr(lab, "fresh", True), ["host-name", "repeat", "umask"]),
        (lambda lab: setattr(lab, "builder", "f" * 16), ["host-name", "repeat", "umask"]),
        (lambda lab: setattr(lab, "axes", (HOST, dataclasses.replace(UMASK, version=2))), ["umask"]),
    ],
)
def test_but_only_when_everything_is_equal(lab: Lab, change: Callable[[Lab], None], made: list[str]) -> None:
    lab.run()
    change(lab)
    lab.run()
    assert sorted(lab.made) == made


def test_another_input_or_another_output_is_another_question(lab: Lab, tmp_path: Path) -> None:
    lab.run()
    root = lab.store.root
    for name, source, thing in (("input", "sources", "from sources"), ("output", "source", "from elsewhere")):
        lab.store = LocalStore(tmp_path / name)
        lab.put(lab.source, source)
        lab.put(lab.thing, thing)
        (lab.store.root / ".vzrepro" / "audit").symlink_to(root / ".vzrepro" / "audit")
        lab.run()
        assert "repeat" in lab.made, name


@pytest.mark.parametrize(
    "error",
    [
        TimedOut("it took too long"),
        VzreproError("the container engine failed"),
        BuildFailed("building thing ran out of memory: it needs more than 1 MiB (exit code 1)"),
        BuildFailed("building thing failed: it was killed (exit code 137), most likely for its memory limit of 1 MiB"),
    ],
)
def test_what_tells_nothing_is_tried_again_next_time(lab: Lab, error: VzreproError) -> None:
    def build(what: str, job: sandbox.Job) -> None:
        if what == "umask":
            raise error
        lab.good(what, job)

    lab.build = build
    found = lab.run()
    assert verdicts(found) == {**GOOD, "umask": "INCONCLUSIVE"}
    assert found.error is None
    lab.build = lab.good
    assert verdicts(lab.run()) == GOOD
    assert lab.made == ["umask"]


def test_a_corrupt_input_blames_nobody(lab: Lab) -> None:
    lab.corrupt(lab.source)
    found = lab.run()
    assert isinstance(found.error, HashMismatch)
    assert "source is corrupt" in found.error.message
    assert found.subjects[0].judgement is None
    assert all(not record.asked.builds for record in lab.records.rebuilds(lab.thing.drv_hash.hex))


def test_a_failure_with_a_corrupt_input_blames_nobody(lab: Lab) -> None:
    def build(_what: str, _job: sandbox.Job) -> None:
        raise BuildFailed("exit code 1")

    lab.build = build
    assert verdicts(lab.run())["repeat"] == "BUILD_FAILED"
    lab.corrupt(lab.source)
    lab.fresh = True
    assert isinstance(lab.run().error, HashMismatch)


def test_what_is_registered_counts_not_what_became_of_it(lab: Lab) -> None:
    lab.corrupt(lab.thing)
    assert verdicts(lab.run()) == GOOD


def test_of_a_corrupt_output_no_file_is_signed(lab: Lab) -> None:
    key = SigningKey.generate("ours")
    lab.sign = StatementSigner(lab.store, key, {}, {}, (), lab.warnings.append).sign
    lab.axes = ()
    named = []
    for _ in range(2):
        lab.run()
        (envelope,) = Shelf(lab.store).envelopes(lab.thing.drv_hash)
        shutil.rmtree(lab.store.root / ".vzrepro" / "attest")
        named.append(sorted(Statement.of(dsse.parse(envelope)).files))
        lab.corrupt(lab.thing)
        lab.fresh = True
        lab.sign = StatementSigner(lab.store, key, {}, {}, (), lab.warnings.append).sign
    assert named == [["x"], []]
    assert len(lab.warnings) == 1
    assert "thing is corrupt" in lab.warnings[0]


def test_an_interrupt_keeps_what_was_found(lab: Lab) -> None:
    """What ends by itself after Ctrl-C counts as well."""
    realizers: list[Realizer] = []
    both = threading.Event()

    def build(what: str, job: sandbox.Job) -> None:
        if what == "umask":
            # The main thread has begun both by then: it is not in the middle of starting the other one's thread.
            assert both.wait(PATIENCE_SECS)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert realizers[0].stop.wait(PATIENCE_SECS)
        if what == "host-name":
            both.set()
            assert realizers[0].stop.wait(PATIENCE_SECS)
            raise Interrupted("interrupted")
        lab.good(what, job)

    lab.build = build
    audit = lab.audit()
    realizers.append(audit.rebuilds.realizer)
    found = audit.run()
    assert isinstance(found.error, Interrupted)
    assert {record.asked.experiment.label for record in found.subjects[0].records.values()} >= {"look", "umask"}
    lab.build = lab.good
    assert verdicts(lab.run()) == GOOD
    assert lab.made == ["host-name"]
    assert not list((lab.store.root / ".vzrepro" / "tmp").iterdir())


def test_an_interrupt_stops_hashing(lab: Lab) -> None:
    def build(_what: str, job: sandbox.Job) -> None:
        _write(job.out, "something else")
        audit.rebuilds.realizer.stop.set()

    lab.build = build
    audit = lab.audit()
    assert isinstance(audit.run().error, Interrupted)


def test_a_bug_does_not_wait_for_hours(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(_case: object, done: object) -> object:
        if done:
            assert building.wait(PATIENCE_SECS)
            raise AssertionError("a bug")
        return (blame.LOOK, blame.Experiment())

    def build(_what: str, _job: sandbox.Job) -> None:
        building.set()
        stopped.append(audit.rebuilds.realizer.stop.wait(PATIENCE_SECS))
        raise Interrupted("interrupted")

    building = threading.Event()
    stopped: list[bool] = []
    monkeypatch.setattr(blame, "judge", judge)
    lab.build = build
    audit = lab.audit()
    with pytest.raises(AssertionError, match="a bug"):
        audit.run()
    assert stopped == [True]


def test_two_audits_at_once(lab: Lab) -> None:
    both = threading.Barrier(2)

    def build(what: str, job: sandbox.Job) -> None:
        both.wait(PATIENCE_SECS)
        lab.good(what, job)

    lab.build = build
    audits = [lab.audit(), lab.audit()]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda audit: audit.run(), audits))
    assert [verdicts(each) for each in found] == [GOOD, GOOD]
    assert len(lab.made) == 6
    lab.build = lab.good
    lab.run()
    assert lab.made == []
    assert lab.warnings == []


def test_the_time_of_a_rebuild_is_without_its_explanation(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]

    def build(what: str, job: sandbox.Job) -> None:
        now[0] += 2_000_000_000
        _write(job.out, what)

    def explain(*_anything: object) -> None:
        now[0] += 600_000_000_000

    monkeypatch.setattr(rebuild, "time", SimpleNamespace(monotonic=lambda: 0.0, monotonic_ns=lambda: now[0]))
    lab.build, lab.explain, lab.axes = build, explain, ()
    found = lab.run()
    assert now[0] > 600_000_000_000
    assert found.subjects[0].records[blame.Experiment()].milliseconds < 600_000


def test_the_engine_is_asked_for_an_image_now_and_then(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [7.0]
    monkeypatch.setattr(rebuild, "time", SimpleNamespace(monotonic=lambda: now[0], monotonic_ns=lambda: 0))

    def build(what: str, job: sandbox.Job) -> None:
        if what == "host-name":
            raise VzreproError("the toolchain image vanished from Docker")
        now[0] += 61.0 * (what == "repeat")
        lab.good(what, job)

    lab.build = build
    rebuilder, records = lab.audit().rebuilds, []
    for axes in ((), (), ("umask",), ("umask",), ("host-name",), ("umask",)):
        asked = RebuildRequest("d" * 64, "", _registered(lab), "", dict.fromkeys(axes, 1), {}, 0, 0)
        before = len(lab.loaded)
        record = rebuilder.build(
            lab.thing, asked, say=lambda _: None, keep_log=lambda *_: None, compare=lambda *_: None
        )
        records.append((record.ending, len(lab.loaded) - before))
    built, lost = Ending.BUILT, Ending.LOST
    assert records == [(built, 1), (built, 1), (built, 1), (built, 0), (lost, 0), (built, 1)]


# --- what is made without a sandbox


@pytest.fixture
def image(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """`thing` is an image: made by `lab.build` where the real one reads .debs."""
    lab.thing = node("thing", lab._drv("image"))
    lab.put(lab.thing, "from source")

    def write(_debs: object, tree: Path, **_options: object) -> None:
        lab.made.append("image")
        lab.build("image", cast(sandbox.Job, SimpleNamespace(out=tree)))

    monkeypatch.setattr("vzrepro.sources.image.write_image", write)
    return lab


def test_an_image_is_made_again(image: Lab) -> None:
    assert verdicts(image.run()) == {"repeat": "REPRODUCED"}
    (record,) = image.records.rebuilds(image.thing.drv_hash.hex)
    assert (record.ending, record.observed, record.tools) == (Ending.BUILT, None, "")
    image.run()
    assert image.made == []


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (RemoteError("no mirror answers"), Verdict.INCONCLUSIVE),
        (HashMismatch("other bytes"), Verdict.BUILD_FAILED),
        (UsageError("a package is unsound"), Verdict.BUILD_FAILED),
    ],
)
def test_what_cannot_be_made_again(
    image: Lab, error: VzreproError, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_what: str, _job: sandbox.Job) -> None:
        raise error

    checked: list[Record] = []
    monkeypatch.setattr(Audit, "_verify", lambda _audit, subject: checked.append(subject))
    image.build = fail
    found = image.run()
    assert verdicts(found) == {"repeat": verdict.value}
    assert bool(checked) == (verdict is Verdict.BUILD_FAILED), "before a package is blamed, it is looked at"
