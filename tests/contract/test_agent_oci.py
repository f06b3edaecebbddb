"""`OciService` and `NetworkService` of the agent in a guest that has youki: real containers, on real networks.

The host's agent has no part in it: the machine that builds is not to be changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.agents import LIMIT_SECS, Side, eventually, refused
from tests.guests import host_programs, skip_without_qemu
from vzrepro.guest.vm import boot, qemu
from vzrepro.guest.vm.agent import AgentClient, AgentError, NetworkService

NAMESPACES = ("pid", "mount", "ipc", "uts", "cgroup", "network")

ROOTFS = """
set -e
cd /tmp && mkdir -p rootfs/bin rootfs/dev rootfs/etc rootfs/proc rootfs/tmp
cp /bin/busybox rootfs/bin/
for a in sh cat id sleep kill wget nc ip head; do ln -s busybox rootfs/bin/$a; done
echo root:x:0:0::/root:/bin/sh > rootfs/etc/passwd
echo ann:x:1000:1001::/home/ann:/bin/sh >> rootfs/etc/passwd
echo disk:x:6:ann > rootfs/etc/group
"""


def config(script: str, **changes: Any) -> str:
    """A bundle's config.json whose process runs `script`."""
    namespaces = [{"type": name} for name in NAMESPACES if name != "network"]
    namespaces.append({"type": "network", **changes.pop("network", {})})
    process = {
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "env": ["PATH=/bin", "OWN=1"],
        "args": ["/bin/sh", "-c", script],
    }
    document = {
        "ociVersion": "1.0.2",
        "root": {"path": "/tmp/rootfs"},
        "process": process,
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
        ],
        "linux": {"namespaces": namespaces, "resources": {"memory": {"limit": 64 << 20}, "pids": {"limit": 64}}},
    }
    return json.dumps(document | changes)


@pytest.fixture(scope="module")
def guest(realized: Callable[[str], Path]) -> Iterator[Side]:
    """A guest with youki on its share, and a root file system for containers in /tmp/rootfs."""
    skip_without_qemu()
    bundle = realized("container-bundle")
    share = qemu.Share("oci-runtime-bin", bundle, read_only=True)
    machine = replace(boot.of_bundle(bundle), shares=(share,))
    programs = host_programs(lambda *names: [realized(name) for name in names])
    with boot.running(machine, programs=programs, timeout_secs=LIMIT_SECS) as vm:
        side = Side("guest", vm.agent, "", vm.dial)
        side.text(ROOTFS)
        yield side


@pytest.fixture
def client(guest: Side) -> Iterator[AgentClient]:
    """Its client; no container is left behind."""
    yield guest.client
    for name in guest.text("ls /run/youki").split():
        guest.client.oci_delete(name, force=True)


def bundle(guest: Side, text: str, name: str = "bundle") -> str:
    """A bundle of this config.json in the guest."""
    path = f"/tmp/{name}"
    guest.text(f"mkdir -p {path}; cat > {path}/config.json <<'END'\n{text}\nEND")
    return path


def start(guest: Side, name: str, script: str, **changes: Any) -> None:
    guest.client.oci_create(name, bundle(guest, config(script, **changes)))
    guest.client.oci_start(name)


def status(client: AgentClient, name: str) -> str:
    return client.oci_state(name).status


def test_the_life_of_a_container(guest: Side, client: AgentClient) -> None:
    path = bundle(guest, config("echo out; echo err >&2; trap 'exit 3' TERM; while :; do sleep 0.1; done"))
    client.oci_create("one", path)
    created = client.oci_state("one")
    assert (created.status, created.bundle_path) == ("created", path)
    assert created.pid
    client.oci_start("one")
    running = client.oci_state("one")
    assert (running.status, running.pid) == ("running", created.pid)
    eventually(lambda: guest.text("cat /run/vz/oci/one/log") == "out\nerr", "the container's log")
    client.oci_kill("one", "SIGTERM")
    eventually(lambda: status(client, "one") == "stopped", "the container's end")
    assert client.oci_state("one").pid is None
    client.oci_delete("one")
    assert guest.text("ls /run/youki /run/vz/oci; find /sys/fs/cgroup -name '*one*'") == "/run/vz/oci:\n\n/run/youki:"


def test_a_container_that_dies_is_stopped(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "exec sleep 1000")
    guest.text(f"kill -9 {client.oci_state('one').pid}")
    eventually(lambda: status(client, "one") == "stopped", "the container's end")
    assert client.oci_state("one").pid is None
    client.oci_delete("one")


def test_commands_in_a_container(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "exec sleep 1000")
    result = client.oci_exec(
        "one", "sh", ["-c", 'echo "$A|$OWN|$PWD"; echo err >&2; exit 7'], env={"A": "b c\nd"}, working_dir="/tmp"
    )
    assert (result.exit_code, result.stdout, result.stderr) == (7, "b c\nd|1|/tmp\n", "err\n")
    assert client.oci_exec("one", "/bin/sh", ["-c", "kill -9 $$"]).exit_code == 137
    assert client.oci_exec("one", "/bin/id", user="ann").stdout == "uid=1000(ann) gid=1001 groups=6(disk)\n"
    assert client.oci_exec("one", "/bin/id", user="7:8").stdout == "uid=7 gid=8\n"
    # Its own processes, and only those.
    assert client.oci_exec("one", "/bin/sh", ["-c", "cat /proc/1/cmdline"]).stdout == "sleep\x001000\x00"
    assert guest.text("ls -d /run/vz/oci/*") == "/run/vz/oci/one"


def test_a_command_that_is_no_program_has_a_shells_exit_code(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "exec sleep 1000")
    guest.text("cd /tmp/rootfs/tmp && echo data > data && printf '#!/none\\n:' > script && chmod 755 script")
    for command, code in (
        ("/bin/nothing", 127),
        ("nothing", 127),
        ("/no/such/directory/program", 127),
        ("/tmp/script", 127),
        ("/tmp/data", 126),
        ("/tmp", 126),
    ):
        result = client.oci_exec("one", command)
        assert (result.exit_code, result.stdout) == (code, ""), (command, result)
        assert command in result.stderr
    # That is no matter of the command.
    with refused("failed_precondition"):
        client.oci_exec("one", "/bin/true", working_dir="/no/such/directory")
    assert guest.text("ls -d /run/vz/oci/*") == "/run/vz/oci/one"


def test_more_output_than_is_kept(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "exec sleep 1000")
    result = client.oci_exec("one", "/bin/sh", ["-c", "head -c 3000000 /dev/zero >&2; exit 4"])
    assert result.exit_code == 4
    kept, _, said = result.stderr.partition("\n")
    assert kept == "\0" * (1 << 20)
    assert said == f"[vz-guest-agent: {3_000_000 - (1 << 20)} more bytes were dropped]\n"


def test_a_command_ends_with_its_client(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "exec sleep 1000")
    with pytest.raises(AgentError) as gone:
        client.oci_exec("one", "/bin/sh", ["-c", "exec sleep 4711"], timeout_secs=5)
    assert gone.value.status == "deadline_exceeded"
    count = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 471[1]' || :"
    eventually(lambda: guest.text(count) == "0", "the command's end")
    assert status(client, "one") == "running"


def test_a_command_with_a_key_ends_with_its_client_too(guest: Side, client: AgentClient) -> None:
    # Hosts give every call one.
    start(guest, "one", "exec sleep 1000")
    with pytest.raises(AgentError) as gone:
        client.oci_exec("one", "/bin/sh", ["-c", "exec sleep 4712"], idempotency_key="req_1", timeout_secs=5)
    assert gone.value.status == "deadline_exceeded"
    count = "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 471[2]' || :"
    eventually(lambda: guest.text(count) == "0", "the command's end")


def test_a_container_of_the_same_name_comes_after_the_first(guest: Side, client: AgentClient) -> None:
    """As a host does it: an overlay of its own for each container, an end by force, caches dropped, and once more."""
    for number in range(3):
        top = "/run/vz-oci/containers/one"
        lower = f"lowerdir=/tmp/rootfs,upperdir={top}/upper,workdir={top}/work"
        guest.text(
            f"set -e; mkdir -p {top}; mount -t tmpfs tmpfs {top}; mkdir {top}/upper {top}/work {top}/merged;"
            f"mount -t overlay -o {lower} overlay {top}/merged"
        )
        path = bundle(guest, config("echo run; echo mine > /tmp/mine; exec sleep 1000", root={"path": f"{top}/merged"}))
        client.oci_create("one", path, idempotency_key=f"create_container:req_{number:016x}")
        client.oci_start("one")
        said = client.oci_exec("one", "/bin/sh", ["-c", f"echo {number}; cat /tmp/mine"])
        assert (said.stdout, said.exit_code) == (f"{number}\nmine\n", 0)
        client.oci_kill("one", "SIGTERM")
        client.oci_delete("one", force=True)
        guest.text(f"umount {top}/merged; umount {top}; echo 2 > /proc/sys/vm/drop_caches")
        with refused("not_found"):
            client.oci_state("one")
        assert (
            guest.text("ls /run/youki /run/vz/oci; find /sys/fs/cgroup -name '*one*'") == "/run/vz/oci:\n\n/run/youki:"
        )


def test_a_bundle_that_shows_only_in_the_root_share_is_found(guest: Side, client: AgentClient) -> None:
    path = bundle(guest, config("exec sleep 1000"))
    guest.text(f"set -e; mkdir -p /vz-rootfs/run/vz-oci/bundles; cp -r {path} /vz-rootfs/run/vz-oci/bundles/one")
    try:
        client.oci_create("one", "/run/vz-oci/bundles/one")
        assert client.oci_state("one").bundle_path == "/vz-rootfs/run/vz-oci/bundles/one"
    finally:
        guest.text("rm -r /vz-rootfs/run")


def test_what_a_containers_state_does_not_allow(guest: Side, client: AgentClient) -> None:
    path = bundle(guest, config("exec sleep 1000"))
    for call in (client.oci_start, client.oci_state, client.oci_delete):
        with refused("not_found"):
            call("none")
    with refused("not_found"):
        client.oci_kill("none", "KILL")
    with refused("not_found"):
        client.oci_exec("none", "/bin/true")
    client.oci_create("one", path)
    with refused("already_exists"):
        client.oci_create("one", path)
    with refused("failed_precondition"):
        client.oci_exec("one", "/bin/true")
    # Ignored by a first process without a handler, and no end of its life.
    client.oci_kill("one", "SIGTERM")
    client.oci_start("one")
    with refused("failed_precondition"):
        client.oci_start("one")
    with refused("failed_precondition"):
        client.oci_delete("one")
    for user in ("nobody", "ann:nobody"):
        with refused("invalid_argument"):
            client.oci_exec("one", "/bin/id", user=user)
    with refused("invalid_argument"):
        client.oci_kill("one", "SIGNOTHING")
    client.oci_kill("one", "9")
    eventually(lambda: status(client, "one") == "stopped", "the container's end")
    with refused("failed_precondition"):
        client.oci_kill("one", "9")
    client.oci_delete("one", force=True)


def test_a_container_that_cannot_be_made_leaves_nothing(guest: Side, client: AgentClient) -> None:
    path = bundle(guest, config("true", root={"path": "/tmp/nothing"}))
    with pytest.raises(AgentError, match="Create") as refusal:
        client.oci_create("one", path)
    assert refusal.value.status == "internal"
    assert "youki could not create" in (refusal.value.reason or "")
    assert guest.text("ls /run/youki /run/vz/oci") == "/run/vz/oci:\n\n/run/youki:"


def test_a_key_makes_no_second_container(guest: Side, client: AgentClient) -> None:
    path = bundle(guest, config("exec sleep 1000"))
    for _ in range(2):
        client.oci_create("one", path, idempotency_key="make one")
    client.oci_start("one")
    say = ["-c", "echo $$; cat /proc/uptime"]
    first = client.oci_exec("one", "/bin/sh", say, idempotency_key="say")
    assert client.oci_exec("one", "/bin/sh", say, idempotency_key="say") == first
    assert client.oci_exec("one", "/bin/sh", ["-c", "echo other"], idempotency_key="say").stdout == "other\n"


def test_a_container_outlives_the_agent(guest: Side, client: AgentClient) -> None:
    start(guest, "one", "i=0; while sleep 0.2; do echo $((i += 1)); done")
    before = client.oci_state("one")
    guest.kill_agent()
    eventually(lambda: client.oci_state("one") == before, "the container as it was")
    lines = guest.text("wc -l < /run/vz/oci/one/log")
    eventually(lambda: guest.text("wc -l < /run/vz/oci/one/log") != lines, "a log that goes on")


def test_containers_on_a_network_of_their_own(guest: Side, client: AgentClient) -> None:
    services = [NetworkService("web", "10.8.0.2/24", "front"), NetworkService("user", "10.8.0.3/24", "front")]
    client.network_setup("shop", services)
    on = {"network": {"path": "/var/run/netns/web"}}
    start(guest, "web", "while :; do echo hello | nc -l -p 80; done", **on)
    start(guest, "user", "exec sleep 1000", network={"path": "/var/run/netns/user"})
    fetch = ["-c", "nc 10.8.0.2 80 < /dev/null"]
    eventually(lambda: client.oci_exec("user", "/bin/sh", fetch).stdout == "hello\n", "the service's answer")
    # The guest itself is on the network, so its agent reaches a service, too.
    eventually(lambda: forwarded(client, 80, "10.8.0.2") == b"hello\n", "the service's answer to the agent")
    client.network_teardown("shop", [])
    assert "eth0" not in client.oci_exec("user", "/bin/ip", ["link"]).stdout
    assert guest.text("ip link | grep vz || :; ls /run/netns") == ""


def forwarded(client: AgentClient, port: int, host: str) -> bytes:
    """What a port says first; nothing when nobody listens there, as between two clients of a service of `nc`."""
    try:
        with client.port_forward(port, host=host) as forward:
            return forward.recv() or b""
    except AgentError as error:
        assert error.status == "unavailable", error
        return b""


def test_a_guest_without_youki_says_so(agent: Side) -> None:
    path = agent.text("d=$(mktemp -d); echo '{}' > $d/config.json; echo $d")
    try:
        with pytest.raises(AgentError) as refusal:
            agent.client.oci_create("one", path)
        assert refusal.value.status == "failed_precondition"
        assert "oci-runtime-bin" in (refusal.value.reason or "")
    finally:
        agent.text(f"rm -r {path}")


def test_names_and_paths_that_mean_nothing(agent: Side) -> None:
    for name in ("", "..", "a/b", "a b"):
        with refused("invalid_argument"):
            agent.client.oci_state(name)
    for path in ("", "relative", "/no/such/bundle"):
        with refused("invalid_argument"):
            agent.client.oci_create("one", path)
    for stack, service in (("..", "a"), ("s", "a/b"), ("", "a")):
        with refused("invalid_argument"):
            agent.client.network_setup(stack, [NetworkService(service, "10.8.0.2/24", "n")])
    with refused("invalid_argument"):
        agent.client.network_setup("s", [NetworkService("a", "10.8.0.2", "n")])
