"""What verbs that boot need first: the bundles' directories, and the host programs that serve a guest's devices."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzrepro.cli.session import Session

if TYPE_CHECKING:
    from vzrepro.guest.vm.boot import HostPrograms
    from vzrepro.guest.vm.qemu import Guest

_VSOCK = "vhost-device-vsock"
_SHARES = "virtiofsd"
_QEMU = "qemu"


def prepare(
    session: Session, bundles: Sequence[str], *, shares: bool = False, vsock: bool = False
) -> tuple[list[Path], HostPrograms]:
    """The directory of each of `bundles` (a bundle's or a VM's directory, or a target, which is realized), and the
    programs that guests need; `shares` says that a guest gets more than its VM's own, `vsock` that its vsock is served
    by vhost-device-vsock whatever the host's kernel can do. One call realizes all of it."""
    from vzrepro.guest.vm import directory, qemu, watch
    from vzrepro.guest.vm.boot import HostPrograms

    qemu.require_linux()
    shares = shares or any(directory.is_one(Path(name)) and directory.load(Path(name)).shares for name in bundles)
    programs = [*([] if qemu.kernel_vsock_usable() and not vsock else [_VSOCK]), *([_SHARES] if shares else [])]
    if brings_qemu(session):
        programs.append(_QEMU)
    places = _places(session, [*programs, *bundles])
    return (
        [places[name] for name in bundles],
        HostPrograms(
            vhost_device_vsock=places[_VSOCK] / _VSOCK if _VSOCK in programs else None,
            virtiofsd=places[_SHARES] / _SHARES if shares else None,
            qemu=places[_QEMU] / watch.QEMU if _QEMU in programs else None,
        ),
    )


def brings_qemu(session: Session) -> bool:
    """Whether guests run under the workspace's own QEMU. An emulator must be one that gets it right (docs/guest.md); on
    arm64 guests are native, and it is the host's."""
    return platform.machine() == "x86_64" and _QEMU in session.graph.targets


def bundles(session: Session, names: Sequence[str]) -> list[Path]:
    """The directory of each bundle, which may be a target; nothing is made ready to boot it."""
    places = _places(session, names)
    return [places[name] for name in names]


def guest(folder: Path) -> Guest:
    """The guest of a bundle's or a VM's directory."""
    from vzrepro.guest.vm import boot, directory

    return directory.load(folder) if directory.is_one(folder) else boot.of_bundle(folder)


def _places(session: Session, names: Sequence[str]) -> dict[str, Path]:
    here = {name: Path(name) for name in names if any((Path(name) / file).is_file() for file in ("vmlinux", "vm.toml"))}
    nodes = {name: session.target(name) for name in names if name not in here}
    found = session.realizer().realize(list(nodes.values())) if nodes else []
    return here | {name: session.store.location(info.path) for name, info in zip(nodes, found, strict=True)}
