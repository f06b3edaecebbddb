"""What macOS lacks is taken away, and what takes its place is run."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.folding import IGNORED, fold
from vzrepro.base import config, disk
from vzrepro.base.errors import VzreproError
from vzrepro.cli import doctor
from vzrepro.guest.vm import dial, qemu

ROOT = Path(__file__).parents[2]
_F_FULLFSYNC = 51


def test_the_store_needs_none_of_it() -> None:
    files = [f"tests/unit/test_{name}.py" for name in ("store", "transfer")]
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "tests.taken_away", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cores_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert config.host_cores() == 7


def _renames(result: int) -> Callable[[bytes, bytes, int], int]:
    """macOS's renamex_np(2); `result` is its error number, or 0."""

    def renamex_np(one: bytes, other: bytes, flags: int) -> int:
        assert flags == 2
        if result:
            ctypes.set_errno(result)
            return -1
        os.rename(one, one + b".aside")  # noqa: PTH104
        os.rename(other, one)  # noqa: PTH104
        os.rename(one + b".aside", other)  # noqa: PTH104
        return 0

    return renamex_np


@pytest.mark.parametrize(
    ("libc", "swaps"),
    [
        (SimpleNamespace(renamex_np=_renames(0)), True),
        (SimpleNamespace(renamex_np=_renames(errno.ENOTSUP)), False),
        (SimpleNamespace(), False),
    ],
)
def test_trees_are_swapped_or_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, libc: SimpleNamespace, swaps: bool
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / path.name).touch()
        path.chmod(0o555)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_options: libc)
    assert disk.exchange(one, other) == swaps
    assert [path.name for path in one.iterdir()] == ["other" if swaps else "one"]
    assert [path.name for path in other.iterdir()] == ["one" if swaps else "other"]
    assert {one.stat().st_mode & 0o777, other.stat().st_mode & 0o777} == {0o555}


def test_a_swap_that_fails_is_an_error_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").write_text("one")
    (tmp_path / "other").write_text("other")
    monkeypatch.setattr(ctypes, "CDLL", lambda *_args, **_options: SimpleNamespace(renamex_np=_renames(errno.EIO)))
    with pytest.raises(OSError, match="Input/output error"):
        disk.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one").read_text() == "one"


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which flushes were asked for, on a system with F_FULLFSYNC."""
    done: list[str] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", _F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda _fd, command: done.append("drive" if command == 51 else str(command)))
    monkeypatch.setattr(os, "fsync", lambda _fd: done.append("file"))
    return done


def test_a_sync_goes_through_the_drives_cache(tmp_path: Path, flushed: list[str]) -> None:
    disk.write_file(tmp_path / "file", b"content")
    assert flushed == ["drive", "drive"]


def test_of_many_files_the_drives_cache_is_emptied_once(tmp_path: Path, flushed: list[str]) -> None:
    for number in range(3):
        (tmp_path / "tree" / str(number)).mkdir(parents=True)
    disk.sync_trees([tmp_path / "tree"])
    assert flushed == [*["file"] * 4, "drive"]


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.EINVAL, errno.ENOTTY])
def test_a_share_that_cannot_is_synced_as_well_as_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[str], number: int
) -> None:
    def refuse(_fd: int, _command: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    disk.sync(tmp_path)
    assert flushed == ["file"]


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[str]) -> None:
    def fail(_fd: int, _command: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", fail)
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync(tmp_path)
    assert flushed == []


def test_there_is_no_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(qemu, "VHOST_VSOCK", os.devnull)
    assert not qemu.kernel_vsock_usable()
    with pytest.raises(OSError, match="not supported"):
        dial.dial_vsock(3, 1024)


def test_no_guest_is_booted(monkeypatch: pytest.MonkeyPatch) -> None:
    qemu.require_linux()
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(VzreproError, match="no guest can be booted on Darwin"):
        qemu.require_linux()


def test_doctor_says_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    session: Any = None
    assert "need Linux" not in doctor._host(session)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert "vm and oci run do not work here" in doctor._host(session)
    assert doctor._qemu(session) == "not used on this host"


@pytest.mark.parametrize("ignored", IGNORED)
def test_doctor_asks_the_stores_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ignored: str) -> None:
    session: Any = SimpleNamespace(config=SimpleNamespace(store=tmp_path / "store"))
    monkeypatch.setattr(doctor, "_ROOM_BYTES", 0)
    assert "Unicode" not in doctor._store(session)
    with monkeypatch.context() as context:
        fold(context, tmp_path, ignored)
        if ignored == "case":
            with pytest.raises(VzreproError, match="ignores the case of names"):
                doctor._store(session)
        else:
            assert "takes two Unicode forms of a name for one" in doctor._store(session)
