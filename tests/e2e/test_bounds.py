"""What a builder, or a recipe, cannot do: take more time, disk or log than it may, or confuse what comes after it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Cli, containers

RECIPES = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, text

SCRIPT = text("odd", '''
import os, sys, time
def deep(top):
    os.chdir(top)
    for _ in range(5000):
        os.mkdir("d")
        os.chdir("d")
def hole(size):
    with open("/out/hole", "wb") as file:
        file.truncate(size)
exec(sys.argv[1])
''')

def odd(name, script, **limits):
    build(name, image=TOOLS_IMAGE, inputs={"odd": SCRIPT}, command=["python3", "/in/odd", script], **limits)

odd("deep-build", "open('/out/ok', 'w'); deep('/build')")
odd("deep-out", "deep('/out')")
odd("hole", "hole(1 << 28)")
odd("huge-hole", "hole(1 << 40)")
odd("huge-hole-in-time", "hole(1 << 40)", timeout_secs=3)
odd("greedy", "os.posix_fallocate(os.open('/build/f', os.O_RDWR | os.O_CREAT), 0, 3 << 29); time.sleep(600)")
odd("modest", "time.sleep(0)", disk_gib=1)
odd("talker", "[print('%0999d' % number) for number in range(70_000)]; open('/out/ok', 'w')")
LOW = build("low", image=TOOLS_IMAGE, inputs={}, command=["sh", "-c", "echo low > /out/low"])
build("high", image=TOOLS_IMAGE, inputs={"low": LOW}, command=["sh", "-c", "sleep 600"])
"""


@pytest.fixture
def odd(small: Cli) -> Iterator[Cli]:
    small.write(small=RECIPES)
    yield small
    assert containers(small) == []
    assert [path.name for path in (small.store / ".vzrepro" / "tmp").iterdir() if path.suffix != ".kept"] == []


def test_deep_trees(odd: Cli) -> None:
    (made,) = odd.realize("deep-build")
    assert [path.name for path in made.iterdir()] == ["ok"]
    other = Cli(odd.root, odd.store.with_name("other"), odd.env)
    assert other.realize("deep-build") == [other.store / made.name]
    assert "substitute" in other.run("store", "info", "deep-build").stdout
    error = odd.run("realize", "deep-out", code=1).stderr
    assert "is nested too deeply" in error and "a store object may nest 200 directories" in error


def test_holes_stay_holes(odd: Cli) -> None:
    (made,) = odd.realize("hole")
    status = (made / "hole").stat()
    assert status.st_size == 1 << 28 and status.st_blocks * 512 < 1 << 20


def test_the_time_limit_reaches_the_copy(odd: Cli) -> None:
    assert "took longer than its time limit of 3 s" in odd.run("realize", "huge-hole-in-time", code=101).stderr


def test_an_interrupt_reaches_the_copy(odd: Cli) -> None:
    with odd.start("realize", "huge-hole") as process:
        while not list(odd.store.glob(".vzrepro/tmp/*/canonical")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_the_disk_has_a_limit(odd: Cli) -> None:
    odd.env["VZREPRO_DISK_GIB"] = "1"
    error = odd.run("realize", "huge-hole", code=100).stderr
    assert "what it leaves in /out is larger than its limit of 1 GiB" in error
    error = odd.run("realize", "greedy", code=100).stderr
    assert "what it has in /build and /out takes more than its limit of 1 GiB" in error
    odd.realize("modest")


def test_a_log_has_a_limit(odd: Cli) -> None:
    (made,) = odd.realize("talker")
    assert (odd.store / ".vzrepro" / "log" / f"{made.name}.log").stat().st_size < 49 << 20
    lines = odd.run("log", "talker").stdout.splitlines()
    assert (int(lines[0]), int(lines[-1])) == (0, 69_999)
    (note,) = [line for line in lines if not line.isdecimal()]
    left_out = int(note.removeprefix("[vzrepro: ").removesuffix(" bytes of the log are left out here]"))
    assert 1000 * (len(lines) - 1) + left_out == 70_000_000


def test_inputs_of_a_build_are_sound(odd: Cli) -> None:
    (low,) = odd.realize("low")
    with odd.start("realize", "high") as process:
        while (low / "low").stat().st_nlink == 1 or not containers(odd):
            assert process.poll() is None
            time.sleep(0.01)
        odd.run("store", "verify")
        process.kill()
    assert (low / "low").stat().st_nlink == 2
    odd.run("store", "verify")
    assert "build" not in odd.run("store", "repair").stderr
    odd.realize("modest")  # whose run removes what is left
    assert (low / "low").stat().st_nlink == 1


def test_a_recipe_that_exits(odd: Cli) -> None:
    (odd.root / "recipes" / "quitter.py").write_text("exit()\n")
    for words in (["realize", "modest"], ["lock", "--check"], ["targets"]):
        error = odd.run(*words, code=2).stderr
        assert "recipes/quitter.py:1: SystemExit: a recipe may not end the evaluation" in error
