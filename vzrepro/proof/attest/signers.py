"""Who has signed something, and what they are to this machine.

Signatures have two forms, a DSSE envelope's and Nix's (`name:base64`). Whose they are is concluded here alone, from the
bytes of keys: key ids and names in them are hints that anybody can write.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from vzrepro.base.signing import PublicKey, TrustedKeys, parse_signature
from vzrepro.proof.attest.dsse import Envelope


class SignerStanding(enum.StrEnum):
    """What a signer is to this machine."""

    OWN = "own"
    """This machine's or this user's own key."""
    TRUSTED = "trusted"
    REVOKED = "revoked"
    UNKNOWN = "unknown"
    """Nobody that is known here: the key id or the name is what the signature claims."""
    FORGED = "forged"
    """It is in the name of a key that is known here, which has not signed it."""


@dataclass(frozen=True, slots=True)
class Signer:
    """Who has signed something, or is said to have. `name` is the known key's, else what the signature says, None where
    it says none; `keyid` is empty where a signature has none. `key` is None for who has not signed, or is not known."""

    name: str | None
    keyid: str
    standing: SignerStanding
    key: PublicKey | None = None


@dataclass(frozen=True, slots=True)
class Keys:
    """The public keys that are known here. A key is told by its bytes: revoked under one name, it is under all."""

    own: tuple[PublicKey, ...] = ()
    trusted: tuple[PublicKey, ...] = ()
    revoked: tuple[PublicKey, ...] = ()

    @property
    def all(self) -> tuple[PublicKey, ...]:
        """All of them."""
        return (*self.own, *self.trusted, *self.revoked)

    def standing(self, key: PublicKey) -> SignerStanding:
        """What a key is here. A revoked one is nothing else."""
        if key.raw in {each.raw for each in self.revoked}:
            return SignerStanding.REVOKED
        return SignerStanding.OWN if key.raw in {each.raw for each in self.own} else SignerStanding.TRUSTED

    def signers(self, envelope: Envelope) -> tuple[Signer, ...]:
        """Whose signatures an envelope has: those that are right first, then what the others claim, each once."""
        found = [self._known(key) for key in sorted(envelope.signers(self.all))]
        seen = {each.keyid for each in found}
        names = {key.id: key.name for key in self.all}
        for keyid, _ in envelope.signatures:
            if keyid not in seen:
                seen.add(keyid)
                found.append(
                    Signer(names.get(keyid), keyid, SignerStanding.FORGED if keyid in names else SignerStanding.UNKNOWN)
                )
        return tuple(found)

    def nix_signers(self, message: bytes, signatures: Iterable[str]) -> tuple[Signer, ...]:
        """The same for signatures of `message` in Nix's form, where a key counts under its own name alone.

        Raises UsageError for what does not have a signature's form.
        """
        known = TrustedKeys(self.all)
        names = {key.name for key in self.all}
        found: list[Signer] = []
        for text in signatures:
            keys = known.signers(message, [text])
            name, _ = parse_signature(text)
            found += map(self._known, sorted(keys))
            if not keys:
                found.append(Signer(name, "", SignerStanding.FORGED if name in names else SignerStanding.UNKNOWN))
        return tuple(found)

    def _known(self, key: PublicKey) -> Signer:
        return Signer(key.name, key.id, self.standing(key), key)
