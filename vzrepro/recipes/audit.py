"""What audits put into a sandbox, and the image in which they look at what differs."""

from __future__ import annotations

from vzrepro.recipe.declaring import shared
from vzrepro.recipe.dsl import build, debian_image, files
from vzrepro.recipe.graph import Node
from vzrepro.recipes.images import SUITE, c_image
from vzrepro.recipes.shipped import shipped


@shared
def audit_tools() -> Node:
    """`vary` (static) and `look` observe, `hold.so` holds the clock and randomness, and `locale/` is one for glibc; all
    x86-64."""
    return build(
        "audit-tools",
        image=c_image(),
        inputs={
            "src": files(
                "files-audit-tools",
                shipped("audit-tools", "hold.c", "locale.src", "look.c", "utf8.charmap", "vary.c"),
            )
        },
        command=[
            "sh",
            "-euc",
            'compile() { gcc -std=gnu17 -O2 -Wall -Wextra -Werror -s -Wl,--build-id=none "$@"; }; '
            "compile -static -o /out/vary /in/src/vary.c; "
            "compile -o /out/look /in/src/look.c; "
            "compile -shared -fPIC -o /out/hold.so /in/src/hold.c; "
            "localedef --no-archive --no-hard-links -f /in/src/utf8.charmap -i /in/src/locale.src /out/locale",
        ],
    )


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


@shared
def diffoscope_image() -> Node:
    """diffoscope and what it runs for ELF files of both architectures, archives, compressed files and file systems. No
    output comes from it."""
    return debian_image(
        "diffoscope",
        suite=SUITE,
        packages=[
            *("bash", "coreutils", "dash", "diffutils", "findutils", "grep", "libc-bin", "sed"),
            *("binutils", "binutils-aarch64-linux-gnu", "diffoscope-minimal", "file", "xxd"),
            *("bzip2", "cpio", "gzip", "lz4", "squashfs-tools", "tar", "unzip", "xz-utils", "zstd"),
        ],
        without=_WITHOUT,
    )
