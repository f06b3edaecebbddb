"""`docs/host-contract.md`, boot: kernels of both profiles under the command line, devices and images of hosts."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import trixie
from tests.guests import needs_qemu
from tests.hosts import Hardware, Host, eventually, playing
from tests.hosts.bundles import write_root
from tests.hosts.machine import powered
from vzrepro.guest.vm.boot import HostPrograms
from vzrepro.guest.vm.rootfs import image_root

pytestmark = needs_qemu

MIB = 1 << 20
MKE2FS = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin")


@dataclass(frozen=True, slots=True)
class Kit:
    """A profile's bundle and what it takes to boot it."""

    profile: str
    bundle: Path
    programs: HostPrograms
    busybox: Path

    def hardware(self, **more: object) -> Hardware:
        own = {"kernel": self.bundle / "vmlinux", "initramfs": self.bundle / "initramfs.img"}
        return Hardware(**{**own, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["container", "developer"])
def kit(request: pytest.FixtureRequest) -> Kit:
    get = request.getfixturevalue
    return Kit(request.param, get("bundle_of")(request.param), get("programs"), get("busybox"))


@pytest.fixture(scope="module")
def host(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A guest with everything that hosts attach; its first volume is a Debian with iptables."""
    place = tmp_path_factory.mktemp("boot")
    (place / "share").mkdir()
    with (place / "disk").open("wb") as file:
        file.truncate(16 * MIB)
    with image_root(trixie.firewall_image(), cache=place / "cache") as image:
        shares = {"vz-mount-0": image.root}
        machine = kit.hardware(shares=shares, targets=("/debian",), disks=(place / "disk",))
        with playing(kit.bundle, kit.programs, kit.busybox, share=place / "share", hardware=machine) as host:
            yield host


def test_the_command_line_of_hosts(host: Host) -> None:
    assert host.main.shell("cat /proc/cmdline") == "console=hvc0 quiet vz.mount.0=/debian\n"
    assert "vz-init: start" in host.machine.console.lines
    host.main.shell("test -x /debian/usr/sbin/iptables-legacy")


def test_the_devices_that_hosts_attach_have_drivers(host: Host) -> None:
    drivers = (
        "virtio_blk virtio_net virtio_console virtiofs vmw_vsock_virtio_transport virtio_rng virtio_balloon".split()
    )
    for driver in drivers:
        assert host.main.shell(f"ls -d /sys/bus/virtio/drivers/{driver}/virtio*"), driver
    host.main.shell("test -b /dev/vda && test -c /dev/hvc0 && test -d /sys/class/net/eth0")


def test_memory_options_that_waste_it_are_off(host: Host) -> None:
    zones = {line.split()[3] for line in host.main.shell("grep ^Node /proc/zoneinfo").splitlines()}
    assert not zones & {"DMA", "DMA32"}
    there = host.main.shell("ls -d /sys/kernel/mm/transparent_hugepage /sys/devices/system/node /proc/swaps 2>&1; :")
    assert there.count("No such file") == 3, there
    assert "CmaTotal" not in host.main.shell("cat /proc/meminfo")


def test_memory_limits_have_a_way_out(kit: Kit, host: Host) -> None:
    """MEMCG is kept by the container profile, for containers' limits; a host that wants none of it says so."""
    controllers = host.main.shell("cat /sys/fs/cgroup/cgroup.controllers").split()
    assert {"cpu", "pids"} <= set(controllers)
    if kit.profile == "container":
        assert "memory" in controllers
        off = kit.hardware(words="cgroup_disable=memory")
        with playing(kit.bundle, kit.programs, kit.busybox, hardware=off) as other:
            assert "memory" not in other.main.shell("cat /sys/fs/cgroup/cgroup.controllers").split()


def test_a_balloon_takes_memory_and_gives_it_back(host: Host) -> None:
    whole = host.main.resource_stats().memory_total_bytes
    for target in (256, 512):
        host.machine.qmp("balloon", value=target * MIB)
        eventually(lambda: host.machine.qmp("query-balloon")["actual"] == target * MIB, "the balloon's size")  # noqa: B023
        total = host.main.resource_stats().memory_total_bytes
        assert abs(whole - total - (512 - target) * MIB) < MIB


def test_free_pages_are_given_to_the_host_unasked(host: Host) -> None:
    before = host.machine.resident_bytes()
    host.main.shell(
        "mkdir -p /tmp/fill && mount -t tmpfs tmpfs /tmp/fill && dd if=/dev/zero of=/tmp/fill/x bs=1M count=192"
    )
    full = host.machine.resident_bytes()
    assert full - before > 128 * MIB
    host.main.shell("umount /tmp/fill")
    eventually(lambda: host.machine.resident_bytes() < full - 128 * MIB, "free pages came back")


def test_legacy_iptables(host: Host) -> None:
    iptables = ("/bin/busybox", "chroot", "/debian", "/usr/sbin/iptables-legacy")
    rules = {"filter": "INPUT -p tcp -m tcp --dport 9 -j REJECT", "nat": "POSTROUTING -s 172.20.0.0/16 -j MASQUERADE"}
    for table, rule in rules.items():
        host.main.text(*iptables, "-t", table, "-A", *rule.split())
        assert f"-A {rule}" in host.main.text(*iptables, "-t", table, "-S")


def test_smaps(host: Host) -> None:
    assert "Pss:" in host.main.shell("cat /proc/self/smaps; cat /proc/self/smaps_rollup")


def test_eight_loop_devices(host: Host) -> None:
    assert host.main.shell("ls /dev/loop[0-7] | wc -l").strip() == "8"


def test_the_release_names_the_profile(kit: Kit, host: Host) -> None:
    assert kit.profile in host.main.text("/bin/busybox", "uname", "-r")


def test_a_gzipped_initramfs(kit: Kit, tmp_path: Path) -> None:
    packed = tmp_path / "initramfs.img.gz"
    packed.write_bytes(gzip.compress((kit.bundle / "initramfs.img").read_bytes(), 9))
    with playing(kit.bundle, kit.programs, kit.busybox, hardware=kit.hardware(initramfs=packed)) as host:
        assert host.main.shell("echo up") == "up\n"


@pytest.mark.skipif(MKE2FS is None, reason="e2fsprogs is missing")
def test_a_direct_ext4_root_finds_dev_populated(kit: Kit, tmp_path: Path) -> None:
    init = """#!/bin/sh
    [ -c /dev/null ] && [ -b /dev/vda ] && [ -c /dev/hvc0 ] && echo x > /dev/null && echo "root: dev is populated"
    mount -t proc proc /proc
    grep -q ' / ext4 rw' /proc/mounts && echo "root: ext4"
    poweroff -f
    """
    root = write_root(tmp_path / "root", kit.busybox, {"/sbin/init": init})
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run([str(MKE2FS), "-q", "-t", "ext4", "-d", str(root), str(disk)], check=True)
    with powered(kit.hardware(initramfs=None, disks=(disk,), words="root=/dev/vda rw"), kit.programs) as machine:
        assert machine.qemu.wait(300) == 0
    assert [line for line in machine.console.lines if line.startswith("root:")] == [
        "root: dev is populated",
        "root: ext4",
    ]


def test_memhog_takes_memory_in_a_tmpfs(kit: Kit) -> None:
    if kit.profile != "container":
        pytest.skip("init's affair, the same in both profiles")
    with playing(kit.bundle, kit.programs, kit.busybox, hardware=kit.hardware(words="memhog_mb=128")) as host:
        shared = "awk '/^Shmem:/ { print int($2 / 1024) }' /proc/meminfo"
        eventually(lambda: int(host.main.shell(shared)) >= 128, "the memory was taken")
        assert int(host.main.shell(shared)) < 140


def test_vz_idle_prints_and_stays_without_an_agent(kit: Kit) -> None:
    if kit.profile != "container":
        pytest.skip("init's affair, the same in both profiles")
    with powered(kit.hardware(words="vz_idle=1"), kit.programs) as machine:
        machine.console.wait_for("MemTotal")
        assert machine.qemu.wait(0) is None
        assert not [line for line in machine.console.lines if "agent start" in line]
        assert [line for line in machine.console.lines if "virtio" in line]
