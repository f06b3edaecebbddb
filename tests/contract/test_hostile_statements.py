"""What is found below `attest/` and `build/` of a hostile cache: values of other types, texts that forge tables,
records of other objects, strangers in numbers. Whoever reads them goes on with what is sound."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.caches import new_cache
from tests.contract.memory import MemoryBackend
from tests.contract.test_binary_cache import KEY, STRANGER, Warnings, make
from vzrepro.base.model import BuildKey, Derivation, DrvHash, FileHash
from vzrepro.cache import CacheReader, PublicKey, TrustedKeys
from vzrepro.cache.records import attestation_key, build_key_record, differences_prefix
from vzrepro.console import aligned
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.challenge import Challenge, ResultState, challenge
from vzrepro.proof.attest.provenance import BUILD_TYPE, PREDICATE_TYPE
from vzrepro.proof.attest.signers import Keys
from vzrepro.proof.attest.statement import PAYLOAD_TYPE, STATEMENT_TYPE
from vzrepro.recipe.graph import Node

DIGITS = ["a"] * 64
"""64 hex digits, but in a list."""


class Place:
    """An honest builder's cache of one object, which somebody else writes to as well."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.backend = MemoryBackend()
        self.made = make(root)
        self.push("hello\n", KEY)
        assert self.made.info.drv_hash is not None
        assert self.made.info.build_key is not None
        self.drv_hash: DrvHash = self.made.info.drv_hash
        self.build_key: BuildKey = self.made.info.build_key

    def push(self, content: str, key: Any, salt: str = "") -> None:
        new = content != "hello\n" or salt
        made = make(self.root, content=content.encode(), salt=salt) if new else self.made
        cache = new_cache(self.backend, TrustedKeys([KEY.public, STRANGER.public]), key)
        cache.push(made.info, made.tree, derivation=made.derivation, log=made.log)

    def cache(self, warnings: Warnings | None = None) -> CacheReader:
        return CacheReader(self.backend, TrustedKeys([KEY.public, STRANGER.public]), warn=warnings or Warnings())

    def compared(self, *revoked: PublicKey) -> Challenge:
        """A challenge of the object. The honest builder's row must be there, whatever else is."""
        drv = Derivation(name="hello", builder="sandbox")
        node = Node("hello", "build", "recipes/x.py:1", "", drv, self.drv_hash, self.made.info.path)
        keys = Keys(trusted=(KEY.public, STRANGER.public), revoked=revoked)
        found = challenge([node], [self.cache()], keys, {}, lambda _node: None)
        assert any(row.builder == KEY.name for row in found.rows)
        return found

    def put_envelope(self, statement: dict[str, Any], *keyids: str) -> None:
        signatures = [{"keyid": keyid, "sig": ""} for keyid in keyids]
        payload = base64.b64encode(json.dumps(statement).encode()).decode()
        envelope = {"payload": payload, "payloadType": PAYLOAD_TYPE, "signatures": signatures}
        data = json.dumps(envelope).encode()
        self.backend.put(attestation_key(self.drv_hash, data), data)

    def put_record(self, record: bytes) -> None:
        """A record of a difference."""
        self.backend.put(f"{differences_prefix(self.drv_hash.hex)}{'0' * 16}/{FileHash.of(record)}.json", record)

    def provenance(self, **inner: object) -> dict[str, Any]:
        """The predicate of nobody's provenance of the object, with another result."""
        subject = {"name": str(self.made.info.path), "digest": {"narSha256": "e" * 64}}
        internal = {"drvHash": self.drv_hash.hex, "buildKey": self.build_key.hex, **inner}
        definition = {"buildType": BUILD_TYPE, "internalParameters": internal}
        return {
            "_type": STATEMENT_TYPE,
            "subject": [subject],
            "predicateType": PREDICATE_TYPE,
            "predicate": {"buildDefinition": definition, "runDetails": {"metadata": {}}},
        }


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nar_size", 1e400),
        ("nar_size", "1"),
        ("nar_size", True),
        ("nar_size", -1),
        ("path", 7),
        ("path", None),
        ("nar_hash", DIGITS),
        ("build_key", DIGITS),
        ("drv_hash", 7),
        ("drv_hash", None),
    ],
)
def test_a_build_record_with_another_type_of_value_is_a_miss(place: Place, field: str, value: object) -> None:
    key = build_key_record(place.build_key)
    record = json.loads(place.backend.entries[key])
    record["realization"][field] = value
    place.backend.put(key, json.dumps(record).encode())
    warnings = Warnings()
    assert place.cache(warnings).by_build_key(place.build_key) is None
    assert "malformed" in warnings.lines[0]
    assert place.compared().splits == ()


@pytest.mark.parametrize("inner", [{"buildKey": DIGITS}, {"drvHash": DIGITS}, {"buildKey": 7}, {"drvHash": None}])
def test_provenance_with_another_type_of_value_is_none(place: Place, inner: dict[str, object]) -> None:
    place.put_envelope(place.provenance(**inner), "0" * 16)
    assert place.compared().splits == ()


@pytest.mark.parametrize("value", [DIGITS, 7, None, "e" * 63])
def test_a_difference_with_another_type_of_value_is_none(place: Place, value: object) -> None:
    statement = {"type": "not-deterministic", "path": str(place.made.info.path)}
    statement |= {"kept": {"nar_hash": "e" * 64}, "found": {"nar_hash": value}}  # type: ignore[dict-item]
    place.put_record(json.dumps({"statement": statement, "signatures": []}).encode())
    assert place.compared().splits == ()


def test_a_difference_of_another_object_is_not_about_this_one(place: Place) -> None:
    """A signed record stays true; copied below another derivation it would blame who signed it."""
    place.push("one\n", KEY, salt="another derivation")
    place.push("two\n", STRANGER, salt="another derivation")
    [record] = [data for key, data in place.backend.entries.items() if b"not-deterministic" in data]
    place.put_record(record)
    found = place.compared()
    assert found.splits == ()
    assert [row.builder for row in found.rows] == [KEY.name]


def test_what_a_revoked_key_has_signed_is_shown_and_no_majority(place: Place) -> None:
    envelope = dsse.sign(PAYLOAD_TYPE, json.dumps(place.provenance()).encode(), STRANGER)
    place.backend.put(attestation_key(place.drv_hash, envelope), envelope)
    assert {row.state for row in place.compared().rows} == {ResultState.DIFFERENT}, "between two builders it is a tie"
    found = place.compared(PublicKey("another name", STRANGER.public.raw))
    rows = {row.builder: row.state for row in found.rows}
    assert rows == {KEY.name: ResultState.SAME, f"{STRANGER.name} (revoked)": ResultState.DIFFERENT}


def test_a_stranger_cannot_write_rows_of_the_table(place: Place) -> None:
    place.put_envelope(place.provenance(), "x\nhello  ours-1  eeeeeeeeeeee  same", "y\x1b[2J", "z\u202e")
    strangers = [row.builder for row in place.compared().rows if row.builder.endswith(" (unknown)")]
    assert len(strangers) == 3
    assert all(name.isprintable() for name in strangers)


@pytest.mark.parametrize("cell", ["a\nb", "a\tb", "a\r\nb", "a\u2028b", "a\u202eb"])
def test_a_cell_is_one_line(cell: str) -> None:
    lines = aligned(("one", "two"), [(cell, "c")])
    assert len(lines) == 2
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert lines[1].isprintable()
