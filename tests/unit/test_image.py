"""The toolchain image: a docker-archive whose bytes depend on the packages' contents and on nothing else."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.debs import deb, file, folder, hardlink, symlink, write
from vzrepro.base.errors import UsageError
from vzrepro.base.model import IMAGE_FORMAT
from vzrepro.recipe.graph import DrvGraph
from vzrepro.sources.image import ImageId, image_id, image_tag, write_image

PLATFORM = "linux/amd64"


def layer(archive: Path) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(archive) as outer:
        stream = outer.extractfile("layer.tar")
        assert stream is not None
        with tarfile.open(fileobj=stream) as inner:
            return {member.name: member for member in inner}


def content(archive: Path, path: str) -> bytes:
    with tarfile.open(archive) as outer:
        stream = outer.extractfile("layer.tar")
        assert stream is not None
        with tarfile.open(fileobj=stream) as inner:
            body = inner.extractfile(path)
            assert body is not None
            return body.read()


def documents(archive: Path) -> tuple[list[dict[str, Any]], dict[str, Any], bytes]:
    """manifest, config, layer."""
    with tarfile.open(archive) as outer:
        parts = {member.name: outer.extractfile(member) for member in outer}
    data = {}
    with tarfile.open(archive) as outer:
        for name in parts:
            stream = outer.extractfile(name)
            assert stream is not None
            data[name] = stream.read()
    manifest = json.loads(data["manifest.json"])
    return manifest, json.loads(data[manifest[0]["Config"]]), data[manifest[0]["Layers"][0]]


def image(tmp_path: Path, *items: Any, **options: Any) -> dict[str, tarfile.TarInfo]:
    out = tmp_path / "image.tar"
    out.unlink(missing_ok=True)
    write_image([write(tmp_path / "p.deb", *items)], out, platform=PLATFORM, **options)
    return layer(out)


def test_the_archive_is_what_docker_load_wants(tmp_path: Path) -> None:
    out = tmp_path / "image.tar"
    identity = write_image([write(tmp_path / "p.deb", file("usr/bin/gcc", mode=0o755))], out, platform="linux/arm64")
    manifest, config, layer_tar = documents(out)
    config_bytes = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    assert manifest == [
        {
            "Config": f"{identity.hex}.json",
            "Layers": ["layer.tar"],
            "RepoTags": [f"vzrepro-toolchain:{identity.hex[:16]}"],
        }
    ]
    assert identity == ImageId(hashlib.sha256(config_bytes).hexdigest())
    assert (config["os"], config["architecture"]) == ("linux", "arm64")
    assert config["rootfs"] == {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer_tar).hexdigest()}"]}
    assert image_id(out) == identity
    assert str(identity) == f"sha256:{identity.hex}"
    assert image_tag(identity) == manifest[0]["RepoTags"][0]


def test_golden_bytes(tmp_path: Path) -> None:
    """If this fails, the same packages give another image: raise IMAGE_FORMAT, then take the new id over."""
    out = tmp_path / "image.tar"
    items = [folder("usr/bin"), file("usr/bin/gcc", b"gcc", 0o755), hardlink("usr/bin/gcc-14", "usr/bin/gcc")]
    identity = write_image([write(tmp_path / "p.deb", *items, file("x/" + "n" * 120))], out, platform=PLATFORM)
    assert (IMAGE_FORMAT, identity.hex) == (1, "a9fc2c305de5125e45081b943b0ba75c5d456b5d88d5c25930cef5b9e6198545")


def test_the_derivation_carries_this_format(declare: Callable[..., DrvGraph]) -> None:
    graph = declare(a="from vzrepro import debian_image\ndebian_image('tools', suite='trixie', packages=['dash'])")
    assert graph.find("image-tools").drv.env == {"image_format": str(IMAGE_FORMAT)}


def test_alternatives_are_made_or_not(declare: Callable[..., DrvGraph]) -> None:
    image = "from vzrepro import debian_image\ndebian_image('t', suite='trixie', packages=['dash'], alternatives={})"
    assert declare(a=image.format(True)).find("image-t").drv.env["alternatives"] == "1"
    assert "alternatives" not in declare(a=image.format(False)).find("image-t").drv.env
    with pytest.raises(UsageError, match="alternatives= is True or False"):
        declare(a=image.format("['automake']"))


def test_order_names_user_and_place_do_not_matter(tmp_path: Path) -> None:
    packages = [
        write(
            tmp_path / "a.deb", folder("usr"), file("usr/a", b"a"), hardlink("usr/z", "usr/a"), file("usr/shared", b"s")
        ),
        write(tmp_path / "b.deb", file("usr/shared", b"s"), file("lib/x/l.so", b"l"), symlink("bin/sh", "dash")),
        write(tmp_path / "c.deb", hardlink_pair := file("usr/q", b"q"), hardlink("usr/p", hardlink_pair.path)),
        write(tmp_path / "d.deb", folder("usr", 0o700), file("usr/lib/x/m.so", b"m")),
    ]
    digests = set()
    for number, order in enumerate(itertools.permutations(packages)):
        place = tmp_path / f"place{number}"
        place.mkdir()
        old = os.umask(0o077 if number % 2 else 0o022)
        try:
            write_image(order, place / "out", platform=PLATFORM)
        finally:
            os.umask(old)
        digests.add(hashlib.sha256((place / "out").read_bytes()).hexdigest())
        assert [path.name for path in place.iterdir()] == ["out"], "no spool file may stay"
    assert len(digests) == 1


def test_the_layer_is_sorted_and_anonymous(tmp_path: Path) -> None:
    members = image(tmp_path, file("usr/b", mode=0o4755), file("usr/a", mode=0o600), folder("usr/a-dir", 0o700))
    names = [name.encode("utf-8", "surrogateescape") for name in members]
    assert names == sorted(names)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members.values()} == {(1, 0, 0, "", "")}
    assert (members["usr/b"].mode, members["usr/a"].mode, members["usr/a-dir"].mode) == (0o755, 0o644, 0o755)


def test_top_directories_are_folded_into_usr(tmp_path: Path) -> None:
    base = write(tmp_path / "base.deb", symlink("sbin", "usr/sbin"), symlink("bin", "/usr/bin/"))
    tools = write(
        tmp_path / "t.deb", file("bin/a"), file("usr/bin/b"), file("lib64/ld.so"), folder("sbin"), file("sbin/i")
    )
    write_image([base, tools], tmp_path / "out", platform=PLATFORM)
    members = layer(tmp_path / "out")
    assert {name: members[name].linkname for name in ("bin", "lib", "lib64", "sbin")} == {
        "bin": "usr/bin",
        "lib": "usr/lib",
        "lib64": "usr/lib64",
        "sbin": "usr/sbin",
    }
    assert all(members[f"usr/{name}"].isreg() for name in ("bin/a", "bin/b", "lib64/ld.so", "sbin/i"))
    assert all(members[f"usr/{name}"].isdir() for name in ("bin", "lib", "lib64", "sbin"))


@pytest.mark.parametrize("item", [symlink("lib", "/opt/lib"), file("bin")])
def test_a_top_directory_that_is_something_else_is_refused(tmp_path: Path, item: Any) -> None:
    with pytest.raises(UsageError, match=r"p\.deb ships /(lib|bin) as a"):
        image(tmp_path, item)


def test_hard_links_follow_their_target_whatever_the_package_says(tmp_path: Path) -> None:
    members = image(tmp_path, file("usr/z", b"data"), hardlink("usr/m", "usr/z"), hardlink("usr/a", "usr/m"))
    assert members["usr/a"].isreg()
    assert content(tmp_path / "image.tar", "usr/a") == b"data"
    assert [(members[n].islnk(), members[n].linkname) for n in ("usr/m", "usr/z")] == [(True, "usr/a")] * 2


def test_a_hard_link_survives_when_its_target_is_dropped(tmp_path: Path) -> None:
    members = image(tmp_path, file("usr/share/doc/x/tool", b"data"), hardlink("usr/bin/tool", "usr/share/doc/x/tool"))
    assert "usr/share/doc/x/tool" not in members
    assert content(tmp_path / "image.tar", "usr/bin/tool") == b"data"


def test_links_only_where_the_target_is_and_nobody_ships_the_path(tmp_path: Path) -> None:
    members = image(tmp_path, file("usr/bin/gcc"), file("usr/bin/mawk"), file("usr/bin/gawk"), file("usr/bin/c99"))
    assert {name: m.linkname for name, m in members.items() if name.startswith("usr/bin/") and m.issym()} == {
        "usr/bin/awk": "gawk",
        "usr/bin/cc": "gcc",
    }
    assert members["usr/bin/c99"].isreg()


def test_the_caller_names_other_links_and_patterns(tmp_path: Path) -> None:
    items = [file("opt/tool-2"), file("opt/big"), file("opt/big-licence")]
    members = image(tmp_path, *items, links={"opt/tool": ("tool-3", "tool-2")}, drop=["opt/b*"], keep=["*licence"])
    assert sorted(name for name in members if name.startswith("opt/")) == ["opt/big-licence", "opt/tool", "opt/tool-2"]
    assert members["opt/tool"].linkname == "tool-2"


def test_documentation_stays_out_and_licences_stay(tmp_path: Path) -> None:
    dropped = ["usr/share/doc/x/README", "usr/share/man/man1/x.1.gz", "usr/share/locale/de/x.mo", "usr/share/info/x"]
    kept = ["usr/share/doc/x/copyright", "usr/lib/locale/C.utf8/LC_CTYPE", "usr/lib/python3.13/tests.py"]
    members = image(tmp_path, *map(file, dropped + kept), symlink("usr/share/doc/y", "x"))
    assert [path for path in dropped + kept if path in members] == kept
    assert "usr/share/doc/y" not in members


def test_what_maintainer_scripts_would_have_made(tmp_path: Path) -> None:
    members = image(tmp_path, file("usr/x"))
    out = tmp_path / "image.tar"
    assert content(out, "etc/passwd").startswith(b"root:x:0:0:")
    assert content(out, "etc/group").startswith(b"root:x:0:")
    assert b"passwd: files" in content(out, "etc/nsswitch.conf")
    assert members["tmp"].mode == members["var/tmp"].mode == 0o1777
    assert all(members[name].isdir() for name in ("build", "dev", "in", "out", "proc", "root", "run", "sys"))


def test_packages_may_share_a_file_only_if_it_is_the_same(tmp_path: Path) -> None:
    one = write(tmp_path / "one.deb", file("usr/x", b"same"), symlink("usr/l", "x"))
    two = write(tmp_path / "two.deb", file("usr/x", b"same"), symlink("usr/l", "x"))
    write_image([one, two], tmp_path / "ok", platform=PLATFORM)
    for number, item in enumerate(
        (file("usr/x", b"else"), file("usr/x", b"same", 0o755), symlink("usr/l", "y"), folder("usr/x"))
    ):
        other = write(tmp_path / "other.deb", item)
        with pytest.raises(UsageError, match=r"one\.deb and other\.deb both ship /usr/[xl], and differ"):
            write_image([other, one], tmp_path / f"bad{number}", platform=PLATFORM)
        assert not (tmp_path / f"bad{number}").exists()


def test_a_file_below_another_packages_symlink_is_refused(tmp_path: Path) -> None:
    link = write(tmp_path / "a.deb", symlink("usr/share/x", "/etc"))
    below = write(tmp_path / "b.deb", file("usr/share/x/passwd"))
    with pytest.raises(UsageError, match=r"b\.deb ships /usr/share/x/passwd, but /usr/share/x is a symlink \(a\.deb\)"):
        write_image([below, link], tmp_path / "out", platform=PLATFORM)


def test_a_whiteout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.wh\.passwd"):
        image(tmp_path, file("etc/.wh.passwd"))


def test_a_hostile_package_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    good = write(tmp_path / "good.deb", file("usr/x", b"x" * 100_000))
    evil = write(tmp_path / "evil.deb", file("../x"))
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(UsageError, match=r"^evil\.deb"):
        write_image([good, evil], place / "out", platform=PLATFORM)
    assert list(place.iterdir()) == []


def test_the_limit_counts_all_packages_together(tmp_path: Path) -> None:
    packages = [write(tmp_path / f"{n}.deb", file(f"usr/{n}", bytes(60_000))) for n in range(3)]
    write_image(packages[:2], tmp_path / "ok", platform=PLATFORM, max_bytes=150_000)
    with pytest.raises(UsageError, match="more than 150000 bytes"):
        write_image(packages, tmp_path / "out", platform=PLATFORM, max_bytes=150_000)


def test_a_package_given_twice_is_refused(tmp_path: Path) -> None:
    package = write(tmp_path / "p.deb", file("x"))
    with pytest.raises(UsageError, match=r"p\.deb is given twice"):
        write_image([package, package], tmp_path / "out", platform=PLATFORM)


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        write_image([write(tmp_path / "p.deb", file("x"))], tmp_path / "out", platform=PLATFORM)
    assert (tmp_path / "out").read_bytes() == b"precious"


@pytest.mark.parametrize("data", [b"", b"not a tar at all", deb(file("x"))])
def test_the_id_of_something_else_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UsageError, match="not a toolchain image"):
        image_id(tmp_path / "x")


def test_the_id_of_an_archive_with_another_manifest_is_an_error(tmp_path: Path) -> None:
    for manifest in (b"[]", b"{}", b"[{}]", b'[{"Config": 3}]', b'[{"Config": "../x.json"}]', b"nonsense"):
        with tarfile.open(tmp_path / "x", "w") as tar:
            member = tarfile.TarInfo("manifest.json")
            member.size = len(manifest)
            tar.addfile(member, io.BytesIO(manifest))
        with pytest.raises(UsageError, match="not a toolchain image"):
            image_id(tmp_path / "x")
