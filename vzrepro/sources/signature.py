"""Signatures beside a file: OpenPGP (RFC 9580) and minisign (its file formats are in minisign's documentation).

They are looked at once, when `vzrepro lock` pins a file: from then on the file's hash says what the signature said.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import NoReturn

import pysequoia

from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.base.signing import PublicKey

_MINISIGN = (b"untrusted comment:", b"RW")
"""How minisign's public keys begin, with and without their comment."""


def verify(file: Path, signature: bytes, keys: bytes, what: str, key_file: str) -> str:
    """Who has signed `file`: a fingerprint, or minisign's key id.

    `keys` are OpenPGP certificates, armored or not, or a minisign public key; `what` and `key_file` stand in errors.
    Raises UsageError when the keys cannot be read, Untrusted unless `signature` is by one of them over these bytes.
    """
    return (_minisign if keys.startswith(_MINISIGN) else _openpgp)(file, signature, keys, what, key_file)


def first_line(error: BaseException) -> str:
    """What pysequoia says, without the backtrace that it appends."""
    return str(error).strip().partition("\n")[0]


def _openpgp(file: Path, signature: bytes, keys: bytes, what: str, key_file: str) -> str:
    try:
        certificates = pysequoia.Cert.split_bytes(keys)
        if not certificates:
            raise RuntimeError("It is empty.")
        known = ", ".join(certificate.fingerprint for certificate in certificates)
    except RuntimeError as error:
        raise UsageError(
            f"{key_file} holds no keys that can be read",
            reason=first_line(error),
            hint="it is to be OpenPGP certificates (gpg --export KEY), or a minisign public key",
        ) from error
    try:
        signatures = pysequoia.Sig.from_bytes(signature)
        result = pysequoia.verify(file=str(file), store=lambda _key_ids: certificates, signature=signatures)
    except (RuntimeError, ValueError, TypeError) as error:
        _untrusted(what, f"{first_line(error)} {key_file} has {known}.")
    found = [each.certificate for each in result.valid_sigs]
    if not found:
        _untrusted(what, f"no signature is by a key of {key_file}, which has {known}")
    return str(found[0])


def _minisign(file: Path, signature: bytes, keys: bytes, what: str, key_file: str) -> str:
    try:
        algorithm, key_id, raw = _parts(keys.splitlines()[keys.startswith(_MINISIGN[0])], 32)
        if algorithm != b"Ed":
            raise ValueError("its algorithm is not Ed25519")
    except (ValueError, IndexError) as error:
        raise UsageError(f"{key_file} is no minisign public key", reason=str(error)) from error
    key = PublicKey(f"minisign-{key_id[::-1].hex().upper()}", raw)
    try:
        lines = signature.splitlines()
        algorithm, signer, signed = _parts(lines[1], 64)
        comment, over_comment = lines[2].removeprefix(b"trusted comment: "), base64.b64decode(lines[3], validate=True)
        if not lines[2].startswith(b"trusted comment: ") or algorithm not in (b"Ed", b"ED"):
            raise ValueError("it has no trusted comment, or another algorithm")
    except (ValueError, IndexError) as error:
        _untrusted(what, f"its signature is not one of minisign's: {error}")
    if signer != key_id:
        _untrusted(what, f"it is signed by key {signer[::-1].hex().upper()}, {key_file} has {key.name[9:]}")
    with file.open("rb") as stream:
        # ED signs the file's BLAKE2b-512, the older Ed the file itself.
        message = hashlib.file_digest(stream, hashlib.blake2b).digest() if algorithm == b"ED" else stream.read()
    if not key.has_signed(message, signed) or not key.has_signed(signed + comment, over_comment):
        _untrusted(what, f"its signature in the name of {key.name[9:]} is wrong")
    return key.name


def _parts(line: bytes, size: int) -> tuple[bytes, bytes, bytes]:
    """Algorithm (2 bytes), key id (8) and key or signature that a line of minisign's holds."""
    try:
        raw = base64.b64decode(line, validate=True)
    except binascii.Error as error:
        raise ValueError("a line is not base64") from error
    if len(raw) != 10 + size:
        raise ValueError(f"a line holds {len(raw)} bytes, not {10 + size}")
    return raw[:2], raw[2:10], raw[10:]


def _untrusted(what: str, reason: str) -> NoReturn:
    raise Untrusted(
        f"{what} is not signed by a key that the recipe names",
        reason=reason,
        hint="another file or another key than upstream's: compare both with what upstream publishes",
    )
