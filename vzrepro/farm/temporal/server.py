"""The connection to a Temporal server, and the names that clients and workers share there."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from temporalio.client import Client, TLSConfig
from temporalio.runtime import LoggingConfig, PrometheusConfig, Runtime, TelemetryConfig, TelemetryFilter
from temporalio.service import RPCError

from vzrepro.base.config import Config
from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.farm.order import SizeClass

WORKFLOWS = "vzrepro"
"""The task queue of workflows, which every worker serves."""

BUILD, DRAIN = "vzrepro-build", "vzrepro-drain"
"""Names of workflows, and of the activities that they consist of."""

_URL = re.compile(r"temporal://(?P<host>[^/@\s]+:\d+)(?:/(?P<namespace>[A-Za-z0-9][A-Za-z0-9._-]*))?/?")


@dataclass(frozen=True, slots=True)
class FarmServer:
    """Where the server is; what proves that it is the right one, and who we are."""

    host: str
    namespace: str
    ca: Path | None = None
    cert: Path | None = None
    cert_key: Path | None = None
    token: Path | None = None

    @classmethod
    def of(cls, url: str, config: Config) -> FarmServer:
        """The server that a `temporal://` URL names, with the settings. Raises UsageError."""
        match = _URL.fullmatch(url)
        if match is None:
            raise UsageError(
                f"{url!r} names no Temporal server",
                hint="use temporal://HOST:PORT/NAMESPACE; keys and tokens are settings (docs/farm.md)",
            )
        if (config.farm_cert is None) != (config.farm_cert_key is None):
            raise UsageError("farm-cert and farm-cert-key belong together: one of them is missing")
        namespace = match["namespace"] or "default"
        return cls(match["host"], namespace, config.farm_ca, config.farm_cert, config.farm_cert_key, config.farm_token)

    @property
    def url(self) -> str:
        """What a person calls it."""
        return f"temporal://{self.host}/{self.namespace}"

    async def connect(self, identity: str, runtime: Runtime | None = None) -> Client:
        """Connect, under a name that the server shows; with `runtime`, by that (`sdk_runtime`).

        Raises RemoteError when the server cannot be reached or does not let us in, UsageError for an unreadable file.
        """
        secure = any((self.ca, self.cert, self.token))
        tls = TLSConfig(_read(self.ca), client_cert=_read(self.cert), client_private_key=_read(self.cert_key))
        token = _read(self.token)
        try:
            return await Client.connect(
                self.host,
                namespace=self.namespace,
                identity=identity,
                tls=tls if secure else None,
                api_key=None if token is None else token.decode(errors="replace").strip(),
                runtime=runtime or sdk_runtime(),
            )
        except (RuntimeError, RPCError, ValueError) as error:
            raise RemoteError(
                f"no Temporal server can be used at {self.url}",
                reason=str(error)[:500],
                hint="start one for a small team: temporal server start-dev --db-filename farm.db   (docs/farm.md)",
            ) from error


def sdk_runtime(metrics: str | None = None) -> Runtime:
    """What the SDK works in. With `metrics`, `HOST:PORT`, Prometheus finds its figures there. Raises UsageError when
    they cannot be served there."""
    logging.getLogger("temporalio").setLevel(logging.CRITICAL)  # failures are told of where they are dealt with
    quiet = LoggingConfig(TelemetryFilter(core_level="ERROR", other_level="ERROR"))
    prometheus = None if metrics is None else PrometheusConfig(bind_address=metrics)
    try:
        return Runtime(telemetry=TelemetryConfig(logging=quiet, metrics=prometheus))
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"no metrics can be served at {metrics}", reason=str(error)[:500]) from error


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` does, without tearing Python down: the SDK's threads may come back to it just then,
    which aborts it or has it hang (seen with temporalio 1.35)."""
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def build_queue(platform: str, size: SizeClass) -> str:
    """The task queue of builds for a platform and class."""
    return f"vzrepro/{platform.replace('/', '-')}/{size}"


def worker_queue(name: str) -> str:
    """The task queue that this worker alone serves."""
    return f"vzrepro/worker/{name}"


def _read(file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}", reason=error.strerror) from error
