"""`vzrepro oci …`: containers, each in a guest of its own."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import platformdirs

from vzrepro.base.errors import UsageError
from vzrepro.base.events import Notice
from vzrepro.base.words import duration
from vzrepro.cli.options import host_loopback_option, json_option, variables
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs

if TYPE_CHECKING:
    from vzrepro.guest.vm.containers import ListedContainer
    from vzrepro.guest.vm.oci import Machine, Wish

F = TypeVar("F", bound=Callable[..., Any])


@click.group(cls=Verbs)
def oci() -> None:
    """Run containers, each in a guest of its own.

    IMAGE is a root file system directory, an OCI layout (a directory or tar archive), or what `docker save` writes.
    """


def _kernel_profile(text: str) -> Callable[[F], F]:
    return click.option("--kernel-profile", type=click.Choice(["container", "developer"]), help=text)


def _options(function: F) -> F:
    """What `run` and `create` take besides their arguments."""
    for option in reversed(
        [
            _kernel_profile("Boot this profile's bundle, realized if need be; container is the default."),
            click.option("--bundle-dir", metavar="DIR", help="Boot the bundle in this directory."),
            click.option("--tag", metavar="NAME", help="Which image, when there are several in one layout or archive."),
            _env,
            _user,
            _workdir,
            click.option("--mount", "mounts", multiple=True, metavar="SRC:DST[:ro]", help="Show it a directory."),
            click.option(
                "--volume",
                "volumes",
                multiple=True,
                metavar="NAME:DST[:ro]",
                help="Show it the directory of that name, which outlives it.",
            ),
            click.option(
                "--publish",
                multiple=True,
                metavar="HOST:GUEST[/udp]",
                help="Offer its port on the host's 127.0.0.1; HOST 0 is any free one.",
            ),
            host_loopback_option,
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
_of_profile = _kernel_profile("Refuse a container whose guest has another profile's kernel.")


@oci.command()
@_image
@_command
@_options
@click.pass_obj
def run(session: Session, /, image: Path, command: tuple[str, ...], **options: Any) -> int:
    """Run a container as if it were a command here. The exit code is its own.

    With a terminal on both ends it has one too. Ctrl-C goes to the container; the second one ends its guest.
    """
    from vzrepro.guest.vm import containers  # gRPC takes a while to load
    from vzrepro.guest.vm import oci as guests

    terminal = _terminal()
    wish = _wish(image, command, terminal, **options)
    machine = _machine(session, **options)
    session.console.close()
    with containers.run_directory() as directory:
        return guests.run(
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
    """Boot a guest that stays, and create a container in it. `start` has it run."""
    from vzrepro.guest.vm import containers, supervisor

    containers.check_free(container_id)
    wish = _wish(image, command, False, **options)
    supervisor.create(container_id, wish, _machine(session, **options))
    session.console.print_text(container_id)


@oci.command()
@_id
@_of_profile
def start(container_id: str, kernel_profile: str | None) -> None:
    """Have a created container run its process."""
    from vzrepro.guest.vm import containers

    containers.start(container_id, kernel_profile)


@oci.command("exec")
@_id
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD…")
@_env
@_user
@_workdir
@_of_profile
def execute(
    container_id: str,
    command: tuple[str, ...],
    env: tuple[str, ...],
    user: str | None,
    workdir: str | None,
    kernel_profile: str | None,
) -> int:
    """Run a command in a running container as if it were one here. The exit code is its own."""
    from vzrepro.guest.vm import containers, spec
    from vzrepro.guest.vm import oci as guests

    terminal = _terminal()
    with containers.connected(container_id, kernel_profile) as (state, agent):
        if (status := agent.oci_state(container_id).status) != containers.Status.RUNNING:
            raise containers.not_allowed(container_id, status, "used to run something in it")
        process = spec.process(
            state.image,
            command,
            env=_environment(env, terminal),
            working_dir=workdir,
            user=user,
            terminal=terminal,
            inherited=state.env,
        )
        return guests.execute(
            agent, container_id, process, stdin=sys.stdin.buffer, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer
        )


@oci.command()
@_kernel_profile("Only those whose guests have this profile's kernel.")
@json_option
@click.pass_obj
def ps(session: Session, kernel_profile: str | None) -> None:
    """List the containers that were created, running or not. Those whose guest is gone are listed, too."""
    from vzrepro.guest.vm import containers

    now = time.time()
    found = [one for one in containers.listed() if kernel_profile in (None, one.state and one.state.profile)]
    session.console.print_table(_COLUMNS, [_row(one, now) for one in found], [_document(one) for one in found])


_COLUMNS = ("id", "image", "command", "status", "created", "up", "ports", "profile")
_COMMAND_WIDTH = 40


def _row(one: ListedContainer, now: float) -> tuple[str | None, ...]:
    state = one.state
    if state is None:
        return (one.container_id, None, None, one.status, *[None] * 4)
    command = shlex.join(state.command)
    started = state.started if one.status == "running" else None
    return (
        one.container_id,
        None if state.named is None else Path(state.named).name + (f" ({state.tag})" if state.tag else ""),
        command if len(command) <= _COMMAND_WIDTH else command[: _COMMAND_WIDTH - 1] + "…",
        one.status,
        None if state.created is None else f"{duration(now - state.created)} ago",
        None if started is None else duration(now - started),
        ", ".join(f"127.0.0.1:{port.host_port}->{port.guest_port}/{port.protocol}" for port in state.ports) or None,
        state.profile,
    )


def _document(one: ListedContainer) -> dict[str, object]:
    state = one.state
    return {
        "id": one.container_id,
        "image": state and state.named,
        "tag": state and state.tag,
        "command": state and list(state.command),
        "status": one.status,
        "created": None if state is None else _rfc3339(state.created),
        "started": None if state is None else _rfc3339(state.started),
        "ports": state and [asdict(port) for port in state.ports],
        "profile": state and state.profile,
        "pid": state and state.pid,
    }


def _rfc3339(secs: float | None) -> str | None:
    if secs is None:
        return None
    return datetime.fromtimestamp(secs, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@oci.command()
@_id
@click.option("-f", "--follow", is_flag=True, help="Go on with what it still prints, to its end.")
@_of_profile
@click.pass_obj
def logs(session: Session, container_id: str, follow: bool, kernel_profile: str | None) -> int:
    """Print what a created container printed, as it came. That is both streams, whether it still runs or not.

    What is kept is bounded; the oldest goes first. With --follow the exit code is 1 when the end was lost.
    """
    from vzrepro.guest.vm import attach, containers

    output = containers.output(container_id, follow=follow, profile=kernel_profile)
    session.console.close()
    try:
        for data in output:
            attach.write(sys.stdout.buffer, data)
    except BrokenPipeError:
        return attach.BROKEN_PIPE_CODE
    if (trouble := containers.shortfall(container_id)) is not None:
        if follow:
            raise trouble
        session.console.report(Notice("warning", trouble.message))
    return 0


@oci.command()
@_id
@_of_profile
@click.pass_obj
def state(session: Session, container_id: str, kernel_profile: str | None) -> None:
    """Print a container's state, as the OCI runtime specification has it."""
    import json

    from vzrepro.guest.vm import containers, spec

    known = containers.load(container_id, kernel_profile)
    document: dict[str, object] = {"ociVersion": spec.OCI_VERSION, "id": container_id}
    if containers.alive(container_id):
        with containers.connected(container_id) as (_, agent):
            found = agent.oci_state(container_id)
        document |= {"status": found.status, **({"pid": found.pid} if found.pid else {}), "bundle": found.bundle_path}
    else:
        document |= {"status": containers.Status.STOPPED, "bundle": known.bundle}
    session.console.print_text(json.dumps(document, indent=2), document)


@oci.command()
@_id
@click.argument("signal", required=False)
@_of_profile
def kill(container_id: str, signal: str | None, kernel_profile: str | None) -> None:
    """Send a container a signal, by name or number. The default is the image's stop signal, SIGTERM for most."""
    from vzrepro.guest.vm import containers

    containers.kill(container_id, signal, kernel_profile)


@oci.command()
@_id
@click.option(
    "--time",
    "patience",
    type=click.FloatRange(min=0, max=1_000_000),
    default=10.0,
    show_default=True,
    metavar="SECS",
    help="How long it may take before it is killed.",
)
@_of_profile
@click.pass_obj
def stop(session: Session, container_id: str, patience: float, kernel_profile: str | None) -> None:
    """End a container's process. It gets the image's stop signal, then SIGKILL if that does not do. Its guest stays."""
    from vzrepro.guest.vm import containers

    if containers.stop(container_id, patience_secs=patience, profile=kernel_profile):
        text = f"container {container_id} did not end within {patience:g} s, and was killed"
        session.console.report(Notice("warning", text))


@oci.command()
@_id
@click.option("--force", is_flag=True, help="Even if it runs.")
@_of_profile
def delete(container_id: str, force: bool, kernel_profile: str | None) -> None:
    """Remove a container that does not run, and its guest. What is left of one whose guest died goes, too."""
    from vzrepro.guest.vm import containers

    containers.delete(container_id, force=force, profile=kernel_profile)


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
    volumes: tuple[str, ...],
    publish: tuple[str, ...],
    host_loopback: bool,
    memory_mib: int,
    cpus: float,
    pids_limit: int,
    **_others: Any,
) -> Wish:
    from vzrepro.guest.vm.oci import Publish, Wish
    from vzrepro.guest.vm.spec import ContainerLimits, Mount, Volume, check_targets

    shown = [Mount.parse(text) for text in mounts], [Volume.parse(text) for text in volumes]
    check_targets([*shown[0], *shown[1]])
    return Wish(
        image=image.absolute(),
        tag=tag,
        command=command,
        env=_environment(env, terminal),
        working_dir=workdir,
        user=user,
        mounts=tuple(shown[0]),
        volumes=tuple(shown[1]),
        publish=tuple(Publish.parse(text) for text in publish),
        limits=ContainerLimits(memory_mib, cpus, pids_limit),
        host_loopback=host_loopback,
    )


def _machine(
    session: Session, *, kernel_profile: str | None, bundle_dir: str | None, timeout_secs: float, **_others: Any
) -> Machine:
    from vzrepro.cli.vm import machine
    from vzrepro.guest import metadata
    from vzrepro.guest.vm.oci import RUNNER, Machine

    bundle = f"{kernel_profile or 'container'}-bundle" if bundle_dir is None else bundle_dir
    [folder, runner], programs = machine.prepare(session, [bundle, RUNNER], shares=True)
    # A directory with a kernel and no version.json can be booted as well.
    found = metadata.read(folder).profile if (folder / metadata.VERSION_FILE).exists() else None
    if kernel_profile not in (None, found):
        raise UsageError(f"{folder} is a bundle of the {found or 'unknown'} profile, not of {kernel_profile}")
    return Machine(
        bundle=folder.absolute(),
        programs=programs,
        runner=runner.absolute(),
        cache=Path(platformdirs.user_cache_dir("vzrepro"), "oci"),
        profile=found,
        timeout_secs=timeout_secs,
    )
