"""busybox: the guest's shell and tools, one static binary."""

from recipes.toolchain import C_IMAGE
from vzrepro import build, debian_source, local

_SOURCE = debian_source("busybox", series="1.37", suite="trixie")

BUSYBOX = build(
    "busybox",
    version=_SOURCE.version,
    image=C_IMAGE,
    inputs={"busybox.tar.bz2": _SOURCE, "src": local("build.sh", "busybox.config", "applets-of-init.patch")},
    command=["sh", "/in/src/build.sh"],
    build_only=["src"],
    linked=["libc6-dev-arm64-cross", "libgcc-14-dev-arm64-cross"],
)
