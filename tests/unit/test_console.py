"""The console: what stdout and stderr get, byte for byte, in a log, under --json and on a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from vzrepro.base.errors import BuildFailed, VzreproError
from vzrepro.base.events import (
    Event,
    Finished,
    LogLine,
    Notice,
    Phase,
    Planned,
    Progress,
    Result,
    Started,
    Waiting,
)
from vzrepro.base.words import duration, size
from vzrepro.console import Console, Mode, clean

ROOT = Path(__file__).parents[2]
EPOCH = 1_767_225_600.0


class Clock:
    """Both clocks of a console, moved by hand."""

    def __init__(self) -> None:
        self.elapsed = 0.0

    def wall(self) -> float:
        return EPOCH + self.elapsed

    def monotonic(self) -> float:
        return self.elapsed


class Setup:
    """A console whose two streams are kept in memory."""

    def __init__(self, mode: Mode = "auto", *, verbose: bool = False, encoding: str = "utf-8") -> None:
        self.clock = Clock()
        self._out, self._err = io.BytesIO(), io.BytesIO()
        self.console = Console(
            mode,
            stdout=io.TextIOWrapper(self._out, encoding=encoding),
            stderr=io.TextIOWrapper(self._err, encoding=encoding),
            verbose=verbose,
            environ={"TERM": "xterm"},
            clock=self.clock.wall,
            monotonic=self.clock.monotonic,
        )

    def at(self, secs: float, event: Event) -> None:
        self.clock.elapsed = secs
        self.console.report(event)

    @property
    def out(self) -> str:
        return self._out.getvalue().decode()

    @property
    def err(self) -> str:
        return self._err.getvalue().decode()


def play(setup: Setup) -> None:
    """A little of everything."""
    setup.at(0, Planned({"build": 1, "fetch": 1, "copy": 0}, 146_000_000, 330))
    setup.at(0, Started("linux-source", "/nix/store/a-linux", "fetch", None, 146_000_000))
    for second in range(1, 26):
        setup.at(second, Progress("linux-source", "/nix/store/a-linux", second * 5_840_000, 146_000_000))
    setup.at(26, Finished("linux-source", "/nix/store/a-linux", "fetch", "fetched", 26, 146_000_000))
    setup.at(27, Waiting("kernel", "/nix/store/b-kernel", "process 77"))
    setup.at(30, Started("kernel", "/nix/store/b-kernel", "build", 300.4))
    for second in range(31, 100):
        setup.at(second, LogLine("kernel", "/nix/store/b-kernel", f"  CC      file{second}.o"))
    setup.at(330, Finished("kernel", "/nix/store/b-kernel", "build", "built", 300, 23_100_000))
    setup.at(331, Phase("agent answered", 12.3))
    setup.at(331, Notice("warning", "cache does not answer"))
    setup.at(332, Result("kernel", "/nix/store/b-kernel", "/ws/store/b-kernel"))


def test_a_log_gets_plain_lines_with_utc_times() -> None:
    setup = Setup()
    play(setup)
    assert setup.out == "/ws/store/b-kernel\n"
    assert setup.err == textwrap.dedent(
        """\
        2026-01-01T00:00:00Z plan 1 to build, 1 to fetch, 146 MB to download, about 5m30s
        2026-01-01T00:00:00Z fetch linux-source (146 MB)
        2026-01-01T00:00:10Z fetch linux-source 58.4 MB of 146 MB, 5.84 MB/s
        2026-01-01T00:00:20Z fetch linux-source 117 MB of 146 MB, 5.84 MB/s
        2026-01-01T00:00:26Z fetch linux-source fetched in 26s, 146 MB
        2026-01-01T00:00:27Z wait kernel: process 77 works on it
        2026-01-01T00:00:30Z build kernel (expected 5m00s)
        2026-01-01T00:01:30Z build kernel still runs, 1m00s of about 5m00s
        2026-01-01T00:05:30Z build kernel built in 5m00s, 23.1 MB
        2026-01-01T00:05:31Z boot agent answered after 12s
        2026-01-01T00:05:31Z warning: cache does not answer
        """
    )


def test_verbose_echoes_the_builders_lines_without_their_control_characters() -> None:
    setup = Setup(verbose=True)
    setup.at(1, LogLine("kernel", "/nix/store/b-kernel", "\x1b[31mred\x1b[0m \x1b]0;title\x07[bold]tëxt\r\x9b"))
    assert setup.err == "2026-01-01T00:00:01Z kernel> red [bold]tëxt\n"


def test_json_gives_every_event_as_one_line_on_stdout_and_nothing_else() -> None:
    setup = Setup("json")
    play(setup)
    setup.console.show_error(BuildFailed("kernel failed", reason="exit 2\nof make", hint="vzrepro log kernel"))
    lines = [json.loads(line) for line in setup.out.splitlines()]
    assert setup.err == ""
    assert len(lines) == 1 + 1 + 25 + 1 + 1 + 1 + 69 + 1 + 1 + 1 + 1 + 1
    assert lines[1] == {
        "event": "started",
        "time": "2026-01-01T00:00:00.000Z",
        "target": "linux-source",
        "path": "/nix/store/a-linux",
        "action": "fetch",
        "expected_secs": None,
        "total_bytes": 146_000_000,
        "worker": None,
    }
    assert lines[-2]["event"] == "result" and lines[-2]["location"] == "/ws/store/b-kernel"
    assert lines[-1] == {
        "event": "error",
        "time": "2026-01-01T00:05:32.000Z",
        "message": "kernel failed",
        "reason": "exit 2\nof make",
        "hint": "vzrepro log kernel",
        "exit_code": 100,
    }


def test_json_is_ascii_so_that_any_locale_can_carry_it() -> None:
    setup = Setup("json", encoding="ascii")
    setup.at(0, LogLine("kernel", "/nix/store/b-kernel", "tëxt\x1b[0m"))
    assert setup.out.isascii()
    assert json.loads(setup.out)["line"] == "tëxt\x1b[0m"


def test_an_error_says_what_why_and_what_to_do() -> None:
    setup = Setup()
    setup.console.show_error(VzreproError("it broke", reason="first\nsecond\x1b[2J", hint="run this"))
    assert setup.out == ""
    assert setup.err == "error: it broke\n  reason: first\n          second\n  hint: run this\n"


def test_an_encoding_without_the_character_gets_an_escape() -> None:
    setup = Setup(encoding="ascii")
    setup.at(0, Notice("info", "naïve"))
    assert setup.err == "2026-01-01T00:00:00Z note: na\\xefve\n"


def test_a_plan_without_work_says_so() -> None:
    setup = Setup()
    setup.at(0, Planned({"build": 0}, None, 0.0))
    assert setup.err == "2026-01-01T00:00:00Z plan nothing to do\n"


def test_a_failed_object_is_not_reported_as_done() -> None:
    setup = Setup()
    setup.at(0, Finished("kernel", "/nix/store/b-kernel", "build", "failed", 3))
    assert setup.err == "2026-01-01T00:00:00Z build kernel failed after 3.0s\n"


def test_rebuilds_of_one_object_are_told_apart() -> None:
    setup = Setup()
    path = "/nix/store/b-kernel"
    setup.at(0, Started("kernel", f"{path}#repeat", "audit", 60))
    setup.at(1, Started("kernel", f"{path}#host-name, round 2", "audit"))
    setup.at(62, LogLine("kernel", f"{path}#host-name, round 2", "CC main.o"))
    setup.at(63, Finished("kernel", f"{path}#repeat", "audit", "REPRODUCED", 63, 23_100_000))
    setup.at(64, Finished("kernel", f"{path}#host-name, round 2", "audit", "DIFFERS", 63, 23_100_000))
    setup.at(65, Finished("cache", "https://cache/#1", "check", "done", 1))
    assert [line.partition("Z ")[2] for line in setup.err.splitlines()] == [
        "audit kernel (repeat) (expected 1m00s)",
        "audit kernel (host-name, round 2)",
        "audit kernel (host-name, round 2) still runs, 1m01s",
        "audit kernel (repeat) REPRODUCED in 1m03s, 23.1 MB",
        "audit kernel (host-name, round 2) DIFFERS in 1m03s, 23.1 MB",
        "check cache done in 1.0s",
    ]


def test_tables_are_aligned_and_numbers_go_right() -> None:
    setup = Setup()
    setup.console.print_table(("target", "bytes", "path"), [("kernel", 5, None), ("initramfs-x", 1200, "/p")])
    assert setup.out == "target       bytes  path\nkernel           5  -\ninitramfs-x   1200  /p\n"


def test_tables_and_texts_are_objects_under_json() -> None:
    setup = Setup("json")
    setup.console.print_table(("target", "bytes"), [("kernel", None)])
    setup.console.print_text("plain\n")
    setup.console.print_text("shown to people", {"key": 1})
    assert [json.loads(line) for line in setup.out.splitlines()] == [
        {"target": "kernel", "bytes": None},
        {"text": "plain\n"},
        {"key": 1},
    ]


def test_an_empty_table_keeps_its_heading() -> None:
    setup = Setup()
    setup.console.print_table(("target", "bytes"), [])
    assert setup.out == "target  bytes\n"


@pytest.mark.parametrize(
    ("secs", "text"),
    [
        (0, "0ms"),
        (0.0456, "46ms"),
        (0.0994, "99ms"),
        (0.0996, "0.1s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (123, "2m03s"),
        (3599.6, "1h00m"),
        (100_000, "27h46m"),
    ],
)
def test_duration(secs: float, text: str) -> None:
    assert duration(secs) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_600, "1.00 MB"),
        (146_000_000, "146 MB"),
        (2_500_000_000_000, "2.50 TB"),
        (12_345_000_000_000_000, "12345 TB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b[31mall is well\x1b[0m\x9b5m \x1b]52;c;unfinished"


def test_answers_cannot_drive_a_terminal() -> None:
    """Whoever their text is by: caches, builders, images."""
    setup = Setup()
    setup.console.print_text(f"{HOSTILE}\nthe next line")
    setup.console.print_table(("name", HOSTILE), [(HOSTILE, 1), ("other", 2)])
    printed = setup.out
    assert printed.splitlines()[:2] == ["all is well5m ", "the next line"]
    assert all(line.isprintable() for line in printed.splitlines())
    assert printed.count("all is well") == 3


def test_clean_keeps_tabs_and_umlauts() -> None:
    assert clean("a\tä\x1b[1;31mb\x1b(Bc\x07\x00") == "a\täbc"


def test_threads_never_mix_their_lines() -> None:
    setup = Setup("json")

    def report(number: int) -> None:
        for i in range(200):
            setup.console.report(LogLine(f"t{number}", "/nix/store/p", f"{i} " + "x" * 100))

    threads = [threading.Thread(target=report, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in setup.out.splitlines()]
    assert len(lines) == 1600
    for number in range(8):
        own = [line["line"].split()[0] for line in lines if line["target"] == f"t{number}"]
        assert own == [str(i) for i in range(200)]


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_result_that_could_not_be_written_is_an_error_in_the_end() -> None:
    console = Console(stdout=Full(), stderr=io.StringIO(), environ={})
    console.report(Result("kernel", "/nix/store/b-kernel", "/ws/store/b-kernel"))
    with pytest.raises(VzreproError, match="standard output could not be written"):
        console.close()


def test_a_lost_log_stops_nothing() -> None:
    out = io.StringIO()
    with Console(stdout=out, stderr=Full(), environ={}) as console:
        console.report(Notice("info", "hello"))
        console.print_text("answer")
    assert out.getvalue() == "answer\n"


def script(*parts: str) -> list[str]:
    """The command line of a Python program, given in parts that are indented each on its own."""
    head = """\
        import sys, os, time, threading
        from vzrepro.console import Console
        from vzrepro.base.errors import *
        from vzrepro.base.events import *
        """
    return [sys.executable, "-c", "".join(textwrap.dedent(part) for part in (head, *parts))]


def test_a_closed_pipe_ends_quietly() -> None:
    body = """\
        with Console(stdout=sys.stdout, stderr=sys.stderr) as console:
            sys.stdin.readline()
            for i in range(100_000):
                console.print_text("line")
        """
    child = subprocess.Popen(
        script(body), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert child.stdin and child.stdout and child.stderr
    child.stdout.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 0


def test_rich_is_not_imported_before_something_is_drawn() -> None:
    body = """\
        with Console(stdout=sys.stdout, stderr=sys.stderr) as console:
            console.report(Started("kernel", "/nix/store/b-kernel", "build"))
            console.print_table(("a",), [("b",)])
        print([name for name in sys.modules if name.split(".")[0] == "rich"])
        """
    done = subprocess.run(script(body), capture_output=True, check=True, cwd=ROOT, text=True)
    assert done.stdout == "a\nb\n[]\n"


class Terminal:
    """A program on a pseudo-terminal of its own; `stdout` is a pipe, the rest is the terminal."""

    def __init__(self, *parts: str, columns: int = 80, rows: int = 24, **environ: str) -> None:
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        env = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "PYTHONUTF8": "1"} | environ
        self._child = subprocess.Popen(
            script(*parts), stdin=slave, stdout=subprocess.PIPE, stderr=slave, cwd=ROOT, env=env, start_new_session=True
        )
        os.close(slave)
        self.screen = b""

    def resize(self, columns: int, rows: int) -> None:
        ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, wanted: bytes) -> None:
        """Read until `wanted` was shown. Fails when the program ends without it."""
        deadline = time.monotonic() + PATIENCE_SECS
        while wanted not in self.screen:
            assert time.monotonic() < deadline, f"{wanted!r} was not shown: {self.screen[-2000:]!r}"
            assert self._read(), f"{wanted!r} was never shown: {self.screen!r}"

    def type(self, data: bytes) -> None:
        os.write(self._master, data)

    def signal(self, number: int) -> None:
        self._child.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Wait for the program; its exit status and stdout."""
        while self._read():
            pass
        assert self._child.stdout
        out = self._child.stdout.read().decode()
        self._child.stdout.close()
        status = self._child.wait()
        os.close(self._master)
        return status, out

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._master], [], [], 30)
        assert ready, f"nothing happened for 30 s after {self.screen!r}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's way to say that the last process has closed the terminal
            return b""
        self.screen += data
        return data


HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"

DRAWING = """\
    console = Console(stdout=sys.stdout, stderr=sys.stderr)
    console.report(Planned({"fetch": 1, "build": 2}, 1000, None))
    console.report(Started("kernel", "/nix/store/b-kernel", "build", 300.0))
    console.report(LogLine("kernel", "/nix/store/b-kernel", "  CC drivers/[net]/tun.o"))
    console.report(Started("linux-source", "/nix/store/a-linux", "fetch", None, 2_000_000))
    console.report(Progress("linux-source", "/nix/store/a-linux", 1_000_000, 2_000_000))
    """


@pytest.fixture
def ending() -> Iterator[list[Terminal]]:
    """Terminals to kill when a test fails half-way."""
    terminals: list[Terminal] = []
    yield terminals
    for terminal in terminals:
        if terminal._child.poll() is None:
            terminal._child.kill()
            terminal._child.wait()


def test_a_terminal_shows_what_runs_and_gets_its_cursor_back(ending: list[Terminal]) -> None:
    terminal = Terminal(
        DRAWING,
        """\
    sys.stdin.readline()
    console.report(Finished("linux-source", "/nix/store/a-linux", "fetch", "fetched", 2.0, 5000))
    console.report(Finished("kernel", "/nix/store/b-kernel", "build", "built", 3.0, 6000))
    console.report(Result("kernel", "/nix/store/b-kernel", "/ws/store/b-kernel"))
    console.close()
    """,
    )
    ending.append(terminal)
    for shown in (
        b"plan",
        b"of about 5m00s",
        b"CC drivers/[net]/tun.o",
        "━".encode(),
        b"1.00 MB of 2.00 MB",
        b"0 of 3 done",
    ):
        terminal.until(shown)
    assert terminal.screen.count(HIDE) == 1
    assert SHOW not in terminal.screen
    terminal.type(b"\n")
    status, out = terminal.end()
    assert (status, out) == (0, "/ws/store/b-kernel\n")
    assert terminal.screen.rindex(SHOW) > terminal.screen.rindex(HIDE)
    assert b"linux-source fetched in 2.0s, 5.00 kB\r\n" in terminal.screen


@pytest.mark.parametrize("sent", [2, 15])
def test_an_interrupted_program_gives_the_cursor_back(ending: list[Terminal], sent: int) -> None:
    terminal = Terminal(
        """\
    import signal
    def stop(*_): raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)  # what a shell starts in its background ignores it
    """,
        DRAWING,
        "time.sleep(60)\n",  # nothing closes the console: leaving the interpreter has to
    )
    ending.append(terminal)
    terminal.until(b"0 of 3 done")
    terminal.signal(sent)
    status, _ = terminal.end()
    assert status != 0
    assert terminal.screen.rindex(SHOW) > terminal.screen.rindex(HIDE)


def test_a_low_narrow_terminal_gets_rows_that_fit(ending: list[Terminal]) -> None:
    terminal = Terminal(
        """\
    console = Console(stdout=sys.stdout, stderr=sys.stderr)
    for i in range(20):
        console.report(Started(f"a-target-with-a-long-name-{i}", f"/nix/store/{i}", "build", 300.0))
    sys.stdin.readline()
    console.close()
    """,
        columns=30,
        rows=10,
    )
    ending.append(terminal)
    terminal.until(b"and 14 more")
    terminal.type(b"\n")
    assert terminal.end()[0] == 0
    text = clean(terminal.screen.decode())
    assert all(len(line.rpartition("\r")[2]) <= 30 for line in text.split("\n"))


def test_a_resized_terminal_is_drawn_at_its_new_width(ending: list[Terminal]) -> None:
    terminal = Terminal(DRAWING, "sys.stdin.readline()\nconsole.close()\n", columns=100)
    ending.append(terminal)
    terminal.until(b"1.00 MB of 2.00 MB")
    terminal.screen = b""
    terminal.resize(34, 24)
    terminal.until("1.00 MB…".encode())
    terminal.type(b"\n")
    assert terminal.end()[0] == 0


def test_an_ascii_locale_gets_ascii(ending: list[Terminal]) -> None:
    ending_part = "sys.stdin.readline()\nconsole.close()\n"
    terminal = Terminal(DRAWING, ending_part, PYTHONUTF8="0", PYTHONIOENCODING="ascii", NO_COLOR="1")
    ending.append(terminal)
    terminal.until(b"1.00 MB of 2.00 MB")
    terminal.until(b"#")
    terminal.type(b"\n")
    assert terminal.end()[0] == 0
    assert terminal.screen.isascii()
    assert b"\\u" not in terminal.screen
    assert b"\x1b[3" not in terminal.screen, "NO_COLOR"


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_a_dumb_terminal_and_plain_mode_get_lines(ending: list[Terminal], mode: str) -> None:
    set_mode = f"import functools\nConsole = functools.partial(Console, {mode!r})\n"
    terminal = Terminal(set_mode, DRAWING, "console.close()\n", TERM="dumb" if mode == "auto" else "xterm")
    ending.append(terminal)
    assert terminal.end()[0] == 0
    assert HIDE not in terminal.screen
    assert b"build" in terminal.screen and b"kernel (expected 5m00s)\r\n" in terminal.screen


def test_threads_share_the_display(ending: list[Terminal]) -> None:
    terminal = Terminal(
        """\
    console = Console(stdout=sys.stdout, stderr=sys.stderr)
    def work(n):
        for i in range(50):
            path = f"/nix/store/{n}-{i}"
            console.report(Started(f"t{n}", path, "build"))
            console.report(LogLine(f"t{n}", path, "line"))
            console.report(Finished(f"t{n}", path, "build", f"built-{i}-{n}-", 1.0))
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    console.close()
    """,
        columns=200,
    )
    ending.append(terminal)
    assert terminal.end()[0] == 0
    for n in range(4):
        for i in range(50):
            assert terminal.screen.count(f"t{n} built-{i}-{n}- in 1.0s".encode()) == 1
    assert terminal.screen.count(HIDE) == terminal.screen.count(SHOW)


def test_a_log_says_that_silent_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that writes nothing for minutes: the ticker, here a fast one, looks after it and ends with it."""
    monkeypatch.setattr("vzrepro.console._ALIVE_SECS", 0.04)
    setup = Setup()
    setup.at(0, Started("kernel", "/nix/store/b-kernel", "build", 300.0))
    setup.clock.elapsed = 75
    deadline = time.monotonic() + PATIENCE_SECS
    while "still runs" not in setup.err and time.monotonic() < deadline:
        time.sleep(0.005)
    assert setup.err.splitlines()[-1] == "2026-01-01T00:01:15Z build kernel still runs, 1m15s of about 5m00s"
    time.sleep(0.1)
    assert setup.err.count("still runs") == 1
    ticker = setup.console._ticker
    assert ticker is not None
    setup.at(76, Finished("kernel", "/nix/store/b-kernel", "build", "built", 76, 1))
    ticker.join(PATIENCE_SECS)
    assert not ticker.is_alive()
