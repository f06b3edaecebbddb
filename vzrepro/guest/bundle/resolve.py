"""The resolver: finds the bundle a host asks for, installs it where it is not, and checks what is there.

`ensure_kernel` and its kin are the Python interface that `vz` hosts know; `vzrepro bundle ensure --json` is the same
for others. Where is looked, in which order, and what is checked: docs/bundle.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from vzrepro.base import trust
from vzrepro.base.config import USER_FILE, check_trusted, nearest_workspace
from vzrepro.base.errors import Untrusted, UsageError, VzreproError
from vzrepro.guest.bundle.files import FILES, Bundle, BundleRequirements, another_profile, examine, has_all, has_any
from vzrepro.guest.bundle.install import Installation, install
from vzrepro.guest.metadata import LEGACY_CAPABILITIES, VERSION_FILE, KernelProfile, Metadata, host_version, unknown_to

BundleSource = Literal["argument", "env", "workspace", "installed", "realized"]
"""Where a bundle was taken from: the caller's directory · the one an environment variable names · `linux/out` of the
workspace · an install directory · the local store, where it was built for this call."""

GENERIC_VARIABLE = "VZ_LINUX_BUNDLE_DIR"

Realize = Callable[[KernelProfile], Path]
"""Builds the bundle of a profile; its directory."""


@dataclass(frozen=True, slots=True)
class KernelBundleOptions:
    """What is asked of the resolver.

    Without a `profile` the developer bundle is looked for, and only the four oldest capabilities are asked of it; a
    directory that the caller names may hold a bundle of any profile then. `bundle_dir` is installed from,
    `install_dir` installed to. The exact agent is the one of this vzrepro: the same version, the same protocol
    revision. `host_version` (`0.3.15`) is that of the host that will read what is installed: capabilities it does not
    know are left out of version.json.
    """

    profile: KernelProfile | None = None
    required_capabilities: Collection[str] = ()
    install_dir: Path | None = None
    bundle_dir: Path | None = None
    require_exact_agent_version: bool = True
    host_version: str | None = None

    def wanted(self) -> BundleRequirements:
        """What a bundle must be, the profile's defaults included. Raises UsageError for what the host cannot know."""
        if self.host_version is not None:
            lost = unknown_to(self.required_capabilities, host_version(self.host_version))
            if lost:
                raise UsageError(
                    f"a host of version {self.host_version} does not know {', '.join(lost)}",
                    reason="what is required cannot be left out of version.json",
                    hint="leave out --host-version, or what is required",
                )
        defaults = LEGACY_CAPABILITIES if self.profile is None else self.profile.default_capabilities
        capabilities = defaults.union(self.required_capabilities)
        return BundleRequirements(self.profile, capabilities, self.require_exact_agent_version)


@dataclass(frozen=True, slots=True)
class KernelPaths:
    """A checked bundle's files, and what its version.json says."""

    kernel: Path
    initramfs: Path
    youki: Path
    version_file: Path
    version: Metadata

    @classmethod
    def of(cls, directory: Path, version: Metadata) -> KernelPaths:
        """The paths of the bundle in `directory`."""
        return cls(
            directory / "vmlinux", directory / "initramfs.img", directory / "youki", directory / VERSION_FILE, version
        )

    @property
    def directory(self) -> Path:
        """Where all of them lie."""
        return self.kernel.parent


@dataclass(frozen=True, slots=True)
class HostSurroundings:
    """What the resolver looks at besides its options; by default this process's. The workspace is looked for in `start`
    and above it."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    start: Path = field(default_factory=Path.cwd)
    user_file: Path = USER_FILE

    def workspace(self) -> Path:
        """The workspace, whoever made it; `start` where there is none."""
        return nearest_workspace(self.start) or self.start

    def default_dir(self) -> Path:
        """`~/.vz/linux`. Raises VzreproError without a home directory."""
        try:
            home = Path(self.environ.get("HOME") or Path.home())
        except RuntimeError as error:
            raise VzreproError(
                "there is no home directory to install a bundle in",
                reason=str(error),
                hint="set HOME, or name a directory: vzrepro bundle ensure --install-dir DIR",
            ) from error
        return self.start / home / ".vz" / "linux"


@dataclass(frozen=True, slots=True)
class Resolution:
    """What was found, where, and what had to be done."""

    paths: KernelPaths
    source: BundleSource
    done: Installation


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """A directory where a bundle is looked for.

    `profile` is the one that the place is named after, None where the caller named the directory; `variable` is the
    one of the environment that names it; `refused` says why nothing is taken from there.
    """

    profile: KernelProfile | None
    source: BundleSource
    directory: Path
    variable: str | None = None
    refused: Untrusted | None = None


def ensure_kernel() -> KernelPaths:
    """The default (developer) kernel, installed and checked. Raises as `ensure_kernel_bundle`."""
    return ensure_kernel_bundle(KernelBundleOptions())


def ensure_kernel_profile(profile: KernelProfile) -> KernelPaths:
    """The kernel of `profile`, installed and checked. Raises as `ensure_kernel_bundle`."""
    return ensure_kernel_bundle(KernelBundleOptions(profile))


def ensure_kernel_bundle(options: KernelBundleOptions) -> KernelPaths:
    """The bundle that `options` ask for, installed and checked.

    Raises UsageError (a directory is not a bundle), HashMismatch (file, path, expected and found are named) and
    VzreproError (another profile, agent or protocol revision, a capability that is not declared, none found, the
    system refuses).
    """
    return resolve(options).paths


def resolve(
    options: KernelBundleOptions,
    *,
    surroundings: HostSurroundings | None = None,
    realize: Realize | None = None,
    accept_installed: bool = True,
) -> Resolution:
    """As `ensure_kernel_bundle`, with how it came about. `realize` is called when no other bundle will do.

    Unless `accept_installed`, what is installed does not count: there must be a bundle to install.
    """
    around = surroundings or HostSurroundings()
    options.wanted()
    place = find_bundle(options, around)
    if place is not None:
        return _take(place, options, around)
    fault: VzreproError | None = None
    for place in installed_places(options, around) if accept_installed else ():
        if not has_any(place.directory):
            continue
        try:
            return _keep(place, options, around)
        except VzreproError as error:
            if has_all(place.directory):
                fault = error
                break
            fault = fault or error
    if realize is not None:
        profile = _profile(options)
        return _take(BundlePlace(profile, "realized", realize(profile)), options, around)
    raise fault or _nowhere(options, around)


def verify(options: KernelBundleOptions, *, surroundings: HostSurroundings | None = None) -> Bundle:
    """Check one bundle and change nothing: the one in `bundle_dir`, else in `install_dir`, else what is installed.

    Raises as `ensure_kernel_bundle`. What the options leave open is not checked: without a profile any will do.
    """
    around = surroundings or HostSurroundings()
    wanted = options.wanted()
    if options.bundle_dir is not None:
        place = BundlePlace(None, "argument", around.start / options.bundle_dir)
    else:
        found = [place for place in installed_places(options, around) if has_any(place.directory)]
        if not found:
            raise _nowhere(options, around)
        place = next((place for place in found if has_all(place.directory)), found[0])
    if options.profile is None:
        wanted = BundleRequirements(None, frozenset(options.required_capabilities), options.require_exact_agent_version)
    return _checked(place, wanted)


def places(options: KernelBundleOptions, around: HostSurroundings) -> Iterator[BundlePlace]:
    """All places where the bundle is looked for, the first to be taken first; nothing need be there."""
    yield from _bundle_places(options, around)
    yield from installed_places(options, around)


def is_installed(options: KernelBundleOptions, around: HostSurroundings) -> bool:
    """Whether anything of a bundle is where it would be installed."""
    return any(has_any(place.directory) for place in installed_places(options, around))


def find_bundle(options: KernelBundleOptions, around: HostSurroundings) -> BundlePlace | None:
    """The bundle that an installation would be made from; None when there is no other than what is installed.

    What the workspace has counts only when all of it is there, and nobody else could have made it.
    """
    for place in _bundle_places(options, around):
        if place.source != "workspace" or (place.refused is None and has_all(place.directory)):
            return place
    return None


def installed_places(options: KernelBundleOptions, around: HostSurroundings) -> Iterator[BundlePlace]:
    """Where an installed bundle may be."""
    if options.install_dir is not None:
        yield BundlePlace(None, "installed", around.start / options.install_dir)
        return
    profile = _profile(options)
    yield BundlePlace(profile, "installed", around.default_dir() / profile)
    if profile is KernelProfile.DEVELOPER:
        yield BundlePlace(profile, "installed", around.default_dir())


def _bundle_places(options: KernelBundleOptions, around: HostSurroundings) -> Iterator[BundlePlace]:
    profile = _profile(options)
    if options.bundle_dir is not None:
        yield BundlePlace(None, "argument", around.start / options.bundle_dir)
    for variable, named_after in ((f"VZ_LINUX_{profile.upper()}_BUNDLE_DIR", profile), (GENERIC_VARIABLE, None)):
        named = around.environ.get(variable)
        if named:
            yield BundlePlace(named_after, "env", around.start / named, variable)
    if options.install_dir is None and (place := _of_workspace(profile, around)) is not None:
        yield place


def _of_workspace(profile: KernelProfile, around: HostSurroundings) -> BundlePlace | None:
    """What the workspace has in linux/out; None when there is nothing of a bundle."""
    parts = ["linux", "out"] if profile is KernelProfile.DEVELOPER else ["linux", "out", "container"]
    root = around.workspace()
    place = BundlePlace(profile, "workspace", root.joinpath(*parts))
    if not has_any(place.directory):
        return None
    below = [root.joinpath(*parts[: count + 1]) for count in range(len(parts))]
    relied_on = [*map(Path, trust.relied_on(str(root))), *below, *(place.directory / name for name in FILES)]
    try:
        check_trusted(root, relied_on, around.environ, around.user_file)
    except Untrusted as error:
        return replace(place, refused=error)
    return place


def _profile(options: KernelBundleOptions) -> KernelProfile:
    """The profile whose bundle is looked for."""
    return options.profile or KernelProfile.DEVELOPER


def _target(options: KernelBundleOptions, profile: str, around: HostSurroundings) -> tuple[Path, Path | None]:
    """Where a bundle of `profile` is installed to, and where else: hosts without profiles read ~/.vz/linux itself."""
    if options.install_dir is not None:
        return around.start / options.install_dir, None
    default = around.default_dir()
    return default / profile, default if profile == KernelProfile.DEVELOPER else None


def _take(place: BundlePlace, options: KernelBundleOptions, around: HostSurroundings) -> Resolution:
    """Install the bundle in `place`."""
    bundle = _checked(place, options.wanted()).for_host(options.host_version)
    target, also = _target(options, bundle.metadata.kind, around)
    done = install(bundle, target, also)
    return Resolution(KernelPaths.of(target, bundle.metadata), place.source, done)


def _keep(place: BundlePlace, options: KernelBundleOptions, around: HostSurroundings) -> Resolution:
    """What is installed in `place`, in the form that the host can read."""
    found = _checked(place, options.wanted())
    bundle = found.for_host(options.host_version)
    done = Installation.PRESENT
    if bundle is not found:
        target, also = _target(options, bundle.metadata.kind, around)
        done = install(bundle, place.directory, also if place.directory == target else None)
    return Resolution(KernelPaths.of(place.directory, bundle.metadata), "installed", done)


def _checked(place: BundlePlace, wanted: BundleRequirements) -> Bundle:
    try:
        found = examine(place.directory)
        declared = found.metadata.profile
        if wanted.profile is None and place.profile is not None and declared not in (None, place.profile):
            raise another_profile(place.directory, place.profile, declared)
        wanted.check(found)
    except VzreproError as error:
        if place.variable is not None:
            error.reason = f"{error.reason}\n{place.variable} names this directory"
        raise
    return found


def _nowhere(options: KernelBundleOptions, around: HostSurroundings) -> VzreproError:
    profile = _profile(options)
    installed = " and ".join(str(place.directory) for place in installed_places(options, around))
    hint = f"in a checkout of vzrepro, build and install it: vzrepro bundle install --kernel-profile {profile}"
    workspace = "the workspace's linux/out is not looked at with an install directory"
    if options.install_dir is None:
        place = _of_workspace(profile, around)
        if place is not None and place.refused is not None:
            workspace = f"nothing is taken from linux/out, because {place.refused.message}"
            hint = f"{hint}\n{place.refused.hint}"
        else:
            workspace = "the workspace has no whole bundle in linux/out"
    return VzreproError(
        f"there is no {profile} bundle",
        reason=f"VZ_LINUX_{profile.upper()}_BUNDLE_DIR and {GENERIC_VARIABLE} are not set, {workspace}, and nothing is "
        f"in {installed}",
        hint=hint,
    )
