"""`vzrepro.recipes`: what a workspace that has nothing of its own can ask for, and what it then pins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import vzrepro.recipes
from vzrepro.base.config import find_workspace, load, nearest_workspace
from vzrepro.base.errors import UsageError
from vzrepro.proof.audit.toolbox import TOOLS, tools_graph
from vzrepro.recipe import lock as locks
from vzrepro.recipe.evaluate import evaluate
from vzrepro.recipe.graph import DrvGraph
from vzrepro.recipe.lock import Lock

Declare = Callable[..., DrvGraph]
ROOT = Path(__file__).parents[2]

HELLO = """
from vzrepro import build
from vzrepro.recipes import c_image

A = build("a", image=c_image(), command=["true"], inputs={})
"""


def test_only_what_is_asked_for_is_pinned(declare: Declare) -> None:
    graph = declare(a=HELLO)
    assert [want.name for want in graph.wants] == ["c"]
    assert graph.wants[0].place == "recipes/a/__init__.py:5"


def test_an_image_of_several_recipes_is_one(declare: Declare) -> None:
    graph = declare(a=HELLO, b=HELLO.replace('"a"', '"b"'))
    assert graph.find("a").drv.image == graph.find("b").drv.image
    assert [want.name for want in graph.wants] == ["c"]


def test_an_image_is_declared_anew_in_each_evaluation(declare: Declare) -> None:
    first, second = declare(a=HELLO), declare(a=HELLO)
    assert first.find("image-c") is not second.find("image-c")


def test_files_that_come_with_vzrepro_are_among_what_was_read(declare: Declare) -> None:
    graph = declare(a="from vzrepro.recipes import newc_writer\nfrom vzrepro import build\nnewc_writer()")
    assert [path.name for path in graph.reads if not path.is_relative_to(graph.root)] == ["newc.py"]


@pytest.mark.parametrize(
    "source",
    [
        "from vzrepro.recipes import nothing",
        "from vzrepro.recipes import shipped",  # a module, and no part of what recipes are offered
        "from vzrepro.recipes import *",
    ],
)
def test_what_is_not_offered_is_refused_with_what_is(declare: Declare, source: str) -> None:
    with pytest.raises(UsageError, match=r"^recipes/a/__init__.py:1: vzrepro.recipes has nothing called") as caught:
        declare(a=source)
    assert "c_image" in (caught.value.hint or "")
    assert "vzrepro --version" in (caught.value.hint or "")


def test_other_modules_of_vzrepro_stay_out_of_reach(declare: Declare) -> None:
    with pytest.raises(UsageError, match=r"a recipe may not import vzrepro\.recipes\.images"):
        declare(a="from vzrepro.recipes.images import c_image")


def test_the_whole_name_can_be_imported_too(declare: Declare) -> None:
    assert "image-tools" in declare(a="import vzrepro.recipes as r\nr.tools_image()").targets


def test_outside_an_evaluation_the_functions_say_where_they_work() -> None:
    with pytest.raises(UsageError, match="work only inside recipes/"):
        vzrepro.recipes.tools_image()


def test_vzrepros_own_package_is_no_workspace() -> None:
    inside = Path(vzrepro.recipes.__file__).parent
    assert (inside.parent / "recipes").is_dir()
    assert nearest_workspace(inside) == nearest_workspace(ROOT) == ROOT


def test_the_tools_of_audits_are_a_workspace_whose_lock_answers_it() -> None:
    assert find_workspace(TOOLS, {"VZREPRO_TRUSTED_WORKSPACES": "*", **os.environ}) == TOOLS
    graph, snapshot = tools_graph("linux/amd64")
    assert {"audit-tools", "image-diffoscope"} <= graph.targets.keys()
    assert snapshot is not None


def test_the_tools_are_those_that_this_workspace_checks() -> None:
    """Two sets of pins would be two C images on every machine."""
    tools, _ = tools_graph("linux/amd64")
    here = evaluate(ROOT, locks.load(ROOT / "lock.toml"), "linux/amd64")
    for name in ("audit-tools", "image-c", "image-diffoscope"):
        assert tools.find(name).drv_hash == here.find(name).drv_hash, f"copy the pins of {name} to {TOOLS}"


def test_how_long_it_takes_is_known_of_all_that_is_made_for_the_bundles() -> None:
    graph = evaluate(ROOT, locks.load(ROOT / "lock.toml"), "linux/amd64")
    made = [node.target for node in graph.closure([graph.find("bundles")]) if node.drv.builder in ("sandbox", "image")]
    times = load(ROOT, {"VZREPRO_TRUSTED_WORKSPACES": "*"}, ROOT / "none").times
    assert set(made) <= times.keys() <= {node.target for node in graph.nodes.values()}


def test_there_are_no_tools_for_a_platform_they_are_not_pinned_for() -> None:
    with pytest.raises(UsageError, match="audits have no tools for linux/arm64") as caught:
        tools_graph("linux/arm64")
    assert "linux/amd64" in (caught.value.reason or "")


PROGRAM = """
from vzrepro import cargo_crates, local
from vzrepro.recipes import AMD64, rust_program

rust_program("p", version="1", source=local("Cargo.toml", "Cargo.lock"),
             crates=cargo_crates("p", lock=".", targets=[AMD64]))
"""


def test_a_rust_program_needs_an_image_and_crates(workspace: Callable[..., Path]) -> None:
    root = workspace(p=PROGRAM)
    (root / "recipes/p/Cargo.toml").write_text('[package]\nname = "p"\nversion = "1.0.0"\n')
    (root / "recipes/p/Cargo.lock").write_text("version = 3\n")
    graph = evaluate(root, Lock(), "linux/amd64", lenient=True)
    assert [(want.kind, want.name) for want in graph.wants] == [("crates", "p"), ("image", "rust")]
    assert graph.find("p").drv.env["VZ_TARGET"] == vzrepro.recipes.AMD64


def test_a_rust_program_for_an_unknown_target_is_refused(workspace: Callable[..., Path]) -> None:
    root = workspace(p=PROGRAM.replace("crates=", "target='sparc', crates="))
    (root / "recipes/p/Cargo.toml").write_text('[package]\nname = "p"\nversion = "1.0.0"\n')
    (root / "recipes/p/Cargo.lock").write_text("version = 3\n")
    with pytest.raises(UsageError, match=r"^recipes/p/__init__.py:5: rust_program builds for no 'sparc'"):
        evaluate(root, Lock(), "linux/amd64", lenient=True)


INITRAMFS = """
from vzrepro import text
from vzrepro.recipes import initramfs

initramfs("small", inputs={"hello": text("hello", "hi")}, local_files=["etc"])
"""


def test_an_initramfs_is_made_of_the_files_beside_the_recipe(workspace: Callable[..., Path]) -> None:
    root = workspace(small=INITRAMFS)
    (root / "recipes/small/manifest").write_text("dir /etc 755\nfile /etc/hi 644 /in/src/etc/hi\n")
    (root / "recipes/small/etc").mkdir()
    (root / "recipes/small/etc/hi").write_text("hi\n")
    graph = evaluate(root, Lock(), "linux/amd64", lenient=True)
    [own] = [node for node in graph.nodes.values() if node.target == "files-small"]
    assert set(own.tree) == {"manifest", "etc/hi", "newc.py"}
