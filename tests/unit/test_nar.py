"""NAR: the bytes of known trees, round trips of arbitrary ones, refusal of all others; and the zstd frames."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import socket
import stat
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import Interrupted, VzreproError
from vzrepro.base.model import NarHash
from vzrepro.nar.stream import Hasher

GOLDEN = Path(__file__).parent.parent / "golden" / "nar"

Tree = bytes | tuple[bytes] | str | dict[bytes, "Tree"]
"""A tree as data: bytes are a file, a tuple of bytes an executable one, a str a link's target, a dict a directory."""


def write(tree: Tree, path: Path) -> None:
    if isinstance(tree, dict):
        path.mkdir()
        for name, node in tree.items():
            write(node, path / os.fsdecode(name))
    elif isinstance(tree, str):
        path.symlink_to(tree)
    else:
        path.write_bytes(tree if isinstance(tree, bytes) else tree[0])
        if isinstance(tree, tuple):
            path.chmod(0o755)


def text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data + b"\0" * (-len(data) % 8)


def serialized(tree: Tree) -> bytes:
    """The NAR of a tree, written a second time and as plainly as the format's description."""
    if isinstance(tree, dict):
        entries = b"".join(
            text(b"entry") + text(b"(") + text(b"name") + text(name) + text(b"node") + serialized(node) + text(b")")
            for name, node in sorted(tree.items())
        )
        body = text(b"type") + text(b"directory") + entries
    elif isinstance(tree, str):
        body = text(b"type") + text(b"symlink") + text(b"target") + text(os.fsencode(tree))
    else:
        body = text(b"type") + text(b"regular")
        if isinstance(tree, tuple):
            body += text(b"executable") + text(b"")
        body += text(b"contents") + text(tree if isinstance(tree, bytes) else tree[0])
    return text(b"(") + body + text(b")")


def archive(tree: Tree) -> bytes:
    return text(b"nix-archive-1") + serialized(tree)


def unpack(data: bytes, dest: Path, **options: int) -> tuple[NarHash, int]:
    return nar.unpack(io.BytesIO(data), dest, **options)


SAMPLES: dict[str, Tree] = {
    "empty-file": b"",
    "file": b"hello\n",
    "executable": (b"#!/bin/sh\n",),
    "link": "../elsewhere",
    "empty-directory": {},
    "tree": {
        b"a": b"12345678",
        b"a.b": b"123456789",
        b"a-b": (b"",),
        b"B": {b"nested": {b"deep": "target"}, b"empty": {}},
        "é".encode(): b"utf-8",
        b"\xff\xfe": b"not utf-8",
        "\U0001f600".encode(): b"beyond the BMP",
        "\uffee".encode(): b"end of the BMP",
    },
}


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Tree], Path]:
    def make(tree: Tree) -> Path:
        write(tree, tmp_path / "tree")
        return tmp_path / "tree"

    return make


# --- packing


@pytest.mark.parametrize("name", SAMPLES)
def test_the_bytes_of_known_trees(name: str, made: Callable[[Tree], Path]) -> None:
    golden = GOLDEN / f"{name}.nar"
    packed = b"".join(nar.pack(made(SAMPLES[name])))
    if os.environ.get("ACCEPT_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_bytes(packed)
    assert packed == golden.read_bytes() == archive(SAMPLES[name])


def test_the_hash_that_nix_gives() -> None:
    """`echo hello > f; nix-hash --type sha256 --base32 f` on Nix 2.8."""
    assert nar.hash_of_file(b"hello\n").nix == "sha256:" + HELLO


HELLO = "04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw"


def test_hash_and_size_are_those_of_the_packed_bytes(made: Callable[[Tree], Path]) -> None:
    path = made({b"big": os.urandom(3_000_001), b"small": b"x", b"medium": os.urandom(70_000)})
    packed = b"".join(nar.pack(path))
    assert nar.nar_hash(path) == (NarHash(hashlib.sha256(packed).hexdigest()), len(packed))


def test_a_link_at_the_root_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert b"".join(nar.pack(tmp_path / "link")) == archive("file")


def test_only_the_owner_decides_what_is_executable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    file.chmod(0o455)
    assert b"".join(nar.pack(file)) == archive(b"x")


def plant_fifo(path: Path) -> None:
    os.mkfifo(path)


def plant_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def plant_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices")


@pytest.mark.parametrize("plant", [plant_fifo, plant_socket, plant_device])
@pytest.mark.parametrize("nested", [True, False])
def test_other_nodes_are_refused_by_name(tmp_path: Path, plant: Callable[[Path], None], nested: bool) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    node = tree / "sub" / "odd" if nested else tmp_path / "odd"
    plant(node)
    for attempt in (nar.nar_hash, lambda path: nar.canonical_copy(path, tmp_path / "copy")):
        with pytest.raises(VzreproError, match=f"^{node} cannot be part"):
            attempt(tree if nested else node)


def test_a_file_that_shrinks_or_grows_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for change in (-1, 1):
        file.write_bytes(bytes(4 << 20))
        chunks = nar.pack(file)
        for _ in range(2):
            next(chunks)
        os.truncate(file, (4 << 20) + change)
        with pytest.raises(VzreproError, match=f"{file} changed while it was read"):
            list(chunks)


def test_a_small_file_that_shrinks_or_grows_meanwhile_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for change in (-1, 1):
        file.write_bytes(bytes(100))

        def truncate(status: os.stat_result, fd: int | None, path: Callable[[], str], size: int = 100 + change) -> None:
            os.truncate(path(), size)

        with pytest.raises(VzreproError, match=f"{file} changed while it was read"):
            nar.nar_hash(file, inspect=truncate)


def test_every_node_is_shown_before_its_contents(made: Callable[[Tree], Path]) -> None:
    path = made({b"a": b"x", b"b": {b"c": "target"}, b"d": {}})
    seen: list[tuple[str, bool, bool]] = []

    def inspect(status: os.stat_result, fd: int | None, shown: Callable[[], str]) -> None:
        assert os.path.samestat(status, os.lstat(shown()))
        assert fd is None or os.path.samestat(status, os.fstat(fd))
        seen.append((os.path.relpath(shown(), path), stat.S_ISDIR(status.st_mode), fd is None))

    assert nar.nar_hash(path, inspect=inspect) == nar.nar_hash(path)
    assert seen == [
        (".", True, False), ("a", False, False), ("b", True, False), ("b/c", False, True), ("d", True, False),
    ]  # fmt: skip


def test_a_tree_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    deepest = tmp_path / "d"
    for _ in range(nar.MAX_DEPTH - 1):
        deepest = deepest / "d"
    deepest.mkdir(parents=True)
    packed = b"".join(nar.pack(tmp_path / "d"))
    unpack(packed, tmp_path / "copy")
    (deepest / "d").mkdir()
    with pytest.raises(VzreproError, match="nested too deeply"):
        nar.nar_hash(tmp_path / "d")
    tree: Tree = {}
    for _ in range(nar.MAX_DEPTH):
        tree = {b"d": tree}
    with pytest.raises(nar.MalformedNar, match="nested"):
        unpack(archive(tree), tmp_path / "deep")


def test_packing_leaves_no_descriptor_open(made: Callable[[Tree], Path]) -> None:
    path = made({b"a": {b"b": {b"big": bytes(3_000_000)}}})
    before = len(list(Path("/dev/fd").iterdir()))
    chunks = nar.pack(path)
    next(chunks)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    with pytest.raises(nar.MalformedNar):
        unpack(b"".join(nar.pack(path))[:-1], path.parent / "copy")
    assert len(list(Path("/dev/fd").iterdir())) == before


# --- round trips

names = st.binary(min_size=1, max_size=20).filter(
    lambda name: name not in (b".", b"..") and not set(name) & set(b"/\0")
)
contents = st.binary(max_size=40) | st.integers(60_000, 70_000).map(lambda size: b"x" * size)
targets = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=30)
leaves = contents | st.tuples(contents) | targets
trees: st.SearchStrategy[Tree] = st.recursive(
    leaves, lambda children: st.dictionaries(names, children, max_size=6), max_leaves=15
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree_comes_back_as_it_was(tmp_path: Path, tree: Tree) -> None:
    with_dir = tmp_path / os.urandom(8).hex()
    with_dir.mkdir()
    write(tree, with_dir / "tree")
    packed = b"".join(nar.pack(with_dir / "tree"))
    assert packed == archive(tree)
    found = unpack(packed, with_dir / "unpacked")
    assert found == nar.nar_hash(with_dir / "unpacked") == (NarHash.of(packed), len(packed))
    assert nar.canonical_copy(with_dir / "tree", with_dir / "copy") == (*found, frozenset())
    assert b"".join(nar.pack(with_dir / "copy")) == packed
    assert_canonical(with_dir / "copy")
    disk.remove_tree(with_dir)


EDGES = [edge + off for edge in (1 << 16, 1 << 20, 1 << 22, (1 << 22) + (1 << 16)) for off in (-1, 0, 1)]


@pytest.mark.parametrize("size", EDGES)
def test_sizes_around_the_borders_of_buffers(tmp_path: Path, size: int) -> None:
    tree: Tree = {b"a": b"1", b"big": hashlib.shake_256(b"x").digest(size), b"z": (b"2",)}
    write(tree, tmp_path / "tree")
    packed = b"".join(nar.pack(tmp_path / "tree"))
    assert packed == archive(tree)
    assert nar.nar_hash(tmp_path / "tree") == (NarHash.of(packed), len(packed))
    read = nar.decompress(nar.reader(nar.compress(nar.pack(tmp_path / "tree"))), max_size=len(packed))
    assert nar.unpack(read, tmp_path / "unpacked", max_size=len(packed)) == (NarHash.of(packed), len(packed))
    assert b"".join(nar.pack(tmp_path / "unpacked")) == packed


def assert_canonical(path: Path) -> None:
    status = path.lstat()
    assert status.st_mtime_ns == 1_000_000_000
    if stat.S_ISDIR(status.st_mode):
        assert stat.S_IMODE(status.st_mode) == 0o555
        for child in path.iterdir():
            assert_canonical(child)
    elif stat.S_ISREG(status.st_mode):
        assert stat.S_IMODE(status.st_mode) in (0o444, 0o555)


def test_a_copy_has_none_of_the_builders_traces(tmp_path: Path) -> None:
    source = tmp_path / "out"
    source.mkdir(mode=0o777)
    (source / "set-id").write_text("x")
    (source / "set-id").chmod(0o6711)
    os.link(source / "set-id", source / "twin")
    (source / "loose").write_text("y")
    (source / "loose").chmod(0o666)
    with (source / "sparse").open("wb") as sparse:
        sparse.truncate(5_000_000)
    if hasattr(os, "setxattr"):
        with contextlib.suppress(OSError):  # not every file system has them
            os.setxattr(source / "loose", "user.note", b"x")
    old = os.umask(0o077)
    try:
        nar.canonical_copy(source, tmp_path / "copy")
    finally:
        os.umask(old)
    copy = tmp_path / "copy"
    assert_canonical(copy)
    assert {path.name: path.stat().st_mode & 0o7777 for path in copy.iterdir()} == {
        "set-id": 0o555,
        "twin": 0o555,
        "loose": 0o444,
        "sparse": 0o444,
    }
    assert all(path.stat().st_nlink == 1 for path in copy.iterdir())
    assert (copy / "sparse").read_bytes() == bytes(5_000_000)
    if hasattr(os, "listxattr"):
        assert [name for name in os.listxattr(copy / "loose") if name.startswith("user.")] == []


def test_needles_are_found_wherever_they_are(tmp_path: Path) -> None:
    def needle(number: int) -> str:
        return hashlib.sha256(str(number).encode()).hexdigest()[:32]

    source = tmp_path / "out"
    source.mkdir()
    seam = (1 << 20) - 500  # the read window ends inside the run of needles
    run = b"".join(needle(i).encode() for i in range(40))
    (source / "big").write_bytes(b"." * seam + run + b"." * 100_000)
    (source / "link").symlink_to(f"/nix/store/{needle(100)}-x")
    (source / f"{needle(101)}-name").write_text("x")
    (source / "part").write_text(needle(102)[:31])
    found = nar.canonical_copy(
        source, tmp_path / "copy", needles=[needle(i) for i in (*range(40), 100, 101, 102, 103)]
    )[2]
    assert found == {needle(i) for i in (*range(40), 100, 101)}


# --- refusals

GOOD = archive({b"a": b"123", b"b": (b"x",), b"c": {b"d": "target"}})


def entry(name: bytes, node: Tree = b"") -> bytes:
    return text(b"entry") + text(b"(") + text(b"name") + text(name) + text(b"node") + serialized(node) + text(b")")


def directory(*entries: bytes) -> bytes:
    head = text(b"nix-archive-1") + text(b"(") + text(b"type") + text(b"directory")
    return head + b"".join(entries) + text(b")")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "truncated"),
        (b"nix-archive-1" + bytes(100), "magic"),
        (GOOD + b"\0", "after its end"),
        (GOOD + GOOD, "after its end"),
        (GOOD.replace(text(b"123"), struct.pack("<Q", 3) + b"123\0\0\0\0\1"), "padding"),
        (GOOD.replace(text(b"b"), struct.pack("<Q", 1) + b"b\0\0\0\0\0\0\1"), "padding"),
        (archive(b"123").replace(text(b"123"), struct.pack("<Q", 3) + b"123\0\0\0\0\1"), "padding"),
        (directory(entry(b"b"), entry(b"a")), "'a' out of order"),
        (directory(entry(b"a"), entry(b"a")), "'a' out of order"),
        (directory(entry(b".")), "the name '.'"),
        (directory(entry(b"..")), "the name '..'"),
        (directory(entry(b"a/b")), "the name 'a/b'"),
        (directory(entry(b"")), "a name of 0 bytes"),
        (directory(entry(b"a\0b")), "zero byte"),
        (directory(entry(b"n" * 256)), "a name of 256 bytes"),
        (archive("t" * 4096), "a link target of 4096 bytes"),
        (archive("a\0b"), "zero byte"),
        (archive(""), "a link target of 0 bytes"),
        (GOOD.replace(text(b"symlink"), text(b"symbolic")), "file, link or directory expected"),
        (GOOD.replace(text(b"executable") + text(b""), text(b"executable") + text(b"yes")), "expected"),
        (GOOD.replace(text(b"contents"), text(b"content")), "expected"),
        (GOOD.replace(text(b"node"), text(b"edon")), "a node expected"),
        (archive(b"123").replace(struct.pack("<Q", 3), struct.pack("<Q", 1 << 63)), "a file of"),
        (archive(b"123").replace(struct.pack("<Q", 3), struct.pack("<Q", 1 << 62)), "truncated"),
    ],
)
def test_anything_but_the_canonical_form_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(nar.MalformedNar) as caught:
        unpack(data, tmp_path / "dest")
    assert words in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["dest"])


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for size in range(len(GOOD)):
        with pytest.raises(nar.MalformedNar):
            unpack(GOOD[:size], tmp_path / str(size))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_gives_another_hash(tmp_path: Path, at: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= 1 << bit
    dest = tmp_path / os.urandom(8).hex()
    try:
        found, _ = unpack(bytes(data), dest)
    except VzreproError:
        return
    assert found == NarHash.of(bytes(data)) != NarHash.of(GOOD)
    assert b"".join(nar.pack(dest)) == bytes(data)


def test_more_than_was_announced_is_refused_while_it_comes(tmp_path: Path) -> None:
    data = archive(bytes(10_000_000))
    assert unpack(data, tmp_path / "exact", max_size=len(data))[1] == len(data)
    source = io.BytesIO(data)
    with pytest.raises(nar.MalformedNar, match="larger than the 1000000 bytes"):
        nar.unpack(source, tmp_path / "dest", max_size=1_000_000)
    assert source.tell() < 4_000_000


def test_an_existing_destination_is_never_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "link").symlink_to(victim)
    for dest in (victim, tmp_path / "link"):
        with pytest.raises(VzreproError, match="exists already"):
            unpack(archive(b"evil"), dest)
    assert victim.read_text() == "precious"


def test_the_way_the_bytes_are_cut_does_not_matter(tmp_path: Path) -> None:
    data = archive({b"a": os.urandom(100_000), b"b": {b"c": b"x"}, b"d": "e"})
    for size in (1, 7, 8192):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        assert nar.unpack(nar.reader(pieces), tmp_path / str(size)) == (NarHash.of(data), len(data))


# --- zstd frames


def decoded(data: bytes, max_size: int = 1 << 30) -> bytes:
    read = nar.decompress(io.BytesIO(data), max_size=max_size)
    return b"".join(iter(lambda: read(1 << 16), b""))


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def frame(data: bytes, **options: int) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)  # type: ignore[arg-type]


def streamed(data: bytes, **options: int) -> bytes:
    """A frame whose header does not tell its size."""
    stream = zstandard.ZstdCompressor(**options).compressobj()  # type: ignore[arg-type]
    return stream.compress(data) + stream.flush()


SKIPPABLE = b"\x5a\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello"


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 25_000])
def test_compressed_bytes_depend_on_the_content_only(size: int) -> None:
    data = os.urandom(size // 2) + bytes(size - size // 2)
    forms = {b"".join(nar.compress(pieces(data, step), frame=1000)) for step in (1, 333, 1000, 100_000)}
    assert len(forms) == 1
    (compressed,) = forms
    assert decoded(compressed) == data
    assert zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(compressed) == data


def test_frames_are_independent_and_as_large_as_asked() -> None:
    data = os.urandom(2500)
    frames = list(nar.compress([data], frame=1000))
    assert [zstandard.ZstdDecompressor().decompress(each) for each in frames] == [
        data[:1000],
        data[1000:2000],
        data[2000:],
    ]


LONG = hashlib.shake_256(b"x").digest(3_000_000) * 6


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(LONG), id="one frame"),
        pytest.param(streamed(LONG), id="size unknown"),
        pytest.param(frame(LONG, write_checksum=True, level=1), id="checksum"),
        pytest.param(frame(LONG[:9_000_000]) + frame(LONG[9_000_000:]), id="two frames"),
        pytest.param(b"".join(frame(each) for each in pieces(LONG, 100_000)), id="many frames"),
        pytest.param(frame(b"") + frame(LONG) + frame(b"") + streamed(b""), id="empty frames"),
        pytest.param(SKIPPABLE + frame(LONG[:5]) + SKIPPABLE + frame(LONG[5:]) + SKIPPABLE, id="skippable frames"),
    ],
)
def test_every_shape_of_frames_is_read(data: bytes) -> None:
    assert decoded(data) == LONG


def test_a_window_of_2_to_27_is_the_limit() -> None:
    def windowed(log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=log)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return stream.compress(b"x" * 1000) + stream.flush()

    assert decoded(windowed(27)) == b"x" * 1000
    with pytest.raises(nar.MalformedNar, match="too much memory"):
        decoded(windowed(28))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"no zstd at all", "something else than a frame"),
        (frame(b"x") + b"rest", "something else than a frame"),
        (frame(b"x") + b"\0", "truncated"),
        (SKIPPABLE[:-1], "truncated"),
        (b"\x28\xb5\x2f\xfd\x00\x58\x07\x00\x00", "impossible block"),
    ],
)
def test_other_bytes_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(nar.MalformedNar) as caught:
        decoded(data)
    assert words in str(caught.value)


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    whole = frame(b"x" * 300)
    assert whole[4] == 0x60  # a single segment, whose size takes two bytes, less 256
    for size in (0, 43, 45, 0xFFFF):
        with pytest.raises(nar.MalformedNar, match="malformed"):
            decoded(whole[:5] + struct.pack("<H", size) + whole[7:])
    with pytest.raises(nar.MalformedNar, match="malformed"):
        decoded(whole[:4] + b"\x68" + whole[5:])  # the reserved bit
    assert frame(b"")[4:6] == b"\x20\0"
    with pytest.raises(nar.MalformedNar, match="malformed"):
        decoded(frame(b"x" * 10).replace(b"\x20\x0a", b"\x20\0"))


@pytest.mark.parametrize("whole", [frame(os.urandom(500) + bytes(500)), streamed(b"ab" * 500, write_checksum=True)])
def test_every_truncated_frame_is_refused(whole: bytes) -> None:
    for size in range(len(whole)):
        with pytest.raises(nar.MalformedNar):
            decoded(whole[:size])


def test_corruption_is_refused_where_it_matters() -> None:
    whole = frame(b"some text, " * 300, write_checksum=True)
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 0x10
        try:
            found = decoded(bytes(data), max_size=10_000)
        except nar.MalformedNar:
            continue
        assert found == b"some text, " * 300  # bits that mean nothing exist


@pytest.mark.parametrize("shape", ["frames", "one frame"])
def test_a_bomb_is_stopped_within_bounded_memory(shape: str) -> None:
    zeros = bytes(64 << 20)
    bomb = frame(zeros[: 4 << 20]) * 256 if shape == "frames" else streamed(zeros) * 16
    assert len(bomb) < 1 << 20
    tracemalloc.start()
    try:
        with pytest.raises(nar.MalformedNar, match="more than the 20000000 bytes"):
            decoded(bomb, max_size=20_000_000)
        assert tracemalloc.get_traced_memory()[1] < 150 << 20
    finally:
        tracemalloc.stop()


def test_dropping_a_stream_ends_its_threads(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(30_000_000))
    before = set(threading.enumerate())
    chunks = nar.compress(nar.pack(tmp_path / "file"), frame=1 << 20)
    next(chunks)
    del chunks
    read = nar.decompress(io.BytesIO(frame(b"x" * 1000) * 1000), max_size=1 << 30)
    read(10)
    del read
    assert set(threading.enumerate()) <= before  # other tests' may end meanwhile


def test_small_objects_start_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write({b"a": os.urandom(100_000), b"b": b"x"}, tmp_path / "tree")

    def refuse(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread.name} was started")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    compressed = b"".join(nar.compress(nar.pack(tmp_path / "tree")))
    wanted = nar.nar_hash(tmp_path / "tree")
    for copy in ("one", "two"):
        assert nar.unpack(nar.decompress(io.BytesIO(compressed), max_size=1 << 20), tmp_path / copy) == wanted
    assert nar.canonical_copy(tmp_path / "one", tmp_path / "three")[:2] == wanted


def test_large_objects_leave_no_thread(tmp_path: Path) -> None:
    write({b"a": os.urandom(5_000_000), b"b": b"x"}, tmp_path / "tree")
    before = set(threading.enumerate())
    compressed = b"".join(nar.compress(nar.pack(tmp_path / "tree")))
    wanted = nar.nar_hash(tmp_path / "tree")
    assert nar.unpack(nar.decompress(io.BytesIO(compressed), max_size=1 << 30), tmp_path / "copy") == wanted
    for broken in (compressed[:-1], compressed + compressed, compressed + b"rest"):
        with pytest.raises(nar.MalformedNar):
            nar.unpack(nar.decompress(io.BytesIO(broken), max_size=1 << 30), tmp_path / os.urandom(4).hex())
    assert set(threading.enumerate()) <= before  # other tests' may end meanwhile


@settings(max_examples=60)
@given(sizes=st.lists(st.sampled_from([0, 1, 1000, 1 << 18, (1 << 20) - 1, 1 << 20, 3 << 20]), max_size=8))
def test_a_stream_is_hashed_however_it_is_cut(sizes: list[int]) -> None:
    chunks = [bytes([number]) * size for number, size in enumerate(sizes)]
    with Hasher() as hasher:
        for chunk in chunks:
            hasher.update(chunk)
        assert (hasher.finish(), hasher.size) == (NarHash.of(b"".join(chunks)), sum(sizes))


def test_errors_while_reading_come_through(tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x" * 1000
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        list(nar.compress(broken(), frame=500))
    with pytest.raises(OSError, match="the network is gone"):
        nar.unpack(nar.decompress(nar.reader(broken_frames()), max_size=1 << 20), tmp_path / "dest")


def broken_frames() -> Iterator[bytes]:
    yield frame(archive(b"x"))[:20]
    raise OSError("the network is gone")


def test_holes_are_read_and_written_as_holes(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.write(b"begin")
        file.seek(40 << 20)
        file.write(b"middle" * 20_000)
        file.truncate(100 << 20)
    plain = tmp_path / "plain"
    plain.write_bytes(sparse.read_bytes())
    copied = nar.canonical_copy(sparse, tmp_path / "copy")
    assert copied == nar.canonical_copy(plain, tmp_path / "other")
    assert (tmp_path / "copy").read_bytes() == plain.read_bytes()
    assert nar.nar_hash(sparse) == nar.nar_hash(tmp_path / "copy") == copied[:2]
    if sparse.stat().st_blocks * 512 < 50 << 20:  # a file system that knows holes
        assert (tmp_path / "copy").stat().st_blocks * 512 < 5 << 20


def test_whoever_watches_can_end_a_copy(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)

    def progress(size: int) -> None:
        if size > 10 << 20:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        nar.canonical_copy(tmp_path / "sparse", tmp_path / "copy", progress=progress)
    with pytest.raises(Interrupted):
        nar.nar_hash(tmp_path / "sparse", progress=progress)
