"""vhost-device-vsock, the host's end of a guest's vsock where the host kernel offers none. Runs on the host."""

from vzrepro import cargo_crates, crate_source
from vzrepro.recipes import AMD64, rust_program

_SOURCE = crate_source("vhost-device-vsock", series="0.3")

VHOST_DEVICE_VSOCK = rust_program(
    "vhost-device-vsock",
    version=_SOURCE.version,
    source=_SOURCE,
    crates=cargo_crates("vhost-device-vsock", lock=_SOURCE, targets=[AMD64]),
)
