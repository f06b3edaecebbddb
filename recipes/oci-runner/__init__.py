"""vz-oci-run: runs a container in the guest's foreground, under youki. `vzrepro oci` shares it with the guest."""

import tomllib

from vzrepro import cargo_crates, local, read
from vzrepro.recipes import AMD64, ARM64, rust_program

OCI_RUNNER = rust_program(
    "vz-oci-run",
    version=tomllib.loads(read("Cargo.toml"))["package"]["version"],
    source=local("Cargo.toml", "Cargo.lock", "src"),
    crates=cargo_crates("vz-oci-run", lock=".", targets=[ARM64, AMD64]),
    target=ARM64,
)
