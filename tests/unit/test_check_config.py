"""The proof of a kernel's `.config`: every dropped, forbidden, missing or contradictory thing is named, all at once."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "recipes/kernel"
SCRIPT = ROOT / "vzrepro/recipes/files/kernel/check_config.py"


def load(path: Path) -> ModuleType:
    """A file of the kernel recipe as a module, without evaluating the recipe itself."""
    spec = importlib.util.spec_from_file_location(f"kernel_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check_config = load(SCRIPT)
capabilities = load(KERNEL / "capabilities.py")

CONFIG = """\
#
# Automatically generated file; DO NOT EDIT.
CONFIG_VSOCKETS=y
# CONFIG_VSOCKETS_LOOPBACK is not set
CONFIG_NR_CPUS=64
CONFIG_LSM="landlock,yama"
"""


def requirements(**changes: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "profile": "test",
        "base": "allnoconfig",
        "fragment": "test.config",
        "lists": ["hardening.txt", "hosts.txt"],
        "capabilities": {"vsock": {"VSOCKETS": "y", "VSOCKETS_LOOPBACK": "n"}},
        "forbidden": ["TUN"],
    }
    return {**plain, **changes}


def problems(fragment: str, *, config: str = CONFIG, hardening: str = "", **changes: Any) -> list[str]:
    requests, found = check_config.parse_fragment("test.config", fragment)
    listed, more = check_config.parse_list("hardening.txt", hardening)
    verdict = check_config.check(check_config.parse_config(config), requests, listed, requirements(**changes))
    return [*found, *more, *verdict.problems]


def test_everything_kept() -> None:
    fragment = (
        'CONFIG_VSOCKETS=y\nCONFIG_NR_CPUS=64\nCONFIG_LSM="landlock,yama"\n# CONFIG_VSOCKETS_LOOPBACK is not set\n'
    )
    assert problems(fragment, hardening="VSOCKETS_LOOPBACK=n\n") == []


def test_absent_is_n() -> None:
    assert problems("# CONFIG_NO_SUCH_SYMBOL is not set\nCONFIG_NEITHER_THIS=n\n") == []


@pytest.mark.parametrize(
    ("line", "wanted", "found", "why"),
    [
        ("CONFIG_NFT_COUNTER=y", "y", "n (absent)", "no such symbol"),
        ("CONFIG_VSOCKETS_LOOPBACK=y", "y", "n", "overrides"),
        ("# CONFIG_VSOCKETS is not set", "n", "y", "selects it"),
        ("CONFIG_NR_CPUS=512", "512", "64", "overrides"),
        ('CONFIG_LSM="yama"', '"yama"', '"landlock,yama"', "overrides"),
        ("CONFIG_VSOCKETS=m", "m", "y", "overrides"),
    ],
)
def test_dropped_request_names_line_and_values(line: str, wanted: str, found: str, why: str) -> None:
    (problem,) = problems(f"# a reason\n\n{line}\n")
    assert problem.startswith("test.config:3: CONFIG_")
    assert f"wanted {wanted}, found {found}: " in problem
    assert why in problem


def test_repeated_and_contradicting_lines() -> None:
    repeated, contradicted = problems("CONFIG_VSOCKETS=y\nCONFIG_VSOCKETS=y\n# CONFIG_VSOCKETS is not set\n")
    assert repeated == "test.config:2: CONFIG_VSOCKETS=y repeats line 1 (CONFIG_VSOCKETS=y)"
    assert contradicted == "test.config:3: CONFIG_VSOCKETS=n contradicts line 1 (CONFIG_VSOCKETS=y)"


@pytest.mark.parametrize(
    "line", ["VSOCKETS=y", "# CONFIG_VSOCKETS=y", "#CONFIG_VSOCKETS is not set", "CONFIG_VSOCKETS y"]
)
def test_a_line_that_asks_nothing_is_no_comment(line: str) -> None:
    (problem,) = problems(line + "\n")
    assert problem.startswith("test.config:1: not a request")


def test_forbidden_symbol() -> None:
    assert problems("", config=CONFIG + "CONFIG_TUN=m\n") == ["forbidden: CONFIG_TUN: wanted n, found m"]
    assert problems("", config=CONFIG + "# CONFIG_TUN is not set\n") == []


def test_missing_capability_is_not_proven() -> None:
    wanted = {"vsock": {"VSOCKETS": "y"}, "tun": {"TUN": "y", "NET": "y"}}
    verdict = check_config.check(
        check_config.parse_config(CONFIG), [], [], requirements(capabilities=wanted, forbidden=[])
    )
    assert verdict.capabilities == ("vsock",)
    assert verdict.problems == (
        "capability tun: CONFIG_TUN: wanted y, found n (absent)",
        "capability tun: CONFIG_NET: wanted y, found n (absent)",
    )


def test_the_scores_of_lists_and_their_errors() -> None:
    texts = {"hardening.txt": "VSOCKETS=y\nTUN=y  exception: nobody here tunnels\n", "hosts.txt": "NR_CPUS=64\n"}
    read = [check_config.parse_list(name, text) for name, text in texts.items()]
    assert [wrong for _, wrong in read] == [[], []]
    verdict = check_config.check(
        check_config.parse_config(CONFIG), [], [line for lines, _ in read for line in lines], requirements()
    )
    assert verdict.problems == ()
    assert verdict.scores == {"hardening.txt": (1, 2), "hosts.txt": (1, 1)}

    twice, noise, stale, unmet = problems("", hardening="VSOCKETS=y exception: no\nTUN=y\nTUN=y\nKASLR: yes\n")
    assert stale.startswith("hardening.txt:1:")
    assert unmet == "hardening.txt:2: CONFIG_TUN: wanted y, found n (absent)"
    assert twice == "hardening.txt:3: TUN is already on line 2"
    assert noise.startswith("hardening.txt:4:")


def test_the_program_lists_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text(CONFIG + "CONFIG_TUN=y\n")
    (tmp_path / "test.config").write_text("CONFIG_NFT_META=y\nCONFIG_HVC_VIRTIO=y\n")
    (tmp_path / "hardening.txt").write_text("RANDOMIZE_BASE=y\n")
    (tmp_path / "hosts.txt").write_text('# what hosts ask for\nNR_CPUS=64\nLSM="yama"\nTTY=y  exception: none\n')
    (tmp_path / "requirements.json").write_text(json.dumps(requirements(capabilities={"tty": {"TTY": "y"}})))
    command = [sys.executable, str(SCRIPT), "--config", ".config", "--source", "."]
    command += ["--requirements", "requirements.json", "--out", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    places = ["test.config:1:", "test.config:2:", "forbidden: CONFIG_TUN", "capability tty:", "hardening.txt:1:"]
    places += ['hosts.txt:3: CONFIG_LSM: wanted "yama", found "landlock,yama"']
    assert [place for place in places if place in done.stdout] == places
    assert "6 problem(s)" in done.stdout
    assert not (tmp_path / "capabilities.json").exists()

    (tmp_path / ".config").write_text(CONFIG + "CONFIG_TTY=y\nCONFIG_RANDOMIZE_BASE=y\n")
    (tmp_path / "test.config").write_text("CONFIG_TTY=y\n")
    (tmp_path / "hosts.txt").write_text("NR_CPUS=64\nTUN=y  exception: nobody here tunnels\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads((tmp_path / "capabilities.json").read_text()) == ["tty"]
    assert "hardening.txt 1/1, hosts.txt 1/2" in done.stdout


@given(
    st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,12}", fullmatch=True), st.sampled_from(["y", "n", "64", '"a b"']))
)
def test_a_config_proves_the_fragment_it_came_from(symbols: dict[str, str]) -> None:
    lines = [
        f"# CONFIG_{name} is not set" if value == "n" else f"CONFIG_{name}={value}" for name, value in symbols.items()
    ]
    text = "\n".join(lines)
    assert check_config.parse_config(text) == symbols
    assert problems(text, config=text, capabilities={}, forbidden=[]) == []


@pytest.mark.parametrize("profile", (*capabilities.PROFILES, capabilities.PLAIN), ids=lambda profile: str(profile.name))
def test_each_profile_is_consistent(profile: Any) -> None:
    """What the records promise, its fragment asks for; what they forbid, no file asks for; both lists are readable."""
    requests, wrong = check_config.parse_fragment(profile.fragment, (KERNEL / profile.fragment).read_text())
    lists = [check_config.parse_list(name, (KERNEL / name).read_text()) for name in profile.lists]
    assert [*wrong, *(problem for _, problems in lists for problem in problems)] == []
    asked = {request.symbol: request.value for request in requests}
    assert {name: asked.get(name, "n") for name in (item.symbol for item in profile.forbidden)} == {
        item.symbol: "n" for item in profile.forbidden
    }
    promised = {name: value for capability in profile.capabilities for name, value in capability.symbols}
    assert not set(promised) & {item.symbol for item in profile.forbidden}
    assert {name: asked[name] for name in promised if name in asked and asked[name] != promised[name]} == {}
    assert len({capability.name for capability in profile.capabilities}) == len(profile.capabilities)
    assert all(line.exception == "" or asked.get(line.symbol) != line.value for listed, _ in lists for line in listed)


def test_the_container_profile_promises_what_the_sandbox_needs() -> None:
    (container,) = [profile for profile in capabilities.PROFILES if profile.name == "container"]
    written = capabilities.requirements(container)
    assert set(written["capabilities"]) == {
        *("vsock", "virtiofs", "hvc0_serial", "ext4_root", "overlayfs", "netns", "seccomp", "io_uring"),
        *("btrfs_snapshots", "device_mapper", "dm_crypt", "nfsd", "container_sandbox"),
        *("memory_reclaim", "snapshot_safe"),
    }
    missing = {*("IKCONFIG", "KVM", "TUN", "USB", "USB_GADGET", "SCSI", "ATA", "NFS_FS", "NET_9P", "9P_FS", "SQUASHFS")}
    assert missing | {"FAT_FS", "VFAT_FS"} <= set(written["forbidden"])
    assert json.loads(json.dumps(written)) == written


def test_the_developer_profile_is_for_hosts() -> None:
    (developer,) = [profile for profile in capabilities.PROFILES if profile.name == "developer"]
    names = {item.name for item in developer.capabilities}
    assert {item.name for item in capabilities.COMMON} | {"nested_virt", "tun"} == names
    assert (developer.base, developer.security_profile) == ("defconfig", "developer-nested-virt")


def test_the_plain_profile_is_the_container_profile_without_hardening_and_tuning() -> None:
    """Same features under another name: what it asks for, the container asks for; what it leaves out is hardening or
    listed here."""
    tuning = {
        *("CC_OPTIMIZE_FOR_SIZE", "RELR", "RAID6_PQ_BENCHMARK", "NO_HZ_IDLE", "HIGH_RES_TIMERS", "DEBUG_BUGVERBOSE"),
    }
    text = (KERNEL / "container.config").read_text()
    sections = [part for part in re.split(r"(?m)^# --- ", text) if not part.startswith(("Hardening", "Held down"))]
    features, _ = check_config.parse_fragment("container.config", "\n".join(f"# {part}" for part in sections))
    plain, wrong = check_config.parse_fragment("plain.config", (KERNEL / "plain.config").read_text())
    assert wrong == []
    assert {item.symbol: item.value for item in plain} == {
        **{item.symbol: item.value for item in features if item.symbol not in tuning},
        "RAID6_PQ_BENCHMARK": "y",
        "LOCALVERSION": '"-vz-plain"',
    }


SWITCHED_OFF = {
    "developer": (
        "9P_FS AIO ARM_PMU ATA AUDIT CMA FAT_FS FTRACE INPUT KALLSYMS MEMCG NFS_FS NUMA PERF_EVENTS PROFILING SCSI "
        "SECURITY SQUASHFS SWAP TRANSPARENT_HUGEPAGE USB VFAT_FS VT WIRELESS ZONE_DMA ZONE_DMA32"
    ),
    "container": "ZONE_DMA ZONE_DMA32 TRANSPARENT_HUGEPAGE NUMA SWAP CMA",
}
"""What the contract says that existing hosts switch off by name, and that no profile has a reason to keep."""


@pytest.mark.parametrize("profile", capabilities.PROFILES, ids=lambda profile: str(profile.name))
def test_what_existing_hosts_ask_for_is_asked_for(profile: Any) -> None:
    listed, _ = check_config.parse_list("", (KERNEL / f"hosts-{profile.name}.txt").read_text())
    wanted = {line.symbol: line.value for line in listed if not line.exception}
    off = SWITCHED_OFF[profile.name].split()
    assert {name: wanted.get(name) for name in off} == dict.fromkeys(off, "n")
    on = "VIRTIO_BALLOON DEVTMPFS_MOUNT IP_NF_FILTER IP_NF_NAT IP_NF_TARGET_MASQUERADE".split()
    assert {name: wanted.get(name) for name in on} == dict.fromkeys(on, "y")
    assert wanted["LOCALVERSION"] == f'"-vz-{profile.name}"'
