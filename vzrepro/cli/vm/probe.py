"""`vzrepro vm probe`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vzrepro.base.errors import VzreproError
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine

_TOOLS = "probes"
_COLUMNS = ("capability", "declared", "config", "guest", "detail")


@click.command()
@click.argument("bundle", metavar="BUNDLE|TARGET", shell_complete=complete_targets)
@click.option("--timeout-secs", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@json_option
@click.pass_obj
def probe(session: Session, bundle: str, timeout_secs: float) -> int:
    """Prove what a bundle declares in its booted guest. What must not be there is proven to be absent.

    Each capability is shown as version.json declares it, as the kernel's build proved it from its configuration (known
    for targets only), and as the guest showed it. Exit code 1 when something declared failed or something forbidden is
    there.
    """
    from vzrepro.guest.vm import probes  # gRPC takes a while to load

    [folder, tools], programs = machine.prepare(session, [bundle, _TOOLS], shares=True, vsock=True)
    proofs = probes.probe(
        machine.guest(folder).kernel.parent,
        tools,
        config=_proven_from_config(session, bundle),
        programs=programs,
        timeout_secs=timeout_secs,
        report=session.console.report,
    )
    session.console.print_table(
        _COLUMNS,
        [(one.capability, _word(one.declared), _word(one.config), one.verdict, one.detail) for one in proofs],
    )
    return int(any(one.broken for one in proofs))


def _word(known: bool | None) -> str | None:
    return None if known is None else ("yes" if known else "no")


def _proven_from_config(session: Session, bundle: str) -> list[str] | None:
    """What a target's kernel configuration proves, unless that would have to be built to know it."""
    if (Path(bundle) / "vmlinux").is_file():
        return None
    config = session.target(bundle).drv.inputs.get("config")
    if config is None:
        return None
    try:
        [found] = session.realizer().pull([session.graph.nodes[config]])
    except VzreproError:
        return None
    proven: list[str] = json.loads((session.store.location(found.path) / "capabilities.json").read_bytes())
    return proven
