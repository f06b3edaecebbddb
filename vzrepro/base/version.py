"""Which vzrepro this is: its version, and the commit that it is of."""

from __future__ import annotations

import os

import vzrepro


def full() -> str:
    """`0.1.0 (9fceb02d0ae5)`: the version, and the commit; `-dirty` with changes that no commit has. The version alone
    where nothing tells: neither `COMMIT`, which a wheel has, nor git in a checkout."""
    commit = _built_from() or _checked_out()
    return f"{vzrepro.__version__} ({commit})" if commit else vzrepro.__version__


def _built_from() -> str:
    try:
        with open(os.path.join(os.path.dirname(vzrepro.__file__), "COMMIT"), encoding="ascii") as file:
            return file.read().partition(" ")[0]
    except OSError:
        return ""


def _checked_out() -> str:
    root = os.path.dirname(os.path.dirname(os.path.abspath(vzrepro.__file__)))
    if not os.path.exists(os.path.join(root, ".git")):
        return ""
    import subprocess

    command = ["git", "-C", root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
