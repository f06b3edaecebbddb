"""`vzrepro vm …`: boot what was built."""

from __future__ import annotations

from pathlib import Path

import click

from vzrepro import console
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session

DEVICE = "vhost-device-vsock"
"""The target that is the host's end of the guest's vsock."""


@click.group()
def vm() -> None:
    """Boot bundles under QEMU."""


@vm.command()
@click.argument("bundle", metavar="BUNDLE|TARGET")
@click.option("--timeout-secs", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@json_option
@click.pass_obj
def boot(session: Session, bundle: str, timeout_secs: float) -> None:
    """Boot a bundle, wait for its agent, call Ping and SystemInfo, show the phases, power off."""
    from vzrepro.vm.boot import boot as boot_bundle  # gRPC takes a while to load, and only this verb needs it

    names = [DEVICE] if (Path(bundle) / "vmlinux").is_file() else [DEVICE, bundle]
    nodes = [session.target(name) for name in names]
    found = [session.store.location(info.path) for info in session.realizer().realize(nodes)]
    folder = found[1] if len(found) > 1 else Path(bundle)
    report = boot_bundle(
        folder,
        vhost_device_vsock=found[0] / DEVICE,
        timeout_secs=timeout_secs,
        report=session.console.report,
    )
    document = report.document()
    lines = [f"{phase.name + ':':28}{console.duration(phase.secs)}" for phase in report.phases]
    lines += [f"{name + ':':28}{value}" for name, value in document["system"].items()]
    session.console.print_text("\n".join(lines), document)
