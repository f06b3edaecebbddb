"""vzrepro: reproducible builds of Linux boot bundles.

The names in `DSL` are what recipes import. They load on first use, so that `import vzrepro` costs nothing on the
no-op path of `vzrepro realize`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from `typing`, whose import costs milliseconds
if TYPE_CHECKING:
    from vzrepro.recipe import build, cargo_crates, crate_source, debian_image, debian_source, local, read, text

__version__ = "0.1.0"

DSL = ("build", "cargo_crates", "crate_source", "debian_image", "debian_source", "local", "read", "text")
"""What a recipe may import from `vzrepro`."""

__all__ = ["DSL", "build", "cargo_crates", "crate_source", "debian_image", "debian_source", "local", "read", "text"]


def __getattr__(name: str) -> object:
    if name in DSL:
        import importlib

        return getattr(importlib.import_module("vzrepro.recipe"), name)
    raise AttributeError(f"module 'vzrepro' has no attribute {name!r}")
