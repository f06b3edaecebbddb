"""`vzrepro vm boot`."""

from __future__ import annotations

import click

from vzrepro.base import words
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine


@click.command()
@click.argument("bundle", metavar="BUNDLE|TARGET|DIR", shell_complete=complete_targets)
@click.option("--timeout-secs", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@json_option
@click.pass_obj
def boot(session: Session, bundle: str, timeout_secs: float) -> None:
    """Boot a bundle or a VM's directory, and show the boot's phases. Waits for its agent, calls Ping and SystemInfo,
    powers off."""
    from vzrepro.guest.vm import boot as boots  # gRPC takes a while to load, and only verbs that boot need it

    [folder], programs = machine.prepare(session, [bundle])
    report = boots.boot(
        machine.guest(folder), programs=programs, timeout_secs=timeout_secs, report=session.console.report
    )
    document = report.document()
    lines = [f"{phase.name + ':':28}{words.duration(phase.secs)}" for phase in report.phases]
    lines += [f"{name + ':':28}{value}" for name, value in document["system"].items()]
    session.console.print_text("\n".join(lines), document)
