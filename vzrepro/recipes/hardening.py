"""A kernel's hardening, as kernel-hardening-checker sees it: each check that fails has a reason, or the build fails."""

from __future__ import annotations

from vzrepro.recipe.declaring import shared
from vzrepro.recipe.dsl import beside, build, debian_source, files
from vzrepro.recipe.graph import Node
from vzrepro.recipes.images import tools_image
from vzrepro.recipes.shipped import shipped


@shared
def hardening_checker() -> Node:
    """kernel-hardening-checker's source, from Debian's next release: trixie has it in its backports only."""
    return debian_source("kernel-hardening-checker", series="0.6", suite="forky")


def hardening_report(
    name: str,
    *,
    config: Node,
    sysctl: Node,
    reasons: str,
    command_line: str = "command-line",
    defaults: str = "sysctl.defaults",
) -> Node:
    """The artifact `name`: /out/hardening-report.json, the score and each check with its result.

    `config` has the kernel's configuration as `config`, `sysctl` what the system sets as `sysctl.conf`. Beside the
    recipe are `reasons` (lines `TYPE OPTION = WANTED VALUE: why not`), the kernel's command line, and the sysctls that
    the kernel has by itself.
    """
    own = {"container.reasons": reasons, "command-line": command_line, "sysctl.defaults": defaults}
    tree = {inside: beside(file)[file] for inside, file in own.items()}
    return build(
        name,
        image=tools_image(),
        inputs={
            "checker.tar.gz": hardening_checker(),
            "config": config,
            "sysctl": sysctl,
            "src": files("files-hardening", {**tree, **shipped("hardening", "check.py", "check.sh")}),
        },
        command=["sh", "/in/src/check.sh"],
        build_only=["checker.tar.gz", "config", "sysctl"],
    )
