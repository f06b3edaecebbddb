"""youki, the OCI runtime of the guest, from its published crate and its own lock."""

from vzrepro import cargo_crates, crate_source
from vzrepro.recipes import AMD64, ARM64, rust_program

_FEATURES = ("v2", "seccomp")

_SOURCE = crate_source("youki", series="0.7")

YOUKI = rust_program(
    "youki",
    version=_SOURCE.version,
    source=_SOURCE,
    crates=cargo_crates("youki", lock=_SOURCE, targets=[ARM64, AMD64], features=_FEATURES, default_features=False),
    target=ARM64,
    cargo_args=f"--no-default-features --features {','.join(_FEATURES)}",
    env={"LIBSECCOMP_LINK_TYPE": "static", "LIBSECCOMP_LIB_PATH": "/usr/lib/aarch64-linux-gnu"},
    linked=["libseccomp-dev:arm64"],
)
