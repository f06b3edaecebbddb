"""Any other queue: a command of the user's that has `vzrepro farm build` run somewhere, and waits for it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Sequence

from vzrepro.base.errors import Interrupted, UsageError, VzreproError
from vzrepro.farm.order import KINDS, Order
from vzrepro.farm.run import Watcher

_LOOK_SECS = 0.2
_END_SECS = 10.0
_TAIL = 20

PLACEHOLDERS = ("drv", "platform", "size", "name")
"""What the command may have in braces."""


class CommandQueue:
    """`template` is a shell's command line with `PLACEHOLDERS` in braces. It ends with the build's exit code."""

    def __init__(self, template: str) -> None:
        unknown = set(re.findall(r"\{(\w*)\}", template)) - set(PLACEHOLDERS)
        if unknown or "{drv}" not in template:
            raise UsageError(
                f"farm: the command {template!r} cannot be used",
                reason=f"it has {{{min(unknown)}}}" if unknown else "it does not say what is to be built: {drv}",
                hint=f"what is filled in: {', '.join(f'{{{each}}}' for each in PLACEHOLDERS)}",
            )
        self._template = template

    def command(self, order: Order) -> str:
        """The command line for an order."""
        values = {"drv": order.drv.hex, "platform": order.platform, "size": order.size, "name": order.name}
        return re.sub(r"\{(\w+)\}", lambda match: shlex.quote(values[match[1]]), self._template)

    def place(self, order: Order, watcher: Watcher, stop: threading.Event, urgency: float = 1.0) -> None:
        """Run it to its end. What it prints is shown as the build's log. What is urgent is not its affair."""
        command = self.command(order)
        watcher.works("command", "builds")
        with subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            tail: list[str] = []

            def show() -> None:
                assert process.stdout is not None
                for raw in process.stdout:
                    line = raw.decode(errors="replace").rstrip("\r\n")
                    tail.append(line)
                    del tail[:-_TAIL]
                    watcher.line(line)

            reader = threading.Thread(target=show, daemon=True)
            reader.start()
            while process.poll() is None:
                if stop.wait(_LOOK_SECS):
                    _end(process)
                    raise Interrupted(f"interrupted while {order.name} was being built by: {command}")
            reader.join(_END_SECS)
        if process.returncode != 0:
            kinds = {kind.exit_code: kind for name, kind in KINDS.items() if name != "OutOfMemory"}
            kind = kinds.get(process.returncode, VzreproError)
            lines = "".join(f"\n    {line}" for line in tail)
            raise kind(
                f"building {order.name} failed: the farm's command ended with exit code {process.returncode}",
                reason=f"it was: {command}" + (f"\nit printed at last:{lines}" if tail else ""),
            )

    def farewell(self, orders: Sequence[Order]) -> str | None:
        """The commands were ended; what they had others begin is theirs to end."""
        return "the farm's commands were ended" if orders else None

    def close(self) -> None:
        """Nothing is kept open."""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command's processes: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        until = time.monotonic() + _END_SECS
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
