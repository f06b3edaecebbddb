"""Archives become trees: every format, every hostile entry, and limits."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vzrepro import nar
from vzrepro.base.errors import Interrupted, UsageError, VzreproError
from vzrepro.sources import archive

Member = tuple[str, bytes | str | None] | tarfile.TarInfo
"""A path and what is there: bytes of a file, a symlink's target, None for a directory; or a header as it is."""


def tar(*members: Member, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
                continue
            path, content = member
            header = tarfile.TarInfo(path)
            header.mode = 0o755 if content is None or path.endswith(".sh") else 0o644
            if content is None:
                header.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                header.type, header.linkname = tarfile.SYMTYPE, content
            else:
                header.size = len(content)
            file.addfile(header, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def special(path: str, kind: bytes, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    header = tarfile.TarInfo(path)
    header.type, header.linkname, header.mode = kind, target, mode
    return header


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.create_system = 3
    return info


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[..., Path]:
    def run(data: bytes, max_bytes: int = archive.MAX_UNPACKED) -> Path:
        (tmp_path / "file").write_bytes(data)
        archive.unpack(tmp_path / "file", tmp_path / "tree", "thing", max_bytes=max_bytes)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "tree"]
        return tmp_path / "tree"

    return run


Unpack = Callable[..., Path]
PLAIN = tar(("top", None), ("top/a", b"A"), ("top/run.sh", b"#!"), ("top/d/e", b"E"), ("top/l", "d/e"))


def content(tree: Path) -> dict[str, str]:
    """Path → text, link target as `→ …`, of all that is no directory."""
    found = {}
    for path in tree.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(tree))] = f"→ {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(tree))] = path.read_text()
    return found


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        gzip.compress(PLAIN),
        bz2.compress(PLAIN),
        lzma.compress(PLAIN),
        zstandard.compress(PLAIN),
        gzip.compress(PLAIN[:1024]) + gzip.compress(PLAIN[1024:]),
        lzma.compress(PLAIN[:1024]) + bytes(8) + lzma.compress(PLAIN[1024:]) + bytes(4),
    ],
    ids=["plain", "gz", "bz2", "xz", "zst", "gz in two members", "xz in two streams"],
)
def test_tar_in_every_compression(unpack: Unpack, data: bytes) -> None:
    tree = unpack(data)
    assert content(tree) == {"a": "A", "run.sh": "#!", "d/e": "E", "l": "→ d/e"}
    assert (tree / "run.sh").stat().st_mode & 0o111
    assert not (tree / "a").stat().st_mode & 0o111


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_dialects_of_tar_give_one_tree(unpack: Unpack, form: int) -> None:
    long = "/".join(["directory"] * 12)
    members: list[Member] = [(f"{long}/file", b"x"), (f"{long}/link", "file")]
    assert content(unpack(tar(*members, form=form)) / "/".join(["directory"] * 11)) == {"file": "x", "link": "→ file"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip(unpack: Unpack, method: int) -> None:
    tree = unpack(
        zipped(
            ("top/", b""),
            ("top/a", b"A"),
            (entry("top/run.sh", stat.S_IFREG | 0o4755), b"#!"),
            (entry("top/l", stat.S_IFLNK | 0o777), b"a"),
            ("top/größe", b"g"),
            method=method,
        )
    )
    assert content(tree) == {"a": "A", "run.sh": "#!", "l": "→ a", "größe": "g"}
    assert stat.S_IMODE((tree / "run.sh").stat().st_mode) & 0o7111 == 0o111


def test_the_tree_of_an_archive_is_a_format(unpack: Unpack) -> None:
    """Another value means another `UNPACK_FORMAT`: objects that were made of archives are named by it."""
    assert nar.nar_hash(unpack(PLAIN))[0].hex == "32711329207c43c6fcfdd0739519985878e752254b0973baef4cc59d8fa7a73a"


def test_only_one_directory_at_the_top_is_left_out(unpack: Unpack) -> None:
    assert content(unpack(tar(("a/x", b"x"), ("b/y", b"y")))) == {"a/x": "x", "b/y": "y"}


def test_one_file_or_link_at_the_top_is_not(unpack: Unpack) -> None:
    assert content(unpack(tar(("x", b"x")))) == {"x": "x"}


def test_a_link_at_the_top_is_not_followed(unpack: Unpack, tmp_path: Path) -> None:
    assert content(unpack(tar(("x", str(tmp_path))))) == {"x": f"→ {tmp_path}"}


def test_empty_archives(unpack: Unpack) -> None:
    assert content(unpack(tar())) == {}


def test_an_empty_zip(unpack: Unpack) -> None:
    assert content(unpack(zipped())) == {}


def test_bits_beyond_may_be_run_are_dropped(unpack: Unpack) -> None:
    tree = unpack(tar(special("top/x", tarfile.REGTYPE, mode=0o6755), special("top/y", tarfile.REGTYPE, mode=0)))
    assert stat.S_IMODE((tree / "x").stat().st_mode) & 0o7000 == 0
    assert (tree / "y").read_bytes() == b""


def test_hard_links_to_files_of_the_archive(unpack: Unpack) -> None:
    tree = unpack(tar(("t/a", b"A"), special("t/b", tarfile.LNKTYPE, "t/a"), special("t/c", tarfile.LNKTYPE, "t/b")))
    assert content(tree) == {"a": "A", "b": "A", "c": "A"}


def test_names_that_are_not_utf8_keep_their_bytes(unpack: Unpack) -> None:
    tree = unpack(tar(("t/\udcff\udcfe", b"x"), ("t/l", "\udcff")))
    assert sorted(os.fsencode(each.name) for each in tree.iterdir()) == [b"l", b"\xff\xfe"]
    assert os.fsencode((tree / "l").readlink()) == b"\xff"


def test_links_are_kept_as_text_and_never_followed(unpack: Unpack, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert content(unpack(tar(("t/a", "/etc/passwd"), ("t/b", "../../../x"), ("t/c", b"")))) == {
        "a": "→ /etc/passwd",
        "b": "→ ../../../x",
        "c": "",
    }


REFUSED: dict[str, tuple[Member, ...]] = {
    "is absolute": (("/etc/passwd", b""),),
    "leads upwards": (("a/../../b", b""),),
    "holds a twice": (("a", b"1"), ("a", b"2")),
    "holds a/b twice": (("a/b", b"1"), ("./a//b", "x")),
    "a character device": (special("null", tarfile.CHRTYPE),),
    "a block device": (special("disk", tarfile.BLKTYPE),),
    "a fifo": (special("pipe", tarfile.FIFOTYPE),),
    "an entry of the type": (special("what", b"Z"),),
    "lies below a, which is a symlink": (("a", "/tmp"), ("a/b", b"")),
    "lies below a, which is a file": (("a", b""), ("a/b", b"")),
    "files were put below it": (("a/b", b""), ("a", "/tmp")),
    "no earlier regular file": (special("a", tarfile.LNKTYPE, "/etc/passwd"[1:]),),
    "the path '/etc/passwd' is absolute": (special("a", tarfile.LNKTYPE, "/etc/passwd"),),
    "is a symlink to ''": (special("a", tarfile.SYMTYPE, ""),),
    "is a hard link to 'l'": (("l", "/etc/passwd"), special("a", tarfile.LNKTYPE, "l")),
    "its root is a symlink": ((".", "/etc"),),
    "a path of 6": (("a/" * 3000 + "a", b""),),
    "name too long": (("x" * 300, b""),),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_what_no_tree_can_hold(unpack: Unpack, tmp_path: Path, complaint: str) -> None:
    with pytest.raises(UsageError, match="thing cannot be unpacked") as caught:
        unpack(tar(*REFUSED[complaint]))
    assert complaint.lower() in (caught.value.reason or "").lower()
    assert "without unpack=True" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (zipped(("../x", b"")), "leads upwards"),
        (zipped(("/x", b"")), "is absolute"),
        (zipped((entry("x", stat.S_IFCHR | 0o644), b"")), "no file, directory or link"),
        (zipped((entry("l", stat.S_IFLNK | 0o777), b"/tmp"), ("l/x", b"")), "which is a symlink"),
        (zipped((entry("l", stat.S_IFLNK | 0o777), b"a\0b")), "is a symlink to"),
        (zipped((entry("l", stat.S_IFLNK | 0o777), b"x" * 5000)), "is a symlink to"),
        (b"PK\x03\x04" + b"\0" * 100, "damaged"),
        (zipped(("a", b"x" * 1000))[:-40], "damaged"),
        (gzip.compress(PLAIN)[:-20], "damaged"),
        (lzma.compress(PLAIN)[:-20], "damaged"),
        (bz2.compress(PLAIN)[:-20], "damaged"),
        (zstandard.compress(PLAIN)[:-5], "damaged"),
        (bz2.compress(PLAIN)[:20] + b"\0" * 60, "damaged"),
        (b"no archive at all", "no tar or zip"),
        (b"", "no tar or zip"),
    ],
)
def test_damage_and_hostile_zips(unpack: Unpack, data: bytes, complaint: str) -> None:
    with pytest.raises(UsageError, match="thing cannot be unpacked") as caught:
        unpack(data)
    assert complaint in (caught.value.reason or "")


def test_a_directory_of_a_zip_that_is_too_large(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_MAX_DIRECTORY", 10_000)
    with pytest.raises(UsageError) as caught:
        unpack(zipped(*((f"{number}", b"") for number in range(1000))))
    assert "its directory has" in (caught.value.reason or "")


def test_an_xz_that_needs_much_memory(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_XZ_MEMORY", 1 << 20)
    with pytest.raises(UsageError) as caught:
        unpack(lzma.compress(PLAIN))
    assert "memory" in (caught.value.reason or "").lower()


def test_many_members(unpack: Unpack) -> None:
    assert len(content(unpack(tar(*((f"t/{number}", b"x") for number in range(3000)))))) == 3000


def test_an_encrypted_zip(unpack: Unpack) -> None:
    data = bytearray(zipped(("a", b"x"), method=zipfile.ZIP_STORED))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UsageError, match="thing cannot be unpacked") as caught:
        unpack(bytes(data))
    assert "encrypted" in (caught.value.reason or "")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_a_bomb_ends_at_the_limit(unpack: Unpack, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(tar(("top/zeros", bytes(64 << 20))))
    with pytest.raises(UsageError) as caught:
        unpack(bomb, max_bytes=1 << 20)
    assert "more than the allowed 1048576 bytes" in (caught.value.reason or "")
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < len(bomb) + (2 << 20)


def test_a_zip_bomb_ends_at_the_limit(unpack: Unpack) -> None:
    with pytest.raises(UsageError) as caught:
        unpack(zipped(*((f"z{number}", bytes(1 << 20)) for number in range(8))), max_bytes=2 << 20)
    assert "more than the allowed" in (caught.value.reason or "")


def test_a_compressed_tar_that_is_decompressed_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(lzma.compress(b"plain" * 1000))
    with tempfile.TemporaryFile() as dest:
        archive.decompress(tmp_path / "x", dest, "x")
        dest.seek(0)
        assert dest.read() == b"plain" * 1000
    with tempfile.TemporaryFile() as dest, pytest.raises(UsageError, match="x cannot be unpacked"):
        archive.decompress(tmp_path / "x", dest, "x", max_bytes=100)


@pytest.mark.parametrize("start", [b"BZh9", b"\x1f\x8b\x08\0", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_damage_of_each_compression_is_one_error(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x").write_bytes(start + b"a" * 40)
    with tempfile.TemporaryFile() as dest, pytest.raises(UsageError, match="it is damaged"):
        archive.decompress(tmp_path / "x", dest, "x")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_is_not_held_whatever_it_claims(unpack: Unpack, kind: bytes) -> None:
    header = special("x", kind)
    header.size = 64 << 20
    with pytest.raises(UsageError) as caught:
        unpack(gzip.compress(header.tobuf() + b"a" * (64 << 20) + PLAIN))
    assert "a header of 67108864 bytes" in (caught.value.reason or "")


def test_sparse_files(unpack: Unpack) -> None:
    header = tarfile.TarInfo("x")
    header.size = 512
    header.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "99999999999"}
    with pytest.raises(UsageError) as caught:
        unpack(header.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n1\n".ljust(512, b"\0") + bytes(1024))
    assert "a sparse file" in (caught.value.reason or "")


def test_an_interrupt_ends_it(tmp_path: Path) -> None:
    def stop() -> None:
        raise Interrupted("interrupted")

    (tmp_path / "file").write_bytes(PLAIN)
    with pytest.raises(Interrupted):
        archive.unpack(tmp_path / "file", tmp_path / "tree", "thing", go_on=stop)


def test_the_tree_does_not_depend_on_order_or_owner(tmp_path: Path) -> None:
    hashes = set()
    one: list[Member] = [("t/a", b"A"), ("t/b", b"B")]
    other: list[Member] = [("t/b", b"B"), ("./t", None), ("./t/a", b"A")]
    for number, members in enumerate((one, other)):
        (tmp_path / f"{number}").write_bytes(tar(*members))
        archive.unpack(tmp_path / f"{number}", tmp_path / f"tree{number}", "thing")
        hashes.add(nar.nar_hash(tmp_path / f"tree{number}")[0])
    assert len(hashes) == 1


def test_a_zip_with_an_entry_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(zipped(("abc", b"text")).replace(b"abc", b"\0bc"))
    with pytest.raises(UsageError, match="thing cannot be unpacked"):
        archive.unpack(tmp_path / "file", tmp_path / "tree", "thing")


def test_a_zip_whose_directory_leads_to_before_its_beginning(tmp_path: Path) -> None:
    data = zipped(("a/b", b"text"))
    (tmp_path / "file").write_bytes(data[:30] + data[31:])
    with pytest.raises(UsageError, match="thing cannot be unpacked") as caught:
        archive.unpack(tmp_path / "file", tmp_path / "tree", "thing")
    assert "before its beginning" in (caught.value.reason or "")


@given(st.binary(max_size=2000), st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b\x08", PLAIN[:512], PLAIN]), st.data())
def test_any_bytes_give_a_tree_or_one_error(data: bytes, start: bytes, draw: st.DataObject) -> None:
    mixed = bytearray(start + data)
    for _ in range(draw.draw(st.integers(0, 4))):
        if mixed:
            mixed[draw.draw(st.integers(0, len(mixed) - 1))] = draw.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "file").write_bytes(mixed)
        try:
            archive.unpack(Path(folder) / "file", Path(folder) / "tree", "thing", max_bytes=1 << 20)
        except VzreproError as error:
            assert error.reason
