"""vzrepro/recipes/files/initramfs/newc.py: the archive, read back by a reader of our own and by cpio."""

import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.guests import load_newc

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/initramfs"
SCRIPT = ROOT / "vzrepro/recipes/files/initramfs/newc.py"


newc = load_newc()


@dataclass(frozen=True)
class Member:
    inode: int
    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    major: int
    minor: int
    data: bytes


def members(archive: bytes) -> dict[str, Member]:
    """A newc archive, read by the format's own description."""
    found: dict[str, Member] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11]]
        assert name.endswith(b"\0")
        at = (at + 110 + fields[11] + 3) & ~3
        data = archive[at : at + fields[6]]
        at = (at + fields[6] + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert not archive[at:].strip(b"\0")
            return found
        assert name[:-1].decode() not in found
        found[name[:-1].decode()] = Member(*fields[:6], *fields[9:11], data)


def entries(tmp_path: Path, text: str) -> list[object]:
    (tmp_path / "program").write_bytes(b"\x7fELF")
    (tmp_path / "applets").write_text("cat\nsh\n")
    return list(newc.parse(text.replace("$", str(tmp_path))))


SMALL = """\
# a comment
dir /bin 755
dir /dev 755

node /dev/console 600 5 1
file /bin/busybox 755 $/program
links /bin $/applets /lib/*/busybox
link /bin/ash busybox
"""


def test_every_kind_of_entry_comes_back(tmp_path: Path) -> None:
    found = members(newc.archive(entries(tmp_path, SMALL), mtime=1_767_225_600))
    assert list(found) == ["bin", "bin/ash", "bin/busybox", "bin/cat", "bin/sh", "dev", "dev/console"]
    assert [member.inode for member in found.values()] == [1, 2, 3, 4, 5, 6, 7]
    assert {(member.uid, member.gid, member.mtime) for member in found.values()} == {(0, 0, 1_767_225_600)}
    assert found["bin"].mode == stat.S_IFDIR | 0o755
    assert found["bin"].links == 2
    assert found["bin/busybox"] == Member(3, stat.S_IFREG | 0o755, 0, 0, 1, 1_767_225_600, 0, 0, b"\x7fELF")
    assert found["bin/sh"].mode == stat.S_IFLNK | 0o777
    assert found["bin/sh"].data == b"/lib/sh/busybox"
    assert found["bin/ash"].data == b"busybox"
    assert found["dev/console"].mode == stat.S_IFCHR | 0o600
    assert (found["dev/console"].major, found["dev/console"].minor) == (5, 1)


def test_the_order_of_the_manifest_does_not_matter(tmp_path: Path) -> None:
    given = entries(tmp_path, SMALL)
    assert newc.archive(given, mtime=1) == newc.archive(reversed(given), mtime=1)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=9), st.binary(max_size=40), max_size=5))
def test_any_files_come_back(files: dict[str, bytes]) -> None:
    archive = newc.archive([newc.Entry(f"/{name}", stat.S_IFREG | 0o644, data) for name, data in files.items()], 1)
    assert len(archive) % newc.BLOCK == 0
    assert {name: member.data for name, member in members(archive).items()} == files


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("file /bin/x 755 $/nothing", "No such file"),
        ("dir /bin rwx", "invalid literal"),
        ("dir /bin", "wrong number of words"),
        ("fifo /x 644", "no such kind of line"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(newc.ManifestError, match=f"manifest line 1: .*{said}"):
        entries(tmp_path, line)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/bin", "there twice"),
        ("/sbin/x", "parent directory is not in the manifest"),
        ("/bin/busybox/x", "parent directory is not in the manifest"),
        ("bin/x", "not an absolute path"),
        ("/bin/../x", "not an absolute path"),
        ("/bin/", "not an absolute path"),
    ],
)
def test_a_wrong_path_is_named(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(newc.ManifestError, match=said):
        newc.archive([*entries(tmp_path, SMALL), newc.Entry(path, stat.S_IFREG | 0o644)], 1)


def test_the_command_writes_the_recipes_archive(tmp_path: Path) -> None:
    """The recipe's own manifest, with stand-ins for what other recipes build."""
    for name in ("busybox", "vz-guest-agent"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "applets").write_text("sh\nip\n")
    (tmp_path / "sbin").write_text("ip\n")
    text = (RECIPE / "manifest").read_text().replace("/in/src/", f"{RECIPE}/").replace("/in/sysctl/", f"{RECIPE}/")
    text = text.replace("/in/busybox/", f"{tmp_path}/").replace("/in/agent/", f"{tmp_path}/")
    (tmp_path / "manifest").write_text(text)

    command = [sys.executable, str(SCRIPT), str(tmp_path / "manifest")]
    env = {"SOURCE_DATE_EPOCH": "1767225600"}
    subprocess.run([*command, str(tmp_path / "one")], check=True, env=env, capture_output=True)
    subprocess.run([*command, str(tmp_path / "two")], check=True, env={**env, "TZ": "Asia/Tokyo"}, capture_output=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    found = members((tmp_path / "one").read_bytes())
    assert found["init"].mode == stat.S_IFREG | 0o755
    assert found["init"].data == (RECIPE / "init").read_bytes()
    assert found["dev/console"].major == 5
    assert found["layers/bin/usr/bin/ip"].data == b"/usr/lib/vz/busybox"
    assert found["layers/sbin/usr/sbin/ip"].data == b"/bin/ip"
    assert found["layers/base/usr/lib/vz/vz-guest-agent"].data == b"vz-guest-agent"


def test_a_wrong_manifest_is_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "manifest").write_text("dir bin 755\n")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "manifest"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("newc: 'bin' is not an absolute path")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_lists_the_same(tmp_path: Path) -> None:
    archive = newc.archive(entries(tmp_path, SMALL), mtime=1)
    done = subprocess.run(["cpio", "-t", "--quiet"], input=archive, capture_output=True, check=True)
    assert done.stdout.decode().split() == list(members(archive))
