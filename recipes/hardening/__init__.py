"""What a guest's hardening comes to: its kernel's configuration, command line and sysctls under
kernel-hardening-checker."""

from recipes.initramfs import SYSCTL
from recipes.kernel import CONFIGS
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, debian_source, local

CHECKER = debian_source("kernel-hardening-checker", series="0.6", suite="forky")
"""From Debian's next release: trixie has it in its backports only. Python, with nothing but the standard library."""

HARDENING = {
    "container": build(
        "kernel-container-hardening",
        image=TOOLS_IMAGE,
        inputs={
            "checker.tar.gz": CHECKER,
            "config": CONFIGS["container"],
            "sysctl": SYSCTL,
            "src": local("check.py", "check.sh", "container.reasons", "command-line", "sysctl.defaults"),
        },
        command=["sh", "/in/src/check.sh"],
        build_only=["checker.tar.gz", "config", "sysctl"],
    )
}
"""Profile → its `hardening-report.json`. A check that fails without a reason fails the build, and the bundle's."""
