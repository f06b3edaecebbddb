"""The toolchain images: lists of Debian packages. The exact .debs are in lock.toml; docs/toolchains.md explains."""

from vzrepro import debian_image

SUITE = "trixie"

_WITHOUT = {
    "debconf": "asks questions for maintainer scripts, which never run",
}

_SHELL = ("bash", "coreutils", "dash", "findutils", "grep", "gzip", "sed", "tar")
_CROSS_C = (
    *("gcc", "gcc-aarch64-linux-gnu", "libc6-dev", "libc6-dev-arm64-cross", "make"),
    *("bzip2", "diffutils", "gawk", "patch", "perl-base", "python3-minimal", "xz-utils"),
)

TOOLS_IMAGE = debian_image("tools", suite=SUITE, packages=[*_SHELL, "python3-minimal"], without=_WITHOUT)
"""A shell and Python: for what is put together, not compiled."""

C_IMAGE = debian_image("c", suite=SUITE, packages=[*_SHELL, *_CROSS_C], without=_WITHOUT)
"""C for the guest, and for the tools its builds run."""

KERNEL_IMAGE = debian_image(
    "kernel", suite=SUITE, packages=[*_SHELL, *_CROSS_C, "bc", "bison", "flex"], without=_WITHOUT
)
"""What a kernel build needs on top of C."""

RUST_IMAGE = debian_image(
    "rust",
    suite=SUITE,
    packages=[*_SHELL, *_CROSS_C, "rustc-web", "cargo-web", "libstd-rust-web-dev", "libc-bin", "pkg-config"],
    foreign=["libstd-rust-web-dev:arm64", "libseccomp-dev:arm64"],
    without=_WITHOUT,
)
"""Rust and C for the guest and for the host."""
