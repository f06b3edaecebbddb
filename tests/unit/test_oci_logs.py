"""What a container printed is kept in bounded files, whatever the disk does, and read while it grows."""

from __future__ import annotations

import os
import resource
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import logs
from vzrepro.guest.vm.logs import BoundedFile, LogPosition, OutputLog, OutputStanding


def piece(data: bytes, inode: int = 7, offset: int = 0) -> bytes:
    return struct.pack("<QQI", inode, offset, len(data)) + data


def kept(directory: Path) -> bytes:
    return b"".join(logs.read(directory, follow=False, is_alive=lambda: False))


@pytest.fixture
def full(tmp_path: Path) -> Iterator[object]:
    """Call it to have files of this process end after so many bytes, as on a full disk; with None as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    limit(None)


def test_pieces_come_cut_anywhere(tmp_path: Path) -> None:
    output = OutputLog(tmp_path)
    assert output.place is None
    stream = piece(b"one ") + piece(b"two\n", offset=4) + piece(b"three", inode=8)
    for number in range(len(stream)):
        output.take(stream[number : number + 1])
    assert kept(tmp_path) == b"one two\nthree"
    assert output.place == LogPosition(8, 5)
    assert logs.standing(tmp_path) == OutputStanding.OPEN
    output.end()
    assert logs.standing(tmp_path) == OutputStanding.ENDED


def test_a_piece_that_was_cut_off_is_asked_for_again(tmp_path: Path) -> None:
    output = OutputLog(tmp_path)
    output.take(piece(b"whole") + piece(b"half", offset=5)[:-2])
    output.begin()
    assert output.place == LogPosition(7, 5)
    output.take(piece(b"half", offset=5))
    assert kept(tmp_path) == b"wholehalf"


def test_a_piece_of_a_size_that_no_agent_sends_is_refused(tmp_path: Path) -> None:
    """It would be waited for in memory."""
    output = OutputLog(tmp_path)
    output.take(piece(bytes(1 << 20)))
    with pytest.raises(VzreproError, match="not what it should be"):
        output.take(struct.pack("<QQI", 7, 0, (1 << 32) - 1))


def test_what_the_guest_lost_is_told_on_a_line_of_its_own(tmp_path: Path) -> None:
    output = OutputLog(tmp_path)
    output.take(piece(b"cut in the") + piece(b"", inode=0) + piece(b"middle\n"))
    first, note, last = kept(tmp_path).splitlines()
    assert (first, last) == (b"cut in the", b"middle")
    assert b"output is missing here" in note


def test_an_output_stays_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    output = OutputLog(tmp_path, limit=100)
    for number in range(1000):
        output.take(piece(f"line {number}\n".encode()))
    lines = kept(tmp_path).split(b"\n")[:-1]
    assert lines[-1] == b"line 999"
    assert lines == [f"line {number}".encode() for number in range(1000 - len(lines), 1000)]
    assert all(path.stat().st_size <= 100 for path in tmp_path.iterdir())
    assert 100 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 200


def test_a_full_disk_is_told_while_it_is_full_and_afterwards(tmp_path: Path, full: object) -> None:
    output = OutputLog(tmp_path)
    full(10)  # type: ignore[operator]
    output.take(piece(b"0123456789ab"))
    output.take(piece(b"cd"))
    assert logs.standing(tmp_path) == OutputStanding.FULL
    assert kept(tmp_path) == b"0123456789"
    full(None)  # type: ignore[operator]
    output.take(piece(b"ef\n"))
    assert logs.standing(tmp_path) == OutputStanding.OPEN
    assert kept(tmp_path) == b"0123456789\n[vzrepro: 4 bytes are missing here: File too large]\nef\n"


@pytest.mark.parametrize("room_at_the_end", [True, False])
def test_a_container_that_ends_on_a_full_disk(tmp_path: Path, full: object, room_at_the_end: bool) -> None:
    output = OutputLog(tmp_path)
    full(2)  # type: ignore[operator]
    output.take(piece(b"0123"))
    if room_at_the_end:
        full(None)  # type: ignore[operator]
    output.end()
    assert logs.standing(tmp_path) == (OutputStanding.ENDED if room_at_the_end else OutputStanding.CUT)
    assert (b"2 bytes are missing here" in kept(tmp_path)) == room_at_the_end


def test_what_cannot_be_followed_any_more_is_cut(tmp_path: Path) -> None:
    output = OutputLog(tmp_path)
    output.give_up()
    assert logs.standing(tmp_path) == OutputStanding.CUT
    assert b"missing" in kept(tmp_path)


def test_who_follows_gets_everything_through_rotations_to_the_end(tmp_path: Path) -> None:
    output = OutputLog(tmp_path, limit=1 << 20)
    got = bytearray()
    seen = threading.Event()

    def follow() -> None:
        for data in logs.read(tmp_path, follow=True, is_alive=lambda: True):
            got.extend(data)
            seen.set()

    reader = threading.Thread(target=follow)
    reader.start()
    wanted = bytearray()
    for number in range(40):
        block = bytes([number]) * 100_000
        wanted += block
        output.take(piece(block))
        # In step, or a rotation may be faster than the reader: one that lags by a whole file loses it.
        while len(got) < len(wanted) - (1 << 19):
            assert seen.wait(PATIENCE_SECS)
            seen.clear()
    output.end()
    reader.join(PATIENCE_SECS)
    assert got == wanted


def test_who_follows_ends_with_whoever_keeps_it(tmp_path: Path) -> None:
    OutputLog(tmp_path).take(piece(b"last words"))
    assert b"".join(logs.read(tmp_path, follow=True, is_alive=lambda: False)) == b"last words"
    assert logs.standing(tmp_path) == OutputStanding.OPEN


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "output").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError):
        kept(tmp_path)


def test_a_bounded_file_keeps_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    bounded = BoundedFile(path, limit=8, descriptor=descriptor)
    for text in (b"one\n", b"two\n", b"three\n"):
        bounded.write(text)
    os.write(descriptor, b"by others\n")
    assert path.read_bytes() == b"three\nby others\n"
    assert (tmp_path / "log.1").read_bytes() == b"one\ntwo\n"
    os.close(descriptor)
