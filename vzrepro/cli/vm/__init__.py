"""`vzrepro vm …`: boot what was built, and use it. One module per verb."""

from __future__ import annotations

import click

from vzrepro.cli.vm import bench, boot


@click.group()
def vm() -> None:
    """Boot bundles under QEMU."""


vm.add_command(bench.bench)
vm.add_command(boot.boot)
