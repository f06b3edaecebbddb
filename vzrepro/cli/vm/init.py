"""`vzrepro vm init`."""

from __future__ import annotations

from pathlib import Path

import click

from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine
from vzrepro.guest.metadata import KernelProfile


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--kernel-profile", type=click.Choice([profile.value for profile in KernelProfile]), required=True)
@click.option("--bundle", metavar="BUNDLE|TARGET", help="Take this bundle, not the workspace's own of that profile.")
@click.option("--cpus", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--memory-mib", type=click.IntRange(min=64), default=1024, show_default=True, metavar="N")
@click.option(
    "--disk-mib", type=click.IntRange(min=0), default=8192, show_default=True, metavar="N", help="Sparse; 0: no disk."
)
@click.option("--mount", "mounts", multiple=True, metavar="SRC:DST[:ro]", help="Show the guest a directory.")
@click.option("--force", is_flag=True, help="Replace kernel and configuration of what is there; the disk stays.")
@json_option
@click.pass_obj
def init(
    session: Session,
    directory: Path,
    kernel_profile: str,
    bundle: str | None,
    cpus: int,
    memory_mib: int,
    disk_mib: int,
    mounts: tuple[str, ...],
    force: bool,
) -> None:
    """Make DIR a VM's directory. It gets a bundle, its configuration (vm.toml) and a disk.

    Then: vzrepro vm boot DIR, vzrepro vm exec DIR -- CMD.
    """
    from vzrepro.base.errors import UsageError
    from vzrepro.guest import metadata
    from vzrepro.guest.vm import directory as directories
    from vzrepro.guest.vm.spec import Mount

    settings = directories.Settings(cpus, memory_mib, disk_mib, tuple(map(Mount.parse, mounts)))
    [folder] = machine.bundles(session, [bundle or f"{kernel_profile}-bundle"])
    found = metadata.read(folder).kind
    if found != kernel_profile:
        raise UsageError(f"{folder} is a bundle of the {found} profile, not of {kernel_profile}")
    directories.create(directory, folder, settings, force=force)
    document = {"directory": str(directory.absolute()), "profile": kernel_profile}
    session.console.print_text(str(directory.absolute()), document)
