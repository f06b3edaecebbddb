"""Which signed statements are votes, how they are counted, and what holds then."""

from __future__ import annotations

import datetime as dt
import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro.base.errors import NotDeterministic, Untrusted
from vzrepro.base.model import BuildKey, DrvHash, NarHash, StorePath, store_path
from vzrepro.base.signing import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.audit import AuditResult, OutputTree, audit_statement
from vzrepro.proof.attest.ballots import FoundEnvelope, read
from vzrepro.proof.attest.policy import Exemption, Operator, OperatorKey, Policy, Threshold
from vzrepro.proof.attest.provenance import Build
from vzrepro.proof.attest.statement import PAYLOAD_TYPE, Statement, Subject
from vzrepro.proof.attest.votes import Vote, VoteKind, count, decide

DRV = DrvHash("d" * 64)
OTHER_DRV = DrvHash("e" * 64)
PATH = store_path(DRV, "thing")
BUILD_KEY = BuildKey("b" * 64)
GOOD, BAD = NarHash("0" * 64), NarHash("f" * 64)
NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
FINISHED = 1_780_000_000  # 2026-05-28
KEYS = {name: SigningKey.generate(f"{name}-1") for name in ("ann", "bob", "eve", "old")}
STRANGER = SigningKey.generate("stranger")


def policy(
    threshold: int = 2, *, exceptions: tuple[Exemption, ...] = (), machines: bool = False, **changes: OperatorKey
) -> Policy:
    """ann, bob and eve; ann has a second key, called old."""
    keys = {name: changes.get(name, OperatorKey(key.public)) for name, key in KEYS.items()}
    operators = (
        Operator("ann", (keys["ann"], keys["old"])),
        Operator("bob", (keys["bob"],)),
        Operator("eve", (keys["eve"],)),
    )
    return Policy("test", 1, threshold, operators, (Threshold("easy", 1),), exceptions, machines)


def subjects(nar_hash: NarHash, files: dict[str, str], path: StorePath = PATH) -> tuple[Subject, ...]:
    whole = Subject(str(path), {"narSha256": nar_hash.hex})
    return whole, *(Subject(name, {"sha256": digest}) for name, digest in files.items())


def built(
    who: SigningKey,
    nar_hash: NarHash = GOOD,
    *,
    files: dict[str, str] | None = None,
    builder: SigningKey | None = None,
    finished: int | None = FINISHED,
    drv: DrvHash = DRV,
) -> bytes:
    """An envelope with provenance, signed by `who`."""
    derivation = dict.fromkeys(("version", "platform")) | {
        "name": "thing",
        "builder": "sandbox",
        "command": ["true"],
        "env": {},
        "source_date_epoch": 1,
    }
    path = store_path(drv, "thing")
    build = Build("thing", path, drv, BUILD_KEY, nar_hash, derivation, (), 1, finished)
    return build.statement(subjects(nar_hash, files or {}, path), (builder or who).public).signed(who)


def audited(
    who: SigningKey, rebuilt: NarHash | None, *, axes: tuple[str, ...] = (), held: tuple[str, ...] = ()
) -> bytes:
    """An envelope with an audit's statement: GOOD is registered, `rebuilt` came out."""
    result = AuditResult(
        drv_hash=DRV,
        build_key=BUILD_KEY,
        **({"path": PATH} if "path" in AuditResult.__dataclass_fields__ else {}),
        registered=OutputTree(GOOD, 10),
        rebuilt=None if rebuilt is None else OutputTree(rebuilt, 10),
        verdict="REPRODUCED" if rebuilt == GOOD else "DIFFERS",
        reason=None,
        axes=axes,
        held=held,
        together=1,
        axis_version=1,
        observed={},
        started="2026-05-28T00:00:00Z",
        finished="2026-05-28T00:01:00Z",
        milliseconds=60000,
        builder={},
    )
    return audit_statement(result, subjects(GOOD, {"a": "1" * 64})).signed(who)


def votes(*envelopes: bytes, by: Policy | None = None) -> tuple[Vote, ...]:
    return read([FoundEnvelope("here", each) for each in envelopes], by or policy()).votes


def refusal(envelope: bytes, by: Policy | None = None) -> str:
    ballots = read([FoundEnvelope("here", envelope)], by or policy())
    assert ballots.votes == ()
    [refused] = ballots.refused
    return f"{refused.who}: {refused.why}"


def held(*envelopes: bytes, by: Policy | None = None, target: str = "thing") -> NarHash:
    rules = by or policy()
    return decide(count(votes(*envelopes, by=rules), rules, target, DRV), rules, NOW).standing.nar_hash


# --- what is a vote ---------------------------------------------------------------------------------------------------


def test_provenance_is_a_vote_of_the_keys_operator() -> None:
    [vote] = votes(built(KEYS["old"], files={"b": "2" * 64, "a": "1" * 64}))
    assert (vote.operator, vote.kind, vote.nar_hash, vote.drv_hash) == ("ann", VoteKind.PROVENANCE, GOOD, DRV)
    assert vote.files == (("a", "1" * 64), ("b", "2" * 64))
    assert vote.when == dt.datetime.fromtimestamp(FINISHED, dt.UTC)
    assert not vote.varied


def test_a_rebuild_is_a_vote_for_what_came_out() -> None:
    [same] = votes(audited(KEYS["ann"], GOOD))
    assert (same.kind, same.nar_hash, same.files, same.varied) == (VoteKind.AUDIT, GOOD, (("a", "1" * 64),), False)
    [other] = votes(audited(KEYS["ann"], BAD, axes=("clock",)))
    assert (other.nar_hash, other.files, other.varied) == (BAD, (), True)
    assert votes(audited(KEYS["ann"], BAD, held=("clock",)))[0].varied
    assert "gave nothing" in refusal(audited(KEYS["ann"], None))


def test_equal_envelopes_are_one_wherever_they_are_found() -> None:
    envelope = built(KEYS["ann"])
    ballots = read([FoundEnvelope("a", envelope), FoundEnvelope("b", envelope), FoundEnvelope("a", envelope)], policy())
    assert [vote.sources for vote in ballots.votes] == [("a", "b")]
    assert ballots.envelopes == {ballots.votes[0].envelope: envelope}


def test_a_stranger_has_no_vote() -> None:
    assert "nobody whom the policy knows" in refusal(built(STRANGER))
    assert STRANGER.public.id in refusal(built(STRANGER))


def test_a_forged_signature_is_called_that() -> None:
    document = json.loads(built(STRANGER))
    document["signatures"][0]["keyid"] = KEYS["bob"].public.id
    assert refusal(json.dumps(document).encode()) == "bob-1: the signature is wrong"


def test_a_changed_payload_is_no_vote() -> None:
    one, other = json.loads(built(KEYS["bob"])), json.loads(built(KEYS["bob"], BAD))
    assert "wrong" in refusal(json.dumps(other | {"signatures": one["signatures"]}).encode())


def test_who_signs_what_another_built_has_no_vote() -> None:
    assert "another has built" in refusal(built(KEYS["bob"], builder=KEYS["ann"]))


def test_a_statement_with_several_signatures_is_nobodys_vote() -> None:
    document = json.loads(built(KEYS["ann"]))
    second = json.loads(dsse.sign(PAYLOAD_TYPE, dsse.parse(built(KEYS["ann"])).payload, KEYS["bob"]))
    document["signatures"] += second["signatures"]
    assert "several have signed" in refusal(json.dumps(document).encode())
    # A stranger's signature beside it takes nothing away.
    other = json.loads(dsse.sign(PAYLOAD_TYPE, dsse.parse(built(KEYS["ann"])).payload, STRANGER))
    document["signatures"] = [*other["signatures"], document["signatures"][0]]
    assert [vote.operator for vote in votes(json.dumps(document).encode())] == ["ann"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'{"payload": "", "payloadType": ""}', b"\xff", b"[" * 9999]
)
def test_what_is_no_envelope_is_told_of(data: bytes) -> None:
    assert refusal(data).startswith("somebody: ")


def test_a_truncated_envelope_is_told_of() -> None:
    envelope = built(KEYS["ann"])
    assert "not an envelope" in refusal(envelope[: len(envelope) // 2])


def test_other_statements_are_left_out() -> None:
    summary = Statement(subjects(GOOD, {}), "https://slsa.dev/verification_summary/v1", {}).signed(KEYS["ann"])
    ballots = read([FoundEnvelope("here", summary)], policy())
    assert (ballots.votes, ballots.refused) == ((), ())


def test_a_subject_of_another_derivation_is_no_vote() -> None:
    statement = Statement.of(dsse.parse(built(KEYS["ann"])))
    other = Subject(str(store_path(OTHER_DRV, "thing")), {"narSha256": GOOD.hex})
    forged = replace(statement, subjects=(other,)).signed(KEYS["ann"])
    assert "contradicts itself" in refusal(forged)


# --- keys and their times ---------------------------------------------------------------------------------------------


def day(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ({"since": day("2026-05-29")}, "counts from"),
        ({"until": day("2026-05-28")}, "counted until"),
        ({"revoked": "stolen"}, "revoked: stolen"),
        ({"revoked": "stolen", "since": day("2020-01-01"), "until": day("2030-01-01")}, "revoked: stolen"),
    ],
)
def test_a_key_counts_in_its_time_and_never_once_revoked(key: dict[str, object], says: str) -> None:
    rules = policy(bob=OperatorKey(KEYS["bob"].public, **key))  # type: ignore[arg-type]
    assert says in refusal(built(KEYS["bob"]), rules)
    within = policy(bob=OperatorKey(KEYS["bob"].public, day("2026-05-01"), day("2026-06-01")))
    assert len(votes(built(KEYS["bob"]), by=within)) == 1


def test_without_a_time_only_unbounded_keys_count() -> None:
    assert len(votes(built(KEYS["bob"], finished=None))) == 1
    bounded = policy(bob=OperatorKey(KEYS["bob"].public, since=day("2020-01-01")))
    assert "does not say when" in refusal(built(KEYS["bob"], finished=None), bounded)


def test_a_revoked_key_leaves_its_operator_the_other_one() -> None:
    rules = policy(old=OperatorKey(KEYS["old"].public, revoked="lost"))
    assert [vote.operator for vote in votes(built(KEYS["ann"]), built(KEYS["old"], BAD), by=rules)] == ["ann"]
    assert held(built(KEYS["ann"]), built(KEYS["old"], BAD), built(KEYS["bob"]), by=rules) == GOOD


# --- counting ---------------------------------------------------------------------------------------------------------


def test_two_of_three_carry_it_and_the_liar_stands_alone() -> None:
    tally = count(votes(built(KEYS["ann"]), built(KEYS["bob"]), built(KEYS["eve"], BAD)), policy(), "thing", DRV)
    assert [(each.nar_hash, list(each.voters)) for each in tally.standings] == [(GOOD, ["ann", "bob"]), (BAD, ["eve"])]
    assert decide(tally, policy(), NOW).standing.nar_hash == GOOD


def test_one_operator_with_two_keys_is_one_vote() -> None:
    with pytest.raises(Untrusted, match="too few votes: 2 must agree, and 1 does"):
        held(built(KEYS["ann"]), built(KEYS["old"]), audited(KEYS["ann"], GOOD))


def test_votes_on_another_derivation_do_not_count() -> None:
    with pytest.raises(Untrusted):
        held(built(KEYS["ann"]), built(KEYS["bob"], drv=OTHER_DRV))


def test_two_results_with_enough_votes_are_a_hard_stop_that_shows_both() -> None:
    rules = policy(1)
    with pytest.raises(NotDeterministic) as caught:
        held(built(KEYS["ann"]), built(KEYS["eve"], BAD), by=rules)
    assert f"{GOOD.hex[:12]} by ann" in str(caught.value.reason)
    assert f"{BAD.hex[:12]} by eve" in str(caught.value.reason)
    assert caught.value.exit_code == 104


def test_more_votes_do_not_outvote_enough_votes() -> None:
    rules = policy(1)
    with pytest.raises(NotDeterministic):
        held(built(KEYS["ann"]), built(KEYS["bob"]), built(KEYS["eve"], BAD), by=rules)


def test_who_votes_twice_has_no_vote_and_is_named() -> None:
    both = (built(KEYS["ann"]), built(KEYS["old"], BAD), built(KEYS["bob"]))
    with pytest.raises(Untrusted) as caught:
        held(*both)
    assert "ann has got 2 results, so its votes are void" in str(caught.value.reason)
    tally = count(votes(*both), policy(), "thing", DRV)
    assert [(each.operator, each.results) for each in tally.void] == [("ann", (GOOD, BAD))]


def test_an_experiment_does_not_contradict_its_builder() -> None:
    assert held(built(KEYS["ann"]), audited(KEYS["ann"], BAD, axes=("clock",)), built(KEYS["bob"])) == GOOD
    with pytest.raises(Untrusted, match="too few"):
        held(built(KEYS["ann"]), audited(KEYS["ann"], BAD), built(KEYS["bob"]))
    assert held(audited(KEYS["ann"], GOOD, axes=("clock",)), built(KEYS["bob"])) == GOOD


def test_the_target_decides_how_many_it_takes() -> None:
    assert held(built(KEYS["ann"]), target="easy") == GOOD
    with pytest.raises(Untrusted):
        held(built(KEYS["ann"]))


# --- exceptions -------------------------------------------------------------------------------------------------------


def exception(accept: NarHash = BAD, until: str = "2026-07-01", target: str = "thing") -> Exemption:
    return Exemption(target, accept, "because", day(until))


def test_an_exception_takes_what_too_few_voted_for() -> None:
    rules = policy(exceptions=(exception(),))
    tally = count(votes(built(KEYS["eve"], BAD)), rules, "thing", DRV)
    assert decide(tally, rules, NOW).exception == exception()
    assert held(built(KEYS["eve"], BAD), by=rules) == BAD
    assert held(built(KEYS["ann"]), built(KEYS["bob"]), built(KEYS["eve"], BAD), by=rules) == GOOD
    with pytest.raises(Untrusted):
        held(built(KEYS["eve"], GOOD), by=rules)
    with pytest.raises(Untrusted):
        held(built(KEYS["eve"], BAD), by=policy(exceptions=(exception(target="other"),)))


def test_an_exception_settles_a_hard_stop() -> None:
    rules = policy(1, exceptions=(exception(),))
    assert held(built(KEYS["ann"]), built(KEYS["eve"], BAD), by=rules) == BAD


def test_an_expired_exception_is_an_error_that_says_so() -> None:
    rules = policy(exceptions=(exception(until="2026-06-01"),))
    with pytest.raises(Untrusted, match="exception for thing has expired"):
        held(built(KEYS["eve"], BAD), by=rules)
    split = policy(1, exceptions=(exception(until="2026-06-01"),))
    with pytest.raises(NotDeterministic) as caught:
        held(built(KEYS["ann"]), built(KEYS["eve"], BAD), by=split)
    assert "expired on 2026-06-01" in str(caught.value.reason)


def test_two_exceptions_for_one_derivation_settle_nothing() -> None:
    rules = policy(exceptions=(exception(), exception(GOOD)))
    with pytest.raises(Untrusted) as caught:
        held(built(KEYS["ann"]), built(KEYS["eve"], BAD), by=rules)
    assert "several" in str(caught.value.reason)


# --- file lists -------------------------------------------------------------------------------------------------------


def test_files_are_believed_when_enough_operators_name_the_same() -> None:
    right, wrong = {"a": "1" * 64}, {"a": "2" * 64}
    envelopes = [built(KEYS["ann"], files=right), built(KEYS["bob"], files=right), built(KEYS["eve"], files=wrong)]
    [standing] = count(votes(*envelopes), policy(), "thing", DRV).standings
    assert standing.files(2) == right
    assert standing.files(3) is None
    assert standing.files(1) is None  # two lists, and either has one who names it
    [alone] = count(votes(built(KEYS["ann"]), envelopes[2]), policy(), "thing", DRV).standings
    assert alone.files(2) is None


# --- order ------------------------------------------------------------------------------------------------------------

POOL = [built(key, result) for key, result in itertools.product([*KEYS.values(), STRANGER], (GOOD, BAD))]
POOL += [audited(key, result, axes=axes) for key in KEYS.values() for result in (GOOD, BAD) for axes in ((), ("x",))]


def outcome(envelopes: list[bytes], threshold: int) -> tuple[object, ...]:
    rules = policy(threshold)
    tally = count(votes(*envelopes, by=rules), rules, "thing", DRV)
    try:
        return tally, decide(tally, rules, NOW)
    except (Untrusted, NotDeterministic) as error:
        return tally, type(error), error.message, error.reason


@given(st.data(), st.lists(st.sampled_from(POOL), max_size=12), st.integers(1, 3))
def test_the_count_does_not_depend_on_the_order(data: st.DataObject, envelopes: list[bytes], threshold: int) -> None:
    shuffled = data.draw(st.permutations(envelopes))
    assert outcome(envelopes, threshold) == outcome(shuffled, threshold)


@given(st.lists(st.sampled_from(POOL), max_size=12), st.integers(1, 3))
def test_no_operator_is_counted_twice_and_none_for_two(envelopes: list[bytes], threshold: int) -> None:
    rules = policy(threshold)
    tally = count(votes(*envelopes, by=rules), rules, "thing", DRV)
    voters = [name for each in tally.standings for name in each.voters]
    assert len(voters) == len(set(voters))
    assert not set(voters) & {each.operator for each in tally.void}
    assert all(len(each.voters) >= threshold for each in tally.enough)


@given(st.lists(st.sampled_from(POOL), max_size=8), st.integers(1, 3))
def test_saying_it_again_changes_nothing(envelopes: list[bytes], threshold: int) -> None:
    assert outcome(envelopes, threshold) == outcome(envelopes + envelopes, threshold)


@pytest.mark.parametrize(
    ("machines", "weight"),
    [
        ({"ann": "a", "old": "a", "bob": "b", "eve": "c"}, 3),
        ({"ann": "a", "old": "a", "bob": "a", "eve": "a"}, 1),
        ({"ann": "a", "old": "b", "bob": "a", "eve": "b"}, 2),
        ({"ann": "a", "old": "b", "bob": "b", "eve": "c"}, 3),
        ({"ann": "a", "old": "c", "bob": "a", "eve": "b"}, 3),
    ],
)
def test_operators_on_one_machine_are_one(machines: dict[str, str], weight: int) -> None:
    """Each needs a machine of its own among those that it has used, however they are dealt out."""
    keys = {name: OperatorKey(KEYS[name].public, machine=machine) for name, machine in machines.items()}
    rules = policy(weight, machines=True, **keys)  # type: ignore[arg-type]
    found = [FoundEnvelope("here", built(KEYS[name])) for name in KEYS]
    tally = count(read(found, rules).votes, rules, "thing", DRV)
    assert [standing.weight for standing in tally.enough] == [weight]
    stricter = policy(weight + 1, machines=True, **keys)  # type: ignore[arg-type]
    with pytest.raises(Untrusted, match=f"{weight + 1} must agree, and {weight} do"):
        decide(count(read(found, stricter).votes, stricter, "thing", DRV), stricter, NOW)
    plain = policy(3, **keys)  # type: ignore[arg-type]
    assert [len(each.voters) for each in count(read(found, plain).votes, plain, "thing", DRV).enough] == [3]
