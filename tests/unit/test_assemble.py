"""recipes/bundle/assemble.py, run as the sandbox runs it: what ends up in a bundle, and what stops it."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes/bundle/assemble.py"
METADATA = {
    "kernel": "6.12.107",
    "profile": "container",
    "security_profile": "container-hardened",
    "busybox": "1.37.0",
    "agent": "0.1.0",
    "agent_protocol_revision": 1,
    "youki": "0.7.0",
}
CONTENT = {"kernel/vmlinux": b"kernel", "initramfs/initramfs.img": b"initramfs", "youki/youki": b"runtime"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "in"
    for path, content in CONTENT.items():
        (source / path).parent.mkdir(parents=True)
        (source / path).write_bytes(content)
    (source / "kernel/config").write_text("CONFIG_ARM64=y\n")
    (source / "kernel/System.map").write_text("0 T start\n")
    (source / "config").mkdir()
    (source / "config/capabilities.json").write_text('["vsock", "btrfs_snapshots"]')
    (source / "metadata.json").write_text(json.dumps(METADATA, sort_keys=True))
    (source / "probes").mkdir()
    write_report(source)
    return source


def write_report(source: Path, *, profile: str = "container", **verdicts: str) -> None:
    """What the guest proved: everything, but for `verdicts`; an empty one is left out."""
    capabilities = {"vsock": "PROVEN", "btrfs_snapshots": "PROVEN", **verdicts}
    tun = capabilities.pop("tun", "PROVEN")
    report = {
        "profile": profile,
        "capabilities": {name: {"verdict": v, "detail": "so it is"} for name, v in capabilities.items() if v},
        "absent": {"tun": {"verdict": tun, "detail": "so it is"}},
    }
    (source / "probes/probes.json").write_text(json.dumps(report))


def assemble(source: Path, epoch: str = "1767225600") -> tuple[subprocess.CompletedProcess[str], Path]:
    out = source.parent / "out"
    out.mkdir(exist_ok=True)
    env = {**os.environ, "VZ_IN": str(source), "VZ_OUT": str(out), "SOURCE_DATE_EPOCH": epoch}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
    return done, out


def test_a_bundle_is_exactly_four_files(source: Path) -> None:
    done, out = assemble(source)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["initramfs.img", "version.json", "vmlinux", "youki"]
    for path, content in CONTENT.items():
        assert (out / Path(path).name).read_bytes() == content
    assert stat.S_IMODE((out / "youki").stat().st_mode) == 0o555
    assert stat.S_IMODE((out / "vmlinux").stat().st_mode) == 0o444


def test_version_json_is_the_contracts(source: Path) -> None:
    _, out = assemble(source)
    document = json.loads((out / "version.json").read_text())
    assert list(document.items()) == [
        *METADATA.items(),
        ("built", "2026-01-01T00:00:00Z"),
        ("sha256_vmlinux", hashlib.sha256(b"kernel").hexdigest()),
        ("sha256_initramfs", hashlib.sha256(b"initramfs").hexdigest()),
        ("sha256_youki", hashlib.sha256(b"runtime").hexdigest()),
        ("capabilities", ["btrfs_snapshots", "vsock"]),
    ]


def test_built_is_the_epochs_time(source: Path) -> None:
    _, out = assemble(source, epoch="86399")
    assert json.loads((out / "version.json").read_text())["built"] == "1970-01-01T23:59:59Z"


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("metadata.json", "{}", "missing keys: ['agent', 'agent_protocol_revision', 'busybox'"),
        ("metadata.json", json.dumps({**METADATA, "extra": 1}), "unknown keys: ['extra']"),
        ("metadata.json", json.dumps({**METADATA, "agent_protocol_revision": "1"}), "wanted int, found '1'"),
        ("metadata.json", json.dumps({**METADATA, "youki": None}), "youki: wanted str, found None"),
        ("metadata.json", "{", "metadata.json is not JSON"),
        ("config/capabilities.json", "[]", "capabilities.json: wanted a list of names"),
        ("youki/youki", "", "youki/youki is empty"),
    ],
)
def test_wrong_inputs_are_named(source: Path, path: str, content: str, said: str) -> None:
    (source / path).write_text(content)
    done, out = assemble(source)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (out / "version.json").exists()


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"vsock": "FAILED"}, "not proven in the guest: vsock: FAILED: so it is"),
        ({"vsock": "INCONCLUSIVE"}, "vsock: INCONCLUSIVE: so it is"),
        ({"vsock": ""}, "vsock: not probed"),
        ({"tun": "FAILED"}, "absent:tun: FAILED: so it is"),
        (
            {"vsock": "FAILED", "btrfs_snapshots": ""},
            "btrfs_snapshots: not probed: probes.json does not name it; v",
        ),
        ({"profile": "developer"}, "wanted profile container, found 'developer'"),
    ],
)
def test_what_the_guest_did_not_prove_is_in_no_bundle(source: Path, report: dict[str, str], said: str) -> None:
    write_report(source, **report)  # type: ignore[arg-type]
    done, out = assemble(source)
    assert done.returncode == 1
    assert said in done.stderr
    assert not (out / "version.json").exists()


def test_what_the_guest_proved_and_nobody_declares_is_not_in_the_bundle(source: Path) -> None:
    write_report(source, dm_crypt="PROVEN", seccomp="FAILED")
    done, out = assemble(source)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "version.json").read_text())["capabilities"] == ["btrfs_snapshots", "vsock"]


@pytest.mark.parametrize("path", [*CONTENT, "probes/probes.json"])
def test_a_missing_file_is_named(source: Path, path: str) -> None:
    (source / path).unlink()
    done, _ = assemble(source)
    assert done.returncode == 1
    assert path in done.stderr
