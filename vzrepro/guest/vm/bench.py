"""Measures boots: boots a bundle again and again, takes its phases apart, and compares two bundles boot by boot."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vzrepro.base import events
from vzrepro.base.errors import VzreproError
from vzrepro.base.words import plural
from vzrepro.guest.vm import boot, qemu
from vzrepro.guest.vm.agent import AgentClient

PHASES = ("kernel", "init", "agent", "exec", "total")
"""What a boot consists of, in order: QEMU's start to `/init` · to the agent's start · to the agent listening · to the
answer of a first command · all of these together."""

_RESAMPLES = 2_000
_CONFIDENCE = 0.95
_COMMAND_SECS = 60.0
_BUSYBOX = "/bin/busybox"  # in every guest, whatever its root file system (docs/guest.md)
_KERNEL_LINES = 120
_FETCH_SECS = str(int(_COMMAND_SECS))

# $0 is the guest's busybox, of which wget is a link unless the image has one of its own. Waits up to 30 s for a default
# route, then prints the program of the image that fetches URLs, if there is one.
_FIND_FETCHER = """
tries=0
until "$0" grep -q '^[^[:blank:]]*[[:blank:]]00000000[[:blank:]]' /proc/net/route || [ $tries = 300 ]; do
    "$0" sleep 0.1
    tries=$((tries + 1))
done
IFS=:
for tool in wget curl; do
    for directory in $PATH; do
        path=$directory/$tool
        [ -x "$path" ] || continue
        case $("$0" readlink -f "$path") in
            */busybox) ;;
            *) echo "$path" && exit ;;
        esac
    done
done
"""

Label = Literal["a", "b"]
Secs = Annotated[float, Field(ge=0)]

_LABELS: tuple[Label, ...] = ("a", "b")


class _Record(BaseModel):
    """A part of the report: its fields and their descriptions are the schema of `vm bench --json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Distribution(_Record):
    """How long something took, in seconds."""

    count: int = Field(ge=1, description="boots that were measured")
    min: Secs
    mean: Secs
    median: Secs
    p95: Secs = Field(description="95th percentile, interpolated between neighbours")
    max: Secs


class Boot(_Record):
    """One boot. Times are in seconds."""

    bundle: Label = Field(description="which of the bundles")
    number: int = Field(ge=1, description="position in the run, over all bundles")
    durations: dict[str, Secs] = Field(description="phase to duration, as far as the boot came")
    http: Secs | None = Field(description="how long the guest's request took; null when none was asked for")
    error: str | None = Field(description="why the boot failed; null when it did not")


class BenchedBundle(_Record):
    """One of the measured bundles."""

    label: Label
    name: str = Field(description="the target or directory, as it was named")
    kernel_bytes: int = Field(ge=0)
    initramfs_bytes: int = Field(ge=0)
    failed: int = Field(ge=0, description="boots that failed; they are in no distribution")
    phases: dict[str, Distribution] = Field(description="phase, `total` or `http` to its distribution")


class Ratio(_Record):
    """Median of b over median of a, with the bootstrap's 95 % confidence interval; null where a phase takes no time."""

    ratio: float | None
    low: float | None
    high: float | None


class BenchReport(_Record):
    """What `vm bench` measured."""

    format: Literal[1] = 1
    started: str = Field(description="RFC 3339, UTC")
    host: str = Field(description="the machine: cores, load before the run, accelerator")
    iterations: int = Field(ge=1, description="boots asked for, per bundle")
    timeout_secs: float
    bundles: tuple[BenchedBundle, ...]
    comparison: dict[str, Ratio] | None = Field(description="phase or `image_bytes` to ratio; null for one bundle")
    boots: tuple[Boot, ...] = Field(description="in the order they ran; two bundles take turns")

    def failures(self) -> int:
        """How many boots failed."""
        return sum(subject.failed for subject in self.bundles)


@dataclass(frozen=True, slots=True)
class Options:
    """How boots are measured. `timeout_secs` is the limit from QEMU's start to the agent listening.

    `kernel_logs` shows the last lines of each guest's kernel log, `log_command` what a shell command prints in it, both
    once the boot is measured. `smoke_url` is fetched by the guest. The console of boot 1 of the first bundle is written
    to `0001-a.log` in `console_directory`. While an agent is awaited, `waiting_every_secs` says how often to say so (0:
    never).
    """

    iterations: int
    timeout_secs: float
    kernel_logs: bool = False
    log_command: str | None = None
    smoke_url: str | None = None
    console_directory: Path | None = None
    waiting_every_secs: float = 0


def measure(
    guests: Sequence[tuple[str, qemu.Guest]],
    programs: boot.HostPrograms,
    options: Options,
    report: events.Report = events.ignore,
) -> BenchReport:
    """Boot one or two guests, given with their names, `options.iterations` times each, in turns that swap in each
    round, so that a load which comes and goes meets both.

    A boot that fails is counted, not raised; what makes every boot impossible (no QEMU) raises VzreproError.
    """
    started = dt.datetime.now(dt.UTC)
    host = f"{plural(os.cpu_count() or 1, 'core')} ({platform.machine()}), load {os.getloadavg()[0]:.1f} before the run"
    host += f", {qemu.accelerator(qemu.find_qemu(programs.qemu))}"
    labelled = list(zip(_LABELS, guests, strict=False))
    boots: list[Boot] = []
    for round_number in range(options.iterations):
        for label, (name, guest) in labelled if round_number % 2 == 0 else labelled[::-1]:
            of_all = options.iterations * len(labelled)
            number = len(boots) + 1
            with console(options, f"{round_number + 1:04}-{label}.log", number, report) as on_console:
                one = _one(label, number, guest, programs, options, report, on_console)
            boots.append(one)
            said = one.error.splitlines()[0] if one.error is not None else f"{one.durations['total']:.2f} s"
            level: Literal["warning", "info"] = "info" if one.error is None else "warning"
            report(events.Notice(level, f"boot {one.number} of {of_all}, {name}: {said}"))
    subjects = tuple(_subject(label, name, guest, boots) for label, (name, guest) in labelled)
    return BenchReport(
        started=started.strftime("%Y-%m-%dT%H:%M:%SZ"),
        host=host,
        iterations=options.iterations,
        timeout_secs=options.timeout_secs,
        bundles=subjects,
        comparison=_compare(subjects, boots) if len(subjects) == 2 else None,
        boots=tuple(boots),
    )


def _one(
    label: Label,
    number: int,
    guest: qemu.Guest,
    programs: boot.HostPrograms,
    options: Options,
    report: events.Report,
    on_console: Callable[[str], object],
) -> Boot:
    reached: dict[str, float] = {}
    http: float | None = None
    error: str | None = None

    def note(event: events.Event) -> None:
        if isinstance(event, events.Phase):
            reached[event.name] = event.secs

    try:
        with contextlib.ExitStack() as stack:
            ready = stack.enter_context(_saying(options.waiting_every_secs, number, report))
            vm = stack.enter_context(
                boot.running(
                    guest,
                    programs=programs,
                    timeout_secs=options.timeout_secs,
                    report=note,
                    on_console=on_console,
                )
            )
            ready()
            _command(vm.agent, _BUSYBOX, ["true"])
            vm.reached("exec")
            try:
                if options.smoke_url is not None:
                    http = _fetch(vm.agent, options.smoke_url)
            finally:
                _show_logs(vm.agent, number, options, report)
            vm.power_off()
    except VzreproError as problem:
        error = problem.message if problem.reason is None else f"{problem.message}\n{problem.reason}"
    return Boot(bundle=label, number=number, durations=durations(reached), http=http, error=error)


@contextlib.contextmanager
def _saying(every_secs: float, number: int, report: events.Report) -> Iterator[Callable[[], None]]:
    """Say every so often that a guest is still awaited, until what this yields is called or the context ends."""
    done = threading.Event()
    started = time.monotonic()

    def say() -> None:
        while not done.wait(every_secs):
            report(events.Notice("info", f"boot {number}: still waiting after {time.monotonic() - started:.0f} s"))

    if every_secs:
        threading.Thread(target=say, daemon=True).start()
    try:
        yield done.set
    finally:
        done.set()


@contextlib.contextmanager
def console(options: Options, name: str, number: int, report: events.Report) -> Iterator[Callable[[str], object]]:
    """What writes each line of a console to its file, if it is to be kept. A disk that takes no more is told once."""
    if options.console_directory is None:
        yield lambda _line: None
        return
    path = options.console_directory / name
    failed = False

    def write(line: str) -> None:
        nonlocal failed
        try:
            if not failed:
                file.write(f"{line}\n".encode())
        except OSError as error:
            failed = True
            report(
                events.Notice("warning", f"boot {number}: its console could not be written to {path}: {error.strerror}")
            )

    with path.open("wb", buffering=0) as file:
        yield write


def _show_logs(agent: AgentClient, number: int, options: Options, report: events.Report) -> None:
    """Report what the options want to see of a guest. What cannot be had is reported, too: the boot is measured."""

    def show(what: str, command: str, arguments: Sequence[str]) -> None:
        code, output = 0, ""
        try:
            code, output = _run(agent, command, arguments)
        except VzreproError as error:
            report(events.Notice("warning", f"boot {number}: {what} could not be had: {error.in_a_line}"))
        for line in output.splitlines():
            report(events.Notice("info", f"guest {number}> {line}"))
        if code:
            report(events.Notice("warning", f"boot {number}: {what} ended with exit code {code}"))

    if options.kernel_logs:
        show("the kernel log", _BUSYBOX, ["sh", "-c", f'"$0" dmesg | "$0" tail -n {_KERNEL_LINES}', _BUSYBOX])
    if options.log_command is not None:
        # The image's shell, if it has one.
        words = ["sh", "-c", '[ -x /bin/sh ] && exec /bin/sh -c "$1" || exec "$0" sh -c "$1"', _BUSYBOX]
        show("the guest log command", _BUSYBOX, [*words, options.log_command])


def _fetch(agent: AgentClient, url: str) -> float:
    """Have the guest fetch `url`; the seconds its request took. Its network comes after its agent, and is awaited."""
    path = _command(agent, _BUSYBOX, ["sh", "-c", _FIND_FETCHER, _BUSYBOX]).strip()
    if path.endswith("curl"):
        words = [path, "-sSfL", "-o", "/dev/null", "-m", _FETCH_SECS]
    elif path:
        words = [path, "-nv", "-O", "/dev/null", "-t", "1", "-T", _FETCH_SECS]
    else:
        words = [_BUSYBOX, "wget", "-q", "-O", "/dev/null", "-T", _FETCH_SECS]
    begun = time.monotonic()
    _command(agent, words[0], [*words[1:], url])
    return time.monotonic() - begun


def _command(agent: AgentClient, command: str, arguments: Sequence[str]) -> str:
    """Run a command in the guest; its output. Raises VzreproError when it fails."""
    code, output = _run(agent, command, arguments)
    if code:
        raise VzreproError(
            f"{' '.join([command, *arguments])} ended with exit code {code} in the guest",
            reason=output.strip() or None,
        )
    return output


def _run(agent: AgentClient, command: str, arguments: Sequence[str]) -> tuple[int, str]:
    """A command's exit code and output, both streams. Raises AgentError, VzreproError."""
    with agent.exec(command, arguments, timeout_secs=_COMMAND_SECS) as execution:
        ended = execution.finish()
    if ended.code is None:
        raise VzreproError(f"{command} could not be run in the guest", reason=ended.error)
    return ended.code, ended.said.decode("utf-8", "replace")


def durations(reached: dict[str, float]) -> dict[str, float]:
    """Phase → seconds it took, from what was reached when (`init`, `agent`, `ready`, `exec`, since QEMU's start)."""
    found: dict[str, float] = {}
    previous = 0.0
    for phase, mark in zip(PHASES, ("init", "agent", "ready", "exec"), strict=False):
        if mark not in reached:
            return found
        found[phase] = round(reached[mark] - previous, 6)
        previous = reached[mark]
    return {**found, "total": round(previous, 6)}


def distribution(values: Sequence[float]) -> Distribution:
    """The distribution of at least one value."""
    p95 = statistics.quantiles(values, n=20, method="inclusive")[18] if len(values) > 1 else values[0]
    return Distribution(
        count=len(values),
        min=min(values),
        mean=round(statistics.fmean(values), 6),
        median=round(statistics.median(values), 6),
        p95=round(p95, 6),
        max=max(values),
    )


def ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """Median of `b` over median of `a`, at least one value each; the interval comes from resampling both, with a fixed
    seed so that the same boots give the same interval."""
    if not statistics.median(a):
        return Ratio(ratio=None, low=None, high=None)
    chance = random.Random(0)
    found = []
    for _ in range(_RESAMPLES):
        if below := statistics.median(chance.choices(a, k=len(a))):
            found.append(statistics.median(chance.choices(b, k=len(b))) / below)
    found.sort()
    tail = round((1 - _CONFIDENCE) / 2 * len(found))
    return Ratio(
        ratio=round(statistics.median(b) / statistics.median(a), 4),
        low=round(found[tail], 4),
        high=round(found[-1 - tail], 4),
    )


def _values(label: str, boots: Sequence[Boot]) -> dict[str, list[float]]:
    good = [boot for boot in boots if boot.bundle == label and boot.error is None]
    values = {phase: [boot.durations[phase] for boot in good] for phase in PHASES}
    values["http"] = [boot.http for boot in good if boot.http is not None]
    return {phase: found for phase, found in values.items() if found}


def _subject(label: Label, name: str, guest: qemu.Guest, boots: Sequence[Boot]) -> BenchedBundle:
    return BenchedBundle(
        label=label,
        name=name,
        kernel_bytes=guest.kernel.stat().st_size,
        initramfs_bytes=guest.initramfs.stat().st_size,
        failed=sum(boot.bundle == label and boot.error is not None for boot in boots),
        phases={phase: distribution(values) for phase, values in _values(label, boots).items()},
    )


def _compare(subjects: Sequence[BenchedBundle], boots: Sequence[Boot]) -> dict[str, Ratio]:
    a, b = (_values(subject.label, boots) for subject in subjects)
    size = [subject.kernel_bytes + subject.initramfs_bytes for subject in subjects]
    exact = round(size[1] / size[0], 4)
    compared = {phase: ratio(a[phase], b[phase]) for phase in a if phase in b}
    return {**compared, "image_bytes": Ratio(ratio=exact, low=exact, high=exact)}
