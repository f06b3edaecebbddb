"""Provenance, audits' statements, summaries: what they say, by whom, and what an independent library makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_toto_attestation.predicates.provenance.v1.provenance_pb2 as provenance_pb2
import in_toto_attestation.predicates.vsa.v1.vsa_pb2 as vsa_pb2
import in_toto_attestation.v1.statement_pb2 as statement_pb2
import pytest
from google.protobuf import json_format
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement as TheirStatement

from tests.attestations import Shop, open_shop, put
from tests.caches import new_cache
from vzrepro.base.errors import HashMismatch, UsageError
from vzrepro.base.model import BuildKey, Derivation, FileHash, NarHash, Outcome
from vzrepro.cache import DirectoryBackend, SigningKey, TrustedKeys
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.audit import AuditResult, OutputTree, audit_statement
from vzrepro.proof.attest.dsse import Malformed
from vzrepro.proof.attest.provenance import BUILD_TYPE, NotBuiltHere, Provenance, build_of
from vzrepro.proof.attest.review import review
from vzrepro.proof.attest.shelf import HERE, Shelf, gather
from vzrepro.proof.attest.signers import Keys, SignerStanding
from vzrepro.proof.attest.statement import Statement, Subject, subjects_of
from vzrepro.proof.attest.vsa import Summary, summary_statement
from vzrepro.proof.attest.witness import attest, pushed_along
from vzrepro.store import OLD_SECS, LocalStore

KEY = SigningKey.generate("ours-1")
TEAM = SigningKey.generate("team-1")
STRANGER = SigningKey.generate("theirs-1")
REVOKED = SigningKey.generate("lost-1")
KEYS = Keys((KEY.public,), (TEAM.public,), (REVOKED.public,))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return open_shop(tmp_path / "store")


def subjects(shop: Shop) -> tuple[Subject, ...]:
    return subjects_of(shop.built.path, shop.built.nar_hash, shop.store.location(shop.built.path))


def provenance(shop: Shop) -> Statement:
    return build_of(shop.store, shop.built).statement(subjects(shop), KEY.public)


def result(shop: Shop, **changes: Any) -> AuditResult:
    assert shop.built.build_key is not None
    ours = OutputTree(shop.built.nar_hash, shop.built.nar_size)
    plain = AuditResult(
        path=shop.built.path,
        drv_hash=shop.drv_hash,
        build_key=shop.built.build_key,
        registered=ours,
        rebuilt=ours,
        verdict="REPRODUCED",
        reason=None,
        axes=("host-name", "umask"),
        held=("clock",),
        together=2,
        axis_version=1,
        observed={"umask": ("0022", "0077")},
        started="2026-11-24T20:00:00Z",
        finished="2026-11-24T20:00:05Z",
        milliseconds=5000,
        builder={"kernel": "6.1"},
    )
    return replace(plain, **changes)


def audited(shop: Shop, **changes: Any) -> Statement:
    return audit_statement(result(shop, **changes), subjects(shop))


# --- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_names_what_went_in_and_what_came_out(shop: Shop) -> None:
    said = provenance(shop).document()
    image, source = shop.inputs
    assert [subject["name"] for subject in said["subject"]] == [str(shop.built.path), "agent", "share/readme"]
    definition, details = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]
    assert definition["buildType"] == BUILD_TYPE
    assert definition["externalParameters"] == {
        "target": "agent",
        "name": "agent-1.0",
        "version": "1.0",
        "builder": "sandbox",
        "platform": "linux/amd64",
        "command": ["sh", "/in/build"],
        "env": {"GREETING": "grüß dich"},
        "sourceDateEpoch": 1_767_225_600,
    }
    assert shop.built.build_key is not None
    assert definition["internalParameters"] == {"drvHash": shop.drv_hash.hex, "buildKey": shop.built.build_key.hex}
    assert definition["resolvedDependencies"] == [
        {
            "name": str(image.path),
            "digest": {"narSha256": image.nar_hash.hex},
            "annotations": {"drvHash": image.drv_hash and image.drv_hash.hex, "input": "image"},
        },
        {
            "name": str(source.path),
            "digest": {"narSha256": source.nar_hash.hex, "sha256": FileHash.of(b"a tarball").hex},
            "annotations": {"drvHash": source.drv_hash and source.drv_hash.hex, "input": "/in/source"},
        },
    ]
    assert details["builder"]["id"] == f"urn:vzrepro:key:{KEY.public.id}"
    assert details["metadata"] == {"finishedOn": "2027-01-15T08:00:00Z"}


def test_provenance_tells_when_a_build_began_if_the_history_knows(shop: Shop) -> None:
    shop.store.record_history("agent", "build", 90.4, shop.built.nar_size)
    times = {"startedOn": "2027-01-15T07:58:30Z", "finishedOn": "2027-01-15T08:00:00Z"}
    assert provenance(shop).predicate["runDetails"]["metadata"] == times
    shop.store.record_history("agent", "build", 7, shop.built.nar_size)
    assert list(provenance(shop).predicate["runDetails"]["metadata"]) == ["finishedOn"], "which of the two it was?"


def test_an_independent_library_accepts_the_provenance(shop: Shop) -> None:
    shop.store.record_history("agent", "build", 90, shop.built.nar_size)
    made = provenance(shop)
    TheirStatement.copy_from_pb(json_format.Parse(made.canonical(), statement_pb2.Statement())).validate()
    # Raises for a field that SLSA does not have, and for one of another type.
    message = json_format.ParseDict(made.document()["predicate"], provenance_pb2.Provenance())
    for each in message.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(each).validate()
    assert message.run_details.builder.id == f"urn:vzrepro:key:{KEY.public.id}"
    assert message.build_definition.resolved_dependencies[0].annotations.fields["input"].string_value == "image"
    assert message.run_details.metadata.started_on.seconds == 1_800_000_000 - 90


def test_equal_provenance_is_equal_bytes(shop: Shop) -> None:
    assert provenance(shop).signed(KEY) == provenance(shop).signed(KEY)
    read = Provenance.of(Statement.of(dsse.parse(provenance(shop).signed(KEY))))
    built = shop.built
    assert read == Provenance(built.path, built.nar_hash, shop.drv_hash, built.build_key, "2027-01-15T08:00:00Z")


@pytest.mark.parametrize("outcome", [Outcome.SUBSTITUTED, Outcome.FETCHED])
def test_what_was_not_built_here_has_no_provenance(shop: Shop, outcome: Outcome) -> None:
    with pytest.raises(NotBuiltHere):
        build_of(shop.store, replace(shop.built, outcome=outcome))
    assert pushed_along(shop.store, replace(shop.built, outcome=outcome))(KEY) is None


def test_a_copy_of_what_was_built_here_counts_as_built(shop: Shop) -> None:
    assert build_of(shop.store, replace(shop.built, outcome=Outcome.COPIED)) == build_of(shop.store, shop.built)


@pytest.mark.parametrize("outcome", [Outcome.BUILT, Outcome.COPIED])
def test_what_somebody_vouches_for_has_no_provenance(shop: Shop, outcome: Outcome) -> None:
    with pytest.raises(NotBuiltHere):
        build_of(shop.store, replace(shop.built, outcome=outcome, voucher=b"StorePath: x"))


def test_inputs_that_are_gone_or_others_give_no_provenance(shop: Shop, tmp_path: Path) -> None:
    with pytest.raises(NotBuiltHere, match="other inputs"):
        build_of(shop.store, replace(shop.built, build_key=BuildKey.of(b"of other inputs")))
    lone = LocalStore(tmp_path / "lone")
    drv = Derivation(name="x", builder="sandbox", image=shop.drv_hash)
    built = put(lone, drv, {"": b"x"}, fed={shop.drv_hash: NarHash.of(b"image")})
    with pytest.raises(NotBuiltHere, match="not all that x was built from"):
        build_of(lone, built)
    with pytest.raises(NotBuiltHere, match="nothing is known"):
        build_of(lone, replace(built, drv_hash=shop.drv_hash))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("buildDefinition",), None),
        (("buildDefinition", "buildType"), "https://example.org/other"),
        (("buildDefinition", "internalParameters"), []),
        (("buildDefinition", "internalParameters", "drvHash"), "0"),
        (("buildDefinition", "internalParameters", "drvHash"), "0" * 64),
        (("buildDefinition", "internalParameters", "buildKey"), 7),
        (("runDetails", "metadata"), "never"),
    ],
)
def test_provenance_of_others_or_that_contradicts_itself_is_refused(
    shop: Shop, where: tuple[str, ...], value: object
) -> None:
    predicate = json.loads(json.dumps(provenance(shop).predicate))
    at = predicate
    for name in where[:-1]:
        at = at[name]
    at[where[-1]] = value
    with pytest.raises(Malformed):
        Provenance.of(replace(provenance(shop), predicate=predicate))


def test_provenance_needs_one_output(shop: Shop) -> None:
    with pytest.raises(Malformed):
        Provenance.of(replace(provenance(shop), subjects=provenance(shop).subjects[1:]))
    with pytest.raises(Malformed):
        Provenance.of(audited(shop))


# --- audits and summaries ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"verdict": "DIFFERS", "rebuilt": OutputTree(NarHash.of(b"other"), 7), "reason": "umask"},
        {"verdict": "BUILD_FAILED", "rebuilt": None, "reason": "exit 1", "axes": (), "held": (), "observed": {}},
    ],
)
def test_an_audits_statement_there_and_back(shop: Shop, changes: dict[str, Any]) -> None:
    made = audited(shop, **changes)
    read = Statement.of(dsse.parse(made.signed(KEY)))
    assert AuditResult.of(read) == result(shop, **changes)
    TheirStatement.copy_from_pb(json_format.Parse(made.canonical(), statement_pb2.Statement())).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("drvHash", "0" * 64),
        ("drvHash", "x"),
        ("registered", {"narSha256": "0" * 64, "size": 1}),
        ("registered", None),
        ("rebuilt", {"narSha256": "0" * 64}),
        ("rebuilt", {"narSha256": "0", "size": 1}),
        ("rebuilt", {"narSha256": "0" * 64, "size": -1}),
        ("verdict", 1),
        ("axes", "umask"),
        ("observed", {"umask": ["0022"]}),
        ("milliseconds", "5"),
        ("together", True),
    ],
)
def test_a_malformed_audits_statement_is_refused(shop: Shop, field: str, value: object) -> None:
    made = audited(shop)
    with pytest.raises(Malformed):
        AuditResult.of(replace(made, predicate={**made.predicate, field: value}))
    missing = {name: each for name, each in made.predicate.items() if name != field}
    with pytest.raises(Malformed):
        AuditResult.of(replace(made, predicate=missing))


@pytest.mark.parametrize("passed", [True, False])
def test_a_summary(shop: Shop, passed: bool) -> None:
    counted = (provenance(shop).signed(KEY), provenance(shop).signed(TEAM))
    made = summary_statement(
        Summary(
            resource=str(shop.built.path),
            passed=passed,
            verified="2026-11-24T20:00:00Z",
            levels=("VZREPRO_BUILDERS_2",),
            policy=("policy.toml", b"version = 1\n"),
            inputs=counted,
        ),
        subjects(shop),
        KEY.public,
    )
    TheirStatement.copy_from_pb(json_format.Parse(made.canonical(), statement_pb2.Statement())).validate()
    # That library has the levels as one text, where SLSA's own schema has a list.
    rest = {name: value for name, value in made.predicate.items() if name != "verifiedLevels"}
    message = json_format.ParseDict(rest, vsa_pb2.VerificationSummary())
    assert message.time_verified.seconds == 1_795_550_400
    said = made.predicate
    assert said["verifier"]["id"] == f"urn:vzrepro:key:{KEY.public.id}"
    assert (said["verificationResult"], said["verifiedLevels"]) == (
        ("PASSED", ["VZREPRO_BUILDERS_2"]) if passed else ("FAILED", ["FAILED"])
    )
    policy = {"uri": "urn:vzrepro:policy:policy.toml", "digest": {"sha256": FileHash.of(b"version = 1\n").hex}}
    assert said["policy"] == policy
    assert {each["digest"]["sha256"] for each in said["inputAttestations"]} == {FileHash.of(e).hex for e in counted}


# --- the shelf --------------------------------------------------------------------------------------------------------


def test_signing_keeps_and_signing_again_changes_nothing(shop: Shop) -> None:
    first, again = attest(shop.store, shop.built, KEY), attest(shop.store, shop.built, KEY)
    assert (first.new, again.new) == (True, False)
    assert first.envelope == again.envelope
    other = attest(shop.store, shop.built, TEAM)
    assert Shelf(shop.store).envelopes(shop.drv_hash) == sorted([first.envelope, other.envelope])
    [file] = (shop.store.root / ".vzrepro/attest" / shop.drv_hash.hex / KEY.public.id).iterdir()
    assert file.name == f"{FileHash.of(first.envelope)}.json"
    assert dsse.parse(first.envelope).signers([KEY.public, TEAM.public]) == {KEY.public}


def test_a_damaged_object_is_not_signed(shop: Shop) -> None:
    file = shop.store.location(shop.built.path) / "agent"
    file.chmod(0o644)
    file.write_bytes(b"another program\n")
    with pytest.raises(HashMismatch):
        attest(shop.store, shop.built, KEY)
    assert Shelf(shop.store).envelopes(shop.drv_hash) == []


def test_a_damaged_attestation_is_none(shop: Shop) -> None:
    attest(shop.store, shop.built, KEY)
    [file] = (shop.store.root / ".vzrepro/attest" / shop.drv_hash.hex).glob("*/*.json")
    file.write_bytes(file.read_bytes()[:-1])
    assert Shelf(shop.store).envelopes(shop.drv_hash) == []


def test_only_envelopes_are_kept(shop: Shop) -> None:
    for data in (b"", b"{}", b'{"payload":"x","payloadType":"y","signatures":[]}', b"[" * 100_000):
        with pytest.raises(UsageError):
            Shelf(shop.store).put(shop.drv_hash, data)


def test_a_foreign_key_id_leads_nowhere(shop: Shop) -> None:
    envelope = provenance(shop).signed(KEY).replace(KEY.public.id.encode(), b"../../../../x")
    assert Shelf(shop.store).put(shop.drv_hash, envelope)
    assert Shelf(shop.store).envelopes(shop.drv_hash) == [envelope]


def test_attestations_outlive_their_object_for_a_while(tmp_path: Path) -> None:
    shop = open_shop(tmp_path / "store")
    attest(shop.store, shop.built, KEY)
    shop.store.close()
    now = LocalStore(shop.store.root)
    now.gc()
    assert now.query(shop.built.path) is None
    assert Shelf(now).envelopes(shop.drv_hash)
    import time

    later = LocalStore(shop.store.root, clock=lambda: time.time() + OLD_SECS + 60)
    later.gc()
    assert Shelf(later).envelopes(shop.drv_hash) == []
    assert list((shop.store.root / ".vzrepro/attest").iterdir()) == []


def test_gathering_says_where(shop: Shop, tmp_path: Path) -> None:
    ours = attest(shop.store, shop.built, KEY).envelope
    theirs = provenance(shop).signed(STRANGER)
    cache = new_cache(DirectoryBackend(tmp_path / "cache"), TrustedKeys())
    for envelope in (ours, theirs):
        cache.put_attestation(shop.drv_hash, envelope)
    found = gather(shop.drv_hash, Shelf(shop.store), [cache.reader], lambda *_: pytest.fail("the cache has not failed"))
    assert found == {ours: (HERE, cache.url), theirs: (cache.url,)}


# --- what it is worth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "name", "standing"),
    [
        (KEY, "ours-1", SignerStanding.OWN),
        (TEAM, "team-1", SignerStanding.TRUSTED),
        (REVOKED, "lost-1", SignerStanding.REVOKED),
        (STRANGER, None, SignerStanding.UNKNOWN),
    ],
)
def test_who_signed_is_told(shop: Shop, key: SigningKey, name: str | None, standing: SignerStanding) -> None:
    seen = review(provenance(shop).signed(key), KEYS, shop.built)
    [signer] = seen.signers
    assert (signer.name, signer.keyid, signer.standing) == (name, key.public.id, standing)
    assert (seen.kind, seen.agrees, seen.result) == ("provenance", True, shop.built.nar_hash)


def test_a_key_id_that_is_borrowed_is_told(shop: Shop) -> None:
    data = provenance(shop).signed(STRANGER).replace(STRANGER.public.id.encode(), TEAM.public.id.encode())
    [signer] = review(data, KEYS, shop.built).signers
    assert (signer.name, signer.standing) == ("team-1", SignerStanding.FORGED)


def test_another_result_is_told(shop: Shop) -> None:
    ours = replace(shop.built, nar_hash=NarHash.of(b"ours"))
    assert review(provenance(shop).signed(TEAM), KEYS, ours).agrees is False
    assert review(provenance(shop).signed(TEAM), KEYS, None).agrees is None
    differs = audited(shop, verdict="DIFFERS", rebuilt=OutputTree(NarHash.of(b"other"), 7), reason="it differs")
    seen = review(differs.signed(TEAM), KEYS, shop.built)
    assert (seen.kind, seen.agrees, seen.result) == ("audit", False, NarHash.of(b"other"))
    assert seen.detail == "DIFFERS, varied: host-name, umask"


def test_a_statement_about_something_else_is_told(shop: Shop, tmp_path: Path) -> None:
    other = open_shop(tmp_path / "other", name="other-1.0")
    seen = review(provenance(other).signed(TEAM), KEYS, shop.built)
    assert seen.kind is None
    assert seen.wrong is not None and "something else" in seen.wrong
    # Also where we do not have the output: else another's provenance, which is signed, would be shown as its own.
    assert review(provenance(other).signed(TEAM), KEYS, None, shop.built.path).kind is None
    assert review(provenance(shop).signed(TEAM), KEYS, None, shop.built.path).kind == "provenance"


def test_a_summary_of_something_else_is_told(shop: Shop, tmp_path: Path) -> None:
    other = open_shop(tmp_path / "other", name="other-1.0")
    passed = Summary(resource=str(other.built.path), passed=True, verified="2026-11-24T20:00:00Z")
    data = summary_statement(passed, subjects(other), TEAM.public).signed(TEAM)
    assert review(data, KEYS, other.built).detail == "PASSED"
    seen = review(data, KEYS, shop.built)
    assert (seen.kind, seen.detail) == (None, None)


@pytest.mark.parametrize("data", [b"", b"{}", dsse.sign("text/plain", b"hello", TEAM)])
def test_what_says_nothing_is_told(shop: Shop, data: bytes) -> None:
    seen = review(data, KEYS, shop.built)
    assert seen.kind is None and seen.wrong
