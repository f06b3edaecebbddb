"""DSSE envelopes, version 1: a payload, its type, and signatures over both.

The format is that of https://github.com/secure-systems-lab/dsse (`protocol.md`, `envelope.md`). Envelopes that are
written here are canonical JSON, so an equal statement by an equal key is equal bytes. Envelopes that are read are
distrusted: their size, their JSON and their base64 are checked, and who signed is found by key bytes alone. Key ids
in them are hints that anybody can write, so nothing is concluded from them.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vzrepro.base.errors import Untrusted
from vzrepro.base.model import canonical_json
from vzrepro.base.signing import PublicKey, SigningKey

MAX_ENVELOPE = 1 << 20
"""Bytes of the largest envelope that is read."""

MAX_SIGNATURES = 16
"""More signatures than these are in no envelope that is read: each is tried with every key."""


class Malformed(Untrusted):
    """An envelope or a statement that is not one, and so says nothing."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """What somebody signed: the payload's type and bytes, and the signatures as (key id, signature), neither of which
    is believed before `signers` has looked."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    def signers(self, keys: Iterable[PublicKey]) -> frozenset[PublicKey]:
        """Which of `keys` have signed exactly this type and payload, whatever key ids the signatures carry.

        Keys are told apart by their bytes: one under two names, or with two signatures, is one.
        """
        message = pre_authentication_encoding(self.payload_type, self.payload)
        found: dict[bytes, PublicKey] = {}
        for key in keys:
            if key.raw not in found and any(key.has_signed(message, raw) for _, raw in self.signatures):
                found[key.raw] = key
        return frozenset(found.values())


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What is signed: `DSSEv1 <length> <type> <length> <payload>`, lengths in bytes and in ASCII decimal."""
    kind = payload_type.encode()
    return b" ".join((b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload))


def sign(payload_type: str, payload: bytes, key: SigningKey) -> bytes:
    """The envelope's bytes: one line of canonical JSON, without its end. The key id is `PublicKey.id`."""
    signature = key.sign_raw(pre_authentication_encoding(payload_type, payload))
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": key.public.id, "sig": base64.b64encode(signature).decode()}],
        }
    )


def parse(data: bytes) -> Envelope:
    """Read an envelope. Raises Malformed when it is none, is larger than MAX_ENVELOPE, or has no signature at all.

    As DSSE wants it, other fields are ignored, a key id may be missing, and base64 may be the URL-safe one.
    """
    if len(data) > MAX_ENVELOPE:
        raise Malformed("this envelope is too large", reason=f"it has more than {MAX_ENVELOPE} bytes")
    document = load_object(data, "an envelope")
    payload_type, signatures = document.get("payloadType"), document.get("signatures")
    if not isinstance(payload_type, str):
        raise Malformed("this envelope is malformed", reason="payloadType is not a text")
    if not isinstance(signatures, list) or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise Malformed("this envelope is malformed", reason=f"wanted 1 to {MAX_SIGNATURES} signatures")
    return Envelope(payload_type, _base64(document.get("payload"), "payload"), tuple(map(_signature, signatures)))


def load_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `data` is. Raises Malformed, saying that it is not `what`, for anything else.

    Stricter than JSON: UTF-8 only, no name twice in an object (two readers would take different ones), no NaN, no lone
    surrogates, no nesting that only a deep stack can follow.
    """
    try:
        document = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Malformed(f"this is not {what}", reason=reason[:200]) from error
    if not isinstance(document, dict):
        raise Malformed(f"this is not {what}", reason="it is not a JSON object")
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _signature(document: object) -> tuple[str, bytes]:
    if not isinstance(document, dict):
        raise Malformed("this envelope is malformed", reason="a signature is not an object")
    keyid = document.get("keyid")
    if not isinstance(keyid, str | None):
        raise Malformed("this envelope is malformed", reason="a keyid is not a text")
    return keyid or "", _base64(document.get("sig"), "sig")


def _base64(text: object, what: str) -> bytes:
    if isinstance(text, str):
        try:
            # The URL-safe letters become the others; whatever else is not base64's is refused.
            return base64.b64decode(text.encode("ascii").translate(_STANDARD), validate=True)
        except (binascii.Error, ValueError):
            pass
    raise Malformed("this envelope is malformed", reason=f"{what} is not base64")


_STANDARD = bytes.maketrans(b"-_", b"+/")
