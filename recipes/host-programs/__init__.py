"""Debian's QEMU and virtiofsd: the machine of a guest on hosts that have no hypervisor of Apple's. Run on the host.

Why not the host's own QEMU: before 8.2 it keeps translations of code that a share's server has overwritten, so that
programs from a share end in SIGSEGV or do something else (docs/guest.md). Why not compiled: no bundle holds them, and
virtiofsd alone took as long as a third of the kernel, and an image of 300 MB. Each comes with its libraries and their
loader, so that it runs on hosts with an older C library or another one.
"""

from vzrepro import build, debian_image, local
from vzrepro.recipes import SUITE

HOST_IMAGE = debian_image(
    "host",
    suite=SUITE,
    packages=["bash", "coreutils", "dash", "grep", "libc-bin", "python3", "qemu-system-arm", "sed", "virtiofsd"],
    without=dict.fromkeys(
        "adduser debconf debianutils dpkg libdebconfclient0 libsemanage2 login.defs media-types netbase "
        "openssl-provider-legacy passwd readline-common tar tzdata uidmap".split(),
        "nothing that runs here runs or reads it",
    ),
)
"""Both, and what the probes run with."""


def _program(name, path):
    return build(
        name,
        image=HOST_IMAGE,
        inputs={"src": local("take.sh")},
        command=["sh", "/in/src/take.sh", path],
        build_only=["src"],
    )


QEMU = _program("qemu", "/usr/bin/qemu-system-aarch64")

VIRTIOFSD = _program("virtiofsd", "/usr/libexec/virtiofsd")
