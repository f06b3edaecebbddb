"""The page of what hosts expect names a test for each line, and each of those tests exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/host-contract.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+)::(test_\w+)`", PAGE)))


def rows() -> list[str]:
    """The page's table rows without their heads."""
    lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    return [line for line in lines if "---" not in line and not line.endswith("| test |")]


@pytest.mark.parametrize(("module", "name"), NAMED, ids=str)
def test_a_named_test_exists(module: str, name: str) -> None:
    found = [
        node.name
        for path in (ROOT / "tests").rglob(f"{module}.py")
        for node in ast.parse(path.read_bytes()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert name in found


def test_every_line_names_a_test() -> None:
    assert len(rows()) > 50
    for row in rows():
        assert "✔ `test_" in row.split("|")[-2], row


def test_every_test_of_the_simulator_stands_for_a_line() -> None:
    for path in (ROOT / "tests/e2e").glob("test_host_*.py"):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert (path.stem, node.name) in NAMED, f"{path.stem}::{node.name} is on no line"
