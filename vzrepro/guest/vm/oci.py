"""Runs a container in a guest of its own: an image's root directory shared with it, an overlay over that, youki.

In the guest a container is the directory /run/vz/containers/<id>: its config.json, the overlay's upper layer (a tmpfs:
what the container writes goes with the guest, and the image never changes) and the files that it sees in its /etc.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.vm import attach, boot, logs, qemu, spec, volumes
from vzrepro.guest.vm.agent import AgentClient
from vzrepro.guest.vm.rootfs import Image, image_root
from vzrepro.guest.vm.spec import ContainerLimits, Mount, Process, Volume

RUNNER = "vz-oci-run"
"""The program, and the target that makes it, which runs containers in the guest's foreground."""

GUEST_MEMORY_MIB = 256
"""What a guest has besides the memory of its container: for the kernel, the agent, youki and the page cache."""

_TOOLS = "/run/vz-oci/bin"
_STATE = "/run/youki"
_OUTPUT = "/run/vz/oci/{}/log"  # where the agent keeps what a container prints
_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,31}")
_LEASE_SECS = 10
_SETUP_SECS = 60.0

# $1 is the container's directory, $2 its id, $3 how many seconds to wait for the network, $4 the working directory that
# no layer made ("" if there is one); $CONFIG its config.json. A network that does not come is no reason not to run.
# /etc/resolv.conf is the guest's own file: a later lease is seen.
_SETUP = """
set -eu
umask 022
grep -q ' /mnt/vz-mount-0 virtiofs ' /proc/mounts || { echo "the image's share is not mounted" >&2; exit 1; }
mkdir -p "$1/rootfs" "$1/upper" "$1/work"
mount -t overlay -o "lowerdir=/mnt/vz-mount-0,upperdir=$1/upper,workdir=$1/work" overlay "$1/rootfs"
mkdir -p "$1/rootfs/$4"
printf %s "$CONFIG" > "$1/config.json"
printf '127.0.0.1\\tlocalhost %s\\n::1\\tlocalhost\\n' "$2" > "$1/hosts"
echo "$2" > "$1/hostname"
tenths=0
until [ -s /etc/resolv.conf ] || [ $tenths = $(($3 * 10)) ]; do sleep 0.1; tenths=$((tenths + 1)); done
[ -e /etc/resolv.conf ] || : > /etc/resolv.conf
ln -s /etc/resolv.conf "$1/resolv.conf"
"""


@dataclass(frozen=True, slots=True)
class Publish:
    """A port of the guest that the host's 127.0.0.1 offers as well; the host's is any free one when it is 0."""

    host_port: int
    guest_port: int
    protocol: Literal["tcp", "udp"] = "tcp"

    @classmethod
    def parse(cls, text: str) -> Publish:
        """`HOST:GUEST[/udp]`. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?", text)
        if found is None or int(found[1]) > 0xFFFF or not 0 < int(found[2]) <= 0xFFFF:
            raise UsageError(f"{text!r} is no pair of ports", hint="for instance: --publish 8080:80, or 5353:53/udp")
        return cls(int(found[1]), int(found[2]), "udp" if found[3] == "udp" else "tcp")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user wants to be run: an image (`tag` when it holds several), and how. None leaves it to the image."""

    image: Path
    tag: str | None = None
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None
    user: str | None = None
    mounts: tuple[Mount, ...] = ()
    volumes: tuple[Volume, ...] = ()
    publish: tuple[Publish, ...] = ()
    limits: ContainerLimits = field(default_factory=ContainerLimits)
    host_loopback: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What it is run with: a bundle's directory, the programs that serve a guest, the directory of the program
    `RUNNER`, the cache of unpacked images, the profile of the bundle if it says so, and how long the guest's agent may
    take."""

    bundle: Path
    programs: boot.HostPrograms
    runner: Path
    cache: Path
    profile: str | None = None
    timeout_secs: float = 120.0


@dataclass(frozen=True, slots=True)
class Container:
    """A container whose bundle lies ready in `vm`, at the guest's directory `directory`."""

    container_id: str
    vm: boot.Vm
    image: Image
    process: Process
    directory: str


def check_id(text: str) -> str:
    """`text`, if it can be a container's id. Raises UsageError."""
    if not _ID.fullmatch(text):
        raise UsageError(
            f"{text!r} cannot be the id of a container",
            reason="an id is 1 to 32 letters, digits, `.`, `_` and `-`, the first a letter or digit",
        )
    return text


@contextlib.contextmanager
def prepared(
    container_id: str,
    wish: Wish,
    machine: Machine,
    directory: Path,
    *,
    terminal: bool = False,
    on_console: Callable[[str], object] = lambda _line: None,
) -> Iterator[Container]:
    """A guest with the container's bundle in it, ready to be created; the guest ends with the context.

    `directory` is a directory of ours for the guest's sockets and programs. What can be known to fail is found out
    before the guest is booted. Raises as `image_root`, `spec.process`, `spec.check_program` and `boot.running` do.
    """
    with image_root(wish.image, cache=machine.cache, tag=wish.tag) as image:
        process = spec.process(
            image, wish.command, env=wish.env, working_dir=wish.working_dir, user=wish.user, terminal=terminal
        )
        spec.check_program(image, process, [*wish.mounts, *wish.volumes])
        spec.check_signal(image.config.stop_signal)
        for port in wish.publish:
            _check_free(port)
        mounts = [*wish.mounts, *(volumes.mount(volume, image, process.user) for volume in wish.volumes)]
        place = f"/run/vz/containers/{container_id}"
        shared = [(f"/mnt/vz-mount-{number}", mount) for number, mount in enumerate(mounts, 1)]
        runner = f"{_TOOLS}/{RUNNER}"
        # The developer kernel is without MEMCG, as existing hosts' is (docs/kernel.md).
        memcg = machine.profile != "developer"
        config = spec.document(container_id, image.root, process, shared, wish.limits, place, runner, memcg=memcg)
        missing = spec.missing_directory(image.root, process, mounts)
        guest = _guest(wish, machine, image, mounts, _tools(machine, directory))
        with boot.running(
            guest,
            programs=machine.programs,
            timeout_secs=machine.timeout_secs,
            on_console=on_console,
            directory=directory,
        ) as vm:
            _set_up(vm.agent, place, container_id, config, missing or "")
            yield Container(container_id, vm, image, process, place)


def run(
    container_id: str,
    wish: Wish,
    machine: Machine,
    directory: Path,
    *,
    terminal: bool,
    stdin: BinaryIO | None,
    stdout: BinaryIO,
    stderr: BinaryIO,
) -> int:
    """Run a container to its end as if it were a command here; its exit code (125: the runtime failed)."""
    with (
        prepared(container_id, wish, machine, directory, terminal=terminal) as container,
        contextlib.ExitStack() as stack,
    ):
        agent = container.vm.agent
        stack.enter_context(published(agent, wish))
        words = ["run", *(["--terminal"] if terminal else []), container.directory, container_id]
        return attach.run(
            agent, f"{_TOOLS}/{RUNNER}", [*_RUNNER, *words], pty=terminal, stdin=stdin, stdout=stdout, stderr=stderr
        )


def execute(
    agent: AgentClient,
    container_id: str,
    process: Process,
    *,
    stdin: BinaryIO | None,
    stdout: BinaryIO,
    stderr: BinaryIO,
) -> int:
    """Run a process in a running container to its end as if it were a command here; its exit code."""
    return attach.run(
        agent,
        f"{_TOOLS}/{RUNNER}",
        [*_RUNNER, "exec", *(["--terminal"] if process.terminal else []), container_id],
        env={"VZ_OCI_PROCESS": json.dumps(spec.process_document(process))},
        pty=process.terminal,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


_RUNNER = ["--youki", f"{_TOOLS}/youki", "--state", _STATE]


def follow(agent: AgentClient, container_id: str, output: logs.OutputLog) -> None:
    """Give `output` what a container that the agent created prints, from where that ended before, until it prints no
    more. Raises AgentError, VzreproError."""
    place = [] if output.place is None else [str(output.place.inode), str(output.place.offset)]
    words = ["follow", _OUTPUT.format(container_id), *place]
    with agent.exec(f"{_TOOLS}/{RUNNER}", words) as events:
        ended = events.finish(output.take)
    if ended.code != 0:
        raise VzreproError("what the container prints cannot be had from the guest", reason=ended.text)


def has_ended(agent: AgentClient, pid: int, patience_secs: float) -> bool:
    """Whether the guest's process `pid` is gone, or goes within that many seconds. Raises AgentError, VzreproError."""
    with agent.exec(f"{_TOOLS}/{RUNNER}", ["wait", str(pid), str(round(patience_secs * 1000))]) as events:
        ended = events.finish()
    if ended.code not in (0, 1):
        raise VzreproError("the container's end cannot be awaited in the guest", reason=ended.text)
    return ended.code == 0


@contextlib.contextmanager
def published(agent: AgentClient, wish: Wish) -> Iterator[tuple[Publish, ...]]:
    """The wish's ports on the host's 127.0.0.1, as long as the context lasts; the host's ports as they came out."""
    with contextlib.ExitStack() as stack:
        yield tuple(replace(port, host_port=stack.enter_context(_one_published(agent, port))) for port in wish.publish)


def _one_published(agent: AgentClient, port: Publish) -> contextlib.AbstractContextManager[int]:
    return attach.publish(agent, port.host_port, port.guest_port, protocol=port.protocol)


def _check_free(port: Publish) -> None:
    """Find out early whether the host's port can be had; whoever takes it meanwhile is found out about later."""
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if port.protocol == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port.host_port))
        except OSError as error:
            raise VzreproError(
                f"{port.protocol} port {port.host_port} of 127.0.0.1 cannot be published",
                reason=error.strerror or str(error),
                hint=f"choose another port of the host: --publish PORT:{port.guest_port}",
            ) from error


def _tools(machine: Machine, directory: Path) -> Path:
    """The directory that the guest gets as `oci-runtime-bin`. Copies: a link would lead out of the share."""
    tools = directory / "bin"
    tools.mkdir()
    for source in (machine.bundle / "youki", machine.runner / RUNNER):
        try:
            shutil.copy(source, tools)
        except FileNotFoundError as error:
            raise UsageError(
                f"{source} does not exist", hint="containers need a whole bundle: vzrepro realize container-bundle"
            ) from error
        (tools / source.name).chmod(0o755)
    return tools


def _guest(wish: Wish, machine: Machine, image: Image, mounts: Sequence[Mount], tools: Path) -> qemu.Guest:
    return replace(
        boot.of_bundle(machine.bundle),
        cpus=max(1, math.ceil(wish.limits.cpus)),
        memory_mib=wish.limits.memory_mib + GUEST_MEMORY_MIB,
        host_loopback=wish.host_loopback,
        shares=(
            qemu.Share("oci-runtime-bin", tools, read_only=True),
            qemu.Share("vz-mount-0", image.root, read_only=True),
            *(
                qemu.Share(f"vz-mount-{number}", mount.source, mount.read_only)
                for number, mount in enumerate(mounts, 1)
            ),
        ),
    )


def _set_up(
    agent: AgentClient, place: str, container_id: str, config: Mapping[str, object], missing_directory: str
) -> None:
    words = ["-c", _SETUP, "sh", place, container_id, str(_LEASE_SECS), missing_directory]
    with agent.exec("/bin/sh", words, env={"CONFIG": json.dumps(config)}, timeout_secs=_SETUP_SECS) as events:
        ended = events.finish()
    if ended.code != 0:
        what = "the container's root file system could not be put together in the guest"
        raise VzreproError(what, reason=ended.text)
