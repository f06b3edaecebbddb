"""Keeps containers whose guests outlive the command that made them: a process for each, and what others know it by.

A container's directory (below $XDG_RUNTIME_DIR/vz, else ~/.vz/run) is locked as long as its supervisor lives. In it:
`state.json`, once the container is created; `agent`, the socket of the guest's agent; `log`, the guest's console and
what the supervisor says. A run in the foreground has such a directory as well, so that the next command can remove
what a killed one left.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vzrepro import disk
from vzrepro.errors import Interrupted, TimedOut, UsageError, VzreproError
from vzrepro.vm import dial, oci
from vzrepro.vm.agent import AgentClient, AgentError
from vzrepro.vm.oci import Machine, Wish
from vzrepro.vm.rootfs import Image, ImageConfig

STOPPED = "stopped"

_RUN = ".run-"
_STATE, _AGENT, _LOG = "state.json", "agent", "log"
_END_SECS = 30.0
_CHECK_SECS = 10.0
_PING_SECS = 60.0


@dataclass(frozen=True, slots=True)
class State:
    """A container as its supervisor left it for others. `pid` is the supervisor's; `bundle` the guest's directory;
    `env`, `root` and `config` are those of the container's own process and image."""

    container_id: str
    pid: int
    bundle: str
    env: Mapping[str, str]
    root: Path
    config: ImageConfig

    @property
    def image(self) -> Image:
        """What the container was made from."""
        return Image(self.root, self.config)


@dataclass(frozen=True, slots=True)
class _Order:
    container_id: str
    wish: Wish
    machine: Machine


def base() -> Path:
    """Where the directories of this user's containers are."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "vz") if runtime else Path.home() / ".vz" / "run"


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """A directory of its own for a run in the foreground, which goes with the context; those of killed runs go now."""
    home = _made(base())
    for left in home.glob(f"{_RUN}*"):
        disk.remove_unlocked(left)
    path = home / f"{_RUN}{secrets.token_hex(4)}"
    lock = _claim(path)
    try:
        yield path
    finally:
        disk.remove_tree(path)
        os.close(lock)


def create(container_id: str, wish: Wish, machine: Machine) -> None:
    """Start a supervisor and return when the container is created in its guest.

    Raises UsageError when the id is in use, and whatever `oci.prepared` does; then nothing is left.
    """
    check_free(container_id)
    path = _made(base()) / container_id
    try:
        lock = _claim(path)
    except FileExistsError:
        check_free(container_id)
        raise
    try:
        order = TypeAdapter(_Order).dump_json(_Order(container_id, wish, machine))
        ours, theirs = os.pipe()
        with os.fdopen(ours, "rb") as answer:
            try:
                with (path / _LOG).open("wb") as log:
                    # Not a fork: gRPC's threads would not survive one. It keeps the lock that it inherits.
                    process = subprocess.Popen(
                        [sys.executable, "-m", __name__, str(path), str(theirs), str(lock)],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        pass_fds=(theirs, lock),
                        start_new_session=True,
                    )
            finally:
                os.close(theirs)
            _wait_for(process, order, answer.read, path / _LOG)
    except BaseException:
        disk.remove_tree(path)
        raise
    finally:
        os.close(lock)


def check_free(container_id: str) -> None:
    """Raises UsageError when a container has this id already, or nothing can have it."""
    path = base() / oci.check_id(container_id)
    if path.exists():
        is_alive = disk.held(path)
        raise UsageError(
            f"there is a container {container_id} already",
            reason=None if is_alive else "its guest is gone",
            hint=f"choose another id, or: vzrepro oci delete{' --force' if is_alive else ''} {container_id}",
        )


def _wait_for(process: subprocess.Popen[bytes], order: bytes, answer: Any, log: Path) -> None:
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(order)
        said = answer()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if not said:
        process.wait()
        text = log.read_text(errors="replace").strip()
        raise VzreproError("the container's supervisor ended before it had created it", reason=text or None)
    failure = json.loads(said)
    if failure:
        process.wait()
        error = VzreproError(failure["message"], reason=failure["reason"], hint=failure["hint"])
        error.exit_code = failure["exit_code"]
        raise error


def load(container_id: str) -> State:
    """The state of a container that was created. Raises UsageError when there is none."""
    path = base() / oci.check_id(container_id)
    try:
        return TypeAdapter(State).validate_json((path / _STATE).read_bytes())
    except FileNotFoundError:
        what = "is still being created" if disk.held(path) else None
        raise UsageError(
            f"container {container_id} {what}" if what else f"there is no container {container_id}",
            hint=None if what else f"make it: vzrepro oci create {container_id} IMAGE -- CMD",
        ) from None
    except ValidationError as error:
        raise VzreproError(f"{path / _STATE} is not readable", reason=str(error)) from error


def alive(container_id: str) -> bool:
    """Whether the container's guest is there."""
    return disk.held(base() / container_id)


@contextlib.contextmanager
def connected(container_id: str) -> Iterator[AgentClient]:
    """The agent of the container's guest. Raises VzreproError when the guest is gone."""
    load(container_id)
    if not alive(container_id):
        raise VzreproError(
            f"the guest of container {container_id} is gone",
            reason=_last_words(base() / container_id / _LOG),
            hint=f"remove what is left: vzrepro oci delete {container_id}",
        )
    with AgentClient(f"unix:{base() / container_id / _AGENT}") as client:
        yield client


def delete(container_id: str, *, force: bool) -> None:
    """Remove a container that does not run, or with `force` any, its guest and its directory.

    A guest that is gone already leaves only the directory. Raises UsageError, VzreproError, TimedOut.
    """
    path = base() / oci.check_id(container_id)
    if alive(container_id):
        pid = load(container_id).pid
        with connected(container_id) as client:
            try:
                client.oci_delete(container_id, force=force)
            except AgentError as error:
                if error.status == "failed_precondition" and not force:
                    hint = (
                        f"stop it first: vzrepro oci kill {container_id}; or: vzrepro oci delete --force {container_id}"
                    )
                    raise VzreproError(error.message, reason=error.reason, hint=hint) from error
                if not force and error.status != "not_found":
                    raise
        _end(path, pid)
    elif not path.is_dir():
        load(container_id)  # says that it is not there
    disk.remove_tree(path)


def _end(path: Path, pid: int) -> None:
    """End the supervisor, whose id is its own as long as it holds the lock."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + _END_SECS
        while disk.held(path):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return
    raise TimedOut(f"the supervisor {pid} of {path.name} did not end")


def _made(home: Path) -> Path:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


def _claim(path: Path) -> int:
    """Make the directory and lock it; the lock's descriptor. Raises FileExistsError."""
    while True:
        path.mkdir(mode=0o700)
        # Who removes what killed runs left may have been faster than we.
        with contextlib.suppress(FileNotFoundError):
            lock = disk.try_lock(path, create=False)
            if lock is not None:
                return lock


def _last_words(log: Path) -> str | None:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) or None
    return None


# --- the process ---------------------------------------------------------------------------------------------------


def _supervise(path: Path, order: _Order, created: Any) -> None:
    """Boot the guest, create the container, say so by `created`, and stay until SIGTERM or the guest's end."""
    told = threading.Event()
    waiting = False

    def end(_number: int, _frame: FrameType | None) -> None:
        told.set()
        if not waiting:
            raise Interrupted("interrupted while a container was being created")

    def log(line: str) -> None:
        os.write(2, f"{line}\n".encode())

    signal.signal(signal.SIGTERM, end)
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(
            oci.prepared(order.container_id, order.wish, order.machine, path, on_console=log)
        )
        proxy = dial.Proxy(dial.private_socket(path, _AGENT), container.vm.dial)
        stack.callback(proxy.close)
        container.vm.agent.oci_create(order.container_id, container.directory)
        stack.enter_context(oci.published(container.vm.agent, order.wish))
        state = State(
            container_id=order.container_id,
            pid=os.getpid(),
            bundle=container.directory,
            env=container.process.env,
            root=container.image.root,
            config=container.image.config,
        )
        new = path / f"{_STATE}.new"
        new.write_bytes(TypeAdapter(State).dump_json(state))
        new.rename(path / _STATE)
        waiting = True
        created({})
        while not told.wait(_CHECK_SECS):
            container.vm.agent.ping(_PING_SECS)


def _main() -> int:
    path, answer = Path(sys.argv[1]), int(sys.argv[2])
    with os.fdopen(answer, "wb") as pipe:

        def say(document: Mapping[str, object]) -> None:
            with contextlib.suppress(BrokenPipeError):
                pipe.write(json.dumps(document).encode())
            pipe.close()

        try:
            order = TypeAdapter(_Order).validate_json(sys.stdin.buffer.read())
            sys.stdin.close()
            _supervise(path, order, say)
        except VzreproError as error:
            if not pipe.closed:
                say(
                    {
                        "message": error.message,
                        "reason": error.reason,
                        "hint": error.hint,
                        "exit_code": error.exit_code,
                    }
                )
            # The log; nobody else listens any more.
            os.write(2, f"{error}\n".encode())
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
