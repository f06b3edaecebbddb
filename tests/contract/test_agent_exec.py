"""The contract of the guest agent's commands: `Exec` and the calls on a command that runs. Each test runs against the
agent on this host and the one in a guest; what holds for every stream of events is asserted by `agents.Follower`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import uuid
from collections.abc import Iterator

import pytest

from tests.contract.agents import LIMIT_SECS, Side, eventually, refused
from vzrepro.guest.vm.agent import AgentError, Execution

SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def directory(agent: Side) -> Iterator[str]:
    """A directory where the agent is, that every user may write to."""
    path = agent.text("d=$(mktemp -d) && chmod 777 $d && echo $d")
    yield path
    agent.text(f"rm -rf {path}")


# --- The stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 3, 127, 255])
def test_both_streams_and_the_exit_code_arrive(agent: Side, code: int) -> None:
    done = agent.shell(f"echo out; echo err >&2; exit {code}").whole()
    assert (done.stdout, done.stderr, done.end) == (b"out\n", b"err\n", code)


def test_each_command_has_an_id_of_its_own_and_the_requests_id(agent: Side) -> None:
    ids = {agent.exec("true", request_id=f"request {n}").whole().exec_id for n in range(20)}
    assert len(ids) == 20


def test_output_comes_while_the_command_runs(agent: Side) -> None:
    command = agent.shell("echo before; read line; echo after $line").until(b"before\n")
    assert command.stdout == b"before\n"
    agent.client.stdin_write(command.exec_id, b"all\n", timeout_secs=LIMIT_SECS)
    assert command.whole().stdout == b"before\nafter all\n"


def test_a_quiet_commands_id_is_known_at_once(agent: Side) -> None:
    command = agent.exec("sleep", ["1000"]).started()
    assert command.sequence == 1
    command.execution.close()


def test_output_is_bytes(agent: Side) -> None:
    done = agent.shell('i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %o $i)"; i=$((i+1)); done').whole()
    assert done.stdout == bytes(range(256))


def test_the_last_words_of_a_command_are_not_lost(agent: Side) -> None:
    for _ in range(20):
        done = agent.shell("head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2").whole()
        assert (len(done.stdout), len(done.stderr), done.end) == (60_000, 60_000, 0)


def test_a_stream_ends_with_its_command_not_with_what_it_left_behind(agent: Side) -> None:
    done = agent.shell("sleep 1000 & echo $!").whole()
    assert done.end == 0
    assert agent.alive(int(done.stdout)) == [int(done.stdout)]
    agent.text(f"kill -KILL {done.text}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1])
def test_death_by_signal_is_128_and_its_number(agent: Side, number: signal.Signals) -> None:
    assert agent.shell(f"kill -{number} $$").whole().end == 128 + number


def test_what_cannot_start_is_an_error_event(agent: Side, directory: str) -> None:
    agent.text(f"echo data > {directory}/data")
    for command, arguments, working_dir, user, named in (
        ("/no/such/command", [], "", "", "/no/such/command"),
        ("no-such-command", [], "", "", "no-such-command"),
        (f"{directory}/data", [], "", "", f"{directory}/data"),
        (directory, [], "", "", directory),
        ("pwd", [], "/no/such/place", "", "/no/such/place"),
        ("pwd", [], f"{directory}/data", "", f"{directory}/data"),
        ("id", [], "", "no-such-user", "no-such-user"),
        ("id", [], "", "0:no-such-group", "no-such-group"),
        ("echo", ["nul\0byte"], "", "", "echo"),
        ("echo", ["x" * 3_000_000], "", "", "echo"),
    ):
        done = agent.exec(command, arguments, working_dir=working_dir, user=user).whole()
        assert isinstance(done.end, str), (command, done)
        assert named in done.end
        assert (done.stdout, done.stderr) == (b"", b"")


def test_a_request_that_means_nothing_is_refused(agent: Side) -> None:
    for command, env, pty in (("", {}, None), ("true", {"a=b": "c"}, None), ("true", {"": "c"}, None)):
        with refused("invalid_argument"):
            agent.exec(command, env=env, pty=pty).whole()
    with refused("invalid_argument"):
        agent.exec("true", pty=(24, 70_000)).whole()


# --- What a command finds ----------------------------------------------------------------------------------------


def test_the_environment_is_the_requests(agent: Side) -> None:
    done = agent.exec("env", env={"GREETING": "héllo\nworld", "EMPTY": ""}).whole()
    found = done.text
    assert "GREETING=héllo\nworld\n" in found
    assert "EMPTY=\n" in found
    assert f"PATH={SEARCH_PATH}\n" in found
    assert "AGENTS_OWN" not in found
    names = {line.partition("=")[0] for line in found.replace("\nworld", "").splitlines()}
    users = {"HOME", "USER", "LOGNAME", "SHELL"}
    assert names - {"PWD", "SHLVL", "_"} == {"GREETING", "EMPTY", "PATH", *users}


def test_the_working_directory_is_the_requests_or_the_agents(agent: Side, directory: str) -> None:
    assert agent.exec("pwd", working_dir=directory).whole().text == f"{directory}\n"
    there, agents = agent.text("pwd; readlink /proc/$PPID/cwd").splitlines()
    assert there == agents


def test_the_requests_path_is_searched(agent: Side, directory: str) -> None:
    agent.text(f"printf '#!/bin/sh\\necho found $1\\n' > {directory}/own-tool; chmod 755 {directory}/own-tool")
    assert agent.exec("own-tool", ["it"], env={"PATH": f"{directory}:/bin"}).whole().text == "found it\n"


@pytest.mark.parametrize(
    ("user", "wanted", "home"),
    [
        ("", "0 0", "/root"),
        ("root", "0 0", "/root"),
        ("0", "0 0", "/root"),
        ("nobody", "65534 65534", None),
        ("4711", "4711 4711", "/"),
        ("4711:12", "4711 12", "/"),
    ],
)
def test_a_user_brings_their_numbers(agent: Side, user: str, wanted: str, home: str | None) -> None:
    if not agent.is_root:
        pytest.skip("the agent on this host may not become others")
    for pty in (None, (24, 80)):
        command = agent.shell("echo $(id -u) $(id -g) $HOME; id -G", user=user, pty=pty).whole()
        assert command.end == 0
        found, _, groups = command.text.replace("\r", "").partition("\n")
        assert found.startswith(f"{wanted} ")
        assert home is None or found.endswith(f" {home}")
        # None of the agent's own groups are left to somebody else.
        assert user in ("", "root", "0") or "0" not in groups.split()


_ENTRIES = """
cp -p /etc/passwd $d/passwd
echo "ann:x:4712:4712::$d/ann:/bin/ann-shell" >> /etc/passwd
echo "bob:x:4713:4713::$d/closed/bob:" >> /etc/passwd
echo "eve:x:4714:4714::$d/none:/bin/sh" >> /etc/passwd
mkdir -p $d/ann $d/closed/bob && chmod 700 $d/closed
"""


@pytest.fixture
def people(agent: Side, directory: str) -> Iterator[str]:
    """The directory of ann, who has a home, bob, who may not go there, and eve, who has none."""
    if not agent.is_root:
        pytest.skip("the agent on this host may not become others")
    agent.text(f"set -e; d={directory}; {_ENTRIES}")
    yield directory
    # The file stays the one that it is: it may be mounted.
    agent.text(f"cat {directory}/passwd > /etc/passwd")


def test_a_command_as_a_user_starts_at_home(agent: Side, people: str) -> None:
    script = 'echo "$PWD|$HOME|$USER|$LOGNAME|$SHELL|$TERM"'
    ann = f"{people}/ann|{people}/ann|ann|ann|/bin/ann-shell|"
    for user, wanted in (
        ("ann", ann),
        ("4712", ann),
        ("ann:4713", ann),
        ("bob", f"/|{people}/closed/bob|bob|bob|/bin/sh|"),
        ("eve", f"/|{people}/none|eve|eve|/bin/sh|"),
        ("4711", "/|/|4711|4711|/bin/sh|"),
    ):
        assert agent.shell(script, user=user).whole().text == f"{wanted}\n"
        assert agent.shell(script, user=user, pty=(24, 80)).whole().text == f"{wanted}xterm-256color\r\n"
    asked = {"HOME": "/h", "USER": "u", "LOGNAME": "l", "SHELL": "s", "TERM": "dumb"}
    found = agent.exec("/bin/sh", ["-c", script], env=asked, working_dir="/tmp", user="ann", pty=(24, 80)).whole()
    assert found.text == "/tmp|/h|u|l|s|dumb\r\n"


def test_another_user_cannot_do_what_root_can(agent: Side) -> None:
    if not agent.is_root:
        pytest.skip("the agent on this host may not become others")
    assert agent.shell("kill -0 $PPID", user="nobody").whole().end != 0


def test_a_command_gets_only_its_own_files(agent: Side) -> None:
    others = [agent.exec("sleep", ["1000"]).started() for _ in range(10)]
    done = agent.text("for fd in /proc/self/fd/*; do echo ${fd##*/}; done")
    assert set(done.split()) <= {"0", "1", "2", "3"}  # 3: the shell itself reads the directory
    for other in others:
        other.execution.close()


# --- Standard input ----------------------------------------------------------------------------------------------


def test_input_arrives_in_order_and_ends(agent: Side) -> None:
    command = agent.exec("sha256sum").started()
    wanted = hashlib.sha256()
    for number in range(200):
        data = f"{number} ".encode() * 1000
        wanted.update(data)
        agent.client.stdin_write(command.exec_id, data, timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    assert command.whole().text == f"{wanted.hexdigest()}  -\n"


def test_one_large_write_arrives_whole(agent: Side) -> None:
    command = agent.exec("sha256sum").started()
    data = os.urandom(3_000_000)
    agent.client.stdin_write(command.exec_id, data, timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    assert command.whole().text == f"{hashlib.sha256(data).hexdigest()}  -\n"


def test_after_the_end_of_input_nothing_can_be_written(agent: Side) -> None:
    command = agent.shell("cat; exec sleep 1000").started()
    agent.client.stdin_write(command.exec_id, b"", timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    with refused("failed_precondition"):
        agent.client.stdin_write(command.exec_id, b"x", timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    command.execution.close()


def test_a_command_that_closed_its_input_takes_no_more(agent: Side) -> None:
    command = agent.shell("exec < /dev/null; echo closed; exec sleep 1000").until(b"closed")
    with refused("failed_precondition"):
        agent.client.stdin_write(command.exec_id, b"x", timeout_secs=LIMIT_SECS)
    command.execution.close()


@pytest.mark.parametrize("command", ["true", "/no/such/command"])
def test_what_comes_after_a_commands_end_is_no_error_unless_it_is_lost(agent: Side, command: str) -> None:
    exec_id = agent.exec(command).whole().exec_id
    agent.client.stdin_close(exec_id)
    agent.client.signal(exec_id, signal.SIGTERM)
    agent.client.resize(exec_id, 24, 80)
    with refused("not_found"):
        agent.client.stdin_write(exec_id, b"x", timeout_secs=LIMIT_SECS)
    with refused("invalid_argument"):
        agent.client.signal(exec_id, 65)
    # The next one, which nobody has started.
    with refused("not_found"):
        agent.client.signal(exec_id + 1, signal.SIGTERM)


def test_the_end_of_input_does_not_wait_for_a_command_that_ends(agent: Side) -> None:
    command = agent.shell("echo up; exec sleep 1000").until(b"up")
    calls = [
        threading.Thread(target=agent.client.stdin_write, args=(command.exec_id, bytes(1_000_000))),
        threading.Thread(target=agent.client.stdin_close, args=(command.exec_id,)),
    ]
    with warnings_of_threads() as raised:
        for call in calls:
            call.start()
            call.join(1)
            assert call.is_alive()
        agent.client.signal(command.exec_id, signal.SIGKILL)
        for call in calls:
            call.join(LIMIT_SECS)
    # The writer's data is lost, which it is told; the other one has what it wanted.
    assert [type(error) for error in raised] == [AgentError]


@contextlib.contextmanager
def warnings_of_threads() -> Iterator[list[BaseException]]:
    """What the threads of the block raise."""
    raised: list[BaseException] = []
    before, threading.excepthook = threading.excepthook, lambda args: raised.append(args.exc_value or SystemExit())
    try:
        yield raised
    finally:
        threading.excepthook = before


def test_a_writer_waits_for_a_command_that_does_not_read(agent: Side) -> None:
    # Whether the signal comes before the shell waits or while it does: it is the trap that ends the sleep.
    command = agent.shell("trap 'kill $!' USR1; sleep 1000 & echo up; wait $!; exec sha256sum").until(b"up\n")
    before = agent.resident_kib()
    total, chunk = 64_000_000 // 16_384, os.urandom(16_384)
    if agent.name == "guest":
        total //= 8
    accepted = []

    def write() -> None:
        for _ in range(total):
            agent.client.stdin_write(command.exec_id, chunk, timeout_secs=LIMIT_SECS)
            accepted.append(len(chunk))

    writer = threading.Thread(target=write)
    writer.start()
    seen = -1
    while seen != len(accepted) or not seen:
        seen = len(accepted)
        writer.join(2)
    # The pipe is full, and nobody else has to wait for it.
    assert sum(accepted) < 1_000_000
    assert agent.text("echo others go on") == "others go on"
    assert agent.resident_kib() < before + 8192
    agent.client.signal(command.exec_id, signal.SIGUSR1)
    writer.join(LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    assert command.whole().text == f"up\n{hashlib.sha256(chunk * total).hexdigest()}  -\n"


def test_a_writer_does_not_wait_for_a_command_that_ends(agent: Side) -> None:
    command = agent.shell("echo up; exec sleep 1000").until(b"up")
    answers: list[AgentError] = []

    def write() -> None:
        try:
            agent.client.stdin_write(command.exec_id, bytes(1_000_000), timeout_secs=LIMIT_SECS)
        except AgentError as error:
            answers.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(1)
    assert writer.is_alive()
    agent.client.signal(command.exec_id, signal.SIGKILL)
    assert command.whole().end == 137
    writer.join(LIMIT_SECS)
    # Which of the two is seen first, the command's end or its closed pipe, is left to chance.
    assert [error.status in ("not_found", "failed_precondition") for error in answers] == [True]


# --- Signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_a_command(agent: Side, number: signal.Signals) -> None:
    # INT and QUIT too: a command ignores none of what the agent's own parent has it ignore.
    command = agent.exec("sleep", ["1000"]).started()
    agent.client.signal(command.exec_id, number)
    assert command.whole().end == 128 + number


def test_a_command_may_handle_a_signal(agent: Side) -> None:
    script = "trap 'echo caught; exit 5' USR2; echo ready; while :; do sleep 0.1; done"
    command = agent.shell(script).until(b"ready\n")
    agent.client.signal(command.exec_id, signal.SIGUSR2)
    done = command.whole()
    assert (done.stdout, done.end) == (b"ready\ncaught\n", 5)


def test_a_stopped_command_goes_on(agent: Side) -> None:
    command = agent.shell("echo $$; read line; echo $line").until(b"\n")
    pid = int(command.stdout)
    agent.client.signal(command.exec_id, signal.SIGSTOP)
    eventually(lambda: "T" in agent.text(f"cut -d ' ' -f 3 /proc/{pid}/stat"), "a stopped command")
    agent.client.stdin_write(command.exec_id, b"on\n", timeout_secs=LIMIT_SECS)
    agent.client.signal(command.exec_id, signal.SIGCONT)
    assert command.whole().text == f"{pid}\non\n"


@pytest.mark.parametrize("number", [-1, 0, 65, 1000])
def test_what_is_no_signal_is_refused(agent: Side, number: int) -> None:
    command = agent.exec("sleep", ["1000"]).started()
    with refused("invalid_argument"):
        agent.client.signal(command.exec_id, number)
    command.execution.close()


# --- Terminals ---------------------------------------------------------------------------------------------------


def test_a_terminal_is_one(agent: Side) -> None:
    script = "[ -t 0 ] && [ -t 1 ] && [ -t 2 ] && : < /dev/tty && stty size && echo out && echo err >&2; exit 3"
    done = agent.shell(script, pty=(33, 99)).whole()
    assert (done.stdout, done.stderr, done.end) == (b"33 99\r\nout\r\nerr\r\n", b"", 3)
    assert agent.shell("[ -t 0 ] || [ -t 1 ] || [ -t 2 ]").whole().end == 1


def test_a_terminal_belongs_to_its_user(agent: Side) -> None:
    if not agent.is_root:
        pytest.skip("the agent on this host may not become others")
    done = agent.shell("echo mine > $(tty)", user="nobody", pty=(24, 80)).whole()
    assert (done.text, done.end) == ("mine\r\n", 0)


def test_a_terminal_can_be_resized(agent: Side) -> None:
    # `wait` is what a signal interrupts: a shell runs a trap only between commands.
    script = "trap 'echo $(stty size) now' WINCH; sleep 1000 & echo ready; while :; do wait; done"
    command = agent.shell(script, pty=(24, 80)).until(b"ready")
    agent.client.resize(command.exec_id, 50, 132)
    command.until(b"50 132 now")
    command.execution.close()


def test_what_cannot_be_resized_is_refused(agent: Side) -> None:
    command = agent.exec("sleep", ["1000"]).started()
    with refused("failed_precondition"):
        agent.client.resize(command.exec_id, 24, 80)
    command.execution.close()
    command = agent.exec("sleep", ["1000"], pty=(24, 80)).started()
    for rows, cols in ((0, 80), (24, 70_000)):
        with refused("invalid_argument"):
            agent.client.resize(command.exec_id, rows, cols)
    command.execution.close()


def test_control_c_interrupts_what_is_in_the_foreground(agent: Side) -> None:
    # What is interrupted says that it is up: a key that comes while the shell starts it is the shell's alone.
    command = agent.shell("sh -c 'echo up; exec sleep 1000'; echo not reached", pty=(24, 80)).until(b"up")
    agent.client.stdin_write(command.exec_id, b"\x03", timeout_secs=LIMIT_SECS)
    done = command.whole()
    assert done.end == 130
    assert b"not reached" not in done.stdout
    # One that ignores it stays.
    command = agent.shell("trap '' INT; echo up; read line; echo $line", pty=(24, 80)).until(b"up")
    agent.client.stdin_write(command.exec_id, b"\x03still here\r", timeout_secs=LIMIT_SECS)
    assert command.whole().text.endswith("still here\r\n")


def test_what_is_typed_is_echoed_and_control_d_ends_it(agent: Side) -> None:
    command = agent.exec("cat", pty=(24, 80)).started()
    agent.client.stdin_write(command.exec_id, b"hello\r", timeout_secs=LIMIT_SECS)
    command.until(b"hello\r\nhello\r\n")
    agent.client.stdin_write(command.exec_id, b"\x04", timeout_secs=LIMIT_SECS)
    assert command.whole().end == 0


@pytest.mark.parametrize("typed", [b"", b"line\n", b"no end of line"])
def test_the_end_of_input_reaches_a_program_on_a_terminal(agent: Side, typed: bytes) -> None:
    command = agent.shell("stty -echo; echo ready; cat; echo end", pty=(24, 80)).until(b"ready\r\n")
    agent.client.stdin_write(command.exec_id, typed, timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id)
    done = command.whole()
    assert (done.stdout, done.end) == (b"ready\r\n" + typed.replace(b"\n", b"\r\n") + b"end\r\n", 0)


def test_much_output_on_a_terminal_arrives_whole(agent: Side) -> None:
    done = agent.shell("stty -opost; head -c 1000000 /dev/zero; printf end", pty=(24, 80)).whole()
    assert (len(done.stdout), done.stdout[-4:], done.end) == (1_000_003, b"\0end", 0)
    for _ in range(20):
        assert agent.exec("printf", ["last words"], pty=(24, 80)).whole().text == "last words"


def test_a_closed_terminal_takes_its_commands_along(agent: Side) -> None:
    command = agent.shell("sleep 1000 & echo $$ $!; wait", pty=(24, 80)).until(b"\n")
    pids = [int(word) for word in command.stdout.split()]
    assert agent.alive(*pids) == pids
    command.execution.close()
    eventually(lambda: not agent.alive(*pids), "their end")


# --- Idempotency -------------------------------------------------------------------------------------------------


@pytest.fixture
def key() -> str:
    """An idempotency key that nobody has used."""
    return uuid.uuid4().hex


def test_a_second_exec_with_the_key_answers_as_the_first_and_runs_nothing(
    agent: Side, directory: str, key: str
) -> None:
    script = f"echo ran >> {directory}/log; echo out $$; echo err >&2; exit 7"
    first = agent.shell(script, key=key).whole()
    assert first.end == 7
    assert agent.shell(script, key=key).whole() == first
    assert agent.text(f"cat {directory}/log") == "ran"


def test_a_key_counts_within_its_connection(agent: Side, directory: str) -> None:
    # As hosts number them: anew on each connection.
    key = "exec_container:req_0000000000000001"
    script = f"echo $$ >> {directory}/log; echo $$"
    ids = set()
    for _ in range(5):
        with agent.connect() as client:
            done = agent.shell(script, key=key, client=client).whole()
            assert agent.shell(script, key=key, client=client).whole() == done
            other = agent.shell("echo other", key=key, client=client).whole()
            assert (other.text, other.end) == ("other\n", 0)
            ids.add(done.exec_id)
    assert len(ids) == 5
    assert len(agent.text(f"cat {directory}/log").split()) == 5


def test_two_hosts_with_the_same_keys_do_not_meet(agent: Side, key: str) -> None:
    with agent.connect() as one, agent.connect() as other:
        commands = [agent.shell("echo $$; read line; echo $line", key=key, client=client) for client in (one, other)]
        first, second = (command.until(b"\n") for command in commands)
        assert first.exec_id != second.exec_id
        one.stdin_write(first.exec_id, b"first\n", idempotency_key=key, timeout_secs=LIMIT_SECS)
        other.stdin_write(second.exec_id, b"second\n", idempotency_key=key, timeout_secs=LIMIT_SECS)
        assert first.whole().text.endswith("first\n")
        assert second.whole().text.endswith("second\n")


def test_a_second_exec_joins_one_that_still_runs(agent: Side, key: str) -> None:
    script = "echo $$; read line; echo $line"
    first = agent.shell(script, key=key).until(b"\n")
    second = agent.shell(script, key=key).until(b"\n")
    assert (second.exec_id, second.stdout) == (first.exec_id, first.stdout)
    agent.client.stdin_write(first.exec_id, b"both\n", timeout_secs=LIMIT_SECS)
    assert first.whole() == second.whole()


def test_a_command_ends_with_its_last_client_and_its_key_is_free(agent: Side, key: str) -> None:
    script = "echo $$; exec sleep 1000"
    first, second = (agent.shell(script, key=key).until(b"\n") for _ in range(2))
    pid = int(first.stdout)
    vanish(first.execution)
    assert agent.alive(pid) == [pid]
    vanish(second.execution)
    eventually(lambda: not agent.alive(pid), "the command's end")
    third = agent.shell(script, key=key).until(b"\n")
    assert third.exec_id != first.exec_id
    third.execution.close()


def test_a_second_execs_request_id_is_its_own(agent: Side, key: str) -> None:
    first = agent.exec("true", key=key, request_id="one").whole()
    assert agent.exec("true", key=key, request_id="two").whole() == first


def test_a_command_that_cannot_start_does_not_start_later(agent: Side, directory: str, key: str) -> None:
    first = agent.exec(f"{directory}/tool", key=key).whole()
    assert isinstance(first.end, str)
    agent.text(f"printf '#!/bin/sh\\n' > {directory}/tool; chmod 755 {directory}/tool")
    assert agent.exec(f"{directory}/tool", key=key).whole() == first


def test_another_request_with_the_key_is_another_one(agent: Side, directory: str, key: str) -> None:
    assert agent.shell("echo one", key=key).whole().text == "one\n"
    assert agent.shell("echo two", key=key).whole().text == "two\n"
    assert agent.shell("echo $A", env={"A": "b"}, key=key).whole().text == "b\n"
    assert agent.exec("pwd", working_dir=directory, key=key).whole().text == f"{directory}\n"
    assert agent.shell("echo long", key=key * 1000).whole().text == "long\n"


def test_input_with_a_key_is_written_once(agent: Side, key: str) -> None:
    command = agent.exec("cat").started()
    for _ in range(3):
        agent.client.stdin_write(command.exec_id, b"once ", idempotency_key=key, timeout_secs=LIMIT_SECS)
    agent.client.stdin_write(command.exec_id, b"other ", idempotency_key=key, timeout_secs=LIMIT_SECS)
    agent.client.stdin_write(command.exec_id, b"once ", idempotency_key=f"{key}2", timeout_secs=LIMIT_SECS)
    agent.client.stdin_close(command.exec_id, idempotency_key=key)
    agent.client.stdin_close(command.exec_id, idempotency_key=key)
    assert command.whole().stdout == b"once other once "


def test_a_signal_with_a_key_is_sent_once(agent: Side, key: str) -> None:
    script = "n=0; trap 'n=$((n+1))' USR1; trap 'echo $n; exit' USR2; echo up; while :; do sleep 0.1; done"
    command = agent.shell(script).until(b"up\n")
    for _ in range(3):
        agent.client.signal(command.exec_id, signal.SIGUSR1, idempotency_key=key)
        agent.text("sleep 0.3")
    agent.client.signal(command.exec_id, signal.SIGUSR2)
    assert command.whole().text == "up\n1\n"


# --- Clients that vanish -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [False, True], ids=["without-key", "with-key"])
@pytest.mark.parametrize("child", ["sleep 1000", "yes >&2"], ids=["quiet", "loud"])
@pytest.mark.parametrize("how", ["cancel", "disconnect"])
def test_a_client_that_vanishes_takes_the_process_group_along(
    agent: Side, child: str, how: str, keyed: bool, key: str
) -> None:
    client = agent.connect()
    with contextlib.closing(client):
        script = f"{child} & echo $$ $!; wait"
        command = agent.shell(script, client=client, key=key if keyed else "").until(b"\n")
        pids = [int(word) for word in command.stdout.split()]
        assert agent.alive(*pids) == pids
        if how == "cancel":
            vanish(command.execution)
        else:
            client.close()
        eventually(lambda: not agent.alive(*pids) and not agent.zombies(), "their end")


def vanish(execution: Execution) -> None:
    execution.close()
    with contextlib.suppress(AgentError):
        for _ in execution:
            pass
