"""What each kernel profile promises: capabilities, what it must not contain, and which files make it.

Pure data, read by the recipe (what to build), by `check_config.py` (proof from the final `.config`, through
`requirements`) and by `recipes/probes` (proof in the guest, through `Capability.probe`). Nothing is typed twice.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Capability:
    """A claim about a kernel. `symbols` are (Kconfig symbol without CONFIG_, wanted value); `probe` names the
    test in the booted guest that shows the claim is true."""

    name: str
    symbols: tuple[tuple[str, str], ...]
    probe: str


@dataclass(frozen=True)
class Forbidden:
    """A Kconfig symbol that must be `n` or absent in the final `.config`, and why; `probe` names the test in the booted
    guest that finds nothing of it (`vz-probe absent:<probe>`)."""

    symbol: str
    reason: str
    probe: str


@dataclass(frozen=True)
class Profile:
    """One kernel. `base` is the kernel's make target the fragment is merged onto; with `allnoconfig` every question
    the fragment leaves open is answered "no", with `defconfig` as the kernel's own default says. `lists` are the files
    of symbols that the final `.config` is held against, each difference with its reason; `patches` change the kernel's
    source."""

    name: str
    base: str
    fragment: str
    lists: tuple[str, ...]
    security_profile: str
    capabilities: tuple[Capability, ...]
    forbidden: tuple[Forbidden, ...]
    patches: tuple[str, ...] = ()


def _yes(*symbols: str) -> tuple[tuple[str, str], ...]:
    return tuple((symbol, "y") for symbol in symbols)


COMMON = (
    Capability("vsock", (*_yes("VSOCKETS", "VIRTIO_VSOCKETS"), ("VSOCKETS_LOOPBACK", "n")), "vsock"),
    Capability("virtiofs", _yes("FUSE_FS", "VIRTIO_FS", "VIRTIO_PCI"), "virtiofs"),
    Capability("hvc0_serial", _yes("TTY", "VIRTIO_CONSOLE", "HVC_DRIVER"), "hvc0_serial"),
    Capability("ext4_root", _yes("BLK_DEV", "VIRTIO_BLK", "EXT4_FS", "EXT4_FS_POSIX_ACL"), "ext4_root"),
    Capability("overlayfs", _yes("OVERLAY_FS", "TMPFS", "TMPFS_XATTR"), "overlayfs"),
    Capability("netns", _yes("NAMESPACES", "NET_NS", "VETH", "BRIDGE"), "netns"),
    Capability("seccomp", _yes("SECCOMP", "SECCOMP_FILTER"), "seccomp"),
    Capability("io_uring", _yes("IO_URING"), "io_uring"),
    Capability("btrfs_snapshots", (*_yes("BTRFS_FS", "BLK_DEV_LOOP"), ("RAID6_PQ_BENCHMARK", "n")), "btrfs_snapshots"),
    Capability("device_mapper", _yes("MD", "BLK_DEV_DM"), "device_mapper"),
    Capability("dm_crypt", _yes("DM_CRYPT", "CRYPTO_AES", "CRYPTO_XTS", "CRYPTO_AES_ARM64_CE_BLK"), "dm_crypt"),
    Capability(
        "memory_reclaim",
        _yes("VIRTIO_BALLOON", "MEMORY_BALLOON", "PAGE_REPORTING", "BALLOON_COMPACTION"),
        "memory_reclaim",
    ),
    Capability(
        "snapshot_safe",
        _yes("VIRTIO_VSOCKETS", "HW_RANDOM_VIRTIO", "VMGENID", "RTC_CLASS", "RTC_INTF_DEV", "RTC_DRV_PL031"),
        "snapshot_safe",
    ),
)
"""What every profile can do."""

NFSD = Capability("nfsd", _yes("NFSD", "NFSD_V4"), "nfsd")

CONTAINER_SANDBOX = Capability(
    "container_sandbox",
    _yes(
        *("PID_NS", "USER_NS", "UTS_NS", "IPC_NS", "TIME_NS", "CGROUPS", "MEMCG", "BLK_CGROUP", "BLK_DEV_THROTTLING"),
        *("CGROUP_SCHED", "CFS_BANDWIDTH", "CGROUP_PIDS", "CPUSETS", "CGROUP_BPF", "SECCOMP_FILTER", "OVERLAY_FS"),
        *("NF_TABLES", "NF_NAT", "NFT_MASQ", "NFT_COMPAT", "SECURITY_LANDLOCK", "RANDOMIZE_BASE", "VMAP_STACK"),
        *("STACKPROTECTOR_STRONG", "HARDENED_USERCOPY", "FORTIFY_SOURCE"),
    ),
    "container_sandbox",
)

NESTED_VIRT = Capability("nested_virt", _yes("VIRTUALIZATION", "KVM", "VHOST_NET"), "nested_virt")

TUN = Capability("tun", _yes("TUN", "BRIDGE", "NF_NAT", "NFT_MASQ"), "tun")

_CONTAINER_FORBIDDEN = (
    Forbidden(
        "IKCONFIG", "the guest need not read how its kernel was made; config is kept beside the image", "ikconfig"
    ),
    Forbidden("VIRTUALIZATION", "no nested virtualization in a deployed sandbox", "kvm"),
    Forbidden("KVM", "no nested virtualization in a deployed sandbox", "kvm"),
    Forbidden("TUN", "no TUN/TAP: packets leave through the virtual network card only", "tun"),
    Forbidden("TAP", "no TUN/TAP: packets leave through the virtual network card only", "tun"),
    Forbidden("USB_SUPPORT", "a virtual machine has no USB", "usb"),
    Forbidden("USB", "a virtual machine has no USB", "usb"),
    Forbidden("USB_GADGET", "a virtual machine is no USB device", "usb"),
    Forbidden("SCSI", "disks are virtio-blk", "scsi"),
    Forbidden("ATA", "disks are virtio-blk", "ata"),
    Forbidden("NFS_FS", "the profile serves NFS, it mounts none", "nfs"),
    Forbidden("NET_9P", "shared directories are virtiofs", "9p"),
    Forbidden("9P_FS", "shared directories are virtiofs", "9p"),
    Forbidden("SQUASHFS", "a file system parser that nothing here mounts", "squashfs"),
    Forbidden("FAT_FS", "a file system parser that nothing here mounts", "fat"),
    Forbidden("VFAT_FS", "a file system parser that nothing here mounts", "fat"),
    Forbidden("MSDOS_FS", "a file system parser that nothing here mounts", "fat"),
)

_PATCHES = ("balloon-leaves-memory.patch", "slab-without-sysfs.patch", "xor-without-benchmark.patch")

PROFILES = (
    Profile(
        name="developer",
        base="defconfig",
        fragment="developer.config",
        lists=("hardening-developer.txt", "hosts-developer.txt"),
        security_profile="developer-nested-virt",
        capabilities=(*COMMON, NESTED_VIRT, TUN),
        forbidden=(),
        patches=_PATCHES,
    ),
    Profile(
        name="container",
        base="allnoconfig",
        fragment="container.config",
        lists=("hardening.txt", "hosts-container.txt"),
        security_profile="container-hardened",
        capabilities=(*COMMON, NFSD, CONTAINER_SANDBOX),
        forbidden=_CONTAINER_FORBIDDEN,
        patches=_PATCHES,
    ),
)
"""Every kernel profile there is. A new one is one more record here and its fragment beside this file."""


PLAIN = Profile(
    name="plain",
    base="allnoconfig",
    fragment="plain.config",
    lists=(),
    security_profile="none",
    capabilities=(),
    forbidden=(),
)
"""The container profile without its hardening and tuning, to measure them by. It is no bundle."""


def requirements(profile: Profile) -> dict[str, object]:
    """`profile` as what `vzrepro.recipes.kernel_config` asks of it."""
    return {
        "profile": profile.name,
        "base": profile.base,
        "fragment": profile.fragment,
        "lists": list(profile.lists),
        "capabilities": {capability.name: dict(capability.symbols) for capability in profile.capabilities},
        "forbidden": [forbidden.symbol for forbidden in profile.forbidden],
    }
