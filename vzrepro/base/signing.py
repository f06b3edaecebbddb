"""Ed25519 keys and signatures in Nix's form: `name:base64`, one line each."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from vzrepro.base import disk
from vzrepro.base.errors import Untrusted, UsageError

_NAME = re.compile(r"[!-9;-~]{1,128}")  # other people's keys are called what they like
_MAX_KEY_FILE = 4096

MAX_PER_NAME = 8
"""Signatures in the name of one key that are looked at; several keys may have that name while one is replaced."""

_SMALL_ORDER = frozenset(
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)
"""The y coordinates of the points of order 1, 2, 4 and 8 in all their encodings (RFC 8032, 5.1.3). Under such a key
signatures are made without any secret. Nix refuses them through libsodium, OpenSSL does not."""


@dataclass(frozen=True, slots=True, order=True)
class PublicKey:
    """A public key: its name and its 32 bytes."""

    name: str
    raw: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read `name:base64`. Raises UsageError when it is something else, or a key that anybody can sign for."""
        key = cls(*_parsed(text, 32, "public key"))
        if key.is_weak:
            raise UsageError(
                f"the public key {key.name} is worth nothing",
                reason="it is a point of small order: anybody can make signatures that it verifies",
            )
        return key

    @property
    def is_weak(self) -> bool:
        """Whether these bytes are no key that a secret belongs to, but a point for which anybody can sign."""
        return self.raw[:31] + bytes(byte & 0x7F for byte in self.raw[31:]) in _SMALL_ORDER

    @property
    def id(self) -> str:
        """16 hex digits that tell this key from any other, whatever they are called; fit for file names."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def has_signed(self, message: bytes, signature: bytes) -> bool:
        """Whether these 64 bytes are this key's signature of `message`; what has another length is not, and a weak key
        has signed nothing."""
        if self.is_weak:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def __str__(self) -> str:
        return f"{self.name}:{base64.b64encode(self.raw).decode()}"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A secret key: its name and its 32 byte seed."""

    name: str
    _seed: bytes = field(repr=False)

    @classmethod
    def generate(cls, name: str) -> SigningKey:
        """A new key. Raises UsageError when the name is not fit for one."""
        return cls(_checked_name(name), os.urandom(32))

    @classmethod
    def parse(cls, text: str) -> SigningKey:
        """Read `name:base64` of seed and public key, 64 bytes, as `nix key generate-secret` writes it.

        Raises UsageError when it is something else or its halves do not belong together.
        """
        name, raw = _parsed(text, 64, "secret key")
        key = cls(name, raw[:32])
        if key.public.raw != raw[32:]:
            raise UsageError("the secret key is damaged", reason="its public half does not belong to its secret half")
        return key

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key file. Raises UsageError when it is missing, no key, or readable by others than its owner."""
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(_MAX_KEY_FILE).decode(errors="replace")
        except OSError as error:
            hint = f"make one: vzrepro key generate NAME --out {path}" if isinstance(error, FileNotFoundError) else None
            raise UsageError(f"cannot read the key file {path}", reason=error.strerror, hint=hint) from error
        if mode & 0o077:
            raise UsageError(
                f"the key file {path} is open to others",
                reason=f"its mode is {mode & 0o777:04o}",
                hint=f"chmod 600 {path}",
            )
        try:
            return cls.parse(text.strip())
        except UsageError as error:
            raise UsageError(f"{path}: {error.message}", reason=error.reason, hint=error.hint) from error

    def save(self, path: Path) -> bool:
        """Write the key to a new file, mode 0600; False, and nothing changed, when there is one. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            # Of two processes that make a key at once, the first one's stays.
            disk.write_file(path, f"{self.text}\n".encode(), mode=0o600, replace=False)
        except FileExistsError:
            return False
        return True

    @property
    def text(self) -> str:
        """The secret in Nix's form."""
        return f"{self.name}:{base64.b64encode(self._seed + self.public.raw).decode()}"

    @property
    def public(self) -> PublicKey:
        """The public key that belongs to this one."""
        return PublicKey(self.name, _private(self._seed).public_key().public_bytes_raw())

    def sign(self, message: bytes) -> str:
        """The signature of `message`, `name:base64`."""
        return f"{self.name}:{base64.b64encode(self.sign_raw(message)).decode()}"

    def sign_raw(self, message: bytes) -> bytes:
        """The signature of `message`, its 64 bytes alone."""
        return _private(self._seed).sign(message)


class TrustedKeys:
    """The public keys whose word counts, and how many of them must agree.

    Several may have one name, as while a key is being replaced. A revoked key never counts, whatever it is called
    and wherever else it is named. Keys are told apart by their bytes: one key under two names is one voice.
    """

    def __init__(self, keys: Iterable[PublicKey] = (), *, revoked: Iterable[PublicKey] = (), required: int = 1) -> None:
        self.revoked = tuple(dict.fromkeys(revoked))
        gone = {key.raw for key in self.revoked}
        self.keys = tuple(key for key in dict.fromkeys(keys) if key.raw not in gone)
        self.required = required

    def signers(self, message: bytes, signatures: Iterable[str]) -> frozenset[PublicKey]:
        """The trusted keys that have signed `message`; signatures by unknown keys and wrong ones do not count, nor do
        those after the first MAX_PER_NAME of one name.

        Raises UsageError for what does not have a signature's form.
        """
        return _signers(self.keys, message, signatures)

    def revoked_signers(self, message: bytes, signatures: Iterable[str]) -> frozenset[PublicKey]:
        """The revoked keys that have signed `message`, under whatever name."""
        return _signers(self.revoked, message, signatures, by_name=False)

    def is_void(self, message: bytes, signatures: Iterable[str]) -> bool:
        """Whether these signatures are no use to anybody: none is there, or none is good and one wrong in the name of
        a trusted key. Unknown keys, and too few signatures, are another matter.
        """
        signatures = tuple(signatures)
        names = {parse_signature(text)[0] for text in signatures}
        if names.isdisjoint(key.name for key in self.keys):
            return not names
        return not self.signers(message, signatures) and not self.revoked_signers(message, signatures)

    def verify(self, message: bytes, signatures: Iterable[str], what: str) -> frozenset[PublicKey]:
        """As `signers`, but raises Untrusted, with the reason, when too few trusted keys have signed `what`."""
        signatures = tuple(signatures)
        signers = self.signers(message, signatures)
        if signers and len(signers) >= self.required:
            return signers
        names = sorted({parse_signature(text)[0] for text in signatures})
        if signers:
            by = ", ".join(sorted(key.name for key in signers))
            raise Untrusted(
                f"{what} has too few trusted signatures",
                reason=f"wanted {self.required}, found {len(signers)}, by {by}",
                hint="have another builder push it too, or lower require-signatures",
            )
        revoked = sorted(key.name for key in self.revoked_signers(message, signatures))
        if revoked:
            raise Untrusted(f"{what} is signed by a revoked key", reason=f"{', '.join(revoked)} is in revoked-keys")
        wrong = sorted({key.name for key in self.keys} & set(names))
        if wrong:
            raise Untrusted(f"{what} has a wrong signature", reason=f"it claims to be by {', '.join(wrong)}")
        raise Untrusted(
            f"{what} is not signed by a trusted key",
            reason=f"it is signed by {', '.join(names)}" if names else "it has no signature",
            hint="add the public key to trusted-keys, if its owner may give you binaries",
        )


def parse_signature(text: str) -> tuple[str, bytes]:
    """Split `name:base64` into the key's name and the 64 bytes. Raises UsageError when it is something else."""
    return _parsed(text, 64, "signature")


def _signers(
    keys: Iterable[PublicKey], message: bytes, signatures: Iterable[str], *, by_name: bool = True
) -> frozenset[PublicKey]:
    found: dict[bytes, PublicKey] = {}
    seen: Counter[str] = Counter()
    for text in signatures:
        name, raw = parse_signature(text)
        seen[name] += 1
        if by_name and seen[name] > MAX_PER_NAME:
            continue
        for key in keys:
            if key.raw not in found and (key.name == name or not by_name) and _is_valid(key, raw, message):
                found[key.raw] = key
    return frozenset(found.values())


def _parsed(text: str, size: int, what: str) -> tuple[str, bytes]:
    name, colon, encoded = text.partition(":")
    raw = b""
    with contextlib.suppress(binascii.Error, ValueError):
        raw = base64.b64decode(encoded, validate=True)
    if not colon or len(raw) != size:
        # Never the text itself: it may be a secret.
        raise UsageError(f"this is not a {what}", reason=f"it should be <name>:<base64 of {size} bytes>")
    return _checked_name(name), raw


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a name for a key", hint="use 1 to 128 printable ASCII characters, no blank, no colon"
        )
    return name


@cache
def _private(seed: bytes) -> Ed25519PrivateKey:
    """Deriving it costs more than a signature, and every object has two."""
    return Ed25519PrivateKey.from_private_bytes(seed)


@lru_cache(1024)  # a push judges a narinfo more than once
def _is_valid(key: PublicKey, signature: bytes, message: bytes) -> bool:
    return key.has_signed(message, signature)
