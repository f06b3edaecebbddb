"""The guest kernels: artifacts `kernel-<profile>-config`, its configuration and what it proves, and `kernel-<profile>`,
for each record of `capabilities.PROFILES`; and those of the plain kernel they are measured by."""

from recipes.kernel.capabilities import PLAIN, PROFILES, requirements
from vzrepro import debian_source
from vzrepro.recipes import dotconfig, kernel, kernel_config

LINUX = debian_source("linux", series="6.12", suite="trixie")

CONFIGS = {
    profile.name: kernel_config(f"kernel-{profile.name}-config", linux=LINUX, **requirements(profile))
    for profile in (*PROFILES, PLAIN)
}

KERNELS = {
    profile.name: kernel(
        f"kernel-{profile.name}",
        linux=LINUX,
        config=dotconfig(f"kernel-{profile.name}-dotconfig", config=CONFIGS[profile.name]),
        patches=profile.patches,
    )
    for profile in (*PROFILES, PLAIN)
}
