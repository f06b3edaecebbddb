"""The real container-bundle: what is in it, and that every part is what it says."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest

from tests.e2e.conftest import Cli

KEYS = [
    "kernel",
    "profile",
    "security_profile",
    "busybox",
    "agent",
    "agent_protocol_revision",
    "youki",
    "built",
    "sha256_vmlinux",
    "sha256_initramfs",
    "sha256_youki",
    "capabilities",
]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_static_arm64(path: Path) -> bool:
    """ELF64, little endian, machine AArch64 (183), no program header of type PT_INTERP (3)."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18)[0] != 183:
        return False
    offset, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    return all(struct.unpack_from("<I", data, offset + size * n)[0] != 3 for n in range(count))


def test_exactly_four_files(bundle: Path) -> None:
    assert sorted(path.name for path in bundle.iterdir()) == ["initramfs.img", "version.json", "vmlinux", "youki"]


def test_version_json(bundle: Path, project: Cli) -> None:
    version = json.loads((bundle / "version.json").read_text())
    assert list(version) == KEYS
    assert version["profile"] == "container"
    assert version["security_profile"] == "container-hardened"
    assert version["built"] == "2026-01-01T00:00:00Z"
    assert version["sha256_vmlinux"] == _sha256(bundle / "vmlinux")
    assert version["sha256_initramfs"] == _sha256(bundle / "initramfs.img")
    assert version["sha256_youki"] == _sha256(bundle / "youki")
    assert version["capabilities"] == sorted(
        "vsock virtiofs hvc0_serial ext4_root overlayfs netns seccomp io_uring btrfs_snapshots device_mapper dm_crypt "
        "memory_reclaim snapshot_safe nfsd container_sandbox".split()
    )
    assert version["agent_protocol_revision"] == 1
    shown = json.loads(project.run("show", "kernel-container", "--json").stdout)
    assert version["kernel"] == shown["derivation"]["version"]


def test_what_is_declared_is_what_the_kernels_build_and_the_guest_proved(bundle: Path, project: Cli) -> None:
    declared = json.loads((bundle / "version.json").read_text())["capabilities"]
    config, probed = project.realize("kernel-container-config", "container-probes")
    assert declared == json.loads((config / "capabilities.json").read_text())
    report = json.loads((probed / "probes.json").read_text())
    assert declared == sorted(report["capabilities"])
    assert {one["verdict"] for one in (*report["capabilities"].values(), *report["absent"].values())} == {"PROVEN"}


def test_the_kernel_is_a_raw_arm64_image(bundle: Path) -> None:
    with (bundle / "vmlinux").open("rb") as file:
        header = file.read(64)
    assert header[56:60] == b"ARM\x64"


def test_the_kernel_object_keeps_config_and_symbols(bundle: Path, project: Cli) -> None:
    kernel = project.realize("kernel-container")[0]
    assert (kernel / "vmlinux").read_bytes() == (bundle / "vmlinux").read_bytes()
    config = (kernel / "config").read_text().splitlines()
    for line in ("CONFIG_RANDOMIZE_BASE=y", "CONFIG_RTC_DRV_PL031=y", "CONFIG_NO_HZ_IDLE=y", "CONFIG_VMAP_STACK=y"):
        assert line in config
    for (
        symbol
    ) in "IKCONFIG KVM TUN USB SCSI ATA NFS_FS NET_9P SQUASHFS VFAT_FS VSOCKETS_LOOPBACK RAID6_PQ_BENCHMARK".split():
        assert not any(line.startswith(f"CONFIG_{symbol}=") for line in config), symbol
    assert " T start_kernel" in (kernel / "System.map").read_text()
    report = json.loads((kernel / "report.json").read_text())
    assert report["image_bytes"] == (bundle / "vmlinux").stat().st_size


@pytest.mark.parametrize(
    ("target", "name"),
    [("busybox", "busybox"), ("guest-agent", "vz-guest-agent"), ("youki", "youki")],
)
def test_guest_programs_are_static_arm64(project: Cli, target: str, name: str) -> None:
    assert _is_static_arm64(project.realize(target)[0] / name)


def test_everything_realized_is_intact(bundle: Path, project: Cli) -> None:
    assert bundle.is_dir()
    project.run("store", "verify")
    project.run("lock", "--check")
