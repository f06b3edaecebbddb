"""`docs/host-contract.md`, trouble: what a guest does when its host, its memory or a share fails it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import needs_qemu
from tests.hosts import Hardware, Host, Refused, eventually, playing
from tests.hosts.wire import stubs
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu

FLOOD = 300
"""Connections that a host opens at once and leaves open."""


@pytest.fixture(scope="module")
def host(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    share, volume = tmp_path_factory.mktemp("stack"), tmp_path_factory.mktemp("volume")
    machine = Hardware(bundle / "vmlinux", bundle / "initramfs.img", shares={"vz-mount-0": volume})
    with playing(bundle, programs, busybox, share=share, hardware=machine) as host:
        yield host


def alive(host: Host) -> None:
    """The agent is the one that was started first, and answers."""
    assert host.interactive("/bin/busybox", "echo", "alive").stdout == b"alive\n"
    assert not [line for line in host.machine.console.lines if "agent ended" in line]


def agent_kib(host: Host) -> int:
    return int(host.main.shell("sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\) kB/\\1/p' /proc/$PPID/status"))


def test_a_host_that_floods_with_connections(host: Host) -> None:
    streams: list[socket.socket] = []
    try:
        for _ in range(FLOOD):
            with contextlib.suppress(ConnectionError):  # a full queue turns further ones away
                streams.append(host.machine.dial())
        assert len(streams) > FLOOD // 2
        alive(host)
    finally:
        for stream in streams:
            stream.close()
    alive(host)


def test_a_host_that_never_reads(host: Host) -> None:
    before = agent_kib(host)
    with host.connect() as connection:
        flood = connection.exec("/bin/busybox", "yes").until("y\n")
        alive(host)
        assert agent_kib(host) - before < 8 << 10
        pid = host.main.shell("pidof yes || ps | awk '/[y]es$/ { print $1 }'").split()[0]
        assert flood.end is None
    eventually(
        lambda: host.main.run("/bin/busybox", "kill", "-0", pid).end != 0, "the command of a host that left ended"
    )


def test_a_host_that_dies_in_mid_stream(host: Host) -> None:
    """Its connection breaks without a goodbye, while a command is typed into: command and input go with it."""
    with host.connect() as connection:
        running = connection.exec("/bin/busybox", "sh", "-c", "echo $$; exec sleep 1000").until("\n")
        pid = running.stdout.decode().strip()
        running.write(b"half a li")
        connection.cut()
    eventually(lambda: host.main.run("/bin/busybox", "kill", "-0", pid).end != 0, "its command ended")
    alive(host)


def test_two_hosts_on_one_guest(host: Host) -> None:
    """Both count their requests from 1, and neither sees anything of the other's."""
    with host.connect() as one, host.connect() as two:
        first = one.exec("/bin/sh", "-c", "echo one; read x; exit 1").until("one\n")
        second = two.exec("/bin/sh", "-c", "echo two; read x; exit 2").until("two\n")
        assert first.exec_id != second.exec_id
        first.close_stdin()
        second.close_stdin()
        assert (first.output().end, second.output().end) == (1, 2)


def test_a_host_that_speaks_another_revision_is_told_which_one_is_needed(host: Host) -> None:
    """A call that this revision has not: a status with a sentence, and a line on the console, once."""
    pb, _ = stubs()
    with host.connect() as connection:
        method = connection.channel.unary_unary(
            "/vz.agent.v2.AgentService/Ping",
            request_serializer=pb.PingRequest.SerializeToString,
            response_deserializer=pb.PingResponse.FromString,
        )
        for _ in range(2):
            with pytest.raises(Refused) as refused:
                connection.call("Ping of revision 2", method, pb.PingRequest())
            assert refused.value.status == "unimplemented"
            assert "revision 1" in refused.value.sentence
    host.machine.console.wait_for("protocol revision 1")
    alive(host)


def test_a_full_tmpfs_is_an_error_and_no_end(host: Host) -> None:
    for file in ("/run/vz-oci/full", "/full"):
        full = host.main.run("/bin/busybox", "dd", "if=/dev/zero", f"of={file}", "bs=1M")
        assert full.end == 1
        assert "No space left on device" in full.text
        alive(host)
        host.main.shell(f"rm {file}")


def test_a_container_that_fills_its_overlay(host: Host) -> None:
    pid = host.launch("full", command=["sleep", "1000"])
    running = host.enter(pid, "/bin/sh", "-c", "dd if=/dev/zero of=/big bs=1M")
    assert "No space left on device" in running.output().text
    alive(host)
    host.main.oci_delete("full", force=True)
    host.main.shell("umount /run/vz-oci/containers/full/merged /run/vz-oci/containers/full")


def test_memory_that_runs_out_ends_a_command_and_not_the_agent(host: Host) -> None:
    agent = host.main.shell("pidof vz-guest-agent").split()
    assert host.main.shell("cat /proc/self/oom_score_adj") == "0\n"
    for _ in range(3):
        eater = host.main.run("/bin/busybox", "awk", 'BEGIN { while (1) a[i++] = sprintf("%1000s", i) }')
        assert eater.end == 128 + signal.SIGKILL
        alive(host)
    assert host.main.shell("pidof vz-guest-agent").split() == agent


def test_a_balloon_that_asks_for_more_than_there_is(bundle: Path, programs: HostPrograms, busybox: Path) -> None:
    """From a host that does not offer to deflate it when memory runs out."""
    with playing(bundle, programs, busybox, hardware=Hardware(bundle / "vmlinux", bundle / "initramfs.img")) as host:

        def size_mib() -> int:
            return int(host.machine.qmp("query-balloon")["actual"]) >> 20

        host.machine.qmp("balloon", value=1 << 20)
        eventually(lambda: size_mib() < 96, "the balloon took what the guest could spare")
        for _ in range(10):
            alive(host)
            assert host.main.run("/bin/busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=4M", "count=1").end == 0
        host.machine.qmp("balloon", value=512 << 20)
        eventually(lambda: size_mib() == 512, "the memory came back")
        alive(host)
        assert not [line for line in host.machine.console.lines if "Out of memory" in line or "oom-kill" in line]


def test_a_share_that_goes_away_takes_nothing_else_along(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/file").write_text("there\n")
    shutil.copy(busybox / "busybox", tmp_path / "volume/busybox")
    machine = Hardware(bundle / "vmlinux", bundle / "initramfs.img", shares={"vz-mount-0": tmp_path / "volume"})
    with playing(bundle, programs, busybox, hardware=machine) as host:
        assert host.main.shell("cat /mnt/vz-mount-0/file") == "there\n"
        os.kill(host.machine.servers["vz-mount-0"].pid, signal.SIGKILL)
        with host.connect() as connection:
            connection.exec("/bin/busybox", "ls", "/mnt/vz-mount-0").started()
            alive(host)
            connection.exec("/mnt/vz-mount-0/busybox", "true")
            alive(host)
            connection.exec("/bin/busybox", "true", working_dir="/mnt/vz-mount-0")
            alive(host)
