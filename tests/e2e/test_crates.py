"""Our own crates' unit and integration tests: what only shows on Rust's side of a wire or a system call."""

import pytest

from tests.crates import CRATES, HAS_CARGO, cargo


@pytest.mark.skipif(not HAS_CARGO, reason="cargo is not installed")
@pytest.mark.parametrize("crate", CRATES)
def test_the_crates_own_tests_pass(crate: str) -> None:
    cargo(crate, "test")
