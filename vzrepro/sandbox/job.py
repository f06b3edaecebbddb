"""What one build is, as the container engine needs it; and what an audit may change of its surroundings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SANDBOX_USER = (1000, 1000)
"""uid and gid of every builder, whoever runs vzrepro: `builder` in our images' /etc/passwd."""

PIDS_LIMIT = 16384
OPEN_FILES_LIMIT = 16384
TMP_SIZE = "4g"
"""Processes, file descriptors and size of /tmp: constants, since a builder can see them."""

LINE_LIMIT = 2000
"""Bytes of one line that are shown; the log file has more of it."""

TAIL_LINES = 20
"""Lines of the log that a failure repeats."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the contract fixes around a build: each default is the contract's, and only an audit changes any.

    `hostname` and `domainname` (None: none) also make /etc/hostname and /etc/hosts. `cpus` are the processors that it
    may use, as `0-2,5`. At `workdir` the directory behind /build is mounted a second time, and the command starts
    there. `runtime` is one of the engine's OCI runtimes, None its default.

    `build_at` and `inputs_at` are directories of the host that stand behind /build and /in in place of those in the
    job's scratch directory; `prepare` makes them and their parent (mode 0700), `discard` removes all of it. With
    `in_memory`, /build and /out are new tmpfs file systems of the container, whose inode numbers start at the
    beginning; what is in /out comes to the host when the build has ended. Inputs are hard-linked or, by `staging`,
    copied; `order` is the seed of the order in which they are made, None leaves it alone.

    `files` maps paths in the sandbox to what is mounted there read-only: bytes, or a file of the host. `prefix` is
    put before the command. `personality` (personality(2)) is permitted by the seccomp profile beside the default;
    it is for a program of the prefix to take it on.
    """

    hostname: str = "localhost"
    domainname: str | None = None
    umask: int = 0o022
    cpus: str | None = None
    workdir: str = "/build"
    runtime: str | None = None
    build_at: Path | None = None
    inputs_at: Path | None = None
    in_memory: bool = False
    staging: Literal["link", "copy"] = "link"
    order: int | None = None
    files: Mapping[str, Path | bytes] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    personality: int = 0

    def __post_init__(self) -> None:
        if self.in_memory and (self.workdir != "/build" or self.build_at is not None):
            raise ValueError("a tmpfs of the container is at one place only: workdir and build_at must be the default")


@dataclass(frozen=True, slots=True)
class Job:
    """One build, as the container engine needs it.

    `label` names it in messages (the recipe's target); `image` is an image id the engine knows (`sha256:…`).
    `inputs` maps a name to the file or directory shown at `/in/<name>`. `scratch` is an existing private directory
    (mode 0700) of a neutral name, best on the inputs' file system: its path is the only one of the host's that
    a builder can find out (in /proc/self/mountinfo). `log` is written anew. `env` is the derivation's, `cores` becomes
    VZ_CORES and the CPU limit; `memory_bytes`, `disk_bytes` (of /build and /out together) and `timeout_secs` of None
    mean no limit. `urgency`, from 0 to 1, weighs its share of the processors while other builds want them, too; 1 is an
    ordinary container's. With `keep_failed` a failure's hint is the command that reopens this very sandbox.
    `surroundings` is for audits.
    """

    label: str
    image: str
    command: tuple[str, ...]
    scratch: Path
    log: Path
    source_date_epoch: int
    cores: int
    env: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Path] = field(default_factory=dict)
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    timeout_secs: float | None = None
    platform: str = "linux/amd64"
    user: tuple[int, int] = SANDBOX_USER
    urgency: float = 1.0
    keep_failed: bool = False
    surroundings: Surroundings = Surroundings()

    def __post_init__(self) -> None:
        for name in self.inputs:
            if not name or "/" in name or name in {".", ".."}:
                raise ValueError(f"{name!r} cannot be a name below /in")
        for name in self.env:
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot be the name of an environment variable")
        if not self.command or "=" in self.command[0]:
            raise ValueError(f"{self.command!r} is not a command")

    @property
    def build(self) -> Path:
        """The host's directory behind /build."""
        return self.surroundings.build_at or self.scratch / "build"

    @property
    def out(self) -> Path:
        """The host's directory behind /out."""
        return self.scratch / "out"

    @property
    def staged(self) -> Path:
        """The host's directory behind /in."""
        return self.surroundings.inputs_at or self.scratch / "in"

    @property
    def environment(self) -> dict[str, str]:
        """All variables the builder sees; the derivation's own win."""
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/build",
            "SOURCE_DATE_EPOCH": str(self.source_date_epoch),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
            "VZ_CORES": str(self.cores),
            **self.env,
        }
