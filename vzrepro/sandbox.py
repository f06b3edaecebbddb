"""Run one build in a hermetic container: what a builder sees, how it is ended, and what is said when it fails.

The contract is design §5; docs/sandbox.md explains every flag, what cannot be hidden, and the seccomp profile.
Everything goes through the docker command line (`VZREPRO_DOCKER` names another one, such as podman), started with
the `sh` library. `sh` fits commands that are awaited. For the build itself its output callbacks do not: they decode
text strictly, hold a line of any length in memory, and lose track of time. There `sh` starts the client in a session
of its own (so that Ctrl-C does not reach it) and this module reads the client's output from a pipe.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vzrepro.errors import BuildFailed, Interrupted, TimedOut, VzreproError

SANDBOX_USER = (1000, 1000)
"""uid and gid of every builder, whoever runs vzrepro: `builder` in our images' /etc/passwd."""

PIDS_LIMIT = 16384
OPEN_FILES_LIMIT = 16384
TMP_SIZE = "4g"
"""Processes, file descriptors and size of /tmp: constants, since a builder can see them."""

LINE_LIMIT = 2000
"""Bytes of one line that are shown; the log file holds all of it."""

TAIL_LINES = 20
"""Lines of the log that a failure repeats."""

_SECCOMP = Path(__file__).with_name("seccomp.json")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_IMAGE_ID = re.compile(r"(?:sha256:)?[0-9a-f]{64}")
_CONTAINER = re.compile(r"vzrepro-(?P<boot>[0-9a-f]+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")
_REMOVE_SECS = 60.0
_START_SECS = 2.0

# Three files that the engine would otherwise fill from the host (resolv.conf copies the host's name servers) and
# mount from a path holding the container's id.
_ETC = {"hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost\n", "hostname": "localhost\n", "resolv.conf": ""}

# What is writable or tells about the host by default, and is neither /build, /out nor /tmp: hidden under empty
# read-only file systems. /sys is the machine's hardware; /dev/shm and /dev/mqueue are writable, and Podman makes /run
# and /var/tmp so.
_HIDDEN = ("/sys", "/dev/shm", "/dev/mqueue", "/run", "/var/tmp")

# The first shell holds what the engine and the user's docker configuration put into the environment (HOSTNAME,
# HOME, proxies); `env -i` drops all of that before anything of the recipe runs, so that not even /proc/1/environ
# tells. stdout and stderr become one stream here, which keeps their order. The second shell stays as process 1: the
# build is then an ordinary process (signals have their usual effect) and orphans are reaped.
_ENTER = 'umask 022; exec 2>&1 env -i sh -c "$0" sh "$@"'
_BUILD = 'env -i "$@"; status=$?; exit "$status"'
# When vzrepro is not root, what the sandbox's user made must be left readable and removable for the host's user; that
# chmod complains about /build and /out themselves, which are not the sandbox's user's.
_BUILD_SHARED = 'env -i "$@"; status=$?; chmod -R a+rwX /build /out 2>/dev/null; exit "$status"'
_SHELL = (
    'printf "sandbox of %s; its command is:\\n    %s\\n" "$1" "$2"; shift 2; '
    'if command -v bash >/dev/null; then set -- "$@" bash --norc; else set -- "$@" sh; fi; exec env -i "$@"'
)


@dataclass(frozen=True, slots=True)
class Job:
    """One build, as the container engine needs it.

    `label` names it in messages (the recipe's target); `image` is an image id the engine knows (`sha256:…`).
    `inputs` maps a name to the file or directory shown at `/in/<name>`. `scratch` is an existing private directory
    (mode 0700) of a neutral name, best on the inputs' file system: its path is the only one of the host's that
    a builder can find out (in /proc/self/mountinfo). `log` is appended to. `env` is the derivation's, `cores` becomes
    VZ_CORES and the CPU limit; `memory_bytes` and `timeout_secs` of None mean no limit. With `keep_failed` a
    failure's hint is the command that reopens this very sandbox.
    """

    label: str
    image: str
    command: tuple[str, ...]
    scratch: Path
    log: Path
    source_date_epoch: int
    cores: int
    env: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    memory_bytes: int | None = None
    timeout_secs: float | None = None
    platform: str = "linux/amd64"
    user: tuple[int, int] = SANDBOX_USER
    keep_failed: bool = False

    def __post_init__(self) -> None:
        for name in self.inputs:
            if not name or "/" in name or name in {".", ".."}:
                raise ValueError(f"{name!r} cannot be a name below /in")
        for name in self.env:
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of an environment variable")
        if not self.command or "=" in self.command[0]:
            raise ValueError(f"{self.command!r} is not a command")

    @property
    def build(self) -> Path:
        """The host's directory behind /build."""
        return self.scratch / "build"

    @property
    def out(self) -> Path:
        """The host's directory behind /out."""
        return self.scratch / "out"

    @property
    def environment(self) -> dict[str, str]:
        """All variables the builder sees; the derivation's own win."""
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/build",
            "SOURCE_DATE_EPOCH": str(self.source_date_epoch),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
            "VZ_CORES": str(self.cores),
            **self.env,
        }


@dataclass(frozen=True, slots=True)
class Runtime:
    """The container engine that would be used: `engine` is docker or podman, sizes are in bytes."""

    command: str
    engine: str
    client_version: str
    server_version: str
    cgroup_version: int
    storage_driver: str
    rootless: bool
    cpus: int
    memory_bytes: int


def prepare(job: Job) -> None:
    """Fill the job's scratch directory: empty /build and /out for the sandbox's user, and the staged inputs.

    Inputs are hard-linked (copied where that is not possible) into one neutral directory, since a bind mount's
    source path can be read from inside and would be a store path. `run` does this itself; `vzrepro shell` needs it
    before `shell_command`.
    """
    for directory in (job.build, job.out):
        directory.mkdir()
        if os.geteuid() == 0:
            os.chown(directory, *job.user)
        # The same mode for everyone: for a host user who is not root it is the only way in for the sandbox's user.
        # Others on the host are kept out by the scratch directory's own mode.
        directory.chmod(0o777)
    etc = job.scratch / "etc"
    etc.mkdir()
    for name, text in _ETC.items():
        (etc / name).write_text(text)
        (etc / name).chmod(0o444)
    staged = job.scratch / "in"
    staged.mkdir()
    for name, source in job.inputs.items():
        _stage(source, staged / name)
    _finish_directory(staged, mtime_ns=1_000_000_000)


def _stage(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        os.utime(target, ns=(0, source.lstat().st_mtime_ns), follow_symlinks=False)
    elif source.is_dir():
        target.mkdir()
        with os.scandir(source) as entries:
            for entry in entries:
                _stage(Path(entry.path), target / entry.name)
        _finish_directory(target, source.stat().st_mtime_ns)
    else:
        try:
            os.link(source, target)
        except OSError:  # another file system, a file of another user, too many links
            shutil.copy2(source, target)


def _finish_directory(directory: Path, mtime_ns: int) -> None:
    os.utime(directory, ns=(0, mtime_ns))
    directory.chmod(0o555)


def discard(job: Job) -> None:
    """Remove the job's scratch directory, whatever the builder left in it and whoever owns that."""
    for parent, _, _ in os.walk(job.scratch / "in"):
        Path(parent).chmod(0o755)
    for directory in (job.build, job.out):
        try:
            shutil.rmtree(directory)
        except FileNotFoundError:
            pass
        except PermissionError:
            # Only the sandbox's user may open what it closed: a build that was ended did not get to its own chmod.
            uid, gid = job.user
            flags = ["--rm", "--pull", "never", "--network", "none", "--cap-drop", "ALL", "--user", f"{uid}:{gid}"]
            flags += ["--mount", _bind(directory, "/build"), "--entrypoint", "chmod"]
            _docker("run", *flags, job.image, "-R", "a+rwX", "/build", checked=False)  # it may not change /build itself
            shutil.rmtree(directory)
    shutil.rmtree(job.scratch)


def run(job: Job, *, on_line: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Build: prepare the scratch directory, run the command in a fresh container, remove that, return.

    Output, stdout and stderr in the order written, goes to `job.log` as it comes and line by line to `on_line` (called
    in this thread; text that is not UTF-8 is shown with replacement characters, long lines are cut). The result is in
    `job.out`, `discard` cleans up. Setting `stop` ends the build from another thread. However this ends, even by
    an exception in `on_line`, the container is gone before it returns.

    Raises BuildFailed, TimedOut, Interrupted (`stop` or KeyboardInterrupt), or VzreproError when the container
    engine itself does not work.
    """
    name = _new_name()
    client = None
    read_end, write_end = os.pipe()
    try:
        prepare(job)
        deadline = None if job.timeout_secs is None else time.monotonic() + job.timeout_secs
        with (
            job.log.open("ab", buffering=0) as log,
            tempfile.TemporaryFile() as complaints,
            Path(os.devnull).open("rb") as nothing,
        ):
            output = _Output(log, on_line)
            try:
                client = _start(_run_arguments(job, name), nothing, write_end, complaints)
                write_end = _close(write_end)
                _follow(job, read_end, output, deadline, stop)
                exit_code = _wait(client)
                complaints.seek(0)
                complaint = complaints.read().decode(errors="replace").strip()
                state = None if exit_code == 0 else _state(name)
            finally:
                _remove(name, client)
            if exit_code != 0:
                raise _failure(job, state, complaint, output.tail)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted while {job.label} was being built") from error
    finally:
        _close(write_end)
        _close(read_end)


def shell_command(job: Job) -> list[str]:
    """The argv that opens an interactive shell in the job's sandbox: same mounts, limits and environment.

    The scratch directory must have been filled (`prepare`, or a failed `run` with `keep_failed`).
    """
    variables = [f"{name}={value}" for name, value in {"TERM": "xterm", **job.environment}.items()]
    # No owner label: this container belongs to whoever types the command, and `sweep` must leave it alone.
    return [
        *_engine(),
        *("run", "--rm", "--interactive", "--tty"),
        *_confinement(job),
        *("--entrypoint", "sh", job.image, "-c", _ENTER, _SHELL, job.label, shlex.join(job.command), *variables),
    ]


def check() -> Runtime:
    """What the container engine is, asked with one quick call.

    Raises VzreproError, each with its own hint, when the client is missing, the daemon is down, or its socket may
    not be used.
    """
    code, out, err = _docker("info", "--format", "{{json .}}", checked=False)
    try:
        info = json.loads(out) if code == 0 else {}
    except ValueError:
        info = {}
    if "host" in info:  # podman
        host = info["host"]
        version = info["version"]["Version"]
        return Runtime(
            command=shlex.join(_engine()),
            engine="podman",
            client_version=version,
            server_version=version,
            cgroup_version=int(host["cgroupVersion"].removeprefix("v")),
            storage_driver=info["store"]["graphDriverName"],
            rootless=host["security"]["rootless"],
            cpus=host["cpus"],
            memory_bytes=host["memTotal"],
        )
    if not info.get("ServerVersion"):
        raise _engine_trouble("\n".join([err, *(info.get("ServerErrors") or [])]).strip())
    return Runtime(
        command=shlex.join(_engine()),
        engine="docker",
        client_version=info.get("ClientInfo", {}).get("Version", ""),
        server_version=info["ServerVersion"],
        cgroup_version=int(info.get("CgroupVersion") or 1),
        storage_driver=info["Driver"],
        rootless=any("rootless" in option for option in info.get("SecurityOptions") or []),
        cpus=info["NCPU"],
        memory_bytes=info["MemTotal"],
    )


def has_image(image_id: str) -> bool:
    """Whether the engine has the image of this id (`sha256:<64 hex>`)."""
    code, out, err = _docker("image", "inspect", "--format", "{{.Id}}", image_id, checked=False)
    if code == 0:
        return _bare(out.strip()) == _bare(image_id)
    if re.search(r"no such (image|object)|image not known", err, re.IGNORECASE):
        return False
    raise _engine_trouble(err)


def load_image(archive: Path, image_id: str) -> None:
    """Make sure the engine has the image `image_id`, loading the docker-archive `archive` if it has not.

    Raises ValueError for something that is no image id, VzreproError when loading fails or gives another image.
    """
    if not _IMAGE_ID.fullmatch(image_id):
        raise ValueError(f"{image_id!r} is not an image id")
    if has_image(image_id):
        return
    _, out, _ = _docker("load", "--input", str(archive))
    if not has_image(image_id):
        raise VzreproError(
            f"the image in {archive} did not load as {image_id}",
            reason=f"{shlex.join(_engine())} said: {out.strip()}",
            hint="compare the ids with: docker image ls --no-trunc   (Docker's containerd image store names images "
            'differently: turn it off with "features": {"containerd-snapshotter": false} in its daemon.json)',
        )


def sweep() -> list[str]:
    """Remove the containers of builds whose vzrepro died without removing them (kill -9, power loss).

    Only containers of this host (and this pid namespace) are looked at. Returns the names removed.
    """
    _, out, _ = _docker("ps", "--all", "--filter", f"label=vzrepro.host={_host()}", "--format", "{{.Names}}")
    orphans = [name for name in out.split() if _orphaned(name)]
    if orphans:
        _docker("rm", "--force", *orphans, checked=False)  # another sweep may be removing the same ones
    return orphans


def _confinement(job: Job) -> list[str]:
    """The flags of the contract, the same for a build and for a shell."""
    uid, gid = job.user
    flags = [
        *("--pull", "never", "--platform", job.platform),
        *("--network", "none", "--hostname", "localhost", "--ipc", "private", "--cgroupns", "private"),
        *("--read-only", "--cap-drop", "ALL", "--user", f"{uid}:{gid}", "--workdir", "/build"),
        *("--security-opt", "no-new-privileges", "--security-opt", f"seccomp={_SECCOMP}"),
        *("--pids-limit", str(PIDS_LIMIT), "--ulimit", "core=0:0"),
        *("--ulimit", f"nofile={OPEN_FILES_LIMIT}:{OPEN_FILES_LIMIT}"),
        *("--tmpfs", f"/tmp:rw,exec,nosuid,nodev,mode=1777,size={TMP_SIZE}"),
    ]
    for path in _HIDDEN:
        flags += ["--tmpfs", f"{path}:ro,nosuid,nodev,noexec,mode=555,size=4k"]
    flags += ["--mount", _bind(job.build, "/build"), "--mount", _bind(job.out, "/out")]
    flags += ["--mount", _bind(job.scratch / "in", "/in", readonly=True)]
    for name in _ETC:
        flags += ["--mount", _bind(job.scratch / "etc" / name, f"/etc/{name}", readonly=True)]
    if job.memory_bytes is not None:
        # Swap counted in: a build that swaps would take hours instead of failing with a clear message.
        flags += ["--memory", str(job.memory_bytes), "--memory-swap", str(job.memory_bytes)]
    if job.cores < (os.cpu_count() or 1):
        flags += ["--cpus", str(job.cores)]
    return flags


def _run_arguments(job: Job, name: str) -> list[str]:
    variables = [f"{key}={value}" for key, value in job.environment.items()]
    return [
        *("run", "--name", name, "--label", f"vzrepro.host={_host()}", "--label", f"vzrepro.target={job.label}"),
        *("--log-driver", "none", *_confinement(job)),
        *("--entrypoint", "sh", job.image, "-c", _ENTER, _BUILD if os.geteuid() == 0 else _BUILD_SHARED),
        *variables,
        *job.command,
    ]


def _bind(source: Path, target: str, *, readonly: bool = False) -> str:
    # --mount takes one CSV record, so a comma or quote in a path must be quoted as CSV does it.
    record = io.StringIO()
    fields = ["type=bind", f"src={source.absolute()}", f"dst={target}", *(["readonly"] if readonly else [])]
    csv.writer(record, lineterminator="").writerow(fields)
    return record.getvalue()


class _Output:
    """Takes the builder's bytes: all of them into the log, line by line to the caller, the last lines kept."""

    def __init__(self, log: BinaryIO, on_line: Callable[[str], None]) -> None:
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._log = log
        self._on_line = on_line
        self._line = bytearray()
        self._cut = 0

    def feed(self, chunk: bytes) -> None:
        self._write(chunk)
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            self._append(piece)
            self._emit()
        self._append(rest)

    def finish(self) -> None:
        if self._line:
            self._emit()

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[self._log.write(view) :]
        except OSError as error:
            raise VzreproError(
                f"the build log {self._log.name} cannot be written",
                reason=os.strerror(error.errno or 0),
                hint=f"look at the space left with: df -h {shlex.quote(str(Path(self._log.name).parent))}",
            ) from error

    def _append(self, piece: bytes) -> None:
        kept = piece[: LINE_LIMIT - len(self._line)]
        self._line += kept
        self._cut += len(piece) - len(kept)

    def _emit(self) -> None:
        text = self._line.decode(errors="replace").rstrip("\r")
        if self._cut:
            text += f" … ({self._cut} more bytes, in the log)"
        self._line.clear()
        self._cut = 0
        self.tail.append(text)
        self._on_line(text)


def _follow(job: Job, read_end: int, output: _Output, deadline: float | None, stop: threading.Event | None) -> None:
    """Pass on the client's output until it ends, the time is over (TimedOut) or `stop` is set (Interrupted)."""
    poll = select.poll()
    poll.register(read_end, select.POLLIN)
    while True:
        if stop is not None and stop.is_set():
            raise Interrupted(f"interrupted while {job.label} was being built")
        left = 0.1 if deadline is None else min(0.1, deadline - time.monotonic())
        if left <= 0:
            raise TimedOut(
                f"building {job.label} took longer than its time limit of {job.timeout_secs:g} s",
                reason=_log_excerpt(job, output.tail),
                hint=f"raise the recipe's time limit, or look at what hangs: {_reopen(job)}",
            )
        if poll.poll(left * 1000):
            chunk = os.read(read_end, 1 << 16)
            if not chunk:
                output.finish()
                return
            output.feed(chunk)


def _failure(job: Job, state: Mapping[str, Any] | None, complaint: str, tail: deque[str]) -> VzreproError:
    """The error for a container whose client ended with a non-zero code."""
    if state is None or state.get("Error") or state.get("Status") != "exited":
        return _engine_trouble(complaint or f"the container of {job.label} ended without a result")
    code = int(state["ExitCode"])
    excerpt = _log_excerpt(job, tail)
    limit = None if job.memory_bytes is None else f"its memory limit of {job.memory_bytes / 2**20:.0f} MiB"
    more_memory = (
        "raise the recipe's memory limit, or memory_gib in [tool.vzrepro] (VZREPRO_MEMORY_GIB), "
        "or let it do less at once: --cores 1"
    )
    if state.get("OOMKilled"):
        return BuildFailed(
            f"building {job.label} ran out of memory: it needs more than {limit or 'the host has'} (exit code {code})",
            reason=excerpt,
            hint=more_memory,
        )
    if code == 128 + signal.SIGKILL and limit is not None:
        # Engines miss some kills for memory; nothing else in a sandbox is likely to send this signal.
        return BuildFailed(
            f"building {job.label} failed: it was killed (exit code {code}), most likely for {limit}",
            reason=excerpt,
            hint=more_memory,
        )
    how = f"exit code {code}, killed by signal {code - 128}" if code > 128 else f"exit code {code}"
    return BuildFailed(f"building {job.label} failed: {how}", reason=excerpt, hint=_reopen(job))


def _log_excerpt(job: Job, tail: deque[str]) -> str:
    lines = ["the end of its log:"] if tail else ["it printed nothing"]
    return "\n".join([*lines, *(f"    {line}" for line in tail), f"  the whole log is in {job.log}"])


def _reopen(job: Job) -> str:
    if job.keep_failed:
        return f"/build is kept in {job.build}; reopen the sandbox with:\n    {shlex.join(shell_command(job))}"
    return f"vzrepro shell {shlex.quote(job.label)}   (or keep /build as it is: --keep-failed)"


def _engine() -> list[str]:
    """The container engine's command line, from `VZREPRO_DOCKER`."""
    return shlex.split(os.environ.get("VZREPRO_DOCKER", "")) or ["docker"]


def _command() -> Any:
    # Imported late: it takes a tenth of a second, and most commands never start a container.
    import sh

    program, *arguments = _engine()
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


def _start(arguments: list[str], stdin: BinaryIO, stdout: int | BinaryIO, stderr: BinaryIO) -> Any:
    # File objects without a name of their own confuse `sh` (it takes their number for a path); numbers do not.
    out = stdout if isinstance(stdout, int) else stdout.fileno()
    return _command()(*arguments, _in=stdin.fileno(), _out=out, _err=stderr.fileno())


def _wait(client: Any) -> int:
    import sh

    try:
        client.wait()
    except (sh.ErrorReturnCode, sh.SignalException) as error:
        return int(error.exit_code)
    return 0


def _docker(*arguments: str, checked: bool = True) -> tuple[int, str, str]:
    """Run the client to its end: exit code, stdout, stderr. Raises VzreproError for a failure when `checked`."""
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        Path(os.devnull).open("rb") as nothing,
    ):
        code = _wait(_start(list(arguments), nothing, out, err))
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if checked and code != 0:
        raise _engine_trouble(texts[1])
    return code, texts[0], texts[1]


def _engine_trouble(complaint: str) -> VzreproError:
    """The error for what the client complained about."""
    engine = shlex.join(_engine())
    text = re.sub(r"\s*(Run|See) '.* --help'.*", "", complaint).strip() or f"{engine} ended without a message"
    lower = text.lower()
    if "permission denied" in lower and "sock" in lower:
        return VzreproError(
            "Docker may not be used by this user",
            reason=text,
            hint="join its group, then log in again: sudo usermod -aG docker $USER && newgrp docker",
        )
    if "cannot connect" in lower or "connection refused" in lower or "is the docker daemon running" in lower:
        return VzreproError(
            "the Docker daemon does not answer",
            reason=text,
            hint="start it with: sudo systemctl start docker   (without systemd: sudo service docker start)",
        )
    if "no such image" in lower or "image not known" in lower:
        return VzreproError(
            "the toolchain image vanished from Docker",
            reason=text,
            hint="run the same command again: the image is then loaded again",
        )
    if "no space left on device" in lower:
        return VzreproError("the disk is full", reason=text, hint=f"free some of Docker's space: {engine} system prune")
    return VzreproError("the container engine failed", reason=text, hint="look closer with: vzrepro doctor")


def _state(name: str) -> dict[str, Any] | None:
    """The container's `State` (ExitCode, OOMKilled, Error, Status), or None when there is no such container."""
    code, out, _ = _docker("container", "inspect", "--format", "{{json .State}}", name, checked=False)
    return json.loads(out) if code == 0 else None


def _remove(name: str, client: Any | None) -> None:
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
            code, _, err = _docker("rm", "--force", "--volumes", name, checked=False)
            gone = code == 0 or re.search(r"no such container|no container with", err, re.IGNORECASE)
            if gone and not running and time.monotonic() >= settled:
                break
            if time.monotonic() > began + _REMOVE_SECS:
                if running and client is not None:
                    client.kill_group()
                raise VzreproError(
                    f"the container {name} could not be removed",
                    reason=err.strip() or None,
                    hint=f"remove it with: {shlex.join([*_engine(), 'rm', '--force', name])}",
                )
            time.sleep(0.05)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def _new_name() -> str:
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


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:8]
    except FileNotFoundError:
        return "0"


@functools.cache
def _host() -> str:
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


def _close(descriptor: int) -> int:
    """Close a file descriptor if it is still open; returns -1, which stands for closed."""
    if descriptor >= 0:
        os.close(descriptor)
    return -1
