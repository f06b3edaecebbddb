"""What a process reaches that is kept from the host's loopback, and the filter that the kernel asks by."""

from __future__ import annotations

import contextlib
import errno
import platform
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from vzrepro.base import seccomp
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import loopback, qemu

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="guests are booted on Linux alone")

# Prints a line for each way to an address of the host, with the ports of a TCP and a UDP server.
ASKS = """
import ctypes, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
tcp, udp, path, *names = sys.argv[1:]
def vector(one, address):
    words = struct.pack("=HH", 2, socket.htons(address[1])) + socket.inet_aton(address[0]) + bytes(8)
    name = ctypes.create_string_buffer(words)
    part = ctypes.create_string_buffer(b"v")
    parts = (ctypes.c_void_p * 2)(ctypes.addressof(part), 1)
    message = struct.pack("@PI4xPQPQi4xI4x", ctypes.addressof(name), 16, ctypes.addressof(parts), 1, 0, 0, 0, 0)
    if libc.sendmmsg(one.fileno(), message + message, 2, 0) < 0:
        raise OSError(ctypes.get_errno(), "")
def tried(what, kind, call):
    with socket.socket(family, kind) as one:
        try:
            call(one)
        except OSError as error:
            print(what, "refused" if error.errno == 111 else error)
        else:
            print(what, "reached")
for name in names:
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    tried(f"{name} tcp", socket.SOCK_STREAM, lambda one: one.connect((name, int(tcp))))
    tried(f"{name} udp", socket.SOCK_DGRAM, lambda one: one.connect((name, int(udp))))
    tried(f"{name} sendto", socket.SOCK_DGRAM, lambda one: one.sendto(b"t", (name, int(udp))))
    tried(f"{name} sendmsg", socket.SOCK_DGRAM, lambda one: one.sendmsg([b"m"], [], 0, (name, int(udp))))
    if family == socket.AF_INET:
        tried(f"{name} sendmmsg", socket.SOCK_DGRAM, lambda one: vector(one, (name, int(udp))))
family = socket.AF_UNIX
tried("unix", socket.SOCK_STREAM, lambda one: (one.connect(path), one.send(b"s"), one.sendmsg([b"m"])))
"""
HERE = ["127.0.0.1", "127.7.7.7", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1"]
WAYS = ("tcp", "udp", "sendto", "sendmsg", "sendmmsg")


def own_address() -> str:
    """An address of this machine that is not the loopback's; nothing is sent to find it out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but the loopback's")
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def servers(path: Path) -> Iterator[list[str]]:
    """Servers at all of the machine's addresses: their ports, and the path of one at a Unix socket."""
    with (
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as tcp,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
    ):
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", 0))
        unix.bind(str(path / "u"))
        unix.listen()
        yield [str(tcp.getsockname()[1]), str(udp.getsockname()[1]), str(path / "u")]


def ask(words: Sequence[str], *, host_loopback: bool = False) -> dict[str, str]:
    """What a child finds."""
    lines: list[str] = []
    with qemu.Child(sys.executable, ["-ISc", ASKS, *words], on_line=lines.append, host_loopback=host_loopback) as child:
        assert child.wait(60) == 0, lines
    return dict(line.rsplit(" ", 1) for line in lines)


def ways(name: str) -> set[str]:
    return {f"{name} {way}" for way in WAYS if way != "sendmmsg" or ":" not in name}


def test_no_way_leads_to_the_loopback_and_all_else_is_as_it_was(tmp_path: Path) -> None:
    own = own_address()
    with servers(tmp_path) as words:
        found = ask([*words, *HERE, own])
    assert found == dict.fromkeys(set().union(*map(ways, HERE)), "refused") | dict.fromkeys(
        {*ways(own), "unix"}, "reached"
    )


def test_who_asks_for_the_loopback_reaches_it(tmp_path: Path) -> None:
    with servers(tmp_path) as words:
        assert set(ask([*words, *HERE], host_loopback=True).values()) == {"reached"}


def test_the_host_s_own_name_server_is_reached_at_its_port_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolvers = tmp_path / "resolv.conf"
    resolvers.write_text(
        "# nameserver 127.0.0.2\nsearch local\nnameserver 127.0.0.53\nnameserver\nnameserver fe80::1%2\n"
    )
    monkeypatch.setattr(loopback, "_RESOLVERS", resolvers)

    def allowed(name: str, port: int) -> bool:
        return loopback._allowed(struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + socket.inet_aton(name))

    assert allowed("127.0.0.53", 53)
    assert not allowed("127.0.0.53", 80)
    assert not allowed("127.0.0.2", 53)
    assert allowed("192.0.2.1", 80)
    resolvers.unlink()
    assert not allowed("127.0.0.53", 53)


def test_a_program_that_cannot_be_started_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match="could not be started"):
        qemu.Child(str(tmp_path / "none"), [], host_loopback=False)

    def fails() -> None:
        raise OSError(errno.ENOMEM, "no memory")

    with pytest.raises(OSError, match="no memory"):
        loopback.kept_from(fails, print)  # type: ignore[arg-type, return-value]


def test_a_kernel_without_such_filters_boots_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(VzreproError) as error:
        qemu.Child(sys.executable, ["-c", ""], host_loopback=False)
    assert error.value.reason == "seccomp: no filter is known for riscv64"
    assert "--host-loopback" in str(error.value.hint)


def outcome(code: bytes, architecture: int, call: int, arguments: Sequence[int] = (0,) * 6) -> int:
    """What the kernel makes of a filter: the few instructions of classic BPF that ours have."""
    data = struct.pack("=iIQ6Q", call, architecture, 0, *arguments)
    steps = list(struct.iter_unpack("=HBBI", code))
    at, word = 0, 0
    while True:
        operation, if_true, if_false, value = steps[at]
        at += 1
        if operation == 0x20:
            [word] = struct.unpack_from("=I", data, value)
        elif operation == 0x06:
            return int(value)
        else:
            at += (
                if_true if {0x15: word == value, 0x35: word >= value, 0x45: bool(word & value)}[operation] else if_false
            )


@pytest.mark.parametrize(
    ("machine", "architecture", "sendto"), [("x86_64", 0xC000_003E, 44), ("aarch64", 0xC000_00B7, 206)]
)
def test_a_filter_knows_its_machine_s_calls(machine: str, architecture: int, sendto: int) -> None:
    rules = [
        seccomp.Rule("time", seccomp.refuse()),  # which arm64 does not have
        seccomp.Rule("openat", seccomp.refuse(), if_any=(2, 0o101)),
        seccomp.Rule("sendto", seccomp.ASK, if_any=(4, (1 << 64) - 1)),
        seccomp.Rule("seccomp", seccomp.refuse(errno.EACCES)),
    ]
    code = seccomp.program(rules, machine)
    allow, missing = 0x7FFF_0000, seccomp.refuse(errno.ENOSYS)
    assert outcome(code, architecture, sendto) == allow
    for name in (1, 1 << 32, 1 << 63):
        assert outcome(code, architecture, sendto, (9, 9, 9, 9, name, 9)) == seccomp.ASK
    assert outcome(code, architecture, {"x86_64": 317, "aarch64": 277}[machine]) == seccomp.refuse(errno.EACCES)
    assert outcome(code, architecture, 201) == (seccomp.refuse() if machine == "x86_64" else allow)
    opening = {"x86_64": 257, "aarch64": 56}[machine]
    assert outcome(code, architecture, opening, (1, 1, 0o2000000, 1, 1, 1)) == allow
    assert outcome(code, architecture, opening, (0, 0, 0o2000101, 0, 0, 0)) == seccomp.refuse()
    assert outcome(seccomp.program(rules, machine, seccomp.refuse(errno.EIO)), architecture, 0) == seccomp.refuse(
        errno.EIO
    )
    assert outcome(code, architecture, 0) == allow
    assert outcome(code, architecture, sendto | 0x4000_0000) == missing  # the x32 calls of amd64
    assert outcome(code, 0x4000_0003, sendto) == missing  # i386
