"""Recipes are evaluated purely, and every mistake in one is a line with its place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Workspace
from vzrepro.errors import UsageError
from vzrepro.evaluate import PURE_MODULES, DrvGraph, evaluate
from vzrepro.lock import Lock

Declare = Callable[..., DrvGraph]

TOOLS = """
from vzrepro import build, debian_image, local, read, text
TOOLS = debian_image("tools", suite="trixie", packages=["dash"])
"""
ONE = TOOLS + 'A = build("a", image=TOOLS, command=["true"], inputs={"t": text("t", "hello")})\n'


def test_targets_and_closure(declare: Declare) -> None:
    graph = declare(
        a=ONE,
        b="from recipes.a import A, TOOLS\nfrom vzrepro import build\n"
        'build("b", image=TOOLS, command=["true"], inputs={"a": A}, version="2")',
    )
    assert list(graph.targets) == ["a", "b", "debs-tools", "image-tools"]
    order = [node.target for node in graph.closure([graph.find("b")])]
    assert order.index("debs-tools") < order.index("image-tools") < order.index("a") < order.index("b")
    assert order.index("t") < order.index("a")
    assert graph.find("b").path.name == "b-2"
    assert graph.find("b").place == "recipes/b/__init__.py:3"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("\nimport os\n", "b/__init__.py:2: a recipe may not import os: it reads the environment"),
        ("import time", "may not import time: it reads the clock"),
        ("from datetime import datetime", "may not import datetime: it reads the clock"),
        ("import os.path", "may not import os.path"),
        ("import socket", "may not import socket"),
        ("import subprocess", "may not import subprocess"),
        ("import numpy", "may not import numpy"),
        ("from pathlib import Path", "may not import pathlib"),
        ("\n\nopen('/etc/passwd')", "b/__init__.py:3: a recipe may not read '/etc/passwd'"),
        ("open('relative')", "may not read 'relative'"),
        ("open(__file__ + '.new', 'w')", "may not write to"),
        ("open(0)", "may not open a file descriptor"),
        ("import json\nopen(__file__ + '/../../../../out')", "outside the workspace"),
        # Ways around the importer, which the audit hook closes.
        ("import json\njson.decoder.scanner.__builtins__['__import__']('socket').socket()", "2: a recipe may not"),
        ("import json\njson.codecs.sys.modules['os'].listdir('/')", "2: a recipe may not do this (os.listdir)"),
        ("import json\njson.codecs.sys.modules['os'].system('true')", "2: a recipe may not do this (os.system)"),
        ("x = 1\ny = 1 / 0", "b/__init__.py:2: ZeroDivisionError"),
        ("def f(:\n", "b/__init__.py:1: syntax error"),
        ("from recipes.c import X", "there is no recipe module recipes.c"),
        ("from vzrepro import nix", "vzrepro has nothing called 'nix' for recipes"),
        ("from vzrepro import local\nlocal('nope')", "b/__init__.py:2: recipes/b/nope: no such file"),
        ("from vzrepro import local\nlocal('../a')", "must be a relative path"),
        ("from vzrepro import read\nread('/etc/passwd')", "must be a relative path"),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n\n"
            "build('a', image=TOOLS, command=['x'], inputs={})",
            "b/__init__.py:4: 'a' is already the name of the recipe at recipes/a/__init__.py:4",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n"
            "build('a b', image=TOOLS, command=['x'], inputs={})",
            "b/__init__.py:3: 'a b' is not a valid store name",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\nbuild('b', image=TOOLS, command=[], inputs={})",
            "empty command",
        ),
        (
            "from recipes.a import TOOLS\nfrom vzrepro import build\n"
            "build('b', image=TOOLS, command=['x'], inputs={'i': 1})",
            "input 'i' is int",
        ),
        (
            "from recipes.a import A\nfrom vzrepro import build\nbuild('b', image=A, command=['x'], inputs={})",
            "is not an image",
        ),
        ("from vzrepro import crate_source\ncrate_source()", "b/__init__.py:2: TypeError"),
    ],
)
def test_mistakes_are_one_line_with_their_place(declare: Declare, source: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        declare(a=ONE, b=source)
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith("recipes/b/__init__.py:")


def test_import_cycle(declare: Declare) -> None:
    with pytest.raises(UsageError, match=r"recipes\.a → recipes\.b → recipes\.a"):
        declare(a="from recipes.b import B\nA = 1", b="from recipes.a import A\nB = 1")


def test_link_out_of_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    root = workspace(a="open(__file__.replace('__init__.py', 'link'))")
    (root / "recipes/a/link").symlink_to(secret)
    with pytest.raises(UsageError, match="outside the workspace"):
        evaluate(root, Lock(), "linux/amd64")


def test_unknown_target_names_the_nearest(declare: Declare) -> None:
    with pytest.raises(UsageError) as caught:
        declare(a=ONE).find("image-tool")
    assert caught.value.reason is not None
    assert "image-tools" in caught.value.reason


def test_missing_and_outdated_pins(workspace: Workspace) -> None:
    root = workspace(a=ONE)
    with pytest.raises(UsageError, match=r"recipes/a/__init__.py:3: lock.toml has no image 'tools'"):
        evaluate(root, Lock(), "linux/amd64")


def test_reads_are_known(workspace: Workspace) -> None:
    root = workspace(a=ONE + "local('dir', 'file')\nread('text')\nopen(__file__.replace('__init__', 'more')).read()")
    folder = root / "recipes/a"
    (folder / "dir").mkdir()
    for name in ("dir/inner", "file", "text", "more.py"):
        (folder / name).write_text("")
    graph = evaluate(root, Lock(), "linux/amd64", lenient=True)
    assert graph.reads == {
        root / "recipes",
        *(folder / name for name in ("", "__init__.py", "dir", "dir/inner", "file", "text", "more.py")),
    }


def test_local_hash_sees_content_names_and_executable_bits_only(workspace: Workspace) -> None:
    root = workspace(a=ONE + "L = local('dir')\nbuild('l', image=TOOLS, command=['x'], inputs={'l': L})")
    folder = root / "recipes/a/dir"
    folder.mkdir()
    file = folder / "f"
    file.write_text("1")

    def path() -> str:
        return evaluate(root, Lock(), "linux/amd64", lenient=True).find("l").path.base

    first = path()
    file.touch()
    (folder / "__pycache__").mkdir()
    file.chmod(0o640)
    assert path() == first
    file.chmod(0o755)
    executable = path()
    file.chmod(0o644)
    file.write_text("2")
    assert len({first, executable, path()}) == 3


def test_limits_and_urls_stay_outside_the_hash(declare: Declare) -> None:
    plain = declare(a=ONE).find("a")
    limited = declare(a=ONE.replace("command=", "timeout_secs=5, memory_gib=1, command=")).find("a")
    assert limited.path == plain.path
    assert (limited.timeout_secs, limited.memory_bytes) == (5, 1 << 30)


def test_evaluation_leaves_the_process_as_it_was(declare: Declare) -> None:
    before = set(sys.modules)
    declare(a=ONE)
    assert not {name for name in set(sys.modules) - before if name.startswith("recipes")}
    Path("/etc/passwd").read_text()


def test_dashes_in_folders_are_underscores_in_imports(workspace: Workspace) -> None:
    root = workspace(**{"my-tool": ONE, "b": "from recipes.my_tool import A\nassert A.target == 'a'"})
    assert "a" in evaluate(root, Lock(), "linux/amd64", lenient=True).targets


@pytest.mark.parametrize("module", sorted(PURE_MODULES))
def test_pure_modules_can_be_imported(declare: Declare, module: str) -> None:
    declare(a=f"import {module}" if module != "__future__" else "from __future__ import annotations")


def test_a_package_imports_its_own_modules(workspace: Workspace) -> None:
    root = workspace(a="from recipes.a.data import X\nfrom .data import X as Y\nassert X is Y")
    (root / "recipes/a/data.py").write_text("X = object()")
    evaluate(root, Lock(), "linux/amd64")
