"""The flags of the contract, and the shells that start a build: everything a builder sees is decided here."""

from __future__ import annotations

import csv
import io
import os
import shlex
from pathlib import Path, PurePath

from vzrepro.sandbox import engine
from vzrepro.sandbox.job import OPEN_FILES_LIMIT, PIDS_LIMIT, TMP_SIZE, Job
from vzrepro.sandbox.places import places, volume_of

SECCOMP = Path(__file__).with_name("seccomp.json")

ETC = ("hosts", "hostname", "resolv.conf")
"""Files that the engine would otherwise fill from the host and mount from a path holding the container's id."""

# What is writable or tells about the host by default, and is neither /build, /out nor /tmp: hidden under empty
# read-only file systems. /sys is the machine's hardware; /dev/shm and /dev/mqueue are writable, and Podman makes /run
# and /var/tmp so.
_HIDDEN = ("/sys", "/dev/shm", "/dev/mqueue", "/run", "/var/tmp")

# Where the host's directory for /out is found when /out is a tmpfs of the container.
_OUT_OF_HOST = "/dev/mqueue/out"

# The first shell holds what the engine and the user's docker configuration put into the environment (HOSTNAME,
# HOME, proxies); `env -i` drops all of that before anything of the recipe runs, so that not even /proc/1/environ
# tells. stdout and stderr become one stream here, which keeps their order. The second shell stays as process 1: the
# build is then an ordinary process (signals have their usual effect) and orphans are reaped.
_ENTER = 'umask {umask:03o}; exec 2>&1 env -i sh -c "$0" sh "$@"'
_BUILD = 'env -i "$@"; status=$?; {after}exit "$status"'
# All in one call, which keeps hard links; not the directory itself, which may be another user's.
_COPY_OUT = (
    'cd /out; set --; for f in * .[!.]* ..?*; do if [ -e "$f" ] || [ -L "$f" ]; then set -- "$@" "$f"; fi; done; '
    f'if [ $# -gt 0 ]; then cp -a -- "$@" {_OUT_OF_HOST} || status=$?; fi; '
)
# When vzrepro is not root, what the sandbox's user made must be left readable and removable for the host's user, unless
# it is in a volume; that chmod complains about /build and /out themselves, which are not the sandbox's user's.
_SHARE = "chmod -R a+rwX /build /out 2>/dev/null; "
_SHELL = (
    'printf "sandbox of %s; its command is:\\n    %s\\n" "$1" "$2"; shift 2; '
    'if command -v bash >/dev/null; then set -- "$@" bash --norc; else set -- "$@" sh; fi; exec env -i "$@"'
)


def run_arguments(job: Job, name: str) -> list[str]:
    """The engine's arguments that build the job in a container called `name`."""
    variables = [f"{key}={value}" for key, value in job.environment.items()]
    after = _SHARE if os.geteuid() != 0 and volume_of(job) is None else ""
    if job.surroundings.in_memory:
        after += _COPY_OUT
    return [
        *("run", "--name", name, "--label", f"vzrepro.host={engine.host_name()}"),
        *("--label", f"vzrepro.target={job.label}"),
        *("--log-driver", "none", *_confinement(job)),
        *("--entrypoint", "sh", job.image, "-c", _enter(job), _BUILD.format(after=after)),
        *variables,
        *job.surroundings.prefix,
        *job.command,
    ]


def shell_command(job: Job) -> list[str]:
    """The argv that opens an interactive shell in the job's sandbox: same mounts, limits and environment.

    The sandbox's directories must have been filled (`prepare`, or a failed `run` with `keep_failed`).
    """
    variables = [f"{name}={value}" for name, value in {"TERM": "xterm", **job.environment}.items()]
    # No owner label: this container belongs to whoever types the command, and `sweep` must leave it alone.
    return [
        *engine.command_line(),
        *("run", "--rm", "--interactive", "--tty"),
        *_confinement(job),
        *("--entrypoint", "sh", job.image, "-c", _enter(job), _SHELL, job.label, shlex.join(job.command), *variables),
    ]


def _enter(job: Job) -> str:
    return _ENTER.format(umask=job.surroundings.umask)


def _confinement(job: Job) -> list[str]:
    """The flags of the contract, the same for a build and for a shell."""
    uid, gid = job.user
    around = job.surroundings
    found = places(job)
    flags = [
        *("--pull", "never", "--platform", job.platform),
        *("--network", "none", "--hostname", around.hostname, "--ipc", "private", "--cgroupns", "private"),
        *("--read-only", "--cap-drop", "ALL", "--user", f"{uid}:{gid}", "--workdir", around.workdir),
        *("--security-opt", "no-new-privileges", "--security-opt", f"seccomp={seccomp_profile(job)}"),
        *("--pids-limit", str(PIDS_LIMIT), "--ulimit", "core=0:0"),
        *("--ulimit", f"nofile={OPEN_FILES_LIMIT}:{OPEN_FILES_LIMIT}"),
        *("--tmpfs", f"/tmp:rw,exec,nosuid,nodev,mode=1777,size={TMP_SIZE}"),
    ]
    for path in _HIDDEN:
        flags += ["--tmpfs", f"{path}:ro,nosuid,nodev,noexec,mode=555,size=4k"]
    if around.in_memory:
        for path in ("/build", "/out"):
            # runc before 1.2 gives it the mode of the image's own directory, so it must be the user's.
            flags += ["--tmpfs", f"{path}:rw,exec,nosuid,nodev,mode=777,uid={uid},gid={gid}"]
        flags += ["--mount", bind(found.out, _OUT_OF_HOST)]
    else:
        flags += ["--mount", bind(found.build, "/build"), "--mount", bind(found.out, "/out")]
    flags += ["--mount", bind(found.inputs, "/in", readonly=True)]
    for name in ETC:
        flags += ["--mount", bind(found.etc / name, f"/etc/{name}", readonly=True)]
    if job.memory_bytes is not None:
        # Swap counted in: a build that swaps would take hours instead of failing with a clear message.
        flags += ["--memory", str(job.memory_bytes), "--memory-swap", str(job.memory_bytes)]
    if job.cores < (os.cpu_count() or 1):
        flags += ["--cpus", str(job.cores)]
    if job.urgency < 1:
        flags += ["--cpu-shares", str(cpu_shares(job.urgency))]
    return flags + _varied(job)


def cpu_shares(urgency: float) -> int:
    """The weight of a build beside others. The third power: what half as much waits for hardly delays the most urgent
    one, and takes what that leaves."""
    return max(2, round(1024 * urgency**3))


def _varied(job: Job) -> list[str]:
    """The flags that only an audit's surroundings need."""
    around = job.surroundings
    flags = []
    if around.domainname is not None:
        flags += ["--domainname", around.domainname]
    if around.cpus is not None:
        flags += ["--cpuset-cpus", around.cpus]
    if around.runtime is not None:
        flags += ["--runtime", around.runtime]
    if around.workdir != "/build":
        flags += ["--mount", bind(places(job).build, around.workdir)]
    for index, path in enumerate(around.files):
        flags += ["--mount", bind(places(job).files / str(index), path, readonly=True)]
    return flags


def seccomp_profile(job: Job) -> Path:
    """The profile: ours, or the variant with one more personality that `prepare` writes for an audit."""
    return job.scratch / "seccomp.json" if job.surroundings.personality else SECCOMP


def bind(source: PurePath, target: str, *, readonly: bool = False) -> str:
    """The value of --mount for a bind mount: one CSV record, so a comma or quote in a path is quoted as CSV does it."""
    record = io.StringIO()
    found = source.absolute() if isinstance(source, Path) else source
    fields = ["type=bind", f"src={found}", f"dst={target}", *(["readonly"] if readonly else [])]
    csv.writer(record, lineterminator="").writerow(fields)
    return record.getvalue()
