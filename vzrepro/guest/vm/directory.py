"""A VM's directory: a bundle's files, `vm.toml` that says what machine to boot them on, and a disk that stays.

docs/guest.md describes `vm.toml`. It is the user's to edit; nothing here changes one that is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vzrepro.base.errors import UsageError, VzreproError, first_fault
from vzrepro.guest.metadata import CHECKSUMS, VERSION_FILE
from vzrepro.guest.vm import qemu
from vzrepro.guest.vm.spec import Mount

CONFIG_FILE = "vm.toml"
DISK_FILE = "disk.img"
DISK_TARGET = "/mnt/disk"
"""Where a VM's disk is mounted in the guest, unless its configuration says otherwise."""

_BUNDLE_FILES = (*CHECKSUMS, VERSION_FILE)


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, alias_generator=lambda name: name.replace("_", "-")
    )


class _Disk(_Model):
    path: str = DISK_FILE
    target: str = DISK_TARGET


class _Mount(_Model):
    source: str
    target: str
    read_only: bool = False


class _Config(_Model):
    format: Literal[1]
    kernel: str = "vmlinux"
    initramfs: str = "initramfs.img"
    command_line: str = ""
    cpus: Annotated[int, Field(ge=1)] = 1
    memory_mib: Annotated[int, Field(ge=64)] = 512
    disk: _Disk | None = None
    mount: list[_Mount] = []


@dataclass(frozen=True, slots=True)
class Settings:
    """What a new VM is: its processors, its memory in MiB, its disk in MiB (0: none), and what it sees of the host."""

    cpus: int = 2
    memory_mib: int = 1024
    disk_mib: int = 8192
    mounts: tuple[Mount, ...] = ()


def is_one(directory: Path) -> bool:
    """Whether `directory` is a VM's."""
    return (directory / CONFIG_FILE).is_file()


def load(directory: Path) -> qemu.Guest:
    """The guest that `directory`'s configuration describes. Raises UsageError when it makes no sense."""
    path = directory / CONFIG_FILE
    try:
        config = _Config.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise UsageError(f"{path}: {first_fault(error)}", hint="docs/guest.md lists the keys") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not TOML", reason=str(error)) from error
    default = qemu.Guest(directory / config.kernel, directory / config.initramfs)
    for file in (default.kernel, default.initramfs):
        if not file.is_file():
            raise UsageError(f"{path}: {file} is not there", hint=f"vzrepro vm init --force … {directory} puts it back")
    guest = replace(
        default,
        cpus=config.cpus,
        memory_mib=config.memory_mib,
        command_line=f"{default.command_line} {config.command_line}".strip(),
    )
    if config.disk is not None:
        _check_target(config.disk.target)
        guest = replace(
            guest,
            disks=(qemu.Disk(directory / config.disk.path),),
            command_line=f"{guest.command_line} vz.disk={config.disk.target}",
        )
    return with_mounts(
        guest, [Mount(directory / mount.source, mount.target, mount.read_only) for mount in config.mount]
    )


def with_mounts(guest: qemu.Guest, mounts: Sequence[Mount]) -> qemu.Guest:
    """`guest`, with further directories of the host mounted in it. Raises UsageError for a target that cannot be."""
    for mount in mounts:
        _check_target(mount.target)
        number = sum(share.tag.startswith("vz-mount-") for share in guest.shares)
        guest = replace(
            guest,
            shares=(*guest.shares, qemu.Share(f"vz-mount-{number}", mount.source, mount.read_only)),
            command_line=f"{guest.command_line} vz.mount.{number}={mount.target}",
        )
    return guest


def create(directory: Path, bundle: Path, settings: Settings, *, force: bool = False) -> None:
    """Make `directory` the one of a new VM of `bundle`, all of it or nothing.

    What is in it already is an error; with `force` the bundle's files and the configuration are replaced, everything
    else, and the disk above all, stays. Raises UsageError, VzreproError, OSError.
    """
    there = _content(directory)
    if there and not force:
        raise UsageError(
            f"{directory} is not empty",
            reason=f"it has {there[0]}" + (f" and {len(there) - 1} more" if len(there) > 1 else ""),
            hint="name another directory, or --force: it replaces kernel and configuration, and keeps the disk",
        )
    for mount in settings.mounts:
        _check_target(mount.target)
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=parent) as scratch:
        staging = Path(scratch, "vm")
        staging.mkdir()
        for name in _BUNDLE_FILES:
            shutil.copyfile(bundle / name, staging / name)
        (staging / "youki").chmod(0o755)
        if settings.disk_mib and DISK_FILE not in there:
            make_disk(staging / DISK_FILE, settings.disk_mib)
        (staging / CONFIG_FILE).write_text(_config(settings), encoding="utf-8")
        if there:
            # The configuration last: until then the directory is the VM it was.
            for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                path.rename(directory / path.name)
            return
        with contextlib.suppress(FileNotFoundError):
            directory.rmdir()
        staging.rename(directory)


def make_disk(path: Path, mib: int) -> None:
    """A sparse file with an empty ext4 on it. Raises VzreproError when the host cannot make one."""
    program = shutil.which("mke2fs", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if program is None:
        raise VzreproError(
            "mke2fs is not installed, so no disk can be made",
            hint="apt-get install -y e2fsprogs, or make a VM without a disk: --disk-mib 0",
        )
    with path.open("xb") as file:
        file.truncate(mib << 20)
    options = ["-q", "-F", "-t", "ext4", "-L", "vz-disk", "-m", "0", "-E", "root_owner=0:0,lazy_journal_init=1"]
    done = subprocess.run([program, *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise VzreproError(f"mke2fs could not make a disk of {mib} MiB", reason=done.stderr.strip())


def _content(directory: Path) -> list[str]:
    try:
        return sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise UsageError(f"{directory} is not a directory") from error


def _check_target(target: str) -> None:
    plain = target.startswith("/") and ".." not in target.split("/")
    if not plain or '"' in target or len(target.split()) != 1 or not target.isprintable():
        raise UsageError(
            f"{target!r} cannot be where the guest mounts something",
            reason="it goes on the kernel's command line: an absolute path without '..', blanks and quotes",
        )


def _config(settings: Settings) -> str:
    lines = [
        "# A VM of vzrepro: vzrepro vm boot DIR, vzrepro vm exec DIR -- CMD. Paths are relative to this directory.",
        "format = 1",
        'kernel = "vmlinux"',
        'initramfs = "initramfs.img"',
        'command-line = ""  # added to what vzrepro gives the kernel',
        f"cpus = {settings.cpus}",
        f"memory-mib = {settings.memory_mib}",
    ]
    if settings.disk_mib:
        lines += ["", "[disk]  # /dev/vda, ext4", f"path = {_text(DISK_FILE)}", f"target = {_text(DISK_TARGET)}"]
    for mount in settings.mounts:
        lines += ["", "[[mount]]", f"source = {_text(str(mount.source))}", f"target = {_text(mount.target)}"]
        lines += ["read-only = true"] if mount.read_only else []
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    """A TOML basic string: JSON's, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
