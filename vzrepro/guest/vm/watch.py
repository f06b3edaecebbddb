"""What is known of a guest from outside: the last lines of its console, the phases it reached, and how it ended.

Other threads tell (`console`, `line`, `is_ready`, `ended`), one waits. What the guest's `init` prints is part of the
contract (docs/guest.md): its lines mark the phases.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vzrepro.base import events
from vzrepro.base.errors import TimedOut, VzreproError

TAIL_LINES = 30
"""How much of the guest's console an error shows; of a panic more, so that its trace is whole."""
_PANIC_LINES = 100

_INIT_LINE = "vz-init: start"
_AGENT_LINE = "vz-init: agent start"
_PANIC = "Kernel panic - not syncing:"
_CID_TAKEN = "unable to set guest cid"
_DISK_TAKEN = 'Failed to get "write" lock'
_CONSOLE_LAG_SECS = 2.0
_QEMU_LAG_SECS = 1.0
QEMU = "qemu-system-aarch64"

# What each phase up to `ready` stands for.
_WAITED_FOR = {
    "init": f"the kernel to start /init, which prints {_INIT_LINE!r}",
    "agent": f"init to start the agent, which it announces with {_AGENT_LINE!r}",
    "ready": "the agent to listen on its vsock port",
}
_IN_USE = "the guest to be used to the end"
_OFF = "the guest to switch itself off"


@dataclass(frozen=True, slots=True)
class Ready:
    """The agent listens, since `at` (monotonic seconds). `line` is what it said, or None when it had to be asked."""

    at: float
    line: str | None


@dataclass(frozen=True, slots=True)
class _Ended:
    """A process of the guest's machine ended. `code` is its exit code, negative for a signal."""

    name: str
    code: int
    at: float


class Watch:
    """Watches one guest. `on_console` gets each line of the console, `on_lost` is called once if the guest is lost
    while it is being used; both from other threads."""

    def __init__(self, report: events.Report, on_console: Callable[[str], object]) -> None:
        self._report = report
        self._on_console = on_console
        self._changed = threading.Condition()
        self._tail: deque[str] = deque(maxlen=_PANIC_LINES)
        self._phases: list[events.Phase] = []
        self._ready: Ready | None = None
        self._ended: dict[str, _Ended] = {}
        self._panic: str | None = None
        self._in_use = False
        self._on_lost: Callable[[], object] = lambda: None
        self.started = time.monotonic()
        """When QEMU was started; phases count from here."""

    @property
    def phases(self) -> tuple[events.Phase, ...]:
        """The phases reached so far, in order."""
        with self._changed:
            return tuple(self._phases)

    @property
    def tail(self) -> tuple[str, ...]:
        """The last lines of the console."""
        with self._changed:
            return tuple(self._tail)[-TAIL_LINES:]

    @property
    def known_ready(self) -> bool:
        """Whether the agent is known to listen."""
        return self._ready is not None

    def reached(self, name: str, at: float | None = None) -> None:
        """A phase was reached, at the monotonic time `at` or now; once is enough."""
        with self._changed:
            self._reached(name, time.monotonic() if at is None else at)

    def line(self, text: str) -> None:
        """A program of the guest's machine printed something on its own account."""
        with self._changed:
            self._tail.append(text)

    def console(self, text: str) -> None:
        """The guest printed something on its console, or QEMU did, which has the same output."""
        now = time.monotonic()
        with self._changed:
            self._tail.append(text)
            # However late we learn of them: both were before the agent listened.
            at = now if self._ready is None else min(now, self._ready.at)
            if text.startswith(_INIT_LINE):
                self._reached("init", at)
            elif text.startswith(_AGENT_LINE):
                self._reached("agent", at)
            elif _PANIC in text and self._panic is None:
                self._panic = text.partition(_PANIC)[2].strip()
            self._changed.notify_all()
        self._on_console(text)

    def is_ready(self, line: str | None) -> None:
        """The agent listens, and said so (`line`) or was asked."""
        with self._changed:
            if self._ready is None:
                self._ready = Ready(time.monotonic(), line)
            self._changed.notify_all()

    def ended(self, name: str, code: int) -> None:
        """The process `name` ended."""
        with self._changed:
            lost = self._in_use and not self._ended
            self._ended[name] = _Ended(name, code, time.monotonic())
            self._changed.notify_all()
        if lost:
            self._on_lost()

    def wait_until_ready(self, timeout_secs: float) -> Ready:
        """Raises TimedOut, or VzreproError when a process ends first."""
        with self._changed:
            self._wait(lambda: self._ready is not None or bool(self._ended), self.started + timeout_secs)
            if self._ready is None:
                if self._ended:
                    raise self._end("before the guest's agent was ready")
                raise TimedOut(
                    f"the guest's agent was not ready within {timeout_secs:g} s",
                    reason=self._story(),
                    hint=f"a slow or busy host needs longer: --timeout-secs {max(60, round(2 * timeout_secs))}",
                )
            # The console and the vsock are not in step with each other.
            self._wait(
                lambda: bool(self._ended) or any(phase.name == "agent" for phase in self._phases),
                time.monotonic() + _CONSOLE_LAG_SECS,
            )
            self._reached("ready", self._ready.at)
            return self._ready

    def use(self, on_lost: Callable[[], object]) -> None:
        """From now until `release` the end of any process means that the guest is lost: `on_lost` is called."""
        with self._changed:
            self._in_use, self._on_lost = True, on_lost
            lost = bool(self._ended)
        if lost:
            on_lost()

    def loss(self, timeout_secs: float) -> VzreproError | None:
        """The error that says how the guest was lost while it was in use; None when it was not, nor within the time."""
        with self._changed:
            self._wait(lambda: bool(self._ended), time.monotonic() + timeout_secs)
            return self._end("while the guest was in use", _IN_USE) if self._in_use and self._ended else None

    def release(self) -> None:
        """What ends from now on ends as it should."""
        with self._changed:
            self._in_use = False

    def wait_until_off(self, timeout_secs: float) -> None:
        """The guest was told to switch itself off. Raises TimedOut, or VzreproError when QEMU fails."""
        with self._changed:
            self._wait(lambda: QEMU in self._ended, time.monotonic() + timeout_secs)
            if QEMU not in self._ended:
                raise TimedOut(f"the guest did not power off within {timeout_secs:g} s", reason=self._story(_OFF))
            if self._ended[QEMU].code or self._panic is not None:
                raise self._end("while the guest switched itself off", _OFF)
            self._reached("off", self._ended[QEMU].at)

    def _wait(self, done: Callable[[], bool], until: float) -> None:
        while not done() and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)

    def _reached(self, name: str, at: float) -> None:
        if all(phase.name != name for phase in self._phases):
            phase = events.Phase(name, at - self.started)
            self._phases.append(phase)
            self._report(phase)

    def _end(self, when: str, waited: str | None = None) -> VzreproError:
        """The error for the end of a process, and what is known of the cause."""
        first = next(iter(self._ended.values()))
        if first.code == 0:
            # Servers of devices end when QEMU does, and may be noticed first.
            self._wait(lambda: QEMU in self._ended, time.monotonic() + _QEMU_LAG_SECS)
            first = self._ended.get(QEMU, first)
        hint = None
        what = f"{first.name} ended with {_exit(first.code)} {when}"
        if self._panic is not None:
            what = f"the guest's kernel panicked: {self._panic}"
        elif any(_CID_TAKEN in line for line in self._tail):
            what = "the guest's vsock address (CID) is in use by another guest of this host"
            hint = "try again: every boot takes another address at random"
        elif any(_DISK_TAKEN in line for line in self._tail):
            what = "a disk of the guest is in use by another guest"
            hint = "end that guest first, or give this one a disk of its own"
        return VzreproError(what, reason=self._story(waited), hint=hint)

    def _story(self, waited: str | None = None) -> str:
        reached = ", ".join(f"{phase.name} at {phase.secs:.2f} s" for phase in self._phases) or "nothing"
        if waited is None:
            names = [phase.name for phase in self._phases]
            waited = next(what for name, what in _WAITED_FOR.items() if name not in names)
        lines = list(self._tail) if self._panic is not None else list(self._tail)[-TAIL_LINES:]
        console = "\n".join(f"    {line}" for line in lines) or "    (empty)"
        return f"reached: {reached}; waited for: {waited}\n  last lines of the console:\n{console}"


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
