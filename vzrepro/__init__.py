"""vzrepro: reproducible builds of Linux boot bundles.

The names in `DSL` are what recipes import, those in `API` what programs that boot bundles call (docs/bundle.md). They
load on first use, so that `import vzrepro` costs nothing on the no-op path of `vzrepro realize`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`, whose import costs milliseconds
if TYPE_CHECKING:
    from vzrepro.guest.bundle import (
        KernelBundleOptions,
        KernelPaths,
        KernelProfile,
        LogRotation,
        RuntimeConfig,
        ensure_kernel,
        ensure_kernel_bundle,
        ensure_kernel_profile,
    )
    from vzrepro.recipe.dsl import (
        build,
        cargo_crates,
        crate_source,
        debian_image,
        debian_source,
        git_source,
        local,
        pypi_source,
        read,
        text,
        url_source,
    )

__version__ = "0.1.0"

DSL = (
    "build",
    "cargo_crates",
    "crate_source",
    "debian_image",
    "debian_source",
    "git_source",
    "local",
    "pypi_source",
    "read",
    "text",
    "url_source",
)
"""What a recipe may import from `vzrepro`."""

API = (
    "KernelBundleOptions",
    "KernelPaths",
    "KernelProfile",
    "LogRotation",
    "RuntimeConfig",
    "ensure_kernel",
    "ensure_kernel_bundle",
    "ensure_kernel_profile",
)
"""What a host's program calls to get a bundle that is installed and checked."""

__all__ = [
    "API",
    "DSL",
    "KernelBundleOptions",
    "KernelPaths",
    "KernelProfile",
    "LogRotation",
    "RuntimeConfig",
    "build",
    "cargo_crates",
    "crate_source",
    "debian_image",
    "debian_source",
    "ensure_kernel",
    "ensure_kernel_bundle",
    "ensure_kernel_profile",
    "git_source",
    "local",
    "pypi_source",
    "read",
    "text",
    "url_source",
]


def __getattr__(name: str) -> object:
    module = "vzrepro.recipe.dsl" if name in DSL else "vzrepro.guest.bundle" if name in API else None
    if module is None:
        raise AttributeError(f"module 'vzrepro' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(module), name)
