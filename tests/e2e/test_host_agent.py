"""`docs/host-contract.md`, the agent: what hosts rely on when they call it, each in connections of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import needs_qemu
from tests.hosts import Connection, Hardware, Host, Refused, bundles, eventually, playing
from tests.hosts.wire import stubs
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def host(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A guest whose root file system is a small image's, with the user `web` (33) at home in /srv."""
    root = bundles.write_root(tmp_path_factory.mktemp("root"), busybox)
    (root / "srv").mkdir()
    machine = Hardware(bundle / "vmlinux", bundle / "initramfs.img")
    with playing(bundle, programs, busybox, share=root, stacked=False, hardware=machine) as host:
        yield host


@pytest.fixture
def connection(host: Host) -> Iterator[Connection]:
    """A connection of the test's own."""
    with host.connect() as connection:
        yield connection


def test_a_plain_grpc_client_needs_no_authority_behind_a_unix_socket(connection: Connection) -> None:
    connection.ping()
    info = connection.system_info()
    assert info.agent_protocol_revision == 1
    assert info.os_version.startswith("Linux 6.12.")
    assert connection.resource_stats().process_count > 1


def test_the_same_exec_key_from_another_connection_is_another_request(host: Host) -> None:
    for number in range(3):
        with host.connect() as connection:
            assert connection.exec("/bin/sh", "-c", f"echo {number}").output().stdout == f"{number}\n".encode()


def test_the_same_key_of_two_connections_at_once_is_two_requests(host: Host) -> None:
    with host.connect() as one, host.connect() as two:
        first = one.exec("/bin/sh", "-c", "echo first; read x; echo $x").until("first\n")
        assert two.exec("/bin/sh", "-c", "echo second").output().stdout == b"second\n"
        first.write(b"typed\n")
        assert first.output().stdout == b"first\ntyped\n"


def test_the_same_create_key_from_another_connection_is_another_request(host: Host) -> None:
    ids = ("k1", "k2")
    for container_id in ids:
        host.write(container_id, command=["sleep", "1000"])
        host.overlay(container_id)
    for container_id in ids:
        with host.connect() as connection:
            connection.oci_create(container_id, host.bundle(container_id))
            assert connection.oci_state(container_id).container_id == container_id
    for container_id in ids:
        host.main.oci_delete(container_id, force=True)


def test_a_container_whose_processes_take_long_to_die_is_deleted_all_the_same(host: Host) -> None:
    """youki gives up after a tenth of a second, as on a host that has a lot to do."""
    host.write("slow", command=["sleep", "1000"])
    host.overlay("slow")
    with host.connect() as connection:
        connection.oci_create("slow", host.bundle("slow"))
        # What keeps the cgroup from being removed meanwhile is as good as a process.
        cgroup = "/sys/fs/cgroup/:youki:slow"
        connection.shell(f"mkdir {cgroup}/held && (sleep 2; rmdir {cgroup}/held) > /dev/null 2>&1 &")
        connection.shell(f"until [ -d {cgroup}/held ]; do sleep 0.1; done")
        connection.oci_delete("slow", force=True)
        assert connection.shell(f"ls -d {cgroup} /run/youki/slow /run/vz/oci/slow 2> /dev/null || true") == ""


def test_a_key_counts_within_its_connection(connection: Connection) -> None:
    """A host that repeats a request, after a time-out say, must not have it done twice."""
    pb, _ = stubs()
    metadata = connection.metadata("exec_container")
    request = pb.ExecRequest(command="/bin/sh", args=["-c", "echo x >> /tmp/times"], metadata=metadata)
    for _ in range(2):
        assert [event.exit_code for event in connection.agent.Exec(request)][-1] == 0
    assert connection.shell("cat /tmp/times") == "x\n"


def test_a_port_forward_waits_for_its_listener(host: Host, connection: Connection) -> None:
    answers: list[bytes] = []

    def ask() -> None:
        with connection.forward(8080) as forward:
            forward.send(b"early\n")
            forward.end()
            answers.append(forward.received())

    # Begun before: the agent waits five seconds, and a busy machine's guest may take as long to begin a command.
    serve = "echo ready; read go; echo served | nc -l -p 8080 > /tmp/heard"
    server = connection.exec("/bin/sh", "-c", serve).until("ready\n")
    before = host.refusals()
    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: host.refusals() > before, "the port was tried")
    server.write(b"go\n")
    assert server.output().end == 0
    asking.join()
    assert answers == [b"served\n"]
    assert connection.shell("cat /tmp/heard") == "early\n"


def test_a_port_that_nobody_listens_on_fails_after_the_wait(connection: Connection) -> None:
    with connection.forward(9, "127.0.0.1") as forward, pytest.raises(Refused) as refused:
        forward.received()
    assert refused.value.status == "unavailable"
    assert "127.0.0.1:9" in refused.value.sentence


def test_stdin_close_and_signal_after_the_end_are_fine(connection: Connection) -> None:
    running = connection.exec("/bin/true")
    assert running.output().end == 0
    running.close_stdin()
    running.close_stdin()
    running.signal(15)


def test_exec_of_a_missing_program_in_a_container_is_exit_code_127(host: Host) -> None:
    host.launch("m1", command=["sleep", "1000"])
    for missing in ("nosuch", "/no/such/program"):
        assert host.main.oci_exec("m1", missing).exit_code == 127
    assert host.main.oci_exec("m1", "sh", "-c", "exit 3").exit_code == 3
    host.main.oci_delete("m1", force=True)


def test_a_user_starts_at_home_with_the_names_of_a_login(connection: Connection) -> None:
    script = 'pwd; id -u; echo "$HOME $USER $LOGNAME $SHELL"; echo "<$TERM>"'
    assert connection.text("/bin/sh", "-c", script, user="web") == "/srv\n33\n/srv web web /bin/sh\n<>\n"
    assert connection.text("/bin/sh", "-c", 'echo "$HOME $LOGNAME"; pwd', user="web", working_dir="/tmp") == (
        "/srv web\n/tmp\n"
    )
    env = {"HOME": "/elsewhere", "LOGNAME": "other"}
    assert connection.text("/bin/sh", "-c", 'echo "$HOME $LOGNAME"', user="web", env=env) == "/elsewhere other\n"


def test_a_terminal_is_an_xterm_with_256_colours_unless_named(connection: Connection) -> None:
    script = 'echo "$TERM $(stty size)"'
    assert connection.text("/bin/sh", "-c", script, pty=(33, 99)) == "xterm-256color 33 99\r\n"
    assert connection.text("/bin/sh", "-c", script, pty=(24, 80), env={"TERM": "vt100"}) == "vt100 24 80\r\n"


def test_an_interactive_shell_is_typed_into_and_resized(host: Host) -> None:
    with host.connect() as connection:
        shell = connection.exec("/bin/sh", "-l", pty=(24, 80), env={"PS1": "ready> "}).until("ready> ")
        shell.resize(40, 120)
        shell.write(b"stty size; exit 5\n")
        output = shell.output()
    assert b"40 120\r\n" in output.stdout
    assert output.end == 5
