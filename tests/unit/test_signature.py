"""Signatures of downloads: real ones by gpg and by minisign, and every way for one not to count."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.sources.signature import verify

# What minisign itself has made, of a file that holds `test`: the vectors that its libraries' documentation shows.
MINISIGN_KEY = b"RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3"
MINISIGN_KEY_FILE = b"untrusted comment: minisign public key E7620F1842B4E81F\n" + MINISIGN_KEY + b"\n"
HASHED = (
    b"untrusted comment: signature from minisign secret key\n"
    b"RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n"
    b"trusted comment: timestamp:1633700835\tfile:test\tprehashed\n"
    b"wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==\n"
)
PLAIN = (
    b"untrusted comment: signature from minisign secret key\n"
    b"RWQf6LRCGA9i59SLOFxz6NxvASXDJeRtuZykwQepbDEGt87ig1BNpWaVWuNrm73YiIiJbq71Wi+dP9eKL8OC351vwIasSSbXxwA=\n"
    b"trusted comment: timestamp:1555779966\tfile:test\n"
    b"QtKMXWyYcwdpZAlPF7tE2ENJkRd1ujvKjlj1m9RtHTBnZPa5WKU5uWRs5GoP5M/VqE81QFuMKI5k/SfNQUaOAA==\n"
)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"test")
    return path


@pytest.mark.parametrize("signature", [HASHED, PLAIN], ids=["hashed", "plain"])
@pytest.mark.parametrize("keys", [MINISIGN_KEY, MINISIGN_KEY_FILE], ids=["key", "key file"])
def test_minisign(signed: Path, signature: bytes, keys: bytes) -> None:
    assert verify(signed, signature, keys, "file", "key.pub") == "minisign-E7620F1842B4E81F"


@pytest.mark.parametrize(
    ("signature", "complaint"),
    [
        (HASHED.replace(b"timestamp:1633700835", b"timestamp:1633700836"), "is wrong"),
        (HASHED.replace(b"RUQf6LRCGA9i55", b"RUQf6LRCGA9i54"), "is signed by key|is wrong"),
        (HASHED.replace(b"RUQf6LRC", b"RUQf6LRD"), "is signed by key"),
        (HASHED.replace(b"RUQ", b"RWQ"), "is wrong"),
        (HASHED.replace(b"RUQf6", b"SUQf6"), "another algorithm"),
        (HASHED.replace(b"trusted comment: t", b"comment: t"), "not one of minisign's"),
        (HASHED.rsplit(b"\n", 2)[0], "not one of minisign's"),
        (HASHED[:100], "not one of minisign's"),
        (HASHED.replace(b"RUQf6", b"!!!!!"), "not base64"),
        (b"", "not one of minisign's"),
        (b"\xff\0" * 100, "not one of minisign's"),
    ],
)
def test_a_minisign_signature_that_does_not_count(signed: Path, signature: bytes, complaint: str) -> None:
    with pytest.raises(Untrusted, match="is not signed by a key that the recipe names") as caught:
        verify(signed, signature, MINISIGN_KEY, "file", "key.pub")
    assert re.search(complaint, caught.value.reason or "")


def test_minisign_of_other_bytes(signed: Path) -> None:
    signed.write_bytes(b"Test")
    for signature in (HASHED, PLAIN):
        with pytest.raises(Untrusted, match="not signed"):
            verify(signed, signature, MINISIGN_KEY, "file", "key.pub")


def test_a_minisign_key_for_which_anybody_can_sign_counts_for_nothing(signed: Path) -> None:
    weak = base64.b64encode(b"Ed" + bytes(8) + bytes(32))
    empty = base64.b64encode(b"Ed" + bytes(8) + bytes(64))
    forged = b"untrusted comment: x\n" + empty + b"\ntrusted comment: \n" + base64.b64encode(bytes(64))
    with pytest.raises(Untrusted, match="not signed"):
        verify(signed, forged, b"untrusted comment: x\n" + weak, "file", "key.pub")


@pytest.mark.parametrize("keys", [b"RWQ", b"RW" + b"A" * 54, b"untrusted comment: x", MINISIGN_KEY[:-4]])
def test_what_is_no_minisign_key(signed: Path, keys: bytes) -> None:
    with pytest.raises(UsageError, match=r"key\.pub is no minisign public key"):
        verify(signed, HASHED, keys, "file", "key.pub")


Gpg = Callable[..., bytes]


@pytest.fixture(scope="module")
def gpg(tmp_path_factory: pytest.TempPathFactory) -> Gpg:
    """The real program with two keys, `one` and `two`: gives what it writes to stdout."""
    if shutil.which("gpg") is None:
        pytest.skip("gpg is not installed")
    home = tmp_path_factory.mktemp("gnupg")
    home.chmod(0o700)

    def run(*words: str, data: bytes = b"") -> bytes:
        command = ["gpg", "--batch", "--no-tty", "--quiet", "--passphrase", "", *words]
        environ = {**os.environ, "GNUPGHOME": str(home)}
        return subprocess.run(command, input=data, env=environ, capture_output=True, check=True).stdout

    for name in ("one", "two"):
        run("--quick-gen-key", f"{name}@example.com", "ed25519", "sign", "never")
    return run


def test_openpgp(signed: Path, gpg: Gpg) -> None:
    keys = gpg("--export", "one@example.com")
    armored = gpg("--armor", "--export", "one@example.com")
    for signature in (
        gpg("-u", "one@example.com", "--detach-sign", data=b"test"),
        gpg("-u", "one@example.com", "--armor", "--detach-sign", data=b"test"),
    ):
        assert len(verify(signed, signature, keys, "file", "keys.asc")) == 40
        assert verify(signed, signature, armored, "file", "keys.asc")
        assert verify(signed, signature, gpg("--export"), "file", "keys.asc")


def test_an_openpgp_signature_that_does_not_count(signed: Path, gpg: Gpg) -> None:
    keys = gpg("--export", "one@example.com")
    for signature in (
        gpg("-u", "two@example.com", "--detach-sign", data=b"test"),
        gpg("-u", "one@example.com", "--detach-sign", data=b"Test"),
        gpg("-u", "one@example.com", "--sign", data=b"test"),
        keys,
        b"",
        b"nonsense",
        HASHED,
    ):
        with pytest.raises(Untrusted, match="not signed by a key that the recipe names"):
            verify(signed, signature, keys, "file", "keys.asc")


@pytest.mark.parametrize("keys", [b"", b"nonsense", b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n", b"\xff" * 100])
def test_what_is_no_openpgp_key(signed: Path, keys: bytes) -> None:
    with pytest.raises(UsageError, match=r"keys\.asc holds no keys that can be read"):
        verify(signed, b"", keys, "file", "keys.asc")
