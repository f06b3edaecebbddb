"""virtiofsd, the host's end of the directories that a guest shares. Runs on the host.

Debian's own build of it: to compile it took as long as a third of the kernel, and an image of 300 MB, for a program
that no bundle holds. Its libraries and their loader come along, so that it runs on hosts with older ones or none.
"""

from vzrepro import build, debian_image, local
from vzrepro.recipes import SUITE

_UNUSED = "nothing that runs here runs or reads it"

_IMAGE = debian_image(
    "virtiofsd",
    suite=SUITE,
    packages=["coreutils", "dash", "libc-bin", "sed", "virtiofsd"],
    without=dict.fromkeys(("debianutils", "openssl-provider-legacy", "uidmap"), _UNUSED),
)

VIRTIOFSD = build(
    "virtiofsd",
    image=_IMAGE,
    inputs={"src": local("take.sh")},
    command=["sh", "/in/src/take.sh"],
    build_only=["src"],
)
