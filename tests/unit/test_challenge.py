"""A challenge's table: whose result is whose, which are the same, where a difference arises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro.base.errors import NotDeterministic, VzreproError
from vzrepro.base.model import BuildKey, NarHash
from vzrepro.proof.attest.challenge import Challenge, ResultState, compare
from vzrepro.proof.attest.evidence import HERE, Evidence, Way

A, B, C = (NarHash(digit * 64) for digit in "abc")
FED, FED_OTHER = BuildKey("1" * 64), BuildKey("2" * 64)


def said(builder: str, result: NarHash | None, way: Way = Way.PROVENANCE, **more: object) -> Evidence:
    known = not builder.endswith("(unknown)")
    return Evidence(builder, known, way, f"{builder}'s", result, **{"build_key": FED, **more})  # type: ignore[arg-type]


def states(found: Challenge) -> dict[str, ResultState]:
    return {row.builder: row.state for row in found.rows}


def one(*its: Evidence) -> Challenge:
    return compare({"n": its}, {})


def test_the_result_that_most_have_is_the_same_and_the_other_different() -> None:
    found = one(said("x", A), said("y", A), said("z", B), said(HERE, A, Way.STORE))
    assert states(found) == {
        HERE: ResultState.SAME,
        "x": ResultState.SAME,
        "y": ResultState.SAME,
        "z": ResultState.DIFFERENT,
    }
    assert [row.builder for row in found.rows] == [HERE, "x", "y", "z"]
    [split] = found.splits
    assert dict(split.results) == {A: (HERE, "x", "y"), B: ("z",)}


def test_where_it_is_a_tie_all_are_different() -> None:
    assert set(states(one(said("x", A), said("y", B))).values()) == {ResultState.DIFFERENT}


def test_strangers_are_not_a_majority() -> None:
    strangers = [said(f"s{number} (unknown)", B) for number in range(5)]
    found = one(said("x", A), *strangers)
    assert states(found)["x"] is ResultState.SAME
    assert {states(found)[each.builder] for each in strangers} == {ResultState.DIFFERENT}
    assert set(states(one(*strangers)).values()) == {ResultState.SAME}


def test_who_is_alone_confirms_nothing() -> None:
    assert states(one(said("x", A), said("x", A, Way.NARINFO))) == {"x": ResultState.ALONE}


def test_who_has_two_results_contradicts_itself() -> None:
    found = one(said("x", A), said("x", B, Way.NARINFO), said("y", A))
    assert states(found) == {"x": ResultState.CONTRADICTORY, "y": ResultState.SAME}
    with pytest.raises(NotDeterministic):
        found.check("n")


def test_an_experiment_is_not_a_second_result() -> None:
    experiment = said("x", B, Way.AUDIT, varied=("clock",))
    assert states(one(said("x", A), experiment, said("y", A))) == {"x": ResultState.SAME, "y": ResultState.SAME}
    assert states(one(experiment, said("y", A)))["x"] is ResultState.DIFFERENT


def test_a_forgery_is_no_result_but_is_shown() -> None:
    found = one(said("x", A), said("y", A), said("x (forged)", None))
    assert states(found)["x (forged)"] is ResultState.FORGED
    assert found.splits == ()
    found.check("n")


def test_who_has_nothing_of_a_node_is_absent_there() -> None:
    found = compare({"m": [said("x", A)], "n": [said("x", A), said("y", A)]}, {})
    assert [(row.node, row.builder, row.state) for row in found.rows] == [
        ("m", "x", ResultState.ALONE),
        ("m", "y", ResultState.ABSENT),
        ("n", "x", ResultState.SAME),
        ("n", "y", ResultState.SAME),
    ]


def test_a_stranger_is_a_row_only_where_it_has_something() -> None:
    """Else a hostile cache's thousands of names are multiplied by the nodes of a target."""
    strangers = [said(f"s{number} (unknown)", A) for number in range(9)]
    found = compare({"m": [said("x", A), *strangers], "n": [said(HERE, A, Way.STORE), said("y (unknown)", A)]}, {})
    assert [row.builder for row in found.rows if row.node == "m"] == [HERE, *(each.builder for each in strangers), "x"]
    assert [row.builder for row in found.rows if row.node == "n"] == [HERE, "x", "y (unknown)"]


def test_what_nobody_has_is_one_row() -> None:
    found = compare({"m": [], "n": [said("x", A), said("y", A)]}, {})
    assert [(row.builder, row.state) for row in found.rows if row.node == "m"] == [("nobody", ResultState.ABSENT)]


def test_what_was_only_taken_is_no_majority() -> None:
    taken = Evidence(HERE, False, Way.STORE, HERE, A)
    assert set(states(one(said("x", A), said("y", B), taken)).values()) == {ResultState.DIFFERENT}


def test_a_difference_arises_where_the_inputs_were_the_same() -> None:
    assert one(said("x", A), said("y", B)).splits[0].inherited is False
    other = said("y", B, build_key=FED_OTHER)
    assert one(said("x", A), other).splits[0].inherited is True
    assert one(said("x", A), said("y", B, build_key=None)).splits[0].inherited is None
    assert one(said("x", A), other, said("z", C)).splits[0].inherited is False


def test_the_error_points_to_where_it_arises() -> None:
    its = {
        "late": [said("x", A), said("y", B, build_key=FED_OTHER)],
        "early": [said("x", A), said("y", B)],
    }
    with pytest.raises(NotDeterministic) as caught:
        compare(its, {}).check("late")
    assert "vzrepro audit early" in str(caught.value.hint)
    assert "their inputs differed" in str(caught.value.reason)
    assert "it arises here" in str(caught.value.reason)


def test_files_that_differ_are_named() -> None:
    first = (("both", "0" * 64), ("changed", "1" * 64), ("gone", "2" * 64))
    second = (("both", "0" * 64), ("changed", "3" * 64))
    [split] = one(said("x", A, files=first), said("y", B, files=second)).splits
    assert split.files == ("changed", "gone")
    assert one(said("x", A, files=first), said("y", B)).splits[0].files == ()


@pytest.mark.parametrize("its", [[], [said("z", None)]])
def test_nothing_compared_is_not_passed(its: list[Evidence]) -> None:
    with pytest.raises(VzreproError, match="nothing was compared"):
        one(*its).check("n")


EVIDENCE = st.builds(
    said,
    st.sampled_from(["x", "y", "z", "s (unknown)"]),
    st.sampled_from([A, B, None]),
    st.sampled_from(list(Way)),
    varied=st.sampled_from([(), ("clock",)]),
)


@given(st.data(), st.lists(EVIDENCE, max_size=10))
def test_the_order_of_evidence_does_not_matter(data: st.DataObject, its: list[Evidence]) -> None:
    assert one(*data.draw(st.permutations(its))) == one(*its)


@given(st.lists(EVIDENCE, max_size=10))
def test_a_split_is_what_has_several_results(its: list[Evidence]) -> None:
    found = one(*its)
    results = {result for row in found.rows for result in row.results}
    assert bool(found.splits) == (len(results) > 1)
