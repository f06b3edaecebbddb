"""Proves what a bundle declares, in its guest: boots it here with `vz-probe` unpacked over its initramfs, and has the
agent run that.

The same program proves a profile's kernel while it is built (recipes/probes). docs/probes.md says what each probe does.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

from vzrepro.base import events
from vzrepro.base.errors import VzreproError
from vzrepro.guest import metadata
from vzrepro.guest.vm import boot, qemu, watch
from vzrepro.guest.vm.agent import AgentClient
from vzrepro.guest.vm.boot import HostPrograms

ProbeVerdict = Literal["PROVEN", "FAILED", "INCONCLUSIVE"]

ABSENT = "absent:"
"""What the name of a row begins with that says something is not there."""

_PROGRAM = "/sbin/vz-probe"
_SHARE = "vz-probe"
_RUNTIME_SHARE = "oci-runtime-bin"
_HYPERVISOR = "nested_virt"
_OF_STATE = ("memory_reclaim", "snapshot_safe")
"""Probes for which the host takes memory, saves and restores: on a machine of their own, by the program `state.py`."""
_DISKS = ("ext4.img", "btrfs.img")
_FROM_HOST, _FROM_GUEST = "written by the host\n", "written by the guest\n"
_CONSOLE_LINE = "vz-probe: written to hvc0"
_PROBING_SECS = 1200.0
"""All probes together: seconds, but the guest may be emulated on a busy machine."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of one capability: whether version.json declares it, whether the kernel's configuration was proven
    to have it (None: unknown here), and what the guest showed. `absent:X` is neither declared nor in a configuration.
    """

    capability: str
    declared: bool | None
    config: bool | None
    verdict: ProbeVerdict
    detail: str

    @property
    def broken(self) -> bool:
        """Whether this breaks the bundle's word: declared and not there, or there and forbidden."""
        promised = self.declared or self.capability.startswith(ABSENT)
        return bool(promised) and (self.verdict == "FAILED" or self.config is False)


def probe(
    bundle: Path,
    tools: Path,
    *,
    config: Collection[str] | None,
    programs: HostPrograms,
    timeout_secs: float,
    report: events.Report = events.ignore,
) -> list[Proof]:
    """Boot `bundle` and prove what it declares, what its profile is known for and what that must not contain.

    `tools` is the realized target `probes`, `config` what the kernel's build proved, None when nobody knows.
    `timeout_secs` is how long the agent may take from QEMU's start. The bundle's files stay as they are. Raises as
    `boot.running` does, and VzreproError when vz-probe does not run to its end.
    """
    about = metadata.read(bundle)
    declared = set(about.capabilities)
    plan = _plan(tools, about.kind, declared)
    names = sorted({*plan.capabilities.values(), *plan.absent} - {*_OF_STATE})
    of_state = [name for name in _OF_STATE if name in plan.capabilities.values()]
    console: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vz-probe-", ignore_cleanup_errors=True) as scratch:
        share = Path(scratch, "share")
        share.mkdir()
        (share / "from-host").write_text(_FROM_HOST)
        guest = _guest(bundle.resolve(), tools, Path(scratch), share, nested=_HYPERVISOR in names)
        with boot.running(
            guest, programs=programs, timeout_secs=timeout_secs, report=report, on_console=console.append
        ) as vm:
            found = _run(vm.agent, names)
            vm.power_off()
        if of_state:
            found |= _run_state(guest, tools, Path(scratch), of_state, programs)
        # Two probes are proven only together with what is found here.
        written = share / "from-guest"
        if not written.is_file() or written.read_text() != _FROM_GUEST:
            _spoil(found, "virtiofs", "what the guest wrote is not in the host's directory")
    if not any(_CONSOLE_LINE in line for line in console):
        _spoil(found, "hvc0_serial", "the host did not read what the guest wrote")
    return list(_proofs(plan, found, declared, config))


@dataclass(frozen=True, slots=True)
class _Plan:
    """Capability → the probe's name, and the names of the probes for what must be absent."""

    capabilities: Mapping[str, str]
    absent: Sequence[str]


def _plan(tools: Path, profile: str, declared: Iterable[str]) -> _Plan:
    profiles = json.loads((tools / "profiles.json").read_bytes())
    ours = profiles.get(profile, {"capabilities": {}, "absent": []})
    known: dict[str, str] = {}
    for other in profiles.values():
        known |= other["capabilities"]
    return _Plan(
        {name: known.get(name, name) for name in sorted({*declared, *ours["capabilities"]})},
        [ABSENT + name for name in ours["absent"]],
    )


def _guest(bundle: Path, tools: Path, scratch: Path, share: Path, *, nested: bool) -> qemu.Guest:
    disks = []
    for name in _DISKS:
        shutil.copyfile(tools / name, scratch / name)
        (scratch / name).chmod(0o600)
        disks.append(qemu.Disk(scratch / name))
    return replace(
        boot.of_bundle(bundle),
        shares=(qemu.Share(_SHARE, share), qemu.Share(_RUNTIME_SHARE, bundle, read_only=True)),
        disks=tuple(disks),
        extra_initramfs=(tools / "probes.cpio",),
        nested=nested,
    )


_Found = dict[str, tuple[ProbeVerdict, str]]


def _run(agent: AgentClient, names: Sequence[str]) -> _Found:
    """Probe → verdict and detail. Raises VzreproError when the program could not be run to its end."""
    with agent.exec(_PROGRAM, names, timeout_secs=_PROBING_SECS) as execution:
        ended = execution.finish()
    found = _verdicts(ended.stdout.decode("utf-8", "replace").splitlines())
    if ended.code not in (0, 1) or set(found) != set(names):
        said = (ended.stderr.decode("utf-8", "replace") + (ended.error or "")).strip()
        raise VzreproError(
            f"{_PROGRAM} in the guest did not probe everything it was asked for",
            reason=f"exit code {ended.code}; {said or 'it said nothing'}",
        )
    return found


def _run_state(guest: qemu.Guest, tools: Path, scratch: Path, names: Sequence[str], programs: HostPrograms) -> _Found:
    """As `_run`, for probes of a machine's state."""
    program = qemu.find_qemu(programs.qemu)
    accelerator = qemu.accelerator(program)
    config = {
        "qemu": [program, *qemu.machine_arguments(accelerator)],
        "kernel": str(guest.kernel),
        "initramfs": [str(guest.initramfs), *map(str, guest.extra_initramfs)],
        "vsock-device": str(programs.vhost_device_vsock),
        "preload": str(tools / "vhost.so"),
        "names": names,
        "limit-secs": _PROBING_SECS,
        "place": str(scratch),
    }
    said: list[str] = []
    with qemu.Child(sys.executable, [str(tools / "state.py"), json.dumps(config)], on_line=said.append) as child:
        code = child.wait(_PROBING_SECS + 60)
    written = scratch / "verdicts"
    found = _verdicts(written.read_text().splitlines() if written.exists() else [])
    if code != 0 or set(found) != set(names):
        raise VzreproError(
            "the guest could not be saved and restored, or its memory not be taken",
            reason="\n  ".join([f"state.py ended with exit code {code}; last lines:", *said[-watch.TAIL_LINES :]]),
        )
    return found


def _verdicts(lines: Iterable[str]) -> _Found:
    """Probe → verdict and detail, of lines as vz-probe writes them, up to the first that is none."""
    found: _Found = {}
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        for line in lines:
            said = json.loads(line)
            found[said["capability"]] = (cast(ProbeVerdict, said["verdict"]), str(said["detail"]))
    return found


def _spoil(found: _Found, name: str, detail: str) -> None:
    if name in found and found[name][0] == "PROVEN":
        found[name] = ("FAILED", detail)


def _proofs(plan: _Plan, found: _Found, declared: Collection[str], config: Collection[str] | None) -> Iterable[Proof]:
    for name, probe_name in plan.capabilities.items():
        known = None if config is None else name in config
        yield Proof(name, name in declared, known, *found[probe_name])
    for name in plan.absent:
        yield Proof(name, None, None, *found[name])
