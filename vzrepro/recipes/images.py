"""Toolchain images of Debian 13: a shell and Python; C; Rust. Each works for amd64 and cross-compiles for arm64."""

from __future__ import annotations

from vzrepro.recipe.declaring import shared
from vzrepro.recipe.dsl import debian_image
from vzrepro.recipe.graph import Node

SUITE = "trixie"
"""The Debian release of the images."""

_SANITIZERS = ("libasan8", "libhwasan0", "liblsan0", "libtsan2", "libubsan1")

WITHOUT = {
    "debconf": "asks questions for maintainer scripts, which never run",
    "debianutils": "which, run-parts, savelog: no build runs them",
    "dpkg": "python3 needs it for its maintainer scripts only",
    "libc-dev-bin": "gencat, rpcgen and the like: no build runs them",
    "libgprofng0": "only the profiler gprofng uses it",
    "libquadmath0": "nothing here links libquadmath",
    "libsystemd0": "only who, users and pinky use it",
    "openssl-provider-legacy": "obsolete ciphers, loaded on request only",
    "readline-common": "terminal settings for interactive use",
    "rpcsvc-proto": "rpcgen: no build runs it",
    **{
        f"{name}{suffix}": "run time of sanitizers and of transactional memory: nothing is linked with it"
        for name in (*_SANITIZERS, "libitm1")
        for suffix in ("", "-arm64-cross")
    },
}
"""Packages that others depend on and no ordinary build uses: name → why it can be left out."""

SHELL = ("bash", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "python3", "sed", "tar")
"""The packages that every image of a toolchain has."""

_COMPILERS = ("gcc", "gcc-aarch64-linux-gnu", "libc6-dev", "libc6-dev-arm64-cross")

_MAKE = ("bc", "bison", "bzip2", "diffutils", "flex", "gawk", "make", "patch", "perl-base", "xz-utils")


@shared
def tools_image() -> Node:
    """A shell and Python: for what is put together, not compiled."""
    return debian_image("tools", suite=SUITE, packages=SHELL, without=WITHOUT)


@shared
def c_image() -> Node:
    """gcc for amd64 and arm64, make, flex, bison, Perl: what C programs and kernels are built with."""
    return debian_image("c", suite=SUITE, packages=[*SHELL, *_COMPILERS, *_MAKE], without=WITHOUT)


@shared
def rust_image() -> Node:
    """Rust for amd64 and arm64, with the C compilers that link for it and a static libseccomp for arm64."""
    return debian_image(
        "rust",
        suite=SUITE,
        packages=[*SHELL, *_COMPILERS, "cargo-web", "libstd-rust-web-dev", "rustc-web"],
        foreign=["libseccomp-dev:arm64", "libstd-rust-web-dev:arm64"],
        without=WITHOUT,
    )
