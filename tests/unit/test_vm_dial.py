"""Reaching a port of a guest: the handshake with the vsock device, and the proxy in front of it."""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import dial


class Streams:
    """A stand-in for vhost-device-vsock's socket: `answer` gets each connection and its first line."""

    def __init__(self, path: Path, answer: Callable[[socket.socket, str], None]) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.answer = answer
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        with stream, contextlib.suppress(OSError):  # the other side may be gone
            self.answer(stream, dial.read_line(stream))


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def test_the_handshake_takes_not_a_byte_more_than_its_line(short_dir: Path) -> None:
    asked = []

    def answer(stream: socket.socket, line: str) -> None:
        asked.append(line)
        stream.sendall(b"OK 1073741824\nHTTP/2 begins")
        stream.recv(1)

    Streams(short_dir / "v", answer)
    with dial.dial_streams(short_dir / "v", 7424) as stream:
        assert stream.recv(13, socket.MSG_WAITALL) == b"HTTP/2 begins"
        assert stream.gettimeout() is None
    assert asked == ["CONNECT 7424"]


@pytest.mark.parametrize("reply", [b"", b"OK 10", b"NO\n", b"x" * 1000])
def test_a_guest_that_does_not_listen_is_an_oserror(short_dir: Path, reply: bytes) -> None:
    Streams(short_dir / "v", lambda stream, _line: stream.sendall(reply))
    with pytest.raises(OSError):
        dial.dial_streams(short_dir / "v", 7424)


def test_a_device_that_says_nothing_is_an_oserror(short_dir: Path) -> None:
    silence = threading.Event()
    Streams(short_dir / "v", lambda _stream, _line: silence.wait(30) and None)
    with pytest.raises(TimeoutError):
        dial.dial_streams(short_dir / "v", 7424, timeout_secs=0.1)
    silence.set()


def test_the_proxy_carries_both_ways_and_ends(short_dir: Path) -> None:
    def echo(stream: socket.socket, _line: str) -> None:
        stream.sendall(b"OK 1\n")
        while data := stream.recv(65536):
            stream.sendall(data)
        stream.sendall(b"end")

    Streams(short_dir / "v", echo)
    proxy = dial.Proxy(short_dir / "p", lambda: dial.dial_streams(short_dir / "v", 7424))
    payload = bytes(range(256)) * 4096
    clients = [socket.socket(socket.AF_UNIX) for _ in range(8)]
    for client in clients:
        client.connect(str(short_dir / "p"))
    for client in clients:
        writer = threading.Thread(target=lambda c=client: (c.sendall(payload), c.shutdown(socket.SHUT_WR)))
        writer.start()
        received = b""
        while data := client.recv(65536):
            received += data
        writer.join()
        assert received == payload + b"end"
        client.close()

    idle = socket.socket(socket.AF_UNIX)
    idle.connect(str(short_dir / "p"))
    idle.sendall(b"x")
    assert idle.recv(1) == b"x"
    proxy.close()
    while idle.recv(100):
        pass
    with pytest.raises(OSError):
        socket.socket(socket.AF_UNIX).connect(str(short_dir / "p"))


def test_a_socket_name_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match="too long"):
        dial.private_socket(tmp_path / ("x" * 100), "vsock")
