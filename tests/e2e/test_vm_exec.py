"""`vzrepro vm exec` and `vm init`, as a user runs them: a command in a guest as if it were here, and VMs that stay."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli
from tests.guests import LIMIT_SECS, descendants, needs_qemu

pytestmark = needs_qemu

MACHINE = ("qemu-system-aar", "vhost-device-vs", "virtiofsd")
"""How the processes of a guest's machine begin, as the kernel shortens them."""


@pytest.fixture
def here(project: Cli, bundle: Path, tmp_path: Path) -> Iterator[Cli]:
    """The project's CLI, with a directory for temporary files that must be empty afterwards."""
    temporary = tmp_path / "t"
    temporary.mkdir()
    yield Cli(project.root, project.store, {"TMPDIR": str(temporary)})
    assert not list(temporary.glob("vz-*"))


def machine(pid: int, count: int) -> dict[int, str]:
    """The processes of the machine that `pid` runs, by their ids, once there are so many."""
    deadline = time.monotonic() + LIMIT_SECS
    while True:
        found = {child: name for child, name in descendants(pid).items() if name.startswith(MACHINE)}
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.02)


def none_is_left(processes: dict[int, str]) -> None:
    deadline = time.monotonic() + LIMIT_SECS
    while left := [pid for pid in processes if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_command_has_streams_environment_directory_user_and_exit_code(
    here: Cli, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("shared\n")
    script = (
        'cat; echo "$A $B $(pwd) $(id -u) $(nproc)"; cat /in/file; echo new > /out/file; '
        "echo no > /in/new || echo refused >&2; exit 7"
    )
    words = ["--env", "A=one two", "--env", "B", "--workdir", "/mnt", "--cpus", "2", "--memory-mib", "256"]
    mounts = ["--mount", f"{tmp_path}/in:/in:ro", "--mount", f"{tmp_path}:/out"]
    command = [
        sys.executable,
        "-m",
        "vzrepro",
        "vm",
        "exec",
        *words,
        *mounts,
        str(bundle),
        "--",
        "/bin/sh",
        "-c",
        script,
    ]
    env = {**here.environment(), "B": "ours"}
    done = subprocess.run(command, cwd=here.root, env=env, input=b"typed\n", capture_output=True, check=False)
    assert done.returncode == 7, done.stderr.decode()
    assert done.stdout.decode() == "typed\none two ours /mnt 0 2\nshared\n"
    assert done.stderr.decode().splitlines()[-1] == "refused"
    assert (tmp_path / "file").read_text() == "new\n"
    assert not (tmp_path / "in/new").exists()


def test_a_terminal_on_both_ends_is_one_in_the_guest(here: Cli, bundle: Path) -> None:
    ours, theirs = pty.openpty()
    os.set_inheritable(theirs, True)
    script = "stty size < /dev/tty || exit 3; read -r line; echo got $line; test -t 0 && test -t 1 && test -t 2"
    command = [sys.executable, "-m", "vzrepro", "vm", "exec", str(bundle), "--", "/bin/sh", "-c", script]
    process = subprocess.Popen(
        command, cwd=here.root, env=here.environment(), stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    out = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                out.extend(data)
        except OSError:  # the other end is gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    os.write(ours, b"typed\n")
    assert process.wait(LIMIT_SECS) == 0, out
    reader.join(LIMIT_SECS)
    os.close(ours)
    assert b"got typed\r\n" in out


def test_a_signal_goes_to_the_command(here: Cli, bundle: Path) -> None:
    script = 'trap "echo caught; exit 5" INT; echo up; while :; do sleep 0.1; done'
    with here.start("vm", "exec", str(bundle), "--", "/bin/sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        processes = machine(process.pid, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_SECS)
    assert (process.returncode, out) == (5, "caught\n"), err
    none_is_left(processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_does_not_mind_signals_goes_with_the_second_one(
    here: Cli, bundle: Path, number: signal.Signals
) -> None:
    script = 'trap "echo no" INT TERM; echo up; while :; do sleep 0.1; done'
    with here.start("vm", "exec", str(bundle), "--", "/bin/sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        processes = machine(process.pid, 2)
        process.send_signal(number)
        # Two that come before the first is seen are one.
        assert process.stdout.readline() == "no\n"
        process.send_signal(number)
        _out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 130, err
    none_is_left(processes)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qemu-system-aar", "qemu-system-aarch64 ended with signal 9 while the guest was in use"),
        ("virtiofsd", "virtiofsd of the share vz-mount-0 ended with signal 9 while the guest was in use"),
        ("vhost-device-vs", "vhost-device-vsock ended with signal 9 while the guest was in use"),
    ],
)
def test_a_part_of_the_machine_that_dies_is_named(
    here: Cli, bundle: Path, tmp_path: Path, name: str, said: str
) -> None:
    if name == "vhost-device-vs" and Path("/dev/vhost-vsock").exists():
        pytest.skip("the host's kernel serves the vsock")
    words = ["vm", "exec", "--mount", f"{tmp_path}:/work", str(bundle)]
    with here.start(*words, "--", "/bin/sh", "-c", "echo up; sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        processes = machine(process.pid, 3)
        [victim] = [pid for pid, found in processes.items() if found.startswith(name)]
        os.kill(victim, signal.SIGKILL)
        _out, err = process.communicate(timeout=LIMIT_SECS)
    assert process.returncode == 1
    assert f"error: {said}" in err
    assert "vz-init: agent start" in err
    none_is_left(processes)


def test_a_command_that_is_not_there(here: Cli, bundle: Path) -> None:
    done = here.run("vm", "exec", str(bundle), "--", "/no/such/thing", code=1)
    assert "/no/such/thing could not start in the guest" in done.stderr


def test_a_root_file_system_of_the_host(here: Cli, bundle: Path, tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/issue").write_text("of the host\n")
    done = here.run("vm", "exec", "--rootfs-dir", str(rootfs), str(bundle), "--", "/bin/busybox", "cat", "/etc/issue")
    assert done.stdout == "of the host\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mount", "/tmp"], "is no mount"),
        (["--mount", "/no/such:/work"], "does not exist"),
        (["--mount", "/tmp:/with blank"], "cannot be where the guest mounts something"),
        (["--env", "=x"], "a variable has a name"),
    ],
)
def test_options_that_make_no_sense(here: Cli, bundle: Path, words: list[str], said: str) -> None:
    done = here.run("vm", "exec", *words, str(bundle), "--", "true", code=2)
    assert said in done.stderr


@pytest.mark.skipif(shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None, reason="e2fsprogs is missing")
def test_a_vm_directory_keeps_its_disk(here: Cli, bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "vm"
    made = ["vm", "init", "--kernel-profile", "container", "--bundle", str(bundle)]
    here.run(*made, "--disk-mib", "64", "--mount", f"{tmp_path}:/work:ro", str(place))
    assert sorted(path.name for path in place.iterdir()) == sorted(
        ["disk.img", "initramfs.img", "version.json", "vm.toml", "vmlinux", "youki"]
    )
    assert (place / "disk.img").stat().st_size == 64 << 20
    script = "echo kept >> /mnt/disk/file; ls -d /work/vm; nproc"
    assert here.run("vm", "exec", str(place), "--", "/bin/sh", "-c", script).stdout == "/work/vm\n2\n"

    refused = here.run(*made, str(place), code=2)
    assert f"{place} is not empty" in refused.stderr
    here.run(*made, "--force", "--cpus", "1", str(place))
    read = ["--", "/bin/sh", "-c", "cat /mnt/disk/file; nproc"]
    assert here.run("vm", "exec", str(place), *read).stdout == "kept\n1\n"
    report = json.loads(here.run("vm", "boot", "--json", str(place)).stdout.splitlines()[-1])
    assert report["system"]["cpu_count"] == 1

    with here.start("vm", "exec", str(place), "--", "/bin/sh", "-c", "echo up; sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        second = here.run("vm", "exec", str(place), "--", "true", code=1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_SECS)
    assert "a disk of the guest is in use by another guest" in second.stderr


def test_a_bundle_of_another_profile_makes_no_vm(here: Cli, bundle: Path, tmp_path: Path) -> None:
    words = ["vm", "init", "--kernel-profile", "developer", "--bundle", str(bundle), str(tmp_path / "vm")]
    assert "is a bundle of the container profile, not of developer" in here.run(*words, code=2).stderr
    assert not (tmp_path / "vm").exists()
