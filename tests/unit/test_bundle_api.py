"""The Python interface to bundles: the names that hosts know, and what a container runtime is told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

import vzrepro
from tests.bundles import CONTENT, DEVELOPER, make_bundle
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.cli.oci import create
from vzrepro.guest import bundle as bundles
from vzrepro.guest.bundle import (
    KernelPaths,
    LogRotation,
    RuntimeConfig,
)


def test_the_names_hosts_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("DEVELOPER_BUNDLE_DIR", "CONTAINER_BUNDLE_DIR", "BUNDLE_DIR"):
        monkeypatch.delenv(f"VZ_LINUX_{variable}", raising=False)
    monkeypatch.setenv("VZ_LINUX_CONTAINER_BUNDLE_DIR", str(make_bundle(tmp_path / "c", "container")))
    monkeypatch.setenv("VZ_LINUX_DEVELOPER_BUNDLE_DIR", str(make_bundle(tmp_path / "d")))
    calls: dict[str, Callable[[], KernelPaths]] = {
        "developer": vzrepro.ensure_kernel,
        "container": lambda: vzrepro.ensure_kernel_profile(vzrepro.KernelProfile.CONTAINER),
    }
    for profile, call in calls.items():
        paths = call()
        assert isinstance(paths, vzrepro.KernelPaths)
        assert paths.directory == tmp_path / ".vz/linux" / profile
        assert paths.kernel.read_bytes() == CONTENT["vmlinux"]
        assert paths.initramfs.read_bytes() == CONTENT["initramfs.img"]
        assert paths.youki.read_bytes() == CONTENT["youki"]
        assert paths.version.profile == profile
    options = vzrepro.KernelBundleOptions(
        profile=vzrepro.KernelProfile.CONTAINER,
        required_capabilities={"nfsd"},
        install_dir=tmp_path / "own",
        bundle_dir=tmp_path / "c",
        require_exact_agent_version=True,
        host_version="0.3.15",
    )
    assert vzrepro.ensure_kernel_bundle(options).directory == tmp_path / "own"
    assert vzrepro.RuntimeConfig is RuntimeConfig
    assert RuntimeConfig(linux_profile=DEVELOPER).ensure_kernel().version.profile == "developer"
    assert RuntimeConfig().ensure_kernel().version.profile == "container"


def test_what_a_runtime_is_told(tmp_path: Path) -> None:
    old = make_bundle(tmp_path / "old", "container", agent="0.0.1")
    config = RuntimeConfig(linux_bundle_dir=old, linux_install_dir=tmp_path / "own")
    with pytest.raises(VzreproError, match="has another guest agent"):
        config.ensure_kernel()
    config = dataclasses.replace(config, require_exact_agent_version=False)
    assert config.ensure_kernel().youki == tmp_path / "own/youki"
    config = dataclasses.replace(config, guest_oci_runtime_path=tmp_path / "runtime")
    with pytest.raises(UsageError, match=f"guest_oci_runtime_path cannot be {tmp_path}/runtime"):
        config.ensure_kernel()
    (tmp_path / "runtime").write_bytes(b"another youki")
    paths = config.ensure_kernel()
    assert (paths.youki, paths.directory) == (tmp_path / "runtime", tmp_path / "own")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_cpus", 0),
        ("default_cpus", float("nan")),
        ("default_cpus", 257),
        ("default_memory_mb", 7),
        ("agent_ready_timeout", 0),
        ("agent_ready_timeout", float("inf")),
        ("guest_state_dir", PurePosixPath("run/vz-oci")),
        ("guest_state_dir", PurePosixPath("/run/../etc")),
        ("guest_state_dir", PurePosixPath("/")),
    ],
)
def test_what_a_runtime_cannot_be_told(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"RuntimeConfig: {name} cannot be ") as caught:
        RuntimeConfig(**{name: value})  # type: ignore[arg-type]
    assert "wanted: " in (caught.value.reason or "")


def test_how_much_of_the_output_is_kept() -> None:
    assert RuntimeConfig().log_rotation == LogRotation()
    for wrong in ({"max_bytes": 0}, {"max_files": 0}):
        with pytest.raises(UsageError, match="log_rotation"):
            LogRotation(**wrong)


def test_a_runtimes_defaults_are_those_of_the_command_line() -> None:
    told = {option.name: option.default for option in create.params}
    config = RuntimeConfig()
    [profile] = [option for option in create.params if option.name == "kernel_profile"]
    assert f"{config.linux_profile} is the default" in profile.to_info_dict()["help"]
    assert told["cpus"] == config.default_cpus
    assert told["memory_mib"] == config.default_memory_mb
    assert told["timeout_secs"] == config.agent_ready_timeout


def test_importing_vzrepro_loads_nothing_else() -> None:
    script = "import sys, vzrepro; print([name for name in sys.modules if name.startswith('vzrepro.')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_documented_and_none_is_a_recipes() -> None:
    page = (Path(__file__).parents[2] / "docs/bundle.md").read_text()
    for name in vzrepro.API:
        assert name in page
        assert getattr(vzrepro, name) is getattr(bundles, name)
    assert not set(vzrepro.API) & set(vzrepro.DSL)
