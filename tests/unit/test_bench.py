"""What `vm bench` computes from boots, the page it draws, and the schema of its report."""

from __future__ import annotations

import json
import random
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vzrepro.base import events
from vzrepro.guest.vm.bench import (
    PHASES,
    BenchedBundle,
    BenchReport,
    Boot,
    Distribution,
    Label,
    Options,
    console,
    distribution,
    durations,
    ratio,
)
from vzrepro.guest.vm.bench_page import page

SCHEMA = Path(__file__).parents[2] / "docs" / "bench.schema.json"


def test_a_phase_lasts_from_the_mark_before_it() -> None:
    assert durations({"init": 1.0, "agent": 1.5, "ready": 1.75, "exec": 2.0}) == {
        "kernel": 1.0,
        "init": 0.5,
        "agent": 0.25,
        "exec": 0.25,
        "total": 2.0,
    }


def test_a_boot_that_stopped_has_the_phases_it_reached() -> None:
    assert durations({"init": 1.0, "agent": 1.5}) == {"kernel": 1.0, "init": 0.5}
    assert durations({}) == {}
    # A later mark without the one before it says nothing about a phase.
    assert durations({"ready": 2.0, "init": 1.0}) == {"kernel": 1.0}


def test_the_distribution_of_known_values() -> None:
    found = distribution([float(value) for value in range(21)])
    assert found == Distribution(count=21, min=0, mean=10, median=10, p95=19, max=20)
    assert distribution([3.0]) == Distribution(count=1, min=3, mean=3, median=3, p95=3, max=3)


def test_the_interval_holds_the_ratio_and_narrows_with_more_boots() -> None:
    chance = random.Random(7)

    def boots(median: float, count: int) -> list[float]:
        return [chance.gauss(median, 0.1) for _ in range(count)]

    few, many = ratio(boots(1, 5), boots(2, 5)), ratio(boots(1, 80), boots(2, 80))
    for found in (few, many):
        assert found.ratio is not None and found.low is not None and found.high is not None
        assert found.low <= found.ratio <= found.high
    assert many.low is not None and many.high is not None and few.low is not None and few.high is not None
    assert many.low < 2 < many.high
    assert many.high - many.low < few.high - few.low


def test_the_same_boots_give_the_same_interval() -> None:
    a, b = [1.0, 1.1, 1.3, 0.9], [2.0, 2.2, 1.7, 2.1]
    assert ratio(a, b) == ratio(a, b)
    assert ratio(a, b).ratio == pytest.approx(statistics.median(b) / statistics.median(a), abs=1e-4)


def test_no_time_has_no_ratio() -> None:
    assert ratio([0.0, 0.0], [1.0]).ratio is None


def _report(names: tuple[str, ...] = ("one",), *, error: str | None = None) -> BenchReport:
    labels: list[Label] = ["a", "b"]
    boots: list[Boot] = []
    subjects: list[BenchedBundle] = []
    for label, name in zip(labels, names, strict=False):
        times = {phase: [0.5 + number / 10 for number in range(4)] for phase in PHASES}
        boots += [
            Boot(
                bundle=label,
                number=len(boots) + 1,
                durations={phase: values[number] for phase, values in times.items()},
                http=None,
                error=None,
            )
            for number in range(4)
        ]
        subjects.append(
            BenchedBundle(
                label=label,
                name=name,
                kernel_bytes=10_000_000,
                initramfs_bytes=3_000_000,
                failed=int(error is not None),
                phases={phase: distribution(values) for phase, values in times.items()},
            )
        )
    if error is not None:
        boots.append(Boot(bundle="a", number=9, durations={"kernel": 1.0}, http=None, error=error))
    return BenchReport(
        started="2026-01-01T00:00:00Z",
        host="2 cores",
        iterations=4,
        timeout_secs=60,
        bundles=tuple(subjects),
        comparison={"total": ratio([1.0, 1.1], [0.5, 0.6])} if len(names) == 2 else None,
        boots=tuple(boots),
    )


class _Page(HTMLParser):
    """Collects what a page refers to, and checks that its elements nest."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.refers += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag in ("link", "img", "iframe", "object"):
            self.refers.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element that is its own end, as those of a drawing are."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_refers_to_nothing_and_holds_its_data() -> None:
    report = _report(("left", "right"))
    text = page(report)
    parsed = _Page(text)
    assert parsed.refers == []
    assert "url(" not in text and "@import" not in text
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    assert BenchReport.model_validate_json(found[1].replace("<\\/", "</")) == report
    assert text.count("<circle") == len(PHASES) * len(report.boots)


def test_names_and_errors_are_text_not_markup() -> None:
    evil = '</script><script>alert("1")</script>'
    parsed = _Page(page(_report((evil,), error=f"{evil}\nsecond line")))
    assert any(evil in piece for piece in parsed.text)


def test_a_run_in_which_every_boot_failed_has_a_page() -> None:
    whole = _report(error="never ready")
    subject = whole.bundles[0].model_copy(update={"phases": {}, "failed": 1})
    failed = whole.model_copy(update={"boots": whole.boots[-1:], "bundles": (subject,)})
    text = page(failed)
    _Page(text)
    assert "1 failed" in text and "never ready" in text


def test_the_schema_in_the_documentation_is_the_reports() -> None:
    """To write it anew: python -m tests.unit.test_bench"""
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == BenchReport.model_json_schema()


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(BenchReport.model_json_schema(), indent=2) + "\n", encoding="utf-8")


def test_a_console_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "0001-a.log").symlink_to("/dev/full")
    said: list[events.Event] = []
    options = Options(iterations=1, timeout_secs=1, console_directory=tmp_path)
    with console(options, "0001-a.log", 1, said.append) as on_console:
        on_console("one")
        on_console("two")
    [notice] = said
    assert isinstance(notice, events.Notice)
    assert (
        notice.message == f"boot 1: its console could not be written to {tmp_path}/0001-a.log: No space left on device"
    )
