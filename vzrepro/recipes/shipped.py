"""The files that come with these recipes: scripts and sources that run in the sandbox, and never in vzrepro."""

from __future__ import annotations

from pathlib import Path

_FILES = Path(__file__).with_name("files")


def shipped(folder: str, *names: str) -> dict[str, Path]:
    """Files of `files/<folder>` by their names."""
    return {name: _FILES / folder / name for name in names}
