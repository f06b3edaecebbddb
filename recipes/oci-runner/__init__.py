"""vz-oci-run: runs a container in the guest's foreground, under youki. `vzrepro oci` shares it with the guest."""

import tomllib

from recipes.rust import BUILD_TARGET, GUEST_TARGET, rust_program
from vzrepro import cargo_crates, local, read

OCI_RUNNER = rust_program(
    "vz-oci-run",
    version=tomllib.loads(read("Cargo.toml"))["package"]["version"],
    source=local("Cargo.toml", "Cargo.lock", "src"),
    crates=cargo_crates("vz-oci-run", lock=".", targets=[GUEST_TARGET, BUILD_TARGET]),
    target=GUEST_TARGET,
)
