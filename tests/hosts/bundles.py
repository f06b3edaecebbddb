"""What a host writes into its shares: containers' root file systems, and OCI bundles as it composes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETPCAP "
        "SETUID SYS_CHROOT"
    ).split()
]
_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


def write_root(root: Path, busybox: Path, files: Mapping[str, str] | None = None) -> Path:
    """A small image's root file system: a busybox by the names of its applets, users, and `files` (path → text)."""
    for name in ("bin", "sbin", "usr/bin", "usr/sbin", "etc", "root", "tmp", "run", "var/log", "dev", "proc", "sys"):
        (root / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox / "busybox", root / "bin/busybox")
    for applet in (busybox / "applets").read_text().split():
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/srv:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\nweb:x:33:\n")
    for name, text in (files or {}).items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return root


def write_bundle(bundle: Path, container_id: str, **wishes: Any) -> Path:
    """The bundle's directory with its config.json; `wishes` are those of `config`."""
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "config.json").write_text(json.dumps(config(container_id, **wishes)))
    return bundle


def config(
    container_id: str,
    *,
    command: Sequence[str],
    env: Sequence[str] = (),
    user: int = 0,
    binds: Mapping[str, str] | None = None,
    network: str | None = None,
    namespaces: Sequence[str] = ("mount", "pid", "ipc", "uts"),
    limits: Mapping[str, Any] | None = None,
    log: bool = False,
) -> dict[str, Any]:
    """A config.json as hosts write it: the root file system is the overlay that they mount in the guest.

    `binds` are target → the guest's directory; `network` is the path of a namespace, and None leaves the container on
    the guest's network. With `log`, what the container prints goes to a file of the guest, which outlives it.
    """
    words = list(command)
    binds = dict(binds or {})
    if log:
        binds["/var/log/vz-oci"] = f"/run/vz-oci/logs/{container_id}"
        inner = " ".join(f"'{word}'" for word in words)
        words = ["/bin/sh", "-c", f"mkdir -p /var/log/vz-oci && exec {inner} >>/var/log/vz-oci/output.log 2>&1"]
    kinds: list[dict[str, str]] = [{"type": kind} for kind in namespaces]
    if network is not None:
        kinds.append({"type": "network", "path": network})
    return {
        "ociVersion": "1.0.2",
        "root": {"path": f"/run/vz-oci/containers/{container_id}/merged", "readonly": False},
        "process": {
            "terminal": False,
            "user": {"uid": user, "gid": user},
            "args": words,
            "env": [PATH, *env],
            "cwd": "/",
            "capabilities": dict.fromkeys(_SETS, _CAPABILITIES),
            "noNewPrivileges": True,
        },
        **({"hostname": container_id} if "uts" in namespaces else {}),
        "mounts": [
            _mount("/proc", "proc", "proc", "nosuid", "noexec", "nodev"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),
            _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid", "noexec", "nodev"),
            _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            _mount("/sys/fs/cgroup", "cgroup2", "cgroup2", "nosuid", "noexec", "nodev", "relatime", "ro"),
            *(_mount(target, "bind", source, "rbind", "rw") for target, source in sorted(binds.items())),
        ],
        "linux": {"namespaces": kinds, **({"resources": dict(limits)} if limits else {})},
    }


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}
