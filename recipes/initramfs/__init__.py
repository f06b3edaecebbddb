"""The initramfs: busybox, the guest agent and `init`, as a newc archive that we write ourselves."""

from recipes.guest_agent import GUEST_AGENT

from recipes.busybox import BUSYBOX
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, local

NEWC = local("newc.py", name="newc")
"""The writer of such archives."""

SYSCTL = local("sysctl.conf", name="sysctl")
"""The sysctls that init sets."""

INITRAMFS = build(
    "initramfs",
    image=TOOLS_IMAGE,
    inputs={
        "busybox": BUSYBOX,
        "agent": GUEST_AGENT,
        "sysctl": SYSCTL,
        "src": local("newc.py", "manifest", "init", "udhcpc.script", "fstab", "passwd", "group", "hosts"),
    },
    command=["python3", "/in/src/newc.py", "/in/src/manifest", "/out/initramfs.img"],
)
