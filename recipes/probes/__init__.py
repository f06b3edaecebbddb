"""Proof in a booted guest: `probes` is what a guest needs to be probed, `<profile>-probes` a kernel's verdicts.

docs/probes.md says how a capability is proven.
"""

import json
import tomllib

from recipes.host_programs import HOST_IMAGE, VIRTIOFSD
from recipes.vhost_device_vsock import VHOST_DEVICE_VSOCK

from recipes.initramfs import INITRAMFS
from recipes.kernel import KERNELS, PROFILES
from recipes.toolchain import C_IMAGE, TOOLS_IMAGE
from recipes.youki import YOUKI
from vzrepro import build, cargo_crates, debian_image, local, read, text
from vzrepro.recipes import AMD64, ARM64, SUITE, newc_writer, rust_program

VZ_PROBE = rust_program(
    "vz-probe",
    version=tomllib.loads(read("Cargo.toml"))["package"]["version"],
    source=local("Cargo.toml", "Cargo.lock", "src"),
    crates=cargo_crates("vz-probe", lock=".", targets=[ARM64, AMD64]),
    target=ARM64,
)

_PINNED = build(
    "pinned",
    image=C_IMAGE,
    inputs={"src": local("pinned.c")},
    command=["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", "/out/pinned.so", "/in/src/pinned.c"],
)

_VHOST = build(
    "vhost-preload",
    image=C_IMAGE,
    inputs={"src": local("vhost.c")},
    command=[
        *("gcc", "-std=gnu11", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"),
        *("-o", "/out/vhost.so", "/in/src/vhost.c"),
    ],
)

_UNUSED = "nothing that runs here runs or reads it"

_DISKS_IMAGE = debian_image(
    "disks",
    suite=SUITE,
    packages=["bash", "btrfs-progs", "coreutils", "dash", "e2fsprogs", "libc-bin"],
    without=dict.fromkeys(("debianutils", "openssl-provider-legacy"), _UNUSED),
)

_DISKS = build(
    "probe-disks",
    image=_DISKS_IMAGE,
    inputs={"pinned": _PINNED, "src": local("disks.sh")},
    command=["sh", "/in/src/disks.sh"],
)

_WANTED = {
    profile.name: {
        "profile": profile.name,
        "capabilities": {capability.name: capability.probe for capability in profile.capabilities},
        "absent": sorted({forbidden.probe for forbidden in profile.forbidden}),
    }
    for profile in PROFILES
}

PROBES = build(
    "probes",
    image=TOOLS_IMAGE,
    inputs={
        "vz-probe": VZ_PROBE,
        "disks": _DISKS,
        "newc": newc_writer(),
        "vhost": _VHOST,
        "src": local("manifest", "state.py"),
        "profiles.json": text("profiles.json", json.dumps(_WANTED, sort_keys=True)),
    },
    command=[
        "sh",
        "-c",
        "python3 /in/newc/newc.py /in/src/manifest /out/probes.cpio"
        " && cp --sparse=always /in/disks/*.img /in/profiles.json /in/src/state.py /in/vhost/vhost.so /out/",
    ],
)
"""What `vm probe` needs: `probes.cpio`, unpacked over an initramfs, two disks, `profiles.json`, and `state.py` with its
library."""

REPORTS = {
    profile.name: build(
        f"{profile.name}-probes",
        image=HOST_IMAGE,
        inputs={
            "kernel": KERNELS[profile.name],
            "initramfs": INITRAMFS,
            "youki": YOUKI,
            "probes": PROBES,
            "vhost-device-vsock": VHOST_DEVICE_VSOCK,
            "virtiofsd": VIRTIOFSD,
            "wanted.json": text("wanted.json", json.dumps(_WANTED[profile.name], sort_keys=True)),
            "src": local("run.py"),
        },
        command=["python3", "/in/src/run.py"],
    )
    for profile in PROFILES
}
"""Profile → its `probes.json`: every verdict PROVEN, or the build fails."""
