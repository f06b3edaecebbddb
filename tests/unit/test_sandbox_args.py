"""The sandbox without Docker: what is asked of the engine, how inputs are staged, and what its complaints become.

The engine is a small shell script that plays the docker client.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vzrepro import sandbox
from vzrepro.base.errors import BuildFailed, VzreproError
from vzrepro.sandbox import confine, ways
from vzrepro.sandbox import engine as engine_names

IMAGE = "sha256:" + "ab" * 32
STORE_PATH = re.compile(r"[0-9a-df-np-sv-z]{32}-")
PROFILE = json.loads(Path(sandbox.__file__).with_name("seccomp.json").read_text())


def make_job(tmp_path: Path, **changes: Any) -> sandbox.Job:
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700, exist_ok=True)
    fields: dict[str, Any] = {
        "label": "thing",
        "image": IMAGE,
        "command": ("make", "all"),
        "scratch": scratch,
        "log": tmp_path / "log",
        "source_date_epoch": 42,
        "cores": 1,
    }
    return sandbox.Job(**(fields | changes))


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Install a script as the docker client, of an engine that mounts what is here; returns the file in which it notes
    its arguments."""
    calls = tmp_path / "calls"
    monkeypatch.setattr(ways, "sharing_of", lambda _: sandbox.Sharing(True, "it sees this machine's files"))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)

    def install(body: str) -> Path:
        script = tmp_path / "fake-docker"
        script.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(calls))}\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("VZREPRO_DOCKER", str(script))
        return calls

    return install


def options(argv: list[str], name: str) -> list[str]:
    return [value for flag, value in itertools.pairwise(argv) if flag == name]


def test_the_contract_is_asked_for(tmp_path: Path) -> None:
    argv = sandbox.shell_command(make_job(tmp_path, memory_bytes=1 << 30))
    assert argv[0] == "docker"
    for flag in ("--read-only", "--rm"):
        assert flag in argv
    for flag, value in {
        "--network": "none",
        "--cap-drop": "ALL",
        "--ipc": "private",
        "--cgroupns": "private",
        "--hostname": "localhost",
        "--user": "1000:1000",
        "--workdir": "/build",
        "--pull": "never",
        "--platform": "linux/amd64",
        "--memory": str(1 << 30),
        "--memory-swap": str(1 << 30),
    }.items():
        assert options(argv, flag) == [value], flag
    security = options(argv, "--security-opt")
    assert "no-new-privileges" in security
    profile = next(option for option in security if option.startswith("seccomp="))
    assert Path(profile.removeprefix("seccomp=")).is_file()
    assert not {"--privileged", "--cap-add", "--device", "--volume", "-v", "--env", "-e"} & set(argv)
    assert "docker.sock" not in " ".join(argv)


def test_a_build_is_started_with_exactly_these_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change here changes what builders see: surroundings are for audits, and without them all is as it was."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    job = make_job(tmp_path, memory_bytes=1 << 30, env={"X": "y"})
    hidden = [
        f"--tmpfs {path}:ro,nosuid,nodev,noexec,mode=555,size=4k"
        for path in ("/sys", "/dev/shm", "/dev/mqueue", "/run", "/var/tmp")
    ]
    expected = f"""
        run --name N --label vzrepro.host=H --label vzrepro.target=thing --log-driver none
        --pull never --platform linux/amd64 --network none --hostname localhost --ipc private --cgroupns private
        --read-only --cap-drop ALL --user 1000:1000 --workdir /build
        --security-opt no-new-privileges --security-opt seccomp=P
        --pids-limit 16384 --ulimit core=0:0 --ulimit nofile=16384:16384
        --tmpfs /tmp:rw,exec,nosuid,nodev,mode=1777,size=4g {" ".join(hidden)}
        --mount type=bind,src=S/build,dst=/build --mount type=bind,src=S/out,dst=/out
        --mount type=bind,src=S/in,dst=/in,readonly --mount type=bind,src=S/etc/hosts,dst=/etc/hosts,readonly
        --mount type=bind,src=S/etc/hostname,dst=/etc/hostname,readonly
        --mount type=bind,src=S/etc/resolv.conf,dst=/etc/resolv.conf,readonly
        --memory 1073741824 --memory-swap 1073741824 --cpus 1 --entrypoint sh {IMAGE} -c""".split()
    expected += [
        'umask 022; exec 2>&1 env -i sh -c "$0" sh "$@"',
        'env -i "$@"; status=$?; exit "$status"',
        *("PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/build", "SOURCE_DATE_EPOCH=42", "TZ=UTC", "LC_ALL=C.UTF-8"),
        *("VZ_CORES=1", "X=y", "make", "all"),
    ]
    argv = [word.replace(str(job.scratch), "S") for word in confine.run_arguments(job, "N")]
    argv = [word.replace(str(confine.SECCOMP), "P").replace(engine_names.host_name(), "H") for word in argv]
    assert argv == expected


def test_a_build_that_others_are_more_urgent_than_has_less_of_the_processors(tmp_path: Path) -> None:
    weights = []
    for urgency in (1.0, 0.99, 0.5, 0.0):
        weights += options(confine.run_arguments(make_job(tmp_path, urgency=urgency), "N"), "--cpu-shares")
    assert weights == ["994", "128", "2"], "never more than an ordinary container's, which is 1024"


def test_only_the_scratch_directory_is_mounted(tmp_path: Path) -> None:
    store_object = tmp_path / ("0" * 32 + "-input")
    store_object.write_text("x")
    job = make_job(tmp_path, inputs={"src": store_object})
    mounts = options(sandbox.shell_command(job), "--mount")
    targets = {re.search(r"dst=([^,]*)", mount)[1]: mount for mount in mounts}  # type: ignore[index]
    assert set(targets) == {"/build", "/out", "/in", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert all(f"src={job.scratch}/" in mount for mount in mounts)
    assert {target for target, mount in targets.items() if "readonly" not in mount.split(",")} == {"/build", "/out"}
    assert not STORE_PATH.search(" ".join(mounts))


def test_a_comma_in_a_path_stays_in_it(tmp_path: Path) -> None:
    job = make_job(tmp_path / 'a,readonly"b')
    assert f"""type=bind,"src={str(job.build).replace('"', '""')}",dst=/build""" in sandbox.shell_command(job)


@pytest.fixture(autouse=True)
def _parents(tmp_path: Path) -> None:
    (tmp_path / 'a,readonly"b').mkdir()


def test_environment(tmp_path: Path) -> None:
    job = make_job(tmp_path, env={"TZ": "Mars", "X": "a b"}, cores=7)
    assert job.environment == {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/build",
        "SOURCE_DATE_EPOCH": "42",
        "TZ": "Mars",
        "LC_ALL": "C.UTF-8",
        "VZ_CORES": "7",
        "X": "a b",
    }


@pytest.mark.parametrize(
    "bad",
    [
        {"inputs": {"a/b": Path("/x")}},
        {"inputs": {"..": Path("/x")}},
        {"inputs": {"": Path("/x")}},
        {"env": {"-i": "x"}},
        {"env": {"A=B": "x"}},
        {"command": ()},
        {"command": ("A=b",)},
    ],
)
def test_what_would_be_read_as_something_else_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        make_job(tmp_path, **bad)


def test_staging_shows_the_object_itself(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine("")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "run").write_text("#!")
    (tree / "sub" / "run").chmod(0o555)
    (tree / "link").symlink_to("./sub//run")
    for path in (tree / "sub" / "run", tree / "sub", tree):
        os.utime(path, (1, 1))
    job = make_job(tmp_path, inputs={"tree": tree, "file": tree / "sub" / "run"})
    sandbox.prepare(job)
    staged = job.scratch / "in"
    assert sorted(path.name for path in staged.iterdir()) == ["file", "tree"]
    assert os.readlink(staged / "tree" / "link") == "./sub//run"  # noqa: PTH115 - as it is
    assert (staged / "file").samefile(tree / "sub" / "run")
    for path in (staged / "tree", staged / "tree" / "sub", staged / "tree" / "sub" / "run"):
        assert (path.stat().st_mtime, path.stat().st_mode & 0o777) == (1, 0o555)
    assert list(job.build.iterdir()) == list(job.out.iterdir()) == []
    assert {job.build.stat().st_mode & 0o7777, job.out.stat().st_mode & 0o7777} == {0o777}
    sandbox.discard(job)
    assert not job.scratch.exists()
    assert (tree / "sub" / "run").read_text() == "#!"


def test_inputs_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine("")
    source = tmp_path / "source"
    source.write_bytes(b"data")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    job = make_job(tmp_path, inputs={"source": source})
    sandbox.prepare(job)
    assert (job.scratch / "in" / "source").read_bytes() == b"data"
    assert not (job.scratch / "in" / "source").samefile(source)


def test_output_is_logged_whole_and_shown_in_pieces(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    calls = engine(
        """case "$1" in run)
             printf 'first\\r\\nbad \\377 byte\\n\\n'
             head -c 5000 /dev/zero | tr '\\0' x; echo; printf 'no newline';; esac"""
    )
    job = make_job(tmp_path)
    lines: list[str] = []
    sandbox.run(job, on_line=lines.append)
    cut = "x" * sandbox.LINE_LIMIT + f" … ({5000 - sandbox.LINE_LIMIT} more bytes, in the log)"
    assert lines == ["first", "bad � byte", "", cut, "no newline"]
    assert job.log.read_bytes() == b"first\r\nbad \xff byte\n\n" + b"x" * 5000 + b"\nno newline"
    name = re.search(r"--name (\S+)", calls.read_text())
    assert name
    assert calls.read_text().splitlines()[-1] == f"rm --force --volumes {name[1]}"


def test_a_build_costs_two_calls_of_the_client(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    calls = engine("")
    sandbox.run(make_job(tmp_path), on_line=lambda _: None)
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["run", "rm"]


STATE = '{"Status":"exited","ExitCode":%d,"OOMKilled":%s,"Error":""}'


def failing(state: str) -> str:
    return f"""case "$1" in
        run) i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo line $i; done; exit 9;;
        container) echo {shlex.quote(state)};; esac"""


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine(failing(STATE % (9, "false")))
    job = make_job(tmp_path)
    with pytest.raises(BuildFailed) as caught:
        sandbox.run(job, on_line=lambda _: None)
    error = caught.value
    assert error.message == "building thing failed: exit code 9"
    assert error.reason is not None and error.hint is not None
    assert [line.strip() for line in error.reason.splitlines()[1:-1]] == [f"line {i}" for i in range(11, 31)]
    assert str(job.log) in error.reason.splitlines()[-1]
    assert error.hint.startswith("vzrepro shell thing")
    assert error.exit_code == 100


def test_a_kept_failure_gives_the_command_that_reopens_it(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine(failing(STATE % (9, "false")))
    job = make_job(tmp_path, keep_failed=True)
    with pytest.raises(BuildFailed) as caught:
        sandbox.run(job, on_line=lambda _: None)
    assert caught.value.hint is not None
    assert str(job.build) in caught.value.hint
    assert shlex.split(caught.value.hint.splitlines()[-1]) == sandbox.shell_command(job)


def test_running_out_of_memory_names_the_limit(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine(failing(STATE % (2, "true")))
    with pytest.raises(BuildFailed, match=r"ran out of memory.*512 MiB") as caught:
        sandbox.run(make_job(tmp_path, memory_bytes=512 << 20), on_line=lambda _: None)
    assert caught.value.hint is not None and "VZREPRO_MEMORY_GIB" in caught.value.hint


def test_a_kill_that_the_engine_did_not_explain(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine(failing(STATE % (137, "false")))
    with pytest.raises(BuildFailed, match=r"most likely for its memory limit of 512 MiB"):
        sandbox.run(make_job(tmp_path, memory_bytes=512 << 20), on_line=lambda _: None)


def test_an_unwritable_log_is_an_error_of_its_own(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    calls = engine('[ "$1" != run ] || echo text')
    with pytest.raises(VzreproError, match="log /dev/full cannot be written") as caught:
        sandbox.run(make_job(tmp_path, log=Path("/dev/full")), on_line=lambda _: None)
    assert caught.value.reason == "No space left on device"
    assert calls.read_text().splitlines()[-1].startswith("rm ")


@pytest.mark.parametrize(
    ("complaint", "message", "hint"),
    [
        (
            "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock",
            "may not be used by this user",
            "usermod -aG docker",
        ),
        (
            "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
            "does not answer",
            "systemctl start docker",
        ),
        ("docker: Error response from daemon: No such image: sha256:1", "image vanished", "again"),
        ("write /x: no space left on device", "disk is full", "prune"),
        ("unexpected EOF", "connection to the container engine was lost", "same command again"),
        ("something else", "container engine failed", "vzrepro doctor"),
    ],
)
def test_the_engines_complaints(
    tmp_path: Path, engine: Callable[[str], Path], complaint: str, message: str, hint: str
) -> None:
    engine(f"echo {shlex.quote(complaint)} >&2; case $1 in rm) echo no such container >&2; exit 1;; esac; exit 125")
    attempts: list[Callable[[], object]] = [lambda: sandbox.run(make_job(tmp_path), on_line=lambda _: None)]
    if "image" not in complaint:
        attempts += [sandbox.check, sandbox.sweep, lambda: sandbox.has_image(IMAGE)]
    for attempt in attempts:
        with pytest.raises(VzreproError, match=message) as caught:
            attempt()
        assert caught.value.reason == complaint
        assert caught.value.hint is not None and hint in caught.value.hint


def test_a_daemon_that_never_answers(engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_names, "_ANSWER_SECS", 0.1)
    engine("exec sleep 1000")
    for attempt in (sandbox.check, sandbox.sweep, lambda: sandbox.has_image(IMAGE)):
        with pytest.raises(VzreproError, match="daemon does not answer") as caught:
            attempt()
        assert "0 s" in (caught.value.reason or "")


def test_a_removal_that_is_not_answered_is_asked_for_again(
    tmp_path: Path, engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_names, "_REMOVE_SECS", 4.0)
    calls = engine(f"[ $1 != rm ] || [ -e {tmp_path}/asked ] || {{ : > {tmp_path}/asked; exec sleep 1000; }}")
    sandbox.run(make_job(tmp_path), on_line=lambda _: None)
    assert sum(line.startswith("rm ") for line in calls.read_text().splitlines()) == 2


def test_a_daemon_elsewhere_is_named_in_the_hint(
    engine: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine("echo 'error during connect: command [ssh builder] has exited with exit status 255' >&2; exit 1")
    monkeypatch.setenv("DOCKER_HOST", "ssh://builder")
    with pytest.raises(VzreproError, match="does not answer") as caught:
        sandbox.check()
    assert "DOCKER_HOST is ssh://builder" in str(caught.value.hint) and "password" in str(caught.value.hint)
    monkeypatch.delenv("DOCKER_HOST")
    monkeypatch.setenv("DOCKER_CONTEXT", "far")
    with pytest.raises(VzreproError, match="does not answer") as caught:
        sandbox.check()
    assert "DOCKER_CONTEXT is far" in str(caught.value.hint)


def test_no_client_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VZREPRO_DOCKER", "no-such-client-anywhere")
    with pytest.raises(VzreproError, match="no Docker client") as caught:
        sandbox.check()
    assert caught.value.hint is not None and "apt-get install" in caught.value.hint


def test_podman_describes_itself_differently(engine: Callable[[str], Path]) -> None:
    info = {
        "host": {"cgroupVersion": "v2", "security": {"rootless": True}, "cpus": 4, "memTotal": 8},
        "store": {"graphDriverName": "overlay"},
        "version": {"Version": "4.3.1"},
    }
    engine(f"echo {shlex.quote(json.dumps(info))}")
    runtime = sandbox.check()
    assert (runtime.engine, runtime.cgroup_version, runtime.rootless) == ("podman", 2, True)


@pytest.mark.parametrize("weighs", [True, False])
def test_an_engine_says_whether_it_can_weigh_containers(engine: Callable[[str], Path], weighs: bool) -> None:
    docker = {"ServerVersion": "1", "Driver": "x", "NCPU": 1, "MemTotal": 1, "CPUShares": weighs}
    podman = {
        "host": {
            "cgroupVersion": "v2",
            "security": {"rootless": True},
            "cpus": 4,
            "memTotal": 8,
            "cgroupControllers": ["memory", "pids", *(["cpu"] if weighs else [])],
        },
        "store": {"graphDriverName": "overlay"},
        "version": {"Version": "4.3.1"},
    }
    for info in (docker, podman):
        engine(f"echo {shlex.quote(json.dumps(info))}")
        assert sandbox.check().weighs == weighs


@pytest.mark.parametrize(
    "info",
    [
        {"ServerVersion": "1"},
        {"ServerVersion": "1", "Driver": "x", "NCPU": 1, "MemTotal": 1, "CgroupVersion": "two"},
        {"ServerVersion": "1", "Driver": "x", "NCPU": 1, "MemTotal": 1, "ClientInfo": []},
        {"host": []},
        {"host": {"cgroupVersion": "vv"}, "version": {"Version": "1"}},
    ],
)
def test_an_engine_that_describes_itself_in_a_third_way(engine: Callable[[str], Path], info: dict[str, Any]) -> None:
    engine(f"echo {shlex.quote(json.dumps(info))}")
    with pytest.raises(VzreproError, match="info` says is not understood") as caught:
        sandbox.check()
    assert "VZREPRO_DOCKER" in (caught.value.hint or "")


@pytest.mark.parametrize("said", ["[]", "7", "[" * 100_000, '{"ServerErrors": 7}', "null"])
def test_an_engine_that_says_nothing_of_itself(engine: Callable[[str], Path], tmp_path: Path, said: str) -> None:
    (tmp_path / "said").write_text(said)
    engine(f"cat {shlex.quote(str(tmp_path / 'said'))}")
    with pytest.raises(VzreproError, match="container engine failed"):
        sandbox.check()


def test_an_image_that_loads_as_another_is_refused(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    engine('case "$1" in image) echo "no such image" >&2; exit 1;; load) echo Loaded image ID: sha256:cd;; esac')
    with pytest.raises(VzreproError, match="did not load") as caught:
        sandbox.load_image(tmp_path / "archive.tar", IMAGE)
    assert caught.value.reason is not None and "sha256:cd" in caught.value.reason
    with pytest.raises(ValueError):
        sandbox.load_image(tmp_path / "archive.tar", "--help")


def test_a_present_image_is_not_loaded_again(tmp_path: Path, engine: Callable[[str], Path]) -> None:
    calls = engine(f"echo {IMAGE.removeprefix('sha256:')}")
    sandbox.load_image(tmp_path / "archive.tar", IMAGE)
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["image"]


DENIED = """
    add_key request_key keyctl mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig
    fsmount fspick mount_setattr swapon swapoff quotactl name_to_handle_at open_by_handle_at ptrace process_vm_readv
    process_vm_writev pidfd_getfd kcmp perf_event_open bpf userfaultfd fanotify_init acct syslog init_module
    finit_module delete_module kexec_load kexec_file_load reboot settimeofday clock_settime clock_adjtime adjtimex
    sethostname setdomainname iopl ioperm modify_ldt vhangup io_uring_setup io_uring_enter io_uring_register clone3
    mbind move_pages migrate_pages memfd_secret lookup_dcookie
"""


def test_the_profile_denies_by_default_and_these_in_any_case() -> None:
    assert PROFILE["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = {n for rule in PROFILE["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for n in rule["names"]}
    assert not allowed & set(DENIED.split())
    assert {"openat", "execve", "clone", "futex"} <= allowed
    assert {rule["action"] for rule in PROFILE["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"}


def test_what_is_dangerous_by_argument_is_allowed_by_argument_only() -> None:
    for name in ("clone", "personality", "socket", "socketpair", "mknod", "mknodat"):
        rules = [rule for rule in PROFILE["syscalls"] if name in rule["names"]]
        assert rules and all(rule.get("args") for rule in rules), name


def test_the_profile_is_sorted_and_says_what_each_group_is() -> None:
    for rule in PROFILE["syscalls"]:
        assert rule["comment"]
        assert rule["names"] == sorted(set(rule["names"])), rule["comment"]
    plain = [name for rule in PROFILE["syscalls"] if "args" not in rule for name in rule["names"]]
    assert len(plain) == len(set(plain))
