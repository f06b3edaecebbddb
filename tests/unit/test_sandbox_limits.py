"""The limits of a build: its log, its time, its place on the disk."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from vzrepro import sandbox
from vzrepro.base.errors import BuildFailed, Interrupted, TimedOut, VzreproError
from vzrepro.sandbox import running, staging
from vzrepro.sandbox.log import Log


@pytest.fixture
def job(tmp_path: Path) -> sandbox.Job:
    made = sandbox.Job(
        label="job",
        image="sha256:" + "0" * 64,
        command=("true",),
        scratch=tmp_path,
        log=tmp_path / "log",
        source_date_epoch=0,
        cores=1,
        disk_bytes=1 << 20,
    )
    made.build.mkdir()
    made.out.mkdir()
    return made


def lines(first: int, last: int) -> bytes:
    return b"".join(b"line %06d\n" % number for number in range(first, last))


def test_a_short_log_is_whole(tmp_path: Path) -> None:
    with Log(tmp_path / "log", head=100, tail=100) as log:
        log.write(lines(0, 10))
        log.write(lines(10, 25))
    assert (tmp_path / "log").read_bytes() == lines(0, 25)


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_long_log_has_its_beginning_and_its_end(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "log"
    with Log(path, head=120, tail=240) as log:
        for number in range(0, 10_000, piece):
            log.write(lines(number, min(10_000, number + piece)))
            assert path.stat().st_size <= 120 + 2 * 240 + 100 + 12 * piece
    kept = path.read_bytes().splitlines(keepends=True)
    at = next(number for number, line in enumerate(kept) if line.startswith(b"[vzrepro: "))
    left_out = int(kept[at].split()[1])
    assert b"".join(kept[:at]) == lines(0, at) and at == 10
    rest = b"".join(kept[at + 1 :])
    assert rest == lines(10_000 - len(kept) + at + 1, 10_000) and len(rest) >= 240 - 12
    assert left_out == 12 * 10_000 - 120 - len(rest)


def test_a_log_without_line_ends_is_cut_as_well(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Log(path, head=100, tail=100) as log:
        for _ in range(1000):
            log.write(b"x" * 50)
    data = path.read_bytes()
    assert len(data) < 400 and data.startswith(b"x" * 100 + b"\n[vzrepro: ") and data.endswith(b"x" * 100)


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    with (
        Log(Path("/dev/full")) if Path("/dev/full").exists() else pytest.skip("no /dev/full") as log,
        pytest.raises(VzreproError, match="/dev/full cannot be written"),
    ):
        log.write(b"x")


def test_the_time_limit_and_the_stop_hold_while_the_result_is_read(job: sandbox.Job) -> None:
    stop = threading.Event()
    running.RunLimits(job, stop).check()
    with pytest.raises(TimedOut, match="its time limit of 0 s"):
        running.RunLimits(replace(job, timeout_secs=0), stop).check()
    stop.set()
    with pytest.raises(Interrupted):
        running.RunLimits(job, stop).check()


def test_a_result_that_is_too_large_is_a_failed_build(job: sandbox.Job) -> None:
    limits = running.RunLimits(job, None)
    limits.check(1 << 20)
    with pytest.raises(BuildFailed, match="what it leaves in /out is larger than its limit") as caught:
        limits.check((1 << 20) + 1)
    assert caught.value.hint is not None and "disk_gib" in caught.value.hint


def test_build_and_out_count_together(job: sandbox.Job) -> None:
    limits = running.RunLimits(job, None)
    (job.build / "half").write_bytes(os.urandom(600_000))
    limits.check_disk()
    (job.out / "half").write_bytes(os.urandom(600_000))
    with pytest.raises(BuildFailed, match="in /build and /out takes more than its limit"):
        limits.check_disk(at_end=True)


def test_nothing_is_counted_while_the_disk_has_lost_too_little(
    job: sandbox.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, free, counted = 0.0, 10 << 20, 0

    def usage(*_: object) -> int:
        nonlocal counted
        counted += 1
        return 0

    monkeypatch.setattr(running.time, "monotonic", lambda: now)
    monkeypatch.setattr(staging, "_free", lambda _: free)
    monkeypatch.setattr(staging.disk, "usage", usage)
    limits = running.RunLimits(job, None)
    limits.check_disk()
    assert counted == 2, "/build and /out"
    now, free = 10.0, free - (1 << 19)
    limits.check_disk()
    assert counted == 2, "half of the limit at most"
    now, free = 20.0, free - (1 << 19)
    limits.check_disk()
    assert counted == 4, "the limit may have been reached"
    now, free = 60.0, 20 << 20
    limits.check_disk()
    assert counted == 6, "others gave something back"
