"""Reaching an agent: the handshake with the vsock device, the proxy, and the calls, against servers of our own."""

import socket
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import agent
from vzrepro.guest.vm import agent_pb2 as pb
from vzrepro.guest.vm.dial import Proxy


@pytest.fixture
def short_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


def _ping(_request: object, _context: object) -> object:
    return pb.PingResponse()


def _info(_request: object, _context: object) -> object:
    return pb.SystemInfoResponse(
        cpu_count=2, memory_bytes=3, disk_free_bytes=4, os_version="L", agent_protocol_revision=1
    )


def _exec(request: "pb.ExecRequest", context: grpc.ServicerContext) -> Iterator[object]:
    if request.command == "gone":
        context.abort(grpc.StatusCode.UNAVAILABLE, "the agent goes away")
    while request.command == "flood":
        yield pb.ExecEvent(stdout=bytes(1 << 20), stderr=bytes(1 << 20))
    words = [request.command, *request.args, request.working_dir, request.user, *sorted(request.env)]
    yield pb.ExecEvent(stdout=" ".join(words).encode(), sequence=1, exec_id=9)
    if request.command == "nothing":
        yield pb.ExecEvent(stderr=b"no such file", sequence=2)
        yield pb.ExecEvent(error="it cannot be run", sequence=3)
    elif request.command != "silence":
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

    proxy = Proxy(short_dir / "p", dial)
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


def test_a_commands_end_is_awaited(client: agent.AgentClient) -> None:
    taken: list[bytes] = []
    assert client.exec("ls").finish() == agent.Ended(7, None, b"ls  ", b"", b"ls  ")
    assert client.exec("ls").finish(taken.append) == agent.Ended(7, None, b"", b"", b"")
    assert taken == [b"ls  "]
    lost = client.exec("nothing").finish()
    assert lost == agent.Ended(None, "it cannot be run", b"nothing  ", b"no such file", b"nothing  no such file")
    assert lost.text == "it cannot be run"
    assert client.exec("silence").finish().text == "the guest agent did not say how the command ended"


def test_what_a_command_says_is_held_up_to_a_bound(client: agent.AgentClient) -> None:
    for take in (None, lambda _data: None):  # who takes one stream is not given the other
        with client.exec("flood") as execution, pytest.raises(VzreproError, match="says more than"):
            execution.finish(take)


def test_a_failing_call_says_what_the_agent_said(client: agent.AgentClient) -> None:
    with pytest.raises(VzreproError, match="Exec failed: unavailable") as error:
        list(client.exec("gone"))
    assert error.value.reason == "the agent goes away"


def test_nobody_there_is_an_error_in_time(short_dir: Path) -> None:
    with agent.AgentClient(f"unix:{short_dir}/nobody") as client, pytest.raises(VzreproError, match="Ping failed"):
        client.ping(0.2)


def test_a_client_that_was_closed_says_so(client: agent.AgentClient) -> None:
    client.close()
    for call in (lambda: client.ping(30), lambda: client.exec("ls"), lambda: client.port_forward(80)):
        with pytest.raises(agent.AgentError, match="unavailable"):
            call()
