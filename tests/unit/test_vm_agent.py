"""Reaching an agent: the handshake with the vsock device, the proxy, and the calls, against servers of our own."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from vzrepro.errors import VzreproError
from vzrepro.vm import agent
from vzrepro.vm import agent_pb2 as pb


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
            self.answer(stream, agent.read_line(stream))


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
    with agent.dial_streams(short_dir / "v", 7424) as stream:
        assert stream.recv(13, socket.MSG_WAITALL) == b"HTTP/2 begins"
        assert stream.gettimeout() is None
    assert asked == ["CONNECT 7424"]


@pytest.mark.parametrize("reply", [b"", b"OK 10", b"NO\n", b"x" * 1000])
def test_a_guest_that_does_not_listen_is_an_oserror(short_dir: Path, reply: bytes) -> None:
    Streams(short_dir / "v", lambda stream, _line: stream.sendall(reply))
    with pytest.raises(OSError):
        agent.dial_streams(short_dir / "v", 7424)


def test_a_device_that_says_nothing_is_an_oserror(short_dir: Path) -> None:
    silence = threading.Event()
    Streams(short_dir / "v", lambda _stream, _line: silence.wait(30) and None)
    with pytest.raises(TimeoutError):
        agent.dial_streams(short_dir / "v", 7424, timeout_secs=0.1)
    silence.set()


def test_the_proxy_carries_both_ways_and_ends(short_dir: Path) -> None:
    def echo(stream: socket.socket, _line: str) -> None:
        stream.sendall(b"OK 1\n")
        while data := stream.recv(65536):
            stream.sendall(data)
        stream.sendall(b"end")

    Streams(short_dir / "v", echo)
    proxy = agent.Proxy(short_dir / "p", lambda: agent.dial_streams(short_dir / "v", 7424))
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


def _ping(_request: object, _context: object) -> object:
    return pb.PingResponse()


def _info(_request: object, _context: object) -> object:
    return pb.SystemInfoResponse(
        cpu_count=2, memory_bytes=3, disk_free_bytes=4, os_version="L", agent_protocol_revision=1
    )


def _exec(request: "pb.ExecRequest", context: grpc.ServicerContext) -> Iterator[object]:
    if request.command == "gone":
        context.abort(grpc.StatusCode.UNAVAILABLE, "the agent goes away")
    words = [request.command, *request.args, request.working_dir, request.user, *sorted(request.env)]
    yield pb.ExecEvent(stdout=" ".join(words).encode(), sequence=1, exec_id=9)
    yield pb.ExecEvent(exit_code=7, sequence=2)


@pytest.fixture
def client(short_dir: Path) -> Iterator[agent.AgentClient]:
    """A client whose target is the proxy, as for a guest; behind it a gRPC server on a Unix socket."""
    server = grpc.server(futures.ThreadPoolExecutor(4))
    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    methods = {
        "Ping": unary(_ping, pb.PingRequest.FromString, pb.PingResponse.SerializeToString),
        "SystemInfo": unary(_info, pb.SystemInfoRequest.FromString, pb.SystemInfoResponse.SerializeToString),
        "Exec": stream(_exec, pb.ExecRequest.FromString, pb.ExecEvent.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vz.agent.v1.AgentService", methods),))
    server.add_insecure_port(f"unix:{short_dir}/a")
    server.start()

    def dial() -> socket.socket:
        stream = socket.socket(socket.AF_UNIX)
        stream.connect(str(short_dir / "a"))
        return stream

    proxy = agent.Proxy(short_dir / "p", dial)
    with agent.AgentClient(proxy.target) as client:
        yield client
    proxy.close()
    server.stop(0).wait()


def test_ping_and_system_info(client: agent.AgentClient) -> None:
    client.ping(30)
    assert client.system_info() == agent.SystemInfo(2, 3, 4, "L", 1)


def test_exec_streams_and_ends_with_the_exit_code(client: agent.AgentClient) -> None:
    got = list(client.exec("ls", ["-l"], working_dir="/w", env={"A": "1"}, user="root"))
    assert [event.WhichOneof("event") for event in got] == ["stdout", "exit_code"]
    assert got[0].stdout == b"ls -l /w root A"
    assert got[1].exit_code == 7


def test_a_failing_call_says_what_the_agent_said(client: agent.AgentClient) -> None:
    with pytest.raises(VzreproError, match="Exec failed: unavailable") as error:
        list(client.exec("gone"))
    assert error.value.reason == "the agent goes away"


def test_nobody_there_is_an_error_in_time(short_dir: Path) -> None:
    with agent.AgentClient(f"unix:{short_dir}/nobody") as client, pytest.raises(VzreproError, match="Ping failed"):
        client.ping(0.2)


def test_a_socket_name_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match="too long"):
        agent.private_socket(tmp_path / ("x" * 100), "vsock")
