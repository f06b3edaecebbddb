"""Files that the kernel keeps from a thread and all that it starts (Landlock, Linux 5.13)."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

from vzrepro.base import syscalls

# linux/landlock.h: what is done to files, and the version that knows of it first.
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_ACCESS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_VERSION, _PATH_BENEATH = 1, 1
if sys.platform == "linux":
    _PATH_ONLY = os.O_PATH
else:
    _PATH_ONLY = os.O_RDONLY


def version() -> int:
    """What this kernel's Landlock can do; 0 where there is none."""
    try:
        return syscalls.call("landlock_create_ruleset", None, 0, _VERSION)
    except OSError:
        return 0


def read_only(directories: Iterable[Path]) -> None:
    """Keep the calling thread from all files but those in `directories`, which it may read, for good.

    What is open stays open. That a file is there, and its size and times, are not kept from it. Raises OSError.
    """
    here = version()
    handled = sum(bits for since, bits in _ACCESS.items() if since <= here)
    ruleset = syscalls.call("landlock_create_ruleset", struct.pack("=Q", handled), 8, 0)
    try:
        for directory in directories:
            try:
                place = os.open(directory, _PATH_ONLY | os.O_CLOEXEC)
            except PermissionError:
                continue  # who cannot get there needs no leave
            try:
                rule = struct.pack("=Qi", _READ_FILE | _READ_DIR, place)
                syscalls.call("landlock_add_rule", ruleset, _PATH_BENEATH, rule, 0)
            finally:
                os.close(place)
        syscalls.renounce_privileges()
        syscalls.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
