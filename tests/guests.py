"""Real guests for tests: archives of files that are put over a bundle's initramfs, and what a console said."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest

from vzrepro.guest.vm.agent import AgentClient
from vzrepro.guest.vm.boot import HostPrograms

_NO_QEMU = platform.machine() != "x86_64" and shutil.which("qemu-system-aarch64") is None
_WHY_NOT = "QEMU for arm64 is not installed, and recipes/host-programs has none for this machine"

needs_qemu = pytest.mark.skipif(_NO_QEMU, reason=_WHY_NOT)

LIMIT_SECS = 300.0
"""Only a broken guest meets it: an emulated one on a busy host is very slow."""


def skip_without_qemu() -> None:
    """For fixtures, as `needs_qemu` is for tests."""
    if _NO_QEMU:
        pytest.skip(_WHY_NOT)


def host_programs(realize: Callable[..., Sequence[Path]]) -> HostPrograms:
    """The programs that guests need on this host, as `realize(*targets)` gives their directories."""
    names = {"vhost-device-vsock": "vhost-device-vsock", "virtiofsd": "virtiofsd"}
    if platform.machine() == "x86_64":
        names["qemu"] = "qemu-system-aarch64"
    places = realize(*names)
    return HostPrograms(*(place / program for place, program in zip(places, names.values(), strict=True)))


def load_newc() -> ModuleType:
    """The recipe's writer of initramfs archives, as a module."""
    path = Path(__file__).parents[1] / "vzrepro/recipes/files/initramfs/newc.py"
    spec = importlib.util.spec_from_file_location("newc", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["newc"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def archive(path: Path, files: Mapping[str, str]) -> Path:
    """A cpio archive at `path` of executable files: absolute name in the guest → content."""
    newc = load_newc()
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"/"}
    entries = [newc.Entry(folder, 0o40755) for folder in folders]
    entries += [newc.Entry(name, 0o100755, content.encode()) for name, content in files.items()]
    path.write_bytes(newc.archive(entries, 1))
    return path


class Console:
    """Keeps what a guest says; give it as `on_console`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()

    def wait_for(self, text: str) -> float:
        """Return once a line has `text` in it, with the seconds that it took."""
        began = time.monotonic()
        with self._more:
            said = self._more.wait_for(lambda: any(text in line for line in self.lines), LIMIT_SECS)
            assert said, f"{text!r} was never said:\n" + "\n".join(self.lines)
        return time.monotonic() - began


def shell(agent: AgentClient, script: str, program: str = "/bin/busybox") -> str:
    """What a script writes in the guest, both streams; it must end with 0."""
    out = bytearray()
    for event in agent.exec(program, ["sh", "-c", script], timeout_secs=LIMIT_SECS):
        match event.WhichOneof("event"):
            case "stdout":
                out += event.stdout
            case "stderr":
                out += event.stderr
            case "exit_code":
                assert event.exit_code == 0, out.decode()
            case "error":
                raise AssertionError(event.error)
    return out.decode()


def descendants(pid: int) -> dict[int, str]:
    """The children, grandchildren … of a process: id → name, which the kernel cuts after 15 characters."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        one = int(path.parent.name)
        parents[one], names[one] = int(rest.split()[1]), head.partition("(")[2]
    found: dict[int, str] = {}
    new = {pid}
    while new:
        new = {one for one, parent in parents.items() if parent in new} - found.keys()
        found |= {one: names[one] for one in new}
    return found
