"""What many workspaces would write again: toolchain images, a Rust program, an initramfs, a proven kernel, hardening.

Recipes import from here as from `vzrepro` (docs/recipes.md). These are functions, so that a workspace pins only what it
asks for; what takes no arguments is declared once in an evaluation, however often it is called.
"""

from __future__ import annotations

from vzrepro.recipes.archives import initramfs, newc_writer
from vzrepro.recipes.audit import audit_tools, diffoscope_image
from vzrepro.recipes.hardening import hardening_checker, hardening_report
from vzrepro.recipes.images import SHELL, SUITE, WITHOUT, c_image, rust_image, tools_image
from vzrepro.recipes.kernels import dotconfig, kernel, kernel_config
from vzrepro.recipes.rust import AMD64, ARM64, rust_program

__all__ = [
    "AMD64",
    "ARM64",
    "SHELL",
    "SUITE",
    "WITHOUT",
    "audit_tools",
    "c_image",
    "diffoscope_image",
    "dotconfig",
    "hardening_checker",
    "hardening_report",
    "initramfs",
    "kernel",
    "kernel_config",
    "newc_writer",
    "rust_image",
    "rust_program",
    "tools_image",
]
