"""The boot bundles: one artifact `<profile>-bundle` per kernel profile, exactly the four files that hosts boot, and
`bundles`, all of them for distribution, each in a directory named after its profile."""

import json

from recipes import guest_agent
from recipes.busybox import BUSYBOX
from recipes.hardening import HARDENING
from recipes.initramfs import INITRAMFS
from recipes.kernel import CONFIGS, KERNELS, PROFILES
from recipes.probes import REPORTS
from recipes.toolchain import TOOLS_IMAGE
from recipes.youki import YOUKI
from vzrepro import build, local, text

_bundles = {}
for _profile in PROFILES:
    _kernel = KERNELS[_profile.name]
    _metadata = {
        "kernel": _kernel.version,
        "profile": _profile.name,
        "security_profile": _profile.security_profile,
        "busybox": BUSYBOX.version,
        "agent": guest_agent.VERSION,
        "agent_protocol_revision": guest_agent.PROTOCOL_REVISION,
        "youki": YOUKI.version,
    }
    _bundles[_profile.name] = build(
        f"{_profile.name}-bundle",
        image=TOOLS_IMAGE,
        inputs={
            "kernel": _kernel,
            "config": CONFIGS[_profile.name],
            "initramfs": INITRAMFS,
            "youki": YOUKI,
            "probes": REPORTS[_profile.name],
            **({"hardening": HARDENING[_profile.name]} if _profile.name in HARDENING else {}),
            "metadata.json": text("metadata.json", json.dumps(_metadata, sort_keys=True)),
            "src": local("assemble.py"),
        },
        command=["python3", "/in/src/assemble.py"],
        build_only=["config", "probes", *(["hardening"] if _profile.name in HARDENING else []), "src"],
    )

build("bundles", image=TOOLS_IMAGE, inputs=_bundles, command=["cp", "-R", "/in/.", "/out"])

# For bench/kernel only: the plain kernel with the same initramfs, no bundle.
build(
    "plain-bundle",
    image=TOOLS_IMAGE,
    inputs={"kernel": KERNELS["plain"], "initramfs": INITRAMFS},
    command=["cp", "/in/kernel/vmlinux", "/in/initramfs/initramfs.img", "/out"],
)
