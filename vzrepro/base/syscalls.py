"""System calls that Python has no function for, by their numbers on the machines that we know (Linux)."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Mapping
from typing import Final

_PR_SET_NO_NEW_PRIVS = 38

MACHINES: Final = ("x86_64", "aarch64")
"""The machines, in the order of the numbers."""

# asm/unistd.h; None: the machine has no such call.
NUMBERS: Final[Mapping[str, tuple[int | None, int | None]]] = {
    "access": (21, None),
    "arch_prctl": (158, None),
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "close": (3, 57),
    "connect": (42, 203),
    "dup": (32, 23),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fadvise64": (221, 223),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lseek": (8, 62),
    "lstat": (6, None),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "open": (2, None),
    "openat": (257, 56),
    "pread64": (17, 67),
    "read": (0, 63),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "readv": (19, 65),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "seccomp": (317, 277),
    "sendmmsg": (307, 269),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "sigaltstack": (131, 132),
    "stat": (4, None),
    "statfs": (137, 43),
    "statx": (332, 291),
    "sysinfo": (99, 179),
    "time": (201, None),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}
"""The number of each call on each machine; None: there is no such call."""


def number(name: str) -> int | None:
    """The number of a call here; None where there is no such call, or the machine is not known."""
    machine = platform.machine()
    return NUMBERS[name][MACHINES.index(machine)] if platform.system() == "Linux" and machine in MACHINES else None


def call(name: str, *arguments: int | bytes | None) -> int:
    """Make a system call. Raises OSError, with ENOSYS where there is none."""
    import ctypes

    if (known := number(name)) is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    given = [ctypes.c_long(each) if isinstance(each, int) else ctypes.c_char_p(each) for each in arguments]
    libc.syscall.restype = ctypes.c_long
    return _checked(libc.syscall(ctypes.c_long(known), *given), ctypes.get_errno())


def prctl(option: int, value: int) -> None:
    """Set something of the calling thread's. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))), ctypes.get_errno())


def renounce_privileges() -> None:
    """Have nothing that the calling thread executes gain privileges: the kernel wants that of who restricts itself."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _checked(done: int, code: int) -> int:
    if done < 0:
        raise OSError(code, os.strerror(code))
    return done
