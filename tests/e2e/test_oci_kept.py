"""Containers that outlive the command: what they print, how they are stopped, their volumes, and what may die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.containers import Oci, gone, until
from tests.guests import LIMIT_SECS, descendants, needs_qemu
from vzrepro.guest.vm import logs
from vzrepro.guest.vm.agent import AgentClient
from vzrepro.guest.vm.logs import OutputStanding

pytestmark = needs_qemu

COUNTING = 'i=0; while :; do i=$((i + 1)); echo "$i"; busybox sleep 0.1; done'


def kept(oci: Oci, container: str) -> str:
    return (oci.directory(container) / "output").read_text()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=LIMIT_SECS)
    return process.returncode, out.decode()


def test_what_is_printed_is_kept_until_the_container_is_deleted(oci: Oci, image: str, container: str) -> None:
    """Both streams as they come, while it runs and afterwards; and a volume that the next container finds."""
    script = """
        trap 'echo caught; exit 3' TERM
        echo first; echo second >&2; busybox printf 'no line end'
        id -u > /data/who; busybox sleep 1000 & wait
    """
    wishes = ["--volume", "data:/data", "--user", "1000"]
    oci("create", *wishes, container, image, "--", "sh", "-c", script)
    assert oci("logs", container).stdout == ""
    oci("start", container)
    until(lambda: kept(oci, container).endswith("no line end"))
    follower = oci.start("logs", "-f", container)
    interrupted = oci.start("logs", "--follow", container)
    assert interrupted.stdout is not None
    assert interrupted.stdout.readline() == b"first\n"
    interrupted.send_signal(signal.SIGINT)
    assert ended(interrupted)[0] == 130

    # Meanwhile, another one with the same volume, which belongs to whom it was made for.
    done = oci("run", "--volume", "data:/d:ro", image, "--", "sh", "-c", "cat /d/who; echo x > /d/new || echo ro")
    assert done.stdout == "1000\nro\n"
    volume = oci.runtime / "data/vz/volumes/data"
    assert (volume / "who").read_text() == "1000\n"
    if os.geteuid() == 0:
        assert volume.stat().st_uid == 1000

    assert oci("stop", container).stderr == "", "it had a handler for its stop signal"
    printed = "first\nsecond\nno line endcaught\n"
    assert ended(follower) == (0, printed)
    assert oci("logs", "-f", container).stdout == printed
    oci("delete", container)
    assert (volume / "who").exists()


def test_a_supervisor_that_is_killed(oci: Oci, image: str, container: str) -> None:
    oci("create", container, image, "--", "sh", "-c", COUNTING)
    oci("start", container)
    follower = oci.start("logs", "-f", container)
    until(lambda: kept(oci, container) != "")
    # An agent that ends is started again, and not a byte is lost or comes twice.
    with AgentClient(f"unix:{oci.directory(container) / 'agent'}") as agent, pytest.raises(Exception, match="Exec"):
        list(agent.exec("/bin/sh", ["-c", 'kill -9 "$PPID"; sleep 60']))
    last = int(kept(oci, container).split()[-1])
    until(lambda: int(kept(oci, container).split()[-1]) > last + 5)

    supervisor = oci.supervisor(container)
    ours = {supervisor, *descendants(supervisor)}
    os.kill(supervisor, signal.SIGKILL)
    code, printed = ended(follower)
    assert code == 1
    numbers = printed.partition("error: ")[0].split()
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    until(lambda: gone(ours))
    done = oci("logs", container)
    assert done.stdout.split() == numbers
    assert "is gone" in done.stderr
    assert json.loads(oci("ps", "--json").stdout)["status"] == "gone"
    assert json.loads(oci("state", container).stdout)["status"] == "stopped"
    for words in (["start", container], ["kill", container], ["stop", container], ["exec", container, "--", "true"]):
        assert f"oci delete {container}" in oci(*words, code=1).stderr
    assert "its guest is gone" in oci("create", container, image, "--", "true", code=2).stderr
    oci("delete", container)
    assert oci.left() == []


def test_a_guest_that_is_killed_and_before_that_nobody_who_answers(oci: Oci, image: str, container: str) -> None:
    oci("create", container, image, "--", "sh", "-c", f"trap 'echo no' TERM; {COUNTING}")
    oci("start", container)
    supervisor = oci.supervisor(container)
    os.kill(supervisor, signal.SIGSTOP)
    assert json.loads(oci("ps", "--json").stdout)["status"] == "unreachable"
    os.kill(supervisor, signal.SIGCONT)
    until(lambda: json.loads(oci("ps", "--json").stdout)["status"] == "running")

    [machine] = [child for child, name in descendants(supervisor).items() if name.startswith("qemu")]
    follower, stopping = oci.start("logs", "-f", container), oci.start("stop", "--time", "1000", container)
    until(lambda: "no\n" in kept(oci, container))
    os.kill(machine, signal.SIGKILL)
    for process in (follower, stopping):
        code, said = ended(process)
        assert code == 1
        assert f"error: the guest of container {container} is gone" in said
    assert "ended with signal 9" in oci("exec", container, "--", "true", code=1).stderr
    assert "no\n" in oci("logs", container).stdout


@pytest.mark.thorough
def test_a_container_that_floods_a_full_disk(
    bundle: Path, image: str, container: str, mounted: Callable[[str], Path]
) -> None:
    """Nobody waits for anybody: it runs on, its output says what is missing, and host and guest keep a bounded part."""
    place = mounted("size=20m,mode=700")
    oci = Oci(bundle, place)
    oci("create", "flood", image, "--", "yes", "a line of the flood")
    output = oci.directory("flood")
    ballast = (place / "ballast").open("wb", buffering=0)
    with pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(bytes(1 << 16))
    oci("start", "flood")
    until(lambda: logs.standing(output) == OutputStanding.FULL)
    assert "is not kept" in oci("logs", "flood").stderr
    oci("exec", "flood", "--", "true")
    ballast.truncate(0)
    ballast.close()
    # The first thing that is written then.
    until(lambda: b"bytes are missing here: No space left on device]" in (output / "output").read_bytes())
    until((output / "output.1").exists)
    with AgentClient(f"unix:{output / 'agent'}") as agent:
        sizes = [event.stdout for event in agent.exec("/bin/sh", ["-c", "cat /run/vz/oci/flood/log* | wc -c"])]
    assert int(b"".join(sizes)) <= 1 << 20
    assert "and was killed" in oci("stop", "--time", "0", "flood").stderr
    assert oci("logs", "-f", "flood").stdout.endswith("a line of the flood\n")
    assert sum(path.stat().st_size for path in output.glob("output*")) <= 2 * logs.LIMIT
    oci("delete", "flood")
