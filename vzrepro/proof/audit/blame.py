"""Which rebuilds an audit of one node needs, and what they prove: pure functions of what has come out so far.

`judge` is asked again after every rebuild. It answers with the experiments that are still missing, or, once there are
none, with the judgement. It knows no Docker, no store and no clock, so every path through it is a unit test.

The order of the argument (docs/audit.md tells it to people):

1. Rebuild with nothing varied. If that gives the registered output, rebuild once per axis: one that gives another
   output is a cause. Before it is called one, the same is done again: a cause gives its output a second time, while
   a build that differs by itself shows up in a second rebuild with nothing varied. If the second time gives yet
   another output, many more rebuilds with nothing varied must agree: then the axis lets in something random.
2. If rebuilds differ from each other with nothing varied, something that is never the same twice gets in. Each axis
   that can be held constant is held, alone: when rebuilds then agree, it is the cause. If none helps alone, all are
   held, and released one at a time.
3. If rebuilds agree with each other, but not with the registered output, it was made under other conditions, or not
   from these inputs. Then axes are compared with the rebuild.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vzrepro.proof.audit.model import REPEAT, Verdict, worst
from vzrepro.proof.audit.observed import Observed

_PAIR, _SURE = 2, 3
"""Rebuilds that must agree: to be suspected, to be believed."""

_OTHER_VALUES = 4
"""Other values that are looked at for an axis that does not take effect with those it was given."""

_CONTROLS = 3
"""At most so many more rebuilds with nothing varied, however many axes are suspected."""


@dataclass(frozen=True, slots=True, order=True)
class Experiment:
    """One rebuild to make: axes varied, axes held constant, the round (other values), the attempt (the same again).

    With `builds` False nothing is built: the sandbox is only looked at, for what it is like with nothing varied.
    """

    axes: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    round: int = 0
    attempt: int = 0
    builds: bool = True

    @property
    def label(self) -> str:
        """What a person calls it: `repeat`, `host-name`, `all axes, round 2`, `clock held, again`."""
        varied = f"{len(self.axes)} axes" if len(self.axes) > 1 else "".join(self.axes)
        held = f"{len(self.held)} axes held" if len(self.held) > 1 else "".join(f"{name} held" for name in self.held)
        parts = [part for part in (varied, held) if part] or ([REPEAT] if self.builds else [])
        if self.round:
            parts.append(f"round {self.round + 1}")
        if self.attempt:
            parts.append("again" if self.attempt == 1 else f"attempt {self.attempt + 1}")
        if not self.builds:
            parts.append("look")
        return ", ".join(parts)


LOOK = Experiment(builds=False)
"""See what the sandbox is like with nothing varied."""


class Ending(enum.StrEnum):
    """How a rebuild ended: with an output, with the builder's failure, or without telling anything about the node
    (out of time, out of space, the container engine failed)."""

    BUILT = "built"
    FAILED = "failed"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class ExperimentResult:
    """What came of an experiment. `nar_hash` (hex) of what was built; `reason` for what was not; `observed` is None
    when the sandbox did not tell. `without` is what is seen with nothing varied where it was made, if that is another
    machine than the look's."""

    ending: Ending
    nar_hash: str | None = None
    reason: str | None = None
    observed: Observed | None = None
    without: Observed | None = None


@dataclass(frozen=True, slots=True)
class AxisPlan:
    """What may be done with an axis for one node: why it cannot be varied here (`excuse`), the recipe's reason for
    keeping it constant (`held`), whether it is varied at all (`varies`; else it varies by itself), or `holds`."""

    name: str
    excuse: str | None = None
    held: str | None = None
    varies: bool = True
    holds: bool = False

    @property
    def testable(self) -> bool:
        """Whether rebuilds with it varied are to be made."""
        return self.varies and self.excuse is None and self.held is None


@dataclass(frozen=True, slots=True)
class Case:
    """One node to be judged. `registered` is its output's NAR hash (hex). `proof` says why an axis did not take
    effect, given what was seen without and with it; None when it did. `patience` is how many rebuilds may have to
    agree with an axis held while another one is suspected, too: noise of few values agrees by chance. `other_inputs`
    tells that the registered output is said to have been made from other bytes of its inputs than those here."""

    registered: str
    axes: tuple[AxisPlan, ...]
    proof: Callable[[str, Observed, Observed], str | None]
    quick: bool = False
    rounds: int = 1
    patience: int = 5
    other_inputs: bool = False


@dataclass(frozen=True, slots=True)
class CellFinding:
    """A cell before rebuilds have ids: see `model.Cell`."""

    verdict: Verdict
    reason: str | None = None
    experiments: tuple[Experiment, ...] = ()
    together: int = 1
    held: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is known of a node: `findings` by axis, REPEAT first, and the axes that are to blame."""

    verdict: Verdict
    findings: Mapping[str, CellFinding]
    causes: tuple[str, ...] = ()


def judge(case: Case, done: Mapping[Experiment, ExperimentResult]) -> Judgement | tuple[Experiment, ...]:
    """The judgement, or the experiments that are to be made before the next question; never an empty tuple."""
    argument = _Argument(case, done)
    judgement = argument.together() if case.quick else argument.alone()
    return tuple(dict.fromkeys(argument.missing)) if judgement is None else judgement


def first_experiments(case: Case) -> tuple[Experiment, ...]:
    """The rebuilds that a node takes which reproduces on every axis."""
    names = tuple(axis.name for axis in case.axes if axis.testable)
    rounds = range(case.rounds)
    if case.quick:
        return tuple(Experiment(names, round=number) for number in rounds)
    varied = (Experiment((name,), round=number) for name in names for number in rounds)
    return (*_attempts(Experiment(), case.rounds), *varied)


@dataclass(slots=True)
class _Argument:
    """Methods that return None lack experiments, which are then in `missing`."""

    case: Case
    done: Mapping[Experiment, ExperimentResult]
    missing: list[Experiment] = field(default_factory=list)

    def ask(self, experiments: Sequence[Experiment]) -> list[ExperimentResult] | None:
        """The results of all, or None."""
        missing = [each for each in experiments if each not in self.done]
        self.missing += missing
        return None if missing else [self.done[each] for each in experiments]

    # --- all axes at once -----------------------------------------------------------------------------------------

    def together(self) -> Judgement | None:
        names = tuple(axis.name for axis in self.case.axes if axis.testable)
        seen = self.ask([LOOK])  # first: a rebuild's statement tells what its sandbox was like without
        values = None if seen is None else self._best_values(names)
        if seen is None or values is None:
            return None
        runs = [Experiment(names, round=number) for number in values]
        results = self.ask(runs)
        if results is None:
            return None
        count = len(names)
        verdict = _of_all([self._verdict(result, self.case.registered) for result in results])
        found = CellFinding(verdict, None, tuple(runs), count)
        if verdict is not Verdict.REPRODUCED:
            reason = f"differs with {count} axes varied at once"
            if verdict is not Verdict.DIFFERS:
                reason = next((result.reason for result in results if result.reason), reason)
            found = replace(found, reason=reason)
        findings = {REPEAT: found}
        for axis in self.case.axes:
            findings[axis.name] = self._of_together(axis, found, results)
        if verdict is not Verdict.REPRODUCED:
            reason = f"--quick rebuilds with nothing varied only by looking; {found.reason}"
            findings[REPEAT] = CellFinding(Verdict.UNTESTED, reason)
            return Judgement(verdict, findings)
        return Judgement(_overall(findings), findings)

    def _best_values(self, names: tuple[str, ...]) -> tuple[int, ...] | None:
        """The rounds to make: the first ones; and of a single one, a value with which most axes take effect."""
        rounds = tuple(range(self.case.rounds))
        if len(rounds) > 1:
            return rounds
        effective: dict[int, int] = {}
        for number in range(_OTHER_VALUES):
            seen = self.ask([Experiment(names, round=number, builds=False)])
            if seen is None:
                return None
            effective[number] = sum(self._why_not(name, seen[0]) is None for name in names)
            if effective[number] == len(names):
                break
        return (max(effective, key=lambda number: (effective[number], -number)),)

    def _of_together(self, axis: AxisPlan, found: CellFinding, results: Sequence[ExperimentResult]) -> CellFinding:
        untested = self._not_tested(axis)
        if untested is not None:
            return untested
        if found.verdict is not Verdict.REPRODUCED:
            reason = f"{found.reason}; without --quick it is told which"
            return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
        if not axis.varies:
            return found
        return self._effective(axis.name, found, results)

    # --- one at a time --------------------------------------------------------------------------------------------

    def alone(self) -> Judgement | None:
        runs = _attempts(Experiment(), self.case.rounds)
        seen = self.ask([LOOK] if any(axis.testable for axis in self.case.axes) else [])
        results = self.ask(runs)
        if seen is None or results is None:
            return None
        if any(result.ending is not Ending.BUILT for result in results):
            return self._without_repeat(runs, results)
        hashes = {result.nar_hash for result in results}
        if hashes == {self.case.registered}:
            return self._settled(CellFinding(Verdict.REPRODUCED, None, runs), self.case.registered)
        runs = _attempts(Experiment(), self.case.rounds + 1)
        results = self.ask(runs)
        if results is None:
            return None
        if any(result.ending is not Ending.BUILT for result in results):
            return self._without_repeat(runs, results)
        (base, *others) = {result.nar_hash for result in results}
        if others or base is None:
            return self._noisy(runs, {})
        reason = f"{len(runs)} rebuilds gave one output, which is not the registered one: that was made " + (
            "from other inputs, as its build key tells" if self.case.other_inputs else "under other conditions"
        )
        return self._settled(CellFinding(Verdict.DIFFERS, reason, runs), base)

    def _without_repeat(self, runs: tuple[Experiment, ...], results: Sequence[ExperimentResult]) -> Judgement:
        """Nothing can be compared, because not even a rebuild with nothing varied gives an output."""
        verdict = _of_all([self._verdict(result, self.case.registered) for result in results])
        reason = next(result.reason for result in results if result.ending is not Ending.BUILT)
        findings = {REPEAT: CellFinding(verdict, reason, runs)}
        for axis in self.case.axes:
            findings[axis.name] = self._not_tested(axis) or CellFinding(
                Verdict.UNTESTED, "not tried: there was no output with nothing varied"
            )
        return Judgement(verdict, findings)

    def _settled(self, repeat: CellFinding, base: str) -> Judgement | None:
        """Rebuilds with nothing varied agree on `base`: vary one axis at a time."""
        tested = [axis.name for axis in self.case.axes if axis.testable]
        runs = {name: tuple(Experiment((name,), round=number) for number in range(self.case.rounds)) for name in tested}
        if self.ask([run for each in runs.values() for run in each]) is None:
            return None
        if not self._try_other_values(runs, base):
            return None
        suspects = {}
        for name, each in runs.items():
            differing = next((run for run in each if self._other(run, base)), None)
            if differing is not None:
                suspects[name] = differing
        again = {name: replace(run, attempt=1) for name, run in suspects.items()}
        known = len(repeat.experiments)
        controls = _attempts(Experiment(), known + min(len(suspects), _CONTROLS))
        if self.ask([*controls, *again.values()]) is None:
            return None
        unsteady = [name for name, run in suspects.items() if self._other(again[name], self.done[run].nar_hash)]
        if unsteady and not any(self._other(run, base) for run in controls):
            # It differs by itself, but rarely; or the axis lets in something that is never the same twice.
            controls = _attempts(Experiment(), len(controls) + self.case.patience)
            if self.ask(controls) is None:
                return None
        if any(self._other(run, base) for run in controls):
            return self._noisy(controls, runs)
        broken = [self.done[run] for run in controls if self.done[run].ending is not Ending.BUILT]
        doubts = {}
        for name, run in again.items():
            if self.done[run].ending is Ending.BUILT and not self._other(run, base):
                doubts[name] = "but was not the second time"
            for lacking in (self.done[run], *broken):
                if lacking.ending is not Ending.BUILT:
                    doubts[name] = f"but what was to confirm it gave none: {lacking.reason}"
        repeat = replace(
            repeat,
            verdict=_of_all([repeat.verdict, *(self._verdict(result, base) for result in broken)]),
            reason=repeat.reason or next((result.reason for result in broken), None),
            experiments=controls,
        )
        findings = {REPEAT: repeat}
        for axis in self.case.axes:
            name = axis.name
            findings[name] = self._not_tested(axis) or (
                self._of_axis(name, runs[name], again.get(name), doubts.get(name), base)
                if axis.varies
                else self._by_itself(repeat)
            )
        return Judgement(_overall(findings), findings, tuple(name for name in suspects if name not in doubts))

    def _try_other_values(self, runs: dict[str, tuple[Experiment, ...]], base: str) -> bool:
        """Add a run with another value for each axis that took no effect, if looking finds one that does.

        False while experiments are missing.
        """
        for name, each in runs.items():
            results = [self.done[run] for run in each]
            if any(self._verdict(result, base) is not Verdict.REPRODUCED for result in results):
                continue
            if any(self._why_not(name, result) is None for result in results) or self.done[LOOK].observed is None:
                continue
            for number in range(self.case.rounds, self.case.rounds + _OTHER_VALUES):
                look = self.ask([Experiment((name,), round=number, builds=False)])
                if look is None:
                    break
                if self._why_not(name, look[0]) is None:
                    other = Experiment((name,), round=number)
                    self.ask([other])
                    runs[name] = (*each, other)
                    break
        return not self.missing

    def _of_axis(
        self, name: str, runs: tuple[Experiment, ...], again: Experiment | None, doubt: str | None, base: str
    ) -> CellFinding:
        results = [self.done[run] for run in runs]
        if again is not None:
            reason = "its output is another one when this is varied"
            if doubt is not None:
                reason += f", {doubt}"
            elif self._other(again, next(self.done[run].nar_hash for run in runs if self._other(run, base))):
                reason += ", and not the same one twice"
            elif self.done[again].nar_hash == self.case.registered:
                reason = "with this varied the output is the registered one, and else it is not"
            return CellFinding(Verdict.DIFFERS, reason, (*runs, again))
        verdict = _of_all([self._verdict(result, base) for result in results])
        found = CellFinding(verdict, next((result.reason for result in results if result.reason), None), runs)
        if verdict is not Verdict.REPRODUCED:
            return found
        if base != self.case.registered:
            reason = "varying it changes nothing, but rebuilds do not give the registered output"
            return replace(found, verdict=Verdict.INCONCLUSIVE, reason=reason)
        return self._effective(name, found, results)

    def _by_itself(self, repeat: CellFinding) -> CellFinding:
        """An axis that is another in every rebuild without anybody's doing: the repeats have tested it."""
        if repeat.verdict is Verdict.REPRODUCED:
            return repeat
        reason = repeat.reason
        if repeat.verdict is Verdict.DIFFERS:
            reason = "it is another in every rebuild; these agree with each other, but not with the registered output"
        return replace(repeat, verdict=Verdict.INCONCLUSIVE, reason=reason)

    # --- what is never the same twice -----------------------------------------------------------------------------

    def _noisy(self, repeats: tuple[Experiment, ...], runs: Mapping[str, tuple[Experiment, ...]]) -> Judgement | None:
        """Rebuilds with nothing varied disagree: hold axes constant until they agree."""
        holders = tuple(axis.name for axis in self.case.axes if axis.holds)
        if self.ask([run for name in holders for run in _held((name,), _PAIR)]) is None:
            return None
        candidates = [name for name in holders if self._agree((name,), _PAIR)]
        for count in range(_SURE, max(self.case.patience, _SURE) + 1):
            if count > _SURE and len(candidates) < 2:
                break
            if self.ask([run for name in candidates for run in _held((name,), count)]) is None:
                return None
            candidates = [name for name in candidates if self._agree((name,), count)]
        evidence = {name: _held((name,), _SURE) for name in candidates}
        why = "rebuilds agree with each other when this is held constant, and else they do not"
        if not candidates and len(holders) > 1:
            released = self._release(holders)
            if released is None:
                return None
            evidence = released
            candidates = list(released)
            why = "rebuilds agree with each other when this and others are held constant, and not without it"
        findings = {
            REPEAT: CellFinding(Verdict.DIFFERS, "rebuilds differ from each other with nothing varied", repeats)
        }
        for axis in self.case.axes:
            name = axis.name
            if name in evidence:
                findings[name] = CellFinding(Verdict.DIFFERS, why, evidence[name], held=axis.held)
            else:
                findings[name] = self._in_noise(axis, runs.get(name, ()))
        return Judgement(Verdict.DIFFERS, findings, tuple(candidates))

    def _release(self, holders: tuple[str, ...]) -> dict[str, tuple[Experiment, ...]] | None:
        """With all held: which ones may not be released. Maps each of these to its evidence."""
        together = _held(holders, _SURE)
        if self.ask(together) is None:
            return None
        if not self._agree(holders, _SURE):
            return {}
        without = {name: tuple(each for each in holders if each != name) for name in holders}
        if self.ask([run for rest in without.values() for run in _held(rest, _PAIR)]) is None:
            return None
        return {
            name: (*together, *_held(rest, _PAIR))
            for name, rest in without.items()
            if self._built(rest, _PAIR) and not self._agree(rest, _PAIR)
        }

    def _in_noise(self, axis: AxisPlan, runs: tuple[Experiment, ...]) -> CellFinding:
        untested = self._not_tested(axis)
        if untested is not None:
            return untested
        results = [self.done[run] for run in runs]
        if runs and all(self._verdict(result, self.case.registered) is Verdict.REPRODUCED for result in results):
            return self._effective(axis.name, CellFinding(Verdict.REPRODUCED, None, runs), results)
        broken = next((result for result in results if result.ending is Ending.FAILED), None)
        if broken is not None:
            return CellFinding(Verdict.BUILD_FAILED, broken.reason, runs)
        reason = "differs with nothing varied"
        if axis.holds:
            trials = _held((axis.name,), _PAIR)
            failed = next((self.done[run].reason for run in trials if self.done[run].ending is not Ending.BUILT), None)
            reason += f"; with it held constant: {failed}" if failed else ", and with it held constant, too"
            runs = (*runs, *trials)
        return CellFinding(Verdict.INCONCLUSIVE, reason, runs)

    def _built(self, held: tuple[str, ...], count: int) -> bool:
        return all(self.done[run].ending is Ending.BUILT for run in _held(held, count))

    def _agree(self, held: tuple[str, ...], count: int) -> bool:
        return self._built(held, count) and len({self.done[run].nar_hash for run in _held(held, count)}) == 1

    # --- parts ----------------------------------------------------------------------------------------------------

    def _other(self, run: Experiment, base: str | None) -> bool:
        result = self.done[run]
        return result.ending is Ending.BUILT and result.nar_hash != base

    def _verdict(self, result: ExperimentResult, base: str) -> Verdict:
        match result.ending:
            case Ending.BUILT:
                return Verdict.REPRODUCED if result.nar_hash == base else Verdict.DIFFERS
            case Ending.FAILED:
                return Verdict.BUILD_FAILED
        return Verdict.INCONCLUSIVE

    def _not_tested(self, axis: AxisPlan) -> CellFinding | None:
        if axis.held is not None:
            return CellFinding(Verdict.UNTESTED, f"held constant by the recipe: {axis.held}", held=axis.held)
        if axis.varies and axis.excuse is not None:
            return CellFinding(Verdict.INCONCLUSIVE, axis.excuse)
        return None

    def _effective(self, name: str, found: CellFinding, results: Sequence[ExperimentResult]) -> CellFinding:
        """`found`, unless the axis took effect in none of the rebuilds."""
        whys = [self._why_not(name, result) for result in results]
        if all(why is not None for why in whys):
            return replace(found, verdict=Verdict.INCONCLUSIVE, reason=f"did not take effect: {whys[0]}")
        return found

    def _why_not(self, name: str, result: ExperimentResult) -> str | None:
        """Why an axis did not take effect in a rebuild; None when it did."""
        without = result.without or self.done[LOOK].observed
        if without is None or result.observed is None:
            return "nothing was seen inside the sandbox"
        return self.case.proof(name, without, result.observed)


def _attempts(first: Experiment, count: int) -> tuple[Experiment, ...]:
    return tuple(replace(first, attempt=number) for number in range(count))


def _held(names: tuple[str, ...], count: int) -> tuple[Experiment, ...]:
    return _attempts(Experiment(held=names), count)


def _of_all(verdicts: Sequence[Verdict]) -> Verdict:
    return worst(Counter(verdicts))


def _overall(findings: Mapping[str, CellFinding]) -> Verdict:
    """A node's verdict: the worst of what was tried. What could not be tried is in the cells, each with its reason."""
    return _of_all([found.verdict for found in findings.values() if found.experiments])
