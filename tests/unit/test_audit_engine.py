"""Which rebuilds an audit asks for and what it concludes, on simulated builds with known leaks."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from vzrepro.base.errors import UsageError
from vzrepro.proof.audit import blame
from vzrepro.proof.audit.blame import LOOK, AxisPlan, Case, Ending, Experiment, ExperimentResult, Judgement
from vzrepro.proof.audit.model import REPEAT, Explanation, Verdict
from vzrepro.proof.audit.records import RebuildRequest, Record, Records, RemovedRecords, expected_secs
from vzrepro.store import OLD_SECS

PLAIN = ("host-name", "user", "umask")
NOISE = ("clock", "randomness")

Build = Callable[[Experiment], ExperimentResult]


def _axes(**changes: AxisPlan) -> tuple[AxisPlan, ...]:
    plans = {name: AxisPlan(name) for name in PLAIN}
    plans |= {"clock": AxisPlan("clock", holds=True), "randomness": AxisPlan("randomness", varies=False, holds=True)}
    return tuple((plans | {name.replace("_", "-"): plan for name, plan in changes.items()}).values())


def _proof(name: str, without: Mapping[str, object], seen: Mapping[str, object]) -> str | None:
    return None if without.get(name) != seen.get(name) else f"{name} is as it was"


def _seen(experiment: Experiment, dead: Iterable[str] = ()) -> dict[str, object]:
    return {name: experiment.round + 1 for name in experiment.axes if name not in dead}


def _case(**changes: object) -> Case:
    return dataclasses.replace(Case("good", _axes(), _proof), **changes)  # type: ignore[arg-type]


def _audit(case: Case, build: Build) -> tuple[Judgement, list[Experiment]]:
    """Make what is asked for until there is a judgement; also, in order, all that was made."""
    done: dict[Experiment, ExperimentResult] = {}
    for _ in range(30):
        answer = blame.judge(case, done)
        if isinstance(answer, Judgement):
            return answer, list(done)
        assert answer
        assert not set(answer) & set(done), "an experiment was asked for twice"
        done |= {each: build(each) for each in answer}
    raise AssertionError("it never comes to an end")


def _leaking(*leaks: str, noise: Iterable[str] = (), registered: str = "good", dead: Iterable[str] = ()) -> Build:
    """A build that tells the axes of `leaks`, and what is in `noise`, which is never the same twice unless held."""
    counter = itertools.count()

    def build(experiment: Experiment) -> ExperimentResult:
        told = [f"{name} {experiment.round}" for name in experiment.axes if name in leaks and name not in dead]
        told += [f"{name} {next(counter)}" for name in noise if name not in experiment.held]
        told += [f"{name} held" for name in noise if name in experiment.held]
        return ExperimentResult(Ending.BUILT, ", ".join(told) or registered, observed=_seen(experiment, dead))

    return build


def _verdicts(judgement: Judgement) -> dict[str, str]:
    return {name: finding.verdict.value for name, finding in judgement.findings.items()}


def test_a_node_that_reproduces_takes_one_rebuild_per_axis() -> None:
    judgement, made = _audit(_case(), _leaking())
    assert judgement.verdict is Verdict.REPRODUCED
    assert judgement.causes == ()
    assert set(_verdicts(judgement)) == {REPEAT, *PLAIN, *NOISE}
    assert set(_verdicts(judgement).values()) == {"REPRODUCED"}
    assert made == [LOOK, Experiment(), *(Experiment((name,)) for name in (*PLAIN, "clock"))]
    assert made[1:] == list(blame.first_experiments(_case()))
    assert judgement.findings["umask"].experiments == (Experiment(("umask",)),)
    assert judgement.findings["randomness"].experiments == (Experiment(),), "every rebuild has other randomness"


@pytest.mark.parametrize("leak", [*PLAIN, "clock"])
def test_a_leaking_axis_is_the_only_cause(leak: str) -> None:
    judgement, made = _audit(_case(), _leaking(leak))
    assert judgement.causes == (leak,)
    assert judgement.verdict is Verdict.DIFFERS
    assert {name for name, verdict in _verdicts(judgement).items() if verdict != "REPRODUCED"} == {leak}
    assert Experiment((leak,), attempt=1) in made, "not done again before it was blamed"
    assert Experiment(attempt=1) in made, "nothing shows that it does not differ by itself"


@pytest.mark.parametrize("noise", NOISE)
def test_what_is_never_the_same_twice_is_found_by_holding_it(noise: str) -> None:
    judgement, made = _audit(_case(), _leaking(noise=[noise]))
    assert judgement.causes == (noise,)
    verdicts = _verdicts(judgement)
    assert {name for name, verdict in verdicts.items() if verdict == "DIFFERS"} == {REPEAT, noise}
    assert {verdict for name, verdict in verdicts.items() if name not in (REPEAT, noise)} == {"INCONCLUSIVE"}
    assert not any(each.axes for each in made), "axes were varied although nothing could be compared"
    assert sum(each.held == (noise,) for each in made) == 3, "two that agree by chance must not convict"


def test_two_that_are_never_the_same_are_both_found() -> None:
    judgement, _ = _audit(_case(), _leaking(noise=NOISE))
    assert set(judgement.causes) == set(NOISE)


def test_noise_that_nothing_holds_has_no_cause() -> None:
    judgement, _ = _audit(_case(), _leaking(noise=["cosmic rays"]))
    assert judgement.causes == ()
    assert judgement.verdict is Verdict.DIFFERS
    assert judgement.findings[REPEAT].verdict is Verdict.DIFFERS
    assert {finding.verdict for name, finding in judgement.findings.items() if name != REPEAT} == {Verdict.INCONCLUSIVE}


def test_noise_that_the_first_rebuild_did_not_meet_blames_no_axis() -> None:
    """A race that is mostly won: one axis's rebuild loses it, and so do others with nothing varied."""

    def build(experiment: Experiment) -> ExperimentResult:
        lost = experiment == Experiment(("user",)) or (not experiment.axes and experiment.attempt == 1)
        held = "cores" in experiment.held
        value = "good" if held or not lost else f"race {experiment}"
        if experiment.held and not held:
            value = f"race {experiment}"
        return ExperimentResult(Ending.BUILT, value, observed=_seen(experiment))

    judgement, _ = _audit(_case(axes=_axes(cores=AxisPlan("cores", holds=True))), build)
    assert judgement.causes == ("cores",)
    assert judgement.findings["user"].verdict is Verdict.INCONCLUSIVE
    assert judgement.findings["umask"].verdict is Verdict.REPRODUCED, "it gave the registered output all the same"


def test_an_axis_that_lets_in_noise_is_the_cause() -> None:
    """More jobs at once than one, for instance, and they end in any order."""
    counter = itertools.count()

    def build(experiment: Experiment) -> ExperimentResult:
        value = f"odd {next(counter)}" if "user" in experiment.axes else "good"
        return ExperimentResult(Ending.BUILT, value, observed=_seen(experiment))

    judgement, made = _audit(_case(), build)
    assert judgement.causes == ("user",), "what agrees with nothing held is not to blame"
    assert judgement.findings[REPEAT].verdict is Verdict.REPRODUCED
    assert "not the same one twice" in (judgement.findings["user"].reason or "")
    assert sum(not each.axes and each.builds for each in made) > 5, "rare noise was not looked for"


def test_an_axis_that_differs_only_once_is_not_believed() -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        odd = experiment == Experiment(("user",))
        return ExperimentResult(Ending.BUILT, "odd" if odd else "good", observed=_seen(experiment))

    judgement, made = _audit(_case(), build)
    assert judgement.causes == ()
    assert judgement.verdict is Verdict.DIFFERS
    assert judgement.findings["user"].verdict is Verdict.DIFFERS
    assert "not the second time" in (judgement.findings["user"].reason or "")
    assert sum(not each.axes and each.builds for each in made) > 5, "rare noise was not looked for"


@pytest.mark.parametrize("ending", [Ending.LOST, Ending.FAILED])
@pytest.mark.parametrize("unconfirmed", [Experiment(("user",), attempt=1), Experiment(attempt=1)])
def test_an_axis_is_no_cause_before_it_is_confirmed(ending: Ending, unconfirmed: Experiment) -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        if experiment == unconfirmed:
            return ExperimentResult(ending, reason="out of time")
        return _leaking("user")(experiment)

    judgement, _ = _audit(_case(), build)
    assert judgement.causes == ()
    assert judgement.verdict is Verdict.DIFFERS
    assert judgement.findings["user"].verdict is Verdict.DIFFERS, "a rebuild did differ"
    assert "out of time" in (judgement.findings["user"].reason or "")
    repeat = {Ending.LOST: Verdict.INCONCLUSIVE, Ending.FAILED: Verdict.BUILD_FAILED}[ending]
    expected = Verdict.REPRODUCED if unconfirmed.axes else repeat
    assert judgement.findings[REPEAT].verdict is expected, "a failure with nothing varied is told"


def test_a_failing_axis_is_told_of_amid_noise() -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        if "umask" in experiment.axes:
            return ExperimentResult(Ending.FAILED, reason="exit code 1", observed=_seen(experiment))
        odd = "user" in experiment.axes or (not experiment.axes and not experiment.held and experiment.attempt)
        return ExperimentResult(Ending.BUILT, f"odd {experiment}" if odd else "good", observed=_seen(experiment))

    judgement, _ = _audit(_case(), build)
    assert judgement.findings["umask"].verdict is Verdict.BUILD_FAILED
    assert judgement.findings["umask"].reason == "exit code 1"


def test_coin_flips_are_mostly_traced_to_what_flips_them() -> None:
    """The worst noise there is: two outputs with equal chances."""
    right = wrong = 0
    for seed in range(300):
        coins = random.Random(seed)

        def build(experiment: Experiment, coins: random.Random = coins) -> ExperimentResult:
            held = "randomness" in experiment.held
            return ExperimentResult(
                Ending.BUILT, "good" if held or coins.random() < 0.5 else "bad", observed=_seen(experiment)
            )

        causes = _audit(_case(), build)[0].causes
        right += causes == ("randomness",)
        wrong += bool(set(causes) & set(PLAIN))
    assert right > 240
    assert wrong < 30


def test_rebuilds_that_agree_but_not_with_the_registered_output() -> None:
    judgement, made = _audit(_case(), _leaking(registered="other"))
    assert judgement.verdict is Verdict.DIFFERS
    assert judgement.causes == ()
    assert "not the registered one" in (judgement.findings[REPEAT].reason or "")
    assert judgement.findings["user"].verdict is Verdict.INCONCLUSIVE
    assert not any(each.held for each in made), "rebuilds agree: there is no noise to look for"


def test_an_output_that_was_made_from_other_inputs_says_so() -> None:
    judgement, _ = _audit(_case(other_inputs=True), _leaking(registered="other"))
    assert "from other inputs" in (judgement.findings[REPEAT].reason or "")


def test_an_axis_that_gives_the_registered_output_is_the_cause() -> None:
    """It was registered by a build whose host name was what the axis makes it."""

    def build(experiment: Experiment) -> ExperimentResult:
        value = "good" if "host-name" in experiment.axes else "other"
        return ExperimentResult(Ending.BUILT, value, observed=_seen(experiment))

    judgement, _ = _audit(_case(), build)
    assert judgement.causes == ("host-name",)
    assert "registered" in (judgement.findings["host-name"].reason or "")


def test_a_failing_axis_is_no_difference() -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        if "umask" in experiment.axes:
            return ExperimentResult(Ending.FAILED, reason="exit code 1", observed=_seen(experiment))
        return ExperimentResult(Ending.BUILT, "good", observed=_seen(experiment))

    judgement, _ = _audit(_case(), build)
    assert judgement.verdict is Verdict.BUILD_FAILED
    assert judgement.causes == ()
    assert judgement.findings["umask"].verdict is Verdict.BUILD_FAILED
    assert judgement.findings["umask"].reason == "exit code 1"
    assert judgement.findings["user"].verdict is Verdict.REPRODUCED


@pytest.mark.parametrize(
    ("ending", "verdict"), [(Ending.FAILED, Verdict.BUILD_FAILED), (Ending.LOST, Verdict.INCONCLUSIVE)]
)
def test_without_an_output_with_nothing_varied_no_axis_is_tried(ending: Ending, verdict: Verdict) -> None:
    judgement, made = _audit(_case(), lambda _experiment: ExperimentResult(ending, reason="no way"))
    assert made == [LOOK, Experiment()]
    assert judgement.verdict is verdict
    assert judgement.findings[REPEAT].reason == "no way"
    assert {finding.verdict for name, finding in judgement.findings.items() if name != REPEAT} == {Verdict.UNTESTED}


def test_an_axis_without_effect_is_inconclusive() -> None:
    judgement, _ = _audit(_case(), _leaking("umask", dead=["umask"]))
    assert judgement.findings["umask"].verdict is Verdict.INCONCLUSIVE
    assert judgement.findings["umask"].reason == "did not take effect: umask is as it was"
    assert judgement.verdict is Verdict.INCONCLUSIVE


def _effective_from(first: int) -> Build:
    """A good build in surroundings where an axis shows only from a certain round on."""

    def build(experiment: Experiment) -> ExperimentResult:
        seen = {name: experiment.round for name in experiment.axes if experiment.round >= first or name != "user"}
        return ExperimentResult(Ending.BUILT, "good", observed={name: str(value + 1) for name, value in seen.items()})

    return build


def test_another_value_is_tried_where_the_first_has_no_effect() -> None:
    """Two files in another order are in the same order as often as not."""
    judgement, made = _audit(_case(), _effective_from(2))
    assert judgement.verdict is Verdict.REPRODUCED
    assert judgement.findings["user"].experiments == (Experiment(("user",)), Experiment(("user",), round=2))
    assert [each for each in made if each.axes and not each.builds] == [
        Experiment(("user",), round=1, builds=False),
        Experiment(("user",), round=2, builds=False),
    ]
    judgement, made = _audit(_case(quick=True), _effective_from(2))
    assert judgement.verdict is Verdict.REPRODUCED
    assert [each.round for each in made if each.builds] == [2]
    judgement, made = _audit(_case(quick=True), _effective_from(9))
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert [each.round for each in made if each.builds] == [0], "of several that are no better, the first"


def test_another_value_may_be_the_one_that_differs() -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        result = _effective_from(2)(experiment)
        return dataclasses.replace(result, nar_hash="bad") if "user" in experiment.axes and experiment.round else result

    judgement, made = _audit(_case(), build)
    assert judgement.causes == ("user",)
    assert Experiment(("user",), round=2, attempt=1) in made


def test_an_axis_that_was_not_observed_is_inconclusive() -> None:
    judgement, _ = _audit(_case(), lambda _experiment: ExperimentResult(Ending.BUILT, "good"))
    assert judgement.findings[REPEAT].verdict is Verdict.REPRODUCED
    assert judgement.findings["umask"].verdict is Verdict.INCONCLUSIVE


def test_what_is_unavailable_or_held_is_neither_tried_nor_passed() -> None:
    axes = _axes(user=AxisPlan("user", excuse="not here"), umask=AxisPlan("umask", held="by contract"))
    judgement, made = _audit(_case(axes=axes), _leaking())
    assert {name for each in made for name in each.axes} == {"host-name", "clock"}
    assert judgement.findings["user"] == blame.CellFinding(Verdict.INCONCLUSIVE, "not here")
    assert judgement.findings["umask"].verdict is Verdict.UNTESTED
    assert judgement.findings["umask"].held == "by contract"
    assert judgement.verdict is Verdict.REPRODUCED, "on all that could be tried"


def test_rounds_try_as_many_values() -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        value = "third" if "user" in experiment.axes and experiment.round == 2 else "good"
        return ExperimentResult(Ending.BUILT, value, observed=_seen(experiment))

    judgement, made = _audit(_case(rounds=2), build)
    assert judgement.verdict is Verdict.REPRODUCED
    assert made[1:] == list(blame.first_experiments(_case(rounds=2)))
    assert len(made) == 11
    judgement, made = _audit(_case(rounds=3), build)
    assert judgement.causes == ("user",)
    assert Experiment(("user",), round=2, attempt=1) in made


# --- all at once ------------------------------------------------------------------------------------------------------


def test_quick_varies_all_in_one_rebuild() -> None:
    judgement, made = _audit(_case(quick=True), _leaking())
    all_axes = (*PLAIN, "clock")
    assert made == [LOOK, Experiment(all_axes, builds=False), *blame.first_experiments(_case(quick=True))]
    assert made[2:] == [Experiment(all_axes)]
    assert judgement.verdict is Verdict.REPRODUCED
    assert set(_verdicts(judgement).values()) == {"REPRODUCED"}
    assert {finding.together for finding in judgement.findings.values()} == {len(all_axes)}


def test_quick_cannot_tell_causes() -> None:
    judgement, made = _audit(_case(quick=True), _leaking("umask"))
    assert sum(each.builds for each in made) == 1
    assert judgement.verdict is Verdict.DIFFERS
    assert judgement.causes == ()
    assert judgement.findings[REPEAT].verdict is Verdict.UNTESTED
    assert {finding.verdict for name, finding in judgement.findings.items() if name != REPEAT} == {Verdict.INCONCLUSIVE}


def test_quick_counts_only_axes_that_took_effect() -> None:
    judgement, _ = _audit(_case(quick=True), _leaking(dead=["user"]))
    assert judgement.findings["user"].verdict is Verdict.INCONCLUSIVE
    assert judgement.findings["umask"].verdict is Verdict.REPRODUCED


@pytest.mark.parametrize(
    ("ending", "verdict"), [(Ending.FAILED, Verdict.BUILD_FAILED), (Ending.LOST, Verdict.INCONCLUSIVE)]
)
def test_quick_that_gives_no_output(ending: Ending, verdict: Verdict) -> None:
    def build(experiment: Experiment) -> ExperimentResult:
        return ExperimentResult(ending if experiment.builds else Ending.BUILT, reason="no way", observed={})

    judgement, _ = _audit(_case(quick=True), build)
    assert judgement.verdict is verdict
    assert {finding.verdict for name, finding in judgement.findings.items() if name != REPEAT} == {Verdict.INCONCLUSIVE}
    assert "no way" in (judgement.findings["user"].reason or "")


# --- labels and records -----------------------------------------------------------------------------------------------


def test_labels() -> None:
    assert LOOK.label == "look"
    assert Experiment(("user",), builds=False).label == "user, look"
    assert Experiment().label == "repeat"
    assert Experiment(attempt=1).label == "repeat, again"
    assert Experiment(("user",), round=1, attempt=2).label == "user, round 2, attempt 3"
    assert Experiment(("user", "umask")).label == "2 axes"
    assert Experiment(held=("clock",)).label == "clock held"


def _record(**changes: object) -> Record:
    asked = RebuildRequest("d" * 64, "b" * 64, "a" * 64, "0123456789abcdef", {"user": 1}, {}, 0, 0)
    record = Record(
        asked, Ending.BUILT, "a" * 64, 120, "2026-01-01T00:00:00Z", "2026-01-01T00:00:07Z", 7000, None, {"user": "1:1"}
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    records = Records(tmp_path / "audit", pytest.fail)
    assert records.rebuilds("d" * 64) == []
    records.save(_record())
    assert records.rebuilds("d" * 64) == [_record()]
    assert _record().asked.experiment == Experiment(("user",))
    records.save(_record(milliseconds=9000))
    assert records.rebuilds("d" * 64) == [_record(milliseconds=9000)], "the same question has one answer"


def test_the_newest_rebuilds_tell_how_long_it_takes() -> None:
    assert expected_secs([]) is None
    assert expected_secs([_record(ending=Ending.FAILED)]) is None
    times = [1000, 90_000, 5000, 6000, 7000, 8000, 9000]
    records = [_record(milliseconds=each, finished=f"2026-01-0{day}T00:00:00Z") for day, each in enumerate(times, 1)]
    assert expected_secs(reversed(records)) == 7.0, "the median of the last five"


@pytest.mark.parametrize(
    "change",
    [
        {"build_key": "c" * 64},
        {"registered": "c" * 64},
        {"builder": "f" * 16},
        {"axes": {"user": 2}},
        {"held": {"clock": 1}},
        {"round": 1},
        {"attempt": 1},
        {"builds": False},
    ],
)
def test_another_question_is_another_record(change: dict[str, object]) -> None:
    asked = _record().asked
    assert dataclasses.replace(asked, **change).id != asked.id  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:-10],
        lambda data: b"\xff" + data,
        lambda data: data.replace(b'"round":0', b'"round":5'),
        lambda data: data.replace(b'"format":1', b'"format":9'),
        lambda data: data.replace(b'"built"', b'"guessed"'),
    ],
)
def test_a_damaged_record_is_none_with_a_warning(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    warnings: list[str] = []
    records = Records(tmp_path / "audit", warnings.append)
    records.save(_record())
    (file,) = (tmp_path / "audit" / "rebuilds" / ("d" * 64)).iterdir()
    data = file.read_bytes()
    assert spoil(data) != data
    file.write_bytes(spoil(data))
    assert records.rebuilds("d" * 64) == []
    assert len(warnings) == 1
    assert str(file) in warnings[0]


def test_an_unfinished_write_is_no_record(tmp_path: Path) -> None:
    records = Records(tmp_path / "audit", pytest.fail)
    records.save(_record())
    folder = tmp_path / "audit" / "rebuilds" / ("d" * 64)
    (folder / ".something.json.1234").write_bytes(b"{")
    assert records.rebuilds("d" * 64) == [_record()]


def test_a_report_is_found_by_the_beginning_of_its_id(tmp_path: Path) -> None:
    records = Records(tmp_path / "audit", pytest.fail)
    for name in ("aa11", "aa22", "bb11"):
        (tmp_path / "audit" / "reports" / name).mkdir(parents=True)
    assert records.find("b").name == "bb11"
    assert records.find("aa2").name == "aa22"
    with pytest.raises(UsageError, match="2 audits"):
        records.find("aa")
    for wrong in ("cc", ""):
        with pytest.raises(UsageError, match="no audit"):
            records.find(wrong)


# --- what is removed --------------------------------------------------------------------------------------------------


def _kept(tmp_path: Path) -> Records:
    """Records of an audit of which a rebuild differed, all of it old: the derivation `d…`."""
    records = Records(tmp_path / "audit", pytest.fail)
    record = _record(nar_hash="b" * 64, explanation="e" * 16)
    records.save(record)
    records.keep_explanation(Explanation("e" * 16, "bytes", (), ()))
    (tmp_path / "log").write_text("a log")
    records.keep_log(record.asked.id, tmp_path / "log")
    return _aged(records)


def _aged(records: Records) -> Records:
    for file in records.root.rglob("*"):
        os.utime(file, (1, 1))
    return records


def _names(records: Records) -> list[str]:
    return sorted(str(file.relative_to(records.root)) for file in records.root.rglob("*") if file.is_file())


def test_what_belongs_to_no_object_is_removed(tmp_path: Path) -> None:
    records = _kept(tmp_path)
    names = _names(records)
    assert len(names) == 3
    sizes = sum((records.root / name).stat().st_size for name in names)
    assert records.collect({"d" * 64}) == RemovedRecords((), 0)
    assert records.collect(set(), dry_run=True) == RemovedRecords(tuple(names), sizes)
    assert _names(records) == names
    assert records.collect(set()) == RemovedRecords(tuple(names), sizes)
    assert _names(records) == []
    assert not (records.root / "rebuilds" / ("d" * 64)).exists()
    assert Records(tmp_path / "nothing", pytest.fail).collect(set()) == RemovedRecords((), 0)


def test_what_is_young_stays_and_what_it_names(tmp_path: Path) -> None:
    """An audit that runs writes the explanation first, then the log, then the record."""
    records = _kept(tmp_path)
    (file,) = (records.root / "rebuilds" / ("d" * 64)).iterdir()
    os.utime(file)
    names = _names(records)
    records.collect(set())
    assert _names(records) == names
    assert records.collect(set(), now=time.time() + OLD_SECS + 10).files == tuple(names)


def test_what_a_report_names_stays(tmp_path: Path) -> None:
    records = _kept(tmp_path)
    rebuild = next((records.root / "logs").iterdir()).stem
    for name, finished in (("whole", True), ("half", False)):
        folder = records.root / "reports" / name
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({"rebuilds": [{"id": rebuild}]}))
        if finished:
            (folder / "summary.json").write_text("{}")
    _aged(records)
    records.collect(set())
    assert _names(records) == [f"logs/{rebuild}.log", "reports/whole/report.json", "reports/whole/summary.json"]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    records = _kept(tmp_path)
    names = _names(records)
    left = [records.root / name for name in (f"rebuilds/{'d' * 64}/.a.json.1234", "logs/.b.log.1", "explanations/.c.1")]
    for file in left:
        file.write_text("{")
    _aged(records)
    assert len(records.collect({"d" * 64}).files) == 3
    assert _names(records) == names
