"""How an axis changes a job: pure functions, each changing one thing, and why a job may not have an axis here.

What is named like an axis is its `vary`: it takes a job that `baseline` gave and a round number, and other rounds get
other values.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vzrepro import sandbox
from vzrepro.proof.audit.observed import ADDR_NO_RANDOMIZE
from vzrepro.sandbox import Job

PLATFORM = "linux/amd64"
"""What the program that varies and observes is built for."""

# Names in a directory that is empty in the contract and that nothing looks into.
_VARY = "/dev/mqueue/vary"
_LOOK = "/dev/mqueue/look"
_HOLD = "/dev/mqueue/hold.so"
_SETTINGS = "/dev/mqueue/hold"
_PRELOAD = "/etc/ld.so.preload"

_UNAME26 = 0x0020000  # linux/personality.h

_DAY = 86400
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class World:
    """What the axes may use: the container engine, the directory of `audit-tools` (None: not there), the cores of one
    build, a private directory on a file system in memory (None: the host has none), why the engine does not mount the
    host's files (None: it does), and a time of day (seconds) before any of the builds."""

    runtime: sandbox.Runtime
    tools: Path | None
    cores: int
    scratch_shm: Path | None
    unmounted: str | None = None
    started: int = field(default_factory=lambda: int(time.time()))


def baseline(job: Job, world: World, pid: int | None = None) -> Job:
    """The job with nothing varied but observed: its command starts a moment later, nothing else changes for it.

    With `pid`, it gets that process id, for who will not apply process-ids: left to itself it is mostly the same one.
    """
    if world.tools is None or job.platform != PLATFORM:
        return job
    job = _files(job, {_VARY: world.tools / "vary", _LOOK: world.tools / "look"})
    job = _around(job, prefix=(_VARY, f"--look={_LOOK}", "--"))
    return job if pid is None else _option(job, f"--pid={pid}")


# --- how a job is changed -------------------------------------------------------------------------------------------


def _around(job: Job, **changes: object) -> Job:
    return replace(job, surroundings=replace(job.surroundings, **changes))  # type: ignore[arg-type]


def _files(job: Job, files: Mapping[str, Path | bytes]) -> Job:
    return _around(job, files={**job.surroundings.files, **files})


def _option(job: Job, option: str) -> Job:
    program, *rest = job.surroundings.prefix
    return _around(job, prefix=(program, option, *rest))


def _variable(job: Job, name: str, value: str) -> Job:
    return replace(job, env={**job.env, name: value})


def _personality(job: Job, flag: int) -> Job:
    job = _around(job, personality=job.surroundings.personality | flag)
    return _option(job, f"--personality={flag:#x}")


def _held(job: Job, world: World, setting: str) -> Job:
    assert world.tools is not None
    settings = job.surroundings.files.get(_SETTINGS, b"")
    assert isinstance(settings, bytes)
    own: dict[str, Path | bytes] = {
        _HOLD: world.tools / "hold.so",
        _PRELOAD: f"{_HOLD}\n".encode(),
        _SETTINGS: settings + f"{setting}\n".encode(),
    }
    return _files(job, own)


def _in_memory(job: Job, world: World, name: str) -> Path:
    """A directory in the host's memory that belongs to this job."""
    assert world.scratch_shm is not None
    return world.scratch_shm / hashlib.sha256(bytes(job.scratch)).hexdigest()[:16] / name


def _more_memory(job: Job, extra: int) -> Job:
    """Files in memory count as the build's memory."""
    return job if job.memory_bytes is None else replace(job, memory_bytes=job.memory_bytes + extra)


# --- why one cannot be --------------------------------------------------------------------------------------------


def nothing_missing(_world: World, _job: Job) -> str | None:
    return None


def set_by_recipe(name: str) -> Callable[[World, Job], str | None]:
    def missing(_world: World, job: Job) -> str | None:
        return f"the recipe sets {name} itself" if name in job.env else None

    return missing


def no_memory_directory(world: World, _job: Job) -> str | None:
    if world.unmounted is not None:
        return f"the container engine mounts no directory of this host: {world.unmounted}"
    return None if world.scratch_shm is not None else "this host has no file system in memory (/dev/shm)"


def no_order(world: World, job: Job) -> str | None:
    if (missing := no_memory_directory(world, job)) is not None:
        return missing
    assert world.scratch_shm is not None
    several, size = len(job.inputs) > 1, 0
    for source in job.inputs.values():
        for parent, folders, files in os.walk(source):
            several = several or len(folders) + len(files) > 1
            size += sum((Path(parent) / name).lstat().st_size for name in files)
    if not several:
        return "no directory below /in has two entries"
    room = os.statvfs(world.scratch_shm)
    if size > room.f_bavail * room.f_frsize // 2:
        return f"a copy of its inputs, {size / 2**20:.0f} MiB, is too much for the memory behind {world.scratch_shm}"
    return None


def no_inputs(_world: World, job: Job) -> str | None:
    return None if job.inputs else "it has no inputs"


def no_other_shell(_world: World, job: Job) -> str | None:
    if not sandbox.has_image(job.image) or _other_shell(job) is not None:  # not loaded yet: nobody can tell
        return None
    return "its image has no second shell (/bin/bash, /bin/dash)"


def no_other_runtime(world: World, _job: Job) -> str | None:
    if _other_runtimes(world):
        return None
    return (
        f"the engine has no other OCI runtime than {world.runtime.default_runtime or 'its own'}; to add one: "
        'apt-get install crun, then {"runtimes": {"crun": {"path": "/usr/bin/crun"}}} in /etc/docker/daemon.json, then '
        "kill -HUP $(pidof dockerd)"
    )


# --- what axes do -------------------------------------------------------------------------------------------------


def build_path(job: Job, _world: World, count: int) -> Job:
    return _around(job, workdir=f"/srv/other/{'deeper/' * (count + 1)}build")


def host_name(job: Job, _world: World, count: int) -> Job:
    return _around(job, hostname=f"other-{count + 1}", domainname=f"net{count + 1}.example")


def user(job: Job, _world: World, count: int) -> Job:
    """Another uid and gid, and another name for them: a user without a name would be another thing yet."""
    uid, gid = 2001 + count, 3001 + count
    names = {
        "/etc/passwd": f"other{count + 1}:x:{uid}:{gid}::/nonexistent:/bin/sh\n",
        "/etc/group": f"other{count + 1}:x:{gid}:\n",
    }
    files = {path: sandbox.image_file(job.image, path) for path in names}
    known = {path: content + names[path].encode() for path, content in files.items() if content is not None}
    return replace(_files(job, known), user=(uid, gid))


def umask(job: Job, _world: World, count: int) -> Job:
    return _around(job, umask=(0o077, 0o002, 0o027)[count % 3])


def time_zone(job: Job, _world: World, count: int) -> Job:
    return _variable(job, "TZ", ("EAST-14", "WEST+11:30", "HALF-5:45")[count % 3])


def locale(job: Job, world: World, count: int) -> Job:
    if count % 2:
        return _variable(job, "LC_ALL", "C")
    assert world.tools is not None
    return _variable(_files(job, {"/usr/lib/locale/xx_XX.utf8": world.tools / "locale"}), "LC_ALL", "xx_XX.UTF-8")


def home(job: Job, _world: World, count: int) -> Job:
    home = f"/tmp/home-{count + 1}"
    return _option(_variable(job, "HOME", home), f"--mkdir={home}")


def path(job: Job, _world: World, count: int) -> Job:
    return _variable(job, "PATH", f"{job.environment['PATH']}:/opt/other-{count + 1}/bin")


def environment(job: Job, _world: World, count: int) -> Job:
    other = {
        "USER": f"other{count + 1}",
        "LOGNAME": f"other{count + 1}",
        "EMAIL": f"other{count + 1}@example.org",
        "TERM": "xterm-256color",
        "COLUMNS": str(211 + count),
        "CI": "true",
        "BUILD_NUMBER": str(4711 + count),
    }
    return replace(job, env={**other, **job.env})


def cores(job: Job, world: World, count: int) -> Job:
    """One job more, and one processor less where there are two; which one is another in every build."""
    job = replace(job, cores=job.cores + 1 + count)
    cpus = world.runtime.cpus
    left_out = (zlib.crc32(job.label.encode()) + count) % cpus
    return _around(job, cpus=",".join(str(cpu) for cpu in range(cpus) if cpu != left_out)) if cpus > 1 else job


def one_core(job: Job, world: World) -> Job:
    return _around(replace(job, cores=1), cpus=str(zlib.crc32(job.label.encode()) % world.runtime.cpus))


def memory(job: Job, world: World, count: int) -> Job:
    """/proc/meminfo as a machine with less memory has it; the limit, which cannot be seen, as if it had more."""
    total = world.runtime.memory_bytes * 2 // (3 + count) // 1024
    lines = {"MemTotal": total, "MemFree": total // 2, "MemAvailable": total * 3 // 4, "SwapTotal": 0, "SwapFree": 0}
    text = "".join(f"{name + ':':16}{kilobytes:8} kB\n" for name, kilobytes in lines.items())
    return _more_memory(_files(job, {"/proc/meminfo": text.encode()}), _GIB)


def file_system(job: Job, world: World, _count: int) -> Job:
    return _more_memory(_around(job, build_at=_in_memory(job, world, "build")), 8 * _GIB)


def directory_order(job: Job, world: World, count: int) -> Job:
    # Neighbouring seeds shuffle two names alike.
    return _around(job, inputs_at=_in_memory(job, world, "in"), order=1 + 4 * count)


def kernel_version(job: Job, _world: World, _count: int) -> Job:
    return _personality(job, _UNAME26)


def fixed_addresses(job: Job, _world: World) -> Job:
    return _personality(job, ADDR_NO_RANDOMIZE)


def clock(job: Job, world: World, count: int) -> Job:
    seconds = (400 + 37 * count) * _DAY + 5 * 3600
    return _held(job, world, f"shift {seconds} {world.started}")


def frozen_clock(job: Job, world: World) -> Job:
    return _held(job, world, f"freeze {job.source_date_epoch + _DAY} {world.started}")


def _other_shell(job: Job) -> bytes | None:
    current = sandbox.image_file(job.image, "/bin/sh")
    found = (sandbox.image_file(job.image, path) for path in ("/bin/bash", "/bin/dash"))
    return next((shell for shell in found if shell is not None and shell != current), None)


def shell(job: Job, _world: World, _count: int) -> Job:
    shell = _other_shell(job)
    return job if shell is None else _files(job, {"/bin/sh": shell})


def input_topology(job: Job, _world: World, _count: int) -> Job:
    return _around(job, staging="copy")


def process_ids(job: Job, _world: World, count: int) -> Job:
    return _option(job, f"--pid={2000 + 500 * count}")


def same_process_ids(job: Job, _world: World) -> Job:
    return _option(job, "--pid=500")


def _other_runtimes(world: World) -> list[str]:
    # Docker also names runc by its containerd shims.
    own = ("io.containerd.runc.", "io.containerd.runtime.")
    default = world.runtime.default_runtime
    return [name for name in world.runtime.runtimes if name != default and not name.startswith(own)]


def runtime(job: Job, world: World, count: int) -> Job:
    others = _other_runtimes(world)
    return _around(job, runtime=others[count % len(others)])


def constant_randomness(job: Job, world: World) -> Job:
    # More than any build takes for seeds; a file ends where a device would not.
    constant = hashlib.shake_256(b"vzrepro").digest(1 << 20)
    return _files(_held(job, world, "random"), {"/dev/urandom": constant, "/dev/random": constant})


def fresh_inodes(job: Job, _world: World) -> Job:
    return _more_memory(_around(job, in_memory=True), 8 * _GIB)
