"""What the store needs from a file system, where the trees are odd."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from vzrepro.base import disk
from vzrepro.base.errors import Interrupted, TimedOut


def deep(top: Path, levels: int) -> None:
    """Directories inside directories, far beyond the longest path, with a file in the last one."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("f", os.O_WRONLY | os.O_CREAT, dir_fd=fd))
    os.close(fd)


def test_a_deep_tree_is_counted_and_removed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    deep(top, 5000)
    assert disk.usage(top, 1 << 40) >= 5001 * 4096
    disk.remove_tree(top)
    assert not top.exists()


def test_holes_and_links_do_not_count(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "full").write_bytes(os.urandom(1 << 20))
    (tmp_path / "again").hardlink_to(tmp_path / "full")
    assert 1 << 20 <= disk.usage(tmp_path, 1 << 40) < 2 << 20


def test_empty_files_count(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number}").touch()
    assert disk.usage(tmp_path, 1 << 40) >= 100 * 4096
    assert disk.usage(tmp_path, 10 * 4096) == 11 * 4096, "it has seen enough"


def test_a_directory_that_is_closed_does_not_end_the_counting(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").write_bytes(os.urandom(1 << 16))
    assert disk.usage(tmp_path, 1 << 40) >= 1 << 16


def test_removing_ends_when_it_is_told(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for number in range(10):
        (top / str(number)).mkdir(parents=True)
    calls = 0

    def go_on() -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        disk.remove_tree(top, go_on)
    assert 0 < len(list(top.iterdir())) < 10


def test_removing_has_a_limit_and_a_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(disk.time, "monotonic", lambda: now)
    stop = threading.Event()
    limited, stopped = disk.until_stopped(None, 10), disk.until_stopped(stop, None)
    now = 110.0
    limited()
    stop.set()
    stopped()
    now += disk.GRACE_SECS + 1
    with pytest.raises(TimedOut):
        limited()
    with pytest.raises(Interrupted):
        stopped()


@pytest.mark.parametrize("count", [3, 100])
def test_trees_of_any_depth_are_synced(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
    (tmp_path / "tree" / "link").symlink_to("nowhere")
    disk.sync_trees([tmp_path / "tree", tmp_path / "tree" / "link"])


def test_a_deep_tree_is_walked(tmp_path: Path) -> None:
    for depth in range(1, 1501):
        os.mkdir(f"{tmp_path}{'/d' * depth}")  # noqa: PTH102 - as Path.mkdir is slow at this depth
    (tmp_path / "d" / "file").touch()
    (tmp_path / "link").symlink_to("d")
    (tmp_path / "left" / "out").mkdir(parents=True)
    errors: list[OSError] = []
    seen = []
    for directory, folders, files in disk.walk(tmp_path, errors.append):
        folders[:] = [name for name in folders if name != "left"]
        seen.append((directory, sorted(folders), files))
    assert seen[:2] == [(tmp_path, ["d", "link"], []), (tmp_path / "d", ["d"], ["file"])]
    assert len(seen) == 1501 and errors == []
    assert list(disk.walk(tmp_path / "missing", errors.append)) == [] and len(errors) == 1
    disk.remove_tree(tmp_path / "d")
