"""An engine that does not mount what is here: what goes in and comes out, its limits, and every way in which it ends.

What is promised of both ways is in test_sandbox.py. Needs root, and a Docker daemon in a mount namespace of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cli
from tests.e2e.sandboxes import output, store_object, volumes
from tests.engines import Connection
from vzrepro import nar, sandbox
from vzrepro.base.errors import BuildFailed, Interrupted, TimedOut, VzreproError
from vzrepro.sandbox import archive, engine
from vzrepro.sandbox.places import volume_of

NewJob = Callable[..., sandbox.Job]
far = pytest.mark.parametrize("way", ["volume"], indirect=True)

# Modes, hard links, holes, closed directories, names that are no text.
ODD_OUTPUT = r"""
    cd /out; mkdir -p a/b closed; echo hi > a/file; ln a/file a/same; ln -s a/file link; ln -s / root; : > empty
    printf x > "$(printf 'new\nline')"; printf x > "$(printf '\377\376')"; : > .wh.name; : > 'a b\c'
    for mode in 0 111 444 4755 070; do printf $mode > m$mode; chmod $mode m$mode; done
    truncate -s 40M hole; printf end >> hole; : > closed/inside; chmod 0 closed
"""


@pytest.fixture
def near_and_far(
    new_job: NewJob, far_engine: str, tools_archive: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[sandbox.Job, sandbox.Job]]:
    """Run the same in both ways; the two jobs."""

    def run(script: str, **changes: Any) -> tuple[sandbox.Job, sandbox.Job]:
        near, far = new_job(script, **changes), new_job(script, **changes)
        sandbox.run(near, on_line=lambda _: None)
        with monkeypatch.context() as patch:
            patch.setenv("DOCKER_HOST", far_engine)
            sandbox.load_image(tools_archive, far.image)
            sandbox.run(far, on_line=lambda _: None)
            assert volumes() == []
        return near, far

    return run


def test_both_ways_show_and_give_the_same(
    near_and_far: Callable[..., tuple[sandbox.Job, sandbox.Job]], tmp_path: Path
) -> None:
    path = store_object(tmp_path)
    path.chmod(0o755)
    for name in ("old", os.fsdecode(b"\xff\xfe"), "n" * 200):
        (path / name).write_bytes(os.fsencode(name)[:3])
        (path / name).chmod(0o555)
        os.utime(path / name, ns=(0, 1_234_567_890_123_456_789))
    (path / "link").symlink_to("no//where/")
    os.utime(path / "link", (1, 1), follow_symlinks=False)
    os.utime(path, (1, 1))
    path.chmod(0o555)
    look = """
        walk() { for f in "$1"/* "$1"/.[!.]*; do if [ -L "$f" ] || [ -e "$f" ]; then
            stat -c '%N %A %u %g %y' "$f"
            if [ -d "$f" ] && [ ! -L "$f" ]; then walk "$f"; else stat -c '%s %h' "$f"; fi; fi; done; }
        stat -c '%A %u %g %y' /in; walk /in; cat /in/tree/old /in/again/old
        stat -c '%n %A %u %g' /build /out /etc/hosts; ls -A / /build /out
        sed 's/.* \\(\\/[^ ]*\\) \\([a-z]*\\),.* - .*/\\1 \\2/' /proc/self/mountinfo | sort
    """
    inputs = {"tree": path, "again": path, "file": path / "file"}
    near, far = near_and_far(look + ODD_OUTPUT, inputs=inputs)
    assert near.log.read_text(errors="replace") == far.log.read_text(errors="replace")
    assert b"again/old" in near.log.read_bytes()
    assert nar.nar_hash(near.out) == nar.nar_hash(far.out)
    assert (far.out / "hole").stat().st_blocks * 512 < 1 << 20
    assert (far.out / "m4755").stat().st_mode & 0o7777 == 0o755
    assert (far.out / "a" / "file").samefile(far.out / "a" / "same")


@far
def test_a_socket_and_a_pipe_are_refused(new_job: NewJob) -> None:
    script = "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/out/s\")'"
    with pytest.raises(VzreproError, match="socket in /out") as caught:
        output(new_job(script))
    assert caught.value.reason is not None and "fifo" in caught.value.reason
    job = new_job("mkfifo /out/pipe")
    output(job)
    with pytest.raises(VzreproError, match="cannot be part of a store object"):
        nar.nar_hash(job.out)


@far
def test_a_tree_that_is_too_deep(new_job: NewJob) -> None:
    script = """python3 -c 'import os
for top in ("/build", "/out"):
    os.chdir(top)
    for _ in range(3000):
        os.mkdir("d")
        os.chdir("d")'"""
    with pytest.raises(VzreproError, match="is nested too deeply"):
        output(new_job(script))


@far
def test_limits_of_the_disk(new_job: NewJob) -> None:
    with pytest.raises(BuildFailed, match="in /build and /out takes more than its limit"):
        output(new_job("head -c 3000000 /dev/urandom > /build/f; sleep 600", disk_bytes=2 << 20))
    with pytest.raises(BuildFailed, match="what it leaves in /out is larger than its limit"):
        output(new_job("truncate -s 1T /out/hole", disk_bytes=2 << 20))


@far
def test_the_time_limit_and_an_interrupt_reach_the_copies(new_job: NewJob, tmp_path: Path) -> None:
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.truncate(1 << 40)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        sandbox.run(new_job("truncate -s 1T /out/hole; echo"), on_line=lambda _: stop.set(), stop=stop)
    with pytest.raises(TimedOut, match="its time limit of 4 s"):
        output(new_job("truncate -s 1T /out/hole", timeout_secs=4))
    with pytest.raises(TimedOut, match="its time limit of 2 s"):
        output(new_job("true", inputs={"endless": endless}, timeout_secs=2))


@far
def test_a_failed_build_is_kept_for_a_shell(new_job: NewJob, tmp_path: Path) -> None:
    job = new_job("echo here > /build/left; exit 3", keep_failed=True, inputs={"tree": store_object(tmp_path)})
    with pytest.raises(BuildFailed) as caught:
        output(job)
    note = volume_of(job)
    assert note is not None and caught.value.hint is not None and note.container in caught.value.hint
    assert sandbox.sweep() == [], "it is kept"
    reopen = shlex.split(caught.value.hint.splitlines()[-1])
    reopen.remove("--tty")
    typed = "cat /build/left /in/tree/file; id -u\n"
    shell = subprocess.run(reopen, input=typed, capture_output=True, text=True, check=True)
    assert shell.stdout.splitlines()[-3:] == ["here", "content", "1000"]
    sandbox.discard(job)
    assert not job.scratch.exists()


# --- how it ends otherwise ------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from vzrepro import sandbox
from vzrepro.sandbox import engine
host, image, scratch, source = sys.argv[1:]
engine.host_name = lambda: host
job = sandbox.Job(label="killed", image=image, command=("true",), scratch=Path(scratch), log=Path(scratch + ".log"),
                  source_date_epoch=1, cores=1, inputs={"endless": Path(source)})
sandbox.run(job, on_line=print)
"""


@far
def test_what_a_kill_leaves_while_inputs_are_sent_is_swept(
    new_job: NewJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = uuid.uuid4().hex[:16]
    monkeypatch.setattr(engine, "host_name", lambda: host)
    endless = tmp_path / "endless"
    with endless.open("wb") as file:
        file.truncate(1 << 40)
    job = new_job("true")
    words = [host, job.image, str(job.scratch), str(endless)]
    with subprocess.Popen([sys.executable, "-c", CHILD, *words]) as child:
        while not (job.scratch / "volume.json").exists():
            assert child.poll() is None
        assert len(volumes()) == 1 and sandbox.sweep() == []
        child.send_signal(signal.SIGKILL)
    assert len(sandbox.sweep()) == 1
    assert volumes() == []


@pytest.fixture
def connection(way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    """The far engine at a TCP port of its own."""
    made = Connection(os.environ["DOCKER_HOST"])
    with monkeypatch.context() as patch:
        patch.setenv("DOCKER_HOST", made.address)
        yield made


class Cutter(archive._Packing):
    """Loses the connection while an input is being sent."""

    connection: Connection

    def tree(self, name: str, source: Path) -> None:
        self.connection.cut()
        archive._Packing.tree(self, name, source)


@far
@pytest.mark.parametrize("when", ["in", "build", "out"])
def test_a_connection_that_is_lost(
    new_job: NewJob, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    script = {"in": "true", "build": "echo; sleep 600", "out": "head -c 30000000 /dev/urandom > /out/file"}[when]
    if when == "in":
        monkeypatch.setattr(Cutter, "connection", connection, raising=False)
        monkeypatch.setattr(archive, "_Packing", Cutter)
    if when == "out":
        real = archive._Unpacking.add

        def add(self: Any, tar: Any, member: Any) -> None:
            connection.cut()
            real(self, tar, member)

        monkeypatch.setattr(archive._Unpacking, "add", add)
    monkeypatch.setattr(engine, "_UNREACHABLE_SECS", 0.5)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 22))
    job = new_job(script, inputs={"source": source})
    with pytest.raises(VzreproError) as caught:
        sandbox.run(job, on_line=lambda _: connection.cut())
    assert caught.value.message in (
        "the Docker daemon does not answer",
        "the connection to the container engine was lost",
    )
    assert caught.value.reason is not None
    assert caught.value.hint is not None
    monkeypatch.setattr(engine, "_orphaned", lambda _: True)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{connection._target}")
    sandbox.sweep()
    assert volumes() == []


@far
def test_an_engine_by_ssh(new_job: NewJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    address = os.environ["DOCKER_HOST"]
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nexec docker --host {address} system dial-stdio\n')
    ssh.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
        patch.setenv("DOCKER_HOST", "ssh://someone@builder.invalid")
        assert output(new_job("cat /in/source; echo made > /out/x", inputs={"source": ssh}))[0] == "#!/bin/sh"
        assert "builder.invalid" in (tmp_path / "asked").read_text()
        # A real one is refused by the other side, later than the client has asked its first question.
        ssh.write_text("#!/bin/sh\nread -r _\necho 'Permission denied (publickey,password).' >&2\nexit 255\n")
        with pytest.raises(VzreproError, match="does not answer") as caught:
            sandbox.check()
    assert "Permission denied (publickey" in str(caught.value.reason)
    assert "must not ask for a password" in str(caught.value.hint)


@far
def test_an_engine_by_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    address = os.environ["DOCKER_HOST"]
    monkeypatch.delenv("DOCKER_HOST")
    create = ["docker", "context", "create", "far", "--docker", f"host={address}"]
    subprocess.run(create, check=True, capture_output=True)
    monkeypatch.setenv("DOCKER_CONTEXT", "far")
    assert sandbox.sharing_of(tmp_path).mounts is False


# --- the whole of it ------------------------------------------------------------------------------------------------


def test_targets_come_out_the_same(
    small: Cli, seeded: Path, far_engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = small.run("realize", "low", "high")
    assert "sent to the container engine" not in near.stderr
    far = Cli(small.root, tmp_path / "far", small.env | {"VZREPRO_MACHINE_CACHE_DIR": str(tmp_path / "far-cache")})
    shutil.copytree(seeded, far.store, symlinks=True)
    monkeypatch.setenv("DOCKER_HOST", far_engine)
    done = far.run("realize", "low", "high")
    assert "fetched: it does not see this machine's files" in done.stderr
    places = zip(near.stdout.splitlines(), done.stdout.splitlines(), strict=True)
    for here, there in places:
        assert Path(here).name == Path(there).name and here != there
        assert nar.nar_hash(Path(here)) == nar.nar_hash(Path(there))
    assert far.run("log", "low").stdout == small.run("log", "low").stdout == "low\n"
    with far.start("doctor") as process:
        out, _ = process.communicate()
    [line] = [line for line in out.splitlines() if line.startswith("files of builds")]
    assert "sent to the engine and fetched" in line and "does not see" in line
    assert list(far.store.glob(".vzrepro/tmp/*")) == volumes() == []
