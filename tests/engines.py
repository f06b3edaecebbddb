"""Docker daemons for tests: one that does not see this machine's files, and a connection to one that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import PATIENCE_SECS

# The daemon's own disk is in memory and goes with the mount namespace.
_START = """
set -e
mount --make-rprivate /
state=$1; shift
for hidden; do mount -t tmpfs tmpfs "$hidden"; done
mount -t tmpfs tmpfs "$state/data"
echo {} > "$state/config.json"
exec dockerd --config-file "$state/config.json" --data-root "$state/data" --exec-root "$state/exec" \
    --pidfile "$state/pid" --host "unix://$state/docker.sock" --bridge none --iptables=false --ip6tables=false
"""


def why_not() -> str | None:
    """Why no second daemon can be started here; None when it can."""
    if os.geteuid() != 0:
        return "a second Docker daemon needs root"
    missing = [name for name in ("dockerd", "unshare", "setpriv") if shutil.which(name) is None]
    return f"{missing[0]} is not installed" if missing else None


@contextlib.contextmanager
def far_daemon(hidden: Sequence[Path]) -> Iterator[str]:
    """The address of a daemon in a mount namespace of its own, in which the directories `hidden` are empty."""
    state = Path(tempfile.mkdtemp(prefix="vz-docker-", dir="/run"))
    state.chmod(0o755)
    (state / "data").mkdir()
    address = f"unix://{state}/docker.sock"
    with (state / "log").open("wb") as log:
        command = ["unshare", "--mount", "setpriv", "--pdeathsig", "TERM", "sh", "-c", _START, "sh", state, *hidden]
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + PATIENCE_SECS
            while subprocess.run(["docker", "--host", address, "info"], capture_output=True, check=False).returncode:
                assert daemon.poll() is None and time.monotonic() < deadline, (state / "log").read_text()
                time.sleep(0.1)
            yield address
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(PATIENCE_SECS)
            shutil.rmtree(state)


class Connection:
    """A TCP port that leads to a daemon's socket until it is cut: then what is open is closed, and nothing answers."""

    def __init__(self, address: str) -> None:
        self._target = address.removeprefix("unix://")
        self._open: list[socket.socket] = []
        self._cut = False
        self._lock = threading.Lock()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = "tcp://{}:{}".format(*self._server.getsockname())
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            daemon = socket.socket(socket.AF_UNIX)
            daemon.connect(self._target)
            with self._lock:
                self._open += (client, daemon)
                if self._cut:
                    self._close()
            for source, target in ((client, daemon), (daemon, client)):
                threading.Thread(target=_carry, args=(source, target), daemon=True).start()

    def cut(self) -> None:
        """Lose the connection."""
        with self._lock:
            self._cut = True
            self._close()
        # Who waits in accept(2) keeps a closed socket open.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _close(self) -> None:
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)
        # Half of it: an attached stdin ends before the output does.
        target.shutdown(socket.SHUT_WR)
