"""Run one build in a hermetic container: what a builder sees, how it is ended, and what is said when it fails.

docs/sandbox.md has the contract and explains every flag, what cannot be hidden, and the seccomp profile.
`job` is what to run, `confine` the flags, `running` the run itself and its limits, `log` what is kept of its output,
`engine` the container engine's command line. `ways` are the two ways to a sandbox's directories, and `sharing` says
which is right: `staging` has them here, `volume` sends them to the engine, by `archive`; `places` says where they are.
"""

from vzrepro.sandbox.confine import shell_command
from vzrepro.sandbox.engine import Runtime, check, has_image, image_file, load_image, sweep
from vzrepro.sandbox.job import (
    LINE_LIMIT,
    OPEN_FILES_LIMIT,
    PIDS_LIMIT,
    SANDBOX_USER,
    TAIL_LINES,
    TMP_SIZE,
    Job,
    Surroundings,
)
from vzrepro.sandbox.log import LOG_HEAD_BYTES, LOG_TAIL_BYTES
from vzrepro.sandbox.running import RunLimits, run
from vzrepro.sandbox.sharing import Sharing, find_out, sharing_of
from vzrepro.sandbox.ways import discard, prepare

__all__ = [
    "LINE_LIMIT",
    "LOG_HEAD_BYTES",
    "LOG_TAIL_BYTES",
    "OPEN_FILES_LIMIT",
    "PIDS_LIMIT",
    "SANDBOX_USER",
    "TAIL_LINES",
    "TMP_SIZE",
    "Job",
    "RunLimits",
    "Runtime",
    "Sharing",
    "Surroundings",
    "check",
    "discard",
    "find_out",
    "has_image",
    "image_file",
    "load_image",
    "prepare",
    "run",
    "sharing_of",
    "shell_command",
    "sweep",
]
