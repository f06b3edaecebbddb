"""virtiofsd, the host's end of the directories that a guest shares. Runs on the host."""

from recipes.toolchain import RUST_HOST_IMAGE
from vzrepro import cargo_crates, crate_source
from vzrepro.recipes import AMD64, rust_program

_SOURCE = crate_source("virtiofsd", series="1.14")
_LIBRARIES = "/usr/lib/x86_64-linux-gnu"

VIRTIOFSD = rust_program(
    "virtiofsd",
    version=_SOURCE.version,
    source=_SOURCE,
    crates=cargo_crates("virtiofsd", lock=_SOURCE, targets=[AMD64]),
    image=RUST_HOST_IMAGE,
    env={
        "LIBSECCOMP_LINK_TYPE": "static",
        "LIBSECCOMP_LIB_PATH": _LIBRARIES,
        "LIBCAPNG_LINK_TYPE": "static",
        "LIBCAPNG_LIB_PATH": _LIBRARIES,
    },
    linked=["libcap-ng-dev", "libseccomp-dev"],
)
