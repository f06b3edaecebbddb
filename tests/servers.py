"""Real S3 servers on this machine, from the packages that `./run test` installs."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import botocore.session
from botocore.config import Config

ACCESS_KEY, SECRET_KEY = "writer", "writer-secret"
"""The credentials of one who may do everything on `seaweedfs` and, if it was told so, `rclone`."""

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""The environment of a client that has them, and nothing of this machine's user."""

_START_SECS = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server: its address, and the file with what it says."""

    endpoint: str
    log: Path

    def url(self, bucket: str, prefix: str = "") -> str:
        """The `s3:` URL of a place there."""
        return f"s3://{bucket}{'/' + prefix if prefix else ''}?endpoint={self.endpoint}&region=us-east-1"


@contextmanager
def seaweedfs(directory: Path, *, anonymous: Sequence[str] = ("Read",)) -> Iterator[S3Server]:
    """Run SeaweedFS with all its data in `directory`; who has no credentials may do what `anonymous` says."""
    data, log = directory / "data", directory / "weed.log"
    data.mkdir(parents=True)
    config = directory / "s3.json"
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    identities = [
        {"name": "anonymous", "actions": list(anonymous)},
        {"name": "writer", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
    ]
    config.write_text(json.dumps({"identities": identities}))
    with ExitStack() as stack:
        names = ["master.port", "volume.port", "filer.port", "s3.port"]
        ports = dict(zip([*names, *(f"{name}.grpc" for name in names)], free_ports(2 * len(names)), strict=True))
        for name in names:
            # Made by the server, wherever its directories are.
            socket_path = Path(f"/tmp/seaweedfs-{name.removesuffix('.port')}-grpc-{ports[f'{name}.grpc']}.sock")
            stack.callback(socket_path.unlink, missing_ok=True)
        command = [
            program("weed"),
            *("server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={config}"),
            *(f"-{name}={port}" for name, port in ports.items()),
            *("-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false", "-master.telemetry=false"),
            # Every bucket has volumes of its own, and by default seven at once.
            *("-master.volumeSizeLimitMB=1024", "-volume.max=10000"),
            *(f"-filer.localSocket={directory}/filer.sock", f"-s3.localSocket={directory}/s3.sock"),
        ]
        environ = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        stack.enter_context(_running(command, log, environ, f"{endpoint}/healthz"))
        yield S3Server(endpoint, log)


@contextmanager
def rclone(directory: Path, *, signed: bool = False, tls: tuple[Path, Path] | None = None) -> Iterator[S3Server]:
    """Run rclone's S3 server over `directory`/data, where a bucket is a directory.

    `signed` wants the credentials; with `tls`, a certificate and its key, it is an https server.
    """
    data, log = directory / "data", directory / "rclone.log"
    data.mkdir(parents=True)
    port = free_ports(1)[0]
    command = [
        program("rclone"),
        "serve",
        "s3",
        str(data),
        f"--addr=127.0.0.1:{port}",
        f"--cache-dir={directory}/cache",
    ]
    command += ["--config=/dev/null", "--vfs-cache-mode=off"]
    command += [f"--auth-key={ACCESS_KEY},{SECRET_KEY}"] if signed else []
    command += [f"--cert={tls[0]}", f"--key={tls[1]}"] if tls else []
    endpoint = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    with _running(command, log, dict(os.environ), endpoint):
        yield S3Server(endpoint, log)


def make_bucket(server: S3Server, name: str) -> None:
    """Make a bucket as soon as the server can."""
    session = botocore.session.Session()
    session.set_credentials(ACCESS_KEY, SECRET_KEY)
    config = Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 10})
    client = session.create_client("s3", region_name="us-east-1", endpoint_url=server.endpoint, config=config)
    client.create_bucket(Bucket=name)


def program(name: str) -> str:
    """The path of a server's program: beside this Python's, or wherever it is found."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    assert found is not None, f"{name} is not installed"
    return found


def free_ports(count: int) -> list[int]:
    """Ports on the loopback that nobody has, until somebody asks for them by their numbers.

    None of them is one that the kernel gives to connections, or to who binds port 0: the other tests' are many.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, max(20_000, _first_ephemeral_port()))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [] if port in found else [port]
    return found


@contextmanager
def refusing() -> Iterator[int]:
    """A port on the loopback where connections are refused meanwhile: it is bound, so nobody else gets it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def forwarding(port: int, to: int) -> Iterator[None]:
    """Have `port` be, for whoever connects, the server on the port `to`."""

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", to)) as other:
                back = threading.Thread(target=pump, args=(other, self.request), daemon=True)
                back.start()
                pump(self.request, other)
                back.join()

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", port), Forward) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def _first_ephemeral_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except FileNotFoundError:
        return 49_152  # IANA's, which others than Linux have


@contextmanager
def _running(command: Sequence[str], log: Path, environ: dict[str, str], url: str) -> Iterator[None]:
    """Run a server in a process group of its own from when it answers at `url`, whatever it says, until the end of the
    block or of this process, however that ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environ, start_new_session=True)
    # Its standard input ends with us.
    guard = ["sh", "-c", f"read -r _; kill -9 -{process.pid}"]
    watcher = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + _START_SECS
        while not _answers(url):
            assert process.poll() is None, f"{command[0]} has ended:\n{log.read_text()[-2000:]}"
            assert time.monotonic() < until, f"{command[0]} does not answer:\n{log.read_text()[-2000:]}"
            time.sleep(0.05)
        assert process.poll() is None, f"somebody else answers in {command[0]}'s place:\n{log.read_text()[-2000:]}"
        yield
    finally:
        # Asked politely, SeaweedFS takes ten seconds to end, and nobody needs its data any more.
        os.killpg(process.pid, signal.SIGKILL)
        watcher.communicate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5, context=ssl._create_unverified_context()).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
