"""Copies of files, with the kernel's help and without; files that are there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vzrepro.base import disk

SIZES = (0, 1, 4096, (1 << 20) + 1, 3 << 20)


def _without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range")


def _refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)


def _in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda source, target, count: real(source, target, min(count, 3000)))


def _refused_halfway(monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = os.copy_file_range, []

    def once(source: int, target: int, count: int) -> int:
        asked.append(count)
        if len(asked) > 1:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(source, target, min(count, 5000))

    monkeypatch.setattr(os, "copy_file_range", once)


@pytest.mark.parametrize("system", [None, _without, _refused, _in_steps, _refused_halfway])
@pytest.mark.parametrize("size", SIZES)
def test_a_copy_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[pytest.MonkeyPatch], None] | None, size: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(size))
    if system is not None:
        system(monkeypatch)
    disk.copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("system", [None, _without])
def test_what_is_there_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[pytest.MonkeyPatch], None] | None
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("new")
    target.write_text("old")
    if system is not None:
        system(monkeypatch)
    with pytest.raises(FileExistsError):
        disk.copy_file(source, target)
    assert target.read_text() == "old"


@pytest.mark.parametrize("system", [None, _without])
def test_a_file_that_becomes_shorter_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: Callable[[pytest.MonkeyPatch], None] | None
) -> None:
    source = tmp_path / "source"
    source.write_text("whole")
    if system is not None:
        system(monkeypatch)
    real = os.fstat

    def fstat(fd: int) -> object:
        status = real(fd)
        source.write_text("")
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(OSError, match="became shorter"):
        disk.copy_file(source, tmp_path / "target")


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "source").write_text("x")
    with pytest.raises(OSError, match="No space left"):
        disk.copy_file(tmp_path / "source", tmp_path / "target")


# --- whole files


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was synced, a file or a directory, and whether `file` had its new content then."""
    done: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        file = tmp_path / "file"
        done.append((
            "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file",
            file.exists() and file.read_text() == "new",
        ))  # fmt: skip
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return done


@pytest.mark.parametrize("replace", [True, False])
def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, synced: list[tuple[str, bool]], replace: bool
) -> None:
    disk.write_file(tmp_path / "file", b"new", replace=replace)
    assert synced == [("file", False), ("directory", True)]


def test_what_may_be_lost_is_not_half_there(tmp_path: Path, synced: list[tuple[str, bool]]) -> None:
    (tmp_path / "file").write_text("old")
    disk.write_file(tmp_path / "file", b"new", durable=False)
    assert synced == [("file", False)]
    assert (tmp_path / "file").read_text() == "new"


def test_a_file_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with disk.whole_file(file) as opened:
        opened.write(b"new")
        opened.flush()
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_does_not_become_whole_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt), disk.whole_file(file) as opened:
        opened.write(b"new")
        raise KeyboardInterrupt
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_first_file_stays_where_none_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    disk.write_file(file, b"first", replace=False)
    with pytest.raises(FileExistsError):
        disk.write_file(file, b"second", replace=False)
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_has_its_mode_from_the_start(tmp_path: Path, mode: int) -> None:
    with disk.whole_file(tmp_path / "file", mode=mode):
        [temporary] = tmp_path.iterdir()
        assert stat.S_IMODE(temporary.stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "link").symlink_to("place")
    disk.write_file(tmp_path / "link" / "file", b"new")
    assert (tmp_path / "place" / "file").read_text() == "new"
