"""Which vzrepro this is: its version, and the commit that it is of; and what changes its installation."""

from __future__ import annotations

import os
import sys

import vzrepro


def full() -> str:
    """`0.1.0 (9fceb02d0ae5)`: the version, and the commit; `-dirty` with changes that no commit has. The version alone
    where nothing tells: neither `COMMIT`, which a wheel has, nor git in a checkout."""
    commit = _built_from() or _checked_out()
    return f"{vzrepro.__version__} ({commit})" if commit else vzrepro.__version__


def adding(package: str) -> str:
    """The command that adds a Python package to where this vzrepro runs."""
    if tool := _pipx():
        return f"pipx inject {tool} {package}"
    return f"{_pip()} {package}"


def upgrading() -> str:
    """The command that brings a newer vzrepro to where this one runs."""
    if _is_checkout():
        return f"git -C {_root()} pull"
    if tool := _pipx():
        return f"pipx upgrade {tool}"
    if "/uv/tools/" in sys.prefix:
        return "uv tool upgrade vzrepro"
    return f"{_pip()} --upgrade WHEEL"


def _pipx() -> str:
    """What pipx calls its environment in which this runs, or ""."""
    home, _, name = sys.prefix.rpartition("/venvs/")
    return name if home.endswith("pipx") else ""


def _pip() -> str:
    """What installs into this Python's environment; those that uv makes have no pip."""
    import importlib.util

    if importlib.util.find_spec("pip") is None:
        return f"uv pip install --python {sys.executable}"
    return f"{sys.executable} -m pip install"


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.abspath(vzrepro.__file__)))


def _built_from() -> str:
    try:
        with open(os.path.join(os.path.dirname(vzrepro.__file__), "COMMIT"), encoding="ascii") as file:
            return file.read().partition(" ")[0]
    except OSError:
        return ""


def _is_checkout() -> bool:
    return os.path.exists(os.path.join(_root(), ".git"))


def _checked_out() -> str:
    if not _is_checkout():
        return ""
    import subprocess

    command = ["git", "-C", _root(), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
