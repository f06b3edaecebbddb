"""The guest kernels: one artifact `kernel-<profile>` per record of `capabilities.PROFILES`."""

import json

from recipes.kernel.capabilities import PROFILES, requirements
from recipes.toolchain import C_IMAGE
from vzrepro import build, debian_source, local, text

LINUX = debian_source("linux", series="6.12", suite="trixie")

KERNELS = {
    profile.name: build(
        f"kernel-{profile.name}",
        version=LINUX.version,
        image=C_IMAGE,
        inputs={
            "linux.tar.xz": LINUX,
            "src": local("build.sh", "check_config.py", profile.fragment, profile.hardening),
            "requirements.json": text("requirements.json", json.dumps(requirements(profile), sort_keys=True)),
        },
        command=["sh", "/in/src/build.sh"],
        timeout_secs=3 * 3600,
    )
    for profile in PROFILES
}
