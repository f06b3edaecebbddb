"""Draws a boot measurement as one HTML page that needs nothing else: no script, no network, light or dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from vzrepro.vm.bench import PHASES, Boot, Report, Subject

_WIDTH, _LABEL, _RIGHT = 860, 150, 60
_ROW = 44
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_PHASE_WORDS = {
    "kernel": "kernel: to /init",
    "init": "init: to the agent's start",
    "agent": "agent: to listening",
    "exec": "exec: to a command's answer",
    "total": "all together",
    "http": "HTTP request of the guest",
    "image_bytes": "size of kernel and initramfs",
}

_STYLE = """
:root { color-scheme: light dark;
  --page: #fff; --ink: #1b1f24; --soft: #5b6470; --line: #d8dde3; --band: #eef1f4;
  --a: #2563a8; --b: #b4510f; --p0: #2563a8; --p1: #2f8f83; --p2: #c08a1e; --p3: #8a4f9e; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171a; --ink: #e6e9ec; --soft: #9aa4af; --line: #343b43; --band: #20252b;
  --a: #6ea8e6; --b: #f0975a; --p0: #6ea8e6; --p1: #5cc4b6; --p2: #e0b354; --p3: #c08fd2; --bad: #ff8a80; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 900px; padding: 24px 16px 64px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0; color: var(--soft); overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 600px; height: auto; margin: 8px 0; }
text { fill: var(--ink); font-size: 13px; }
.soft { fill: var(--soft); } .grid { stroke: var(--line); } .band { fill: var(--band); }
.median { stroke: var(--ink); stroke-width: 2; } .in { fill: #fff; }
.a { fill: var(--a); } .b { fill: var(--b); } .dot { fill-opacity: 0.6; }
.p0 { fill: var(--p0); } .p1 { fill: var(--p1); } .p2 { fill: var(--p2); } .p3 { fill: var(--p3); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; } .bad { color: var(--bad); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
summary { cursor: pointer; margin-top: 32px; color: var(--soft); }
"""


def page(report: Report) -> str:
    """The whole page. What it shows is also in it as data: the report's JSON, in the element `report`."""
    names = " against ".join(subject.name for subject in report.bundles)
    # "</script" is the only thing that could end the element early.
    data = report.model_dump_json(indent=1).replace("</", "<\\/")
    failed = f' · <span class="bad">{report.failures()} failed</span>' if report.failures() else ""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Boots of {escape(names)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Boots of {escape(names)}</h1>",
        f"<p>{len(report.boots)} boots{failed} · {escape(report.started)} · {escape(report.host)}</p>",
        *(f"<p>{_key(subject)}{escape(_described(subject))}</p>" for subject in report.bundles),
    ]
    measured = [subject for subject in report.bundles if subject.phases]
    if measured:
        parts += ["<h2>Where the time goes</h2><p>Median of each phase.</p>", _stacked(measured)]
        parts += ["<h2>How it is spread</h2>"]
        parts += [
            "<p>A dot is a boot, the line their median, the band reaches from the least to the 95th percentile.</p>"
        ]
        parts += [_strip(phase, measured, report.boots) for phase in (*PHASES, "http") if phase in measured[0].phases]
        parts += ["<h2>In numbers</h2>", _numbers(measured)]
    if report.comparison:
        parts += [
            "<h2>Compared</h2><p>Median of the second over median of the first; below 1 the second is faster.</p>",
            _compared(report),
        ]
    parts += [_boots(report), f'<script type="application/json" id="report">{data}</script></body></html>\n']
    return "\n".join(parts)


def _described(subject: Subject) -> str:
    mb = (subject.kernel_bytes + subject.initramfs_bytes) / 1e6
    return f"{subject.name}: kernel {subject.kernel_bytes / 1e6:.2f} MB, with initramfs {mb:.2f} MB"


def _key(subject: Subject) -> str:
    return f'<span class="key" style="background: var(--{subject.label})"></span>'


def _stacked(subjects: Sequence[Subject]) -> str:
    longest = max(sum(subject.phases[phase].median for phase in PHASES[:-1]) for subject in subjects)
    scale = _Scale(longest)
    body = [scale.axis(len(subjects) * _ROW)]
    for row, subject in enumerate(subjects):
        top, at = row * _ROW + 8, 0.0
        body.append(f'<text x="0" y="{top + 18}">{escape(_short(subject.name))}</text>')
        for number, phase in enumerate(PHASES[:-1]):
            secs = subject.phases[phase].median
            left, right = scale.x(at), scale.x(at + secs)
            body.append(
                f'<rect class="p{number}" x="{left:.1f}" y="{top}" width="{max(right - left, 0.5):.1f}" height="28">'
                f"<title>{_PHASE_WORDS[phase]}: {secs:.3f} s</title></rect>"
            )
            if right - left > 44:
                body.append(f'<text class="in" x="{left + 6:.1f}" y="{top + 19}">{secs:.2f} s</text>')
            at += secs
        body.append(f'<text x="{scale.x(at) + 6:.1f}" y="{top + 19}">{at:.2f} s</text>')
    keys = " &nbsp; ".join(
        f'<span class="key" style="background: var(--p{number})"></span>{_PHASE_WORDS[phase]}'
        for number, phase in enumerate(PHASES[:-1])
    )
    return f"{_svg(len(subjects) * _ROW + 24, body)}<p>{keys}</p>"


def _strip(phase: str, subjects: Sequence[Subject], boots: Sequence[Boot]) -> str:
    subjects = [subject for subject in subjects if phase in subject.phases]
    scale = _Scale(max(subject.phases[phase].max for subject in subjects))
    body = [scale.axis(len(subjects) * _ROW)]
    for row, subject in enumerate(subjects):
        top, found = row * _ROW, subject.phases[phase]
        low, high, middle = scale.x(found.min), scale.x(found.p95), scale.x(found.median)
        word = _PHASE_WORDS[phase].partition(":")[0] if row == 0 else ""
        body += [
            f'<text x="0" y="{top + 26}">{word}</text>',
            f'<rect class="band" x="{low:.1f}" y="{top + 6}" width="{max(high - low, 1):.1f}" height="32" rx="4"/>',
        ]
        for boot in boots:
            secs = boot.http if phase == "http" else boot.durations.get(phase)
            if boot.bundle == subject.label and boot.error is None and secs is not None:
                # Spread by the boot's number, so that equal times do not hide each other.
                y = top + 12 + boot.number * 7 % 21
                body.append(
                    f'<circle class="{subject.label} dot" cx="{scale.x(secs):.1f}" cy="{y}" r="4">'
                    f"<title>boot {boot.number}: {secs:.3f} s</title></circle>"
                )
        body += [
            f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="{top + 4}" y2="{top + 40}"/>',
            f'<text x="{scale.x(found.max) + 8:.1f}" y="{top + 27}">{found.median:.3f} s</text>',
        ]
    return _svg(len(subjects) * _ROW + 24, body)


class _Scale:
    """Seconds to pixels, from 0 to a little beyond `longest`."""

    def __init__(self, longest: float) -> None:
        self._end = max(longest, 0.001) * 1.05
        self._step = next((step for step in _STEPS if self._end / step <= 8), _STEPS[-1])

    def x(self, secs: float) -> float:
        return _LABEL + secs / self._end * (_WIDTH - _LABEL - _RIGHT)

    def axis(self, height: int) -> str:
        return "".join(
            f'<line class="grid" x1="{self.x(at):.1f}" x2="{self.x(at):.1f}" y1="0" y2="{height}"/>'
            f'<text class="soft" x="{self.x(at):.1f}" y="{height + 18}" text-anchor="middle">{at:g} s</text>'
            for at in self._marks()
        )

    def _marks(self) -> Iterator[float]:
        count = 0
        while count * self._step <= self._end:
            yield round(count * self._step, 3)
            count += 1


def _svg(height: int, body: Sequence[str]) -> str:
    return f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(body)}</svg></div>'


def _short(name: str) -> str:
    tail = name.rstrip("/").rpartition("/")[2]
    return tail if len(tail) <= 20 else f"…{tail[-19:]}"


def _numbers(subjects: Sequence[Subject]) -> str:
    rows = [
        [_PHASE_WORDS[phase], _short(subject.name), str(found.count)]
        + [f"{value:.3f}" for value in (found.min, found.mean, found.median, found.p95, found.max)]
        for phase in (*PHASES, "http")
        for subject in subjects
        if (found := subject.phases.get(phase)) is not None
    ]
    return _table(["seconds", "bundle", "boots", "min", "mean", "median", "p95", "max"], rows)


def _compared(report: Report) -> str:
    rows = [
        [
            _PHASE_WORDS[phase],
            *("-" if value is None else f"{value:.3f}" for value in (found.ratio, found.low, found.high)),
        ]
        for phase, found in (report.comparison or {}).items()
    ]
    return _table(["", "ratio", "from (95 %)", "to"], rows)


def _boots(report: Report) -> str:
    rows = [
        [f"{boot.number}", boot.bundle]
        + [f"{boot.durations[phase]:.3f}" if phase in boot.durations else "-" for phase in PHASES]
        + ([] if boot.error is None else [boot.error])
        for boot in report.boots
    ]
    opened = " open" if report.failures() else ""
    return f"<details{opened}><summary>Every boot</summary>{_table(['boot', '', *PHASES], rows)}</details>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A cell beyond the head's is an error."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for row in rows:
        lines.append("".join(f"<td>{escape(cell)}</td>" for cell in row[: len(head)]))
        lines += [f'<td class="text bad" colspan="{len(head)}">{escape(cell)}</td>' for cell in row[len(head) :]]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>{body}</table></div>'
