"""A Rust program: static, from its own Cargo.lock, with vendored and checksummed crates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vzrepro.base.errors import UsageError
from vzrepro.recipe.declaring import current
from vzrepro.recipe.dsl import build, files
from vzrepro.recipe.graph import Node
from vzrepro.recipes.images import rust_image
from vzrepro.recipes.shipped import shipped

AMD64 = "x86_64-unknown-linux-gnu"
"""The Rust target of the build platform: build scripts and procedural macros run there."""

ARM64 = "aarch64-unknown-linux-gnu"
"""The Rust target of 64-bit Arm."""

_LINKED = {
    AMD64: ["libc6-dev", "libgcc-14-dev", "libstd-rust-web-dev:amd64"],
    ARM64: ["libc6-dev-arm64-cross", "libgcc-14-dev-arm64-cross", "libstd-rust-web-dev:arm64"],
}
"""The packages that every static program of a target has parts of."""


def rust_program(
    name: str,
    *,
    version: str,
    source: Node,
    crates: Node,
    target: str = AMD64,
    image: Node | None = None,
    binary: str | None = None,
    cargo_args: str = "",
    env: Mapping[str, str] | None = None,
    linked: Sequence[str] = (),
) -> Node:
    """The artifact `name`: /out/<binary>, built for `target` (AMD64 or ARM64) from `source`, which is a `crate_source`
    or the `local` files of a crate. `crates` is the `cargo_crates` of its lock for `target` and AMD64.

    `binary` is the program's name where it is not `name`; `cargo_args` are further words for `cargo build`; `linked`
    names further packages of the image that are linked in; `image` is by default `rust_image()`.
    """
    if target not in _LINKED:
        raise UsageError(
            f"{current().place()}: rust_program builds for no {target!r}",
            hint="target is AMD64 or ARM64 of vzrepro.recipes",
        )
    return build(
        name,
        version=version,
        image=rust_image() if image is None else image,
        inputs={
            "rust": files("files-rust", shipped("rust", "build-crate.sh", "vendor.py")),
            "source": source,
            "crates": crates,
        },
        command=["sh", "/in/rust/build-crate.sh"],
        env={"VZ_BIN": binary or name, "VZ_TARGET": target, "VZ_CARGO_ARGS": cargo_args, **(env or {})},
        build_only=["rust"],
        linked=[*_LINKED[target], *linked],
    )
