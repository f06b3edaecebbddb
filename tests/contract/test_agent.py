"""The contract of the guest agent, all but `Exec`: what the guest is and uses, refusals, connections that are none,
and an agent that is killed. Each test runs against the agent on this host and the one in a guest.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from tests.contract.agents import LIMIT_SECS, Side, eventually, host_agent, refused
from vzrepro.guest.vm import agent_pb2 as pb
from vzrepro.guest.vm.agent import AgentError

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


# --- What the guest is and uses ----------------------------------------------------------------------------------


def test_system_info_is_the_machines(agent: Side) -> None:
    info = agent.client.system_info()
    assert info.agent_protocol_revision == 1
    assert info.cpu_count == int(agent.text("nproc"))
    kib = int(agent.text("sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"))
    assert info.memory_bytes == kib * 1024
    assert info.os_version == f"Linux {agent.text('uname -r')}"
    size, free = (int(word) for word in agent.text("stat -f -c '%b %a' /").split())
    assert 0 <= info.disk_free_bytes <= size * int(agent.text("stat -f -c %S /"))
    assert info.disk_free_bytes > 0 or free == 0


def test_resource_stats_are_the_machines(agent: Side) -> None:
    stats = agent.client.resource_stats()
    assert stats.memory_total_bytes == agent.client.system_info().memory_bytes
    assert 0 < stats.memory_used_bytes < stats.memory_total_bytes
    assert 0 <= stats.disk_used_bytes <= stats.disk_total_bytes
    assert 0.0 <= stats.cpu_usage_percent <= 100.0
    assert stats.process_count > 1
    assert len(stats.load_average) == 3
    assert all(0.0 <= load < 10_000 for load in stats.load_average)


def test_resource_stats_follow_what_goes_on(agent: Side) -> None:
    if agent.name == "host":
        pytest.skip("this host is not ours alone")
    before = agent.client.resource_stats()
    script = "head -c 40000000 /dev/zero > /dev/shm/ballast; for i in 1 2 3 4 5 6 7 8 9; do sleep 1000 & done; echo up"
    sleepers = agent.shell(f"{script}; wait").until(b"up\n")
    busy = agent.shell("echo up; while :; do :; done").until(b"up\n")
    after = agent.client.resource_stats()
    # Eleven, but the kernel's own workers count, and come and go.
    assert after.process_count >= before.process_count + 7
    assert after.memory_used_bytes > before.memory_used_bytes + 30_000_000
    eventually(lambda: agent.client.resource_stats().cpu_usage_percent > 60, "a busy processor")
    busy.execution.close()
    sleepers.execution.close()
    agent.text("rm /dev/shm/ballast")
    eventually(lambda: agent.client.resource_stats().process_count < after.process_count - 7, "the processes' end")


def test_the_guests_clock_is_right(agent: Side) -> None:
    before = time.time()
    there = int(agent.text("date +%s"))
    assert before - 10 < there < time.time() + 10


# --- Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["AgentService/Reboot", "NoService/Ping", "OciService/Pause", "NetworkService/", "AgentService/ping"]
)
def test_an_unknown_method_is_unimplemented(agent: Side, method: str) -> None:
    assert raw_call(agent, f"/vz.agent.v1.{method}", b"") == grpc.StatusCode.UNIMPLEMENTED
    agent.client.ping(LIMIT_SECS)


@pytest.mark.parametrize("method", ["Ping", "StdinWrite", "Signal"])
def test_a_message_that_is_none_is_a_status(agent: Side, method: str) -> None:
    status = raw_call(agent, f"/vz.agent.v1.AgentService/{method}", b"\xff" * 100)
    assert status in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    agent.client.ping(LIMIT_SECS)


def test_a_message_that_is_too_large_is_a_status(agent: Side) -> None:
    with pytest.raises(AgentError) as refusal:
        agent.client.stdin_write(1, bytes(20_000_000), timeout_secs=LIMIT_SECS)
    assert refusal.value.status in ("out_of_range", "resource_exhausted")
    agent.client.ping(LIMIT_SECS)


def test_fields_that_we_do_not_know_are_ignored(agent: Side) -> None:
    unknown = b"\xfa\x3e\x03abc"  # field 1007, three bytes
    request = pb.SystemInfoRequest().SerializeToString() + unknown
    assert raw_call(agent, "/vz.agent.v1.AgentService/SystemInfo", request) == grpc.StatusCode.OK


@pytest.mark.parametrize("call", ["stdin_write", "stdin_close", "signal", "resize"])
@pytest.mark.parametrize("exec_id", [0, 2**64 - 1])
def test_an_unknown_exec_id_is_not_found(agent: Side, call: str, exec_id: int) -> None:
    with refused("not_found"):
        match call:
            case "stdin_write":
                agent.client.stdin_write(exec_id, b"x", timeout_secs=LIMIT_SECS)
            case "stdin_close":
                agent.client.stdin_close(exec_id)
            case "signal":
                agent.client.signal(exec_id, 15)
            case "resize":
                agent.client.resize(exec_id, 24, 80)


def raw_call(agent: Side, path: str, request: bytes) -> grpc.StatusCode:
    """The status of a unary call that our client cannot make, of a client without any option."""
    with grpc.insecure_channel(agent.target) as channel:
        try:
            channel.unary_unary(path)(request, timeout=LIMIT_SECS, wait_for_ready=True)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


# --- Connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "authority",
    [
        "",
        "run%2Fagent.sock",
        "/run/agent.sock",
        "unix:///run/agent.sock",
        "guest:7424",
        "[::1]:7424",
        "a@b@",
        "%",
        "x" * 300,
    ],
    ids=["default", "percent", "path", "target", "port", "ipv6", "at", "only-percent", "long"],
)
def test_a_client_may_call_the_agent_what_it_likes(agent: Side, authority: str) -> None:
    options = [("grpc.default_authority", authority)] if authority else []
    with grpc.insecure_channel(agent.target, options=options) as channel:
        call = channel.unary_stream(
            "/vz.agent.v1.AgentService/Exec",
            request_serializer=pb.ExecRequest.SerializeToString,
            response_deserializer=pb.ExecEvent.FromString,
        )
        # The second request of a connection refers to what the first one spelled out.
        for _ in range(2):
            *_, last = call(pb.ExecRequest(command="true"), timeout=LIMIT_SECS, wait_for_ready=True)
            assert last.WhichOneof("event") == "exit_code"


@pytest.mark.parametrize(
    "greeting",
    [
        b"GET / HTTP/1.1\r\nHost: agent\r\n\r\n",
        bytes(range(256)) * 40,
        PREFACE + b"\xff" * 500,
        # A frame that claims to be larger than any may be.
        PREFACE + EMPTY_SETTINGS + bytes([255, 255, 255, 0, 0, 0, 0, 0, 1]) + bytes(1000),
        # A HEADERS frame whose block is not HPACK.
        PREFACE + EMPTY_SETTINGS + bytes([0, 0, 4, 1, 5, 0, 0, 0, 1]) + b"\xff\xff\xff\xff",
    ],
    ids=["http1", "noise", "preface-then-noise", "huge-frame", "bad-headers"],
)
def test_a_connection_that_speaks_something_else_ends(agent: Side, greeting: bytes) -> None:
    with agent.dial() as stream:
        stream.settimeout(LIMIT_SECS)
        try:
            stream.sendall(greeting)
            # Whatever it answers, it then hangs up.
            while stream.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):
            pass
    agent.client.ping(LIMIT_SECS)


def test_connections_that_say_nothing_are_in_nobodys_way(agent: Side) -> None:
    streams = [agent.dial() for _ in range(64)]
    for stream in streams[::2]:
        stream.sendall(PREFACE[:10])
    try:
        agent.client.ping(LIMIT_SECS)
        with agent.connect() as other:
            other.ping(LIMIT_SECS)
    finally:
        for stream in streams:
            stream.close()
    assert agent.text("echo still here") == "still here"


def test_more_connections_than_are_served_wait_for_their_turn(agent: Side) -> None:
    if agent.name == "guest":
        pytest.skip("the guest's device takes fewer")
    before = agent.resident_kib()
    streams = [agent.dial() for _ in range(1100)]
    try:
        for stream in streams:
            stream.sendall(PREFACE + EMPTY_SETTINGS)
        # The first one's answer: the agent's settings.
        assert streams[0].recv(9)[3:4] == b"\x04"
        assert agent.resident_kib() < before + 65_536
    finally:
        for stream in streams:
            stream.close()
    with agent.connect() as other:
        other.ping(LIMIT_SECS)


def test_a_connection_that_breaks_within_a_call_is_forgotten(agent: Side) -> None:
    # The headers of a call of StdinWrite, indexed where HPACK allows, and half of its message.
    path = b"/vz.agent.v1.AgentService/StdinWrite"
    block = b"\x83\x86" + literal(4, path) + literal(1, b"agent") + literal(31, b"application/grpc")
    headers = len(block).to_bytes(3, "big") + bytes([1, 4, 0, 0, 0, 1]) + block
    half = (100).to_bytes(3, "big") + bytes([0, 0, 0, 0, 0, 1]) + bytes(50)
    for _ in range(20):
        with agent.dial() as stream:
            stream.sendall(PREFACE + EMPTY_SETTINGS + headers + half)
    agent.client.ping(LIMIT_SECS)


def literal(index: int, value: bytes) -> bytes:
    """A header field whose name is entry `index` of HPACK's table (RFC 7541, 6.2.2), without Huffman coding."""
    start = bytes([index]) if index < 15 else bytes([15, index - 15])
    return start + bytes([len(value)]) + value


def test_many_clients_come_and_go(agent: Side) -> None:
    for _ in range(50):
        with agent.connect() as client:
            client.ping(LIMIT_SECS)


# --- The agent's own end ------------------------------------------------------------------------------------------


def test_an_agent_that_is_killed_is_back_and_its_commands_are_gone(agent: Side) -> None:
    users = ["", "4711"] if agent.is_root else [""]
    old = agent.pid()
    streams = [agent.shell("echo $$; exec sleep 1000", user=user).until(b"\n") for user in users]
    pids = [int(stream.stdout) for stream in streams]
    assert agent.alive(*pids) == pids
    killer = agent.shell("kill -KILL $PPID")
    for stream in [*streams, killer]:
        with pytest.raises(AgentError) as loss:
            stream.whole()
        assert loss.value.status in ("unavailable", "cancelled", "unknown", "internal"), loss.value
    agent.client.ping(LIMIT_SECS)
    assert agent.pid() != old
    eventually(lambda: not agent.alive(*pids), "the end of the killed agent's commands")
    with refused("not_found"):
        agent.client.signal(2**63, 15)


def test_the_agent_leaves_no_zombies(agent: Side) -> None:
    for _ in range(20):
        agent.shell("sleep 1000 & true & (true; true) & exit 0").whole()
        agent.shell("sleep 1000 & echo up; wait").until(b"up").execution.close()
        agent.exec("/no/such/command").whole()
    eventually(lambda: not agent.zombies(), "every child reaped")
    agent.text("pkill -x sleep -P 1; :" if agent.name == "guest" else ":")


# --- The program -------------------------------------------------------------------------------------------------


def test_version_names_the_protocol_revision(agent_program: Path) -> None:
    done = subprocess.run([agent_program, "--version"], capture_output=True, text=True, check=True)
    name, version, rest = done.stdout.split(" ", 2)
    assert (name, rest) == ("vz-guest-agent", "(protocol revision 1)\n")
    assert version[0].isdigit()


def test_a_wrong_option_is_explained(agent_program: Path) -> None:
    done = subprocess.run([agent_program, "--port", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--port" in done.stderr
    assert "usage:" in done.stderr


def test_it_refuses_to_be_pid_1(agent_program: Path) -> None:
    # A PID name space of one's own needs root, or a kernel that lets users make them.
    new_space = ["unshare", "--pid", "--fork", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if shutil.which("unshare") is None or subprocess.run([*new_space, "true"], check=False).returncode:
        pytest.skip("this machine gives us no PID name space")
    command = [*new_space, str(agent_program), "--listen", "unix:/nonexistent/agent"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PID 1" in done.stderr


def test_the_ready_line_comes_once_it_listens(agent_program: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("r")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "ready"))
        listener.listen()
        listener.settimeout(LIMIT_SECS)
        with host_agent(agent_program, directory / "agent", "--ready", f"unix:{directory}/ready") as agent:
            stream, _ = listener.accept()
            with stream, stream.makefile() as lines:
                line = lines.readline()
            agent.client.ping(LIMIT_SECS)
            version = subprocess.run([agent_program, "--version"], capture_output=True, text=True, check=True)
            assert line == f"ready {version.stdout.split()[1]} 1\n"


def test_nobody_needs_to_hear_the_ready_line(agent_program: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("r") / "agent"
    with host_agent(agent_program, path, "--ready", "unix:/nonexistent/host") as agent:
        assert agent.text("echo here") == "here"
