"""`docs/host-contract.md`, what a host does per container: in a stack and alone, from its overlay to `Delete`, with
volumes, logs, ports and setup archives."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import needs_qemu
from tests.hosts import Hardware, Host, Refused, bundles, eventually, playing
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu

ARCHIVE_MIB = int(os.environ.get("VZREPRO_TEST_ARCHIVE_MIB", "40"))
"""How much a container's setup adds to it. Hosts see 400; emulated, that takes minutes."""


@pytest.fixture(scope="module")
def host(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A guest for a stack, with a disk, a volume of the host, and the share for setup archives."""
    place = tmp_path_factory.mktemp("stack")
    for name in ("rootfs", "data", "commits"):
        (place / name).mkdir()
    (place / "data/from-the-host").write_text("read\n")
    disk = place / "disk"
    with disk.open("wb") as file:
        file.truncate(256 << 20)
    machine = Hardware(
        bundle / "vmlinux",
        bundle / "initramfs.img",
        shares={"vz-mount-0": place / "data", "vz-setup-commits": place / "commits"},
        targets=("/srv/data",),
        disks=(disk,),
        memory_mib=512 + 3 * ARCHIVE_MIB,
    )
    with playing(bundle, programs, busybox, share=place / "rootfs", hardware=machine) as host:
        yield host


def test_a_container_in_a_stack_from_create_to_delete(host: Host) -> None:
    pid = host.launch(
        "web", command=["sleep", "1000"], env=["A=of the bundle"], files={"/srv/page": "from the image\n"}
    )
    assert host.inside(pid, "cat /srv/page; hostname; cat /etc/resolv.conf; readlink /proc/1/exe") == (
        "from the image\nweb\nnameserver 10.0.2.3\n/bin/busybox\n"
    )
    # The host's commands run beside the container's first process, in all of its namespaces and at its root.
    assert host.inside(pid, "pwd; ps | grep -c '[s]leep 1000'; touch /of-the-container", working_dir="/tmp") == (
        "/tmp\n1\n"
    )
    answer = host.main.oci_exec("web", "sh", "-c", "echo $A; id -u; echo oops >&2; exit 4", user="web")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (4, "of the bundle\n33\n", "oops\n")
    assert not (host.root("web") / "of-the-container").exists(), "what a container writes stays in its overlay"
    host.main.oci_kill("web", "SIGKILL")
    eventually(lambda: host.main.oci_state("web").status == "stopped", "the container stopped")
    assert host.main.oci_state("web").pid == 0
    host.main.oci_delete("web", force=True)


def test_a_new_container_of_the_same_id_is_a_new_one(host: Host) -> None:
    for number in range(3):
        pid = host.launch("again", command=["sleep", "1000"], files={"/srv/page": f"number {number}\n"})
        assert host.inside(pid, "cat /srv/page; ls /of-before 2>/dev/null; touch /of-before") == f"number {number}\n"
        host.main.oci_delete("again", force=True)


def test_a_new_container_of_the_same_id_while_the_earlier_one_runs_is_refused(host: Host) -> None:
    host.launch("twice", command=["sleep", "1000"])
    with pytest.raises(Refused) as refused:
        host.main.oci_create("twice", host.bundle("twice"))
    assert refused.value.status == "already_exists"
    host.main.oci_delete("twice", force=True)


@pytest.mark.parametrize("namespaces", [("mount",), ("mount", "pid", "ipc", "uts", "cgroup")])
def test_fewer_and_more_namespaces(host: Host, namespaces: tuple[str, ...]) -> None:
    """Hosts leave out what their own guests' kernel has not."""
    pid = host.launch("spaces", command=["sleep", "1000"], namespaces=namespaces)
    assert host.inside(pid, "echo in") == "in\n"
    host.main.oci_delete("spaces", force=True)


def test_limits_of_cpu_processes_and_memory(host: Host) -> None:
    limits = {"cpu": {"quota": 50_000, "period": 100_000}, "pids": {"limit": 64}}
    wanted = {"cpu.max": "50000 100000\n", "pids.max": "64\n"}
    if "memory" in host.main.shell("cat /sys/fs/cgroup/cgroup.controllers").split():  # not in the developer profile
        limits["memory"] = {"limit": 64 << 20}
        wanted["memory.max"] = f"{64 << 20}\n"
    pid = host.launch("small", command=["sleep", "1000"], limits=limits)
    group = host.main.shell(f"sed -n 's/^0:://p' /proc/{pid}/cgroup").strip()
    assert {name: host.main.shell(f"cat /sys/fs/cgroup{group}/{name}") for name in wanted} == wanted
    host.main.oci_delete("small", force=True)


def test_the_log_file_outlives_the_container(host: Host) -> None:
    host.launch("logger", command=["sh", "-c", "echo out; echo err >&2; exec sleep 1000"], log=True)
    log = "/run/vz-oci/logs/logger/output.log"
    host.main.shell(f"until [ $(wc -l < {log}) = 2 ]; do sleep 0.05; done")
    assert host.main.shell(f"tail -n 100 {log}") == "out\nerr\n"
    # Rotation, as hosts do it: copy and truncate, while the container has the file open.
    host.main.shell(f"cp {log} {log}.1 && : > {log}")
    host.stop("logger")
    assert host.main.shell(f"cat {log}.1") == "out\nerr\n"


def test_following_a_log_on_a_connection_of_its_own(host: Host) -> None:
    host.launch("chatty", command=["sh", "-c", "while :; do echo tick; sleep 0.1; done"], log=True)
    with host.connect() as connection:
        following = connection.exec("/bin/busybox", "tail", "-n", "+1", "-f", "/run/vz-oci/logs/chatty/output.log")
        following.until("tick\ntick\ntick\n")
        following.signal(15)
        assert following.output().end == 143
    host.main.oci_delete("chatty", force=True)


def test_volumes_on_a_disk_that_the_host_formats(host: Host) -> None:
    place = "/run/vz-oci/volumes"
    assert host.main.run("/bin/busybox", "blkid", "/dev/vda").text == ""
    host.main.text("/bin/busybox", "mke2fs", "-F", "/dev/vda")
    host.main.shell(f"/bin/busybox mkdir -p {place} && /bin/busybox mount -t ext4 /dev/vda {place} && mkdir {place}/db")
    for number in (1, 2):
        pid = host.launch(f"db{number}", command=["sleep", "1000"], binds={"/var/lib/db": f"{place}/db"})
        host.inside(pid, f"echo {number} >> /var/lib/db/rows && sync")
        host.main.oci_delete(f"db{number}", force=True)
    assert host.main.shell(
        f"umount {place} && mount -t ext4 /dev/vda {place} && cat {place}/db/rows; umount {place}"
    ) == ("1\n2\n")


def test_a_volume_of_the_host_in_a_container(host: Host) -> None:
    pid = host.launch("vol", command=["sleep", "1000"], binds={"/data": "/mnt/vz-mount-0", "/same": "/srv/data"})
    assert host.inside(pid, "cat /data/from-the-host; echo written > /data/by-the-container; cat /same/by-*") == (
        "read\nwritten\n"
    )
    host.main.oci_delete("vol", force=True)
    assert host.main.shell("cat /srv/data/by-the-container") == "written\n"


def test_a_port_of_a_service_that_listens_late(host: Host) -> None:
    script = "until [ -e /go ]; do sleep 0.05; done; echo at last | nc -l -p 8000"
    pid = host.launch("late", command=["sh", "-c", script])
    answers: list[bytes] = []

    def ask() -> None:
        with host.connect() as connection, connection.forward(8000) as forward:
            forward.end()
            answers.append(forward.received())

    # Begun before: the agent waits five seconds, and a busy machine's guest may take as long to begin a command.
    starter = host.enter(pid, "/bin/sh", "-c", "echo ready; read go; touch /go").until("ready\n")
    before = host.refusals()
    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: host.refusals() > before, "the port was tried")
    starter.write(b"go\n")
    asking.join()
    assert answers == [b"at last\n"]
    starter.connection.close()
    host.main.oci_delete("late", force=True)


def test_a_setup_archive_is_made_kept_and_unpacked_into_the_next_container(host: Host) -> None:
    """What a container's setup added (its overlay's upper layer) is packed into the host's share, and laid below the
    next container before its overlay is mounted."""
    run = host.main.text
    run("/bin/busybox", "mkdir", "-p", "/vz-setup-commits")
    run("/bin/busybox", "mount", "-t", "virtiofs", "vz-setup-commits", "/vz-setup-commits")
    pid = host.launch("setup", command=["sleep", "1000"])
    fill = f"dd if=/dev/urandom of=/opt/big bs=1M count={ARCHIVE_MIB} 2>/dev/null && ln -s big /opt/link"
    summed = host.inside(
        pid, f"mkdir -p /opt && {fill} && chmod 750 /opt/big && chown 33:33 /opt/big && md5sum /opt/big"
    )
    upper = "/run/vz-oci/containers/setup/upper"
    run("/bin/busybox", "tar", "-C", upper, "-cpf", "/vz-setup-commits/one.tar", ".")
    host.main.oci_delete("setup", force=True)
    host.main.shell("umount /run/vz-oci/containers/setup/merged /run/vz-oci/containers/setup")

    pid = host.launch("next", command=["sleep", "1000"], archive="/vz-setup-commits/one.tar")
    assert host.inside(pid, "md5sum /opt/big; stat -c '%a %u' /opt/big; readlink /opt/link") == f"{summed}750 33\nbig\n"
    host.main.oci_delete("next", force=True)
    host.main.shell("umount /run/vz-oci/containers/next/merged /run/vz-oci/containers/next; umount /vz-setup-commits")


def test_a_setup_archive_travels_through_exec_both_ways(host: Host) -> None:
    host.main.shell(f"mkdir -p /tmp/t && cd /tmp/t && dd if=/dev/urandom of=big bs=1M count={ARCHIVE_MIB} 2>/dev/null")
    with host.connect() as connection:
        packed = connection.exec("/bin/busybox", "tar", "-C", "/tmp/t", "-cpf", "-", ".").output()
        assert packed.end == 0
        host.main.shell("mv /tmp/t /tmp/before; mkdir /tmp/t")
        unpacking = connection.exec("/bin/busybox", "tar", "-C", "/tmp/t", "-xpf", "-").started()
        unpacking.write(packed.stdout)
        unpacking.close_stdin()
        assert unpacking.output().end == 0
    host.main.shell("cmp /tmp/t/big /tmp/before/big && rm -rf /tmp/t /tmp/before")


def test_a_container_alone(bundle: Path, programs: HostPrograms, busybox: Path, tmp_path: Path) -> None:
    """The guest's root file system is the container's own; its bundle is written into that after boot."""
    bundles.write_root(tmp_path, busybox, {"/srv/page": "from the image\n"})
    machine = Hardware(bundle / "vmlinux", bundle / "initramfs.img")
    with playing(bundle, programs, busybox, share=tmp_path, stacked=False, hardware=machine) as host:
        for _ in range(2):
            pid = host.launch("solo", command=["sleep", "1000"])
            assert host.inside(pid, "cat /srv/page; ls /left 2>/dev/null; touch /left") == "from the image\n"
            assert host.main.oci_exec("solo", "cat", "/srv/page").stdout == "from the image\n"
            host.stop("solo")
    assert not (tmp_path / "left").exists()
