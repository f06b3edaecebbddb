"""youki, the OCI runtime of the guest, from its published crate and its own lock."""

from recipes.rust import BUILD_TARGET, GUEST_TARGET, rust_program
from vzrepro import cargo_crates, crate_source

_FEATURES = ("v2", "seccomp")

_SOURCE = crate_source("youki", series="0.7")

YOUKI = rust_program(
    "youki",
    version=_SOURCE.version,
    source=_SOURCE,
    crates=cargo_crates(
        "youki", lock=_SOURCE, targets=[GUEST_TARGET, BUILD_TARGET], features=_FEATURES, default_features=False
    ),
    target=GUEST_TARGET,
    cargo_args=f"--no-default-features --features {','.join(_FEATURES)}",
    env={"LIBSECCOMP_LINK_TYPE": "static", "LIBSECCOMP_LIB_PATH": "/usr/lib/aarch64-linux-gnu"},
    linked=["libseccomp-dev:arm64"],
)
