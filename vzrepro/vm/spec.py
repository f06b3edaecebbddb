"""Says to an OCI runtime what a container is: its `config.json`, from an image and what the user wants of it.

Format: OCI runtime specification 1.0.2. Defaults (capabilities, masked paths, devices) are those that users of Docker
know; the network is the guest's own, so a container's ports are the guest's.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vzrepro.errors import UsageError, VzreproError
from vzrepro.vm import seccomp
from vzrepro.vm.layer import inside
from vzrepro.vm.rootfs import Image

OCI_VERSION = "1.0.2"

INIT = "/dev/vz-init"
"""Where a container sees the program that becomes its command (`vz-oci-run init`)."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_ACCOUNTS = 4 << 20
_CPU_PERIOD_US = 100_000
_OPEN_FILES = 1 << 20

# Without MKNOD: our youki is built without its device controller, so a node, once made, would open the guest's disks.
_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP SETUID "
        "SYS_CHROOT"
    ).split()
]
_MASKED = [
    *(
        f"/proc/{name}"
        for name in "acpi asound interrupts kcore keys latency_stats sched_debug scsi timer_list".split()
    ),
    *("/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware"),
]
_READ_ONLY = [f"/proc/{name}" for name in "bus fs irq sys sysrq-trigger".split()]

# ELF header: magic, class at 4, byte order at 5, machine at 18.
_ELF, _AARCH64 = b"\x7fELF", 183
_MACHINES = {3: "x86", 40: "32-bit ARM", 62: "x86-64", 183: "arm64", 243: "RISC-V"}


class ProgramNotFound(VzreproError):
    """The image has no such program; the exit code is the one that shells have for it."""

    exit_code = 127


@dataclass(frozen=True, slots=True)
class User:
    """Who a process runs as, by number, and the home directory of that user."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    home: str = "/"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a container: words, environment, working directory, user, and whether it has a terminal."""

    arguments: tuple[str, ...]
    env: Mapping[str, str]
    working_dir: str
    user: User
    terminal: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory of the host that a container sees at `target`."""

    source: Path
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Mount:
        """`SRC:DST[:ro]`. Raises UsageError when it is not that, or the source is no directory."""
        read_only = text.endswith(":ro")
        source, colon, target = text.removesuffix(":ro").removesuffix(":rw").rpartition(":")
        if not (colon and source) or not target.startswith("/") or ".." in target.split("/") or "\0" in text:
            raise UsageError(
                f"{text!r} is no mount",
                reason="it is written SRC:DST or SRC:DST:ro, DST being an absolute path in the container",
                hint="for instance: --mount ./site:/srv/www:ro",
            )
        if not Path(source).is_dir():
            what = "is not a directory" if Path(source).exists() else "does not exist"
            raise UsageError(f"{source} {what}, so it cannot be mounted", hint="only directories can be shared")
        return cls(Path(source).resolve(), str(PurePosixPath(target)), read_only)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use: memory in MiB, processors (fractions are fine), processes and threads."""

    memory_mib: int = 512
    cpus: float = 1.0
    pids: int = 1024


def process(
    image: Image,
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    working_dir: str | None = None,
    user: str | None = None,
    terminal: bool = False,
    inherited: Mapping[str, str] | None = None,
) -> Process:
    """The process that `command` means in a container of `image`; without one, what the image names.

    `env` wins over the image's environment, or over `inherited` in its place. Raises UsageError for an image that names
    no command, a user it does not have, a NUL byte.
    """
    words = (*image.config.entrypoint, *(command or image.config.cmd)) if inherited is None else tuple(command)
    if not words:
        raise UsageError("the image names no command to run", hint="give one: … -- CMD ARGUMENT…")
    found = user_of(image.root, image.config.user if user is None else user)
    base = image.config.env if inherited is None else inherited
    whole = {"PATH": _PATH, "HOME": found.home, **({"TERM": "xterm"} if terminal else {}), **base, **env}
    directory = str(PurePosixPath("/", working_dir or image.config.working_dir))
    for text in (*words, *whole, *whole.values(), directory):
        if "\0" in text:
            raise UsageError(f"{text!r} has a NUL byte, which no program can be given")
    return Process(words, whole, directory, found, terminal)


def process_document(process: Process) -> dict[str, Any]:
    """The `process` of a config.json, which is also what a runtime's `exec --process` reads."""
    # Root has them; another user may gain them by programs that are not (no new privileges), so by none.
    effective = _CAPABILITIES if process.user.uid == 0 else []
    return {
        "terminal": process.terminal,
        "user": {"uid": process.user.uid, "gid": process.user.gid, "additionalGids": list(process.user.groups)},
        "args": [INIT, "init", *process.arguments],
        "env": [f"{name}={value}" for name, value in process.env.items()],
        "cwd": process.working_dir,
        "capabilities": {
            "bounding": _CAPABILITIES,
            "effective": effective,
            "permitted": effective,
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": _OPEN_FILES, "hard": _OPEN_FILES}],
        "noNewPrivileges": True,
    }


def document(
    container_id: str, process: Process, mounts: Sequence[tuple[str, Mount]], limits: Limits, own: str, init: str
) -> dict[str, Any]:
    """The config.json of a container whose root directory is `rootfs` beside it.

    `mounts` are the directories of the guest that the host's are at, and what they are for; `own` is the directory of
    the guest with the `resolv.conf`, `hosts` and `hostname` that the container sees in its /etc; `init` is the guest's
    file that it sees at `INIT`.
    """
    return {
        "ociVersion": OCI_VERSION,
        "process": process_document(process),
        "root": {"path": "rootfs", "readonly": False},
        "hostname": container_id,
        "mounts": [*_file_systems(), *_files(own, init), *(_bind(source, mount) for source, mount in mounts)],
        "linux": {
            "cgroupsPath": f"/vz/{container_id}",
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": limits.memory_mib << 20},
                "cpu": {"quota": round(limits.cpus * _CPU_PERIOD_US), "period": _CPU_PERIOD_US},
                "pids": {"limit": limits.pids},
            },
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")],
            "seccomp": seccomp.profile(),
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def _file_systems() -> list[dict[str, Any]]:
    def mount(destination: str, kind: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": destination, "type": kind, "source": source, "options": list(options)}

    safe = ("nosuid", "noexec", "nodev")
    return [
        mount("/proc", "proc", "proc", *safe),
        mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", "size=65536k"),
        mount("/dev/mqueue", "mqueue", "mqueue", *safe),
        mount("/sys", "sysfs", "sysfs", *safe, "ro"),
        mount("/sys/fs/cgroup", "cgroup", "cgroup", *safe, "relatime", "ro"),
    ]


def _files(own: str, init: str) -> list[dict[str, Any]]:
    def bind(target: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": "bind", "source": source, "options": ["bind", "rprivate", *options]}

    return [
        *(bind(f"/etc/{name}", f"{own}/{name}") for name in ("resolv.conf", "hosts", "hostname")),
        bind(INIT, init, "ro"),
    ]


def _bind(source: str, mount: Mount) -> dict[str, Any]:
    options = ["rbind", "rprivate", "nosuid", "nodev", "ro" if mount.read_only else "rw"]
    return {"destination": mount.target, "type": "bind", "source": source, "options": options}


# --- what the image itself says ------------------------------------------------------------------------------------


def user_of(root: Path, text: str) -> User:
    """`[USER][:GROUP]`, names or numbers, by the image's own /etc/passwd and /etc/group; root when empty.

    A number needs no entry. Raises UsageError for a name that is not there.
    """
    name, _, group = text.partition(":")
    accounts = _accounts(root, "etc/passwd", 7)
    groups = _accounts(root, "etc/group", 4)
    account = next((fields for fields in accounts if name in (fields[0], fields[2])), None)
    if not name:
        account = next((fields for fields in accounts if fields[2] == "0"), None)
    if account is not None:
        uid, gid, home = _number(account[2], text), _number(account[3], text), account[5] or "/"
    elif not name or name.isdigit():
        uid, gid, home = _number(name or "0", text), 0, "/"
    else:
        raise UsageError(f"the image has no user {name!r}", hint="name one of its /etc/passwd, or a number")
    if group:
        found = next((fields[2] for fields in groups if group in (fields[0], fields[2])), group)
        if not found.isdigit():
            raise UsageError(f"the image has no group {group!r}", hint="name one of its /etc/group, or a number")
        return User(uid, _number(found, text), (), home)
    member = account[0] if account is not None else None
    others = {_number(fields[2], text) for fields in groups if member in fields[3].split(",")}
    return User(uid, gid, tuple(sorted(others - {gid})), home)


def _accounts(root: Path, name: str, count: int) -> list[list[str]]:
    path = inside(root, name)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return []
        with path.open("rb") as file:
            text = file.read(_MAX_ACCOUNTS).decode("utf-8", "replace")
    except OSError:
        return []
    return [fields for line in text.splitlines() if len(fields := line.split(":")) == count]


def _number(text: str, what: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > 0xFFFF_FFFE:
        raise UsageError(f"{what!r} does not lead to a user or group number", reason=f"it leads to {text!r}")
    return int(text)


def check_program(image: Image, process: Process, mounts: Sequence[Mount]) -> None:
    """See that the program is there and one for arm64, before a guest is booted for it.

    What lies below one of `mounts` is left to the guest. Raises ProgramNotFound, UsageError.
    """
    word = process.arguments[0]
    if "/" in word:
        candidates = [PurePosixPath(process.working_dir, word)]
    else:
        candidates = [PurePosixPath("/", part, word) for part in process.env["PATH"].split(":")]
    for candidate in candidates:
        if any(candidate.is_relative_to(mount.target) for mount in mounts):
            return None
        path = inside(image.root, str(candidate))
        if path.is_file() and path.stat().st_mode & 0o111:
            return _check_machine(path, word)
    where = word if "/" in word else f"{word} on its PATH, {process.env['PATH']}"
    raise ProgramNotFound(f"the image has no {where}", hint="see what it has with: … -- /bin/sh -c 'ls /bin'")


def _check_machine(path: Path, word: str) -> None:
    if not os.access(path, os.R_OK):
        return
    with path.open("rb") as file:
        header = file.read(20)
    if len(header) < 20 or not header.startswith(_ELF):
        return  # a script
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    if machine != _AARCH64:
        raise UsageError(
            f"{word} is a program for {_MACHINES.get(machine, f'ELF machine {machine}')}, not for arm64",
            reason=f"the guest is an arm64 Linux and cannot run {path}",
            hint="get the image for that platform, e.g. docker pull --platform linux/arm64",
        )
