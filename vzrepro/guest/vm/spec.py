"""Says to an OCI runtime what a container is: its `config.json`, from an image and what the user wants of it.

Format: OCI runtime specification 1.0.2. Defaults (capabilities, masked paths, devices) are those that users of Docker
know; the network is the guest's own, so a container's ports are the guest's.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.guest.vm import seccomp
from vzrepro.guest.vm.layer import inside
from vzrepro.guest.vm.rootfs import Image

OCI_VERSION = "1.0.2"

INIT = "/dev/vz-init"
"""Where a container sees the program that becomes its command (`vz-oci-run init`)."""

_VOLUME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MAX_ACCOUNTS = 4 << 20
_CPU_PERIOD_US = 100_000
_OPEN_FILES = 1 << 20
_MAX_NAME, _MAX_PATH = 255, 4095  # what Linux takes

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


class ProgramNotExecutable(VzreproError):
    """What the image has by that name cannot be executed; the exit code is the one that shells have for it."""

    exit_code = 126


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
        source, _, target = text.removesuffix(":ro").removesuffix(":rw").rpartition(":")
        if not source or not _is_target(target) or "\0" in text:
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
class Volume:
    """A directory of the host that is known by its name and outlives containers, which a container sees at `target`."""

    name: str
    target: str
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Volume:
        """`NAME:DST[:ro]`. Raises UsageError."""
        read_only = text.endswith(":ro")
        name, _, target = text.removesuffix(":ro").removesuffix(":rw").rpartition(":")
        if not _VOLUME.fullmatch(name) or not _is_target(target):
            raise UsageError(
                f"{text!r} is no volume",
                reason="it is written NAME:DST or NAME:DST:ro: NAME is 1 to 64 letters, digits, `.`, `_` and `-`, the "
                "first a letter or digit, and DST an absolute path in the container",
                hint="for instance: --volume data:/var/lib/data; a directory by its path is given with --mount",
            )
        return cls(name, str(PurePosixPath(target)), read_only)


def _is_target(text: str) -> bool:
    return text.startswith("/") and ".." not in text.split("/") and "\0" not in text


def check_targets(shown: Sequence[Mount | Volume]) -> None:
    """Raises UsageError when two of a container's mounts and volumes have the same place in it."""
    targets = [one.target for one in shown]
    for target in targets:
        if targets.count(target) > 1:
            raise UsageError(f"two mounts or volumes are to be at {target}", hint="give each a place of its own")


@dataclass(frozen=True, slots=True)
class ContainerLimits:
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
        _check_text(text)
    if len(directory.encode()) > _MAX_PATH or any(len(part.encode()) > _MAX_NAME for part in directory.split("/")):
        raise UsageError(
            f"{directory[:80]}… cannot be the working directory",
            reason=f"a name has at most {_MAX_NAME} bytes, a path {_MAX_PATH}",
        )
    return Process(words, whole, directory, found, terminal)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{text!a} is not UTF-8", reason="what a container is told is text") from None


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
    container_id: str,
    root: Path,
    process: Process,
    mounts: Sequence[tuple[str, Mount]],
    limits: ContainerLimits,
    own: str,
    init: str,
    *,
    memcg: bool,
) -> dict[str, Any]:
    """The config.json of a container whose root directory is `rootfs` beside it, and on the host `root`, so far.

    `mounts` are the directories of the guest that the host's are at, and what they are for; `own` is the directory of
    the guest with the `resolv.conf`, `hosts` and `hostname` that the container sees in its /etc; `init` is the guest's
    file that it sees at `INIT`; `memcg` is whether the guest's kernel limits memory by cgroup, else its RAM does that
    alone. Raises UsageError where the image leaves no place for one of them.
    """
    memory = {"memory": {"limit": limits.memory_mib << 20}} if memcg else {}
    targets = [mount.target for _, mount in mounts]
    return {
        "ociVersion": OCI_VERSION,
        "process": process_document(process),
        "root": {"path": "rootfs", "readonly": False},
        "hostname": container_id,
        "mounts": [
            *_file_systems(),
            *_files(root, own, init, targets),
            *(_bind(source, _place(root, mount.target, targets), mount) for source, mount in mounts),
        ],
        "linux": {
            "cgroupsPath": f"/vz/{container_id}",
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                **memory,
                "cpu": {"quota": round(limits.cpus * _CPU_PERIOD_US), "period": _CPU_PERIOD_US},
                "pids": {"limit": limits.pids},
            },
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")],
            # What root's virtiofsd serves keeps the owners of the guest: a set-uid file would be root's on the host.
            "seccomp": seccomp.profile(set_uid=os.geteuid() != 0 or all(mount.read_only for _, mount in mounts)),
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


def _files(root: Path, own: str, init: str, targets: Sequence[str]) -> list[dict[str, Any]]:
    def bind(target: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": target, "type": "bind", "source": source, "options": ["bind", "rprivate", *options]}

    found = []
    for name in ("resolv.conf", "hosts", "hostname"):
        place = _place(root, f"/etc/{name}", targets)
        # A link to /dev/null says that the image wants none; what is mounted there is nobody's to hide.
        if not _is_below(place, _KERNEL):
            if (root / place[1:]).is_dir():
                raise UsageError(f"the image's /etc/{name} is a directory", hint="mount another one: --mount DIR:/etc")
            found.append(bind(place, f"{own}/{name}"))
    return [*found, bind(INIT, init, "ro")]


_KERNEL = ("/proc", "/dev", "/sys")


def _is_below(path: str, directories: Sequence[str]) -> bool:
    return any(PurePosixPath(path).is_relative_to(directory) for directory in directories)


def _place(root: Path, target: str, mounted: Sequence[str]) -> str:
    """Where `target` leads in the image, as mount points are made at paths without links; a link that leads nowhere is
    a place as well. What lies below one of the directories that are `mounted` is the guest's to find."""
    if _is_below(target, [one for one in mounted if one != target]):
        return target
    place = f"/{inside(root, target).relative_to(root).as_posix()}"
    _check_text(place)
    return place if place != "/." else target


def missing_directory(root: Path, process: Process, mounts: Sequence[Mount]) -> str | None:
    """The working directory of a container's own process that no layer of its image made: a path below the image's
    root, without links. None when it is there, or the kernel's to have.

    Raises UsageError when something else is in its place, or it is to be in a directory of the host that lacks it.
    """
    place = process.working_dir
    targets = [mount.target for mount in mounts]
    if not _is_below(place, [*_KERNEL, *targets]):
        place = _place(root, place, targets)
    if _is_below(place, _KERNEL):
        return None
    # Of mounts within mounts, the innermost has it.
    for mount in sorted(mounts, key=lambda mount: -len(mount.target)):
        if _is_below(place, [mount.target]):
            if not inside(mount.source, str(PurePosixPath(place).relative_to(mount.target))).is_dir():
                raise UsageError(
                    f"there is no {process.working_dir} to work in",
                    reason=f"{mount.source}, which is at {mount.target}, has no such directory",
                    hint="make it there, or name another one: --workdir /",
                )
            return None
    if (root / place[1:]).is_dir():
        return None
    here = root
    for part in PurePosixPath(place).parts[1:]:
        here /= part
        if here.exists() and not here.is_dir():
            raise UsageError(
                f"{process.working_dir} cannot be the working directory",
                reason=f"the image has a file at /{here.relative_to(root)}",
            )
    return place[1:]


def check_signal(text: str) -> None:
    """Raises UsageError for what the agent does not know as a signal: names with or without SIG, numbers, and
    `RTMIN+n` and `RTMAX-n` (signal(7))."""
    name = text.upper().removeprefix("SIG")
    real_time = re.fullmatch(r"RTM(?:IN(?:\+([0-9]{1,2}))?|AX(?:-([0-9]{1,2}))?)", name)
    if real_time is not None:
        known = int(real_time[1] or real_time[2] or 0) <= _REAL_TIME
    elif re.fullmatch("[0-9]{1,2}", text):
        known = 1 <= int(text) <= _LAST_SIGNAL
    else:
        known = f"SIG{name}" in signal.Signals.__members__
    if not known:
        raise UsageError(
            f"the image is to be stopped by {text!r}, which is no signal",
            reason="its config has this StopSignal",
            hint="build it with another one, such as SIGTERM or SIGRTMIN+3",
        )


_LAST_SIGNAL, _REAL_TIME = 64, 30


def _bind(source: str, target: str, mount: Mount) -> dict[str, Any]:
    options = ["rbind", "rprivate", "nosuid", "nodev", "ro" if mount.read_only else "rw"]
    return {"destination": target, "type": "bind", "source": source, "options": options}


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


def check_program(image: Image, process: Process, mounts: Sequence[Mount | Volume]) -> None:
    """See that the program is there and one for arm64, before a guest is booted for it.

    What lies below one of `mounts` is left to the guest. Raises ProgramNotFound, ProgramNotExecutable, UsageError.
    """
    word = process.arguments[0]
    if "/" in word:
        candidates = [PurePosixPath(process.working_dir, word)]
    else:
        candidates = [PurePosixPath("/", part, word) for part in process.env["PATH"].split(":")]
    found = None
    for candidate in candidates:
        if any(candidate.is_relative_to(mount.target) for mount in mounts):
            return None
        path = inside(image.root, str(candidate))
        mode = _mode(path)
        if stat.S_ISREG(mode) and mode & 0o111:
            return _check_machine(path, word)
        if found is None and mode and (stat.S_ISREG(mode) or "/" in word):
            what = "it is a directory" if stat.S_ISDIR(mode) else "it is no program: nobody may execute it"
            found = candidate, what
    if found is not None:
        raise ProgramNotExecutable(f"the image's {found[0]} cannot be executed", reason=found[1])
    where = word if "/" in word else f"{word} on its PATH, {process.env['PATH']}"
    raise ProgramNotFound(f"the image has no {where}", hint="see what it has with: … -- /bin/sh -c 'ls /bin'")


def _mode(path: Path) -> int:
    """Of what is at `path`; 0 when there is nothing, or nothing can be called so."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            raise
        return 0


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
