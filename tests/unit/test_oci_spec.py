"""What a runtime is told about a container follows from the image and the user's wishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vzrepro.errors import UsageError
from vzrepro.vm import seccomp
from vzrepro.vm.rootfs import Image, ImageConfig
from vzrepro.vm.spec import Limits, Mount, ProgramNotFound, User, check_program, document, process, user_of

PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:34:www:/var/www:/bin/sh\nbroken line\nbad:x:9999999999999:1::/:/x\n"
)
GROUP = "root:x:0:\nadm:x:4:www-data,other\nssl:x:110:www-data\nstaff:x:50:\n"
ARM = b"\x7fELF\x02\x01\x01" + bytes(11) + (183).to_bytes(2, "little")
INTEL = b"\x7fELF\x02\x01\x01" + bytes(11) + (62).to_bytes(2, "little")


def program(path: Path, data: bytes = ARM) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(PASSWD)
    (tmp_path / "etc/group").write_text(GROUP)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0, (), "/root")),
        ("www-data", User(33, 34, (4, 110), "/var/www")),
        ("33", User(33, 34, (4, 110), "/var/www")),
        ("www-data:staff", User(33, 50, (), "/var/www")),
        ("1000", User(1000, 0, (), "/")),
        ("1000:1001", User(1000, 1001, (), "/")),
        (":50", User(0, 50, (), "/root")),
    ],
)
def test_users(root: Path, text: str, user: User) -> None:
    assert user_of(root, text) == user


@pytest.mark.parametrize("text", ["nobody", "www-data:nogroup", "bad", "4294967295"])
def test_users_that_are_not_there(root: Path, text: str) -> None:
    with pytest.raises(UsageError):
        user_of(root, text)


def test_an_account_file_that_leads_out_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("evil:x:7:7::/:/x\n")
    image = tmp_path / "image"
    (image / "etc").mkdir(parents=True)
    (image / "etc/passwd").symlink_to("../../secret")
    with pytest.raises(UsageError):
        user_of(image, "evil")
    assert user_of(image, "") == User()


def image(root: Path, **config: object) -> Image:
    return Image(root, ImageConfig(**config))  # type: ignore[arg-type]


def test_the_command(root: Path) -> None:
    both = image(root, entrypoint=("/e",), cmd=("a", "b"))
    assert process(both, [], env={}).arguments == ("/e", "a", "b")
    assert process(both, ["x"], env={}).arguments == ("/e", "x")
    with pytest.raises(UsageError, match="names no command"):
        process(image(root), [], env={})
    with pytest.raises(UsageError, match="NUL"):
        process(image(root), ["a\0b"], env={})


def test_the_environment(root: Path) -> None:
    found = process(image(root, env={"A": "1", "B": "2"}, user="www-data"), ["x"], env={"B": "3"}, terminal=True)
    assert (found.env["A"], found.env["B"]) == ("1", "3")
    assert found.env["HOME"] == "/var/www"
    assert found.env["TERM"] == "xterm"
    assert "/usr/bin" in found.env["PATH"].split(":")
    assert process(image(root, env={"PATH": "/only"}), ["x"], env={}).env["PATH"] == "/only"
    later = process(image(root, entrypoint=("/e",), env={"A": "1"}), ["x"], env={}, inherited={"C": "4"})
    assert later.arguments == ("x",)
    assert "A" not in later.env
    assert later.env["C"] == "4"


def test_the_document(root: Path) -> None:
    mount = Mount(root, "/data", read_only=True)
    made = process(image(root, working_dir="srv"), ["/bin/x"], env={}, user="www-data")
    found = document("box", made, [("/mnt/1", mount)], Limits(64, 0.5, 20), "/run/box", "/bin/init")
    json.dumps(found)
    assert found["process"]["args"] == ["/dev/vz-init", "init", "/bin/x"]
    assert found["process"]["cwd"] == "/srv"
    assert found["process"]["user"] == {"uid": 33, "gid": 34, "additionalGids": [4, 110]}
    assert found["process"]["capabilities"]["effective"] == []
    assert found["process"]["noNewPrivileges"] is True
    resources = found["linux"]["resources"]
    assert resources["memory"]["limit"] == 64 << 20
    assert resources["cpu"] == {"quota": 50_000, "period": 100_000}
    assert resources["pids"]["limit"] == 20
    assert {"type": "network"} not in found["linux"]["namespaces"]
    (bound,) = [each for each in found["mounts"] if each["destination"] == "/data"]
    assert bound["source"] == "/mnt/1"
    assert "ro" in bound["options"]
    as_root = document("box", process(image(root), ["x"], env={}), [], Limits(), "/run/box", "/bin/init")
    assert "CAP_CHOWN" in as_root["process"]["capabilities"]["effective"]
    assert not {"CAP_SYS_ADMIN", "CAP_MKNOD"} & set(as_root["process"]["capabilities"]["bounding"])


def test_no_system_call_is_both_allowed_and_refused() -> None:
    rules = seccomp.profile()["syscalls"]
    names = [name for rule in rules if "args" not in rule for name in rule["names"]]
    assert len(names) == len(set(names))
    assert not {"clone3", "unshare", "mount", "setns"} & set(rules[0]["names"])


@pytest.mark.parametrize(
    ("text", "target", "read_only"),
    [("{}:/x", "/x", False), ("{}:/x/y/:ro", "/x/y", True), ("{}:/x:rw", "/x", False)],
)
def test_mounts(tmp_path: Path, text: str, target: str, read_only: bool) -> None:
    source = tmp_path / "a:b"
    source.mkdir()
    assert Mount.parse(text.format(source)) == Mount(source, target, read_only)


@pytest.mark.parametrize("text", ["", "x", ":/x", "{}:", "{}:relative", "{}:/a/../../b", "{}/missing:/x", "{}/file:/x"])
def test_what_is_no_mount(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        Mount.parse(text.format(tmp_path))


def test_the_program_is_looked_for_before_anything_is_booted(root: Path) -> None:
    program(root / "usr/bin/tool")
    program(root / "usr/bin/intel", INTEL)
    program(root / "usr/bin/script", b"#!/bin/sh\n")
    (root / "usr/bin/not-executable").write_bytes(ARM)
    (root / "bin").symlink_to("/usr/bin")

    def check(*words: str, mounts: tuple[Mount, ...] = (), **config: object) -> None:
        made = image(root, **config)
        check_program(made, process(made, words, env={}), mounts)

    check("tool")
    check("/bin/tool")
    check("script")
    check("./tool", working_dir="/bin")
    with pytest.raises(UsageError, match="is a program for x86-64, not for arm64"):
        check("intel")
    for word in ("missing", "/bin/missing", "not-executable", "/usr/bin", "/../bin/x"):
        with pytest.raises(ProgramNotFound) as caught:
            check(word)
        assert caught.value.exit_code == 127
    check("/data/missing", mounts=(Mount(root, "/data"),))
