"""`vzrepro oci`, as a user runs it: real containers in real guests, with nginx and a shell from Debian's packages."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import stat
import struct
import termios
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers import PROJECT, Oci, fetched, gone, until
from tests.guests import LIMIT_SECS, descendants, needs_qemu
from tests.servers import free_ports
from vzrepro.guest.vm.rootfs import image_root

pytestmark = needs_qemu

NGINX = """
user nobody nogroup;
daemon off;
error_log stderr;
pid /run/nginx.pid;
events {}
http { access_log off; server { listen 80; root /srv/www; } }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    path.chmod(0o755)  # nginx's workers are not root
    (path / "index.html").write_text("from the host\n")
    (path / "nginx.conf").write_text(NGINX)
    return path


def test_a_command_with_its_streams_limits_and_exit_code(oci: Oci, image: str, tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir()
    (tmp_path / "rw").mkdir()
    (tmp_path / "ro/in").write_text("host file")
    script = """
        id; pwd; echo "$A $B"; cat; cat /ro/in; echo
        echo guest file > /rw/out; echo no > /ro/out || echo read-only
        cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max
        busybox hostname
        busybox grep -E '^(NoNewPrivs|Seccomp|SigIgn|SigBlk):' /proc/self/status
        busybox unshare -m true || echo no new namespace
        busybox mount -t tmpfs x /tmp || echo no mount
        ls /proc/1/root > /dev/null && busybox ps | busybox head -2 | busybox tail -1
        yes | busybox head -n 1
        echo to stderr >&2
        exit 42
    """
    wishes = ["--env", "A=a b", "--env", "B", "--workdir", "/var", "--mount", f"{tmp_path}/ro:/ro:ro"]
    wishes += ["--mount", f"{tmp_path}/rw:/rw", "--memory-mib", "64", "--cpus", "0.5", "--pids-limit", "33"]
    oci.env["B"] = "ours"
    done = oci("run", *wishes, image, "--", "sh", "-c", script, code=42, stdin="typed\n")
    lines = done.stdout.splitlines()
    assert lines[:6] == [
        "uid=0(root) gid=0(root) groups=0(root)",
        "/var",
        "a b ours",
        "typed",
        "host file",
        "read-only",
    ]
    assert lines[6:9] == [str(64 << 20), "50000 100000", "33"]
    assert lines[9].startswith("run-")
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert status == {"NoNewPrivs": "1", "Seccomp": "2", "SigIgn": "0" * 16, "SigBlk": "0" * 16}
    assert {"no new namespace", "no mount"} <= set(lines)
    assert lines[-2].split()[:3] == ["1", "root", "sh"]
    assert lines[-1] == "y"
    assert done.stderr.splitlines()[-1] == "to stderr"
    assert (tmp_path / "rw/out").read_text() == "guest file\n"
    assert oci.left() == []


def test_a_container_on_the_developer_kernel(bundle_of: Callable[[str], Path], image: str, oci: Oci) -> None:
    """It limits no memory by cgroup, and the guest has what `--memory-mib` says and 256 MiB."""
    oci = Oci(bundle_of("developer"), oci.runtime)
    script = "busybox uname -r; busybox grep MemTotal /proc/meminfo; cat /sys/fs/cgroup/pids.max"
    release, memory, pids = oci("run", "--memory-mib", "64", image, "--", "sh", "-c", script).stdout.splitlines()
    assert release.endswith("-vz-developer")
    assert (64 << 10) < int(memory.split()[1]) < (64 + 256) << 10
    assert pids == "1024"


def test_nothing_set_uid_is_left_in_a_mount(oci: Oci, image: str, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root's shares keep the owners of the guest")
    shared = tmp_path / "shared"
    shared.mkdir()
    script = """
        cd /shared
        cp /bin/busybox tool && busybox chmod 0755 tool
        busybox chmod 4755 tool || echo no set-uid
        busybox install -m 4755 tool other || echo no set-uid either
        busybox mkdir folder && busybox chmod 3777 folder
        busybox mknod device c 1 3 || echo no device
        busybox mkfifo pipe
    """
    done = oci("run", "--mount", f"{shared}:/shared", image, "--", "sh", "-c", script)
    assert done.stdout.splitlines() == ["no set-uid", "no set-uid either", "no device"]
    modes = {path.name: stat.filemode(path.lstat().st_mode) for path in shared.iterdir() if path.name != "other"}
    assert modes == {"tool": "-rwxr-xr-x", "folder": "drwxrwsrwt", "pipe": "prw-r--r--"}
    assert not any(path.lstat().st_mode & stat.S_ISUID for path in shared.iterdir())


def test_a_root_directory_is_not_changed_and_a_signal_is_128_and_its_number(
    oci: Oci, image: str, tmp_path: Path
) -> None:
    with image_root(Path(image), cache=tmp_path / "cache") as unpacked:
        script = "id -u; echo x > /new; rm /etc/passwd; ls /new; busybox sleep 1000 & kill -KILL $!; wait $!; exit $?"
        done = oci("run", "--user", "1000:7", str(unpacked.root), "--", "sh", "-c", f"echo $HOME; {script}", code=137)
        assert done.stdout.splitlines() == ["/build", "1000"], "not root: may not write there"
        script = "echo x > /new; rm /etc/passwd; ls /new"
        assert oci("run", str(unpacked.root), "--", "sh", "-c", script).stdout == "/new\n"
        assert not (unpacked.root / "new").exists()
        assert (unpacked.root / "etc/passwd").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nginx_answers_on_the_host_and_leaves_nothing_behind(
    oci: Oci, image: str, site: Path, number: signal.Signals
) -> None:
    [port] = free_ports(1)
    wishes = ["--mount", f"{site}:/srv/www:ro", "--publish", f"{port}:80"]
    with oci.start("run", *wishes, image, "--", "nginx", "-c", "/srv/www/nginx.conf") as process:
        try:
            assert fetched(port, process) == "from the host\n"
            (site / "index.html").write_text("changed\n")
            assert fetched(port, process) == "changed\n"
            ours = set(descendants(process.pid))
            assert len(ours) >= 4, "QEMU, and a virtiofsd for each share"
            process.send_signal(number)
            code = process.wait(LIMIT_SECS)
        finally:
            process.kill()
            (site / "index.html").write_text("from the host\n")
    assert code == (0 if number == signal.SIGINT else -signal.SIGKILL)
    until(lambda: gone(ours))
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
    if number == signal.SIGKILL:
        assert len(oci.left()) == 1, "nobody was there to remove it"
        oci("run", image, "--", "true")
    assert oci.left() == []


def test_a_terminal(oci: Oci, image: str) -> None:
    pid, master = pty.fork()
    if pid == 0:
        os.chdir(PROJECT)
        words = oci.words("run", image, "--", "sh")
        os.execve(words[0], words, {**oci.env, "TERM": "vt100"})
    said = b""

    def wait_for(text: bytes) -> None:
        nonlocal said
        deadline = time.monotonic() + LIMIT_SECS
        while text not in said:
            assert time.monotonic() < deadline, said
            if select.select([master], [], [], 1)[0]:
                said += os.read(master, 4096)
        said = said.partition(text)[2]

    try:
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))
        wait_for(b"# ")
        os.write(master, b'echo "$TERM $(tty) $(stty size)"\n')
        wait_for(b"vt100 /dev/pts/0 33 99\r\n")
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", 20, 50, 0, 0))
        os.kill(pid, signal.SIGWINCH)
        # The new size travels beside what is typed.
        os.write(master, b'while [ "$(stty size)" != "20 50" ]; do sleep 0.1; done; echo re"sized"\n')
        wait_for(b"resized\r\n")
        # Said by the process that is to be interrupted: the shell itself may lose a ^C that comes before its child is.
        os.write(master, b"sh -c 'echo sl\"eeps\"; exec sleep 1000'\n")
        wait_for(b"sleeps\r\n")
        os.write(master, b"\x03")
        wait_for(b"# ")
        os.write(master, b"echo code=$?; exit 5\n")
        wait_for(b"code=130\r\n")
        with contextlib.suppress(OSError):
            while os.read(master, 4096):
                pass
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        pid = 0
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(master)
    assert oci.left() == []


def test_the_life_of_a_container(oci: Oci, image: str, site: Path, container: str) -> None:
    [port] = free_ports(1)
    wishes = ["--mount", f"{site}:/srv/www:ro", "--publish", f"{port}:80", "--env", "A=1"]
    command = ["nginx", "-c", "/srv/www/nginx.conf"]
    assert oci("create", *wishes, container, image, "--", *command).stdout == f"{container}\n"

    def state() -> dict[str, object]:
        found: dict[str, object] = json.loads(oci("state", container).stdout)
        return found

    def listed_as(status: str) -> dict[str, object]:
        deadline = time.monotonic() + LIMIT_SECS
        while True:
            [found] = [json.loads(line) for line in oci("ps", "--json").stdout.splitlines()]
            if found["status"] == status:
                return dict(found)
            assert time.monotonic() < deadline, found

    created = state()
    listed = listed_as("created")
    assert (listed["id"], listed["image"], listed["command"]) == (container, image, command)
    assert listed["ports"] == [{"host_port": port, "guest_port": 80, "protocol": "tcp"}]
    assert (listed["profile"], listed["started"]) == ("container", None)
    assert (created["ociVersion"], created["id"], created["status"]) == ("1.0.2", container, "created")
    assert isinstance(created["pid"], int)
    assert "already" in oci("create", container, image, "--", "true", code=2).stderr
    assert "is created" in oci("exec", container, "--", "true", code=1).stderr
    assert "is created" in oci("stop", container, code=1).stderr

    oci("start", container)
    assert state()["status"] == "running"
    listed = listed_as("running")
    assert str(listed["created"]) < str(listed["started"])
    table = oci("ps").stdout.splitlines()
    assert len(table) == 2
    assert f"127.0.0.1:{port}->80/tcp" in table[1]
    assert oci("ps", "--kernel-profile", "developer", "--json").stdout == ""
    assert fetched(port) == "from the host\n"
    assert "is running" in oci("start", container, code=1).stderr
    assert "--force" in oci("delete", container, code=1).stderr

    done = oci("exec", "--env", "B=2", container, "--", "sh", "-c", 'echo "$A $B"; cat; exit 9', code=9, stdin="typed")
    assert done.stdout == "1 2\ntyped"
    done = oci(
        "exec", "--user", "nobody", "--workdir", "/tmp", container, "--", "sh", "-c", "id -u; pwd; kill $$", code=143
    )
    assert done.stdout.split() == ["65534", "/tmp"]
    assert "nosuch" in oci("exec", container, "--", "nosuch", code=127).stderr
    assert "/etc/passwd" in oci("exec", container, "--", "/etc/passwd", code=126).stderr

    oci("kill", container)
    until(lambda: state()["status"] == "stopped")
    listed_as("stopped")
    assert "is stopped" in oci("kill", container, code=1).stderr
    assert "is stopped" in oci("start", container, code=1).stderr
    assert oci("stop", container).stderr == ""
    supervisor = oci.supervisor(container)
    ours = {supervisor, *descendants(supervisor)}
    oci("delete", container)
    until(lambda: gone(ours))
    assert oci.left() == []
    assert oci("ps", "--json").stdout == ""
    assert "no container" in oci("state", container, code=2).stderr


def test_what_fails_before_a_guest_is_booted(oci: Oci, image: str, tmp_path: Path) -> None:
    def refused(*words: str, code: int, says: str) -> None:
        assert says in oci("run", *words, code=code).stderr

    refused(image, "--", "nosuch", code=127, says="the image has no nosuch")
    refused(image, "--", "/bin/nosuch", code=127, says="the image has no /bin/nosuch")
    refused(image, "--", "/etc/passwd", code=126, says="the image's /etc/passwd cannot be executed")
    refused("--kernel-profile", "developer", image, "--", "true", code=2, says="is a bundle of the container profile")
    refused("--volume", "../x:/x", image, "--", "true", code=2, says="is no volume")
    refused("--volume", "x:/x", "--mount", "/tmp:/x", image, "--", "true", code=2, says="are to be at /x")
    refused(str(tmp_path / "none"), "--", "true", code=2, says="there is no image")
    refused("--mount", "/no/such/place:/x", image, "--", "true", code=2, says="does not exist")
    refused("--user", "somebody", image, "--", "true", code=2, says="no user 'somebody'")
    (tmp_path / "text").write_text("hello")
    refused(str(tmp_path / "text"), "--", "true", code=2, says="OCI layout")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("--publish", f"{port}:80", image, "--", "true", code=1, says=f"port {port} of 127.0.0.1")
    # A root directory of this host's own programs.
    (tmp_path / "root/bin").mkdir(parents=True)
    shutil.copy("/bin/true", tmp_path / "root/bin/true")
    refused(str(tmp_path / "root"), "--", "true", code=2, says="not for arm64")
    assert oci.left() == []


def test_a_damaged_image_is_a_hash_mismatch(oci: Oci, tmp_path: Path) -> None:
    """An OCI layout whose only layer lost its end."""
    blobs = tmp_path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    layer = bytes(10240)
    named = blob(layer)
    config = {"os": "linux", "architecture": "arm64", "rootfs": {"type": "layers", "diff_ids": [named["digest"]]}}
    manifest = {"config": blob(json.dumps(config).encode()), "layers": [named]}
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [blob(json.dumps(manifest).encode())]}))
    (blobs / str(named["digest"]).removeprefix("sha256:")).write_bytes(layer[:-1])
    assert "layer 1 of 1" in oci("run", str(tmp_path), "--", "true", code=102).stderr
