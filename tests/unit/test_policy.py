"""Policies: what the file may say, whose key is whose when, which threshold counts, and that versions never fall."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest import policy as policies
from vzrepro.proof.attest.policy import MAX_POLICY, Policy, PolicyMemory

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"
ONE, TWO, THREE = (PublicKey(f"key-{number}", bytes([number]) * 32) for number in (1, 2, 3))
ACCEPT = "sha256:" + "1" * 52


def operators(*keys: PublicKey) -> str:
    return "".join(f'[[operators]]\nname = "op-{key.name}"\nkeys = [{{ key = "{key}" }}]\n' for key in keys)


def text(head: str = "threshold = 2", tail: str = "", version: int = 1, name: str = "release") -> bytes:
    return f'name = "{name}"\nversion = {version}\n{head}\n{operators(ONE, TWO)}{tail}'.encode()


def one_key(rest: str) -> bytes:
    return f'name="p"\nversion=1\nthreshold=1\n[[operators]]\nname="a"\nkeys=[{{ key="{ONE}", {rest} }}]\n'.encode()


def at(moment: str) -> dt.datetime:
    return dt.datetime.fromisoformat(moment)


def example() -> Policy:
    match = re.search(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert match is not None
    return Policy.parse(match[1].encode(), "docs/policy.md")


def test_the_example_of_the_guide_says_what_the_guide_says() -> None:
    policy = example()
    assert (policy.name, policy.version, policy.threshold) == ("release", 4, 2)
    assert [each.name for each in policy.operators] == ["ci", "alice", "mirror lab"]
    assert policy.votes_for("container-bundle") == 3
    assert policy.votes_for("developer-bundle") == 2
    assert policy.votes_for("kernel") == 2
    [exception] = policy.exceptions_for("image-tools")
    assert "issue 93" in exception.reason
    assert exception.holds(at("2027-01-31T23:59:59Z"))
    assert not exception.holds(at("2027-02-01T00:00:00Z"))
    first, second = policy.operators[0].keys
    assert first.refusal(at("2026-06-30T23:59:59Z")) is None
    assert "counted until" in str(first.refusal(at("2026-07-01T00:00:00Z")))
    assert second.refusal(at("2026-06-01T00:00:00Z")) is None
    assert "counts from" in str(second.refusal(at("2026-05-31T23:59:59Z")))
    stolen = policy.operators[1].keys[0]
    assert "laptop stolen" in str(stolen.refusal(at("2020-01-01T00:00:00Z")))


def test_times_are_exact_and_know_their_zone() -> None:
    policy = Policy.parse(one_key("from = 2026-01-01T01:00:00+01:00, until = 2026-01-02T00:00:00Z"), "p")
    [key] = policy.operators[0].keys
    assert key.refusal(at("2026-01-01T00:00:00Z")) is None
    assert key.refusal(at("2025-12-31T23:59:59Z")) is not None
    assert key.refusal(at("2026-01-02T00:00:00Z")) is not None


@pytest.mark.parametrize(
    ("globs", "target", "votes"),
    [
        ({}, "x", 1),
        ({"*": 2}, "x", 2),
        ({"*": 2, "x": 1}, "x", 1),
        ({"*-bundle": 2, "container-*": 1}, "container-bundle", 1),
        ({"container-*": 1, "*-bundle": 2}, "container-bundle", 1),
        ({"*ab": 2, "ab*": 1}, "abab", 2),
        ({"[abc]x": 2, "?x": 1}, "ax", 2),
        ({"*long-name*": 2, "long-name-x": 1}, "long-name-x", 1),
        ({"X*": 2}, "x1", 1),
        ({"a*": 2}, "ba", 1),
    ],
)
def test_the_most_specific_threshold_counts(globs: dict[str, int], target: str, votes: int) -> None:
    tail = "".join(f'[[thresholds]]\ntarget = "{glob}"\nthreshold = {number}\n' for glob, number in globs.items())
    assert Policy.parse(text("threshold = 1", tail), "p").votes_for(target) == votes


EXCEPTION = f'[[exceptions]]\ntarget = "a"\naccept = "{ACCEPT}"\nreason = "r"\nuntil = 2027-01-01\n'


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "name"),
        (b"\xff", "not TOML"),
        (b"name = ", "not TOML"),
        (b"a = " + b"[" * 5000, "not TOML"),
        (b"a = " + b"9" * 5000, "not TOML"),
        (b"#" * (MAX_POLICY + 1), "larger"),
        (text("threshold = 0"), "threshold"),
        (text("threshold = true"), "threshold"),
        (text("treshold = 2"), "treshold: there is no such key"),
        (text('threshold = "2"'), "threshold"),
        (text("threshold = 3"), "3 operators must agree, and 2 are named"),
        (text(tail='[[thresholds]]\ntarget = "a"\nthreshold = 3\n'), "3 operators must agree"),
        (text(tail='[[thresholds]]\ntarget = "a"\nthreshold = 1\n' * 2), "two thresholds for a"),
        (text(version=0), "version"),
        (text(name="../up"), "name"),
        (text(name="Release"), "name"),
        (text("threshold = 1\ntreshold = 2"), "treshold"),
        (text(tail=operators(ONE)), "two operators are called op-key-1"),
        (text(tail=operators(PublicKey("again", ONE.raw))), "two operators: op-key-1 and op-again"),
        (text(tail='[[operators]]\nname = "c"\nkeys = []'), "keys"),
        (text(tail=f'[[operators]]\nname = "c"\nkeys = [{{ key = "{THREE}" }}, {{ key = "{THREE}" }}]'), "twice"),
        (text(tail='[[operators]]\nname = "c"\nkeys = [{ key = "c:AAAA" }]'), "not a public key"),
        (text(tail='[[operators]]\nname = "c\\u001b[0m"\nkeys = []'), "name"),
        (one_key('from = "2026-01-01"'), "wanted a date"),
        (one_key("from = 2026-01-01T00:00:00"), "no time zone"),
        (one_key("until = 12:00:00"), "wanted a date"),
        (one_key("until = 9999-12-31"), "too far away"),
        (one_key("until = 9999-12-31T23:00:00-02:00"), "too far away"),
        (one_key("from = 0001-01-01T00:00:00+02:00"), "too far away"),
        (one_key("from = 2026-01-02, until = 2026-01-01"), "ends before it begins"),
        (one_key("revoked = true"), "revoked"),
        (one_key('revoked = " "'), "revoked"),
        (one_key("valid = true"), "valid"),
        (text(tail=EXCEPTION * 2), "two exceptions"),
        (text(tail=EXCEPTION.replace('reason = "r"\n', "")), "reason"),
        (text(tail=EXCEPTION.replace('"r"', '""')), "reason"),
        (text(tail=EXCEPTION.replace("until = 2027-01-01\n", "")), "until"),
        (text(tail=EXCEPTION.replace(ACCEPT, "sha256:1")), "accept"),
    ],
)  # fmt: skip
def test_a_wrong_policy_is_refused_with_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Policy.parse(data, "p.toml")
    assert "p.toml" in caught.value.message
    assert says in str(caught.value)
    assert "docs/policy.md" in str(caught.value)


def _on_machines(*machines: str, head: str = "threshold = 2", more: str = "") -> bytes:
    keys = zip((ONE, TWO, THREE), machines, strict=False)
    tables = "".join(
        f'[[operators]]\nname = "{key.name}"\nkeys = [{{ key = "{key}"{machine} }}]\n' for key, machine in keys
    )
    return f'name = "p"\nversion = 1\n{head}\ndistinct = ["operator", "build-machine"]\n{more}{tables}'.encode()


def test_machines_are_named_by_the_policy() -> None:
    policy = Policy.parse(_on_machines(', machine = "rack 1"', ', machine = "rack 2"', ', machine = "rack 1"'), "it")
    assert policy.machines_differ
    assert policy.beside([ONE]) == (ONE, THREE)
    assert policy.beside([TWO]) == (TWO,)
    without = Policy.parse(text(), "it")
    assert without.beside([ONE]) == (ONE,)
    assert not without.machines_differ
    assert len({Policy.parse(_on_machines(*machines), "it").digest for machines in (
        (', machine = "a"', ', machine = "b"'), (', machine = "a"', ', machine = "c"'),
    )}) == 2  # fmt: skip


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_on_machines(', machine = "a"', ""), "operator key-2: the key key-2 has no machine"),
        (_on_machines(', machine = "a"', ', machine = "a"'), "2 must agree on as many machines, and 1 are named"),
        (text('threshold = 1\ndistinct = ["build-machine"]'), "distinct: operators always are"),
        (text('threshold = 1\ndistinct = ["building"]'), "distinct"),
    ],
)
def test_a_policy_whose_machines_cannot_differ_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(UsageError, match="not a policy") as caught:
        Policy.parse(data, "it")
    assert says in str(caught.value)


def test_a_placeholder_is_no_key() -> None:
    """Anybody could sign for a key of zeros."""
    with pytest.raises(UsageError, match="worth nothing"):
        Policy.parse(text().replace(str(ONE).encode(), b"todo:" + b"A" * 43 + b"="), "p")


def test_what_is_revoked_elsewhere_is_revoked_whosever_it_is() -> None:
    policy = Policy.parse(text(), "p").without([PublicKey("another name", TWO.raw)], "lost here")
    one, two = (each.keys[0] for each in policy.operators)
    assert one.refusal(at("2026-01-01T00:00:00Z")) is None
    assert "lost here" in str(two.refusal(at("2026-01-01T00:00:00Z")))
    again = policy.without([TWO], "said again").operators[1].keys[0]
    assert "lost here" in str(again.refusal(None)), "the first reason stays"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the policy"):
        policies.read_file(tmp_path / "nothing")


def test_keys_belong_to_who_has_their_bytes() -> None:
    policy = Policy.parse(text(), "p")
    found = policy.owner(PublicKey("another name", ONE.raw))
    assert found is not None
    assert found[0].name == "op-key-1"
    assert policy.owner(THREE) is None


def test_without_a_file_every_trusted_key_is_an_operator() -> None:
    twin, other = PublicKey("again", ONE.raw), PublicKey(ONE.name, THREE.raw)
    policy = Policy.of_keys([ONE, twin, TWO], revoked=[PublicKey("x", TWO.raw)], threshold=1)
    assert [each.name for each in policy.operators] == ["key-1"]
    assert len({each.name for each in Policy.of_keys([ONE, other], threshold=2).operators}) == 2
    with pytest.raises(UsageError, match="too few builders are known: 2 must agree, known: 1"):
        Policy.of_keys([ONE, twin], threshold=2)


def test_an_older_version_is_refused_with_the_way_out(tmp_path: Path) -> None:
    memory = PolicyMemory(tmp_path / "policy")
    memory.admit(Policy.parse(text(version=3), "p"))
    memory.admit(Policy.parse(text(version=3), "p"))
    memory.admit(Policy.parse(text(version=5), "p"))
    with pytest.raises(Untrusted, match="version 4") as caught:
        memory.admit(Policy.parse(text(version=4), "p"))
    file = tmp_path / "policy" / "release.json"
    assert f"rm {file}" in str(caught.value.hint)
    memory.admit(Policy.parse(text(version=1, name="other"), "p"))
    file.unlink()
    memory.admit(Policy.parse(text(version=4), "p"))
    assert [each.name for each in (tmp_path / "policy").iterdir() if each.name.startswith(".")] == []


@pytest.mark.parametrize(
    "other",
    [
        text("threshold = 1"),
        text().replace(b"op-key-1", b"op-renamed"),
        text(tail='[[thresholds]]\ntarget = "a"\nthreshold = 1\n'),
        text(tail=EXCEPTION),
        text(tail=operators(THREE)),
        text().replace(str(ONE).encode(), str(THREE).encode()),
        text().replace(b'=" }', b'=", revoked = "stolen" }'),
        text().replace(b'=" }', b'=", until = 2027-01-01 }'),
    ],
)
def test_one_version_has_one_content(tmp_path: Path, other: bytes) -> None:
    memory = PolicyMemory(tmp_path)
    memory.admit(Policy.parse(text(), "p"))
    memory.admit(Policy.parse(b"# a comment\n" + text(), "p"))
    with pytest.raises(Untrusted, match="two policies release of version 1"):
        memory.admit(Policy.parse(other, "p"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": true, "sha256": ""}', '{"version": "1"}', "[" * 4000])
def test_a_damaged_memory_is_no_reason_to_forget(tmp_path: Path, content: str) -> None:
    (tmp_path / "release.json").write_text(content)
    with pytest.raises(Untrusted, match="damaged"):
        PolicyMemory(tmp_path).admit(Policy.parse(text(), "p"))


def test_what_is_there_and_cannot_be_read_is_no_reason_to_forget(tmp_path: Path) -> None:
    (tmp_path / "release.json").mkdir()
    with pytest.raises(Untrusted, match="cannot be read"):
        PolicyMemory(tmp_path).admit(Policy.parse(text(), "p"))


def test_what_one_place_knows_counts_in_all(tmp_path: Path) -> None:
    """A workspace's store and the user's memory: neither another clone nor no workspace at all is a way back."""
    user, one, other = (tmp_path / name for name in ("user", "one", "other"))
    PolicyMemory(user, one).admit(Policy.parse(text(version=5), "p"))
    for places in ((user,), (one,), (user, other), (other, user), (one, other)):
        with pytest.raises(Untrusted, match="old one"):
            PolicyMemory(*places).admit(Policy.parse(text(version=4), "p"))
        with pytest.raises(Untrusted, match="two policies") as caught:
            PolicyMemory(*places).admit(Policy.parse(text("threshold = 1", version=5), "p"))
        assert caught.value.hint is not None
        assert all(str(place / "release.json") in caught.value.hint for place in set(places) - {other})
    assert not other.exists(), "what is refused is not remembered"
    PolicyMemory(other, user).admit(Policy.parse(text(version=5), "p"))
    assert json.loads((other / "release.json").read_text())["version"] == 5


def test_one_place_that_can_be_written_is_enough(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    PolicyMemory(tmp_path / "file" / "policy", tmp_path / "policy").admit(Policy.parse(text(version=2), "p"))
    with pytest.raises(Untrusted):
        PolicyMemory(tmp_path / "file" / "policy", tmp_path / "policy").admit(Policy.parse(text(), "p"))
    with pytest.raises(OSError, match="file"):
        PolicyMemory(tmp_path / "file" / "policy").admit(Policy.parse(text(), "p"))


def test_many_at_once_remember_the_highest(tmp_path: Path) -> None:
    policies = [Policy.parse(text(version=number), "p") for number in range(1, 17)]

    def admit(policy: Policy) -> None:
        try:
            PolicyMemory(tmp_path / "deep" / "policy").admit(policy)
        except Untrusted as error:
            assert "old one" in error.message

    threads = [threading.Thread(target=admit, args=(policy,)) for policy in policies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads((tmp_path / "deep" / "policy" / "release.json").read_text())["version"] == 16


@settings(max_examples=100)
@given(
    st.sampled_from(text().decode().splitlines()),
    st.sampled_from(["1", '""', "[]", "{}", "[{ key = 1 }]", "true", "9" * 5000, "inf", "2026-01-01", '"a:YQ=="']),
)
def test_any_value_in_a_policy_is_read_or_an_error(line: str, value: str) -> None:
    data = text().decode().replace(line, f"{line.partition(' = ')[0]} = {value}", 1).encode()
    with contextlib.suppress(UsageError):
        assert Policy.parse(data, "p").operators
