"""`vzrepro doctor`: is everything here that vzrepro needs, and if not, what to type."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from vzrepro import sandbox
from vzrepro.base import disk, words
from vzrepro.base.errors import VzreproError
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session
from vzrepro.cli.vm import machine

_ROOM_BYTES = 15 * 10**9

_FORMS = ("\u00e9", "e\u0301")  # é in two forms

_SLOW_DRIVERS = {
    "fuse-overlayfs": "slow: whatever a build opens passes through another process",
    "vfs": "slow: the whole image is copied for every container",
}


@click.command()
@json_option
@click.pass_obj
def doctor(session: Session) -> None:
    """Check Docker, QEMU, the disk, workspace, lock and caches."""
    checks: list[tuple[str, Callable[[Session], str]]] = [
        ("python", _python),
        ("host", _host),
        ("container engine", _engine),
        ("files of builds", _files),
        ("qemu", _qemu),
        ("evaluation", _evaluation),
        ("workspace", _workspace),
        ("lock", _lock),
        ("store", _store),
        ("caches", _caches),
    ]
    rows: list[tuple[str, str, str]] = []
    for name, check in checks:
        try:
            rows.append((name, "ok", check(session)))
        except VzreproError as error:
            rows.append((name, "FAILED", f"{error.message} — {error.hint or error.reason or ''}".rstrip(" —")))
    session.console.print_table(("what", "state", "detail"), rows)
    bad = [name for name, state, _ in rows if state != "ok"]
    if bad:
        raise VzreproError(f"not in order: {', '.join(bad)}", hint="the table above says what to do")


def _python(_session: Session) -> str:
    return sys.version.split()[0]


def _host(_session: Session) -> str:
    host = f"{platform.system()} {platform.release()} {platform.machine()}"
    if platform.system() == "Linux":
        return host
    return f"{host}: vm and oci run do not work here, they need Linux; the rest is untried here (docs/hosts.md)"


def _engine(_session: Session) -> str:
    found = sandbox.check()
    driver = found.storage_driver
    if driver in _SLOW_DRIVERS:
        driver += f" ({_SLOW_DRIVERS[driver]}; see docs/sandbox.md)"
    return (
        f"{found.engine} {found.server_version}, {driver}, cgroup v{found.cgroup_version}, "
        f"{found.cpus} CPUs, {words.size(found.memory_bytes)}"
    )


def _files(session: Session) -> str:
    place = _existing(session.config.store)
    if not os.access(place, os.W_OK):
        return "not tried: the store cannot be written"
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as directory:
        found = sandbox.find_out(Path(directory), sandbox.check())
    how = "mounted by the engine" if found.mounts else "sent to the engine and fetched (docs/sandbox.md)"
    return f"{how}: {found.reason}"


def _qemu(session: Session) -> str:
    if platform.system() != "Linux":
        return "not used on this host"
    if machine.brings_qemu(session):
        return "from the store (docs/guest.md)"
    found = shutil.which("qemu-system-aarch64")
    if found is None:
        raise VzreproError("qemu-system-aarch64 is not installed", hint="apt-get install qemu-system-arm")
    return found


def _evaluation(_session: Session) -> str:
    from vzrepro.recipe import confined

    return confined.describe()


def _workspace(session: Session) -> str:
    return f"{session.root}, {words.plural(len(session.graph.targets), 'target')}"


def _lock(session: Session) -> str:
    count, faults = session.check_lock()
    if faults:
        raise VzreproError(faults[0], hint="run: vzrepro lock")
    return f"{words.plural(count, 'request')} pinned"


def _store(session: Session) -> str:
    place = session.config.store
    existing = _existing(place)
    writable = os.access(existing, os.W_OK)
    if writable and disk.same_name(existing, "a", "A"):
        raise VzreproError(
            f"{place} ignores the case of names, so nothing can be built",
            hint="use a disk that tells them apart: export VZREPRO_STORE=DIR",
        )
    free = shutil.disk_usage(existing).free
    if free < _ROOM_BYTES:
        raise VzreproError(
            f"{place} has {words.size(free)} free, all targets need {words.size(_ROOM_BYTES)}",
            hint="make room with: vzrepro store gc, or set VZREPRO_STORE",
        )
    forms = ", takes two Unicode forms of a name for one" if writable and disk.same_name(existing, *_FORMS) else ""
    return f"{place}, {words.size(free)} free{forms}"


def _existing(place: Path) -> Path:
    """The directory itself, or the nearest one above it that exists."""
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _caches(session: Session) -> str:
    for cache in session.shared_caches:
        cache.access.reach()
    return ", ".join(cache.url for cache in session.caches) or "none"
