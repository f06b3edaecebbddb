"""Booting, with stand-ins for QEMU and the vsock device: the phases, the failures, and that nothing is left behind."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from vzrepro.base import events
from vzrepro.base.errors import TimedOut, UsageError, VzreproError
from vzrepro.guest.vm import agent_pb2 as pb
from vzrepro.guest.vm import boot, qemu

METADATA = {
    "kernel": "6.12.107",
    "profile": "container",
    "security_profile": "container-hardened",
    "busybox": "1.37.0",
    "agent": "0.1.0",
    "agent_protocol_revision": 1,
    "youki": "0.7.0",
    "built": "2026-01-01T00:00:00Z",
}

# Says what a guest says and dials the ready port, as told by the file `script`: one step a line.
FAKE_QEMU = """
import os, pathlib, socket, sys, time
here = pathlib.Path(__file__).parent
(here / "qemu.pid").write_text(str(os.getpid()))
(here / "qemu.args").write_text("\\n".join(sys.argv[1:]))
[device] = [word.partition("path=")[2] for word in sys.argv if word.startswith("socket,id=vsock")]
for step in (here / "script").read_text().splitlines():
    word, _, rest = step.partition(" ")
    if word == "say":
        print(rest, flush=True)
    elif word == "dial":
        with socket.socket(socket.AF_UNIX) as stream:
            stream.connect(os.path.join(os.path.dirname(device), "vsock_7425"))
            stream.sendall(rest.encode() + b"\\n")
    elif word == "until-off":
        while not (here / "off").exists():
            time.sleep(0.01)
    elif word == "hang":
        time.sleep(600)
    elif word == "exit":
        sys.exit(int(rest))
"""

# Serves its socket file, and carries streams to port 7424 over to the agent's server.
FAKE_DEVICE = """
import os, pathlib, socket, sys, threading
here = pathlib.Path(__file__).parent
(here / "device.pid").write_text(str(os.getpid()))
pairs = dict(pair.split("=", 1) for pair in sys.argv[2].split(","))
if (here / "no-device").exists():
    sys.exit("no such thing")
listener = socket.socket(socket.AF_UNIX)
listener.bind(pairs["uds-path"])
listener.listen()
meeting = socket.socket(socket.AF_UNIX)
meeting.bind(pairs["socket"])
def copy(source, sink):
    while data := source.recv(65536):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
while True:
    stream, _ = listener.accept()
    assert stream.recv(64) == b"CONNECT 7424\\n"
    agent = socket.socket(socket.AF_UNIX)
    try:
        agent.connect(str(here / "agent"))
    except OSError:
        stream.close()
        continue
    stream.sendall(b"OK 1\\n")
    threading.Thread(target=copy, args=(stream, agent), daemon=True).start()
    threading.Thread(target=copy, args=(agent, stream), daemon=True).start()
"""

GOOD_BOOT = ["say vz-init: start", "say vz-init: agent start at 0.61 s", "dial ready 0.1.0 1", "until-off"]


class World:
    """A directory with a bundle and the two stand-ins; `boot` runs them by a script."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.bundle = path / "bundle"
        self.bundle.mkdir()
        (self.bundle / "vmlinux").write_bytes(b"kernel")
        (self.bundle / "initramfs.img").write_bytes(b"initramfs")
        (self.bundle / "version.json").write_text(json.dumps(METADATA))
        self.programs = boot.HostPrograms(self._program("vhost-device-vsock", FAKE_DEVICE))
        qemu_program = self._program("qemu-system-aarch64", FAKE_QEMU)
        monkeypatch.setattr(qemu, "find_qemu", lambda _given: str(qemu_program))
        monkeypatch.setattr(qemu, "kernel_vsock_usable", lambda: False)
        monkeypatch.setenv("TMPDIR", str(path))
        monkeypatch.setattr(boot.tempfile, "tempdir", None)
        self.events: list[events.Event] = []

    def _program(self, name: str, text: str) -> Path:
        program = self.path / name
        program.write_text(f"#!{sys.executable} -IS\n{text}")
        program.chmod(0o755)
        return program

    def boot(self, script: list[str], timeout_secs: float = 60) -> boot.BootReport:
        (self.path / "script").write_text("\n".join(script))
        guest = boot.of_bundle(self.bundle)
        return boot.boot(guest, programs=self.programs, timeout_secs=timeout_secs, report=self.events.append)

    def nothing_is_left(self) -> None:
        for name in ("qemu.pid", "device.pid"):
            if (self.path / name).exists():
                with pytest.raises(ProcessLookupError):
                    os.kill(int((self.path / name).read_text()), 0)
        assert not list(self.path.glob("vz-*"))


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("w"), monkeypatch)
    yield world
    world.nothing_is_left()


@pytest.fixture
def agent_server(world: World) -> Iterator[threading.Event]:
    """An agent that answers; its Exec is the power button of the stand-in for QEMU, unless the event is set."""
    stuck = threading.Event()

    def power(request: "pb.ExecRequest", _context: grpc.ServicerContext) -> Iterator["pb.ExecEvent"]:
        assert [request.command, *request.args] == ["/bin/busybox", "kill", "-USR2", "1"]
        if not stuck.is_set():
            (world.path / "off").touch()
        yield pb.ExecEvent(exit_code=0, sequence=1)

    server = grpc.server(futures.ThreadPoolExecutor(4))
    unary = grpc.unary_unary_rpc_method_handler
    info = pb.SystemInfoResponse(cpu_count=1, memory_bytes=512, os_version="Linux 6.12", agent_protocol_revision=1)
    methods = {
        "Ping": unary(lambda *_: pb.PingResponse(), pb.PingRequest.FromString, pb.PingResponse.SerializeToString),
        "SystemInfo": unary(lambda *_: info, pb.SystemInfoRequest.FromString, pb.SystemInfoResponse.SerializeToString),
        "Exec": grpc.unary_stream_rpc_method_handler(power, pb.ExecRequest.FromString, pb.ExecEvent.SerializeToString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("vz.agent.v1.AgentService", methods),))
    server.add_insecure_port(f"unix:{world.path}/agent")
    server.start()
    yield stuck
    server.stop(0).wait()


def test_a_boot_has_its_phases_in_order(world: World, agent_server: threading.Event) -> None:
    report = world.boot(GOOD_BOOT)
    assert [phase.name for phase in report.phases] == ["init", "agent", "ready", "answer", "off"]
    assert [phase.secs for phase in report.phases] == sorted(phase.secs for phase in report.phases)
    assert world.events == list(report.phases)
    assert report.pushed
    assert report.agent_version == "0.1.0"
    assert report.system.os_version == "Linux 6.12"
    assert report.cid > 2
    document = report.document()
    assert document["vsock"] == "vhost-device-vsock"
    assert list(document["phases"]) == ["init", "agent", "ready", "answer", "off"]
    assert f"{world.bundle}/vmlinux" in (world.path / "qemu.args").read_text()


def test_an_agent_that_pushes_nothing_is_asked(world: World, agent_server: threading.Event) -> None:
    report = world.boot(["say vz-init: start", "say vz-init: agent start at 0.61 s", "until-off"])
    assert not report.pushed
    assert report.agent_version is None
    assert [phase.name for phase in report.phases] == ["init", "agent", "ready", "answer", "off"]


def test_a_guest_is_not_called_before_its_init_speaks(world: World, agent_server: threading.Event) -> None:
    # Its agent would answer at once, and then be used.
    with pytest.raises(TimedOut) as error:
        world.boot(["hang"], timeout_secs=5)
    assert "waited for: the kernel to start /init" in (error.value.reason or "")


def test_a_guest_that_never_gets_ready_shows_its_console_and_what_was_missing(world: World) -> None:
    script = [f"say line {number}" for number in range(50)]
    with pytest.raises(TimedOut) as error:
        world.boot([*script, "say vz-init: start", "hang"], timeout_secs=5)
    reason = error.value.reason
    assert reason is not None
    assert "waited for: init to start the agent" in reason
    assert "reached: init at" in reason
    assert reason.splitlines()[-1].strip() == "vz-init: start"
    assert "    line 49\n" in reason
    assert "    line 20\n" not in reason
    assert error.value.hint is not None
    assert "--timeout-secs" in error.value.hint


def test_a_panic_ends_the_wait_at_once(world: World) -> None:
    trace = [f"say  0x{number:016x}" for number in range(50)]
    with pytest.raises(VzreproError, match="the guest's kernel panicked: no init") as error:
        world.boot(["say [ 0.8] Kernel panic - not syncing: no init", *trace, "exit 0"], timeout_secs=600)
    assert error.value.reason is not None
    assert "waited for: the kernel to start /init" in error.value.reason
    assert f"0x{49:016x}" in error.value.reason


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("qemu: Invalid CPU topology", "qemu-system-aarch64 ended with exit code 1 before the guest's agent was ready"),
        ("qemu: vhost-vsock: unable to set guest cid: Address already in use", "vsock address .* is in use"),
        ('qemu: -device virtio-blk-pci,drive=disk0: Failed to get "write" lock', "a disk of the guest is in use"),
    ],
)
def test_qemus_own_complaint_is_shown(world: World, complaint: str, said: str) -> None:
    with pytest.raises(VzreproError, match=said) as error:
        world.boot([f"say {complaint}", "exit 1"], timeout_secs=600)
    assert complaint in str(error.value)


def test_a_vsock_device_that_does_not_start(world: World) -> None:
    (world.path / "no-device").touch()
    with pytest.raises(VzreproError, match="vhost-device-vsock ended with exit code 1"):
        world.boot(GOOD_BOOT)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"agent": "0.2.0"}, "agent version is 0.1.0, but version.json declares 0.2.0"),
        ({"agent_protocol_revision": 2}, "agent protocol revision is 1, but version.json declares 2"),
    ],
)
def test_another_agent_than_declared_is_refused(
    world: World, agent_server: threading.Event, declared: dict[str, object], said: str
) -> None:
    (world.bundle / "version.json").write_text(json.dumps({**METADATA, **declared}))
    with pytest.raises(VzreproError, match=said):
        world.boot(GOOD_BOOT)


def test_a_guest_that_does_not_power_off(
    world: World, agent_server: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent_server.set()
    monkeypatch.setattr(boot, "_POWER_OFF_SECS", 0.5)
    with pytest.raises(TimedOut, match="did not power off") as error:
        world.boot(GOOD_BOOT)
    assert error.value.reason is not None
    assert "waited for: the guest to switch itself off" in error.value.reason


@pytest.mark.parametrize("name", ["vmlinux", "initramfs.img"])
def test_a_directory_that_is_no_bundle(world: World, name: str) -> None:
    (world.bundle / name).unlink()
    with pytest.raises(UsageError) as error:
        world.boot(GOOD_BOOT)
    assert error.value.reason == f"it has no {name}"


def test_a_version_json_that_is_none(world: World) -> None:
    (world.bundle / "version.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        world.boot(GOOD_BOOT)


def test_ctrl_c_leaves_nothing_behind(world: World, agent_server: threading.Event) -> None:
    (world.path / "script").write_text("\n".join(GOOD_BOOT))
    with (
        pytest.raises(KeyboardInterrupt),
        boot.running(boot.of_bundle(world.bundle), programs=world.programs, timeout_secs=60) as vm,
    ):
        vm.agent.ping(30)
        raise KeyboardInterrupt
    world.nothing_is_left()


def test_two_guests_at_once(world: World, agent_server: threading.Event) -> None:
    (world.path / "script").write_text("\n".join(GOOD_BOOT))
    guest = boot.of_bundle(world.bundle)
    options = {"programs": world.programs, "timeout_secs": 60.0}
    with boot.running(guest, **options) as one, boot.running(guest, **options) as two:
        one.agent.ping(30)
        two.agent.ping(30)
        assert one.vsock != two.vsock
