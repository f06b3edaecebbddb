"""Whose a signature is, in both of its forms: own, trusted, revoked, unknown or forged."""

from __future__ import annotations

import base64
from dataclasses import replace

import pytest

from vzrepro.base.signing import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.dsse import Envelope
from vzrepro.proof.attest.signers import Keys, Signer, SignerStanding

OWN, TEAM, GONE, STRANGER = (SigningKey.generate(f"{name}-1") for name in ("own", "team", "gone", "stranger"))
KEYS = Keys((OWN.public,), (TEAM.public,), (GONE.public,))
TYPE, PAYLOAD = "text/plain", b"what is signed"


def envelope(*signatures: tuple[str, SigningKey | None]) -> Envelope:
    """An envelope with a signature for each key id, by the key; None: by nobody."""
    return Envelope(
        TYPE,
        PAYLOAD,
        tuple(
            (keyid, bytes(64) if key is None else key.sign_raw(dsse.pre_authentication_encoding(TYPE, PAYLOAD)))
            for keyid, key in signatures
        ),
    )


def known(key: SigningKey, standing: SignerStanding) -> Signer:
    return Signer(key.name, key.public.id, standing, key.public)


OURS = [(OWN, SignerStanding.OWN), (TEAM, SignerStanding.TRUSTED), (GONE, SignerStanding.REVOKED)]


@pytest.mark.parametrize(("key", "standing"), OURS)
def test_who_has_signed_is_known_by_the_bytes_of_the_key(key: SigningKey, standing: SignerStanding) -> None:
    for keyid in (key.public.id, "", "whatever"):
        first, *others = KEYS.signers(envelope((keyid, key)))
        assert first == known(key, standing)
        assert [each.standing for each in others] == [SignerStanding.UNKNOWN] * (keyid != key.public.id)
    assert KEYS.nix_signers(PAYLOAD, [key.sign(PAYLOAD)]) == (known(key, standing),)


@pytest.mark.parametrize("key", [key for key, _ in OURS])
def test_who_has_not_signed_in_its_own_name_is_forged(key: SigningKey) -> None:
    forger = Signer(key.name, key.public.id, SignerStanding.FORGED)
    assert KEYS.signers(envelope((key.public.id, None))) == (forger,)
    assert KEYS.signers(envelope((key.public.id, STRANGER))) == (forger,)
    text = f"{key.name}:{base64.b64encode(STRANGER.sign_raw(PAYLOAD)).decode()}"
    assert KEYS.nix_signers(PAYLOAD, [text]) == (Signer(key.name, "", SignerStanding.FORGED),)
    assert KEYS.nix_signers(b"something else", [key.sign(PAYLOAD)]) == (Signer(key.name, "", SignerStanding.FORGED),)


def test_a_stranger_has_no_key_here() -> None:
    assert KEYS.signers(envelope((STRANGER.public.id, STRANGER))) == (
        Signer(None, STRANGER.public.id, SignerStanding.UNKNOWN),
    )
    assert KEYS.nix_signers(PAYLOAD, [STRANGER.sign(PAYLOAD)]) == (Signer("stranger-1", "", SignerStanding.UNKNOWN),)


def test_what_is_revoked_is_nothing_else() -> None:
    renamed = replace(GONE.public, name="renamed")
    for keys in (Keys((renamed,), (), (GONE.public,)), Keys((), (renamed,), (GONE.public,))):
        [signer] = keys.signers(envelope((GONE.public.id, GONE)))
        assert (signer.name, signer.standing) == ("renamed", SignerStanding.REVOKED)


def test_each_is_named_once_those_that_have_signed_first() -> None:
    signatures = [("x", None), (TEAM.public.id, TEAM), ("x", None), (TEAM.public.id, None), (OWN.public.id, None)]
    assert KEYS.signers(envelope(*signatures)) == (
        known(TEAM, SignerStanding.TRUSTED),
        Signer(None, "x", SignerStanding.UNKNOWN),
        Signer(OWN.name, OWN.public.id, SignerStanding.FORGED),
    )


def test_of_two_keys_of_one_name_each_counts() -> None:
    other = SigningKey.generate(TEAM.name)
    keys = Keys(trusted=(TEAM.public, other.public))
    texts = [other.sign(PAYLOAD), TEAM.sign(PAYLOAD)]
    assert [each.key for each in keys.nix_signers(PAYLOAD, texts)] == [other.public, TEAM.public]
