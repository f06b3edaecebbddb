"""`vzrepro vm exec`."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from vzrepro.cli.options import complete_targets, host_loopback_option, variables
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("exec", context_settings={"ignore_unknown_options": False})
@click.argument("bundle", metavar="BUNDLE|TARGET|DIR", shell_complete=complete_targets)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD…")
@click.option("--cpus", type=click.IntRange(min=1), help="Processors of the guest.")
@click.option("--memory-mib", type=click.IntRange(min=64), metavar="N", help="Memory of the guest.")
@click.option("--mount", "mounts", multiple=True, metavar="SRC:DST[:ro]", help="Show the guest a directory.")
@click.option("--env", "env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; without a value, ours.")
@click.option("--user", default="", help="The guest's user to run as, by name or number; root by default.")
@click.option("--workdir", default="", metavar="PATH", help="The directory to start in.")
@click.option("--rootfs-dir", type=_DIRECTORY, help="The guest's root, shared and overlaid; it does not change.")
@host_loopback_option
@click.option(
    "--timeout-secs",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="How long the guest may take to boot.",
)
@click.pass_obj
def execute(
    session: Session,
    bundle: str,
    command: tuple[str, ...],
    cpus: int | None,
    memory_mib: int | None,
    mounts: tuple[str, ...],
    env: tuple[str, ...],
    user: str,
    workdir: str,
    rootfs_dir: Path | None,
    host_loopback: bool,
    timeout_secs: float,
) -> int:
    """Boot a guest, run a command in it as if it were here, power off. The exit code is the command's.

    With a terminal on both ends the command has one too. Ctrl-C goes to the command; the second one ends the guest.
    """
    from vzrepro.guest.vm import attach, boot, directory, qemu  # gRPC takes a while to load
    from vzrepro.guest.vm.spec import Mount

    parsed = [Mount.parse(text) for text in mounts]
    settings = variables(env)
    [folder], programs = machine.prepare(session, [bundle], shares=bool(parsed or rootfs_dir))
    guest = directory.with_mounts(machine.guest(folder), parsed)
    if rootfs_dir is not None:
        guest = replace(guest, shares=(*guest.shares, qemu.Share("rootfs", rootfs_dir, read_only=True)))
    guest = replace(
        guest,
        cpus=cpus or guest.cpus,
        memory_mib=memory_mib or guest.memory_mib,
        host_loopback=host_loopback,
    )
    session.console.close()
    pty = sys.stdin.isatty() and sys.stdout.isatty()
    if pty:
        settings = {"TERM": os.environ.get("TERM", "linux"), **settings}
    with boot.running(guest, programs=programs, timeout_secs=timeout_secs) as vm:
        code = attach.run(
            vm.agent,
            command[0],
            command[1:],
            env=settings,
            working_dir=workdir,
            user=user,
            pty=pty,
            stdin=sys.stdin.buffer,
            stdout=sys.stdout.buffer,
            stderr=sys.stderr.buffer,
        )
        vm.power_off()
    return code
