"""Makes containers that outlive the command: starts a process for each, its supervisor, and is that process.

The supervisor boots the guest, has the container created in it, offers its agent and its ports on the host, keeps what
it prints, and stays until it is told to end, or the guest ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import TypeAdapter

from vzrepro.base import disk
from vzrepro.base.errors import Interrupted, VzreproError
from vzrepro.guest.vm import containers, dial, logs, oci
from vzrepro.guest.vm.agent import AgentError
from vzrepro.guest.vm.containers import AGENT, LOG, ContainerRecord
from vzrepro.guest.vm.oci import Container, Machine, Wish

_CHECK_SECS = 10.0
_PING_SECS = 60.0
_AGAIN_SECS = 0.5


@dataclass(frozen=True, slots=True)
class _Order:
    container_id: str
    wish: Wish
    machine: Machine


def create(container_id: str, wish: Wish, machine: Machine) -> None:
    """Start a supervisor and return when the container is created in its guest.

    Raises UsageError when the id is in use, and whatever `oci.prepared` does; then nothing is left.
    """
    path, lock = containers.claim(container_id)
    try:
        order = TypeAdapter(_Order).dump_json(_Order(container_id, wish, machine))
        ours, theirs = os.pipe()
        with os.fdopen(ours, "rb") as answer:
            try:
                with (path / LOG).open("wb") as log:
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
            _wait_for(process, order, answer.read, path / LOG)
    except BaseException:
        disk.remove_tree(path)
        raise
    finally:
        os.close(lock)


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


# --- the process ---------------------------------------------------------------------------------------------------


def _supervise(path: Path, order: _Order, created: Callable[[Mapping[str, object]], object]) -> None:
    """Boot the guest, create the container, say so by `created`, and stay until SIGTERM or the guest's end."""
    # What happens to us: True is the end, False a reason to see whether the guest is still there. A handler of signals
    # may put something into this queue whatever it interrupts; it could not set an Event.
    news: queue.SimpleQueue[bool] = queue.SimpleQueue()
    waiting = False

    def end(_number: int, _frame: FrameType | None) -> None:
        news.put(True)
        if not waiting:
            raise Interrupted("interrupted while a container was being created")

    signal.signal(signal.SIGTERM, end)
    console = logs.BoundedFile(path / LOG, descriptor=2)

    def log(line: str) -> None:
        # The guest's console goes on when the disk is full.
        with contextlib.suppress(OSError):
            console.write(f"{line}\n".encode())

    with contextlib.ExitStack() as stack:
        container = stack.enter_context(
            oci.prepared(order.container_id, order.wish, order.machine, path, on_console=log)
        )
        proxy = dial.Proxy(dial.private_socket(path, AGENT), container.vm.dial)
        stack.callback(proxy.close)
        container.vm.agent.oci_create(order.container_id, container.directory)
        ports = stack.enter_context(oci.published(container.vm.agent, order.wish))
        output = logs.OutputLog(path)
        containers.save(
            ContainerRecord(
                container_id=order.container_id,
                pid=os.getpid(),
                bundle=container.directory,
                env=container.process.env,
                root=container.image.root,
                config=container.image.config,
                named=str(order.wish.image),
                tag=order.wish.tag,
                command=container.process.arguments,
                ports=ports,
                profile=order.machine.profile,
                created=time.time(),
            )
        )
        threading.Thread(target=_keep, args=(container, output, log, news), daemon=True).start()
        waiting = True
        created({})
        while True:
            with contextlib.suppress(queue.Empty):
                if news.get(timeout=_CHECK_SECS):
                    return
            container.vm.agent.ping(_PING_SECS)


def _keep(
    container: Container, output: logs.OutputLog, log: Callable[[str], object], news: queue.SimpleQueue[bool]
) -> None:
    """Put what the container prints into `output`, to its end; `news` is told when the guest may be gone."""
    agent = container.vm.agent
    while True:
        try:
            output.begin()
            oci.follow(agent, container.container_id, output)
        except AgentError:
            try:
                agent.ping(_PING_SECS)  # an agent that ended is started again, and goes on with the output
            except AgentError:
                news.put(False)
                return
            time.sleep(_AGAIN_SECS)
        except VzreproError as error:
            log(str(error))
            output.give_up()
            return
        else:
            output.end()
            return


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
            try:
                _supervise(path, order, say)
            except OSError as error:
                raise VzreproError(f"the container's supervisor failed: {error}") from error
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
            with contextlib.suppress(OSError):
                os.write(2, f"{error}\n".encode())
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main())
