"""Boot bundles for those who use them: checking one, installing it, finding the right one, packing it for download."""

from vzrepro.guest.bundle.export import BundleArchive, export
from vzrepro.guest.bundle.files import FILES, Bundle, BundleRequirements, examine, has_any
from vzrepro.guest.bundle.install import Installation, install
from vzrepro.guest.bundle.resolve import (
    BundlePlace,
    HostSurroundings,
    KernelBundleOptions,
    KernelPaths,
    Resolution,
    ensure_kernel,
    ensure_kernel_bundle,
    ensure_kernel_profile,
    find_bundle,
    is_installed,
    places,
    resolve,
    verify,
)
from vzrepro.guest.bundle.runtime import LogRotation, RuntimeConfig
from vzrepro.guest.metadata import KernelProfile

__all__ = [
    "FILES",
    "Bundle",
    "BundleArchive",
    "BundlePlace",
    "BundleRequirements",
    "HostSurroundings",
    "Installation",
    "KernelBundleOptions",
    "KernelPaths",
    "KernelProfile",
    "LogRotation",
    "Resolution",
    "RuntimeConfig",
    "ensure_kernel",
    "ensure_kernel_bundle",
    "ensure_kernel_profile",
    "examine",
    "export",
    "find_bundle",
    "has_any",
    "install",
    "is_installed",
    "places",
    "resolve",
    "verify",
]
