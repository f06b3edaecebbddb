"""What a runtime is told about a container follows from the image and the user's wishes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.vm import seccomp, spec
from vzrepro.guest.vm.rootfs import Image, ImageConfig
from vzrepro.guest.vm.spec import (
    ContainerLimits,
    Mount,
    ProgramNotExecutable,
    ProgramNotFound,
    User,
    Volume,
    check_program,
    check_signal,
    check_targets,
    document,
    missing_directory,
    process,
    user_of,
)

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
    with pytest.raises(UsageError, match=r"'\\udcff' is not UTF-8"):
        process(image(root, env={"A": "\udcff"}), ["x"], env={})


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
    found = document(
        "box", root, made, [("/mnt/1", mount)], ContainerLimits(64, 0.5, 20), "/run/box", "/bin/init", memcg=True
    )
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
    as_root = document(
        "box", root, process(image(root), ["x"], env={}), [], ContainerLimits(), "/run/box", "/bin/init", memcg=True
    )
    assert "CAP_CHOWN" in as_root["process"]["capabilities"]["effective"]
    assert not {"CAP_SYS_ADMIN", "CAP_MKNOD"} & set(as_root["process"]["capabilities"]["bounding"])


def places(root: Path, *mounts: tuple[str, Mount]) -> dict[str, str]:
    """Source → where a container of the image sees it, for what is bound."""
    made = process(image(root), ["x"], env={})
    found = document("box", root, made, mounts, ContainerLimits(), "/own", "/bin/init", memcg=True)["mounts"]
    return {each["source"]: each["destination"] for each in found if each["type"] == "bind"}


def test_mount_points_are_where_the_images_links_lead(root: Path) -> None:
    assert places(root)["/own/resolv.conf"] == "/etc/resolv.conf"
    (root / "etc/resolv.conf").symlink_to("../run/systemd/resolve/stub-resolv.conf")
    (root / "etc/hosts").symlink_to("/etc/static/hosts")
    (root / "etc/static").symlink_to("/nix/store/etc")
    (root / "etc/hostname").symlink_to("/dev/null")
    (root / "data").symlink_to("mnt/disk")
    found = places(root, ("/mnt/1", Mount(root, "/data")), ("/mnt/2", Mount(root, "/data/below")))
    assert found["/own/resolv.conf"] == "/run/systemd/resolve/stub-resolv.conf"
    assert found["/own/hosts"] == "/nix/store/etc/hosts"
    assert "/own/hostname" not in found
    assert (found["/mnt/1"], found["/mnt/2"]) == ("/mnt/disk", "/data/below")
    assert places(root, ("/mnt/1", Mount(root, "/etc")))["/own/hosts"] == "/etc/hosts"
    (root / "etc/hosts").unlink()
    (root / "etc/hosts").mkdir()
    with pytest.raises(UsageError, match="/etc/hosts is a directory"):
        places(root)


@pytest.mark.parametrize(
    ("directory", "missing"),
    [
        ("/", None),
        ("/etc", None),
        ("/srv/data/app", "srv/data/app"),
        ("/link/app", "opt/app"),
        ("/opt/../srv", "srv"),
        ("/mounted/app", None),
        ("/proc/1", None),
        ("/to-mounted", None),
    ],
)
def test_a_working_directory_that_no_layer_made(root: Path, directory: str, missing: str | None) -> None:
    (root / "link").symlink_to("/opt")
    (root / "to-mounted").symlink_to("mounted/app")
    (root / "etc/app").mkdir()
    made = process(image(root, working_dir=directory), ["x"], env={})
    assert missing_directory(root, made, [Mount(root / "etc", "/mounted")]) == missing


def test_a_working_directory_that_cannot_be(root: Path) -> None:
    for directory in ("/etc/passwd", "/etc/passwd/app"):
        with pytest.raises(UsageError, match="cannot be the working directory") as caught:
            missing_directory(root, process(image(root), ["x"], env={}, working_dir=directory), [])
        assert "a file at /etc/passwd" in (caught.value.reason or "")
    made = process(image(root), ["x"], env={}, working_dir="/mounted/inner/app")
    inner = Mount(root / "etc", "/mounted/inner")
    with pytest.raises(UsageError, match="no /mounted/inner/app to work in") as caught:
        missing_directory(root, made, [Mount(root, "/mounted"), inner])
    assert f"{root}/etc, which is at /mounted/inner, has no such directory" in (caught.value.reason or "")


@pytest.mark.parametrize("directory", ["/" + "x" * 256, "/" + "a/" * 2100])
def test_a_working_directory_that_is_too_long(root: Path, directory: str) -> None:
    with pytest.raises(UsageError, match="cannot be the working directory"):
        process(image(root, cmd=("sh",), working_dir=directory), (), env={})


def test_a_program_that_nothing_can_be_called(root: Path) -> None:
    for word in ("x" * 256, "/" + "x" * 256):
        with pytest.raises(ProgramNotFound):
            check_program(image(root), process(image(root), (word,), env={}), [])


_TEXTS = st.lists(
    st.sampled_from(
        ["/", "..", ".", "a", "etc", "passwd", "x" * 300, "\0", "\ud800", "²", "9" * 12, ":", "-1", "SIGRTMIN+"]
    )
).map("".join)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_TEXTS, _TEXTS, _TEXTS, _TEXTS)
def test_any_config_is_a_process_or_an_error(root: Path, word: str, directory: str, user: str, stop: str) -> None:
    with contextlib.suppress(VzreproError):
        check_signal(stop)
    with contextlib.suppress(VzreproError):
        wanted = image(root, entrypoint=(word,), working_dir=directory, user=user)
        found = process(wanted, (), env={})
        assert missing_directory(root, found, []) != ""
        check_program(wanted, found, [])


def test_which_signals_there_are() -> None:
    for text in "SIGTERM term 15 Quit SIGRTMIN SIGRTMIN+3 rtmin+30 RTMAX-14 RTMAX 64 SIGRTMAX-30".split():
        check_signal(text)
    for text in "", "0", "65", "-9", "SIG", "SIGNOTHING", "RTMIN+31", "RTMIN-1", "RTMIN3", "RTMAX+1", "9 ", "٣":
        with pytest.raises(UsageError, match="no signal"):
            check_signal(text)


def test_no_system_call_is_both_allowed_and_refused() -> None:
    rules = seccomp.profile()["syscalls"]
    names = [name for rule in rules if "args" not in rule for name in rule["names"]]
    assert len(names) == len(set(names))
    assert not {"clone3", "unshare", "mount", "setns"} & set(rules[0]["names"])


def _allows(profile: dict[str, Any], name: str, **arguments: int) -> bool:
    """Whether a call with these arguments (`a2=0o755`) is allowed."""

    def holds(argument: dict[str, Any]) -> bool:
        value = arguments.get(f"a{argument['index']}", 0)
        return bool(value & argument["valueTwo"] == argument["value"])

    rules = [rule for rule in profile["syscalls"] if name in rule["names"]]
    found = {rule["action"] for rule in rules if all(map(holds, rule.get("args", [])))}
    assert len(found) < 2, "two rules that contradict each other"
    return found == {"SCMP_ACT_ALLOW"}


@pytest.mark.parametrize(
    ("name", "argument"), [("fchmod", "a1"), ("fchmodat", "a2"), ("fchmodat2", "a2"), ("mknodat", "a2")]
)
def test_no_set_uid_where_files_are_the_hosts(name: str, argument: str) -> None:
    bounded = seccomp.profile(set_uid=False)
    assert _allows(bounded, name, **{argument: 0o3777})
    assert not _allows(bounded, name, **{argument: 0o4755})
    assert _allows(seccomp.profile(), name, **{argument: 0o4755})


def test_a_file_is_not_opened_into_being_with_set_uid() -> None:
    bounded = seccomp.profile(set_uid=False)
    assert _allows(bounded, "openat", a2=0, a3=0o4755), "an old register, no mode"
    assert _allows(bounded, "openat", a2=0o101, a3=0o644)
    assert not _allows(bounded, "openat", a2=0o101, a3=0o4755)
    assert not _allows(bounded, "openat", a2=0o20040002, a3=0o4755), "O_TMPFILE"
    assert not _allows(bounded, "openat2")


def test_a_kernel_that_limits_no_memory_is_not_asked_to(root: Path) -> None:
    made = process(image(root), ["x"], env={})
    found = document("box", root, made, [], ContainerLimits(64, 1, 20), "/run/box", "/bin/init", memcg=False)
    assert set(found["linux"]["resources"]) == {"devices", "cpu", "pids"}


@pytest.mark.parametrize(("uid", "read_only", "bounded"), [(0, False, True), (0, True, False), (1000, False, False)])
def test_set_uid_is_refused_where_root_shares_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, read_only: bool, bounded: bool
) -> None:
    monkeypatch.setattr(spec.os, "geteuid", lambda: uid)
    mounts = [("/mnt/1", Mount(tmp_path, "/data", read_only))]
    made = process(image(tmp_path), ["x"], env={})
    found = document("box", tmp_path, made, mounts, ContainerLimits(), "/run/box", "/bin/init", memcg=True)
    assert found["linux"]["seccomp"] == seccomp.profile(set_uid=not bounded)


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


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("data:/x", Volume("data", "/x")),
        ("a.b-c_1:/x/y/:ro", Volume("a.b-c_1", "/x/y", True)),
        (f"{'n' * 64}:/x:rw", Volume("n" * 64, "/x")),
    ],
)
def test_volumes(text: str, volume: Volume) -> None:
    assert Volume.parse(text) == volume


@pytest.mark.parametrize(
    "text", ["", "a", ":/x", "a:", "a:x", "a:/x/../y", ".a:/x", "a/b:/x", "..:/x", f"{'n' * 65}:/x"]
)
def test_what_is_no_volume(text: str) -> None:
    with pytest.raises(UsageError, match="is no volume"):
        Volume.parse(text)


def test_two_of_a_place_are_refused(tmp_path: Path) -> None:
    check_targets([Mount(tmp_path, "/a"), Volume("v", "/b"), Volume("v", "/c")])
    with pytest.raises(UsageError, match="two mounts or volumes are to be at /a"):
        check_targets([Mount(tmp_path, "/a"), Volume("v", "/a")])


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
    for word in ("missing", "/bin/missing", "/../bin/x", "bin"):
        with pytest.raises(ProgramNotFound) as missing:
            check(word)
        assert missing.value.exit_code == 127
    for word in ("not-executable", "/bin/not-executable", "/usr/bin"):
        with pytest.raises(ProgramNotExecutable) as unfit:
            check(word)
        assert unfit.value.exit_code == 126
    program(root / "bin2/not-executable")
    check("not-executable", env={"PATH": "/bin:/bin2"})
    check("/data/missing", mounts=(Mount(root, "/data"),))
