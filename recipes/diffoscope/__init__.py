"""The image in which `vzrepro diff` and audits look at what differs. No output comes from it."""

from recipes.toolchain import SUITE
from vzrepro import debian_image

_WITHOUT = {
    "debconf": "asks questions for maintainer scripts, which never run",
    "debianutils": "which, run-parts, savelog: nothing here runs them",
    "dpkg": "python3 needs it for its maintainer scripts only",
    "libgprofng0": "only the profiler gprofng uses it",
    "libsystemd0": "only who, users and pinky use it",
    "lsb-release": "diffoscope names it when it proposes packages to install, and there is nowhere to install them",
    "openssl-provider-legacy": "obsolete ciphers, loaded on request only",
    "readline-common": "terminal settings for interactive use",
    "tzdata": "times are shown in UTC",
}

DIFFOSCOPE_IMAGE = debian_image(
    "diffoscope",
    suite=SUITE,
    packages=[
        *("bash", "coreutils", "dash", "diffutils", "findutils", "grep", "libc-bin", "sed"),
        *("binutils", "binutils-aarch64-linux-gnu", "diffoscope-minimal", "file", "xxd"),
        *("bzip2", "cpio", "gzip", "lz4", "squashfs-tools", "tar", "unzip", "xz-utils", "zstd"),
    ],
    without=_WITHOUT,
)
"""diffoscope and what it runs for ELF files of both architectures, archives, compressed files and file systems."""
