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

KERNEL = Path(__file__).parents[2] / "recipes" / "kernel"


def load(name: str) -> ModuleType:
    """A file of the kernel recipe as a module, without evaluating the recipe itself."""
    spec = importlib.util.spec_from_file_location(f"kernel_{name}", KERNEL / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check_config = load("check_config")
capabilities = load("capabilities")

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
        "hardening": "hardening.txt",
        "capabilities": {"vsock": {"VSOCKETS": "y", "VSOCKETS_LOOPBACK": "n"}},
        "forbidden": ["TUN"],
    }
    return {**plain, **changes}


def problems(fragment: str, *, config: str = CONFIG, hardening: str = "", **changes: Any) -> list[str]:
    requests, found = check_config.parse_fragment("test.config", fragment)
    wanted, more = check_config.parse_hardening("hardening.txt", hardening)
    verdict = check_config.check(check_config.parse_config(config), requests, wanted, requirements(**changes))
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


def test_hardening_score_and_its_errors() -> None:
    text = "VSOCKETS=y\nTUN=y  exception: nobody here tunnels\n"
    wanted, wrong = check_config.parse_hardening("hardening.txt", text)
    verdict = check_config.check(check_config.parse_config(CONFIG), [], wanted, requirements())
    assert (wrong, verdict.problems) == ([], ())
    assert verdict.hardening == {"checked": 2, "hold": 1, "exceptions": {"TUN=y": "nobody here tunnels"}}

    twice, noise, stale, unmet = problems("", hardening="VSOCKETS=y exception: no\nTUN=y\nTUN=y\nKASLR: yes\n")
    assert stale.startswith("hardening.txt:1:")
    assert unmet == "hardening.txt:2: CONFIG_TUN: wanted y, found n (absent)"
    assert twice == "hardening.txt:3: TUN is already on line 2"
    assert noise.startswith("hardening.txt:4:")


def test_the_program_lists_all_problems_at_once(tmp_path: Path) -> None:
    (tmp_path / ".config").write_text(CONFIG + "CONFIG_TUN=y\n")
    (tmp_path / "test.config").write_text("CONFIG_NFT_META=y\nCONFIG_HVC_VIRTIO=y\n")
    (tmp_path / "hardening.txt").write_text("RANDOMIZE_BASE=y\n")
    (tmp_path / "requirements.json").write_text(json.dumps(requirements(capabilities={"tty": {"TTY": "y"}})))
    command = [sys.executable, str(KERNEL / "check_config.py"), "--config", ".config", "--source", "."]
    command += ["--requirements", "requirements.json", "--out", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    places = ["test.config:1:", "test.config:2:", "forbidden: CONFIG_TUN", "capability tty:", "hardening.txt:1:"]
    assert [place for place in places if place in done.stdout] == places
    assert "5 problem(s)" in done.stdout
    assert not (tmp_path / "capabilities.json").exists()

    (tmp_path / ".config").write_text(CONFIG + "CONFIG_TTY=y\nCONFIG_RANDOMIZE_BASE=y\n")
    (tmp_path / "test.config").write_text("CONFIG_TTY=y\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads((tmp_path / "capabilities.json").read_text()) == ["tty"]
    assert "hardening 1/1" in done.stdout


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
    wanted, wrong_hardening = check_config.parse_hardening(profile.hardening, (KERNEL / profile.hardening).read_text())
    assert [*wrong, *wrong_hardening] == []
    asked = {request.symbol: request.value for request in requests}
    assert {name: asked.get(name, "n") for name in (item.symbol for item in profile.forbidden)} == {
        item.symbol: "n" for item in profile.forbidden
    }
    promised = {name: value for capability in profile.capabilities for name, value in capability.symbols}
    assert not set(promised) & {item.symbol for item in profile.forbidden}
    assert {name: asked[name] for name in promised if name in asked and asked[name] != promised[name]} == {}
    assert len({capability.name for capability in profile.capabilities}) == len(profile.capabilities)
    assert all(line.exception == "" or asked.get(line.symbol, "n") != line.value for line in wanted)


def test_the_container_profile_promises_what_the_sandbox_needs() -> None:
    (container,) = [profile for profile in capabilities.PROFILES if profile.name == "container"]
    written = capabilities.requirements(container)
    assert set(written["capabilities"]) == {
        *("vsock", "virtiofs", "hvc0_serial", "ext4_root", "overlayfs", "netns", "seccomp", "io_uring"),
        *("btrfs_snapshots", "device_mapper", "dm_crypt", "nfsd", "container_sandbox"),
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
    """Same features: what it asks for, the container asks for; what it leaves out is hardening or listed here."""
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
    }
