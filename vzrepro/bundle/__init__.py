"""Boot bundles for those who use them: checking one, installing it, finding the right one, packing it for download."""

from vzrepro.bundle.export import Archive, export
from vzrepro.bundle.files import FILES, Bundle, Wanted, examine, has_any
from vzrepro.bundle.install import Installed, install
from vzrepro.bundle.resolve import (
    KernelBundleOptions,
    KernelPaths,
    Place,
    Resolution,
    RuntimeConfig,
    Surroundings,
    ensure_kernel,
    ensure_kernel_bundle,
    ensure_kernel_profile,
    is_installed,
    places,
    resolve,
    verify,
)
from vzrepro.metadata import KernelProfile

__all__ = [
    "FILES",
    "Archive",
    "Bundle",
    "Installed",
    "KernelBundleOptions",
    "KernelPaths",
    "KernelProfile",
    "Place",
    "Resolution",
    "RuntimeConfig",
    "Surroundings",
    "Wanted",
    "ensure_kernel",
    "ensure_kernel_bundle",
    "ensure_kernel_profile",
    "examine",
    "export",
    "has_any",
    "install",
    "is_installed",
    "places",
    "resolve",
    "verify",
]
