"""Runs inside the diffoscope image, never in vzrepro: looks at pairs of files one by one, each within limits.

`/in/task.json` says what to do, `/in/a/<n>/<name>` and `/in/b/<n>/<name>` are the pairs, in the order in which to look
at them. Each pair's findings are `/out/<n>.json` (diffoscope's own format), a line on stdout says how it went:

    tool diffoscope 297
    differs 0
    cut 1 after 30 s
    failed 2 the last line it printed

A process per pair makes that one file cannot take the others with it. It is a fork of this one, since starting
Python and diffoscope takes seconds and most files take less.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

_OUT = Path("/out")
_WORK = Path("/build/work")
_BIN = Path("/build/bin")
_LOG = Path("/build/log")
_POLL_SECS = 0.05
_LEAST_SECS = 10.0

# Debian's objdump knows its own architecture only; the number is EM_AARCH64 in the ELF header's e_machine.
_OBJDUMP = """#!/bin/sh
for last; do :; done
if [ "$(od -An -tu2 -j18 -N2 "$last" | tr -d ' ')" = 183 ]; then exec aarch64-linux-gnu-objdump "$@"; fi
exec /usr/bin/objdump "$@"
"""


def main() -> None:
    """Look at all pairs, then write the page if one is wanted."""
    task = json.loads(Path("/in/task.json").read_text())
    _BIN.mkdir()
    (_BIN / "objdump").write_text(_OBJDUMP)
    (_BIN / "objdump").chmod(0o755)
    os.environ["PATH"] = f"{_BIN}:{os.environ['PATH']}"
    os.environ["TMPDIR"] = str(_WORK)
    _say(f"tool diffoscope {importlib.import_module('diffoscope').VERSION}")
    _load()
    deadline = time.monotonic() + task["seconds"]
    documents: dict[int, Any] = {}
    for number, name in enumerate(task["names"]):
        left = deadline - time.monotonic()
        result = _OUT / f"{number}.json"
        words = [*task["options"], "--json", str(result), f"/in/a/{number}/{name}", f"/in/b/{number}/{name}"]
        last = number + 1 == len(task["names"])
        how = _run(words, left if last else max(left / 2, min(left, _LEAST_SECS)), task["disk_bytes"])
        if how == "differs" and result.is_file():
            documents[number] = json.loads(result.read_text()) if task["page"] else {}
        else:
            documents[number] = {"comments": [f"not looked into by diffoscope: {how}"]}
            result.unlink(missing_ok=True)
        word, _, rest = how.partition(" ")
        _say(f"{word} {number} {rest}".rstrip())
    if task["page"]:
        _page(task, documents)


def _load() -> None:
    """Load all of diffoscope, once for all the processes to come: it would load each format's part when asked."""
    importlib.import_module("diffoscope.main")
    formats = importlib.import_module("diffoscope.comparators")
    for each in pkgutil.iter_modules(formats.__path__):
        with contextlib.suppress(ImportError):  # some need modules that are not in the image
            importlib.import_module(f"diffoscope.comparators.{each.name}")


def _page(task: dict[str, Any], documents: dict[int, Any]) -> None:
    """diffoscope's own HTML of everything: of the pairs what was found, of the rest what the task says."""
    details = []
    for detail in task["page"]["details"]:
        details.append({"unified_diff": None, **documents.get(detail.pop("pair", None), {}), **detail})
    whole = {"diffoscope-json-version": 1, "unified_diff": None, "details": details, **task["page"]["sources"]}
    source = Path("/build/page.json")
    source.write_text(json.dumps(whole))
    how = _run(["--load-existing-diff", str(source), "--html", str(_OUT / "page.html")], 120, task["disk_bytes"])
    word, _, rest = how.partition(" ")
    _say(f"{'page' if word == 'differs' else 'no-page'} - {rest}".rstrip())


def _run(words: list[str], seconds: float, disk_bytes: int) -> str:
    """Run diffoscope in a process of its own: `differs`, `same`, `cut <why>` or `failed <why>`."""
    if seconds <= 0:
        return "cut no time left"
    _WORK.mkdir()
    ends = time.monotonic() + seconds
    pid = os.fork()
    if pid == 0:
        _child(words, disk_bytes)
    try:
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return _how(status)
            if time.monotonic() > ends:
                return f"cut after {seconds:.0f} s"
            if _used(_WORK) > disk_bytes:
                return f"cut it needs more than {disk_bytes >> 20} MiB of disk"
            time.sleep(_POLL_SECS)
    finally:
        _end(pid)
        shutil.rmtree(_WORK, ignore_errors=True)


def _child(words: list[str], disk_bytes: int) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (disk_bytes, disk_bytes))
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 2
    try:
        importlib.import_module("diffoscope.main").main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
    finally:
        os._exit(code)


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        killed = os.WTERMSIG(status) == signal.SIGKILL
        return "cut it was killed, most likely for the memory it needs" if killed else "failed it was ended by a signal"
    code = os.WEXITSTATUS(status)
    if code in (0, 1):
        return ("same", "differs")[code]
    lines = _LOG.read_text(errors="replace").split("\n") if _LOG.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if last.startswith("MemoryError") or "Out of memory" in last:
        return "cut it needs more memory"
    return f"failed {last[:200]}"


def _end(pid: int) -> None:
    """End what the process started, and itself if it is still there."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


def _used(directory: Path) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118
            except OSError:
                continue
            total += found.st_blocks * 512 if stat.S_ISREG(found.st_mode) else 0
    return total


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
