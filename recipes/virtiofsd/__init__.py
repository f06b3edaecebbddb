"""virtiofsd, the host's end of the directories that a guest shares. Runs on the host."""

from recipes.rust import BUILD_TARGET, rust_program
from recipes.toolchain import RUST_HOST_IMAGE
from vzrepro import cargo_crates, crate_source

_SOURCE = crate_source("virtiofsd", series="1.14")
_LIBRARIES = "/usr/lib/x86_64-linux-gnu"

VIRTIOFSD = rust_program(
    "virtiofsd",
    version=_SOURCE.version,
    source=_SOURCE,
    crates=cargo_crates("virtiofsd", lock=_SOURCE, targets=[BUILD_TARGET]),
    target=BUILD_TARGET,
    image=RUST_HOST_IMAGE,
    env={
        "LIBSECCOMP_LINK_TYPE": "static",
        "LIBSECCOMP_LIB_PATH": _LIBRARIES,
        "LIBCAPNG_LINK_TYPE": "static",
        "LIBCAPNG_LIB_PATH": _LIBRARIES,
    },
    linked=["libcap-ng-dev", "libseccomp-dev"],
)
