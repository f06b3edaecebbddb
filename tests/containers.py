"""`vzrepro oci` for tests, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.guests import LIMIT_SECS

PROJECT = Path(__file__).resolve().parents[1]


class Oci:
    """`vzrepro oci` with a runtime directory and volumes of its own."""

    def __init__(self, bundle: Path, runtime: Path) -> None:
        self.bundle, self.runtime = bundle, runtime
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "XDG_DATA_HOME": str(runtime / "data")}

    def words(self, *words: str) -> list[str]:
        booting = ["--bundle-dir", str(self.bundle), "--timeout-secs", str(LIMIT_SECS)]
        own = booting if words[0] in ("run", "create") else []
        return [sys.executable, "-m", "vzrepro", "oci", words[0], *own, *words[1:]]

    def __call__(self, *words: str, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.words(*words),
            cwd=PROJECT,
            env=self.env,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * LIMIT_SECS,
        )
        assert done.returncode == code, f"exit {done.returncode}, wanted {code}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.words(*words),
            cwd=PROJECT,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def directory(self, container: str) -> Path:
        """What the host has of a container."""
        return self.runtime / "vz" / container

    def supervisor(self, container: str) -> int:
        """The process that keeps a container."""
        return int(json.loads((self.directory(container) / "state.json").read_text())["pid"])

    def left(self) -> list[str]:
        """What there is of containers and of runs."""
        return sorted(path.name for path in self.runtime.glob("vz/*"))


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pids: set[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def fetched(port: int, process: subprocess.Popen[bytes] | None = None) -> str:
    """What is served on the port, once something is."""
    deadline = time.monotonic() + LIMIT_SECS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert process is None or process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
