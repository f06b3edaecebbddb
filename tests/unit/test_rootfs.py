"""Images become root directories: what is unpacked, which image is taken, and what is refused without a trace."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base import disk
from vzrepro.base.errors import HashMismatch, UsageError
from vzrepro.guest.vm.layer import Unpacking, inside
from vzrepro.guest.vm.rootfs import Image, image_root

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.linkname, info.size, info.mtime = kind, mode, link, len(data), 1_000_000_000
    return info, data


def folder(name: str, mode: int = 0o755) -> Entry:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hardlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.LNKTYPE, link=target)


def tar(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config(layers: list[bytes], architecture: str = "arm64", **section: object) -> bytes:
    return json.dumps(
        {
            "os": "linux",
            "architecture": architecture,
            "config": section,
            "rootfs": {"type": "layers", "diff_ids": [sha256(layer) for layer in layers]},
        }
    ).encode()


def packed(data: bytes, pack: str) -> bytes:
    """`pzstd` is what that program writes: a frame to skip before each frame."""
    if pack in ("", "plain"):
        return data
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" if pack == "pzstd" else b""
    return gzip.compress(data) if pack == "gzip" else skipped + zstandard.compress(data, 1)


class Layout:
    """An OCI layout in the making."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blobs = path / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> dict[str, object]:
        (self.blobs / sha256(data).removeprefix("sha256:")).write_bytes(data)
        return {"digest": sha256(data), "size": len(data)}

    def image(self, layers: list[bytes], *, pack: str = "", architecture: str = "arm64", **section: object) -> dict:
        manifest = {
            "config": self.blob(config(layers, architecture, **section)),
            "layers": [self.blob(packed(layer, pack)) for layer in layers],
        }
        return self.blob(json.dumps(manifest).encode())

    def index(self, *manifests: dict[str, object]) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(manifests)}))
        return self.path


def docker_archive(path: Path, *layers: bytes, tags: tuple[str, ...] = ("it:1",), **section: object) -> Path:
    data = config(list(layers), **section)
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": "config.json", "RepoTags": list(tags), "Layers": names}]
    files = [entry(name, layer) for name, layer in zip(names, layers, strict=True)]
    files += [entry("config.json", data), entry("manifest.json", json.dumps(manifest).encode())]
    path.write_bytes(tar(*files))
    return path


@contextlib.contextmanager
def unpacked(tmp_path: Path, *layers: bytes) -> Iterator[Path]:
    """The root directory that the layers give; whatever happens, nothing else may have come to be."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "victim").write_text("untouched")
    root = place / "root"
    root.mkdir()
    unpacking = Unpacking(root, "the image", max_bytes=1 << 20)
    try:
        for layer in layers:
            unpacking.apply(io.BytesIO(layer))
        yield root
    finally:
        assert sorted(path.name for path in place.iterdir()) == ["root", "victim"]
        assert (place / "victim").read_text() == "untouched"


def listing(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


# --- layers --------------------------------------------------------------------------------------------------------


def test_files_links_and_modes(tmp_path: Path) -> None:
    layer = tar(
        folder("./usr/", 0o755),
        folder("usr/bin"),
        entry("usr/bin/tool", b"tool", mode=0o4755),
        hardlink("usr/bin/same", "usr/bin/tool"),
        symlink("bin", "usr/bin"),
        symlink("abs", "/usr/bin/tool"),
        folder("tmp", 0o1777),
        entry("etc/shadow", b"secret", mode=0o000),
    )
    with unpacked(tmp_path, layer) as root:
        tool = root / "usr/bin/tool"
        assert tool.read_bytes() == b"tool"
        assert stat.S_IMODE(tool.stat().st_mode) == 0o755, "no setuid"
        assert tool.stat().st_mtime == 1_000_000_000
        assert (root / "usr/bin/same").stat().st_ino == tool.stat().st_ino
        assert str((root / "abs").readlink()) == "/usr/bin/tool"
        assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
        assert stat.S_IMODE((root / "etc/shadow").stat().st_mode) == 0o400


def test_a_later_layer_replaces_and_hides(tmp_path: Path) -> None:
    low = tar(entry("a", b"1"), entry("d/x"), entry("d/sub/y"), entry("gone/deep/file"), entry("kind"), folder("was"))
    high = tar(
        entry("a", b"2"),
        entry(".wh.gone"),
        folder("kind"),
        entry("kind/now-a-directory"),
        entry("was", b"now a file"),
        entry("d/new"),
        entry("d/.wh..wh..opq"),
    )
    with unpacked(tmp_path, low, high) as root:
        assert listing(root) == {"a", "kind", "kind/now-a-directory", "was", "d", "d/new"}
        assert (root / "a").read_bytes() == b"2"


def test_a_whiteout_speaks_of_lower_layers_only(tmp_path: Path) -> None:
    low = tar(entry("d/old"))
    high = tar(entry("d/old", b"again"), entry("d/.wh.old"), entry(".wh..wh.plnk"), entry(".wh.never-was"))
    with unpacked(tmp_path, low, high) as root:
        assert listing(root) == {"d", "d/old"}


def test_paths_through_links_stay_inside(tmp_path: Path) -> None:
    low = tar(folder("usr/lib"), symlink("lib", "usr/lib"), symlink("out", "../../.."), symlink("top", "/usr"))
    high = tar(entry("lib/a"), entry("out/b"), entry("top/c"), entry("/absolute"), entry("d"))
    with unpacked(tmp_path, low, high) as root:
        assert {"usr/lib/a", "b", "usr/c", "absolute", "d"} <= listing(root)
        assert (root / "lib").is_symlink()


def test_a_link_in_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    low = tar(symlink("victim", "../victim"), symlink("folder", ".."))
    high = tar(entry("victim", b"mine"), folder("folder"), entry("folder/victim", b"mine"))
    with unpacked(tmp_path, low, high) as root:
        assert (root / "victim").read_bytes() == b"mine"
        assert not (root / "folder").is_symlink()


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("../victim", b"evil")], "leads out"),
        ([entry("a/../../victim", b"evil")], "leads out"),
        ([hardlink("mine", "../victim")], "leads out"),
        ([symlink("x", ".."), hardlink("mine", "x/victim")], "no file of the image"),
        ([hardlink("mine", "/etc/passwd")], "no file of the image"),
        ([hardlink("mine", "dir"), folder("dir")], "no file of the image"),
        ([entry("file"), entry("file/below")], "no directory"),
        ([entry(".wh...")], "no name of a whiteout"),
        ([entry("odd", kind=b"Z")], "unknown type"),
        ([symlink("a", "b"), symlink("b", "a"), entry("a/c")], "too many symbolic links"),
        ([entry("big", bytes(2 << 20))], "allowed 1048576 bytes"),
        ([entry("/".join(["d"] * 3000))], "too long for this system"),
        ([entry("n" * 300)], "cannot be made: File name too long"),
        ([symlink("a", "")], "a symbolic link to nothing"),
    ],
)
def test_hostile_layers(tmp_path: Path, entries: list[Entry], reason: str) -> None:
    with pytest.raises(UsageError) as caught, unpacked(tmp_path, tar(*entries)):
        pass
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"uid": str(2**70)}, f"a user or group that cannot be: {2**70}:0"),
        ({"gid": str(2**32 - 1)}, f"a user or group that cannot be: 0:{2**32 - 1}"),
        ({"uid": "-1"}, "a user or group that cannot be: -1:0"),
        ({"mtime": "nan"}, "at a time that cannot be: nan"),
        ({"mtime": "inf"}, "at a time that cannot be: inf"),
        ({"mtime": "1e300"}, "at a time that cannot be: 1e+300"),
        ({"path": "a\0b"}, "leads out of the image"),
    ],
)
def test_impossible_values(tmp_path: Path, headers: dict[str, str], reason: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("f")
        info.pax_headers = headers
        archive.addfile(info, io.BytesIO())
    refused = pytest.raises(UsageError, match="the image: a layer cannot be unpacked")
    with refused as caught, unpacked(tmp_path, out.getvalue()):
        pass
    assert caught.value.reason is not None and reason in caught.value.reason


def test_a_chain_of_headers_is_refused(tmp_path: Path) -> None:
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1
    layer = (long.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 2000 + tar(entry("a"))
    with pytest.raises(tarfile.TarError, match="nested too deeply"), unpacked(tmp_path, layer):
        pass


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"GNU.sparse.map": "x"}, "a number that is none"),
        ({"GNU.sparse.size": "x"}, "a number that is none"),
        ({"size": "-9"}, "'f' has -9 bytes"),
    ],
)
def test_numbers_that_are_none(tmp_path: Path, headers: dict[str, str], reason: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("f")
        info.pax_headers = headers
        archive.addfile(info, io.BytesIO())
    with pytest.raises(tarfile.TarError, match=reason), unpacked(tmp_path, out.getvalue()):
        pass
    (tmp_path / "image.tar").write_bytes(out.getvalue())
    with pytest.raises(UsageError, match="is no image"), image_root(tmp_path / "image.tar", cache=tmp_path / "cache"):
        pass


def test_a_header_is_not_held_whatever_it_claims(tmp_path: Path) -> None:
    large = tarfile.TarInfo("f")
    large.type, large.size = tarfile.XHDTYPE, 1 << 30
    layer = large.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    with pytest.raises(tarfile.TarError, match="a header of 1073741824 bytes"), unpacked(tmp_path, layer):
        pass


@settings(max_examples=100)
@given(st.binary(max_size=40), st.integers(0, 511), st.integers(0, 3))
def test_any_header_of_a_layer_is_unpacked_or_an_error(data: bytes, at: int, block: int) -> None:
    info = tarfile.TarInfo(f"d/{'é' * 110}")
    info.pax_headers = {"mtime": "1.5"}
    raw = bytearray(info.tobuf(tarfile.PAX_FORMAT, "utf-8"))
    place = min(block, len(raw) // 512 - 1) * 512
    raw[place + at : place + at + len(data)] = data
    for start in range(0, len(raw) - 511, 512):
        if raw[start + 257 : start + 262] == b"ustar":
            total = sum(raw[start : start + 148]) + sum(raw[start + 156 : start + 512]) + 8 * 0x20
            raw[start + 148 : start + 156] = b"%06o\0 " % total
    with tempfile.TemporaryDirectory() as directory, contextlib.suppress(UsageError, tarfile.TarError):
        Unpacking(Path(directory), "the image", max_bytes=1 << 20).apply(io.BytesIO(bytes(raw) + bytes(1024)))


@pytest.mark.parametrize("place", ["Config", "Layers"])
@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "/proc/version", "../other", "blobs", "\ud800"])
def test_names_that_are_no_files_of_the_image(tmp_path: Path, place: str, name: str) -> None:
    layout = Layout(tmp_path / "layout")
    (tmp_path / "other").write_bytes(b"")
    (layout.path / "index.json").write_text("{}")
    layer = tar(entry("a"))
    (layout.path / "config.json").write_bytes(config([layer]))
    (layout.path / "layer.tar").write_bytes(layer)
    image: dict[str, object] = {"Config": "config.json", "Layers": ["layer.tar"]}
    (layout.path / "manifest.json").write_text(json.dumps([image]))
    assert read(layout.path, tmp_path / "cache")[1] == {"a"}
    image[place] = name if place == "Config" else [name]
    (layout.path / "manifest.json").write_text(json.dumps([image]))
    with pytest.raises(UsageError, match="is no whole image") as caught:
        read(layout.path, tmp_path / "elsewhere")
    assert "it has no " in (caught.value.reason or "")


def test_deep_directories(tmp_path: Path) -> None:
    """As deep as paths may be; each name is looked up once for all entries below it."""
    deep = "/".join(["d"] * 1500)
    layers = (
        tar(*(entry(f"{deep}/{number}") for number in range(200))),
        tar(entry("d/.wh..wh..opq"), entry(f"{deep}/1")),
    )
    with unpacked(tmp_path, *layers) as root:
        assert [path.name for path in (root / deep).iterdir()] == ["1"]
        disk.remove_tree(root / "d")


def test_a_link_to_what_is_left_out_is_left_out(tmp_path: Path) -> None:
    low = tar(entry("dev/null", kind=tarfile.CHRTYPE), hardlink("null", "dev/null"), entry("was", b"there"))
    high = tar(
        hardlink("was", "null"), hardlink("again", "was"), entry("dev/null", b"a file now"), hardlink("l", "dev/null")
    )
    with unpacked(tmp_path, low, high) as root:
        assert listing(root) == {"dev", "dev/null", "l"}
        assert (root / "l").read_bytes() == b"a file now"


def test_devices_are_left_out(tmp_path: Path) -> None:
    layer = tar(entry("dev/null", kind=tarfile.CHRTYPE), entry("pipe", kind=tarfile.FIFOTYPE), entry("file"))
    with unpacked(tmp_path, layer) as root:
        assert listing(root) == {"dev", "file"}


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/usr/bin/sh", "usr/bin/sh"),
        ("bin/sh", "usr/bin/sh"),
        ("/../../bin/../x", "usr/x"),
        ("up/etc", "etc"),
        ("missing/deeper", "missing/deeper"),
        ("", "."),
    ],
)
def test_a_path_is_resolved_as_the_container_would(tmp_path: Path, path: str, found: str) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("/usr/bin")
    (tmp_path / "up").symlink_to("../../../..")
    assert inside(tmp_path, path) == tmp_path / found


# --- images --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(path: Path, cache: Path, **options: object) -> tuple[Image, set[str]]:
    with image_root(path, cache=cache, **options) as image:  # type: ignore[arg-type]
        return image, listing(image.root)


def test_a_directory_is_used_as_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "root/bin").mkdir(parents=True)
    image, found = read(tmp_path / "root", cache)
    assert image.root == tmp_path / "root"
    assert found == {"bin"}
    assert not cache.exists()


@pytest.mark.parametrize("pack", ["", "gzip", "zstd", "pzstd"])
def test_an_oci_layout(tmp_path: Path, cache: Path, pack: str) -> None:
    layout = Layout(tmp_path / "layout")
    layers = [tar(entry("a"), entry("b")), tar(entry(".wh.a"), entry("c"))]
    layout.index(
        layout.image(
            layers,
            pack=pack,
            Entrypoint=["/b"],
            Cmd=["x", "y"],
            Env=["PATH=/bin", "EMPTY=", "LOOSE", "=x", ""],
            WorkingDir="/w",
            User="www-data",
            ExposedPorts={"80/tcp": {}},
            StopSignal="SIGQUIT",
        )
    )
    image, found = read(layout.path, cache)
    assert found == {"b", "c"}
    assert image.config.entrypoint == ("/b",)
    assert image.config.cmd == ("x", "y")
    assert image.config.env == {"PATH": "/bin", "EMPTY": ""}
    assert (image.config.working_dir, image.config.user, image.config.stop_signal) == ("/w", "www-data", "SIGQUIT")
    assert image.config.exposed_ports == ("80/tcp",)


@pytest.mark.parametrize("pack", ["plain", "gzip", "zstd", "pzstd"])
def test_a_docker_archive(tmp_path: Path, cache: Path, pack: str) -> None:
    path = docker_archive(tmp_path / "it.tar", tar(entry("a")), tar(entry("b")), Cmd=None, Env=None)
    path.write_bytes(packed(path.read_bytes(), pack))
    image, found = read(path, cache)
    assert found == {"a", "b"}
    assert image.config.cmd == ()


def test_a_layer_that_is_a_link_to_another_and_an_oci_layout_in_a_tar(tmp_path: Path, cache: Path) -> None:
    layer = tar(entry("a"))
    data = config([layer, layer])
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": ["one/layer.tar", "two/layer.tar"]}]
    files = [entry("one/layer.tar", layer), symlink("two/layer.tar", "../one/layer.tar"), entry("c.json", data)]
    (tmp_path / "linked.tar").write_bytes(tar(*files, entry("manifest.json", json.dumps(manifest).encode())))
    assert read(tmp_path / "linked.tar", cache)[1] == {"a"}

    layout = Layout(tmp_path / "layout")
    layout.index(layout.image([tar(entry("b"))]))
    with tarfile.open(tmp_path / "oci.tar", "w") as archive:
        archive.add(layout.path, ".")
    assert read(tmp_path / "oci.tar", cache)[1] == {"b"}


def test_the_image_for_the_guest_is_taken_from_a_list(tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    intel = layout.image([tar(entry("intel"))], architecture="amd64")
    arm = layout.image([tar(entry("arm"))])
    platforms = [
        intel | {"platform": {"os": "linux", "architecture": "amd64"}},
        arm | {"platform": {"os": "linux", "architecture": "arm64"}},
        intel | {"platform": {"os": "unknown", "architecture": "unknown"}},
    ]
    layout.index(layout.blob(json.dumps({"manifests": platforms}).encode()))
    assert read(layout.path, cache)[1] == {"arm"}

    layout.index(layout.blob(json.dumps({"manifests": platforms[:1] + platforms[2:]}).encode()))
    with pytest.raises(UsageError, match="is an image for linux/amd64, not linux/arm64"):
        read(layout.path, cache)


def test_what_lies_beside_an_image_is_none(tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    image = layout.image([tar(entry("it"))])
    empty = layout.blob(b"{}")

    def beside(media: str, **more: object) -> dict[str, object]:
        config = {"mediaType": "application/vnd.oci.image.config.v1+json", **empty}
        manifest = {"config": config, "layers": [{"mediaType": media, **layout.blob(b"signed")}], **more}
        return layout.blob(json.dumps(manifest).encode())

    others = [
        beside("application/vnd.dev.cosign.simplesigning.v1+json"),
        beside("application/vnd.dsse.envelope.v1+json"),
        beside("application/vnd.oci.image.layer.v1.tar", artifactType="application/spdx+json"),
        beside("application/vnd.oci.image.layer.v1.tar", config={"mediaType": "application/x", **empty}),
        beside("application/vnd.oci.image.layer.v1.tar") | {"artifactType": "application/x"},
    ]
    for number, other in enumerate(others):
        layout.index(other, image)
        assert read(layout.path, cache)[1] == {"it"}, number
    named = image | {"annotations": {"org.opencontainers.image.ref.name": "it:1"}}
    layout.index(*others, named)
    assert read(layout.path, cache)[1] == read(layout.path, cache, tag="it:1")[1] == {"it"}
    layout.index(layout.blob(json.dumps({"manifests": [*others, image]}).encode()), others[0])
    assert read(layout.path, cache)[1] == {"it"}


def test_several_images_want_a_tag(tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")

    def named(name: str) -> dict[str, object]:
        annotations = {"org.opencontainers.image.ref.name": name}
        return layout.image([tar(entry(name))]) | {"annotations": annotations}

    layout.index(named("one"), named("two"))
    with pytest.raises(UsageError, match="holds 2 images") as caught:
        read(layout.path, cache)
    assert "one, two" in str(caught.value)
    assert read(layout.path, cache, tag="two")[1] == {"two"}
    with pytest.raises(UsageError, match="called 'three'"):
        read(layout.path, cache, tag="three")

    archive = docker_archive(tmp_path / "it.tar", tar(entry("a")), tags=("it:1", "it:latest"))
    assert read(archive, cache, tag="it:latest")[1] == {"a"}
    with pytest.raises(UsageError, match="it:1, it:latest"):
        read(archive, cache, tag="it:2")


def test_another_platform_is_named(tmp_path: Path, cache: Path) -> None:
    archive = docker_archive(tmp_path / "it.tar", tar(entry("a")), architecture="amd64")
    with pytest.raises(UsageError, match="is an image for linux/amd64, not linux/arm64"):
        read(archive, cache)


@pytest.mark.parametrize("pack", ["", "gzip", "zstd"])
def test_every_changed_byte_is_a_mismatch(tmp_path: Path, cache: Path, pack: str) -> None:
    layout = Layout(tmp_path / "layout")
    layout.index(layout.image([tar(entry("a", bytes(range(256)) * 64))], pack=pack))
    for blob in layout.blobs.iterdir():
        good = blob.read_bytes()
        for position in (0, len(good) // 2, len(good) - 1):
            blob.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises(HashMismatch) as caught:
                read(layout.path, cache)
            assert blob.name in str(caught.value)
        blob.write_bytes(good[:-1])
        with pytest.raises(HashMismatch):
            read(layout.path, cache)
        blob.write_bytes(good)
        assert not [path for path in cache.glob("*") if path.suffix != ".lock"]
    assert read(layout.path, cache)[1] == {"a"}


def test_a_changed_layer_of_a_docker_archive(tmp_path: Path, cache: Path) -> None:
    path = docker_archive(tmp_path / "it.tar", tar(entry("a", b"0123456789")))
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"012345678X"))
    with pytest.raises(HashMismatch, match=r"layer 1 of 1, unpacked"):
        read(path, cache)


def test_what_is_no_image(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(UsageError, match="there is no image"):
        read(tmp_path / "missing", cache)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="not a whole tar archive") as caught:
        read(tmp_path / "text", cache)
    assert "OCI layout" in str(caught.value)
    (tmp_path / "other.tar").write_bytes(tar(entry("a")))
    with pytest.raises(UsageError, match=r"neither index\.json nor manifest\.json"):
        read(tmp_path / "other.tar", cache)
    whole = docker_archive(tmp_path / "cut.tar", tar(entry("a", bytes(5000)))).read_bytes()
    for length in (100, 3000, len(whole) // 2):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(UsageError):
            read(tmp_path / "cut.tar", cache)
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(UsageError, match="not a whole tar archive"):
        read(tmp_path / "cut.tar.gz", cache)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"index.json": b"["}, "index.json is malformed"),
        ({"index.json": b"[]"}, "it is a JSON list"),
        ({"index.json": b'{"manifests": [1]}'}, "it lists no images"),
        ({"index.json": b'{"manifests": [{"digest": "sha256:../../x"}]}'}, "is not a digest"),
        ({"index.json": b'{"manifests": [{}]}'}, "its index is malformed"),
        ({"index.json": b'{"manifests": ' + b"[" * 100_000}, "index.json is malformed: it is nested too deeply"),
        ({"index.json": b'{"manifests": [{"annotations": [1]}]}'}, "is malformed"),
        ({"manifest.json": b"[" * 100_000}, "manifest.json is malformed: it is nested too deeply"),
        ({"manifest.json": b'[{"RepoTags": 5}]'}, "is malformed"),
    ],
)
def test_malformed_layouts(tmp_path: Path, cache: Path, change: dict[str, bytes], reason: str) -> None:
    layout = Layout(tmp_path / "layout")
    layout.index(layout.image([tar(entry("a"))]))
    for name, data in change.items():
        (layout.path / name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        read(layout.path, cache)
    assert reason in str(caught.value)


def test_a_missing_blob_is_named(tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layer = tar(entry("a"))
    layout.index(layout.image([layer]))
    (layout.blobs / sha256(layer).removeprefix("sha256:")).unlink()
    with pytest.raises(UsageError, match="is no whole image") as caught:
        read(layout.path, cache)
    assert sha256(layer).removeprefix("sha256:") in str(caught.value)


def test_an_endless_layer_is_stopped(tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layout.index(layout.image([tar(entry("a")) + bytes(8 << 20)], pack="gzip"))
    with pytest.raises(UsageError, match="more than the allowed"):
        read(layout.path, cache, max_bytes=1 << 20)


# --- the cache -----------------------------------------------------------------------------------------------------


def test_an_image_is_unpacked_once_and_forgotten_after_a_week(tmp_path: Path, cache: Path) -> None:
    first = docker_archive(tmp_path / "first.tar", tar(entry("a")))
    second = docker_archive(tmp_path / "second.tar", tar(entry("b")))
    with image_root(first, cache=cache) as image:
        inode = image.root.stat().st_ino
        with image_root(first, cache=cache) as again:
            assert again.root.stat().st_ino == inode
        # Long ago, but in use.
        old = image.root.with_suffix(".lock").stat().st_mtime + 8 * 24 * 3600
        with image_root(second, cache=cache, now=lambda: old):
            assert image.root.is_dir()
    with image_root(second, cache=cache, now=lambda: old) as other:
        assert sorted(path.name for path in cache.iterdir()) == [other.root.name, f"{other.root.name}.lock"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    for name in ("1-dead.lock", "1-dead.new/x"):
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).touch()
    with image_root(docker_archive(tmp_path / "it.tar", tar(entry("a"))), cache=cache):
        assert not (cache / "1-dead.new").exists()


ANY = st.recursive(
    st.sampled_from([None, True, -1, 1e400, 10**30, "", "a", "\ud800", "A=b", "sha256:" + "0" * 64, "arm64", "linux"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["os", "architecture", "manifests", "digest", "config", "layers"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=60)
@given(
    st.sampled_from(["index", "descriptor", "manifest", "config", "section"]),
    st.dictionaries(
        st.sampled_from(
            "manifests config layers digest size mediaType platform annotations artifactType os architecture rootfs "
            "diff_ids Entrypoint Cmd Env WorkingDir User ExposedPorts StopSignal".split()
        ),
        ANY,
        max_size=2,
    ),
)
def test_any_document_of_an_image_is_read_or_an_error(place: str, fields: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        layout = Layout(Path(directory) / "layout")
        layer = tar(entry("a"))
        parts: dict[str, dict[str, object]] = {name: {} for name in ("index", "manifest", "config", "section")}
        parts[place] = fields
        document = json.loads(config([layer])) | parts["config"]
        if place == "section":
            document["config"] = fields
        manifest = {
            "config": layout.blob(json.dumps(document).encode()),
            "layers": [layout.blob(layer)],
            **parts["manifest"],
        }
        descriptor = layout.blob(json.dumps(manifest).encode())
        index = {"manifests": [descriptor | (fields if place == "descriptor" else {}), descriptor], **parts["index"]}
        (layout.path / "index.json").write_text(json.dumps(index))
        try:
            _, found = read(layout.path, Path(directory) / "cache")
        except (UsageError, HashMismatch):
            return
        assert found == {"a"}
