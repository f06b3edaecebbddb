"""What every place for a cache's entries does (`vzrepro.cache.Backend`), and what a directory does beyond that."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import FileHash
from vzrepro.cache import Backend, DirectoryBackend

BAD_KEYS = [
    "",
    "/",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\0b",
    "a b",
    "a\\b",
    "ü",
    "a\n",
]


def content(backend: Backend, key: str) -> bytes | None:
    opened = backend.get(key)
    if opened is None:
        return None
    with opened as stream:
        return b"".join(iter(lambda: stream.read(7), b""))


def sized(backend: Backend, key: str) -> int | None:
    entry = backend.head(key)
    return None if entry is None else entry.size


def keys(backend: Backend, prefix: str = "") -> list[str]:
    return sorted(entry.key for entry in backend.list(prefix))


def test_an_empty_place_has_nothing(backend: Backend) -> None:
    assert backend.get("a.narinfo") is None
    assert backend.head("nar/a") is None
    assert keys(backend) == []
    backend.delete(["nar/a"])
    assert backend.url


def test_what_is_put_comes_back(backend: Backend, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"from a file" * 100_000)
    assert backend.put("a.narinfo", b"from bytes")
    assert backend.put("nar/b.nar.zst", source)
    assert backend.put("empty", b"")
    assert content(backend, "a.narinfo") == b"from bytes"
    assert content(backend, "nar/b.nar.zst") == source.read_bytes()
    assert content(backend, "empty") == b""
    assert sized(backend, "a.narinfo") == 10
    assert sized(backend, "empty") == 0
    assert source.exists()


def test_a_spooled_file_can_be_put_and_is_gone_in_the_end(backend: Backend) -> None:
    with backend.spool() as first, backend.spool() as second:
        assert first != second
        first.write_bytes(b"spooled")
        assert backend.put("nar/a", first)
    assert not first.exists()
    assert content(backend, "nar/a") == b"spooled"


def test_put_replaces_and_if_absent_does_not(backend: Backend, tmp_path: Path) -> None:
    source = tmp_path / "third"
    source.write_bytes(b"third")
    assert backend.put("a", b"one", if_absent=True)
    assert not backend.put("a", b"two", if_absent=True)
    assert not backend.put("a", source, if_absent=True)
    assert content(backend, "a") == b"one"
    assert backend.put("a", b"two")
    assert content(backend, "a") == b"two"


def test_of_many_that_put_if_absent_one_wins(backend: Backend) -> None:
    start = threading.Barrier(8)

    def put(number: int) -> bool:
        start.wait()
        return backend.put("build/x.json", str(number).encode() * 1000, if_absent=True)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(put, range(8)))
    assert won.count(True) == 1
    assert content(backend, "build/x.json") == str(won.index(True)).encode() * 1000


def test_an_open_entry_outlives_its_replacement_and_deletion(backend: Backend) -> None:
    backend.put("a", b"old" * 1000)
    opened = backend.get("a")
    assert opened is not None
    with opened as stream:
        backend.put("a", b"new")
        backend.delete(["a"])
        assert b"".join(iter(lambda: stream.read(100), b"")) == b"old" * 1000


def test_list_goes_by_prefix_and_tells_sizes(backend: Backend) -> None:
    for key in ("a.narinfo", "nar/aa", "nar/ab", "nar/b", "narrow", "log/x-y.drv"):
        backend.put(key, key.encode())
    assert keys(backend) == ["a.narinfo", "log/x-y.drv", "nar/aa", "nar/ab", "nar/b", "narrow"]
    assert keys(backend, "nar/") == ["nar/aa", "nar/ab", "nar/b"]
    assert keys(backend, "nar/a") == ["nar/aa", "nar/ab"]
    assert keys(backend, "nar") == ["nar/aa", "nar/ab", "nar/b", "narrow"]
    assert keys(backend, "absent/") == []
    assert {entry.key: entry.size for entry in backend.list("nar/a")} == {"nar/aa": 6, "nar/ab": 6}


def test_all_letters_of_keys_travel(backend: Backend) -> None:
    names = [f"log/{digits}-gtk+-3.0_x?y=z.drv" for digits in ("0", "1")]
    for name in names:
        backend.put(name, name.encode())
        assert content(backend, name) == name.encode()
        assert sized(backend, name) == len(name)
    assert keys(backend, "log/0-gtk+-3.0_x?") == names[:1]
    backend.delete(names)
    assert keys(backend) == []


def test_deleting_is_for_one_entry_and_may_be_repeated(backend: Backend) -> None:
    backend.put("nar/a", b"1")
    backend.put("nar/ab", b"2")
    backend.delete(["nar/a"])
    backend.delete(["nar/a"])
    assert keys(backend) == ["nar/ab"]


@pytest.mark.parametrize("key", BAD_KEYS)
def test_bad_keys_are_refused_everywhere(backend: Backend, key: str) -> None:
    uses = (
        backend.get,
        backend.head,
        backend.refresh,
        lambda key: backend.delete([key]),
        lambda key: backend.put(key, b""),
    )
    for use in uses:
        with pytest.raises(UsageError):
            use(key)


def test_what_is_told_of_an_entry_is_what_is_there(backend: Backend) -> None:
    digest = FileHash.of(b"data")
    backend.put("nar/a", b"data", sha256=digest)
    found = backend.head("nar/a")
    assert found is not None
    assert (found.key, found.size) == ("nar/a", 4)
    assert found.sha256 in (None, digest)


def test_refreshing_makes_an_entry_young_and_keeps_it_whole(backend: Backend) -> None:
    digest = FileHash.of(b"data")
    backend.put("nar/a", b"data", sha256=digest)
    before = backend.head("nar/a")
    assert before is not None
    time.sleep(1.1)  # some places count in seconds
    assert backend.refresh("nar/a")
    after = backend.head("nar/a")
    assert after is not None
    assert after.mtime > before.mtime
    assert after.sha256 == before.sha256
    assert content(backend, "nar/a") == b"data"
    assert not backend.refresh("nar/b")
    assert backend.head("nar/b") is None


def test_the_clock_is_the_one_that_entries_are_dated_by(backend: Backend) -> None:
    before = backend.now()
    backend.put("a", b"")
    entry = backend.head("a")
    assert entry is not None
    # Some places count in seconds, and an answer that tells the time is as old as it was slow; another clock would be
    # off by a time zone, or by years.
    assert before - 30 <= entry.mtime <= backend.now() + 30


def test_the_lock_is_granted_to_many_writers(backend: Backend) -> None:
    with backend.lock(exclusive=False), backend.lock(exclusive=False):
        backend.put("a", b"")


# --- a directory ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path: Path) -> DirectoryBackend:
    return DirectoryBackend(tmp_path / "cache")


def test_reading_makes_no_directory(directory: DirectoryBackend, tmp_path: Path) -> None:
    directory.get("a")
    directory.head("a")
    directory.delete(["a"])
    list(directory.list())
    assert list(tmp_path.iterdir()) == []


def test_entries_are_plain_files_and_nothing_else_stays(directory: DirectoryBackend, tmp_path: Path) -> None:
    directory.put("nar/a", b"data")
    directory.put("nar/a", b"other", if_absent=True)
    assert (tmp_path / "cache" / "nar" / "a").read_bytes() == b"data"
    assert [path for path in (tmp_path / "cache" / ".vzrepro").rglob("*") if path.is_file()] == []


def test_putting_a_file_shares_nothing_with_it(directory: DirectoryBackend, tmp_path: Path) -> None:
    source = tmp_path / "log"
    source.write_bytes(b"line\n")
    os.utime(source, (1, 1))
    directory.put("log/a", source)
    content(directory, "log/a")
    assert source.stat().st_mtime == 1
    source.write_bytes(b"changed")
    assert content(directory, "log/a") == b"line\n"


def test_foreign_things_are_tolerated(directory: DirectoryBackend, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    directory.put("nar/a", b"data")
    (root / "realisations").mkdir()
    (root / "log").mkdir()
    (root / "with blank").write_text("")
    (root / ".hidden").write_text("")
    (root / os.fsdecode(b"\xff\xfe")).write_text("")
    (root / "link").symlink_to("/etc/passwd")
    (root / "dangling").symlink_to("nowhere")
    (root / "readme.txt").write_text("hello")
    os.mkfifo(root / "fifo")
    assert keys(directory) == ["nar/a", "readme.txt"]
    for key in ("link", "dangling", "fifo", "realisations", "nar/a/b"):
        assert directory.head(key) is None
    assert directory.get("fifo") is None
    assert directory.get("realisations") is None
    with pytest.raises(RemoteError):
        directory.get("link")


def test_use_is_remembered(directory: DirectoryBackend, tmp_path: Path) -> None:
    directory.put("a", b"1")
    path = tmp_path / "cache" / "a"
    os.utime(path, (1, 1))
    assert next(directory.list()).mtime == 1
    opened = directory.get("a", use=False)
    assert opened is not None
    with opened:
        assert path.stat().st_mtime == 1
    content(directory, "a")
    assert path.stat().st_mtime > 1


def test_a_place_that_cannot_be_used_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = DirectoryBackend(tmp_path / "file")
    assert blocked.get("a") is None
    with pytest.raises(RemoteError, match="cannot write the cache") as caught:
        blocked.put("a", b"")
    assert "ls -ld" in str(caught.value)


def test_leftovers_go_after_a_day(directory: DirectoryBackend) -> None:
    with directory.spool() as old, directory.spool() as new:
        old.write_bytes(b"")
        new.write_bytes(b"")
        os.utime(old, (0, time.time() - 100_000))
        directory.sweep()
        assert (old.exists(), new.exists()) == (False, True)


def test_one_that_trims_waits_for_the_writers(directory: DirectoryBackend, tmp_path: Path) -> None:
    trims = threading.Event()

    def trim() -> None:
        with DirectoryBackend(tmp_path / "cache").lock(exclusive=True):
            trims.set()

    other = threading.Thread(target=trim, daemon=True)
    with directory.lock(exclusive=False):
        other.start()
        assert not trims.wait(0.05)
    assert trims.wait(PATIENCE_SECS)
    other.join()
