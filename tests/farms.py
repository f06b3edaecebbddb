"""A farm on this machine: a real Temporal server, a shared cache, and workers with their own stores, keys and names."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests import servers
from tests.commands import Commands
from vzrepro.base.signing import SigningKey


@dataclass
class TemporalServer:
    """Temporal with its state in `directory`; it can be killed and started again with what it knew."""

    directory: Path
    port: int = field(default_factory=lambda: servers.free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"temporal://127.0.0.1:{self.port}/default"

    @property
    def bucket_url(self) -> str:
        """The same server's other namespace, of which the workers of the first know nothing."""
        return f"temporal://127.0.0.1:{self.port}/bucket"

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        database = self.directory / "farm.db"
        command = [
            servers.program("temporal"),
            *("server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(self.port)),
            *("--namespace", "bucket"),
            *("--db-filename", str(database), "--log-level", "error"),
        ]
        with (self.directory / "log").open("ab") as log:
            # Its configuration and history of commands are nobody's business.
            environ = {**os.environ, "HOME": str(self.directory)}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        health = [servers.program("temporal"), "operator", "cluster", "health", "--address", f"127.0.0.1:{self.port}"]
        until = time.monotonic() + 60
        while subprocess.run(health, capture_output=True, env=environ, check=False).returncode != 0:
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < until, (self.directory / "log").read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _certified(place: Path, name: str, issuer: str | None = None) -> None:
    """Write `name`.pem and .key; the certificate is for 127.0.0.1, by `issuer` or, without one, a CA's."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    by, by_key = own, key
    if issuer is not None:
        by = x509.load_pem_x509_certificate((place / f"{issuer}.pem").read_bytes()).subject
        loaded = serialization.load_pem_private_key((place / f"{issuer}.key").read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        by_key = loaded
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(by, own, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(by_key, hashes.SHA256())
    )
    (place / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (place / f"{name}.key").write_bytes(secret)


@contextlib.contextmanager
def behind_tls(to: int, place: Path) -> Iterator[int]:
    """The port of a proxy with TLS before the server on port `to`: it lets in who has a certificate by the CA `ca`, as
    `client` in `place` has, and `stranger` has not."""
    for name, issuer in (("ca", None), ("server", "ca"), ("client", "ca"), ("stranger", None)):
        _certified(place, name, issuer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "server.pem", place / "server.key")
    context.load_verify_locations(place / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pump(reader, to_there), pump(there, writer))

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # handshakes that fail are what is tested
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    starting = asyncio.start_server(forward, "127.0.0.1", 0, ssl=context)
    server = asyncio.run_coroutine_threadsafe(starting, loop).result()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@dataclass
class FarmMachine(Commands):
    """One machine of the farm: its own store, key and configuration; `trusted` are the public keys that it believes."""

    TIMEOUT_SECS = 600

    place: Path
    name: str
    cache: str
    key: SigningKey
    trusted: tuple[str, ...]
    root: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.place / "store"

    def environment(self) -> dict[str, str]:
        key = self.place / "key"
        self.key.save(key)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VZREPRO_")}
        kept |= {"VZREPRO_DOCKER": os.environ["VZREPRO_DOCKER"]} if "VZREPRO_DOCKER" in os.environ else {}
        return {
            **kept,
            "VZREPRO_STORE": str(self.store),
            "VZREPRO_CACHES": self.cache,
            "VZREPRO_PUSH_TO": self.cache,
            "VZREPRO_UPLOAD_KEY": str(key),
            "VZREPRO_TRUSTED_KEYS": " ".join(self.trusted),
            "VZREPRO_MACHINE_CACHE": "false",
            "VZREPRO_TRUSTED_WORKSPACES": "*",
            # The user's own configuration names caches that have all of this.
            "XDG_CONFIG_HOME": str(self.place / "config"),
            "XDG_CACHE_HOME": str(self.place / "xdg"),
            **self.env,
        }

    @contextlib.contextmanager
    def working(self, server: TemporalServer, *options: str, url: str | None = None) -> Iterator[subprocess.Popen[str]]:
        """The machine as a worker, until the end of the block; what it says is in `said`."""
        log = self.place / "said"
        with log.open("w") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vzrepro",
                    "farm",
                    "worker",
                    "--on",
                    url or server.url,
                    "--name",
                    self.name,
                    *options,
                ],
                cwd=self.place,
                env=self.environment(),
                stdout=out,
                stderr=out,
                text=True,
            )
        try:
            until = time.monotonic() + 60
            while "takes orders" not in self.said:
                assert process.poll() is None, self.said
                assert time.monotonic() < until, self.said
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                finally:
                    process.kill()
                    process.wait()

    @property
    def said(self) -> str:
        return (self.place / "said").read_text()
