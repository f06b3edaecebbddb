"""A sandbox's directories as an archive, without an engine: what goes in, and what may not come out."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from vzrepro import sandbox
from vzrepro.base.errors import VzreproError
from vzrepro.sandbox import archive


def tar(*members: tuple[str, bytes, str | int | bytes]) -> bytes:
    """An archive: names, types, and a link's target, a mode or a file's content."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as packed:
        for name, kind, what in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            content = what if isinstance(what, bytes) else b""
            info.size, info.mode = len(content), what if isinstance(what, int) else 0o755
            info.linkname = what if isinstance(what, str) else ""
            packed.addfile(info, io.BytesIO(content))
    return made.getvalue()


OUT = ("out/", tarfile.DIRTYPE, 0o777)
FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


def unpack(data: bytes, place: Path) -> int:
    return archive.unpack(io.BytesIO(data), place / "out", lambda _: None)


def test_what_the_engine_gives_is_made(tmp_path: Path) -> None:
    hole = bytes(1 << 20) + b"end"
    members = [OUT, ("out/d", tarfile.DIRTYPE, 0o500), ("out/d/f", FILE, hole), ("out/l", LINK, "./d//f")]
    assert unpack(tar(*members, ("out/h", HARD, "out/d/f")), tmp_path) == 4
    out = tmp_path / "out"
    assert (out / "d" / "f").read_bytes() == hole
    assert (out / "d" / "f").stat().st_blocks * 512 < 1 << 19
    assert (out / "h").samefile(out / "d" / "f")
    assert os.readlink(out / "l") == "./d//f"  # noqa: PTH115 - as it is
    assert (out / "d").stat().st_mode & 0o777 == (0o500 if os.geteuid() == 0 else 0o700)


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([], "is empty"),
        ([("out", FILE, b"")], "no directory at its beginning"),
        ([OUT, OUT], "no directory at its beginning"),
        ([OUT, ("out/../../x", FILE, b"")], "in no directory of it"),
        ([OUT, ("out/..", FILE, b"")], "in no directory of it"),
        ([OUT, ("out/a/b", FILE, b"")], "in no directory of it"),
        ([OUT, ("out/a", LINK, "/tmp"), ("out/a/b", FILE, b"")], "in no directory of it"),
        ([OUT, ("out/a", HARD, "/etc/passwd")], "a link to what is not in it"),
        ([OUT, ("out/a", HARD, "out/../a")], "a link to what is not in it"),
        ([OUT, ("out/a", tarfile.CHRTYPE, 0o644)], "of no kind"),
    ],
)
def test_an_archive_that_leads_elsewhere_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes, str | int | bytes]], why: str
) -> None:
    with pytest.raises(tarfile.TarError, match=why):
        unpack(tar(*members), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def test_an_archive_that_ends_early_is_refused(tmp_path: Path) -> None:
    whole = tar(OUT, ("out/file", FILE, b"x" * 5000))
    for size in (0, 100, 3000):
        (tmp_path / str(size)).mkdir()
        with pytest.raises(tarfile.TarError):
            unpack(whole[:size], tmp_path / str(size))


def test_two_names_of_one_file_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match="exists already"):
        unpack(tar(OUT, ("out/a", FILE, b"one"), ("out/a", FILE, b"two")), tmp_path)


def test_a_tree_may_be_as_deep_as_a_store_object(tmp_path: Path) -> None:
    deep = [("out" + "/d" * depth, tarfile.DIRTYPE, 0o755) for depth in range(1, 200)]
    assert unpack(tar(OUT, *deep), tmp_path) == 199
    (tmp_path / "more").mkdir()
    with pytest.raises(VzreproError, match="nested too deeply"):
        unpack(tar(OUT, *deep, ("out" + "/d" * 200, tarfile.DIRTYPE, 0o755)), tmp_path / "more")


@pytest.mark.parametrize("staging", ["link", "copy"])
def test_inputs_are_packed_as_they_would_be_staged(tmp_path: Path, staging: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"data")
    (source / "file").chmod(0o444)
    os.utime(source / "file", ns=(0, 1_234_567_890_987_654_321))
    os.utime(source, (1, 1))
    job = sandbox.Job(
        label="job",
        image="sha256:0",
        command=("true",),
        scratch=tmp_path,
        log=tmp_path / "log",
        source_date_epoch=0,
        cores=1,
        inputs={"tree": source, "file": source / "file"},
        surroundings=sandbox.Surroundings(staging=staging, files={"/bin/tool": b"\x7fELF", "/x": source}),  # type: ignore[arg-type]
    )
    packed = io.BytesIO()
    archive.pack(job, packed)
    packed.seek(0)
    with tarfile.open(fileobj=packed) as opened:
        found = {member.name: member for member in opened}
    directories = {"in": 0o555, "in/tree": 0o555, "files/1": 0o555, "etc": 0o755, "links": 0o700, "files": 0o755}
    expected = {name: (mode, 0) for name, mode in directories.items()} | {"build": (0o777, 1000), "out": (0o777, 1000)}
    assert {name: (member.mode, member.uid) for name, member in found.items() if member.isdir()} == expected
    first = found["in/tree/file"]
    assert (first.mode, first.size, first.pax_headers) == (0o444, 4, {"mtime": "1234567890.987654321"})
    assert (found["in"].mtime, found["in/tree"].mtime, found["files/0"].mode) == (1, 1, 0o555)
    same = [name for name, member in found.items() if member.islnk()]
    assert same == (["links/0", "in/file", "files/1/file"] if staging == "link" else [])
