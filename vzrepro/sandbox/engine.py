"""The container engine: its command line, what it is, its images, and containers by name.

Everything goes through the docker command line (`VZREPRO_DOCKER` names another one, such as podman), started with
the `sh` library, which fits commands that are awaited.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import shlex
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vzrepro.base.errors import VzreproError

_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_CONTAINER = re.compile(r"vzrepro-(?P<boot>[0-9a-f]+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")
_UNREACHABLE = re.compile(
    r"cannot connect|connection refused|is the docker daemon running|error during connect", re.IGNORECASE
)
_LOST = re.compile(r"unexpected eof|connection reset|broken pipe|closed network connection|: eof$", re.IGNORECASE)
_REMOVE_SECS = 60.0
_ANSWER_SECS = 120.0
UNLIMITED = threading.TIMEOUT_MAX
_UNREACHABLE_SECS = 5.0
_START_SECS = 2.0


@dataclass(frozen=True, slots=True)
class Runtime:
    """The container engine that would be used: `engine` is docker or podman, sizes are in bytes.

    `runtimes` are the names of its OCI runtimes; podman tells only the default one. `weighs` says whether containers
    can have uneven shares of the processors. `identity` is the same for the same engine, and fit for a file name;
    `kernel` is the release of the kernel that it runs on, empty if it does not tell; `daemonless` says that containers
    are children of the client, as podman's are where it is no remote one.
    """

    command: str
    engine: str
    client_version: str
    server_version: str
    cgroup_version: int
    storage_driver: str
    rootless: bool
    cpus: int
    memory_bytes: int
    default_runtime: str = ""
    runtimes: tuple[str, ...] = ()
    weighs: bool = False
    identity: str = ""
    kernel: str = ""
    daemonless: bool = False


def check() -> Runtime:
    """What the container engine is, asked with one quick call.

    Raises VzreproError, each with its own hint, when the client is missing, the daemon is down, or its socket may
    not be used.
    """
    code, out, err = docker("info", "--format", "{{json .}}", checked=False)
    try:
        info = json.loads(out) if code == 0 else {}
    except (ValueError, RecursionError):
        info = {}
    if not isinstance(info, dict) or ("host" not in info and not info.get("ServerVersion")):
        errors = info.get("ServerErrors") if isinstance(info, dict) else None
        raise trouble("\n".join([err, *map(str, errors if isinstance(errors, list) else [])]).strip())
    try:
        return _described(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VzreproError(
            f"what `{shlex.join([*command_line(), 'info'])}` says is not understood",
            reason=f"{type(error).__name__}: {error}",
            hint="name Docker's or Podman's client: export VZREPRO_DOCKER=…",
        ) from error


def _described(info: Mapping[str, Any]) -> Runtime:
    if "host" in info:  # podman
        host = info["host"]
        version = info["version"]["Version"]
        return Runtime(
            command=shlex.join(command_line()),
            engine="podman",
            client_version=version,
            server_version=version,
            cgroup_version=int(host["cgroupVersion"].removeprefix("v")),
            storage_driver=info["store"]["graphDriverName"],
            rootless=host["security"]["rootless"],
            cpus=host["cpus"],
            memory_bytes=host["memTotal"],
            default_runtime=host.get("ociRuntime", {}).get("name", ""),
            weighs="cpu" in (host.get("cgroupControllers") or []),
            identity=_identity(host.get("hostname"), info["store"].get("graphRoot")),
            kernel=str(host.get("kernel", "")),
            daemonless=not host.get("serviceIsRemote", False),
        )
    return Runtime(
        command=shlex.join(command_line()),
        engine="docker",
        client_version=info.get("ClientInfo", {}).get("Version", ""),
        server_version=info["ServerVersion"],
        cgroup_version=int(info.get("CgroupVersion") or 1),
        storage_driver=info["Driver"],
        rootless=any("rootless" in option for option in info.get("SecurityOptions") or []),
        cpus=info["NCPU"],
        memory_bytes=info["MemTotal"],
        default_runtime=info.get("DefaultRuntime", ""),
        runtimes=tuple(sorted(info.get("Runtimes") or ())),
        weighs=bool(info.get("CPUShares")),
        identity=_identity(info.get("ID"), info.get("Name"), info.get("DockerRootDir")),
        kernel=str(info.get("KernelVersion") or ""),
    )


def _identity(*told: object) -> str:
    # Daemons of one host may have one id, by way of /etc/docker/key.json; one daemon may be had by several addresses.
    return hashlib.sha256(repr([command_line(), selected(), told]).encode()).hexdigest()[:16]


def selected() -> tuple[str | None, ...]:
    """What says which engine is meant."""
    return tuple(os.environ.get(name) for name in ("VZREPRO_DOCKER", "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG"))


def has_image(image_id: str) -> bool:
    """Whether the engine has the image of this id (`sha256:<64 hex>`)."""
    code, out, err = docker("image", "inspect", "--format", "{{.Id}}", image_id, checked=False)
    if code == 0:
        return _bare(out.strip()) == _bare(image_id)
    if lacks_image(err):
        return False
    raise trouble(err)


def lacks_image(complaint: str) -> bool:
    """Whether the engine complains that it has no such image."""
    return re.search(r"no such (image|object)|image not known", complaint, re.IGNORECASE) is not None


@functools.lru_cache(maxsize=64)
def image_file(image_id: str, path: str) -> bytes | None:
    """The content of the file at `path` in the image, links followed; None when there is no such file.

    Asked once per process: an image id stands for its content.
    """
    name = new_name()
    label = f"vzrepro.host={host_name()}"
    docker("create", "--name", name, "--label", label, "--pull", "never", image_id, "true", limit_secs=UNLIMITED)
    try:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            code, _, err = docker("cp", "--follow-link", f"{name}:{path}", str(target), checked=False)
            if code == 0:
                return target.read_bytes() if target.is_file() else None
    finally:
        docker("rm", "--force", "--volumes", name, checked=False)
    if re.search(r"no such (file|container:path)|could not find the file", err, re.IGNORECASE):
        return None
    raise trouble(err)


def load_image(archive: Path, image_id: str) -> None:
    """Make sure the engine has the image `image_id`, loading the docker-archive `archive` if it has not.

    Raises ValueError for something that is no image id, VzreproError when loading fails or gives another image.
    """
    if not _IMAGE_ID.fullmatch(image_id):
        raise ValueError(f"{image_id!r} is not an image id")
    if has_image(image_id):
        return
    _, out, _ = docker("load", "--input", str(archive), limit_secs=UNLIMITED)
    if not has_image(image_id):
        raise VzreproError(
            f"the image in {archive} did not load as {image_id}",
            reason=f"{shlex.join(command_line())} said: {out.strip()}",
            hint="compare the ids with: docker image ls --no-trunc   (Docker's containerd image store names images "
            'differently: turn it off with "features": {"containerd-snapshotter": false} in its daemon.json)',
        )


def sweep() -> list[str]:
    """Remove the containers of builds whose vzrepro died without removing them (kill -9, power loss).

    Only containers of this host (and this pid namespace) are looked at. Returns the names removed.
    """
    _, out, _ = docker("ps", "--all", "--filter", f"label=vzrepro.host={host_name()}", "--format", "{{.Names}}")
    orphans = [name for name in out.split() if _orphaned(name)]
    if orphans:
        docker("rm", "--force", "--volumes", *orphans, checked=False)  # another sweep may be removing the same ones
    return orphans


def command_line() -> list[str]:
    """The container engine's command line, from `VZREPRO_DOCKER`."""
    return shlex.split(os.environ.get("VZREPRO_DOCKER", "")) or ["docker"]


def _command() -> Any:
    # Imported late: it takes a tenth of a second, and most commands never start a container.
    import sh

    program, *arguments = command_line()
    try:
        return sh.Command(program).bake(
            *arguments, _new_session=True, _tty_out=False, _bg=True, _bg_exc=False, _return_cmd=True
        )
    except sh.CommandNotFound as error:
        raise VzreproError(
            "builds need Docker, and no Docker client was found",
            reason=f"{program!r} is not an executable in PATH",
            hint="install it with: sudo apt-get install docker.io   (or use another engine: VZREPRO_DOCKER=podman)",
        ) from error


def start(arguments: list[str], stdin: BinaryIO, stdout: int | BinaryIO, stderr: BinaryIO) -> Any:
    # File objects without a name of their own confuse `sh` (it takes their number for a path); numbers do not.
    out = stdout if isinstance(stdout, int) else stdout.fileno()
    return _command()(*arguments, _in=stdin.fileno(), _out=out, _err=stderr.fileno())


def wait(client: Any) -> int:
    import sh

    try:
        client.wait()
    except (sh.ErrorReturnCode, sh.SignalException) as error:
        return int(error.exit_code)
    return 0


def docker(*arguments: str, checked: bool = True, limit_secs: float | None = None) -> tuple[int, str, str]:
    """Run the client to its end: exit code, stdout, stderr. Raises VzreproError for a failure when `checked`.

    A client that has not ended after `limit_secs` (two minutes) is ended: a daemon may take a request and never answer
    it. `UNLIMITED` is for what takes as long as there are bytes.
    """
    limit_secs = _ANSWER_SECS if limit_secs is None else limit_secs
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        Path(os.devnull).open("rb") as nothing,
    ):
        client = start(list(arguments), nothing, out, err)
        with _ended_after(limit_secs, client) as late:
            code = wait(client)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if late.is_set():
        texts[1] += f"the Docker daemon does not answer: `{arguments[0]}` had not ended after {limit_secs:.0f} s"
    if checked and code != 0:
        raise trouble(texts[1])
    return code, texts[0], texts[1]


@contextmanager
def _ended_after(limit_secs: float, client: Any) -> Iterator[threading.Event]:
    """While this is open, kill the client's processes when its time is over; the event tells that it was so."""
    late = threading.Event()

    def end() -> None:
        late.set()
        with suppress(ProcessLookupError):
            client.kill_group()

    timer = threading.Timer(limit_secs, end)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def trouble(complaint: str) -> VzreproError:
    """The error for what the client complained about."""
    engine = shlex.join(command_line())
    text = re.sub(r"\s*(Run|See) '.* --help'.*", "", complaint).strip() or f"{engine} ended without a message"
    lower = text.lower()
    if "permission denied" in lower and "sock" in lower:
        return VzreproError(
            "Docker may not be used by this user",
            reason=text,
            hint="join its group, then log in again: sudo usermod -aG docker $USER && newgrp docker",
        )
    if "daemon does not answer" in lower:
        return VzreproError(
            "the Docker daemon does not answer",
            reason=text,
            hint="see whether it is busy: docker ps   and in its log; it may have to be started again",
        )
    if unreachable(text):
        start = "start it with: sudo systemctl start docker   (without systemd: sudo service docker start)"
        if elsewhere := next((name for name in ("DOCKER_HOST", "DOCKER_CONTEXT") if os.environ.get(name)), None):
            start = f"{elsewhere} is {os.environ[elsewhere]}; see what this says: {engine} version"
            if "ssh" in lower:
                start += "   (ssh must not ask for a password: use a key and an agent)"
        return VzreproError("the Docker daemon does not answer", reason=text, hint=start)
    if "no such image" in lower or "image not known" in lower:
        return VzreproError(
            "the toolchain image vanished from Docker",
            reason=text,
            hint="run the same command again: the image is then loaded again",
        )
    if "no space left on device" in lower:
        return VzreproError("the disk is full", reason=text, hint=f"free some of Docker's space: {engine} system prune")
    if _LOST.search(text):
        return VzreproError(
            "the connection to the container engine was lost",
            reason=text,
            hint="run the same command again: what was being built there is removed first",
        )
    return VzreproError("the container engine failed", reason=text, hint="look closer with: vzrepro doctor")


def unreachable(complaint: str) -> bool:
    """Whether the client complains that it cannot get at the daemon."""
    return _UNREACHABLE.search(complaint) is not None


def state(name: str) -> dict[str, Any] | None:
    """The container's `State` (ExitCode, OOMKilled, Error, Status), or None when there is no such container."""
    code, out, _ = docker("container", "inspect", "--format", "{{json .State}}", name, checked=False)
    return json.loads(out) if code == 0 else None


def remove(name: str, client: Any | None) -> None:
    """Remove the container and wait for its client, whatever they are doing; KeyboardInterrupt does not stop this.

    A client that is still creating its container cannot be undone by removing (there is nothing yet) nor by killing
    it (the daemon would go on), so removal is repeated until the client has seen it and ended. Without a `client`, the
    start of one was interrupted, and a container may still turn up a moment later.
    """
    began = time.monotonic()
    settled = began if client is not None else began + _START_SECS
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            running = client is not None and client.is_alive()
            left = began + _REMOVE_SECS - time.monotonic()
            code, _, err = docker(
                "rm", "--force", "--volumes", name, checked=False, limit_secs=max(left / 2, _START_SECS)
            )
            gone = code == 0 or re.search(r"no such container|no container with", err, re.IGNORECASE)
            if gone and not running and time.monotonic() >= settled:
                break
            if unreachable(err) and not running and time.monotonic() > began + _UNREACHABLE_SECS:
                raise trouble(err)
            if time.monotonic() > began + _REMOVE_SECS:
                if running and client is not None:
                    client.kill_group()
                raise VzreproError(
                    f"the container {name} could not be removed",
                    reason=err.strip() or None,
                    hint=f"remove it with: {remove_command(name)}",
                )
            time.sleep(0.05)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def remove_command(name: str) -> str:
    """What to type to be rid of a container and its volume."""
    return shlex.join([*command_line(), "rm", "--force", "--volumes", name])


def new_name() -> str:
    return f"vzrepro-{_boot()}-{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(6)}"


def _orphaned(name: str) -> bool:
    match = _CONTAINER.fullmatch(name)
    if match is None:
        return False
    return match["boot"] != _boot() or int(match["start"]) != _started(int(match["pid"]))


def _started(pid: int) -> int | None:
    """When the process started, in clock ticks since boot (proc(5), field 22 of stat); None when it has ended.

    Where there is no /proc, 0 for every process that exists.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    state, *fields = stat[stat.rindex(")") + 2 :].split()
    return None if state in "ZX" else int(fields[18])


def boot_name() -> str:
    """A name for this host, pid namespace and boot."""
    return f"{host_name()}-{_boot()}"


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:8]
    except FileNotFoundError:
        return "0"


@functools.cache
def host_name() -> str:
    """A name for this host and pid namespace: only here can a process id be looked up."""
    try:
        machine = Path("/etc/machine-id").read_text()
    except FileNotFoundError:
        machine = socket.gethostname()
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except FileNotFoundError:
        namespace = ""
    return hashlib.sha256(f"{machine}\0{namespace}".encode()).hexdigest()[:16]


def _bare(image_id: str) -> str:
    return image_id.removeprefix("sha256:")
