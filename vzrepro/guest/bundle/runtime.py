"""What a program that runs containers is told once, as hosts of the `vz` family have it: the kernel, and what its
guests are by default."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from vzrepro.base.errors import UsageError
from vzrepro.guest.bundle.resolve import KernelBundleOptions, KernelPaths, ensure_kernel_bundle
from vzrepro.guest.metadata import KernelProfile


@dataclass(frozen=True, slots=True)
class LogRotation:
    """How much of a container's output is kept: `max_files` files of up to `max_bytes` each.

    Raises UsageError for less than one byte or file.
    """

    max_bytes: int = 10 << 20
    max_files: int = 3

    def __post_init__(self) -> None:
        _check("log_rotation.max_bytes", self.max_bytes, "at least 1", self.max_bytes >= 1)
        _check("log_rotation.max_files", self.max_files, "at least 1", self.max_files >= 1)


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Which kernel a container runtime boots and where that one is looked for, and what its guests are by default.

    `default_cpus` are processors (fractions are fine), `default_memory_mb` MiB, `agent_ready_timeout` the seconds that
    a guest's agent may take from power-on to its first answer: the defaults of `vzrepro oci`, too. Without
    `default_network_enabled` a guest gets no network card unless it is asked for. `guest_state_dir` is the directory in
    the guest where the OCI runtime keeps its state and bundles; `guest_oci_runtime_path` a file here that takes the
    place of the bundle's youki. Raises UsageError naming the field for what cannot be.
    """

    linux_profile: KernelProfile = KernelProfile.CONTAINER
    linux_install_dir: Path | None = None
    linux_bundle_dir: Path | None = None
    require_exact_agent_version: bool = True
    default_cpus: float = 1.0
    default_memory_mb: int = 512
    default_network_enabled: bool = True
    agent_ready_timeout: float = 120.0
    log_rotation: LogRotation = field(default_factory=LogRotation)
    guest_state_dir: PurePosixPath = field(default_factory=lambda: PurePosixPath("/run/vz-oci"))
    guest_oci_runtime_path: Path | None = None

    def __post_init__(self) -> None:
        cpus, memory, timeout = self.default_cpus, self.default_memory_mb, self.agent_ready_timeout
        _check("default_cpus", cpus, "0.01 to 256", 0.01 <= cpus <= 256)
        _check("default_memory_mb", memory, "at least 8 MiB", memory >= 8)
        _check("agent_ready_timeout", timeout, "seconds, more than 0", 0 < timeout < float("inf"))
        state = self.guest_state_dir
        plain = state.is_absolute() and ".." not in state.parts and state != PurePosixPath("/")
        _check("guest_state_dir", state, "an absolute path in the guest", plain)

    def ensure_kernel(self) -> KernelPaths:
        """The kernel of this configuration, installed and checked, with the OCI runtime that is to be used.

        Raises as `ensure_kernel_bundle`, and UsageError when `guest_oci_runtime_path` is not a file.
        """
        runtime = self.guest_oci_runtime_path
        if runtime is not None:
            _check("guest_oci_runtime_path", runtime, "a file", runtime.is_file())
        paths = ensure_kernel_bundle(
            KernelBundleOptions(
                self.linux_profile,
                install_dir=self.linux_install_dir,
                bundle_dir=self.linux_bundle_dir,
                require_exact_agent_version=self.require_exact_agent_version,
            )
        )
        return paths if runtime is None else replace(paths, youki=runtime)


def _check(name: str, found: object, wanted: str, good: bool) -> None:
    if not good:
        raise UsageError(f"RuntimeConfig: {name} cannot be {found}", reason=f"wanted: {wanted}")
