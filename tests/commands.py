"""`vzrepro` as a process, for tests that see what a user sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar


class Commands:
    """Runs it in the workspace `root`; subclasses say in which environment, and how long a run may take."""

    TIMEOUT_SECS: ClassVar[int]
    root: Path

    def environment(self) -> dict[str, str]:
        raise NotImplementedError

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "vzrepro", *words],
            cwd=self.root,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run to the end; fails the test unless the exit code is `code`."""
        with self.start(*words) as process:
            out, err = process.communicate(timeout=self.TIMEOUT_SECS)
        assert process.returncode == code, f"exit {process.returncode}, wanted {code}\n--- out\n{out}\n--- err\n{err}"
        return subprocess.CompletedProcess(words, process.returncode, out, err)
