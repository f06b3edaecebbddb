"""The host itself: its connections to one guest, and the sequences that it plays there."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.hosts import bundles
from tests.hosts.machine import Hardware, Machine, booted, eventually
from tests.hosts.wire import Connection, Output, Refused, Running, Say
from vzrepro.guest.vm.boot import HostPrograms

FAULTED = 128 + signal.SIGSEGV
"""The exit code of what ended by a memory fault."""


@dataclass(slots=True)
class Host:
    """A host with a guest that answers. `main` is the connection it keeps; `share` is what the guest has as `rootfs`,
    and `stacked` whether that holds a directory for each container, or is one container's own root file system."""

    machine: Machine
    main: Connection
    share: Path
    busybox: Path
    stacked: bool
    _folder: Path
    _say: Say
    _connections: int = 1

    def connect(self) -> Connection:
        """One more connection, which counts its requests from 1 again."""
        self._connections += 1
        return Connection(self.machine.dial, self._folder, f"c{self._connections}", self._say)

    def say(self, what: str) -> None:
        """A line of the log."""
        self._say(f"host   {what}")

    def interactive(self, *words: str, **options: Any) -> Output:
        """Run a command as hosts run those of a person: on a connection of its own, which then ends."""
        with self.connect() as connection:
            return connection.run(*words, **options)

    def refusals(self) -> int:
        """How many connections in the guest's own network have found no listener so far."""
        fields = self.main.shell("grep '^Tcp: [0-9]' /proc/net/snmp").split()
        return int(fields[7])  # AttemptFails

    # --- containers ---

    def lower(self, container_id: str) -> str:
        """Where the guest sees the container's root file system."""
        return f"/vz-rootfs/{container_id}" if self.stacked else "/vz-rootfs"

    def root(self, container_id: str) -> Path:
        """Where this host has it."""
        return self.share / container_id if self.stacked else self.share

    def bundle(self, container_id: str) -> str:
        """The path of its bundle that Create is given."""
        inside = f"/run/vz-oci/bundles/{container_id}"
        return f"{self.lower(container_id)}{inside}" if self.stacked else inside

    def write(self, container_id: str, *, files: dict[str, str] | None = None, **wishes: Any) -> None:
        """Write the container's root file system, if it is not there, and its bundle into the share: the guest runs
        already. A stack's container that is made anew gets a new root file system."""
        root = self.root(container_id)
        if self.stacked:
            shutil.rmtree(root, ignore_errors=True)
            bundles.write_root(root, self.busybox, files)
        bundles.write_bundle(root / f"run/vz-oci/bundles/{container_id}", container_id, **wishes)
        self.say(f"writes {root.name if self.stacked else 'the bundle'} into the share")

    def overlay(self, container_id: str, archive: str = "") -> str:
        """Lay a tmpfs over the container's root file system, in the guest, after what an earlier container of that id
        left; `archive` is unpacked into it. The merged directory."""
        place = f"/run/vz-oci/containers/{container_id}"
        self.main.text(
            "sh",
            "-c",
            f"umount {place}/merged 2>/dev/null; umount {place} 2>/dev/null; rm -rf {place}; "
            "echo 2 > /proc/sys/vm/drop_caches",
        )
        unpack = f"/bin/busybox tar -C {place}/upper -xpf {archive} && " if archive else ""
        self.main.text(
            "sh",
            "-c",
            f"mkdir -p {place} && mount -t tmpfs tmpfs {place} && "
            f"mkdir -p {place}/upper {place}/work {place}/merged && "
            f"{unpack}mount -t overlay overlay -o lowerdir={self.lower(container_id)},upperdir={place}/upper,"
            f"workdir={place}/work {place}/merged && mkdir -p /run/vz-oci/logs/{container_id}",
        )
        self.main.text(
            "/bin/busybox",
            "sh",
            "-c",
            f"/bin/busybox mkdir -p {place}/merged/etc && "
            f"/bin/busybox printf 'nameserver 10.0.2.3\\n' > {place}/merged/etc/resolv.conf",
        )
        return f"{place}/merged"

    def launch(self, container_id: str, *, archive: str = "", **wishes: Any) -> int:
        """The whole way of a container into life; the id of its first process in the guest."""
        self.write(container_id, **wishes)
        self.overlay(container_id, archive)
        self.main.oci_create(container_id, self.bundle(container_id))
        self.main.oci_start(container_id)
        state = self.main.oci_state(container_id)
        assert state.status == "running", state
        assert state.bundle_path.endswith(f"/run/vz-oci/bundles/{container_id}")
        return int(state.pid)

    def enter(self, pid: int, *words: str, working_dir: str = "/", **options: Any) -> Running:
        """Start a command in a container as hosts do for a person: by nsenter, on a connection of its own."""
        namespaces = {"mount": "mnt", "net": "net", "pid": "pid", "ipc": "ipc", "uts": "uts"}
        return self.connect().exec(
            "/bin/busybox",
            "nsenter",
            *(f"--{name}=/proc/{pid}/ns/{file}" for name, file in namespaces.items()),
            f"--root=/proc/{pid}/root",
            f"--wd=/proc/{pid}/root{working_dir}",
            *words,
            **options,
        )

    def inside(self, pid: int, script: str, **options: Any) -> str:
        """What a script in a container prints, both streams, that ends with 0."""
        running = self.enter(pid, "/bin/sh", "-c", script, **options)
        try:
            output = running.output()
        finally:
            running.connection.close()
        self.say(f"  in the container: {' '.join(output.text.split())}")
        # The kernel says of a process that faulted where it was (`exception-trace`, on since the guest is up).
        fault = self.main.shell("dmesg | grep -A 20 'unhandled' || true") if output.end == FAULTED else ""
        assert output.end == 0, (script, output, fault)
        return output.text

    def stop(self, container_id: str, grace_secs: float = 1.0) -> None:
        """End it: SIGTERM, SIGKILL when that was not heard (a first process that has no handler never hears it),
        Delete with force."""
        self.main.oci_kill(container_id, "SIGTERM")
        deadline = time.monotonic() + grace_secs
        while self.main.oci_state(container_id).status != "stopped":
            if time.monotonic() > deadline:
                with contextlib.suppress(Refused):  # it may have ended by now
                    self.main.oci_kill(container_id, "SIGKILL")
                eventually(lambda: self.main.oci_state(container_id).status == "stopped", f"{container_id} stopped")
                break
            time.sleep(0.1)
        self.main.oci_delete(container_id, force=True)


@contextlib.contextmanager
def playing(
    bundle: Path,
    programs: HostPrograms,
    busybox: Path,
    *,
    share: Path | None = None,
    stacked: bool = True,
    hardware: Hardware | None = None,
    say: Say = lambda _line: None,
) -> Iterator[Host]:
    """A host with a guest of `bundle`, whose youki it shares, and `share` as `rootfs` (None: no such share).

    `hardware` is what else the machine has; its kernel and initramfs are the bundle's unless it names others.
    """
    hardware = hardware or Hardware(bundle / "vmlinux", bundle / "initramfs.img")
    with tempfile.TemporaryDirectory(prefix="vz-") as folder:
        tools = Path(folder, "bin")
        tools.mkdir()
        shutil.copy(bundle / "youki", tools)
        (tools / "youki").chmod(0o755)
        own = {"rootfs": share} if share is not None else {}
        shares = {**own, "oci-runtime-bin": tools, **hardware.shares}
        with (
            booted(replace(hardware, shares=shares), programs, say) as machine,
            Connection(machine.dial, Path(folder), "c1", say) as main,
        ):
            main.ping()
            with contextlib.suppress(Refused, AssertionError):  # a root file system may be without a shell
                main.shell("echo 1 > /proc/sys/debug/exception-trace")
            yield Host(machine, main, share or Path(folder), busybox, stacked, Path(folder), say)
