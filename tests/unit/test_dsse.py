"""Envelopes and statements: their bytes, what an independent library says of them, and what hostile ones do."""

from __future__ import annotations

import base64
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import in_toto_attestation.v1.statement_pb2 as statement_pb2
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from in_toto_attestation.v1.statement import Statement as TheirStatement
from securesystemslib.dsse import Envelope as TheirEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import CryptoSigner, SSlibKey

from tests.attestations import TEST_KEY
from vzrepro.base.model import DrvHash, NarHash, store_path
from vzrepro.cache import PublicKey, SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.dsse import Malformed, parse, pre_authentication_encoding, sign
from vzrepro.proof.attest.statement import MAX_FILES, PAYLOAD_TYPE, Statement, Subject, file_subjects, subjects_of

GOLDEN = Path(__file__).parent.parent / "golden" / "attest"
PATH = store_path(DrvHash.of(b"golden"), "agent-1.0")
STATEMENT = Statement(
    (Subject(str(PATH), {"narSha256": NarHash.of(b"nar").hex}), Subject("bin/grüß", {"sha256": "ab" * 32})),
    "https://example.org/predicate/v1",
    {"greeting": "grüß dich", "number": 7, "nothing": None, "list": [True]},
)
OTHER = SigningKey.generate("other-1")


def golden(name: str, data: bytes) -> bytes:
    """The golden file's bytes. Accept new ones, on purpose only, with VZREPRO_ACCEPT=1: signatures break with them."""
    file = GOLDEN / name
    if os.environ.get("VZREPRO_ACCEPT"):
        file.write_bytes(data)
    return file.read_bytes()


def theirs(key: PublicKey) -> SSlibKey:
    return SSlibKey(key.id, "ed25519", "ed25519", {"public": key.raw.hex()})


def envelope(**changes: Any) -> bytes:
    """A good envelope as JSON with some fields changed; None leaves one out."""
    document = json.loads(STATEMENT.signed(TEST_KEY)) | changes
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


def signature(key: SigningKey = TEST_KEY, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STATEMENT.signed(key))["signatures"][0]
    return found | changes


# --- the formats ------------------------------------------------------------------------------------------------------


def test_the_bytes_are_golden() -> None:
    payload = STATEMENT.canonical()
    assert payload == golden("statement.json", payload)
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    assert encoded == golden("statement.pae", encoded)
    signed = STATEMENT.signed(TEST_KEY)
    assert signed == golden("statement.dsse.json", signed)


def test_the_encoding_is_that_of_the_standard() -> None:
    """The test vector of DSSE's protocol.md."""
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pre_authentication_encoding("grüß", "ö".encode()) == "DSSEv1 6 grüß 2 ö".encode(), "lengths are of bytes"


def test_an_independent_library_verifies_what_we_sign() -> None:
    read = TheirEnvelope.from_dict(json.loads(STATEMENT.signed(TEST_KEY)))
    assert read.payload == STATEMENT.canonical()
    assert read.payload_type == PAYLOAD_TYPE
    assert list(read.verify([theirs(TEST_KEY.public)], 1)) == [TEST_KEY.public.id]
    with pytest.raises(VerificationError):
        read.verify([theirs(OTHER.public)], 1)


def test_we_verify_what_an_independent_library_signs() -> None:
    signer = CryptoSigner.generate_ed25519()
    made = TheirEnvelope(STATEMENT.canonical(), PAYLOAD_TYPE, {})
    made.sign(signer)
    read = parse(json.dumps(made.to_dict()).encode())
    key = PublicKey("theirs-1", bytes.fromhex(signer.public_key.keyval["public"]))
    assert read.signers([key, OTHER.public]) == {key}
    assert Statement.of(read) == STATEMENT


def test_an_independent_library_accepts_the_statement() -> None:
    message = json_format.Parse(STATEMENT.canonical(), statement_pb2.Statement())
    TheirStatement.copy_from_pb(message).validate()
    assert [subject.name for subject in message.subject] == [str(PATH), "bin/grüß"]
    assert dict(message.subject[1].digest) == {"sha256": "ab" * 32}
    assert message.predicate_type == STATEMENT.predicate_type
    assert json_format.MessageToDict(message.predicate)["greeting"] == "grüß dich"


def test_there_and_back() -> None:
    read = parse(STATEMENT.signed(TEST_KEY))
    assert (read.payload_type, read.payload) == (PAYLOAD_TYPE, STATEMENT.canonical())
    assert Statement.of(read) == STATEMENT
    assert STATEMENT.output == (PATH, NarHash.of(b"nar"))
    assert STATEMENT.files == {"bin/grüß": "ab" * 32}
    assert STATEMENT.signed(TEST_KEY) == STATEMENT.signed(TEST_KEY), "equal statements are equal bytes"


# --- who signed -------------------------------------------------------------------------------------------------------


def test_who_signed_is_found_by_key_bytes() -> None:
    read = parse(STATEMENT.signed(TEST_KEY))
    namesake = PublicKey(TEST_KEY.public.name, OTHER.public.raw)
    alias = PublicKey("another-name", TEST_KEY.public.raw)
    assert read.signers([namesake]) == frozenset()
    assert read.signers([alias]) == {alias}, "a name is nothing"
    assert len(read.signers([alias, TEST_KEY.public])) == 1, "one key under two names is one"
    assert read.signers([]) == frozenset()


def test_a_key_id_is_only_a_hint() -> None:
    lying = parse(envelope(signatures=[signature(OTHER, keyid=TEST_KEY.public.id)]))
    assert lying.signers([TEST_KEY.public, OTHER.public]) == {OTHER.public}
    for keyid in ("", None, "0" * 16):
        assert parse(envelope(signatures=[signature(keyid=keyid)])).signers([TEST_KEY.public]) == {TEST_KEY.public}
    without = {"sig": signature()["sig"]}
    assert parse(envelope(signatures=[without])).signers([TEST_KEY.public]) == {TEST_KEY.public}


def test_several_signatures_by_one_key_are_one() -> None:
    both = [signature(), signature(keyid="again"), signature(OTHER)]
    assert parse(envelope(signatures=both)).signers([TEST_KEY.public, OTHER.public]) == {TEST_KEY.public, OTHER.public}
    assert parse(envelope(signatures=[signature()] * dsse.MAX_SIGNATURES)).signers([TEST_KEY.public]) == {
        TEST_KEY.public
    }


def test_a_wrong_signature_beside_a_good_one_does_no_harm() -> None:
    wrong = base64.b64encode(bytes(64)).decode()
    short = base64.b64encode(b"short").decode()
    read = parse(envelope(signatures=[signature(sig=wrong), signature(sig=short), signature(sig=""), signature()]))
    assert read.signers([TEST_KEY.public]) == {TEST_KEY.public}


def test_the_payload_type_is_signed() -> None:
    """The same bytes, passed off as something else, are not signed, and no statement."""
    payload = STATEMENT.canonical()
    read = parse(envelope(payloadType="application/json"))
    assert read.signers([TEST_KEY.public]) == frozenset()
    other = parse(sign("application/json", payload, TEST_KEY))
    assert other.signers([TEST_KEY.public]) == {TEST_KEY.public}
    with pytest.raises(Malformed, match="no in-toto statement"):
        Statement.of(other)


def test_a_changed_payload_is_not_signed() -> None:
    changed = base64.b64encode(STATEMENT.canonical().replace(b"7", b"8")).decode()
    assert parse(envelope(payload=changed)).signers([TEST_KEY.public]) == frozenset()


def test_a_narinfo_signature_is_none_here() -> None:
    """What a key signs elsewhere starts differently, so it cannot be passed off as an envelope's."""
    text = TEST_KEY.sign(b"vzrepro:" + STATEMENT.canonical()).partition(":")[2]
    assert parse(envelope(signatures=[signature(sig=text)])).signers([TEST_KEY.public]) == frozenset()


# --- what is refused --------------------------------------------------------------------------------------------------

DEEP = b'{"payloadType":"t","signatures":[{"sig":"AAAA"}],"payload":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not an envelope"),
        (b"\xff", "not an envelope"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"payload":NaN}', "NaN is not JSON"),
        (DEEP, "nested too deeply"),
        (json.dumps({"payload": "x"}).encode("utf-16"), "not an envelope"),
        (b" " * (dsse.MAX_ENVELOPE + 1), "more than"),
        (envelope() + b"{}", "not an envelope"),
        (envelope().replace(b'"payload":', b'"payload":"","payload":'), "there twice"),
        (envelope().replace(b'"sig":', b'"sig":"","sig":'), "there twice"),
        (envelope(x="\ud800"), "surrogates"),
        (envelope(x=1).replace(b'"x": 1', b'"x": ' + b"9" * 5000), "not an envelope"),
        (envelope(payload=None), "payload is not base64"),
        (envelope(payload=7), "payload is not base64"),
        (envelope(payload="AAA"), "payload is not base64"),
        (envelope(payload="AAAA\n"), "payload is not base64"),
        (envelope(payload="ÄÄÄÄ"), "payload is not base64"),
        (envelope(payload="AA=A"), "payload is not base64"),
        (envelope(payloadType=None), "payloadType is not a text"),
        (envelope(payloadType=["a"]), "payloadType is not a text"),
        (envelope(signatures=None), "signatures"),
        (envelope(signatures=[]), "signatures"),
        (envelope(signatures={"0": signature()}), "signatures"),
        (envelope(signatures=["sig"]), "not an object"),
        (envelope(signatures=[{"keyid": "a"}]), "sig is not base64"),
        (envelope(signatures=[signature(sig="?")]), "sig is not base64"),
        (envelope(signatures=[signature(keyid=7)]), "keyid is not a text"),
        (envelope(signatures=[signature()] * (dsse.MAX_SIGNATURES + 1)), "signatures"),
    ],
)
def test_what_is_no_envelope_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse(data)
    assert why in f"{caught.value.message} {caught.value.reason}"
    assert caught.value.exit_code == 103


def test_other_fields_and_the_url_safe_alphabet_are_taken() -> None:
    payload = b'{"a":"\xc3\xbf\xc3\xbf\xc3\xbe?>"}'
    read = json.loads(sign("t", payload, TEST_KEY))
    assert set("+/") & set(read["payload"])
    read["payload"] = read["payload"].translate(str.maketrans("+/", "-_"))
    read["signatures"][0]["sig"] = read["signatures"][0]["sig"].translate(str.maketrans("+/", "-_"))
    read["comment"] = {"anything": [1.5]}
    assert parse(json.dumps(read).encode()).signers([TEST_KEY.public]) == {TEST_KEY.public}
    assert parse(json.dumps(read).encode()).payload == payload


def statement(**changes: Any) -> bytes:
    document = STATEMENT.document() | changes
    return json.dumps({name: value for name, value in document.items() if value is not None}).encode()


SUBJECT = STATEMENT.subjects[1].document()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        statement(_type=None),
        statement(_type="https://in-toto.io/Statement/v0.1"),
        statement(subject=None),
        statement(subject=[]),
        statement(subject=[SUBJECT, SUBJECT]),
        statement(subject=[{"name": "x"}]),
        statement(subject=[{"name": "x", "digest": {}}]),
        statement(subject=[{"name": "x", "digest": {"sha256": 7}}]),
        statement(subject=[{"name": "x", "digest": {"sha256": ""}}]),
        statement(subject=[{"name": 7, "digest": {"sha256": "ab"}}]),
        statement(subject=["x"]),
        statement(predicateType=None),
        statement(predicateType=""),
        statement(predicate=None),
        statement(predicate=[]),
        statement().replace(b'"predicate":', b'"predicate":{},"predicate":'),
    ],
)
def test_what_is_no_statement_is_refused(payload: bytes) -> None:
    with pytest.raises(Malformed):
        Statement.parse(payload)


def test_a_statement_about_several_outputs_names_none() -> None:
    whole = STATEMENT.subjects[0]
    two = Statement((whole, Subject("other", whole.digest)), "t", {})
    assert two.output is None
    assert Statement((Subject("not a path", whole.digest),), "t", {}).output is None
    assert Statement((Subject(str(PATH), {"narSha256": "short"}),), "t", {}).output is None


# --- subjects ---------------------------------------------------------------------------------------------------------


def test_subjects_are_the_whole_and_its_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").write_bytes(b"c")
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "link").symlink_to("a")
    whole, *files = subjects_of(PATH, NarHash.of(b"nar"), tmp_path)
    assert whole == Subject(str(PATH), {"narSha256": NarHash.of(b"nar").hex})
    assert [subject.name for subject in files] == ["a", "b/c"], "links are neither named nor followed"
    assert files[0].digest == {"sha256": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"}
    assert subjects_of(PATH, NarHash.of(b"nar"), None) == (whole,)


def test_an_output_that_is_one_file_goes_by_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "whatever"
    file.write_bytes(b"a")
    assert [subject.name for subject in file_subjects(file, "image-c")] == ["image-c"]


def test_many_files_and_odd_names_are_covered_by_the_whole(tmp_path: Path) -> None:
    for number in range(MAX_FILES):
        (tmp_path / f"{number}").write_bytes(b"")
    assert len(file_subjects(tmp_path, "x")) == MAX_FILES
    (tmp_path / "one more").write_bytes(b"")
    assert file_subjects(tmp_path, "x") == ()
    odd = tmp_path / "odd"
    odd.mkdir()
    Path(os.fsdecode(os.fsencode(odd) + b"/\xff")).write_bytes(b"")
    assert file_subjects(odd, "x") == ()


JUNK = st.recursive(
    st.sampled_from([None, True, -1, 1e400, 10**30, "", "a", "\ud800", "0" * 64, "e30=", "é"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["sig", "keyid", "name", "digest"]), inner)
    ),
    max_leaves=4,
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["payload", "payloadType", "signatures"]), JUNK, max_size=2))
def test_any_envelope_is_read_or_malformed(changes: dict[str, Any]) -> None:
    with contextlib.suppress(Malformed):
        assert parse(envelope(**changes)).signers([OTHER.public]) == set()


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["_type", "subject", "predicateType", "predicate"]), JUNK, max_size=2))
def test_any_statement_is_read_or_malformed(changes: dict[str, Any]) -> None:
    payload = json.dumps(STATEMENT.document() | changes).encode()
    with contextlib.suppress(Malformed):
        assert isinstance(Statement.parse(payload).output, tuple | None)
