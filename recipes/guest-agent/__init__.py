"""The guest agent: our own crate in this directory, gRPC over vsock."""

import re
import tomllib

from recipes.rust import BUILD_TARGET, GUEST_TARGET, rust_program
from vzrepro import cargo_crates, local, read

VERSION = tomllib.loads(read("Cargo.toml"))["package"]["version"]
PROTOCOL_REVISION = int(re.search(r"AGENT_PROTOCOL_REVISION: u32 = (\d+);", read("src/lib.rs")).group(1))

_SOURCE = local("Cargo.toml", "Cargo.lock", "build.rs", "proto", "src")
_CRATES = cargo_crates("guest-agent", lock=".", targets=[GUEST_TARGET, BUILD_TARGET])


def _agent(name, target):
    return rust_program(name, version=VERSION, source=_SOURCE, crates=_CRATES, target=target, binary="vz-guest-agent")


GUEST_AGENT = _agent("guest-agent", GUEST_TARGET)

GUEST_AGENT_HOST = _agent("guest-agent-host", BUILD_TARGET)
"""The same agent for the build machine: the contract suite runs against it over a Unix socket."""
