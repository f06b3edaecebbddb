"""The signed records beside the narinfos: what a build key gave (`build/`), and what somebody states (`attest/`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vzrepro.base.errors import UsageError
from vzrepro.base.model import (
    FORMAT,
    BuildKey,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    Realization,
    StorePath,
    canonical_json,
    store_path,
)
from vzrepro.base.signing import SigningKey, TrustedKeys, parse_signature
from vzrepro.cache.backend import Damaged
from vzrepro.cache.narinfo import MAX_SIGNATURES, NarInfo, own_message

MAX_RECORD = 1 << 16
"""Bytes of the largest record that is read."""

MAX_ATTESTATION = 1 << 20
"""Bytes of the largest attestation that is read."""

MAX_ATTESTATIONS = 4096
"""Entries about one derivation beyond this number are not looked at."""

INDEX = "index.json"
"""The name of the entry that lists the others about one derivation, for places that cannot be listed."""

_KEYID = re.compile(r"[0-9a-f]{16}")
_ENTRY = re.compile(r"[0-9a-f]{16}/[0-9a-f]{64}\.json")


def build_key_record(key: BuildKey) -> str:
    """The key of a build key's record in a cache."""
    return f"build/{key}.json"


def differences_prefix(subject: str) -> str:
    """Below which keys a cache keeps what is stated about a derivation: attestations, and who got other bytes.

    `subject` is the derivation's hash in hex or, where that is not known, the hash part of the store path.
    """
    return f"attest/{subject}/"


def signed_realization(realization: Realization, signer: SigningKey) -> bytes:
    """The bytes of a `build/` record."""
    signature = signer.sign(_realization_message(realization))
    return canonical_json({"format": FORMAT, "realization": realization.document(), "signatures": [signature]})


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """A `build/` record as it was found: what it says, and who says so."""

    realization: Realization
    signatures: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes, place: str) -> BuildRecord:
        """Read a record that was found in `place`. Raises Damaged when it is malformed."""
        try:
            document = json.loads(data)
            made = document["realization"]
            realization = Realization(
                build_key=BuildKey(made["build_key"]),
                drv_hash=DrvHash(made["drv_hash"]),
                path=StorePath.parse(str(made["path"])),
                nar_hash=NarHash(made["nar_hash"]),
                nar_size=_size(made["nar_size"]),
            )
            signatures = tuple(str(text) for text in document["signatures"])
            if len(signatures) > MAX_SIGNATURES:
                raise ValueError(f"it has more than {MAX_SIGNATURES} signatures")
            for text in signatures:
                parse_signature(text)
            if store_path(realization.drv_hash, realization.path.name) != realization.path:
                raise ValueError("its path is not that of its derivation")
        except (ValueError, KeyError, TypeError, UsageError, RecursionError) as error:
            raise Damaged(f"a build record in {place} is malformed", reason=str(error)) from error
        return cls(realization, signatures)

    @property
    def message(self) -> bytes:
        """What the signatures are over."""
        return _realization_message(self.realization)


@dataclass(frozen=True, slots=True)
class DifferenceRecord:
    """Somebody's statement that the same derivation gave other bytes than those the cache keeps: by which key, whether
    its signature is that of a trusted key, and both NAR hashes."""

    by: str
    trusted: bool
    kept: NarHash
    found: NarHash


def signed_difference(info: ObjectInfo, existing: NarInfo, signer: SigningKey) -> tuple[str, bytes]:
    """Key and bytes of the record that `info` was made here while the cache keeps `existing`."""
    statement: dict[str, Any] = {
        "format": FORMAT,
        "type": "not-deterministic",
        "path": str(info.path),
        "drv_hash": info.drv_hash and info.drv_hash.hex,
        "build_key": info.build_key and info.build_key.hex,
        "kept": {
            "nar_hash": existing.nar_hash.hex,
            "nar_size": existing.nar_size,
            "signatures": list(existing.signatures),
        },
        "found": {"nar_hash": info.nar_hash.hex, "nar_size": info.nar_size},
    }
    signature = signer.sign(own_message(statement))
    record = canonical_json({"format": FORMAT, "statement": statement, "signatures": [signature]})
    prefix = differences_prefix(info.drv_hash.hex if info.drv_hash is not None else info.path.hash_part)
    return f"{prefix}{signer.public.id}/{FileHash.of(record)}.json", record


def read_difference(data: bytes, path: StorePath, trusted: TrustedKeys) -> DifferenceRecord | None:
    """Read an `attest/` record; None when it is another kind of record, malformed, or about another object than `path`,
    as one is that somebody has copied here."""
    try:
        document = json.loads(data)
        statement, signatures = document["statement"], [str(text) for text in document["signatures"][:MAX_SIGNATURES]]
        if statement["type"] != "not-deterministic" or statement["path"] != str(path):
            return None
        kept, found = NarHash(statement["kept"]["nar_hash"]), NarHash(statement["found"]["nar_hash"])
        by = ", ".join(sorted({parse_signature(text)[0] for text in signatures}))
        signers = trusted.signers(own_message(statement), signatures)
    except (ValueError, KeyError, TypeError, UsageError, RecursionError):
        return None
    return DifferenceRecord(by, bool(signers), kept, found)


def attestation_key(drv_hash: DrvHash, envelope: bytes) -> str:
    """The key of a DSSE envelope about a derivation: by the key id that it carries and its own hash.

    Nothing is believed of it; a key id that is not one of ours is hashed, so that it fits. Raises UsageError when it is
    no envelope, or too large to be read again.
    """
    try:
        document = json.loads(envelope)
        keyid = str(document["signatures"][0].get("keyid"))
        sound = isinstance(document["payload"], str) and isinstance(document["payloadType"], str)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        sound, keyid = False, ""
    if not sound or len(envelope) > MAX_ATTESTATION:
        raise UsageError("this is not an attestation", reason="wanted: a signed DSSE envelope of at most 1 MiB")
    folder = keyid if _KEYID.fullmatch(keyid) else FileHash.of(keyid.encode(errors="replace")).hex[:16]
    return f"{differences_prefix(drv_hash.hex)}{folder}/{FileHash.of(envelope)}.json"


def is_attestation(data: bytes) -> bool:
    """Whether an `attest/` entry may be an envelope rather than a record of a difference."""
    try:
        return "payload" in json.loads(data)
    except (ValueError, TypeError, RecursionError):
        return False


def statements_index(entries: Iterable[str]) -> bytes:
    """The bytes of the index of the entries about one derivation, whose keys are given without its prefix."""
    return canonical_json({"format": FORMAT, "entries": sorted(each for each in entries if _ENTRY.fullmatch(each))})


def read_index(data: bytes) -> list[str]:
    """What an index lists, without what cannot be an entry; nothing when it is malformed."""
    try:
        entries = json.loads(data)["entries"]
        return sorted({each for each in entries if isinstance(each, str) and _ENTRY.fullmatch(each)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return []


def is_intact(key: str, data: bytes) -> bool:
    """Whether an `attest/` entry has the content that its name says."""
    return key.endswith(f"/{FileHash.of(data)}.json")


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _realization_message(realization: Realization) -> bytes:
    return own_message({"format": FORMAT, "type": "realization", "realization": realization.document()})
