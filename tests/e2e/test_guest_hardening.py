"""What the hardening report takes for granted holds in a booted guest: command line, sysctls, what was cut away."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.conftest import Cli
from tests.guests import needs_qemu

pytestmark = needs_qemu

SYSCTLS = ("recipes/hardening/sysctl.defaults", "recipes/initramfs/sysctl.conf")


def test_the_guest_is_what_was_checked(project: Cli, bundle: Path) -> None:
    wanted = [
        line
        for name in SYSCTLS
        for line in (project.root / name).read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    keys = " ".join(line.split()[0] for line in wanted)
    script = f"sysctl {keys}; cat /proc/cmdline; test -e /sys/kernel/slab || echo no slab; sed -n 3p /proc/slabinfo"
    done = project.run("vm", "exec", str(bundle), "--", "/bin/sh", "-c", script)
    lines = done.stdout.splitlines()
    assert sorted(lines[: len(wanted)]) == sorted(wanted)
    command_line, no_slab, first_cache = lines[len(wanted) :]
    assert command_line == (project.root / "recipes/hardening/command-line").read_text(encoding="utf-8").strip()
    assert no_slab == "no slab"
    assert " : tunables" in first_cache


def test_the_report_explains_every_failure(project: Cli) -> None:
    [place] = project.realize("kernel-container-hardening")
    report = json.loads((place / "hardening-report.json").read_text(encoding="utf-8"))
    assert report["hold"] + report["fail"] == report["checked"] > 300
    assert {check["type"] for check in report["checks"]} == {"kconfig", "cmdline", "sysctl"}
    assert all(check["holds"] or check["reason"] for check in report["checks"])
