"""crc: the CRC-32 of standard input, in Rust, static."""

import tomllib

from vzrepro import cargo_crates, local, read
from vzrepro.recipes import AMD64, rust_program

CRC = rust_program(
    "crc",
    version=tomllib.loads(read("Cargo.toml"))["package"]["version"],
    source=local("Cargo.toml", "Cargo.lock", "src"),
    crates=cargo_crates("crc", lock=".", targets=[AMD64]),
)
