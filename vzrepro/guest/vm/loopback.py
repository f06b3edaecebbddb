"""Keeps what a process starts from the host's loopback: QEMU, whose user network a guest reaches 127.0.0.1 through.

QEMU calls its guest's peers by system calls of its own, and has no switch against the host's 10.0.2.2, nor against
127.0.0.1 itself, which a guest may write into a packet. So the kernel asks us about each address that QEMU wants to
connect or send to (seccomp's user notification), and those of the loopback are refused. Sending on what is connected,
which is nearly all, costs nothing. QEMU is trusted: what it asked for is looked at in its memory, and then left to the
kernel, which reads it again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from vzrepro.base import seccomp, syscalls
from vzrepro.base.errors import VzreproError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Start = Callable[[], "subprocess.Popen[bytes]"]

_RULES = (
    seccomp.Rule("connect", seccomp.ASK),
    seccomp.Rule("sendto", seccomp.ASK, if_any=(4, (1 << 64) - 1)),
    seccomp.Rule("sendmsg", seccomp.ASK),
    seccomp.Rule("sendmmsg", seccomp.ASK),
)
# linux/seccomp.h: what is asked (id, pid, flags, nr, arch, instruction_pointer, args[6]), and what is answered (id,
# value, error, flags).
_QUESTION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC050_2100, 0xC018_2101
_GO_ON = 1

_MESSAGE = struct.Struct("=QI44x")  # msghdr: a name, its length, and what is no address
_IN_VECTOR_BYTES = _MESSAGE.size + 8  # mmsghdr: the count of sent bytes, and four of padding
_MOST_MESSAGES = 1024  # UIO_MAXIOV: the kernel takes no more at once
_NAME_BYTES = 128  # sockaddr_storage
_DNS_PORT = 53
_RESOLVERS = Path("/etc/resolv.conf")


def kept_from(start: Start, report: Callable[[str], object]) -> subprocess.Popen[bytes]:
    """The process that `start` starts, which reaches nothing at the loopback but the host's own name server.

    `report` gets a line when the process cannot be looked into, and is refused every address. Raises VzreproError where
    the kernel cannot do this.
    """
    filtered: Future[tuple[int, int]] = Future()
    made: Future[subprocess.Popen[bytes]] = Future()

    def spawn() -> None:
        try:
            listener = seccomp.install(_RULES)
            assert listener is not None
            filtered.set_result((listener, threading.get_native_id()))
        except BaseException as error:
            filtered.set_exception(error)
            return
        try:
            made.set_result(process := start())
            # The filter is this thread's and its children's, and those are killed when this thread ends.
            process.wait()
        except BaseException as error:
            made.set_exception(error)
        # A question of our own, by which the one who answers knows the end.
        with contextlib.suppress(OSError), socket.socket() as last:
            last.connect(("0.0.0.0", 0))

    threading.Thread(target=spawn, daemon=True).start()
    try:
        listener, last = filtered.result()
    except OSError as error:
        raise VzreproError(
            "this host's kernel cannot keep a guest from what listens at the host's loopback",
            reason=f"seccomp: {error.strerror}",
            hint="a Linux of 5.5 or newer can; --host-loopback boots the guest all the same",
        ) from error
    # Started here, where no filter is: who answers has nobody to ask.
    threading.Thread(target=_answer, args=(listener, last, report), daemon=True).start()
    return made.result()


def _answer(listener: int, last: int, report: Callable[[str], object]) -> None:
    """Answer all that is asked, until the thread `last` asks."""
    told = False
    with open(listener, "rb", buffering=0), contextlib.closing(_Memory()) as memory:
        while True:
            question = bytearray(_QUESTION.size)
            try:
                fcntl.ioctl(listener, _RECEIVE, question)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue  # who asked is gone
                return
            key, pid, _flags, call, _arch, _at, *arguments = _QUESTION.unpack(question)
            if pid == last:
                return
            try:
                allowed = all(_allowed(name) for name in _names(memory, pid, call, arguments))
            except OSError as error:
                allowed = False
                if not told:
                    report(f"the guest reaches no network, since QEMU cannot be looked into: {error.strerror}")
                told = True
            answer = (key, 0, 0, _GO_ON) if allowed else (key, 0, -errno.ECONNREFUSED, 0)
            with contextlib.suppress(OSError):
                fcntl.ioctl(listener, _SEND, _ANSWER.pack(*answer))


class _Memory:
    """Other processes' memory. The one that was read last stays open: a guest's packets come from one."""

    def __init__(self) -> None:
        self._pid = 0
        self._file: int | None = None

    def close(self) -> None:
        """Give up what is open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def read(self, pid: int, at: int, length: int) -> bytes:
        """`length` bytes at the address `at` of the process `pid`. Raises OSError."""
        if self._file is not None and pid == self._pid and len(data := self._read(self._file, at, length)) == length:
            return data
        # Another process, or one that became another program: what is open then is the memory that it had.
        self.close()
        self._pid, self._file = pid, os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        if len(data := self._read(self._file, at, length)) == length:
            return data
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    @staticmethod
    def _read(file: int, at: int, length: int) -> bytes:
        try:
            return os.pread(file, length, at)
        except OSError:
            return b""


def _names(memory: _Memory, pid: int, call: int, arguments: list[int]) -> Iterator[bytes]:
    """The addresses (`sockaddr`) that a call of the process `pid` names."""
    if call == syscalls.number("connect"):
        yield memory.read(pid, arguments[1], min(arguments[2], _NAME_BYTES))
    elif call == syscalls.number("sendto"):
        yield memory.read(pid, arguments[4], min(arguments[5], _NAME_BYTES))
    else:
        several = call == syscalls.number("sendmmsg")
        for each in range(min(arguments[2], _MOST_MESSAGES) if several else 1):
            name, length = _MESSAGE.unpack(memory.read(pid, arguments[1] + each * _IN_VECTOR_BYTES, _MESSAGE.size))
            if name:
                yield memory.read(pid, name, min(length, _NAME_BYTES))


def _allowed(name: bytes) -> bool:
    if (found := _parse(name)) is None:
        return True
    address, port = found
    if not (address.is_loopback or address.is_unspecified):
        return True
    # What 10.0.2.3 stands for, where the host asks a name server of its own.
    return port == _DNS_PORT and address in _resolvers()


def _parse(name: bytes) -> tuple[Address, int] | None:
    """Address and port of a `sockaddr`, or None when it is none of the Internet's."""
    family = int.from_bytes(name[:2], "little")
    port = int.from_bytes(name[2:4], "big")
    if family == socket.AF_INET and len(name) >= 8:
        return ipaddress.IPv4Address(name[4:8]), port
    if family == socket.AF_INET6 and len(name) >= 24:
        address = ipaddress.IPv6Address(name[8:24])
        return address.ipv4_mapped or address, port
    return None


def _resolvers() -> set[Address]:
    """The host's name servers."""
    found: set[Address] = set()
    with contextlib.suppress(OSError):
        for line in _RESOLVERS.read_text(errors="replace").splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    found.add(ipaddress.ip_address(words[1]))
    return found
