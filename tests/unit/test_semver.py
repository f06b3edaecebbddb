"""Semantic versions: the order that semver.org gives, and what a series holds."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro.sources.semver import Version

ASCENDING = (
    "1.0.0-1 1.0.0-2 1.0.0-11 1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 "
    "1.0.0-rc.1 1.0.0 1.0.0+1 1.0.0+1.9.7 1.0.0+1.9.10 1.0.0+cargo-0.9 1.0.1 1.2.0 1.10.0 2.0.0-rc.1 2.0.0"
).split()


def test_the_order_of_the_specification() -> None:
    for one, other in itertools.pairwise(ASCENDING):
        assert Version.parse(one).rank < Version.parse(other).rank, (one, other)


@pytest.mark.parametrize(
    "text", ["1", "1.0", "1.0.0.0", "v1.0.0", "1.0.0-", "1.0.0+", "1.0.0-a..b", "1.0.0 ", "١.0.0", ""]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a semantic version"):
        Version.parse(text)


@pytest.mark.parametrize(
    ("version", "series", "expected"),
    [
        ("0.18.8+1.9.7", "0.18", True),
        ("0.18.8+1.9.7", "0.18.8", True),
        ("0.18.8+1.9.7", "0.18.8+1.9", False),
        ("0.18.8+1.9.7", "0.18.8+1.9.7", True),
        ("0.18.8", "0.1", False),
        ("4.0.0-rc.1", "4", False),
        ("4.0.0-rc.1", "4.0.0", False),
        ("4.0.0-rc.1", "4.0.0-rc.1", True),
        ("4.0.0", "", False),
        ("4.0.0", "4.", False),
    ],
)
def test_series(version: str, series: str, expected: bool) -> None:
    assert Version.parse(version).in_series(series) is expected


@given(st.text(st.sampled_from("019.-+aZ\x00é")))
def test_any_text_is_a_version_or_a_value_error(text: str) -> None:
    try:
        version = Version.parse(text)
    except ValueError:
        return
    assert version.in_series(text)
    assert version.rank == Version.parse(text).rank


def test_numbers_of_any_length_compare() -> None:
    long = "9" * 5000
    assert Version.parse(f"1.0.0-{long}").rank < Version.parse(f"1.0.0-1{long}").rank
    with pytest.raises(ValueError, match="semantic"):
        Version.parse(f"{long}.0.0")
