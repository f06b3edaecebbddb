"""What `targets` and `store path` said is said again at once, and only while it would be the answer."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import vzrepro
from vzrepro import cli, nar, noop
from vzrepro.base import config, disk
from vzrepro.base.model import ObjectInfo, StorePath
from vzrepro.store import LocalStore

PROJECT = Path(__file__).parents[2]
RECIPE = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build

A = build("a", image=TOOLS_IMAGE, command=["true"], inputs={})
"""
ASKED = ("targets", "store path a")


@dataclass
class Workspace:
    """A workspace with one target, which is in the store. It is the current directory."""

    root: Path
    path: StorePath

    def long_way(self, command: str) -> tuple[int, str]:
        """Run a command without the no-op path: its exit code and what it prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
            cli.main(command.split())
        return int(str(ended.value.code)), out.getvalue()

    def remembered(self, command: str) -> str | None:
        """What the no-op path answers."""
        return noop.answer(command.split(), os.environ, terminal=False)

    def settle(self) -> None:
        """Have both commands remembered: what was written just now is not trusted at first."""
        for command in ASKED:
            for _ in range(20):
                said = self.long_way(command)
                if self.remembered(command) is not None:
                    break
            assert said == (0, self.remembered(command))

    def store(self) -> LocalStore:
        return LocalStore(self.root / "store")

    def register(self) -> None:
        with self.store() as store, store.scratch("a") as scratch:
            (scratch / "a").write_text("a")
            nar_hash, size, _ = nar.canonical_copy(scratch / "a", scratch / "out")
            store.add(scratch / "out", ObjectInfo(self.path, nar_hash, size))


@pytest.fixture
def settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    root = tmp_path / "workspace"
    shutil.copytree(PROJECT / "recipes" / "toolchain", root / "recipes" / "toolchain")
    shutil.copy(PROJECT / "lock.toml", root)
    (root / "recipes" / "a.py").write_text(RECIPE)
    for name in [name for name in os.environ if name.startswith(("VZREPRO_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(config, "USER_FILE", tmp_path / "config.toml")
    monkeypatch.chdir(root)
    workspace = Workspace(root, StorePath("0" * 32, "none"))
    _, listed = workspace.long_way("targets")
    workspace.path = StorePath.parse(listed.split()[-2])
    workspace.register()
    workspace.settle()
    return workspace


def test_the_answer_is_the_long_ways(settled: Workspace) -> None:
    assert (0, settled.remembered("targets")) == settled.long_way("targets")
    assert settled.remembered("store path a") == f"{settled.root}/store/{settled.path.base}\n"
    for other in ("targets --all", "store path", "store path b", "store info a", "realize a", "realize", ""):
        assert settled.remembered(other) is None


def _edit_recipe(workspace: Workspace) -> None:
    with (workspace.root / "recipes/a.py").open("a") as file:
        file.write("# an edit\n")


def _new_recipe(workspace: Workspace) -> None:
    (workspace.root / "recipes/b.py").touch()


def _edit_lock(workspace: Workspace) -> None:
    with (workspace.root / "lock.toml").open("a") as file:
        file.write("# an edit\n")


def _configure(workspace: Workspace) -> None:
    (workspace.root / "pyproject.toml").touch()


def _configure_user(workspace: Workspace) -> None:
    config.USER_FILE.touch()


def _lose(workspace: Workspace) -> None:
    (workspace.root / "store" / workspace.path.base).unlink()


def _drop_database(workspace: Workspace) -> None:
    for file in (workspace.root / "store/.vzrepro").glob("db.sqlite*"):
        file.unlink()


def _collect(workspace: Workspace) -> None:
    with workspace.store() as store:
        assert store.gc().deleted == (workspace.path,)


@pytest.mark.parametrize(
    "change", [_edit_recipe, _new_recipe, _edit_lock, _configure, _configure_user, _lose, _drop_database, _collect]
)
def test_a_change_is_seen(settled: Workspace, change: Callable[[Workspace], None]) -> None:
    change(settled)
    assert [settled.remembered(command) for command in ASKED] == [None, None]


@pytest.mark.parametrize("name", ["VZREPRO_STORE", "VZREPRO_PLATFORM", "XDG_CONFIG_HOME"])
def test_settings_count(settled: Workspace, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "/elsewhere")
    assert [settled.remembered(command) for command in ASKED] == [None, None]


def test_an_object_that_comes_and_goes_is_told(settled: Workspace) -> None:
    _collect(settled)
    assert settled.long_way("targets")[1].split()[-1] == "no"
    assert settled.long_way("store path a") == (2, "")
    settled.register()
    settled.settle()
    told = settled.remembered("targets")
    assert told is not None
    assert told.split()[-1] == "yes"


def test_other_work_on_the_store_is_no_change(settled: Workspace) -> None:
    with settled.store() as store:
        store.hold([settled.path])
        store.record_history("a", "build", 1.0, 1)
    for command in ASKED:
        assert (0, settled.remembered(command)) == settled.long_way(command)


def test_who_looked_before_an_object_was_registered_learns_of_it(
    settled: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's directory changes when the object is put there, and once more when it is registered."""
    store, move = settled.root / "store", disk.move

    def put(source: Path, target: Path) -> None:
        move(source, target)
        os.utime(store, (0, 0))

    _collect(settled)
    monkeypatch.setattr(disk, "move", put)
    settled.register()
    assert store.stat().st_mtime > 0


def test_the_programs_own_files_count(settled: Workspace) -> None:
    memo = Path(noop.memo_path(str(settled.root), os.environ)).read_text()
    for file in (PROJECT / "vzrepro").rglob("*.py"):
        assert f"\t{file}\n" in memo


def test_an_edit_of_a_module_in_a_nested_package_is_seen(
    settled: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "vzrepro"
    shutil.copytree(PROJECT / "vzrepro", program, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(vzrepro, "__file__", str(program / "__init__.py"))
    Path(noop.memo_path(str(settled.root), os.environ)).unlink()
    settled.settle()
    with (program / "store/database.py").open("a") as file:
        file.write("# an edit\n")
    assert [settled.remembered(command) for command in ASKED] == [None, None]


def test_a_damaged_memo_is_a_miss(settled: Workspace) -> None:
    memo = Path(noop.memo_path(str(settled.root), os.environ))
    whole = memo.read_bytes()
    for damaged in (b"", b"\xff" * 100, whole[: len(whole) // 2], whole.replace(b"vzrepro memo", b"vzrepro note", 1)):
        memo.write_bytes(damaged)
        assert [settled.remembered(command) for command in ASKED] == [None, None]
    settled.settle()


def test_a_memo_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: str, _place: str) -> None:
        raise OSError(28, "No space left on device")

    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(os, "replace", full)
    noop.remember_names(str(tmp_path), environ, 1 << 62, [], ["a"])
    assert list(Path(noop.memo_path(str(tmp_path), environ)).parent.iterdir()) == []
