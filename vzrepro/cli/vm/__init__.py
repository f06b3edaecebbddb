"""`vzrepro vm …`: boot what was built, and use it. One module per verb."""

from __future__ import annotations

import click

from vzrepro.cli.verbs import Verbs
from vzrepro.cli.vm import bench, boot, init, probe
from vzrepro.cli.vm import exec as exec_


@click.group(cls=Verbs)
def vm() -> None:
    """Boot bundles under QEMU, and use them."""


vm.add_command(bench.bench)
vm.add_command(boot.boot)
vm.add_command(exec_.execute)
vm.add_command(init.init)
vm.add_command(probe.probe)
