"""What verbs that boot need first: the bundles' directories, and the host programs that serve a guest's devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vzrepro.cli.session import Session

if TYPE_CHECKING:
    from vzrepro.vm.boot import HostPrograms

_VSOCK = "vhost-device-vsock"
_SHARES = "virtiofsd"


def prepare(session: Session, bundles: Sequence[str], *, shares: bool = False) -> tuple[list[Path], HostPrograms]:
    """The directory of each of `bundles` (a directory with a `vmlinux`, or a target, which is realized), and the
    programs that guests need; `shares` says that a guest gets some. One call realizes all of it."""
    from vzrepro.vm import qemu
    from vzrepro.vm.boot import HostPrograms

    programs = [*([] if qemu.kernel_vsock_usable() else [_VSOCK]), *([_SHARES] if shares else [])]
    targets = [name for name in bundles if not (Path(name) / "vmlinux").is_file()]
    names = [*programs, *targets]
    nodes = [session.target(name) for name in names]
    found = [session.store.location(info.path) for info in session.realizer().realize(nodes)] if nodes else []
    places = dict(zip(names, found, strict=True))
    return (
        [places.get(name, Path(name)) for name in bundles],
        HostPrograms(
            vhost_device_vsock=places[_VSOCK] / _VSOCK if _VSOCK in programs else None,
            virtiofsd=places[_SHARES] / _SHARES if shares else None,
        ),
    )
