"""The no-op path answers only when the long way would give the same answer."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import LOW_SH, SMALL, Cli
from vzrepro import noop


def _answers(cli: Cli, *targets: str) -> list[str] | None:
    """What the no-op path itself says for this command, in this process."""
    before = Path.cwd()
    os.chdir(cli.root)
    try:
        text = noop.answer(["realize", *targets], cli.environment(), terminal=False)
        return None if text is None else text.splitlines()
    finally:
        os.chdir(before)


@pytest.fixture
def settled(small: Cli) -> Cli:
    """`small`, realized, with files old enough to be trusted, and the no-op path in use."""
    time.sleep(0.1)
    small.realize("high")
    assert _answers(small, "high") == [str(path) for path in small.realize("high")]
    return small


def _edit_recipe(cli: Cli) -> None:
    cli.write(small=SMALL + "\n# an edit\n")


def _edit_input(cli: Cli) -> None:
    (cli.root / "recipes/small/low.sh").write_text(LOW_SH + "# an edit\n")


def _edit_input_same_size(cli: Cli) -> None:
    (cli.root / "recipes/small/low.sh").write_text(LOW_SH.replace("low", "LOW"))


def _edit_lock(cli: Cli) -> None:
    with (cli.root / "lock.toml").open("a") as file:
        file.write("# an edit\n")


def _new_config(cli: Cli) -> None:
    (cli.root / "pyproject.toml").write_text('[tool.vzrepro]\nplatform = "linux/amd64"\n')


def _new_recipe(cli: Cli) -> None:
    cli.write(another="# nothing\n")


def _remove_recipe_file(cli: Cli) -> None:
    (cli.root / "recipes/small/low.sh").unlink()


def _lose_object(cli: Cli) -> None:
    shutil.rmtree(cli.realize("high")[0])


def _lose_file(cli: Cli) -> None:
    (cli.realize("high")[0] / "high").unlink()


def _change_file(cli: Cli) -> None:
    file = cli.realize("high")[0] / "high"
    data = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(data[::-1])
    os.utime(file, (1, 1))
    file.chmod(0o444)


def _collect(cli: Cli) -> None:
    cli.run("store", "gc")


@pytest.mark.parametrize(
    "edit",
    [
        _edit_recipe,
        _edit_input,
        _edit_input_same_size,
        _edit_lock,
        _new_config,
        _new_recipe,
        _remove_recipe_file,
        _lose_object,
        _lose_file,
        _change_file,
        _collect,
    ],
)
def test_every_change_is_seen(settled: Cli, edit: Callable[[Cli], None]) -> None:
    edit(settled)
    assert _answers(settled, "high") is None


def test_a_lost_object_comes_back(settled: Cli) -> None:
    high = settled.realize("high")[0]
    shutil.rmtree(high)
    assert settled.realize("high") == [high]
    assert (high / "high").read_text().startswith("low\n")


def test_another_store_is_another_answer(settled: Cli, tmp_path: Path) -> None:
    other = Cli(settled.root, tmp_path / "other", settled.env)
    assert _answers(other, "high") is None
    assert other.realize("high")[0].parent == tmp_path / "other"


def test_settings_count(settled: Cli) -> None:
    settled.env["VZREPRO_PLATFORM"] = "linux/arm64"
    assert _answers(settled, "high") is None


def test_targets_that_were_never_realized_are_not_answered(settled: Cli) -> None:
    assert _answers(settled, "low") is None
    low = settled.realize("low")
    assert _answers(settled, "low", "high") == [str(low[0]), str(settled.realize("high")[0])]


def test_a_file_changed_just_now_is_not_trusted(small: Cli) -> None:
    """An edit in the same clock tick could go unseen, so nothing is remembered then."""
    reads = small.root / "recipes/small/low.sh"
    reads.touch()
    touched = reads.stat().st_ctime_ns
    for begun, answer in ((touched, None), (touched + 10**7, None), (touched + 10**9, [str(small.root)])):
        noop.remember_realized(str(small.root), small.environment(), begun, [str(reads)], {"x": str(small.root)})
        assert _answers(small, "x") == answer
