"""What a guest sends over its streams, read by the host: its console, containers' output, verdicts of probes, replies.

Inputs are made and counted as in `parsers`. What is read is bounded, whatever comes: lines, files and what waits in
memory. Calls of the agent that say too much are `tests/unit/test_vm_agent.py`'s. See `frame` for the options.
"""

from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

from tests.campaigns.frame import Line, Wrong, main
from tests.campaigns.parsers import Parser, fed
from tests.unit.test_oci_logs import piece
from vzrepro.base import events
from vzrepro.console import clean
from vzrepro.guest.vm import dial, logs, probes, qemu, watch

_CONTROL = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f]")
_REPEATS = 300
_LIMIT = 64 << 10
_CONSOLE = b"[    0.1] Linux version 6.12\n[    0.5] Kernel panic - not syncing: \x1b[2J\r\nvz-init: ready\n"
_VERDICTS = b"".join(
    json.dumps({"capability": name, "verdict": "PROVEN", "detail": "it works"}).encode() + b"\n" for name in ("a", "b")
)


def _console(data: bytes, place: Path) -> None:
    """As QEMU's output, many times over."""
    (place / "console").write_bytes(data * _REPEATS)
    seen = watch.Watch(events.ignore, lambda line: lines.append(len(line)))
    lines: list[int] = []
    with qemu.Child("cat", [str(place / "console")], on_line=seen.console) as child:
        child.wait(60)
    if max(lines, default=0) > _LIMIT or len(seen.tail) > watch.TAIL_LINES:
        raise Wrong(f"a line of {max(lines)}, a tail of {len(seen.tail)}")
    if any(_CONTROL.search(clean(line)) for line in seen.tail):
        raise Wrong(f"shown: {[clean(line) for line in seen.tail]}")


def _output(data: bytes, place: Path) -> None:
    """As the pieces of what a container prints."""
    output = logs.OutputLog(place, limit=1000)
    try:
        for at in range(0, len(data), 100):
            output.take(data[at : at + 100])
    finally:
        held = sum(path.stat().st_size for path in place.iterdir())
        # A piece goes into a file whole.
        if held > 2 * max(1000, len(data)) or len(output._pending) > len(data) or len(list(place.iterdir())) > 3:
            raise Wrong(f"{held} bytes are kept")


def _verdicts(data: bytes, _place: Path) -> None:
    probes._verdicts(data.decode("utf-8", "replace").splitlines())


def _reply(data: bytes, _place: Path) -> None:
    """As the vsock device's answer to who connects."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        theirs.send(data[:4096])
        theirs.shutdown(socket.SHUT_WR)
        if len(dial.read_line(ours)) > 256:
            raise Wrong("a line without an end")


_PIECES = piece(b"one\n") + piece(b"two" * 50, offset=4) + piece(b"")
GUESTS: dict[str, Parser] = {
    "hostile guest: output": Parser((_PIECES,), _output),
    "hostile guest: verdicts": Parser((_VERDICTS,), _verdicts),
    "hostile guest: reply": Parser((b"OK 1024\n",), _reply, (ConnectionError,)),
}
if sys.platform == "linux":
    GUESTS["hostile guest: console"] = Parser((_CONSOLE,), _console)

LINES: dict[str, Line] = {name: fed(parser) for name, parser in GUESTS.items()}

if __name__ == "__main__":
    main(LINES, 25)
