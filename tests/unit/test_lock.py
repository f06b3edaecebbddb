"""lock.toml: what is written is read back, comments stay, and mistakes are named."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError
from vzrepro.base.model import FileHash, NarHash
from vzrepro.recipe.lock import (
    CratePin,
    CrateSetPin,
    DebPin,
    ImagePin,
    Lock,
    PinnedFile,
    PinnedTree,
    SourcePin,
    load,
    parse,
)
from vzrepro.recipe.lock.writing import render


def _file(url: str, size: int = 7) -> PinnedFile:
    return PinnedFile(f"mirror://{url}", FileHash.of(url.encode()), size)


def _deb(name: str, arch: str = "amd64") -> DebPin:
    return DebPin(name, "1.0-1", arch, _file(f"debian/pool/main/{name[0]}/{name}_1.0-1_{arch}.deb"))


def _crate(name: str, version: str = "1.0.0") -> CratePin:
    return CratePin(name, version, _file(f"crates/{name}/{version}"))


REQUEST = "ab" * 32
FULL = Lock(
    sources={
        "linux": SourcePin(REQUEST, "6.12.117", _file("debian/pool/main/l/linux/linux.orig.tar.xz")),
        "one": SourcePin(REQUEST, "v1", PinnedTree("https://git.example/one", "ab" * 20, NarHash("cd" * 32), 1234)),
        "two": SourcePin(REQUEST, "v2", PinnedTree("mirror://x/two", "ef" * 32, NarHash("cd" * 32), 9)),
    },
    images={
        ("c", "linux/amd64"): ImagePin(REQUEST, "20261121T091544Z", (_deb("bash"), _deb("gcc"))),
        ("c", "linux/arm64"): ImagePin(REQUEST, "20261121T091544Z", (_deb("bash", "arm64"),)),
    },
    crate_sets={"youki": CrateSetPin(REQUEST, (_crate("anyhow"), _crate("anyhow", "2.0.0")))},
)


FULL_LINUX = FileHash.of(b"debian/pool/main/l/linux/linux.orig.tar.xz")


def test_round_trip() -> None:
    assert parse(render(FULL)) == FULL
    assert render(parse(render(FULL)), render(FULL)) == render(FULL)


names = st.text("abcxyz", min_size=1, max_size=4)


@given(
    st.dictionaries(names, st.integers(0, 2**40), max_size=4),
    st.dictionaries(names, st.sets(names, min_size=1, max_size=4), max_size=3),
)
def test_any_lock_round_trips_over_any_other(sources: dict[str, int], sets: dict[str, set[str]]) -> None:
    lock = Lock(
        sources={name: SourcePin(REQUEST, "1", _file(f"debian/{name}", size)) for name, size in sources.items()},
        crate_sets={
            name: CrateSetPin(REQUEST, tuple(_crate(crate) for crate in sorted(crates)))
            for name, crates in sets.items()
        },
    )
    assert parse(render(lock, render(FULL))) == lock
    assert parse(render(FULL, render(lock))) == FULL


def test_comments_survive() -> None:
    text = render(FULL)
    for before, after in (
        ('"debian/pool/main/g/gcc_1.0-1_amd64.deb" =', '# why gcc\n"debian/pool/main/g/gcc_1.0-1_amd64.deb" ='),
        ("[source.linux]", "# about the kernel\n[source.linux] # behind the header"),
        ('version = "6.12.117"', 'version = "6.12.117" # behind the value'),
    ):
        assert before in text
        text = text.replace(before, after, 1)
    again = render(parse(text), text)
    for comment in ("# why gcc\n", "# about the kernel", "# behind the header", "# behind the value"):
        assert comment in again
    assert '# why gcc\n"debian/pool/main/g/gcc_1.0-1_amd64.deb" =' in again
    assert parse(again) == FULL


def test_one_record_per_file_and_line() -> None:
    lock = Lock(
        images={
            (name, "linux/amd64"): ImagePin(REQUEST, "20261121T091544Z", (_deb("bash"), _deb("gcc")))
            for name in ("one", "two")
        }
    )
    text = render(lock)
    assert text.count("sha256 =") == 2
    records = [line for line in text.splitlines() if "sha256 =" in line]
    assert records == sorted(records)


def test_no_host_is_written() -> None:
    text = render(FULL).replace("mirror://", "").replace("https://git.example", "")  # which the recipe has
    assert "://" not in text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("format = 1\n[", "not valid TOML"),
        ("format = 1\nx = " + "9" * 5000, "not valid TOML"),
        ("format = 1\nx = " + "[" * 5000, "not valid TOML"),
        (render(FULL).replace('"https://git.example/one"', '"http://["'), "source.one.url"),
        ("format = 2\n", "format 2"),
        ("", "format: Field required"),
        ("format = 1\nunknown = 1\n", "unknown: there is no such key"),
        (render(FULL).replace(FULL_LINUX.hex, "zz"), "source.linux.sha256"),
        (render(FULL).replace("size = 7", "size = -7", 1), "source.linux.size"),
        (render(FULL).replace('commit = "abab', 'commit = "-bab'), "source.one.commit"),
        (render(FULL).replace('"gcc:amd64" = "debian', '"gcc:amd64" = "elsewhere'), "which has no [deb] record"),
        (render(FULL).replace('"anyhow-1.0.0" = "anyhow/1', '"anyhow-1.0.0" = "anyhow/9'), "has no [crate] record"),
    ],
)
def test_mistakes_are_named(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message


@settings(max_examples=100)
@given(st.sampled_from(render(FULL).splitlines()), st.sampled_from(["1", '""', "[]", "{}", "[1]", "{ a = 1 }", "true"]))
def test_any_value_in_a_lock_is_read_or_named(line: str, value: str) -> None:
    key, equals, _ = line.partition(" = ")
    text = render(FULL).replace(line, f"{key} = {value}" if equals else f"{line}\nx = {value}", 1)
    with contextlib.suppress(UsageError):
        assert isinstance(parse(text), Lock)


def test_missing_file_is_an_empty_lock(tmp_path: Path) -> None:
    assert load(tmp_path / "lock.toml") == Lock()


def test_snapshot_is_the_newest() -> None:
    assert FULL.snapshot() == "20261121T091544Z"
    assert Lock().snapshot() is None
