"""How a Rust program is built: static, from its own Cargo.lock, with vendored and checksummed crates."""

from recipes.toolchain import RUST_IMAGE
from vzrepro import build, local

BUILD_TARGET = "x86_64-unknown-linux-gnu"
"""Where build scripts and procedural macros run, and what host tools are built for."""

GUEST_TARGET = "aarch64-unknown-linux-gnu"

_SCRIPTS = local("build-crate.sh", "vendor.py")


_LINKED = {
    BUILD_TARGET: ["libc6-dev", "libgcc-14-dev", "libstd-rust-web-dev:amd64"],
    GUEST_TARGET: ["libc6-dev-arm64-cross", "libgcc-14-dev-arm64-cross", "libstd-rust-web-dev:arm64"],
}
"""The packages that every static program of a target has parts of."""


def rust_program(
    name, *, version, source, crates, target, image=RUST_IMAGE, binary=None, cargo_args="", env=None, linked=()
):
    """The artifact `name`: /out/<binary>, built for `target` from `source` (a .crate, or a crate's directory).

    `linked` names further packages of the image that are linked in.
    """
    return build(
        name,
        version=version,
        image=image,
        inputs={"rust": _SCRIPTS, "source": source, "crates": crates},
        command=["sh", "/in/rust/build-crate.sh"],
        env={"VZ_BIN": binary or name, "VZ_TARGET": target, "VZ_CARGO_ARGS": cargo_args, **(env or {})},
        build_only=["rust"],
        linked=[*_LINKED[target], *linked],
    )
