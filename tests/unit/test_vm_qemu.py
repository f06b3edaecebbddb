"""QEMU's command line, and child processes that end with us, without QEMU."""

import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import qemu

GUEST = qemu.Guest(Path("/b/vmlinux"), Path("/b/initramfs.img"), "console=hvc0 quiet panic=-1 vz.mount.0=/work")


def option(arguments: list[str], name: str) -> list[str]:
    return [arguments[i + 1] for i, word in enumerate(arguments) if word == name]


def test_tcg_with_a_vhost_user_device() -> None:
    arguments = qemu.arguments(GUEST, "tcg", qemu.Vsock(77, Path("/tmp/vz-1/device")))
    assert option(arguments, "-accel") == ["tcg,thread=multi"]
    assert option(arguments, "-cpu") == ["max,pauth=off"]
    assert option(arguments, "-append") == [GUEST.command_line]
    assert option(arguments, "-kernel") == ["/b/vmlinux"]
    assert "socket,id=vsock,path=/tmp/vz-1/device" in option(arguments, "-chardev")
    assert "vhost-user-vsock-pci,chardev=vsock" in option(arguments, "-device")
    # A vhost-user device needs shared memory, and as much of it as the machine has.
    assert option(arguments, "-m") == ["512M"]
    assert option(arguments, "-object") == ["memory-backend-memfd,id=mem,size=512M,share=on"]


def test_kvm_with_the_hosts_vsock() -> None:
    arguments = qemu.arguments(GUEST, "kvm", qemu.Vsock(77))
    assert option(arguments, "-accel") == ["kvm"]
    assert option(arguments, "-cpu") == ["host"]
    assert "vhost-vsock-pci,guest-cid=77" in option(arguments, "-device")
    assert not [chardev for chardev in option(arguments, "-chardev") if chardev.startswith("socket")]


def test_a_comma_in_a_path_stays_in_the_path() -> None:
    arguments = qemu.arguments(GUEST, "tcg", qemu.Vsock(77, Path("/tmp/a,b/device")))
    assert "socket,id=vsock,path=/tmp/a,,b/device" in option(arguments, "-chardev")


def test_the_vsock_device_takes_packets_that_linux_can_send() -> None:
    arguments = qemu.vsock_device_arguments(qemu.Vsock(77, Path("/t/device")), Path("/t/vsock"))
    assert arguments == ["--vm", "guest-cid=77,socket=/t/device,uds-path=/t/vsock,tx-buffer-size=28672"]


def test_shares_and_disks_are_attached_in_order() -> None:
    shares = (qemu.Share("rootfs", Path("/root,fs"), read_only=True), qemu.Share("vz-mount-0", Path("/home")))
    disks = (qemu.Disk(Path("/v/a,b")), qemu.Disk(Path("/v/c"), read_only=True))
    guest = replace(GUEST, shares=shares, disks=disks)
    arguments = qemu.arguments(guest, "tcg", qemu.Vsock(77), [Path("/t/share0"), Path("/t/share1")])
    assert [word for word in option(arguments, "-chardev") if "share" in word] == [
        "socket,id=share0,path=/t/share0",
        "socket,id=share1,path=/t/share1",
    ]
    devices = option(arguments, "-device")
    assert [word for word in devices if "vhost-user-fs" in word] == [
        "vhost-user-fs-pci,queue-size=1024,chardev=share0,tag=rootfs",
        "vhost-user-fs-pci,queue-size=1024,chardev=share1,tag=vz-mount-0",
    ]
    assert [word for word in devices if "virtio-blk" in word] == [
        "virtio-blk-pci,drive=disk0",
        "virtio-blk-pci,drive=disk1",
    ]
    assert option(arguments, "-drive") == [
        "if=none,id=disk0,format=raw,discard=unmap,file=/v/a,,b",
        "if=none,id=disk1,format=raw,discard=unmap,read-only=on,file=/v/c",
    ]


@pytest.mark.parametrize(("uid", "sandbox"), [(0, "chroot"), (1000, "none")])
def test_a_share_is_served_in_the_sandbox_that_the_user_may_have(
    monkeypatch: pytest.MonkeyPatch, uid: int, sandbox: str
) -> None:
    monkeypatch.setattr(qemu.os, "geteuid", lambda: uid)
    share = qemu.Share("rootfs", Path("/srv"), read_only=True)
    arguments = qemu.share_server_arguments(share, Path("/t/share0"))
    assert {"--socket-path=/t/share0", "--shared-dir=/srv", f"--sandbox={sandbox}", "--readonly"} <= set(arguments)
    assert ("--modcaps=-mknod" in arguments) is (uid == 0)
    assert "--readonly" not in qemu.share_server_arguments(replace(share, read_only=False), Path("/t/share0"))


def test_a_guest_for_guests_has_virtualization() -> None:
    [machine] = option(qemu.arguments(replace(GUEST, nested=True), "tcg", qemu.Vsock(77)), "-M")
    assert "virtualization=on" in machine.split(",")
    [machine] = option(qemu.arguments(GUEST, "tcg", qemu.Vsock(77)), "-M")
    assert "virtualization=on" not in machine.split(",")


@pytest.mark.skipif(shutil.which("qemu-system-aarch64") is None, reason="QEMU for arm64 is not installed")
@pytest.mark.parametrize("nested", [False, True])
def test_the_smallest_guest_switches_itself_off(nested: bool) -> None:
    assert qemu._powers_off("qemu-system-aarch64", "tcg", nested=nested, timeout_secs=120)


def test_archives_are_joined_where_the_kernel_looks_for_them(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("a", "b", "c")]
    for part, content in zip(parts, (b"one", b"two..", b"x"), strict=True):
        part.write_bytes(content)
    guest = replace(GUEST, initramfs=parts[0], extra_initramfs=tuple(parts[1:]))
    joined = qemu.join_initramfs(guest, tmp_path)
    assert joined.initramfs.read_bytes() == b"one\0two..\0\0\0x\0\0\0"
    assert not joined.extra_initramfs
    assert qemu.join_initramfs(GUEST, tmp_path) is GUEST


def test_no_qemu_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VzreproError) as error:
        qemu.find_qemu()
    assert error.value.hint is not None
    assert "apt-get install" in error.value.hint


def test_kvm_of_a_foreign_architecture_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu.platform, "machine", lambda: "x86_64")
    assert qemu.accelerator("/nonexistent") == "tcg"


@pytest.mark.parametrize(("script", "accelerator"), [("exit 0", "kvm"), ("exit 1", "tcg"), ("exec sleep 60", "tcg")])
def test_kvm_is_used_only_when_a_guest_ran_on_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, accelerator: str
) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(qemu.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(qemu.os, "access", lambda *_: True)
    monkeypatch.setattr(qemu, "_PROBE_SECS", 0.5 if "sleep" in script else 30.0)
    assert qemu.accelerator(str(program)) == accelerator


def test_a_childs_lines_come_before_its_end() -> None:
    seen: queue.SimpleQueue[object] = queue.SimpleQueue()
    script = "echo one; echo two >&2; printf 'no end \\377'; exit 3"
    with qemu.Child("/bin/sh", ["-c", script], on_line=seen.put, on_end=seen.put) as child:
        assert child.wait(PATIENCE_SECS) == 3
        got = [seen.get(timeout=PATIENCE_SECS) for _ in range(4)]
    assert sorted(map(str, got[:3])) == ["no end �", "one", "two"]
    assert got[3] == 3


def test_a_signal_is_a_negative_code() -> None:
    with qemu.Child("/bin/sh", ["-c", "kill -KILL $$"]) as child:
        assert child.wait(PATIENCE_SECS) == -signal.SIGKILL


def test_a_line_without_an_end_comes_in_parts() -> None:
    lines: list[str] = []
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    command = ["-c", "head -c 200000 /dev/zero | tr '\\0' x; echo; echo next"]
    with qemu.Child("/bin/sh", command, on_line=lines.append, on_end=ended.put):
        assert ended.get(timeout=PATIENCE_SECS) == 0
    assert "".join(lines) == "x" * 200_000 + "next"
    assert max(map(len, lines)) < 100_000
    assert lines[-1] == "next"


def test_leaving_ends_a_child_that_ignores_sigterm() -> None:
    seen: queue.SimpleQueue[object] = queue.SimpleQueue()
    script = "trap '' TERM; echo up; while :; do sleep 1; done"
    with qemu.Child("/bin/sh", ["-c", script], on_line=seen.put) as child:
        pid = child.pid
        assert seen.get(timeout=PATIENCE_SECS) == "up"
        assert child.wait(0.2) is None
    assert child.wait(PATIENCE_SECS) == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match="could not be started"):
        qemu.Child(str(tmp_path / "nothing"), [])


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells a child that its parent died")
def test_a_child_dies_with_us_even_when_we_are_killed() -> None:
    code = (
        "import pathlib, time; from vzrepro.guest.vm import qemu\n"
        "child = qemu.Child('/bin/sleep', ['600'])\n"
        "while pathlib.Path(f'/proc/{child.pid}/comm').read_text() != 'sleep\\n': time.sleep(0.01)\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.wait()
        parent.stdout and parent.stdout.close()
    for _ in range(500):
        if not _runs(pid):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent")


def _runs(pid: int) -> bool:
    try:
        # A zombie has ended; whose turn it is to reap it is not our matter.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
