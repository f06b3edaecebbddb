"""Keys and signatures in Nix's form."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.cache import PublicKey, SigningKey, TrustedKeys

# RFC 8032, section 7.1, test 2: seed, public key, message, signature.
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.parse(f"team-1:{b64(SEED + PUBLIC)}")


def test_keys_and_signatures_are_those_of_the_standard(key: SigningKey) -> None:
    assert key.public == PublicKey("team-1", PUBLIC)
    assert str(key.public) == f"team-1:{b64(PUBLIC)}"
    assert key.sign(b"\x72") == f"team-1:{b64(SIGNATURE)}"
    assert key.text == f"team-1:{b64(SEED + PUBLIC)}"
    assert PublicKey.parse(str(key.public)) == key.public


def test_a_secret_is_not_shown(key: SigningKey) -> None:
    assert b64(SEED)[:20] not in repr(key)
    assert repr(SEED) not in repr(key)
    with pytest.raises(UsageError) as caught:
        SigningKey.parse(f"team-1:{b64(SEED)}")
    assert b64(SEED)[:20] not in str(caught.value)


def test_generated_keys_differ() -> None:
    one, two = SigningKey.generate("a"), SigningKey.generate("a")
    assert one.public != two.public
    assert one.public.id != two.public.id
    assert len(one.public.id) == 16


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\n", "ü", "x" * 129])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        SigningKey.generate(name)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", "a:!!!!", f"a:{b64(PUBLIC)}=", f"a:{b64(PUBLIC + b'x')}", f":{b64(PUBLIC)}", "a:ü"]
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        PublicKey.parse(text)


def test_halves_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(UsageError, match="damaged"):
        SigningKey.parse(f"a:{b64(SEED + bytes(32))}")


def test_key_files_are_private_and_never_overwritten(tmp_path: Path, key: SigningKey) -> None:
    path = tmp_path / "keys" / "key"
    assert key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not SigningKey.generate("other").save(path)
    assert SigningKey.load(path) == key
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]


def test_a_key_file_open_to_others_is_refused(tmp_path: Path, key: SigningKey) -> None:
    path = tmp_path / "key"
    key.save(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="open to others") as caught:
        SigningKey.load(path)
    assert f"chmod 600 {path}" in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent"):
        SigningKey.load(tmp_path / "absent")


def test_one_good_signature_suffices(key: SigningKey) -> None:
    other = SigningKey.generate("other")
    trusted = TrustedKeys([key.public])
    assert trusted.verify(b"m", [other.sign(b"m"), key.sign(b"m")], "it") == {key.public}


def test_several_signers_are_all_found(key: SigningKey) -> None:
    successor = SigningKey.generate("team-1")  # the same name, as after a rotation
    trusted = TrustedKeys([key.public, successor.public])
    assert trusted.signers(b"m", [key.sign(b"m"), successor.sign(b"m")]) == {key.public, successor.public}
    assert trusted.signers(b"m", [successor.sign(b"m")]) == {successor.public}


def test_what_cannot_be_trusted_says_why(key: SigningKey) -> None:
    other = SigningKey.generate("other")
    trusted = TrustedKeys([key.public])
    for signatures, why in (
        ([], "has no signature"),
        ([other.sign(b"m")], "signed by other"),
        ([key.sign(b"another message")], "claims to be by team-1"),
        ([f"other:{key.sign(b'm').partition(':')[2]}"], "signed by other"),
    ):
        with pytest.raises(Untrusted) as caught:
            trusted.verify(b"m", signatures, "it")
        assert why in str(caught.value)
    assert caught.value.exit_code == 103


def test_nothing_is_trusted_without_keys(key: SigningKey) -> None:
    with pytest.raises(Untrusted):
        TrustedKeys().verify(b"m", [key.sign(b"m")], "it")


@pytest.mark.parametrize("text", ["", "team-1", "team-1:", "team-1:AAAA", "team-1:####"])
def test_a_malformed_signature_is_refused(key: SigningKey, text: str) -> None:
    with pytest.raises(UsageError):
        TrustedKeys([key.public]).signers(b"m", [text])


WEAK = [
    "00" * 32,
    "01" + "00" * 31,
    "01" + "00" * 30 + "80",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 31,
    "ee" + "ff" * 30 + "7f",
]


@pytest.mark.parametrize("encoded", WEAK)
def test_a_key_that_anybody_can_sign_for_is_refused(encoded: str) -> None:
    """A placeholder of zeros in a policy, say. No secret is needed: R is the neutral element, S is 0."""
    key = PublicKey("weak", bytes.fromhex(encoded))
    without_secret = b"\x01" + bytes(63)
    assert not any(key.has_signed(b"%d" % number, without_secret) for number in range(100))
    with pytest.raises(UsageError, match="worth nothing"):
        PublicKey.parse(str(key))


def test_a_signature_has_one_form(key: SigningKey) -> None:
    """S + L is S modulo the group's order L, and yet no second signature of the same message."""
    order = 2**252 + 27742317777372353535851937790883648493
    raw = key.sign_raw(b"m")
    twin = raw[:32] + (int.from_bytes(raw[32:], "little") + order).to_bytes(32, "little")
    assert key.public.has_signed(b"m", raw)
    assert not key.public.has_signed(b"m", twin)
