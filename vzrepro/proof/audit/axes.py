"""What an audit varies: one record per axis, each a pure change of a `sandbox.Job`.

An axis changes what the sandbox's contract fixes or cannot hide (docs/sandbox.md), one thing at a time, and says how
it is seen from inside that it did: `audit-tools` (`vzrepro.recipes`) puts a small program before the command, which
prints one line about what it sees. An axis that did not take effect proves nothing.

An axis with `hold` is also noise: something that differs between any two builds. Held constant in two builds, it shows
whether it is what makes them differ.

    job = changes.baseline(job, world)         # the job as it is, observed
    for axis in ...: job = axis.vary(job, world, round)    # any of them, in the order of AXES
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from vzrepro.proof.audit import changes, observed
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.observed import Observed
from vzrepro.sandbox import Job

TOOLS_TARGET = "audit-tools"
PROCESS_IDS = "process-ids"


@dataclass(frozen=True, slots=True)
class Axis:
    """One thing that a build's output must not depend on.

    `about` says what is varied, `applied` how, `proof` how it shows. `cause` is what most probably leads from it to a
    difference, where the difference itself does not tell; `causes.FIXES` has its remedy. `also` are other causes that
    the axis brings about: of them and `cause`, the bytes decide. `seen` picks from what was observed what the axis is
    about, as text for people; `differs` compares it without and with the axis. `vary` (None: can only be held) takes a
    job that `changes.baseline` gave, and a round number: other rounds, other values. `hold` (None: is constant as it
    is) makes two builds of it equal in this. `version` counts up when the axis comes to mean something else.
    """

    name: str
    about: str
    applied: str
    proof: str
    cause: str
    seen: Callable[[Observed], str | None]
    vary: Callable[[Job, World, int], Job] | None
    missing: Callable[[World, Job], str | None] = changes.nothing_missing
    hold: Callable[[Job, World], Job] | None = None
    differs: Callable[[str, str], bool] = operator.ne
    version: int = 1
    also: tuple[str, ...] = ()

    def unavailable(self, world: World, job: Job) -> str | None:
        """Why this job cannot have the axis here; None when it can."""
        if job.platform != changes.PLATFORM:
            return f"it builds for {job.platform}, and the program that varies and observes is for {changes.PLATFORM}"
        if world.tools is None:
            return f"{TOOLS_TARGET} is not there"
        return self.missing(world, job)

    def took_effect(self, without: Observed, within: Observed) -> bool:
        """Whether a build with the axis saw something else than one without."""
        before, after = self.seen(without), self.seen(within)
        return before is not None and after is not None and self.differs(before, after)

    def was_held(self, one: Observed, other: Observed) -> bool:
        """Whether two builds with the axis held saw the same."""
        seen = self.seen(one)
        return seen is not None and seen == self.seen(other)


AXES: tuple[Axis, ...] = (
    Axis(
        "build-path",
        about="the directory in which the build runs",
        applied="/build is mounted at a longer path, too, and the command starts there",
        proof="the working directory",
        cause="path",
        seen=observed.value("cwd"),
        vary=changes.build_path,
    ),
    Axis(
        "host-name",
        about="the name and domain of the machine",
        applied="--hostname, --domainname, /etc/hostname, /etc/hosts",
        proof="uname",
        cause="host",
        seen=observed.text("{host} in {domain}"),
        vary=changes.host_name,
    ),
    Axis(
        "user",
        about="who builds: uid, gid and their names",
        applied="--user, and lines in /etc/passwd and /etc/group",
        proof="getuid, getgid",
        cause="user",
        seen=observed.text("{uid}:{gid}"),
        vary=changes.user,
    ),
    Axis(
        "umask",
        about="the permissions that new files do not get",
        applied="umask before the command",
        proof="umask",
        cause="umask",
        seen=observed.value("umask"),
        vary=changes.umask,
    ),
    Axis(
        "time-zone",
        about="the time zone: hours away, so that the date is another one, too",
        applied="TZ",
        proof="TZ",
        cause="timestamp",
        seen=observed.value("tz"),
        vary=changes.time_zone,
        missing=changes.set_by_recipe("TZ"),
    ),
    Axis(
        "locale",
        about="language, sorting, number format and encoding",
        applied="LC_ALL: a locale of our own, which sorts and writes numbers and dates as people do, not as C does",
        proof="LC_ALL, and the encoding and the number 1.5 in a dynamic program",
        cause="locale",
        seen=observed.text("{locale}: {codeset}, {decimal}"),
        vary=changes.locale,
        missing=changes.set_by_recipe("LC_ALL"),
        differs=lambda one, other: one.partition(":")[2] != other.partition(":")[2],
    ),
    Axis(
        "home",
        about="the home directory",
        applied="HOME, an empty directory in /tmp",
        proof="HOME",
        cause="environment",
        seen=observed.value("home"),
        vary=changes.home,
        missing=changes.set_by_recipe("HOME"),
    ),
    Axis(
        "path",
        about="the directories that programs are looked for in",
        applied="PATH, with one more directory, which does not exist, at its end",
        proof="PATH",
        cause="environment",
        seen=observed.value("path"),
        vary=changes.path,
    ),
    Axis(
        "environment",
        about="other variables in the environment",
        applied="seven more that users and CI systems have, such as USER, TERM, CI, BUILD_NUMBER",
        proof="the number of variables",
        cause="environment",
        seen=lambda seen: f"{seen['environment'].partition(':')[0]} variables" if "environment" in seen else None,
        vary=changes.environment,
    ),
    Axis(
        "cores",
        about="how many jobs run at once, and on how many processors",
        applied="VZ_CORES one higher, --cpuset-cpus one fewer; held: one of each",
        proof="VZ_CORES and sched_getaffinity",
        cause="parallelism",
        seen=observed.text("VZ_CORES={cores} on processors {cpus}"),
        vary=changes.cores,
        hold=changes.one_core,
    ),
    Axis(
        "memory",
        about="how much memory the machine has",
        applied="/proc/meminfo says less, --memory gives more",
        proof="MemTotal in /proc/meminfo",
        cause="host",
        seen=observed.value("memory"),
        vary=changes.memory,
    ),
    Axis(
        "file-system",
        about="the file system of /build",
        applied="/build is a directory in the host's memory",
        proof="statfs",
        cause="inode",
        seen=observed.file_system_of("build", "{fs}"),
        also=("order",),  # another file system lists directories in another order
        vary=changes.file_system,
        missing=changes.no_memory_directory,
    ),
    Axis(
        "directory-order",
        about="the order in which directories list the inputs' files",
        applied="/in is made in another order, on a file system in the host's memory",
        proof="a hash over the names as readdir gives them",
        cause="order",
        seen=observed.text("{order} over {entries} names"),
        vary=changes.directory_order,
        missing=changes.no_order,
    ),
    Axis(
        "kernel-version",
        about="the version of the kernel",
        applied="personality UNAME26: the release is 2.6.x",
        proof="uname",
        cause="host",
        seen=observed.value("release"),
        vary=changes.kernel_version,
    ),
    Axis(
        "address-layout",
        about="where the kernel puts stacks, heaps and libraries",
        applied="personality ADDR_NO_RANDOMIZE, held: the same",
        proof="the personality, and the address of a variable on the stack",
        cause="random",
        seen=observed.addresses,
        vary=lambda job, world, _count: changes.fixed_addresses(job, world),
        hold=changes.fixed_addresses,
        differs=lambda one, other: one.partition(",")[0] != other.partition(",")[0],
    ),
    Axis(
        "clock",
        about="the time of day, and the times of files that the build makes",
        applied="a preloaded library: more than a year later; held: it stands still",
        proof="clock_gettime in a dynamic program",
        cause="timestamp",
        seen=observed.time_of_day,
        vary=changes.clock,
        hold=changes.frozen_clock,
        differs=observed.other_day,
    ),
    Axis(
        "shell",
        about="which shell /bin/sh is",
        applied="bash (or dash, if it was bash) of the same image is mounted over it",
        proof="the size of /bin/sh",
        cause="environment",
        seen=lambda seen: f"{seen['shell']} bytes" if "shell" in seen else None,
        vary=changes.shell,
        missing=changes.no_other_shell,
    ),
    Axis(
        "input-topology",
        about="whether the inputs' files are hard links",
        applied="they are copied",
        proof="the link count of one",
        cause="inode",
        seen=observed.value("links"),
        also=("order",),
        vary=changes.input_topology,
        missing=changes.no_inputs,
    ),
    Axis(
        PROCESS_IDS,
        about="the numbers that processes get",
        applied="those up to 2,000 are used up before the command; held: up to 500, whatever the engine has used",
        proof="getpid",
        cause="process-id",
        seen=observed.number("pid"),
        vary=changes.process_ids,
        hold=changes.same_process_ids,
        differs=lambda one, other: int(other) - int(one) > 900,
    ),
    Axis(
        "runtime",
        about="the program that makes the container",
        applied="--runtime",
        proof="a hash over the mounts that it makes by itself",
        cause="host",
        seen=observed.value("mounts"),
        vary=changes.runtime,
        missing=changes.no_other_runtime,
    ),
    Axis(
        "randomness",
        about="random numbers",
        applied="held: a preloaded library gives the same ones, /dev/random and /dev/urandom are a file",
        proof="getrandom, /dev/urandom and mkstemp in a dynamic program",
        cause="random",
        seen=observed.text("{random}, {urandom}, {temporary}"),
        vary=None,
        hold=changes.constant_randomness,
    ),
    Axis(
        "inodes",
        about="inode numbers",
        applied="held: /build and /out are new tmpfs file systems",
        proof="the inode number of /build",
        cause="inode",
        seen=observed.file_system_of("build", "{inode} on {fs}"),
        also=("order",),
        vary=None,
        hold=changes.fresh_inodes,
    ),
)
"""All axes, in the order in which they are applied and shown."""
