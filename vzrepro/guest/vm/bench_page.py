"""Draws a boot measurement as one HTML page that needs nothing else (templates/bench.html)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vzrepro.base import html
from vzrepro.guest.vm.bench import PHASES, BenchedBundle, BenchReport, Boot, Ratio

_SHOWN = (*PHASES, "http")
_WIDTH, _LABEL, _RIGHT = 860, 150, 60
_ROW = 44
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_WORDS = {
    "kernel": "kernel: to /init",
    "init": "init: to the agent's start",
    "agent": "agent: to listening",
    "exec": "exec: to a command's answer",
    "total": "all together",
    "http": "HTTP request of the guest",
    "image_bytes": "size of kernel and initramfs",
}


def page(report: BenchReport) -> str:
    """The whole page. What it shows is also in it as data: the report's JSON, in the element `report`."""
    measured = [subject for subject in report.bundles if subject.phases]
    template = html.template(__package__, "bench.html", _NAMES)
    return template.render(report=report, measured=measured, style=html.asset(__package__, "bench.css"))


class _Scale:
    """Seconds to pixels, from 0 to a little beyond `longest`."""

    def __init__(self, longest: float) -> None:
        self._end = max(longest, 0.001) * 1.05
        self._step = next((step for step in _STEPS if self._end / step <= 8), _STEPS[-1])

    def x(self, secs: float) -> float:
        return _LABEL + secs / self._end * (_WIDTH - _LABEL - _RIGHT)

    def marks(self) -> Iterator[float]:
        count = 0
        while count * self._step <= self._end:
            yield round(count * self._step, 3)
            count += 1


def _stacked(subject: BenchedBundle) -> list[tuple[str, float, float]]:
    """Each phase with when it begins and how long it takes, by the medians."""
    found, begin = [], 0.0
    for phase in PHASES[:-1]:
        found.append((phase, begin, subject.phases[phase].median))
        begin += subject.phases[phase].median
    return found


def _longest(subjects: Sequence[BenchedBundle]) -> float:
    return max(sum(secs for _, _, secs in _stacked(subject)) for subject in subjects)


def _measured_in(subjects: Sequence[BenchedBundle], phase: str) -> list[BenchedBundle]:
    return [subject for subject in subjects if phase in subject.phases]


def _slowest(subjects: Sequence[BenchedBundle], phase: str) -> float:
    return max(subject.phases[phase].max for subject in subjects)


def _times(boots: Sequence[Boot], subject: BenchedBundle, phase: str) -> Iterator[tuple[Boot, float]]:
    """The subject's boots that went well, with the seconds that the phase took."""
    for boot in boots:
        secs = boot.http if phase == "http" else boot.durations.get(phase)
        if boot.bundle == subject.label and boot.error is None and secs is not None:
            yield boot, secs


def _short(name: str) -> str:
    tail = name.rstrip("/").rpartition("/")[2]
    return tail if len(tail) <= 20 else f"…{tail[-19:]}"


def _numbers(subjects: Sequence[BenchedBundle]) -> list[list[str]]:
    return [
        [_WORDS[phase], _short(subject.name), str(found.count)]
        + [_secs3(value) for value in (found.min, found.mean, found.median, found.p95, found.max)]
        for phase in _SHOWN
        for subject in subjects
        if (found := subject.phases.get(phase)) is not None
    ]


def _compared(comparison: Mapping[str, Ratio]) -> list[list[str]]:
    return [
        [_WORDS[phase], *("-" if value is None else _secs3(value) for value in (found.ratio, found.low, found.high))]
        for phase, found in comparison.items()
    ]


def _boots(report: BenchReport) -> list[list[str]]:
    return [
        [f"{boot.number}", boot.bundle]
        + [_secs3(boot.durations[phase]) if phase in boot.durations else "-" for phase in PHASES]
        + ([] if boot.error is None else [boot.error])
        for boot in report.boots
    ]


def _secs3(value: float) -> str:
    return f"{value:.3f}"


def _px(value: float) -> str:
    return f"{value:.1f}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


_NAMES: dict[str, Any] = {
    "PHASES": PHASES,
    "SHOWN": _SHOWN,
    "WORDS": _WORDS,
    "WIDTH": _WIDTH,
    "ROW": _ROW,
    "Scale": _Scale,
    **{
        function.__name__.lstrip("_"): function
        for function in (
            *(_stacked, _longest, _measured_in, _slowest, _times, _short, _numbers, _compared, _boots),
            *(_secs3, _px, _mb),
        )
    },
}
