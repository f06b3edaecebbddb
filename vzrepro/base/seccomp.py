"""System calls that the kernel refuses a thread and all that it starts, or asks another process about (Linux)."""

from __future__ import annotations

import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# linux/audit.h, and what each call is there; a call that a machine does not have has no number.
_ARCHITECTURES: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_NUMBERS: Final = {
    "x86_64": {
        "clone": 56,
        "clone3": 435,
        "connect": 42,
        "execve": 59,
        "execveat": 322,
        "fork": 57,
        "io_uring_setup": 425,
        "kill": 62,
        "landlock_add_rule": 445,
        "landlock_create_ruleset": 444,
        "landlock_restrict_self": 446,
        "pidfd_getfd": 438,
        "pidfd_send_signal": 424,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "ptrace": 101,
        "rt_sigqueueinfo": 129,
        "rt_tgsigqueueinfo": 297,
        "seccomp": 317,
        "sendmmsg": 307,
        "sendmsg": 46,
        "sendto": 44,
        "socket": 41,
        "socketpair": 53,
        "tgkill": 234,
        "tkill": 200,
        "vfork": 58,
    },
    "aarch64": {
        "clone": 220,
        "clone3": 435,
        "connect": 203,
        "execve": 221,
        "execveat": 281,
        "io_uring_setup": 425,
        "kill": 129,
        "landlock_add_rule": 445,
        "landlock_create_ruleset": 444,
        "landlock_restrict_self": 446,
        "pidfd_getfd": 438,
        "pidfd_send_signal": 424,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "ptrace": 117,
        "rt_sigqueueinfo": 138,
        "rt_tgsigqueueinfo": 240,
        "seccomp": 277,
        "sendmmsg": 269,
        "sendmsg": 211,
        "sendto": 206,
        "socket": 198,
        "socketpair": 199,
        "tgkill": 131,
        "tkill": 130,
    },
}

ASK: Final = 0x7FC0_0000
"""A rule's action: who holds the listener is asked (SECCOMP_RET_USER_NOTIF)."""

_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h, of words
_X32 = 0x4000_0000
_SET_MODE_FILTER, _SPEC_ALLOW, _NEW_LISTENER = 1, 1 << 2, 1 << 3
_PR_SET_NO_NEW_PRIVS = 38


def refuse(number: int = errno.EPERM) -> int:
    """A rule's action: the call fails with this error."""
    return _ERRNO | number


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done about a system call; with `unless_null`, only when its argument of that number is not 0."""

    call: str
    action: int
    unless_null: int | None = None


def number(call: str) -> int | None:
    """The number of a system call here, or None where this machine has none, or is not known."""
    return _NUMBERS.get(platform.machine(), {}).get(call)


def program(rules: Sequence[Rule], machine: str) -> bytes:
    """The filter, as the kernel of a `machine` runs it: what no rule names is allowed, calls of a foreign kind do not
    exist. Raises OSError (ENOSYS) for a machine that is not known."""
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no filter is known for {machine}")
    code = [
        _step(_LOAD, 4),  # seccomp_data: nr, arch, instruction_pointer, args[6]
        _step(_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _step(_RETURN, refuse(errno.ENOSYS)),
        _step(_LOAD, 0),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, refuse(errno.ENOSYS)),
    ]
    for rule in rules:
        if (call := _NUMBERS[machine].get(rule.call)) is None:
            continue
        body = [_step(_RETURN, rule.action)]
        if rule.unless_null is not None:
            low = 16 + 8 * rule.unless_null  # both machines are little-endian
            body = [
                _step(_LOAD, low),
                _step(_EQUAL, 0, 0, 2),
                _step(_LOAD, low + 4),
                _step(_EQUAL, 0, 1, 0),
                *body,
                _step(_RETURN, _ALLOW),
            ]
        code += [_step(_EQUAL, call, 0, len(body)), *body]
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def install(rules: Sequence[Rule]) -> int | None:
    """Put a filter on the calling thread, for good, and on all that it starts from then on.

    Returns the listener, which the one that is asked holds, if a rule says `ASK`. Nothing that runs under the filter
    gains privileges by being executed. Raises OSError where the kernel cannot do it.
    """
    import ctypes

    code = program(rules, platform.machine())
    call = _NUMBERS[platform.machine()]["seccomp"]
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    asks = any(rule.action == ASK for rule in rules)
    # Before Linux 5.16 a filter slows down all that runs under it, against side channels, unless it says otherwise.
    flags = ctypes.c_ulong(_SPEC_ALLOW | (_NEW_LISTENER if asks else 0))
    # A filter of a process that could still gain privileges needs CAP_SYS_ADMIN.
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
        raise _failure(ctypes.get_errno())
    done = libc.syscall(ctypes.c_long(call), ctypes.c_ulong(_SET_MODE_FILTER), flags, ctypes.c_char_p(filters))
    if done < 0:
        raise _failure(ctypes.get_errno())
    return done if asks else None


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))
