"""lock.toml: what is written is read back, comments stay, and mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro.errors import UsageError
from vzrepro.lock import CratePin, CrateSetPin, DebPin, ImagePin, Lock, PinnedFile, SourcePin, load, parse, render
from vzrepro.model import FileHash


def _file(url: str, size: int = 7) -> PinnedFile:
    return PinnedFile(f"mirror://{url}", FileHash.of(url.encode()), size)


def _deb(name: str, arch: str = "amd64") -> DebPin:
    return DebPin(name, "1.0-1", arch, _file(f"debian/pool/main/{name[0]}/{name}_1.0-1_{arch}.deb"))


def _crate(name: str, version: str = "1.0.0") -> CratePin:
    return CratePin(name, version, _file(f"crates/{name}/{version}"))


REQUEST = "ab" * 32
FULL = Lock(
    sources={"linux": SourcePin(REQUEST, "6.12.117", _file("debian/pool/main/l/linux/linux.orig.tar.xz"))},
    images={
        ("c", "linux/amd64"): ImagePin(REQUEST, "20261121T091544Z", (_deb("bash"), _deb("gcc"))),
        ("c", "linux/arm64"): ImagePin(REQUEST, "20261121T091544Z", (_deb("bash", "arm64"),)),
    },
    crate_sets={"youki": CrateSetPin(REQUEST, (_crate("anyhow"), _crate("anyhow", "2.0.0")))},
)


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
    assert "://" not in render(FULL).replace("mirror://", "")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("format = 1\n[", "not valid TOML"),
        ("format = 2\n", "format 2"),
        ("", "format: Field required"),
        ("format = 1\nunknown = 1\n", "unknown: there is no such key"),
        (render(FULL).replace(FULL.sources["linux"].file.sha256.hex, "zz"), "source.linux.sha256"),
        (render(FULL).replace("size = 7", "size = -7", 1), "source.linux.size"),
        (render(FULL).replace('"gcc:amd64" = "debian', '"gcc:amd64" = "elsewhere'), "which has no [deb] record"),
        (render(FULL).replace('"anyhow-1.0.0" = "anyhow/1', '"anyhow-1.0.0" = "anyhow/9'), "has no [crate] record"),
    ],
)
def test_mistakes_are_named(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert complaint in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_file_is_an_empty_lock(tmp_path: Path) -> None:
    assert load(tmp_path / "lock.toml") == Lock()


def test_snapshot_is_the_newest() -> None:
    assert FULL.snapshot() == "20261121T091544Z"
    assert Lock().snapshot() is None
