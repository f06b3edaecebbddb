"""`vzrepro oci …`: containers, each in a guest of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import platformdirs

from vzrepro.cli.options import variables
from vzrepro.cli.session import Session
from vzrepro.errors import VzreproError

if TYPE_CHECKING:
    from vzrepro.vm.oci import Machine, Wish

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def oci() -> None:
    """Run containers, each in a guest of its own.

    IMAGE is a root file system directory, an OCI layout (a directory or tar archive), or what `docker save` writes.
    """


def _options(function: F) -> F:
    """What `run` and `create` take besides their arguments."""
    for option in reversed(
        [
            click.option(
                "--kernel-profile",
                type=click.Choice(["container", "developer"]),
                default="container",
                show_default=True,
                help="Boot this profile's bundle, realized if need be.",
            ),
            click.option("--bundle-dir", metavar="DIR", help="Boot the bundle in this directory."),
            click.option("--tag", metavar="NAME", help="Which image, when there are several in one layout or archive."),
            _env,
            _user,
            _workdir,
            click.option("--mount", "mounts", multiple=True, metavar="SRC:DST[:ro]", help="Show it a directory."),
            click.option(
                "--publish",
                multiple=True,
                metavar="HOST:GUEST[/udp]",
                help="Offer its port on the host's 127.0.0.1; HOST 0 is any free one.",
            ),
            click.option(
                "--memory-mib",
                type=click.IntRange(min=8),
                default=512,
                show_default=True,
                help="Its memory, what it writes to its root included.",
            ),
            click.option(
                "--cpus",
                type=click.FloatRange(min=0.01, max=256),
                default=1.0,
                show_default=True,
                help="Its processors; fractions are fine.",
            ),
            click.option(
                "--pids-limit", type=click.IntRange(min=1), default=1024, show_default=True, help="Its threads at once."
            ),
            click.option(
                "--timeout-secs",
                type=click.FloatRange(min=0, min_open=True),
                default=120.0,
                show_default=True,
                help="How long the guest may take to boot.",
            ),
        ]
    ):
        function = option(function)
    return function


_env = click.option("--env", multiple=True, metavar="NAME[=VALUE]", help="Set a variable; without a value, ours.")
_user = click.option("--user", metavar="USER[:GROUP]", help="Who to run as, by the image's names or by number.")
_workdir = click.option("--workdir", metavar="PATH", help="The directory to start in.")
_command = click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD…]")
_image = click.argument("image", metavar="IMAGE", type=click.Path(path_type=Path))
_id = click.argument("container_id", metavar="ID")


@oci.command()
@_image
@_command
@_options
@click.pass_obj
def run(session: Session, /, image: Path, command: tuple[str, ...], **options: Any) -> int:
    """Run a container as if it were a command here; the exit code is its own.

    With a terminal on both ends it has one too. Ctrl-C goes to the container; the second one ends its guest.
    """
    from vzrepro.vm import oci as containers  # gRPC takes a while to load
    from vzrepro.vm import supervisor

    terminal = _terminal()
    wish = _wish(image, command, terminal, **options)
    machine = _machine(session, **options)
    session.console.close()
    with supervisor.run_directory() as directory:
        return containers.run(
            directory.name.removeprefix("."),
            wish,
            machine,
            directory,
            terminal=terminal,
            stdin=sys.stdin.buffer,
            stdout=sys.stdout.buffer,
            stderr=sys.stderr.buffer,
        )


@oci.command()
@_id
@_image
@_command
@_options
@click.pass_obj
def create(session: Session, /, container_id: str, image: Path, command: tuple[str, ...], **options: Any) -> None:
    """Boot a guest that stays, and create a container in it; `start` has it run."""
    from vzrepro.vm import supervisor

    supervisor.check_free(container_id)
    wish = _wish(image, command, False, **options)
    supervisor.create(container_id, wish, _machine(session, **options))
    session.console.print_text(container_id)


@oci.command()
@_id
def start(container_id: str) -> None:
    """Have a created container run its process."""
    from vzrepro.vm import supervisor

    with supervisor.connected(container_id) as agent:
        agent.oci_start(container_id)


@oci.command("exec")
@_id
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD…")
@_env
@_user
@_workdir
def execute(
    container_id: str, command: tuple[str, ...], env: tuple[str, ...], user: str | None, workdir: str | None
) -> int:
    """Run a command in a running container as if it were a command here; the exit code is its own."""
    from vzrepro.vm import oci as containers
    from vzrepro.vm import spec, supervisor

    terminal = _terminal()
    with supervisor.connected(container_id) as agent:
        state = supervisor.load(container_id)
        if (status := agent.oci_state(container_id).status) != "running":
            raise VzreproError(
                f"container {container_id} is {status}, so nothing can be run in it",
                hint=f"start it first: vzrepro oci start {container_id}" if status == "created" else None,
            )
        process = spec.process(
            state.image,
            command,
            env=_environment(env, terminal),
            working_dir=workdir,
            user=user,
            terminal=terminal,
            inherited=state.env,
        )
        return containers.execute(
            agent, container_id, process, stdin=sys.stdin.buffer, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer
        )


@oci.command()
@_id
@click.pass_obj
def state(session: Session, container_id: str) -> None:
    """Print a container's state, as the OCI runtime specification has it."""
    import json

    from vzrepro.vm import spec, supervisor

    known = supervisor.load(container_id)
    document: dict[str, object] = {"ociVersion": spec.OCI_VERSION, "id": container_id}
    if supervisor.alive(container_id):
        with supervisor.connected(container_id) as agent:
            found = agent.oci_state(container_id)
        document |= {"status": found.status, **({"pid": found.pid} if found.pid else {}), "bundle": found.bundle_path}
    else:
        document |= {"status": supervisor.STOPPED, "bundle": known.bundle}
    session.console.print_text(json.dumps(document, indent=2), document)


@oci.command()
@_id
@click.argument("signal", required=False)
def kill(container_id: str, signal: str | None) -> None:
    """Send a container a signal, by name or number; by default the image's stop signal, SIGTERM for most."""
    from vzrepro.vm import supervisor

    with supervisor.connected(container_id) as agent:
        agent.oci_kill(container_id, signal or supervisor.load(container_id).config.stop_signal)


@oci.command()
@_id
@click.option("--force", is_flag=True, help="Even if it runs.")
def delete(container_id: str, force: bool) -> None:
    """Remove a container that does not run, and its guest; or what is left of one whose guest died."""
    from vzrepro.vm import supervisor

    supervisor.delete(container_id, force=force)


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _environment(words: tuple[str, ...], terminal: bool) -> dict[str, str]:
    return {**({"TERM": os.environ.get("TERM", "xterm")} if terminal else {}), **variables(words)}


def _wish(
    image: Path,
    command: tuple[str, ...],
    terminal: bool,
    *,
    tag: str | None,
    env: tuple[str, ...],
    user: str | None,
    workdir: str | None,
    mounts: tuple[str, ...],
    publish: tuple[str, ...],
    memory_mib: int,
    cpus: float,
    pids_limit: int,
    **_others: Any,
) -> Wish:
    from vzrepro.vm.oci import Publish, Wish
    from vzrepro.vm.spec import Limits, Mount

    return Wish(
        image=image.absolute(),
        tag=tag,
        command=command,
        env=_environment(env, terminal),
        working_dir=workdir,
        user=user,
        mounts=tuple(Mount.parse(text) for text in mounts),
        publish=tuple(Publish.parse(text) for text in publish),
        limits=Limits(memory_mib, cpus, pids_limit),
    )


def _machine(
    session: Session, *, kernel_profile: str, bundle_dir: str | None, timeout_secs: float, **_others: Any
) -> Machine:
    from vzrepro.cli.vm import machine
    from vzrepro.vm.oci import RUNNER, Machine

    bundle = f"{kernel_profile}-bundle" if bundle_dir is None else bundle_dir
    [folder, runner], programs = machine.prepare(session, [bundle, RUNNER], shares=True)
    return Machine(
        bundle=folder.absolute(),
        programs=programs,
        runner=runner.absolute(),
        cache=Path(platformdirs.user_cache_dir("vzrepro"), "oci"),
        timeout_secs=timeout_secs,
    )
