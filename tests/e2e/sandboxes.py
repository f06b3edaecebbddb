"""What tests of the sandbox share: its containers, what is left of them, a job's lines, an input."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vzrepro import sandbox

EPOCH = 1767225600


def containers(label: str) -> list[str]:
    """The names of the containers of the build with this label."""
    return subprocess.run(
        ["docker", "ps", "--all", "--filter", f"label=vzrepro.target={label}", "--format", "{{.Names}}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def output(job: sandbox.Job) -> list[str]:
    """Run the job and return its lines."""
    lines: list[str] = []
    sandbox.run(job, on_line=lines.append)
    return lines


def store_object(tmp_path: Path) -> Path:
    """A directory under the name of a store path, as the store writes it: modes 0444 and 0555."""
    path = tmp_path / "store" / f"{'0123456789abcdfghijklmnpqrsvwxyz'}-input-1.0"
    path.mkdir(parents=True)
    (path / "file").write_text("content\n")
    (path / "file").chmod(0o444)
    path.chmod(0o555)
    return path


def volumes() -> list[str]:
    """The volumes that the engine has."""
    command = ["docker", "volume", "ls", "--quiet"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
