"""Puts a boot bundle together: exactly `vmlinux`, `initramfs.img`, `youki` and `version.json`.

In: `/in/kernel` (`vmlinux`), `/in/config` (`capabilities.json`, what the kernel's configuration proves),
`/in/initramfs` (`initramfs.img`), `/in/youki` (`youki`), `/in/probes` (`probes.json`, what the booted guest proved) and
`/in/metadata.json` (what the recipe knows: the keys of `DECLARED`). What version.json says beyond that is read from the
files themselves: checksums, and the capabilities that the kernel's configuration proves. One that the guest did not
prove as well is no capability, and there is no bundle. Runs in the sandbox with the standard library alone; `VZ_IN` and
`VZ_OUT` stand in for `/in` and `/out` in tests.
"""

import datetime
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

DECLARED = {
    "kernel": str,
    "profile": str,
    "security_profile": str,
    "busybox": str,
    "agent": str,
    "agent_protocol_revision": int,
    "youki": str,
}
"""The keys of metadata.json and the types of their values, in version.json's order."""

FILES = {
    "vmlinux": ("kernel/vmlinux", 0o444),
    "initramfs.img": ("initramfs/initramfs.img", 0o444),
    "youki": ("youki/youki", 0o555),
}
"""The bundle's files: where each lies below `/in`, and its mode."""


class InputError(Exception):
    """An input is not what a bundle can be made of; the text says which and why."""


def version(metadata: dict[str, Any], capabilities: list[str], checksums: dict[str, str], epoch: int) -> dict[str, Any]:
    """version.json as data, keys in the order of the contract. `epoch` is in seconds. Raises InputError."""
    if set(metadata) != set(DECLARED):
        missing, foreign = sorted(DECLARED.keys() - metadata), sorted(metadata.keys() - DECLARED)
        raise InputError(f"metadata.json: missing keys: {missing}, unknown keys: {foreign}")
    for key, kind in DECLARED.items():
        if type(metadata[key]) is not kind:
            raise InputError(f"metadata.json: {key}: wanted {kind.__name__}, found {metadata[key]!r}")
    if not capabilities or not all(isinstance(name, str) for name in capabilities):
        raise InputError(f"capabilities.json: wanted a list of names, found {capabilities!r}")
    built = datetime.datetime.fromtimestamp(epoch, datetime.UTC)
    return {
        **{key: metadata[key] for key in DECLARED},
        "built": built.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "sha256_vmlinux": checksums["vmlinux"],
        "sha256_initramfs": checksums["initramfs.img"],
        "sha256_youki": checksums["youki"],
        "capabilities": sorted(set(capabilities)),
    }


def check_proven(capabilities: list[str], report: dict[str, Any], profile: str) -> None:
    """Raises InputError, naming each, unless the guest of `report` proved all of `capabilities`, and that what the
    profile must not contain is absent."""
    if report.get("profile") != profile:
        raise InputError(f"probes.json: wanted profile {profile}, found {report.get('profile')!r}")
    none = {"verdict": "not probed", "detail": "probes.json does not name it"}
    verdicts = {name: report["capabilities"].get(name, none) for name in capabilities}
    verdicts |= {f"absent:{name}": verdict for name, verdict in report["absent"].items()}
    if failed := [f"{name}: {v['verdict']}: {v['detail']}" for name, v in verdicts.items() if v["verdict"] != "PROVEN"]:
        raise InputError("not proven in the guest: " + "; ".join(failed))


def assemble(source: Path, out: Path, epoch: int) -> None:
    """Write the bundle of the inputs below `source` into `out`. Raises InputError, and OSError for a missing file."""
    checksums = {}
    for name, (path, mode) in FILES.items():
        target = out / name
        shutil.copyfile(source / path, target)
        target.chmod(mode)
        with target.open("rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if target.stat().st_size == 0:
            raise InputError(f"{path} is empty")
    capabilities = _json(source / "config/capabilities.json")
    document = version(_json(source / "metadata.json"), capabilities, checksums, epoch)
    check_proven(document["capabilities"], _json(source / "probes/probes.json"), document["profile"])
    (out / "version.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path.name} is not JSON: {error}") from error


def main() -> int:
    """Assemble; the exit code."""
    try:
        assemble(
            Path(os.environ.get("VZ_IN", "/in")),
            Path(os.environ.get("VZ_OUT", "/out")),
            int(os.environ["SOURCE_DATE_EPOCH"]),
        )
    except (InputError, OSError) as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
