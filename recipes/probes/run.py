"""Boots a kernel and the initramfs under QEMU, inside the sandbox, and has the guest prove what it is declared to be.

In: `/in/kernel` (`vmlinux`), `/in/initramfs` (`initramfs.img`), `/in/youki` (`youki`), `/in/probes` (`probes.cpio`,
`ext4.img`, `btrfs.img`, `state.py`, `vhost.so`), `/in/vhost-device-vsock`, `/in/virtiofsd`, and `/in/wanted.json`: the
`capabilities` (name → probe) and what must be `absent` (names of probes). Out: `/out/probes.json`, the same whenever
nothing changed: verdicts and sentences, no times. Exit code 1, a line for each, when something is not proven.

The guest boots as it always does, `init`, agent and all: `vz-probe` starts as process 1, leaves a child that waits on
the second console (`/dev/hvc1`), and becomes `/init`. When the agent has said that it listens, the probes' names are
written to that console; a line of JSON comes back for each. What needs a machine of its own, and the host's hand, is
`state.py`'s. Runs with the standard library alone; `VZ_IN`, `VZ_OUT`
stand in for `/in`, `/out` in tests.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

LIMIT_SECS = 600
"""How long boot and probes may take together: seconds on a quiet machine, minutes on a loaded one under emulation."""

AGENT_PORT, READY_PORT = 7424, 7425
FROM_HOST, FROM_GUEST = "written by the host\n", "written by the guest\n"
CONSOLE_LINE = "vz-probe: written to hvc0"
VIRTIOFSD = ("--sandbox=none", "--inode-file-handles=never", "--rlimit-nofile=0", "--log-level=warn")
"""What virtiofsd needs where it is nobody and may call nothing special."""

OF_STATE = ("memory_reclaim", "snapshot_safe")
"""The probes of `state.py`, in order."""

MACHINE = ("qemu-system-aarch64", "-accel", "tcg,thread=multi", "-cpu", "max,pauth-impdef=on")

HYPERVISOR = "nested_virt"
"""The probe for which the machine gets EL2."""


class RunError(Exception):
    """The guest could not be probed; the text says what was waited for."""


class Console:
    """The guest's console, QEMU's own words among it: printed as it comes, and kept."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._follow, args=(stream,), daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether QEMU has ended."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until QEMU has ended."""
        self._thread.join()

    def _follow(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode("utf-8", "replace").rstrip("\r\n")
            self.lines.append(line)
            print(f"guest: {line}", flush=True)


@contextlib.contextmanager
def child(*command: str | Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process, its output the caller's; ended at the end."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def await_socket(path: Path, process: "subprocess.Popen[bytes]", deadline: float) -> None:
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"{process.args!r} did not serve {path.name}")
        time.sleep(0.01)


def accept(listener: socket.socket, console: Console, deadline: float, what: str) -> IO[bytes]:
    """The next connection, as a file of bytes. Raises RunError when it does not come, or QEMU ends before."""
    listener.settimeout(0.2)
    while True:
        try:
            stream, _ = listener.accept()
        except TimeoutError:
            if console.ended or time.monotonic() > deadline:
                raise RunError(f"waited for {what}: {'QEMU ended' if console.ended else 'out of time'}") from None
            continue
        stream.settimeout(max(0.1, deadline - time.monotonic()))
        return stream.makefile("rwb", buffering=0)


def line(stream: IO[bytes], what: str) -> str:
    """The next line of a stream. Raises RunError at its end."""
    try:
        raw = stream.readline()
    except OSError as error:
        raise RunError(f"waited for {what}: {error}") from error
    if not raw.endswith(b"\n"):
        raise RunError(f"waited for {what}: the stream ended after {raw!r}")
    return raw.decode("utf-8", "replace").rstrip("\r\n")


def await_agent(streams: Path, listener: socket.socket, console: Console, deadline: float) -> None:
    """Until the agent has dialed the host, and the host could dial the agent. Raises RunError."""
    said = ""
    while not said.startswith("ready "):
        with accept(listener, console, deadline, "the agent to listen") as ready:
            said = line(ready, "the agent's ready line")
    with socket.socket(socket.AF_UNIX) as dialed:
        dialed.settimeout(30)
        try:
            dialed.connect(str(streams))
            dialed.sendall(f"CONNECT {AGENT_PORT}\n".encode())
            answer = dialed.makefile("rb").readline()
        except OSError as error:
            raise RunError(f"dialing the agent: {error}") from error
        if not answer.startswith(b"OK "):
            raise RunError(f"dialing the agent: wanted OK, found {answer!r}")


def boot(source: Path, work: Path, names: list[str], deadline: float) -> tuple[list[str], list[str]]:
    """Boot, run the probes called `names`; the lines of the probes and of the guest's console. Raises RunError."""
    initramfs = work / "initramfs"
    archives = (source / "initramfs/initramfs.img", source / "probes/probes.cpio")
    initramfs.write_bytes(b"".join(archive.read_bytes() for archive in archives))  # multiples of 512 bytes, both
    for disk in ("ext4.img", "btrfs.img"):
        shutil.copyfile(source / "probes" / disk, work / disk)
    shares = {"vz-probe": work / "share", "oci-runtime-bin": (source / "youki").resolve()}
    (work / "share").mkdir()
    (work / "share/from-host").write_text(FROM_HOST)

    with contextlib.ExitStack() as stack:
        streams, device = work / "vsock", work / "vsock-device"
        ready = stack.enter_context(listen(Path(f"{streams}_{READY_PORT}")))
        probes = stack.enter_context(listen(work / "probes"))
        pairs = f"guest-cid=3,socket={device},uds-path={streams},tx-buffer-size=28672"
        vsock = stack.enter_context(child(source / "vhost-device-vsock/vhost-device-vsock", "--vm", pairs))
        await_socket(device, vsock, deadline)
        arguments = ["-chardev", f"socket,id=vsock,path={device}", "-device", "vhost-user-vsock-pci,chardev=vsock"]
        for tag, directory in shares.items():
            path = work / f"{tag}.socket"
            command = [source / "virtiofsd/virtiofsd", f"--socket-path={path}", f"--shared-dir={directory}"]
            server = stack.enter_context(child(*command, *VIRTIOFSD))
            await_socket(path, server, deadline)
            arguments += ["-chardev", f"socket,id={tag},path={path}"]
            arguments += ["-device", f"vhost-user-fs-pci,queue-size=1024,chardev={tag},tag={tag}"]
        machine = "virt,gic-version=3,memory-backend=mem" + (",virtualization=on" if HYPERVISOR in names else "")
        qemu = subprocess.Popen(
            [
                *(*MACHINE, "-M", machine),
                *("-m", "512M", "-object", "memory-backend-memfd,id=mem,size=512M,share=on"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-kernel", str(source / "kernel/vmlinux"), "-initrd", str(initramfs)),
                *("-append", "console=hvc0 panic=-1 rdinit=/sbin/vz-probe"),
                *("-device", "virtio-serial-pci", "-chardev", "stdio,id=console,signal=off"),
                *("-device", "virtconsole,chardev=console", "-chardev", f"socket,id=probes,path={work / 'probes'}"),
                *("-device", "virtconsole,chardev=probes", "-device", "virtio-rng-pci"),
                *(
                    "-drive",
                    f"if=none,id=ext4,format=raw,file={work / 'ext4.img'}",
                    "-device",
                    "virtio-blk-pci,drive=ext4",
                ),
                *("-drive", f"if=none,id=btrfs,format=raw,file={work / 'btrfs.img'}"),
                *("-device", "virtio-blk-pci,drive=btrfs", *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        stack.enter_context(qemu)
        stack.callback(qemu.kill)
        assert qemu.stdout is not None
        console = Console(qemu.stdout)
        channel = stack.enter_context(accept(probes, console, deadline, "QEMU to start"))
        await_agent(streams, ready, console, deadline)
        while (said := line(channel, "vz-probe to say hello")) != "hello":
            print(f"vz-probe: {said}", flush=True)
        channel.write((" ".join(names) + "\n").encode())
        lines = []
        while (said := line(channel, "the probes to end")) != "done":
            print(said, flush=True)
            lines.append(said)
        try:
            code = qemu.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RunError("waited for the guest to power off") from None
        if code:
            raise RunError(f"QEMU ended with exit code {code}")
        console.wait()
        return lines, console.lines


def prove_state(source: Path, work: Path, names: list[str], deadline: float) -> list[str]:
    """The lines of `state.py` for the probes of it that are among `names`. Raises RunError."""
    config = {
        "qemu": [*MACHINE, "-M", "virt,gic-version=3,memory-backend=mem"],
        "kernel": str(source / "kernel/vmlinux"),
        "initramfs": [str(source / "initramfs/initramfs.img"), str(source / "probes/probes.cpio")],
        "vsock-device": str(source / "vhost-device-vsock/vhost-device-vsock"),
        "preload": str(source / "probes/vhost.so"),
        "names": [name for name in OF_STATE if name in names],
        "limit-secs": max(1, deadline - time.monotonic()),
        "place": str(work),
    }
    if not config["names"]:
        return []
    command = [sys.executable, source / "probes/state.py", json.dumps(config)]
    code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise RunError(f"state.py ended with exit code {code}")
    lines = (work / "verdicts").read_text(encoding="utf-8").splitlines()
    print(*lines, sep="\n", flush=True)
    return lines


def verdicts(wanted: dict[str, Any], lines: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The report, and what is wrong, a line each: verdicts other than PROVEN, and probes that gave none."""
    found = {said.pop("capability"): said for said in map(json.loads, lines)}
    none = {"verdict": "FAILED", "detail": "the probe gave no verdict"}
    report = {
        "profile": wanted["profile"],
        "capabilities": {name: found.get(probe, none) for name, probe in wanted["capabilities"].items()},
        "absent": {name: found.get(f"absent:{name}", none) for name in wanted["absent"]},
    }
    problems = [
        f"{kind}{name}: {said['verdict']}: {said['detail']}"
        for kind, group in (("", report["capabilities"]), ("absent:", report["absent"]))
        for name, said in sorted(group.items())
        if said["verdict"] != "PROVEN"
    ]
    return report, problems


def main() -> int:
    """Boot, probe, report; the exit code."""
    source, out = Path(os.environ.get("VZ_IN", "/in")), Path(os.environ.get("VZ_OUT", "/out"))
    wanted = json.loads((source / "wanted.json").read_text(encoding="utf-8"))
    names = sorted({*wanted["capabilities"].values(), *(f"absent:{name}" for name in wanted["absent"])})
    work = Path.cwd()
    try:
        deadline = time.monotonic() + LIMIT_SECS
        lines, console = boot(source, work, [name for name in names if name not in OF_STATE], deadline)
        lines += prove_state(source, work, names, deadline)
    except (RunError, OSError) as error:
        print(f"probes: {error}", file=sys.stderr)
        return 1
    report, problems = verdicts(wanted, lines)
    # Two probes are proven only together with what the host finds.
    if "virtiofs" in names and _text(work / "share/from-guest") != FROM_GUEST:
        problems.append("virtiofs: FAILED: what the guest wrote is not in the host's directory")
    if "hvc0_serial" in names and not any(CONSOLE_LINE in said for said in console):
        problems.append("hvc0_serial: FAILED: the host did not read what the guest wrote")
    for problem in problems:
        print(f"probes: {problem}", file=sys.stderr)
    if problems:
        return 1
    (out / "probes.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
