"""The guest kernels: artifacts `kernel-<profile>-config`, its proven configuration, and `kernel-<profile>`, for each
record of `capabilities.PROFILES`; and those of the plain kernel they are measured by."""

import json

from recipes.kernel.capabilities import PLAIN, PROFILES, requirements
from recipes.toolchain import C_IMAGE
from vzrepro import build, debian_source, local, text

LINUX = debian_source("linux", series="6.12", suite="trixie")

CONFIGS = {
    profile.name: build(
        f"kernel-{profile.name}-config",
        version=LINUX.version,
        image=C_IMAGE,
        inputs={
            "linux.tar.xz": LINUX,
            "src": local("configure.sh", "check_config.py", profile.fragment, profile.hardening),
            "requirements.json": text("requirements.json", json.dumps(requirements(profile), sort_keys=True)),
        },
        command=["sh", "/in/src/configure.sh"],
        build_only=["linux.tar.xz"],
    )
    for profile in (*PROFILES, PLAIN)
}

KERNELS = {
    profile.name: build(
        f"kernel-{profile.name}",
        version=LINUX.version,
        image=C_IMAGE,
        inputs={
            "linux.tar.xz": LINUX,
            "config": CONFIGS[profile.name],
            "src": local("build.sh"),
            **({"patches": local(*profile.patches, name=f"kernel-{profile.name}-patches")} if profile.patches else {}),
        },
        command=["sh", "/in/src/build.sh"],
        build_only=["src"],
        timeout_secs=3 * 3600,
    )
    for profile in (*PROFILES, PLAIN)
}
