"""Our own crates' unit and integration tests: what only shows on Rust's side of a wire or a system call."""

import os
import shutil
import subprocess
from pathlib import Path

import platformdirs
import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed")
@pytest.mark.parametrize("crate", sorted(path.parent.name for path in RECIPES.glob("*/Cargo.toml")))
def test_the_crates_own_tests_pass(crate: str) -> None:
    # Outside the tree, where it is no input of a recipe, and kept, since dependencies take minutes to compile: without
    # what only debuggers and later builds read, and once for all crates that have them.
    target = Path(platformdirs.user_cache_dir("vzrepro"), "cargo")
    build = {"CARGO_TARGET_DIR": str(target), "CARGO_PROFILE_DEV_DEBUG": "false", "CARGO_INCREMENTAL": "0"}
    done = subprocess.run(
        ["cargo", "test", "--locked", "--quiet"],
        cwd=RECIPES / crate,
        env={**os.environ, **build},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
