"""System calls that the kernel refuses a thread and all that it starts, or asks another process about (Linux)."""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vzrepro.base import syscalls
from vzrepro.base.syscalls import MACHINES, NUMBERS

_ARCHITECTURES: Final = (0xC000_003E, 0xC000_00B7)  # linux/audit.h, of `syscalls.MACHINES`

ALLOW: Final = 0x7FFF_0000
"""A rule's action: the call is made."""

ASK: Final = 0x7FC0_0000
"""A rule's action: who holds the listener is asked (SECCOMP_RET_USER_NOTIF)."""

_ERRNO = 0x0005_0000
_LOAD, _EQUAL, _AT_LEAST, _HAS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h, of words
_X32 = 0x4000_0000
_GET_ACTION_AVAIL = 2
_SET_MODE_FILTER, _SPEC_ALLOW, _NEW_LISTENER = 1, 1 << 2, 1 << 3


def refuse(number: int = errno.EPERM) -> int:
    """A rule's action: the call fails with this error."""
    return _ERRNO | number


@dataclass(frozen=True, slots=True)
class Rule:
    """What is done about a system call. With `if_any`, an argument's number and a mask, only when the argument has any
    of these bits; else the call is made."""

    call: str
    action: int
    if_any: tuple[int, int] | None = None


def program(rules: Sequence[Rule], machine: str, otherwise: int = ALLOW) -> bytes:
    """The filter, as the kernel of a `machine` runs it; `otherwise` is done about what no rule names, and calls of a
    foreign kind do not exist. Raises OSError (ENOSYS) for a machine that is not known."""
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no filter is known for {machine}")
    column = MACHINES.index(machine)
    code = [
        _step(_LOAD, 4),  # seccomp_data: nr, arch, instruction_pointer, args[6]
        _step(_EQUAL, _ARCHITECTURES[column], 1, 0),
        _step(_RETURN, refuse(errno.ENOSYS)),
        _step(_LOAD, 0),
        _step(_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, refuse(errno.ENOSYS)),
    ]
    for rule in rules:
        if (call := NUMBERS[rule.call][column]) is None:
            continue
        body = [_step(_RETURN, rule.action)]
        if rule.if_any is not None:
            argument, mask = rule.if_any
            low = 16 + 8 * argument  # both machines are little-endian
            body = [
                _step(_LOAD, low),
                _step(_HAS, mask & 0xFFFF_FFFF, 3, 0),
                _step(_LOAD, low + 4),
                _step(_HAS, mask >> 32, 1, 0),
                _step(_RETURN, ALLOW),
                *body,
            ]
        code += [_step(_EQUAL, call, 0, len(body)), *body]
    return b"".join([*code, _step(_RETURN, otherwise)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def install(rules: Sequence[Rule], otherwise: int = ALLOW) -> int | None:
    """Put a filter on the calling thread, for good, and on all that it starts from then on.

    Returns the listener, which the one that is asked holds, if a rule says `ASK`. Nothing that runs under the filter
    gains privileges by being executed. Raises OSError where the kernel cannot do it.
    """
    import ctypes

    code = program(rules, platform.machine(), otherwise)
    buffer = ctypes.create_string_buffer(code, len(code))
    filters = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    asks = any(rule.action == ASK for rule in rules)
    syscalls.renounce_privileges()
    # Before Linux 5.16 a filter slows down all that runs under it, against side channels, unless it says otherwise.
    done = syscalls.call("seccomp", _SET_MODE_FILTER, _SPEC_ALLOW | (_NEW_LISTENER if asks else 0), filters)
    return done if asks else None


def available() -> bool:
    """Whether there are such filters here."""
    try:
        syscalls.call("seccomp", _GET_ACTION_AVAIL, 0, struct.pack("=I", _ERRNO))
    except OSError:
        return False
    return True
