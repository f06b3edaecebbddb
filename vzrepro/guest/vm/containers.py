"""Containers whose guests outlive the command that made them, as anybody but their supervisors sees them: where they
are, what is known of them, and what can be done to them.

A container's directory (below $XDG_RUNTIME_DIR/vz, else ~/.vz/run) is locked as long as its supervisor lives. In it:
`state.json`, once the container is created; `agent`, the socket of the guest's agent; `output`, what the container
prints; `log`, the guest's console and what the supervisor says. A run in the foreground has such a directory as well,
so that the next command can remove what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from vzrepro.base import disk
from vzrepro.base.errors import TimedOut, UsageError, VzreproError
from vzrepro.guest.vm import logs, oci, places
from vzrepro.guest.vm.agent import AgentClient, AgentError, ContainerState
from vzrepro.guest.vm.logs import OutputStanding
from vzrepro.guest.vm.oci import Publish
from vzrepro.guest.vm.rootfs import Image, ImageConfig

AGENT, LOG = "agent", "log"
"""In a container's directory: the agent's socket, and the guest's console with the supervisor's last words."""

_RUN = ".run-"
_STATE = "state.json"
_END_SECS = 30.0
_DELETE_SECS, _FORCE_SECS = 60.0, 10.0
_LOOK_SECS = 10.0
# A guest's connections may break a little before its supervisor ends.
_LOSS_SECS = 5.0
_POLL_SECS = 0.05


class Status(StrEnum):
    """What a container is; the first three are the OCI runtime specification's words."""

    CREATED = "created"
    RUNNING = "running"
    STOPPED = "stopped"
    CREATING = "creating"
    GONE = "gone"  # its guest is
    UNREACHABLE = "unreachable"  # its guest did not answer in time
    UNREADABLE = "unreadable"  # its state.json is


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A container as its supervisor left it for others: the content of state.json.

    `pid` is the supervisor's; `bundle` the guest's directory; `env`, `root`, `config` and `command` are those of the
    container's own process and image; `named` and `tag` how the user called the image; `ports` those that were
    published, with the host's ports as they came out; `profile` that of the guest's bundle, if it says so; `created`
    and `started` are seconds since 1970. What has a default may be missing in files of older versions.
    """

    container_id: str
    pid: int
    bundle: str
    env: Mapping[str, str]
    root: Path
    config: ImageConfig
    format: Literal[1] = 1
    named: str | None = None
    tag: str | None = None
    command: tuple[str, ...] = ()
    ports: tuple[Publish, ...] = ()
    profile: str | None = None
    created: float | None = None
    started: float | None = None

    @property
    def image(self) -> Image:
        """What the container was made from."""
        return Image(self.root, self.config)


@dataclass(frozen=True, slots=True)
class ListedContainer:
    """A container as `listed` found it; `state` is None when nothing is known but that it is there."""

    container_id: str
    status: str
    state: ContainerRecord | None


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A directory of its own for a run in the foreground, which goes with the context; those of killed runs go now."""
    home = _made(places.containers())
    for left in home.glob(f"{_RUN}*"):
        disk.remove_unlocked(left)
    path = home / f"{_RUN}{secrets.token_hex(4)}"
    lock = _claimed(path)
    try:
        yield path
    finally:
        disk.remove_tree(path)
        os.close(lock)


def claim(container_id: str) -> tuple[Path, int]:
    """Make a container's directory and lock it; the lock's descriptor is the second one. Raises as `check_free`."""
    check_free(container_id)
    path = _made(places.containers()) / container_id
    try:
        return path, _claimed(path)
    except FileExistsError:
        check_free(container_id)
        raise


def check_free(container_id: str) -> None:
    """Raises UsageError when a container has this id already, or nothing can have it."""
    path = places.containers() / oci.check_id(container_id)
    if path.exists():
        is_alive = disk.held(path)
        raise UsageError(
            f"there is a container {container_id} already",
            reason=None if is_alive else "its guest is gone",
            hint=f"choose another id, or: vzrepro oci delete{' --force' if is_alive else ''} {container_id}",
        )


def load(container_id: str, profile: str | None = None) -> ContainerRecord:
    """The state of a container that was created, and whose guest has the kernel of `profile`, if that is given.

    Raises UsageError when there is none, VzreproError when all that is there is what a killed creation left.
    """
    path = places.containers() / oci.check_id(container_id)
    try:
        state = TypeAdapter(ContainerRecord).validate_json((path / _STATE).read_bytes())
    except FileNotFoundError:
        if disk.held(path):
            raise UsageError(f"container {container_id} is still being created") from None
        if path.is_dir():
            raise _gone(container_id) from None
        raise UsageError(
            f"there is no container {container_id}",
            hint=f"make it: vzrepro oci create {container_id} IMAGE -- CMD; or see which there are: vzrepro oci ps",
        ) from None
    except ValidationError as error:
        raise VzreproError(f"{path / _STATE} is not readable", reason=str(error)) from error
    if profile is not None and profile != state.profile:
        raise UsageError(
            f"container {container_id} does not have the kernel of the {profile} profile",
            reason=f"it has that of {state.profile}" if state.profile else "its bundle does not say its profile",
            hint="leave --kernel-profile away, or see which there are: vzrepro oci ps",
        )
    return state


def save(state: ContainerRecord) -> None:
    """Have others see this state from now on. Raises OSError."""
    path = places.containers() / state.container_id / _STATE
    new = path.with_name(f"{_STATE}.{os.getpid()}")
    try:
        new.write_bytes(TypeAdapter(ContainerRecord).dump_json(state))
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def alive(container_id: str) -> bool:
    """Whether the container's guest is there."""
    return disk.held(places.containers() / container_id)


@contextlib.contextmanager
def connected(container_id: str, profile: str | None = None) -> Iterator[tuple[ContainerRecord, AgentClient]]:
    """A container's state, as `load` says it, and the agent of its guest.

    Raises VzreproError when the guest is gone, or goes meanwhile.
    """
    state = load(container_id, profile)
    if not alive(container_id):
        raise _gone(container_id)
    with AgentClient(f"unix:{places.containers() / container_id / AGENT}") as client:
        try:
            yield state, client
        except AgentError as error:
            if error.status == "unavailable" and _ends(places.containers() / container_id, _LOSS_SECS):
                raise _gone(container_id) from error
            raise


def _gone(container_id: str) -> VzreproError:
    return VzreproError(
        f"the guest of container {container_id} is gone",
        reason=_last_words(places.containers() / container_id / LOG),
        hint=f"see what it printed: vzrepro oci logs {container_id}; then: vzrepro oci delete {container_id}",
    )


def listed() -> list[ListedContainer]:
    """All containers, by their ids. Guests that do not answer hold this up for some seconds, however many they are."""
    with contextlib.suppress(FileNotFoundError):
        names = sorted(
            path.name for path in places.containers().iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        found: dict[str, ListedContainer] = {}
        # Daemons: who interrupts us does not wait for them.
        threads = [threading.Thread(target=_look, args=(name, found), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[name] for name in names if name in found]
    return []


def _look(container_id: str, found: dict[str, ListedContainer]) -> None:
    path = places.containers() / container_id
    state: ContainerRecord | None = None
    status: str = Status.CREATING
    try:
        state = load(container_id)
    except VzreproError:
        if (path / _STATE).exists():
            status = Status.UNREADABLE
    if state is not None and alive(container_id):
        status = _asked(container_id)
    elif status != Status.UNREADABLE and not alive(container_id):
        if not path.exists():
            return  # it was deleted meanwhile
        status = Status.GONE
    found[container_id] = ListedContainer(container_id, status, state)


def _asked(container_id: str) -> str:
    try:
        with AgentClient(f"unix:{places.containers() / container_id / AGENT}") as agent:
            return agent.oci_state(container_id, timeout_secs=_LOOK_SECS).status
    except AgentError as error:
        if error.status == "not_found":
            return Status.STOPPED  # youki forgot it: it is just being deleted
        return Status.UNREACHABLE if alive(container_id) else Status.GONE


def start(container_id: str, profile: str | None = None) -> None:
    """Have a created container run its process. Raises as `connected`, and VzreproError for one that is not created."""
    with connected(container_id, profile) as (state, agent), _allowed(container_id, agent, "started"):
        agent.oci_start(container_id)
        with contextlib.suppress(OSError):  # it runs, even if a full disk does not let us say since when
            save(replace(state, started=time.time()))


def kill(container_id: str, signal_name: str | None = None, profile: str | None = None) -> None:
    """Send a container's process a signal by its name or number, by default the image's stop signal."""
    with connected(container_id, profile) as (state, agent), _allowed(container_id, agent, "sent a signal"):
        agent.oci_kill(container_id, signal_name or state.config.stop_signal)


def stop(container_id: str, *, patience_secs: float, profile: str | None = None) -> bool:
    """Send a running container its stop signal, and SIGKILL when it runs after that many seconds; return when it has
    ended, with whether it had to be killed. One that is stopped is left alone.

    Raises VzreproError for one that was not started, TimedOut.
    """
    with connected(container_id, profile) as (state, agent):
        found = agent.oci_state(container_id)
        if found.status == Status.CREATED:
            raise not_allowed(container_id, found.status, "stopped")
        if found.pid is None or _ends_by(agent, found, state.config.stop_signal, patience_secs):
            return False
        if _ends_by(agent, found, "SIGKILL", _END_SECS):
            return True
    raise TimedOut(
        f"container {container_id} did not end within {_END_SECS:.0f} s of SIGKILL",
        hint=f"end its guest: vzrepro oci delete --force {container_id}",
    )


def _ends_by(agent: AgentClient, found: ContainerState, signal_name: str, patience_secs: float) -> bool:
    assert found.pid is not None
    try:
        agent.oci_kill(found.container_id, signal_name)
    except AgentError as error:
        if error.status != "failed_precondition":  # it ended by itself
            raise
    return oci.has_ended(agent, found.pid, patience_secs)


@contextlib.contextmanager
def _allowed(container_id: str, agent: AgentClient, what: str) -> Iterator[None]:
    """Say what a container is, when that is why it cannot be `what`."""
    try:
        yield
    except AgentError as error:
        if error.status != "failed_precondition":
            raise
        raise not_allowed(container_id, agent.oci_state(container_id).status, what) from error


def not_allowed(container_id: str, status: str, what: str) -> VzreproError:
    """The error that says that a container, being what it is, cannot be `what`."""
    hint = {
        Status.CREATED: f"start it first: vzrepro oci start {container_id}",
        Status.RUNNING: f"stop it first: vzrepro oci stop {container_id}" if what == "removed" else None,
        Status.STOPPED: f"remove it, and create it again: vzrepro oci delete {container_id}",
    }
    return VzreproError(
        f"container {container_id} is {status}, so it cannot be {what}",
        hint=next((text for key, text in hint.items() if key == status), None),
    )


def output(container_id: str, *, follow: bool, profile: str | None = None) -> Iterator[bytes]:
    """What a container printed, as far as it is kept, both streams as they came; with `follow` also what it still
    prints, to its end. `shortfall` says afterwards whether that is all. Raises as `load`."""
    load(container_id, profile)
    path = places.containers() / container_id
    if not logs.is_kept(path):
        raise VzreproError(
            f"nothing is kept of what container {container_id} prints",
            reason="it was created by a vzrepro that did not do so",
        )
    return logs.read(path, follow=follow, is_alive=lambda: disk.held(path))


def shortfall(container_id: str) -> VzreproError | None:
    """Why the last of what a container printed is not kept; None when it is."""
    path = places.containers() / container_id
    match logs.standing(path):
        case OutputStanding.FULL | OutputStanding.CUT:
            return VzreproError(
                f"the last of what container {container_id} printed is not kept",
                reason=f"it could not be written below {path}, or not be had from the guest",
                hint=f"make room there, or see {path / LOG}; a container that runs on is kept again from then on",
            )
        case OutputStanding.OPEN if not disk.held(path):
            return _gone(container_id)
    return None


def delete(container_id: str, *, force: bool, profile: str | None = None) -> None:
    """Remove a container that does not run, or with `force` any, its guest and its directory.

    A guest that is gone already leaves only the directory. Raises UsageError, VzreproError, TimedOut.
    """
    path = places.containers() / oci.check_id(container_id)
    if profile is not None and (path / _STATE).exists():
        load(container_id, profile)
    if alive(container_id):
        with connected(container_id) as (state, client):
            try:
                # A guest that does not answer goes all the same, and the container with it.
                client.oci_delete(container_id, force=force, timeout_secs=_FORCE_SECS if force else _DELETE_SECS)
            except AgentError as error:
                if error.status == "failed_precondition" and not force:
                    error_ = not_allowed(container_id, client.oci_state(container_id).status, "removed")
                    error_.hint = f"{error_.hint}; or: vzrepro oci delete --force {container_id}"
                    raise error_ from error
                if not force and error.status != "not_found":
                    raise
        _end(path, state.pid)
    elif not path.is_dir():
        load(container_id)  # says that it is not there
    disk.remove_tree(path)


def _end(path: Path, pid: int) -> None:
    """End the supervisor, whose id is its own as long as it holds the lock."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        if _ends(path, _END_SECS):
            return
    raise TimedOut(f"the supervisor {pid} of {path.name} did not end")


def _ends(path: Path, patience_secs: float) -> bool:
    """Whether the supervisor of the container at `path` is gone, or goes in time."""
    deadline = time.monotonic() + patience_secs
    while disk.held(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECS)
    return True


def _made(home: Path) -> Path:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def _claimed(path: Path) -> int:
    """Make the directory and lock it; the lock's descriptor. Raises FileExistsError."""
    while True:
        path.mkdir(mode=0o700)
        # Who removes what killed runs left may be faster than we.
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                return lock
            os.close(lock)


def _last_words(log: Path) -> str | None:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) or None
    return None
