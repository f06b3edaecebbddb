"""What a guest's hardening comes to: its kernel's configuration, command line and sysctls under
kernel-hardening-checker."""

from recipes.initramfs import SYSCTL
from recipes.kernel import CONFIGS
from vzrepro.recipes import hardening_report

HARDENING = {
    "container": hardening_report(
        "kernel-container-hardening",
        config=CONFIGS["container"],
        sysctl=SYSCTL,
        reasons="container.reasons",
    )
}
"""Profile → its `hardening-report.json`. A check that fails without a reason fails the build, and the bundle's."""
