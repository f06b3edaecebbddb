"""A public name means one thing: no two modules of vzrepro define a class, or name a type, alike."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def types_of(module: ast.Module) -> Iterator[str]:
    """Classes, and names in mixed case that are assigned: aliases of types."""
    for node in module.body:
        match node:
            case ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=[ast.Name(id=name)]) if name[0].isupper() and not name.isupper():
                yield name


def test_no_public_name_means_two_things() -> None:
    places = defaultdict(list)
    for path in sorted((ROOT / "vzrepro").rglob("*.py")):
        if "recipes/files" in str(path):  # programs of the sandbox, which vzrepro never imports
            continue
        for name in types_of(ast.parse(path.read_text())):
            if not name.startswith("_"):
                places[name].append(str(path.relative_to(ROOT)))
    assert len(places) > 300
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}
