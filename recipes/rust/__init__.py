"""How a Rust program is built: static, from its own Cargo.lock, with vendored and checksummed crates."""

from recipes.toolchain import RUST_IMAGE
from vzrepro import build, local

BUILD_TARGET = "x86_64-unknown-linux-gnu"
"""Where build scripts and procedural macros run, and what host tools are built for."""

GUEST_TARGET = "aarch64-unknown-linux-gnu"

_SCRIPTS = local("build-crate.sh", "vendor.py")


def rust_program(name, *, version, source, crates, target, image=RUST_IMAGE, binary=None, cargo_args="", env=None):
    """The artifact `name`: /out/<binary>, built for `target` from `source` (a .crate, or a crate's directory)."""
    return build(
        name,
        version=version,
        image=image,
        inputs={"rust": _SCRIPTS, "source": source, "crates": crates},
        command=["sh", "/in/rust/build-crate.sh"],
        env={"VZ_BIN": binary or name, "VZ_TARGET": target, "VZ_CARGO_ARGS": cargo_args, **(env or {})},
    )
