"""The resolver: finds the bundle a host asks for, installs it where it is not, and checks what is there.

`ensure_kernel` and its kin are the Python interface that `vz` hosts know; `vzrepro bundle ensure --json` is the same
for others. Where is looked, in which order, and what is checked: docs/bundle.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vzrepro.bundle.files import Bundle, Wanted, examine, has_any
from vzrepro.bundle.install import Installed, install
from vzrepro.errors import VzreproError
from vzrepro.metadata import LEGACY_CAPABILITIES, VERSION_FILE, KernelProfile, Metadata

Source = Literal["argument", "env", "workspace", "installed", "realized"]
"""Where a bundle was taken from: the caller's directory · the one an environment variable names · `linux/out` of the
workspace · an install directory · the local store, where it was built for this call."""

GENERIC_VARIABLE = "VZ_LINUX_BUNDLE_DIR"

Realize = Callable[[KernelProfile], Path]
"""Builds the bundle of a profile; its directory."""


@dataclass(frozen=True, slots=True)
class KernelBundleOptions:
    """What is asked of the resolver.

    Without a `profile` the developer bundle is meant, and only the four oldest capabilities are asked of it.
    `bundle_dir` is installed from, `install_dir` installed to. The exact agent is the one of this vzrepro: the same
    version, the same protocol revision.
    """

    profile: KernelProfile | None = None
    required_capabilities: Collection[str] = ()
    install_dir: Path | None = None
    bundle_dir: Path | None = None
    require_exact_agent_version: bool = True

    def wanted(self) -> Wanted:
        """What a bundle must be, the profile's defaults included."""
        defaults = LEGACY_CAPABILITIES if self.profile is None else self.profile.default_capabilities
        capabilities = defaults.union(self.required_capabilities)
        return Wanted(_profile(self), capabilities, self.require_exact_agent_version)


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
class Surroundings:
    """What the resolver looks at besides its options; by default this process's."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    start: Path = field(default_factory=Path.cwd)

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
    source: Source
    done: Installed


@dataclass(frozen=True, slots=True)
class Place:
    """A directory where a bundle of `profile` is looked for. `variable` is the one of the environment that names it."""

    profile: KernelProfile
    source: Source
    directory: Path
    variable: str | None = None


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """What a container runtime is told of its guest: which kernel it boots, and where that one is looked for."""

    linux_profile: KernelProfile = KernelProfile.CONTAINER
    linux_install_dir: Path | None = None
    linux_bundle_dir: Path | None = None

    def ensure_kernel(self) -> KernelPaths:
        """The kernel of this configuration, installed and checked. Raises as `ensure_kernel_bundle`."""
        return ensure_kernel_bundle(
            KernelBundleOptions(self.linux_profile, (), self.linux_install_dir, self.linux_bundle_dir)
        )


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
    surroundings: Surroundings | None = None,
    realize: Realize | None = None,
    accept_installed: bool = True,
) -> Resolution:
    """As `ensure_kernel_bundle`, with how it came about. `realize` is called when no other bundle will do.

    Unless `accept_installed`, what is installed does not count: there must be a bundle to install.
    """
    around = surroundings or Surroundings()
    wanted = options.wanted()
    target = install_dir(options, around)
    place = find_bundle(options, around)
    if place is not None:
        return _take(place, wanted, target)
    for place in installed_places(options, around):
        if accept_installed and has_any(place.directory):
            try:
                bundle = _checked(place, wanted)
            except VzreproError:
                if realize is None:
                    raise
                break
            return Resolution(KernelPaths.of(place.directory, bundle.metadata), "installed", Installed.PRESENT)
    if realize is not None:
        return _take(Place(_profile(options), "realized", realize(_profile(options))), wanted, target)
    raise _nowhere(options, around)


def verify(options: KernelBundleOptions, *, surroundings: Surroundings | None = None) -> Bundle:
    """Check one bundle and change nothing: the one in `bundle_dir`, else in `install_dir`, else what is installed.

    Raises as `ensure_kernel_bundle`. What the options leave open is not checked: without a profile any will do.
    """
    around = surroundings or Surroundings()
    wanted = options.wanted()
    if options.bundle_dir is not None:
        place = Place(_profile(options), "argument", around.start / options.bundle_dir)
    else:
        places = [place for place in installed_places(options, around) if has_any(place.directory)]
        if not places:
            raise _nowhere(options, around)
        place = places[0]
    if options.profile is None:
        wanted = Wanted(None, frozenset(options.required_capabilities), options.require_exact_agent_version)
    return _checked(place, wanted)


def places(options: KernelBundleOptions, around: Surroundings) -> Iterator[Place]:
    """All places where the bundle is looked for, the first to be taken first; nothing need be there."""
    yield from _bundle_places(_profile(options), options.bundle_dir, around)
    yield from installed_places(options, around)


def is_installed(options: KernelBundleOptions, around: Surroundings) -> bool:
    """Whether anything of a bundle is where it would be installed."""
    return any(has_any(place.directory) for place in installed_places(options, around))


def install_dir(options: KernelBundleOptions, around: Surroundings) -> Path:
    """Where the bundle is installed to."""
    if options.install_dir is not None:
        return around.start / options.install_dir
    return around.default_dir() / _profile(options)


def find_bundle(options: KernelBundleOptions, around: Surroundings) -> Place | None:
    """The bundle that an installation would be made from; None when there is no other than what is installed."""
    return next(_bundle_places(_profile(options), options.bundle_dir, around), None)


def installed_places(options: KernelBundleOptions, around: Surroundings) -> Iterator[Place]:
    """Where an installed bundle may be."""
    return _installed_places(_profile(options), options.install_dir, around)


def _bundle_places(profile: KernelProfile, argument: Path | None, around: Surroundings) -> Iterator[Place]:
    if argument is not None:
        yield Place(profile, "argument", around.start / argument)
    for variable in (f"VZ_LINUX_{profile.upper()}_BUNDLE_DIR", GENERIC_VARIABLE):
        named = around.environ.get(variable)
        if named:
            yield Place(profile, "env", around.start / named, variable)
    below = Path("linux/out" if profile is KernelProfile.DEVELOPER else "linux/out/container")
    for folder in (around.start, *around.start.parents):
        if has_any(folder / below):
            yield Place(profile, "workspace", folder / below)
            break


def _installed_places(profile: KernelProfile, chosen: Path | None, around: Surroundings) -> Iterator[Place]:
    if chosen is not None:
        yield Place(profile, "installed", around.start / chosen)
        return
    yield Place(profile, "installed", around.default_dir() / profile)
    if profile is KernelProfile.DEVELOPER:
        yield Place(profile, "installed", around.default_dir())


def _profile(options: KernelBundleOptions) -> KernelProfile:
    return options.profile or KernelProfile.DEVELOPER


def _take(place: Place, wanted: Wanted, target: Path) -> Resolution:
    bundle = _checked(place, wanted)
    done = install(bundle, target)
    return Resolution(KernelPaths.of(target, bundle.metadata), place.source, done)


def _checked(place: Place, wanted: Wanted) -> Bundle:
    try:
        found = examine(place.directory)
        wanted.check(found)
    except VzreproError as error:
        if place.variable is not None:
            error.reason = f"{error.reason}\n{place.variable} names this directory"
        raise
    return found


def _nowhere(options: KernelBundleOptions, around: Surroundings) -> VzreproError:
    profile = _profile(options)
    installed = " and ".join(str(place.directory) for place in installed_places(options, around))
    return VzreproError(
        f"there is no {profile} bundle",
        reason=f"VZ_LINUX_{profile.upper()}_BUNDLE_DIR and {GENERIC_VARIABLE} are not set, no linux/out is here or "
        f"above, and nothing is in {installed}",
        hint=f"in a checkout of vzrepro, build and install it: vzrepro bundle install --kernel-profile {profile}",
    )
