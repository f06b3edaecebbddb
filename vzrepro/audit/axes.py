"""What an audit varies: one record per axis, each a pure change of a `sandbox.Job`.

An axis changes what the sandbox's contract fixes or cannot hide (docs/sandbox.md), one thing at a time, and says how
it is seen from inside that it did: `audit-tools` (recipes/audit-tools) puts a small program before the command, which
prints one line about what it sees. An axis that did not take effect proves nothing.

An axis with `hold` is also noise: something that differs between any two builds. Held constant in two builds, it shows
whether it is what makes them differ.

    job = baseline(job, world)                 # the job as it is, observed
    for axis in ...: job = axis.vary(job, world, round)    # any of them, in the order of AXES
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from vzrepro import sandbox
from vzrepro.sandbox import Job

Observed = Mapping[str, str]
"""What a build saw before its command started: see recipes/audit-tools/vary.c."""

TOOLS_TARGET = "audit-tools"
PROCESS_IDS = "process-ids"

_PREFIX = "vzrepro-observed "
_PLATFORM = "linux/amd64"

# Names in a directory that is empty in the contract and that nothing looks into.
_VARY = "/dev/mqueue/vary"
_LOOK = "/dev/mqueue/look"
_HOLD = "/dev/mqueue/hold.so"
_SETTINGS = "/dev/mqueue/hold"
_PRELOAD = "/etc/ld.so.preload"

# linux/personality.h
_UNAME26 = 0x0020000
_ADDR_NO_RANDOMIZE = 0x0040000

# statfs(2), f_type
_FILE_SYSTEMS = {
    "1021994": "tmpfs",
    "ef53": "ext4",
    "9123683e": "btrfs",
    "58465342": "xfs",
    "2fc12fc1": "zfs",
    "794c7630": "overlayfs",
    "65735546": "fuse",
    "6a656a63": "virtiofs",
}

_DAY = 86400
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class World:
    """What the axes may use: the container engine, the directory of `audit-tools` (None: not there), the cores of one
    build, a private directory on a file system in memory (None: the host has none), and a time of day (seconds)
    before any of the builds."""

    runtime: sandbox.Runtime
    tools: Path | None
    cores: int
    scratch_shm: Path | None
    started: int = field(default_factory=lambda: int(time.time()))


def _nothing_missing(_world: World, _job: Job) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that a build's output must not depend on.

    `about` says what is varied, `applied` how, `proof` how it shows. `seen` picks from what was observed what
    the axis is about, as text for people; `differs` compares it without and with the axis. `vary` (None: can only be
    held) takes a job that `baseline` gave, and a round number: other rounds, other values. `hold` (None: is
    constant as it is) makes two builds of it equal in this. `version` counts up when the axis comes to mean
    something else.
    """

    name: str
    about: str
    applied: str
    proof: str
    seen: Callable[[Observed], str | None]
    vary: Callable[[Job, World, int], Job] | None
    missing: Callable[[World, Job], str | None] = _nothing_missing
    hold: Callable[[Job, World], Job] | None = None
    differs: Callable[[str, str], bool] = operator.ne
    version: int = 1

    def unavailable(self, world: World, job: Job) -> str | None:
        """Why this job cannot have the axis here; None when it can."""
        if job.platform != _PLATFORM:
            return f"it builds for {job.platform}, and the program that varies and observes is for {_PLATFORM}"
        if world.tools is None:
            return f"{TOOLS_TARGET} is not there (vzrepro realize {TOOLS_TARGET})"
        return self.missing(world, job)

    def took_effect(self, without: Observed, within: Observed) -> bool:
        """Whether a build with the axis saw something else than one without."""
        before, after = self.seen(without), self.seen(within)
        return before is not None and after is not None and self.differs(before, after)

    def was_held(self, one: Observed, other: Observed) -> bool:
        """Whether two builds with the axis held saw the same."""
        seen = self.seen(one)
        return seen is not None and seen == self.seen(other)


def observed(line: str) -> Observed | None:
    """What a line of a build's output says was observed; None for every other line."""
    if not line.startswith(_PREFIX):
        return None
    try:
        found = json.loads(line.removeprefix(_PREFIX))
    except ValueError:  # a builder's own line that looks alike
        return None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else None


def baseline(job: Job, world: World, pid: int | None = None) -> Job:
    """The job with nothing varied but observed: its command starts a moment later, nothing else changes for it.

    With `pid`, it gets that process id, for who will not apply process-ids: left to itself it is mostly the same one.
    """
    if world.tools is None or job.platform != _PLATFORM:
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


def _alternate(names: tuple[str, ...], count: int) -> str:
    return names[count % len(names)]


# --- why one cannot be --------------------------------------------------------------------------------------------


def _own(name: str) -> Callable[[World, Job], str | None]:
    def missing(_world: World, job: Job) -> str | None:
        return f"the recipe sets {name} itself" if name in job.env else None

    return missing


def _no_memory_directory(world: World, _job: Job) -> str | None:
    return None if world.scratch_shm is not None else "this host has no file system in memory (/dev/shm)"


def _no_order(world: World, job: Job) -> str | None:
    if world.scratch_shm is None:
        return _no_memory_directory(world, job)
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


def _no_inputs(_world: World, job: Job) -> str | None:
    return None if job.inputs else "it has no inputs"


def _no_other_shell(_world: World, job: Job) -> str | None:
    if not sandbox.has_image(job.image) or _other_shell(job) is not None:  # not loaded yet: nobody can tell
        return None
    return "its image has no second shell (/bin/bash, /bin/dash)"


def _no_other_runtime(world: World, _job: Job) -> str | None:
    if _other_runtimes(world):
        return None
    return (
        f"the engine has no other OCI runtime than {world.runtime.default_runtime or 'its own'}; to add one: "
        'apt-get install crun, then {"runtimes": {"crun": {"path": "/usr/bin/crun"}}} in /etc/docker/daemon.json, then '
        "kill -HUP $(pidof dockerd)"
    )


# --- the axes -----------------------------------------------------------------------------------------------------


def _host_name(job: Job, _world: World, count: int) -> Job:
    return _around(job, hostname=f"other-{count + 1}", domainname=f"net{count + 1}.example")


def _user(job: Job, _world: World, count: int) -> Job:
    """Another uid and gid, and another name for them: a user without a name would be another thing yet."""
    uid, gid = 2001 + count, 3001 + count
    names = {
        "/etc/passwd": f"other{count + 1}:x:{uid}:{gid}::/nonexistent:/bin/sh\n",
        "/etc/group": f"other{count + 1}:x:{gid}:\n",
    }
    files = {path: sandbox.image_file(job.image, path) for path in names}
    known = {path: content + names[path].encode() for path, content in files.items() if content is not None}
    return replace(_files(job, known), user=(uid, gid))


def _locale(job: Job, world: World, count: int) -> Job:
    if count % 2:
        return _variable(job, "LC_ALL", "C")
    assert world.tools is not None
    return _variable(_files(job, {"/usr/lib/locale/xx_XX.utf8": world.tools / "locale"}), "LC_ALL", "xx_XX.UTF-8")


def _home(job: Job, _world: World, count: int) -> Job:
    home = f"/tmp/home-{count + 1}"
    return _option(_variable(job, "HOME", home), f"--mkdir={home}")


def _environment(job: Job, _world: World, count: int) -> Job:
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


def _cores(job: Job, world: World, count: int) -> Job:
    """One job more, and one processor less where there are two; which one is another in every build."""
    job = replace(job, cores=job.cores + 1 + count)
    cpus = world.runtime.cpus
    left_out = (zlib.crc32(job.label.encode()) + count) % cpus
    return _around(job, cpus=",".join(str(cpu) for cpu in range(cpus) if cpu != left_out)) if cpus > 1 else job


def _one_core(job: Job, world: World) -> Job:
    return _around(replace(job, cores=1), cpus=str(zlib.crc32(job.label.encode()) % world.runtime.cpus))


def _memory(job: Job, world: World, count: int) -> Job:
    """/proc/meminfo as a machine with less memory has it; the limit, which cannot be seen, as if it had more."""
    total = world.runtime.memory_bytes * 2 // (3 + count) // 1024
    lines = {"MemTotal": total, "MemFree": total // 2, "MemAvailable": total * 3 // 4, "SwapTotal": 0, "SwapFree": 0}
    text = "".join(f"{name + ':':16}{kilobytes:8} kB\n" for name, kilobytes in lines.items())
    return _more_memory(_files(job, {"/proc/meminfo": text.encode()}), _GIB)


def _file_system(job: Job, world: World, _count: int) -> Job:
    return _more_memory(_around(job, build_at=_in_memory(job, world, "build")), 8 * _GIB)


def _directory_order(job: Job, world: World, count: int) -> Job:
    # Neighbouring seeds shuffle two names alike.
    return _around(job, inputs_at=_in_memory(job, world, "in"), order=1 + 4 * count)


def _clock(job: Job, world: World, count: int) -> Job:
    seconds = (400 + 37 * count) * _DAY + 5 * 3600
    return _held(job, world, f"shift {seconds} {world.started}")


def _frozen_clock(job: Job, world: World) -> Job:
    return _held(job, world, f"freeze {job.source_date_epoch + _DAY} {world.started}")


def _other_shell(job: Job) -> bytes | None:
    current = sandbox.image_file(job.image, "/bin/sh")
    found = (sandbox.image_file(job.image, path) for path in ("/bin/bash", "/bin/dash"))
    return next((shell for shell in found if shell is not None and shell != current), None)


def _shell(job: Job, _world: World, _count: int) -> Job:
    shell = _other_shell(job)
    return job if shell is None else _files(job, {"/bin/sh": shell})


def _other_runtimes(world: World) -> list[str]:
    # Docker also names runc by its containerd shims.
    own = ("io.containerd.runc.", "io.containerd.runtime.")
    default = world.runtime.default_runtime
    return [name for name in world.runtime.runtimes if name != default and not name.startswith(own)]


def _runtime(job: Job, world: World, count: int) -> Job:
    others = _other_runtimes(world)
    return _around(job, runtime=others[count % len(others)])


def _constant_randomness(job: Job, world: World) -> Job:
    # More than any build takes for seeds; a file ends where a device would not.
    constant = hashlib.shake_256(b"vzrepro").digest(1 << 20)
    return _files(_held(job, world, "random"), {"/dev/urandom": constant, "/dev/random": constant})


def _fresh_inodes(job: Job, _world: World) -> Job:
    return _more_memory(_around(job, in_memory=True), 8 * _GIB)


def _key(name: str) -> Callable[[Observed], str | None]:
    return lambda seen: seen.get(name)


def _format(template: str) -> Callable[[Observed], str | None]:
    def text(seen: Observed) -> str | None:
        try:
            return template.format_map(seen)
        except KeyError:
            return None

    return text


def _time_of_day(seen: Observed) -> str | None:
    if "time" not in seen:
        return None
    seconds, _, nanoseconds = seen["time"].partition(".")
    return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds}Z"


def _other_day(one: str, other: str) -> bool:
    days = [datetime.fromisoformat(text[:19]) for text in (one, other)]
    return abs((days[0] - days[1]).total_seconds()) > _DAY / 2


def _addresses(seen: Observed) -> str | None:
    if "stack" not in seen or "personality" not in seen:
        return None
    fixed = int(seen["personality"], 16) & _ADDR_NO_RANDOMIZE
    return f"{'fixed' if fixed else 'random'}, stack at {seen['stack']}"


def _file_system_of(name: str, template: str) -> Callable[[Observed], str | None]:
    def text(seen: Observed) -> str | None:
        kind = seen.get(name)
        return kind and template.format_map({**seen, "fs": _FILE_SYSTEMS.get(kind, kind)})

    return text


AXES: tuple[Axis, ...] = (
    Axis(
        "build-path",
        about="the directory in which the build runs",
        applied="/build is mounted at a longer path, too, and the command starts there",
        proof="the working directory",
        seen=_key("cwd"),
        vary=lambda job, _world, count: _around(job, workdir=f"/srv/other/{'deeper/' * (count + 1)}build"),
    ),
    Axis(
        "host-name",
        about="the name and domain of the machine",
        applied="--hostname, --domainname, /etc/hostname, /etc/hosts",
        proof="uname",
        seen=_format("{host} in {domain}"),
        vary=_host_name,
    ),
    Axis(
        "user",
        about="who builds: uid, gid and their names",
        applied="--user, and lines in /etc/passwd and /etc/group",
        proof="getuid, getgid",
        seen=_format("{uid}:{gid}"),
        vary=_user,
    ),
    Axis(
        "umask",
        about="the permissions that new files do not get",
        applied="umask before the command",
        proof="umask",
        seen=_key("umask"),
        vary=lambda job, _world, count: _around(job, umask=(0o077, 0o002, 0o027)[count % 3]),
    ),
    Axis(
        "time-zone",
        about="the time zone: hours away, so that the date is another one, too",
        applied="TZ",
        proof="TZ",
        seen=_key("tz"),
        vary=lambda job, _world, count: _variable(job, "TZ", _alternate(("EAST-14", "WEST+11:30", "HALF-5:45"), count)),
        missing=_own("TZ"),
    ),
    Axis(
        "locale",
        about="language, sorting, number format and encoding",
        applied="LC_ALL: a locale of our own, which sorts and writes numbers and dates as people do, not as C does",
        proof="LC_ALL, and the encoding and the number 1.5 in a dynamic program",
        seen=_format("{locale}: {codeset}, {decimal}"),
        vary=_locale,
        missing=_own("LC_ALL"),
        differs=lambda one, other: one.partition(":")[2] != other.partition(":")[2],
    ),
    Axis(
        "home",
        about="the home directory",
        applied="HOME, an empty directory in /tmp",
        proof="HOME",
        seen=_key("home"),
        vary=_home,
        missing=_own("HOME"),
    ),
    Axis(
        "path",
        about="the directories that programs are looked for in",
        applied="PATH, with one more directory, which does not exist, at its end",
        proof="PATH",
        seen=_key("path"),
        vary=lambda job, _world, count: _variable(job, "PATH", f"{job.environment['PATH']}:/opt/other-{count + 1}/bin"),
    ),
    Axis(
        "environment",
        about="other variables in the environment",
        applied="seven more that users and CI systems have, such as USER, TERM, CI, BUILD_NUMBER",
        proof="the number of variables",
        seen=lambda seen: f"{seen['environment'].partition(':')[0]} variables" if "environment" in seen else None,
        vary=_environment,
    ),
    Axis(
        "cores",
        about="how many jobs run at once, and on how many processors",
        applied="VZ_CORES one higher, --cpuset-cpus one fewer; held: one of each",
        proof="VZ_CORES and sched_getaffinity",
        seen=_format("VZ_CORES={cores} on processors {cpus}"),
        vary=_cores,
        hold=_one_core,
    ),
    Axis(
        "memory",
        about="how much memory the machine has",
        applied="/proc/meminfo says less, --memory gives more",
        proof="MemTotal in /proc/meminfo",
        seen=_key("memory"),
        vary=_memory,
    ),
    Axis(
        "file-system",
        about="the file system of /build",
        applied="/build is a directory in the host's memory",
        proof="statfs",
        seen=_file_system_of("build", "{fs}"),
        vary=_file_system,
        missing=_no_memory_directory,
    ),
    Axis(
        "directory-order",
        about="the order in which directories list the inputs' files",
        applied="/in is made in another order, on a file system in the host's memory",
        proof="a hash over the names as readdir gives them",
        seen=_format("{order} over {entries} names"),
        vary=_directory_order,
        missing=_no_order,
    ),
    Axis(
        "kernel-version",
        about="the version of the kernel",
        applied="personality UNAME26: the release is 2.6.x",
        proof="uname",
        seen=_key("release"),
        vary=lambda job, _world, _count: _personality(job, _UNAME26),
    ),
    Axis(
        "address-layout",
        about="where the kernel puts stacks, heaps and libraries",
        applied="personality ADDR_NO_RANDOMIZE, held: the same",
        proof="the personality, and the address of a variable on the stack",
        seen=_addresses,
        vary=lambda job, _world, _count: _personality(job, _ADDR_NO_RANDOMIZE),
        hold=lambda job, _world: _personality(job, _ADDR_NO_RANDOMIZE),
        differs=lambda one, other: one.partition(",")[0] != other.partition(",")[0],
    ),
    Axis(
        "clock",
        about="the time of day, and the times of files that the build makes",
        applied="a preloaded library: more than a year later; held: it stands still",
        proof="clock_gettime in a dynamic program",
        seen=_time_of_day,
        vary=_clock,
        hold=_frozen_clock,
        differs=_other_day,
    ),
    Axis(
        "shell",
        about="which shell /bin/sh is",
        applied="bash (or dash, if it was bash) of the same image is mounted over it",
        proof="the size of /bin/sh",
        seen=lambda seen: f"{seen['shell']} bytes" if "shell" in seen else None,
        vary=_shell,
        missing=_no_other_shell,
    ),
    Axis(
        "input-topology",
        about="whether the inputs' files are hard links",
        applied="they are copied",
        proof="the link count of one",
        seen=_key("links"),
        vary=lambda job, _world, _count: _around(job, staging="copy"),
        missing=_no_inputs,
    ),
    Axis(
        PROCESS_IDS,
        about="the numbers that processes get",
        applied="those up to 2,000 are used up before the command; held: up to 500, whatever the engine has used",
        proof="getpid",
        seen=_key("pid"),
        vary=lambda job, _world, count: _option(job, f"--pid={2000 + 500 * count}"),
        hold=lambda job, _world: _option(job, "--pid=500"),
        differs=lambda one, other: int(other) - int(one) > 900,
    ),
    Axis(
        "runtime",
        about="the program that makes the container",
        applied="--runtime",
        proof="a hash over the mounts that it makes by itself",
        seen=_key("mounts"),
        vary=_runtime,
        missing=_no_other_runtime,
    ),
    Axis(
        "randomness",
        about="random numbers",
        applied="held: a preloaded library gives the same ones, /dev/random and /dev/urandom are a file",
        proof="getrandom, /dev/urandom and mkstemp in a dynamic program",
        seen=_format("{random}, {urandom}, {temporary}"),
        vary=None,
        hold=_constant_randomness,
    ),
    Axis(
        "inodes",
        about="inode numbers",
        applied="held: /build and /out are new tmpfs file systems",
        proof="the inode number of /build",
        seen=_file_system_of("build", "{inode} on {fs}"),
        vary=None,
        hold=_fresh_inodes,
    ),
)
"""All axes, in the order in which they are applied and shown."""
