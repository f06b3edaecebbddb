"""What keeps objects in a shared cache: adding, listing and removing roots, over every backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.test_binary_cache import KEY, make
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.base.model import StorePath
from vzrepro.cache import Backend, Damaged, TrustedKeys
from vzrepro.cache.backend import FRESH_SECS
from vzrepro.cache.narinfo import NarInfo, narinfo_key
from vzrepro.cache.notice import NOTICE_SECS, NOTICES, announced, settle
from vzrepro.cache.roots import CacheRoot, Lacking, add_root, read_roots, remove_root, root_key


def pushed(backend: Backend, root: Path, name: str, *references: StorePath) -> StorePath:
    made = make(root, name, name.encode())
    cache = new_cache(backend, TrustedKeys([KEY.public]), KEY)
    cache.push(replace(made.info, references=references), made.tree, derivation=made.derivation, log=made.log)
    return made.info.path


def path(letter: str) -> StorePath:
    return StorePath.parse(f"{letter * 32}-{letter}")


def test_a_root_is_added_listed_replaced_and_removed(backend: Backend, tmp_path: Path) -> None:
    one, two = pushed(backend, tmp_path, "one"), pushed(backend, tmp_path, "two")
    assert read_roots(backend) == []
    added = add_root(backend, "release-1.0", [two, one, one])
    assert added.paths == tuple(sorted((one, two)))
    add_root(backend, "main", [one])
    assert [root.name for root in read_roots(backend)] == ["main", "release-1.0"]
    assert read_roots(backend)[1] == added
    add_root(backend, "release-1.0", [one])
    assert read_roots(backend)[1].paths == (one,)
    assert remove_root(backend, "release-1.0")
    assert not remove_root(backend, "release-1.0")
    assert [root.name for root in read_roots(backend)] == ["main"]


def test_the_entry_is_the_documented_one() -> None:
    root = CacheRoot("main", 1_700_000_000, (path("a"), path("b")))
    assert root.render() == (
        b'{"format":1,"made":1700000000,"name":"main","paths":['
        b'"/nix/store/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a","/nix/store/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-b"],"type":"root"}'
    )
    assert root_key("main") == "roots/main.json"
    assert CacheRoot.parse(root.render(), "main") == root


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ü", "a\n", "x" * 251])
def test_a_bad_name_is_refused(name: str) -> None:
    backend = MemoryBackend()
    with pytest.raises(UsageError, match="not a name for a root"):
        add_root(backend, name, [path("a")])
    with pytest.raises(UsageError, match="not a name for a root"):
        remove_root(backend, name)
    assert backend.entries == {}


def test_a_root_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a path"):
        add_root(MemoryBackend(), "main", [])


def test_what_the_cache_lacks_is_named_and_the_root_stays(backend: Backend, tmp_path: Path) -> None:
    inner = path("b")
    outer = pushed(backend, tmp_path, "outer", inner)
    with pytest.raises(Lacking) as caught:
        add_root(backend, "main", [outer, path("a")])
    assert caught.value.paths == (path("a"), inner)
    assert str(inner) in str(caught.value)
    assert "vzrepro cache push" in str(caught.value)
    assert len(read_roots(backend)) == 1


@pytest.mark.parametrize("harm", ["nar gone", "nar cut", "narinfo broken", "another's narinfo"])
def test_what_is_damaged_is_lacking(backend: Backend, tmp_path: Path, harm: str) -> None:
    one, other = pushed(backend, tmp_path, "one"), pushed(backend, tmp_path, "other")
    opened = backend.get(narinfo_key(one))
    assert opened is not None
    with opened as stream:
        url = NarInfo.parse(stream.read(1 << 20)).url
    if harm == "nar gone":
        backend.delete([url])
    elif harm == "nar cut":
        backend.put(url, b"cut")
    elif harm == "narinfo broken":
        backend.put(narinfo_key(one), b"broken\n")
    else:
        opened = backend.get(narinfo_key(other))
        assert opened is not None
        with opened as stream:
            backend.put(narinfo_key(one), stream.read(1 << 20))
    with pytest.raises(Lacking) as caught:
        add_root(backend, "main", [one])
    assert caught.value.paths == (one,)


def test_adding_makes_what_is_old_in_the_closure_young(tmp_path: Path) -> None:
    time = [1_000_000.0]
    backend = MemoryBackend(lambda: time[0])
    inner = pushed(backend, tmp_path, "inner")
    time[0] += FRESH_SECS / 2
    outer = pushed(backend, tmp_path, "outer", inner)
    time[0] += FRESH_SECS - 10
    add_root(backend, "main", [outer])
    used = backend.used
    assert used[narinfo_key(inner)] == time[0]
    nars = sorted(used[key] for key in used if key.startswith("nar/"))
    assert nars == [time[0] - FRESH_SECS + 10, time[0]]


GOOD = {"format": 1, "type": "root", "name": "main", "made": 1, "paths": [f"/nix/store/{'a' * 32}-a"]}


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("roots/main.json", b""),
        ("roots/main.json", b"[]"),
        ("roots/main.json", b"\xff"),
        ("roots/main.json", b"[" * 100_000),
        ("roots/readme", b"hello"),
        ("roots/sub/main.json", json.dumps(GOOD).encode()),
        ("roots/other.json", json.dumps(GOOD).encode()),
        *(
            ("roots/main.json", json.dumps(GOOD | change).encode())
            for change in (
                {"format": 2},
                {"format": 1.5},
                {"type": "other"},
                {"paths": []},
                {"paths": None},
                {"paths": ["a"]},
                {"paths": [1]},
                {"paths": ["/nix/store/x"]},
                {"made": "now"},
                {"made": True},
                {"more": 1},
            )
        ),
    ],
)
def test_a_root_that_is_not_understood_is_an_error_that_names_it(key: str, content: bytes) -> None:
    backend = MemoryBackend()
    backend.put(key, content)
    with pytest.raises(Damaged) as caught:
        read_roots(backend)
    assert key in caught.value.message
    backend.put("roots/main.json", json.dumps(GOOD).encode())
    if key == "roots/main.json":
        assert [root.name for root in read_roots(backend)] == ["main"]


# --- notices ----------------------------------------------------------------------------------------------------------


def test_without_a_notice_nobody_waits(backend: Backend) -> None:
    settle(backend, pause=lambda _secs: pytest.fail("waits"))
    with announced(backend):
        assert len(list(backend.list(NOTICES))) == 1
    settle(backend, pause=lambda _secs: pytest.fail("waits"))
    assert list(backend.list(NOTICES)) == []


def test_a_notice_is_waited_for_and_later_ones_are_not(backend: Backend) -> None:
    first, second = announced(backend), announced(backend)
    first.__enter__()
    pauses = []

    def pause(secs: float) -> None:
        pauses.append(secs)
        if len(pauses) == 1:
            second.__enter__()
        if len(pauses) == 2:
            first.__exit__(None, None, None)

    settle(backend, pause=pause)
    assert len(pauses) == 2
    second.__exit__(None, None, None)


def test_what_a_crash_leaves_is_waited_for_only_so_long() -> None:
    time = [1_000_000.0]
    backend = MemoryBackend(lambda: time[0])
    left = announced(backend)
    left.__enter__()

    def pause(secs: float) -> None:
        time[0] += secs

    settle(backend, pause=pause)
    assert NOTICE_SECS < time[0] - 1_000_000 < NOTICE_SECS + 5
    assert [entry.key for entry in backend.list(NOTICES)] != []
    left.__exit__(None, None, None)


def test_a_deletion_long_after_its_notice_is_refused() -> None:
    time = [1_000_000.0]
    backend = MemoryBackend(lambda: time[0])
    with announced(backend) as notice:
        notice.check()
        time[0] += NOTICE_SECS / 2
        with pytest.raises(RemoteError, match="too slow"):
            notice.check()
