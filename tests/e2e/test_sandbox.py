"""The sandbox from inside: what a builder can see, write and call, and what is left when a build is ended.

Needs Docker, and the tools image.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE_SECS
from tests.e2e.sandboxes import EPOCH, containers, output, store_object
from vzrepro import sandbox
from vzrepro.base.errors import BuildFailed, Interrupted, TimedOut, VzreproError
from vzrepro.sandbox import engine

STORE_PATH = re.compile(rb"[0-9a-df-np-sv-z]{32}-")

both = pytest.mark.parametrize("way", ["mounts", "volume"], indirect=True)
"""The promises that could be kept in one way to the sandbox's directories and broken in the other."""


def test_environment_is_exact(
    new_job: Callable[..., sandbox.Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxies = {"default": {"httpProxy": "http://user:secret@proxy.invalid:1", "noProxy": "x"}}
    (tmp_path / "config.json").write_text(json.dumps({"proxies": proxies}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:2")
    expected = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/build",
        "SOURCE_DATE_EPOCH": str(EPOCH),
        "TZ": "UTC",
        "LC_ALL": "C.UTF-8",
        "VZ_CORES": "2",
        "RECIPE": "its own\tvalue",
    }
    lines = output(new_job("", command=("env",), env={"RECIPE": "its own\tvalue"}))
    assert sorted(lines) == sorted(f"{name}={value}" for name, value in expected.items())
    first_process = new_job("cat /proc/1/environ /proc/1/cmdline /etc/resolv.conf")
    output(first_process)
    assert b"proxy" not in first_process.log.read_bytes()
    assert b"HOSTNAME" not in first_process.log.read_bytes()


@both
def test_who_and_where(new_job: Callable[..., sandbox.Job]) -> None:
    names = "uname -n; cat /proc/sys/kernel/domainname /etc/hostname"
    assert output(new_job(f"id -u; id -g; id -G; pwd; umask; {names}; ls -A /build /out")) == [
        *("1000", "1000", "1000", "/build", "0022", "localhost", "(none)", "localhost"),
        *("/build:", "", "/out:"),
    ]


@both
def test_name_resolution_files_are_constant(new_job: Callable[..., sandbox.Job]) -> None:
    assert output(new_job("cat /etc/hosts /etc/resolv.conf")) == ["127.0.0.1\tlocalhost", "::1\tlocalhost"]


@both
def test_no_store_path_is_visible(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    path = store_object(tmp_path)
    job = new_job(
        "env; for f in mountinfo mounts mountstats environ cmdline cgroup maps; do "
        "cat /proc/self/$f /proc/1/$f 2>&1; done; ls -lR /in; cat /in/tree/file /in/file; df",
        inputs={"tree": path, "file": path / "file"},
    )
    output(job)
    seen = job.log.read_bytes()
    assert b" /in " in seen and seen.count(b"content\n") == 2
    assert not STORE_PATH.search(seen)
    assert STORE_PATH.search(bytes(path)), "the pattern must recognise what it looks for"


@both
def test_no_container_id_is_visible(new_job: Callable[..., sandbox.Job]) -> None:
    seen: list[str] = []

    def note_id(line: str) -> None:
        if not seen:
            (name,) = containers(job.label)
            command = ["docker", "inspect", "--format", "{{.Id}}", name]
            seen.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())

    job = new_job("echo go; cat /proc/self/mountinfo /proc/self/cgroup /etc/hostname; sleep 1")
    sandbox.run(job, on_line=note_id)
    assert re.fullmatch("[0-9a-f]{64}", seen[0])
    assert seen[0].encode()[:12] not in job.log.read_bytes()


def test_no_network(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    interfaces = output(new_job("cat /proc/net/dev"))[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    # A listening server of the host, and an address elsewhere: connect(2) from inside reaches neither.
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        results = syscalls(
            new_job,
            tmp_path,
            [
                (41, 2, 1, 0),  # socket(AF_INET, SOCK_STREAM, 0) = 3
                (42, 3, sockaddr("127.0.0.1", port), 16),  # connect
                (42, 3, sockaddr("192.0.2.1", 80), 16),
            ],
        )
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert results == [3, -111, -101]  # a socket, ECONNREFUSED (the sandbox's own loopback), ENETUNREACH


def test_no_capability_and_no_way_to_get_one(new_job: Callable[..., sandbox.Job]) -> None:
    status = dict(line.split(":\t", 1) for line in output(new_job("cat /proc/self/status")) if ":\t" in line)
    assert {name: status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == dict.fromkeys(
        ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), "0" * 16
    )
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@both
def test_nothing_else_can_be_written(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    path = store_object(tmp_path)
    script = """
        walk() {
            for f in "$1"/* "$1"/.[!.]*; do
                if [ -L "$f" ]; then continue; fi
                case "$f" in /proc|/build|/out|/tmp) continue;; esac
                if [ -f "$f" ] || [ -d "$f" ]; then if [ -w "$f" ]; then echo "writable $f"; fi; fi
                if [ -d "$f" ]; then walk "$f"; fi
            done
        }
        if [ -w / ]; then echo writable root; fi
        walk ""
        for d in / /etc /usr /var /in /in/tree /dev /dev/shm /dev/mqueue /dev/pts /sys /run /root /proc /proc/sys/kernel
        do (: > "$d/probe") 2>/dev/null && echo "created in $d"; done
        (echo x > /in/tree/file) 2>/dev/null && echo changed
        chmod u+w /in/tree/file 2>/dev/null && echo chmod
        rm -f /in/file 2>/dev/null && echo removed
        for d in /build /out /tmp; do echo ok > "$d/probe"; done
        cp /bin/true /tmp/run && /tmp/run && cp /bin/true /build/run && /build/run && echo works
        ls -A /sys /dev/shm /dev/mqueue
    """
    job = new_job(script, inputs={"tree": path, "file": path / "file"})
    assert output(job) == ["works", "/dev/mqueue:", "", "/dev/shm:", "", "/sys:"]
    assert (job.out / "probe").read_text() == "ok\n"
    assert (path / "file").read_text() == "content\n"


@both
def test_writable_mounts_are_the_three(new_job: Callable[..., sandbox.Job]) -> None:
    mounts = [line.split() for line in output(new_job("cat /proc/self/mounts"))]
    kernel = {"proc", "devpts"}  # of processes; of terminals
    hidden = {"/dev", "/sys/fs/cgroup"}  # root's (0755); under the cover of /sys
    masked = {"/proc/keys", "/proc/timer_list", "/proc/kcore", "/proc/latency_stats"}  # /dev/null
    writable = {mount[1] for mount in mounts if "rw" in mount[3].split(",") and mount[2] not in kernel}
    assert writable - hidden - masked == {"/build", "/out", "/tmp"}


def test_stdin_is_empty_and_output_keeps_its_order(new_job: Callable[..., sandbox.Job]) -> None:
    script = "cat; readlink /proc/self/fd/0; for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done"
    expected = ["/dev/null", *(f"{stream} {i}" for i in range(1, 6) for stream in ("out", "err"))]
    assert output(new_job(script)) == expected


def test_the_build_is_an_ordinary_process(new_job: Callable[..., sandbox.Job]) -> None:
    with pytest.raises(BuildFailed, match="killed by signal 15"):
        sandbox.run(new_job("kill -TERM $$; sleep 5"), on_line=lambda _: None)


def test_limits_are_set(new_job: Callable[..., sandbox.Job]) -> None:
    job = new_job("ulimit -n; ulimit -c; sleep 0.5", memory_bytes=256 << 20, cores=1)
    config: dict[str, Any] = {}

    def look(line: str) -> None:
        if not config:
            (name,) = containers(job.label)
            found = subprocess.run(["docker", "inspect", name], check=True, capture_output=True)
            config.update(json.loads(found.stdout)[0]["HostConfig"])

    lines: list[str] = []
    sandbox.run(job, on_line=lambda line: (lines.append(line), look(line))[0])
    assert lines == [str(sandbox.OPEN_FILES_LIMIT), "0"]
    assert (config["PidsLimit"], config["Memory"], config["MemorySwap"]) == (sandbox.PIDS_LIMIT, 256 << 20, 256 << 20)
    assert (config["LogConfig"]["Type"], config["NetworkMode"], config["CgroupnsMode"]) == ("none", "none", "private")
    assert config["NanoCpus"] == 10**9 or os.cpu_count() == 1


# --- system calls, tried by a program made here: the image needs no interpreter or compiler -----------------------


def sockaddr(host: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton(host) + bytes(8)


def elf(code: bytes) -> bytes:
    """A static x86-64 program: one readable, writable, executable segment at 0x400000 (ELF-64, gABI chapter 4)."""
    base, headers = 0x400000, 64 + 56
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = headers + len(code)
    return header + struct.pack("<IIQQQQQQ", 1, 7, 0, base, base, size, size, 4096) + code


def syscall_program(calls: list[tuple[int | bytes, ...]]) -> bytes:
    """A program that makes each call (number, arguments; bytes are passed by address), writes the results to stdout."""
    base = 0x400000 + 64 + 56
    load = (b"\x48\xb8", b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")  # mov r64, imm64
    length = (10 * 7 + 2 + 10) * len(calls) + (10 * 7 + 2) * 2
    results = base + length
    exit_calls: list[tuple[int | bytes, ...]] = [(1, 1, results, 8 * len(calls)), (231, 0)]  # write, exit_group
    data = bytes(8 * len(calls))
    code = b""
    for index, call in enumerate([*calls, *exit_calls]):
        for opcode, value in zip(load, (*call, *[0] * (7 - len(call))), strict=True):
            number = results + len(data) if isinstance(value, bytes) else value & 0xFFFFFFFFFFFFFFFF
            data += value if isinstance(value, bytes) else b""
            code += opcode + struct.pack("<Q", number)
        code += b"\x0f\x05"
        if index < len(calls):
            code += b"\x48\xa3" + struct.pack("<Q", results + 8 * index)  # mov [imm64], rax
    assert len(code) == length
    return elf(code + data)


def syscalls(
    new_job: Callable[..., sandbox.Job], tmp_path: Path, calls: list[tuple[int | bytes, ...]], confined: bool = True
) -> list[int]:
    """What the calls return inside the sandbox, or in a container without a seccomp profile."""
    if os.uname().machine != "x86_64":
        pytest.skip("the probe is x86-64 machine code")
    program = tmp_path / f"probe-{uuid.uuid4().hex}"
    program.write_bytes(syscall_program(calls))
    program.chmod(0o555)
    job = new_job("/in/probe > /out/results", inputs={"probe": program})
    if confined:
        sandbox.run(job, on_line=lambda _: None)
    else:
        sandbox.prepare(job)
        mounts = [f"--volume={job.scratch / 'in'}:/in:ro", f"--volume={job.out}:/out"]
        flags = ["--rm", "--network=none", "--cap-drop=ALL", "--user=1000:1000", "--security-opt=seccomp=unconfined"]
        command = ["docker", "run", *flags, *mounts, "--entrypoint=sh", job.image, *job.command[1:]]
        subprocess.run(command, check=True, capture_output=True)
    data = (job.out / "results").read_bytes()
    return list(struct.unpack(f"<{len(calls)}q", data))


PERMITTED: list[tuple[int | bytes, ...]] = [
    (39,),  # getpid
    (41, 1, 1, 0),  # socket: AF_UNIX, AF_INET, AF_INET6
    (41, 2, 1, 0),
    (41, 10, 1, 0),
    (135, 0),  # personality(PER_LINUX)
    (135, 0xFFFFFFFF),  # personality: ask
    (133, b"/build/fifo\0", 0o010644, 0),  # mknod of a named pipe
]
# Number and arguments; what a capability alone would stop is here too, but OPEN below can only name the others.
DENIED: dict[str, tuple[int | bytes, ...]] = {
    "add_key": (248, b"user\0", b"name\0", b"x", 1, -2 & 0xFFFFFFFF),
    "request_key": (249, b"user\0", b"name\0", 0, 0),
    "keyctl": (250, 0, -3 & 0xFFFFFFFF, 0),
    "mount": (165, b"none\0", b"/tmp\0", b"tmpfs\0", 0, 0),
    "umount2": (166, b"/tmp\0", 0),
    "pivot_root": (155, b"/\0", b"/tmp\0"),
    "chroot": (161, b"/tmp\0"),
    "unshare": (272, 0),
    "unshare user": (272, 0x10000000),
    "clone user": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "setns": (308, 99, 0),
    "open_tree": (428, -100, b"/\0", 0),
    "move_mount": (429, -100, b"/\0", -100, b"/tmp\0", 0),
    "fsopen": (430, b"tmpfs\0", 0),
    "fsconfig": (431, 99, 0, 0, 0, 0),
    "fsmount": (432, 99, 0, 0),
    "fspick": (433, -100, b"/\0", 0),
    "mount_setattr": (442, -100, b"/\0", 0, 0, 0),
    "swapon": (167, b"/tmp\0", 0),
    "swapoff": (168, b"/tmp\0"),
    "quotactl": (179, 0, 0, 0, 0),
    "name_to_handle_at": (303, -100, b"/\0", 0, 0, 0),
    "open_by_handle_at": (304, 99, 0, 0),
    "ptrace": (101, 0, 0, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, 1, 0, 0, 0, 0, 0),
    "process_madvise": (440, 99, 0, 0, 0, 0),
    "pidfd_getfd": (438, 99, 0, 0),
    "kcmp": (312, 1, 1, 0, 0, 0),
    "perf_event_open": (298, 0, 0, -1, -1, 0),
    "bpf": (321, 0, 0, 0),
    "userfaultfd": (323, 1),
    "fanotify_init": (300, 0, 0),
    "acct": (163, b"/nowhere\0"),
    "syslog": (103, 10, 0, 0),
    "init_module": (175, 0, 0, 0),
    "finit_module": (313, 99, 0, 0),
    "delete_module": (176, b"nothing\0", 0),
    "kexec_load": (246, 0, 0, 0, 0xFFFF),
    "kexec_file_load": (320, 99, 99, 0, 0, 0),
    "reboot": (169, 0, 0, 0, 0),
    "settimeofday": (164, 0, 0),
    "clock_settime": (227, 0, 0),
    "clock_adjtime": (305, 0, bytes(256)),
    "adjtimex": (159, bytes(256)),
    "sethostname": (170, b"x", 1),
    "setdomainname": (171, b"x", 1),
    "iopl": (172, 0),
    "ioperm": (173, 0, 1, 0),
    "modify_ldt": (154, 0, 0, 0),
    "vhangup": (153,),
    "io_uring_setup": (425, 0, 0),
    "io_uring_enter": (426, 99, 0, 0, 0, 0, 0),
    "io_uring_register": (427, 99, 0, 0, 0),
    "clone3": (435, 0, 0),
    "mbind": (237, 0, 0, 0, 0, 0, 0),
    "move_pages": (279, 0, 0, 0, 0, 0, 0),
    "migrate_pages": (256, 0, 0, 0, 0),
    "memfd_secret": (447, 0),
    "personality ADDR_NO_RANDOMIZE": (135, 0x0040000),
    "mknod of a device": (133, b"/build/device\0", 0o020666, 0x0103),
    "setxattr": (188, b"/build\0", b"user.x\0", b"v", 1, 0),
    "AF_NETLINK": (41, 16, 3, 0),
    "AF_PACKET": (41, 17, 2, 0),
    "AF_ALG": (41, 38, 5, 0),
    "AF_VSOCK": (41, 40, 1, 0),
    "AF_XDP": (41, 44, 3, 0),
    "AF_ALG in the low half": (41, 0x1_0000_0026, 5, 0),
}
REFUSED = {-1: "EPERM", -38: "ENOSYS", -95: "EOPNOTSUPP", -97: "EAFNOSUPPORT"}
# Any process may do these where no profile forbids it (whatever the host's sysctls say): proof that the probe works.
OPEN = ("unshare", "ptrace", "adjtimex", "personality ADDR_NO_RANDOMIZE", "AF_NETLINK", "kcmp", "keyctl", "mbind")


def test_denied_system_calls(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    results = syscalls(new_job, tmp_path, [*DENIED.values(), *PERMITTED])
    denied, permitted = results[: len(DENIED)], results[len(DENIED) :]
    assert {name: r for name, r in zip(DENIED, denied, strict=True) if r not in REFUSED} == {}
    assert all(result >= 0 for result in permitted), permitted


def test_the_profile_is_what_denies_them(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    unconfined = syscalls(new_job, tmp_path, [DENIED[name] for name in OPEN], confined=False)
    results = dict(zip(OPEN, unconfined, strict=True))
    assert {name: result for name, result in results.items() if result in REFUSED} == {}


def test_32_bit_system_calls_end_the_process(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the probe is x86-64 machine code")
    program = tmp_path / "probe"
    # mov eax, 20 (i386 getpid); int 0x80; then exit_group(0)
    program.write_bytes(elf(b"\xb8\x14\x00\x00\x00\xcd\x80\xb8\xe7\x00\x00\x00\x31\xff\x0f\x05"))
    program.chmod(0o555)
    with pytest.raises(BuildFailed, match=f"killed by signal {int(signal.SIGSYS)}"):
        sandbox.run(new_job("", command=("/in/probe",), inputs={"probe": program}), on_line=lambda _: None)


# --- how builds end ------------------------------------------------------------------------------------------------


def test_a_failing_build_tells_what_and_where(new_job: Callable[..., sandbox.Job]) -> None:
    job = new_job("i=0; while [ $i -lt 50 ]; do i=$((i+1)); echo line $i; done; exit 7", keep_failed=True)
    with pytest.raises(BuildFailed) as caught:
        sandbox.run(job, on_line=lambda _: None)
    error = caught.value
    assert "exit code 7" in error.message and job.label in error.message
    assert error.reason is not None and error.hint is not None
    assert "line 31\n" in error.reason and "line 50\n" in error.reason and "line 30\n" not in error.reason
    assert str(job.log) in error.reason
    assert "docker run --rm --interactive --tty" in error.hint
    assert containers(job.label) == []


def test_a_command_that_does_not_exist(new_job: Callable[..., sandbox.Job]) -> None:
    with pytest.raises(BuildFailed, match="exit code 127") as caught:
        sandbox.run(new_job("", command=("no-such-program",)), on_line=lambda _: None)
    assert caught.value.reason is not None and "no-such-program" in caught.value.reason


@both
def test_an_image_that_is_not_there(new_job: Callable[..., sandbox.Job]) -> None:
    image = "sha256:" + "0123456789abcdef" * 4
    assert not sandbox.has_image(image)
    with pytest.raises(VzreproError, match="image vanished"):
        sandbox.run(new_job("true", image=image), on_line=lambda _: None)


def test_time_limit(new_job: Callable[..., sandbox.Job]) -> None:
    # Long enough for a busy machine to start the container.
    job = new_job("echo started; trap '' TERM INT; sleep 600", timeout_secs=10)
    with pytest.raises(TimedOut, match="limit of 10 s") as caught:
        sandbox.run(job, on_line=lambda _: None)
    assert caught.value.exit_code == 101
    assert caught.value.reason is not None and "started" in caught.value.reason
    assert containers(job.label) == []


def test_memory_limit(new_job: Callable[..., sandbox.Job]) -> None:
    # tail keeps all it may have to print
    script = "head -c 400000000 /dev/zero | { tail -c 400000000 > /dev/null || exit 3; }"
    job = new_job(script, memory_bytes=64 << 20)
    with pytest.raises(BuildFailed, match=r"ran out of memory.*64 MiB.*exit code 3"):
        sandbox.run(job, on_line=lambda _: None)
    assert containers(job.label) == []


@both
def test_an_exception_of_the_caller_ends_the_build(new_job: Callable[..., sandbox.Job]) -> None:
    job = new_job("echo line; sleep 600")

    def refuse(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="line"):
        sandbox.run(job, on_line=refuse)
    assert containers(job.label) == []


@both
def test_stop_from_another_thread(new_job: Callable[..., sandbox.Job]) -> None:
    job = new_job("echo line; sleep 600")
    stop = threading.Event()
    with pytest.raises(Interrupted):
        sandbox.run(job, on_line=lambda _: stop.set(), stop=stop)
    assert containers(job.label) == []
    early = new_job("sleep 600")
    with pytest.raises(Interrupted):
        sandbox.run(early, on_line=lambda _: None, stop=stop)  # before the container exists
    assert containers(early.label) == []


# A signal is an interruption while `run` is on the stack, and nothing afterwards: the last of several may come when it
# has ended. So the process ends without Python's own clearing up, which gives signals their default effect back.
CHILD = """
import os, signal, sys
from pathlib import Path
from vzrepro import sandbox
from vzrepro.base.errors import VzreproError
from vzrepro.sandbox import engine

def terminate(_, frame):
    while frame is not None:
        if frame.f_code is sandbox.run.__code__:
            raise KeyboardInterrupt
        frame = frame.f_back

signal.signal(signal.SIGTERM, terminate)
signal.signal(signal.SIGINT, terminate)  # tests that run in a shell's background are started with it ignored
scratch, image, label, script, *host = sys.argv[1:]
if host:
    engine.host_name = lambda: host[0]
job = sandbox.Job(label=label, image=image, command=("sh", "-c", script), scratch=Path(scratch),
                  log=Path(scratch + ".log"), source_date_epoch=1, cores=1)
code = 0
try:
    sandbox.run(job, on_line=lambda line: print(line, flush=True))
except VzreproError as error:
    code = error.exit_code
except KeyboardInterrupt:  # in the last instructions of `run`, when there is nothing left to do
    code = 130
os._exit(code)
"""


def start_child(job: sandbox.Job, *host: str) -> subprocess.Popen[str]:
    """A process of its own running the job (for `sweep` on this host), once the build has printed its first line."""
    arguments = [str(job.scratch), job.image, job.label, job.command[-1], *host]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 5], ids=str)
def test_signals_end_the_container(new_job: Callable[..., sandbox.Job], signals: list[signal.Signals]) -> None:
    job = new_job("echo ready; sleep 600")
    child = start_child(job)
    assert len(containers(job.label)) == 1
    for number in signals:
        child.send_signal(number)
        time.sleep(0.02)  # so that they are not merged into one
    assert child.wait(timeout=PATIENCE_SECS) == 130
    assert containers(job.label) == []


@both
def test_sweep_removes_what_a_killed_process_left(
    new_job: Callable[..., sandbox.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host of our own: every vzrepro that another test runs meanwhile sweeps this one's.
    host = uuid.uuid4().hex[:16]
    monkeypatch.setattr(engine, "host_name", lambda: host)
    job = new_job("echo ready; sleep 600")
    child = start_child(job, host)
    (name,) = containers(job.label)
    assert name not in sandbox.sweep(), "its owner lives"
    child.kill()
    # Not reaped yet: a zombie is dead as well.
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    assert containers(job.label) == [name]
    assert name in sandbox.sweep()
    assert containers(job.label) == []
    child.wait()


@both
def test_shell_opens_the_same_sandbox(new_job: Callable[..., sandbox.Job], tmp_path: Path) -> None:
    job = new_job("make it so", inputs={"tree": store_object(tmp_path)}, env={"RECIPE": "r"})
    sandbox.prepare(job)
    master, slave = pty.openpty()
    argv = sandbox.shell_command(job)
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as shell:
        os.close(slave)
        os.write(master, b"echo @$(id -u) $(pwd) $(umask) $RECIPE $VZ_CORES $(cat /in/tree/file)@; exit 5\n")
        seen = b""
        while select.select([master], [], [], 60)[0]:
            try:
                chunk = os.read(master, 4096)
            except OSError:  # EIO: the other side has ended
                break
            if not chunk:
                break
            seen += chunk
        assert shell.wait(timeout=PATIENCE_SECS) == 5
    os.close(master)
    assert b"@1000 /build 0022 r 2 content@" in seen
    assert b"make it so" in seen, "the shell shows the command it stands in for"
    sandbox.discard(job)


@both
def test_a_host_user_who_is_not_root(tmp_path: Path, tools_image: str) -> None:
    """Another uid than root's and the sandbox's reads the result and removes everything, even after a kill."""
    sock = Path(os.environ.get("DOCKER_HOST", "/var/run/docker.sock").removeprefix("unix://"))
    if os.geteuid() != 0 or not sock.is_socket():
        pytest.skip("needs root, to become someone else, and a local Docker socket")
    home = Path("/var/tmp") / f"vzrepro-test-{uuid.uuid4().hex}"
    home.mkdir(mode=0o700)
    os.chown(home, 54321, sock.stat().st_gid)
    source = home / "source"
    source.write_text("input\n")
    os.chown(source, 54321, sock.stat().st_gid)

    def job(number: int, script: str, timeout_secs: float | None = None) -> sandbox.Job:
        scratch = home / f"scratch{number}"
        scratch.mkdir(mode=0o700)
        return sandbox.Job(
            label=f"test-user-{number}",
            image=tools_image,
            command=("sh", "-c", script),
            inputs={"source": source},
            scratch=scratch,
            log=home / f"log{number}",
            source_date_epoch=EPOCH,
            cores=1,
            timeout_secs=timeout_secs,
        )

    closed = "mkdir -p /build/a/b /out/a; cp /in/source /out/a/f; chmod 0 /build/a /out/a/f /out/a; id -u; "

    def as_someone_else() -> str:
        done = job(1, closed)
        lines = output(done)
        text = (done.out / "a" / "f").read_text()
        sandbox.discard(done)
        killed = job(2, closed + "sleep 600", timeout_secs=10)
        try:
            sandbox.run(killed, on_line=lines.append)
        except TimedOut:
            lines.append("timed out")
        sandbox.discard(killed)
        left = sorted(path.name for path in home.iterdir())
        return json.dumps({"lines": lines, "text": text, "left": left})

    sandbox.check()  # loads what is imported late, as root: the interpreter may lie in root's home
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(sock.stat().st_gid)
            os.setuid(54321)
            answer = as_someone_else()
        except BaseException as error:
            answer = json.dumps(str(error))
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as reader:
        answer = json.loads(reader.read())
    os.waitpid(pid, 0)
    shutil.rmtree(home)
    assert answer == {
        "lines": ["1000", "1000", "timed out"],
        "text": "input\n",
        "left": ["log1", "log2", "source"],
    }
