"""The toolchain images: lists of Debian packages. The exact .debs are in lock.toml; docs/toolchains.md explains."""

from vzrepro import debian_image

SUITE = "trixie"

_SANITIZERS = ("libasan8", "libhwasan0", "liblsan0", "libtsan2", "libubsan1")

_WITHOUT = {
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
"""Packages that others depend on and no build here uses: name → why it can be left out."""

_SHELL = ("bash", "coreutils", "dash", "findutils", "grep", "gzip", "libc-bin", "python3", "sed", "tar")

_COMPILERS = ("gcc", "gcc-aarch64-linux-gnu", "libc6-dev", "libc6-dev-arm64-cross")

_MAKE = ("bc", "bison", "bzip2", "diffutils", "flex", "gawk", "make", "patch", "perl-base", "xz-utils")

TOOLS_IMAGE = debian_image("tools", suite=SUITE, packages=_SHELL, without=_WITHOUT)
"""A shell and Python: for what is put together, not compiled."""

C_IMAGE = debian_image("c", suite=SUITE, packages=[*_SHELL, *_COMPILERS, *_MAKE], without=_WITHOUT)
"""C for the guest and for the tools that its builds run: the kernel and busybox."""

RUST_IMAGE = debian_image(
    "rust",
    suite=SUITE,
    packages=[*_SHELL, *_COMPILERS, "cargo-web", "libstd-rust-web-dev", "rustc-web"],
    foreign=["libseccomp-dev:arm64", "libstd-rust-web-dev:arm64"],
    without=_WITHOUT,
)
"""Rust for the guest and for the host, with the C compilers that link for it."""
