"""The initramfs: busybox, the guest agent and `init`, as a newc archive that vzrepro writes itself."""

from recipes.guest_agent import GUEST_AGENT

from recipes.busybox import BUSYBOX
from vzrepro import local
from vzrepro.recipes import initramfs

SYSCTL = local("sysctl.conf", name="sysctl")
"""The sysctls that init sets."""

INITRAMFS = initramfs(
    inputs={"busybox": BUSYBOX, "agent": GUEST_AGENT, "sysctl": SYSCTL},
    local_files=[
        *("init", "udhcpc.script", "passwd", "group", "hosts"),
        *("fstab", "fstab.first", "fstab.rootfs"),
    ],
)
