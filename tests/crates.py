"""Our own crates, built by this machine's cargo."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import platformdirs

RECIPES = Path(__file__).parents[1] / "recipes"

CRATES = sorted(path.parent.name for path in RECIPES.glob("*/Cargo.toml"))
"""Their directories in `recipes`."""

HAS_CARGO = shutil.which("cargo") is not None

# Outside the tree, where it is no input of a recipe, and kept, since dependencies take minutes to compile: without
# what only debuggers and later builds read, and once for all crates that have them.
_TARGET = Path(platformdirs.user_cache_dir("vzrepro"), "cargo")


def cargo(crate: str, verb: str) -> None:
    """Run `cargo <verb>` on a crate; what it says is in the AssertionError of one that fails."""
    build = {"CARGO_TARGET_DIR": str(_TARGET), "CARGO_PROFILE_DEV_DEBUG": "false", "CARGO_INCREMENTAL": "0"}
    done = subprocess.run(
        ["cargo", verb, "--locked", "--quiet"],
        cwd=RECIPES / crate,
        env={**os.environ, **build},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def built(crate: str, program: str) -> Path:
    """A program of a crate, for this machine."""
    cargo(crate, "build")
    return _TARGET / "debug" / program
