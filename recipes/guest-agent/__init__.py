"""The guest agent: our own crate in this directory, gRPC over vsock."""

import re
import tomllib

from recipes.rust import BUILD_TARGET, GUEST_TARGET, rust_program
from vzrepro import cargo_crates, local, read

VERSION = tomllib.loads(read("Cargo.toml"))["package"]["version"]
PROTOCOL_REVISION = int(re.search(r"AGENT_PROTOCOL_REVISION: u32 = (\d+);", read("src/lib.rs")).group(1))

GUEST_AGENT = rust_program(
    "guest-agent",
    version=VERSION,
    source=local("Cargo.toml", "Cargo.lock", "build.rs", "proto", "src"),
    crates=cargo_crates("guest-agent", lock=".", targets=[GUEST_TARGET, BUILD_TARGET]),
    target=GUEST_TARGET,
    binary="vz-guest-agent",
)
