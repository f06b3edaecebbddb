"""The toolchain images: lists of Debian packages. The exact .debs are in lock.toml; docs/toolchains.md explains."""

from vzrepro import debian_image

SUITE = "trixie"

_WITHOUT = {
    "debconf": "asks questions for maintainer scripts, which never run",
}
"""Packages that others depend on and no build here uses: name → why it can be left out."""

_SHELL = ("bash", "coreutils", "dash", "findutils", "grep", "gzip", "python3-minimal", "sed", "tar")

_C = (
    *("gcc", "gcc-aarch64-linux-gnu", "libc6-dev", "libc6-dev-arm64-cross", "make"),
    *("bzip2", "diffutils", "gawk", "patch", "perl-base", "xz-utils"),
)

TOOLS_IMAGE = debian_image("tools", suite=SUITE, packages=_SHELL, without=_WITHOUT)
"""A shell and Python: for what is put together, not compiled."""

C_IMAGE = debian_image("c", suite=SUITE, packages=[*_SHELL, *_C, "bc", "bison", "flex"], without=_WITHOUT)
"""C for the guest and for the tools that its builds run: the kernel and busybox."""

RUST_IMAGE = debian_image(
    "rust",
    suite=SUITE,
    packages=[*_SHELL, *_C, "cargo-web", "libc-bin", "libstd-rust-web-dev", "pkg-config", "rustc-web"],
    foreign=["libseccomp-dev:arm64", "libstd-rust-web-dev:arm64"],
    without=_WITHOUT,
)
"""Rust for the guest and for the host, with the C compilers that link for it."""
