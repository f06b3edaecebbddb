"""The guest agent: our own crate in this directory, gRPC over vsock."""

import re
import tomllib

from vzrepro import cargo_crates, local, read
from vzrepro.recipes import AMD64, ARM64, rust_program

VERSION = tomllib.loads(read("Cargo.toml"))["package"]["version"]
PROTOCOL_REVISION = int(re.search(r"AGENT_PROTOCOL_REVISION: u32 = (\d+);", read("src/lib.rs")).group(1))

_SOURCE = local("Cargo.toml", "Cargo.lock", "build.rs", "proto", "src")
_CRATES = cargo_crates("guest-agent", lock=".", targets=[ARM64, AMD64])


def _agent(name, target):
    return rust_program(name, version=VERSION, source=_SOURCE, crates=_CRATES, target=target, binary="vz-guest-agent")


GUEST_AGENT = _agent("guest-agent", ARM64)

GUEST_AGENT_HOST = _agent("guest-agent-host", AMD64)
"""The same agent for the build machine: the contract suite runs against it over a Unix socket."""
