"""narinfo files: golden bytes, what is accepted, what is refused, what is signed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError
from vzrepro.base.model import BuildKey, DrvHash, FileHash, NarHash, StorePath, nix32, store_path
from vzrepro.cache import Damaged, NarInfo, SigningKey, TrustedKeys
from vzrepro.cache.narinfo import MAX_SIZE, deriver_of, narinfo_key
from vzrepro.cache.records import BuildRecord, attestation_key, read_difference, read_index

GOLDEN = Path(__file__).parent.parent / "golden" / "narinfo"

KEY = SigningKey.parse(
    "golden-1:TM0Imyj/ltqdtsNG7BFOD1uKMZ81q6Yk2oz27U+4pvs9QBfD6EOJWpK3CqdNG368nJgszy7ElozAzVXxKvRmDA=="
)
DRV = DrvHash.of(b"derivation")
PATH = store_path(DRV, "busybox-1.37")
OTHER = StorePath(nix32(bytes(20)), "zlib-1.3")

BARE = NarInfo(
    path=StorePath(nix32(bytes(range(20))), "hello"),
    url="nar/hello.nar",
    compression="none",
    nar_hash=NarHash.of(b"bare"),
    nar_size=120,
)
FULL = NarInfo(
    path=PATH,
    url=f"nar/{FileHash.of(b'file').nix[7:]}.nar.zst",
    compression="zstd",
    nar_hash=NarHash.of(b"nar"),
    nar_size=4096,
    file_hash=FileHash.of(b"file"),
    file_size=1234,
    references=(OTHER, PATH),
    deriver=deriver_of(DRV, "busybox-1.37"),
    drv_hash=DRV,
    build_key=BuildKey.of(b"key"),
    origin=FileHash.of(b"origin"),
).signed(KEY)


@pytest.mark.parametrize(("name", "info"), [("bare", BARE), ("full", FULL)])
def test_bytes_are_golden(name: str, info: NarInfo) -> None:
    """Accept new bytes, on purpose only, with VZREPRO_ACCEPT=1: caches in use hold the old ones."""
    golden = GOLDEN / f"{name}.narinfo"
    if os.environ.get("VZREPRO_ACCEPT"):
        golden.write_bytes(info.render())
    assert info.render() == golden.read_bytes()
    assert NarInfo.parse(golden.read_bytes()) == info


def test_an_empty_list_of_references_keeps_its_blank() -> None:
    assert b"\nReferences: \n" in BARE.render()


def test_what_nix_wrote_is_read() -> None:
    """`nix copy --to file://…?compression=zstd` of a path with a reference and a self-reference, Nix 2.8."""
    data = (GOLDEN / "from-nix.narinfo").read_bytes()
    info = NarInfo.parse(data)
    assert info.compression == "zstd"
    assert info.file_hash is not None
    assert info.path in info.references
    assert len(info.references) == 2
    assert info.own_message is None
    assert TrustedKeys([KEY.public]).signers(info.fingerprint, info.signatures) == {KEY.public}


def test_keys_and_derivers_are_base_names() -> None:
    assert narinfo_key(PATH) == f"{PATH.hash_part}.narinfo"
    deriver = deriver_of(DRV, PATH.name)
    assert StorePath.parse(deriver).name == "busybox-1.37.drv"
    assert deriver != deriver_of(DrvHash.of(b"other"), PATH.name)
    StorePath.parse(deriver_of(DRV, "x" * 211))


# --- reading ----------------------------------------------------------------------------------------------------------

LINES = {
    "StorePath": str(PATH),
    "URL": "nar/x.nar.zst",
    "Compression": "zstd",
    "FileHash": FileHash.of(b"file").nix,
    "FileSize": "1234",
    "NarHash": NarHash.of(b"nar").nix,
    "NarSize": "4096",
    "References": f"{PATH.base} {OTHER.base}",
    "Deriver": deriver_of(DRV, PATH.name),
    "Sig": KEY.sign(b""),
}


def text(drop: str = "", **changes: str) -> bytes:
    lines = LINES | changes
    return "".join(f"{name}: {value}\n" for name, value in lines.items() if name != drop).encode()


def test_order_does_not_matter_and_unknown_fields_are_skipped() -> None:
    expected = NarInfo.parse(text())
    shuffled = b"System: x86_64-linux\n" + b"".join(reversed(text().splitlines(keepends=True))) + b"Later: x: y\n"
    assert NarInfo.parse(shuffled) == expected
    assert NarInfo.parse(text(CA="fixed:r:sha256:abc")) == expected


@pytest.mark.parametrize("digest", [NarHash.of(b"nar").nix, f"sha256:{NarHash.of(b'nar')}"])
def test_hashes_come_in_several_spellings(digest: str) -> None:
    assert NarInfo.parse(text(NarHash=digest)).nar_hash == NarHash.of(b"nar")


@pytest.mark.parametrize("name", ["FileHash", "FileSize", "References", "Deriver", "Sig"])
def test_what_may_be_absent(name: str) -> None:
    NarInfo.parse(text(drop=name))


def test_references_are_sorted_and_said_once() -> None:
    info = NarInfo.parse(text(References=f"{PATH.base} {OTHER.base} {PATH.base}"))
    assert info.references == tuple(sorted((OTHER, PATH)))


def test_an_unknown_deriver_is_none() -> None:
    assert NarInfo.parse(text(Deriver="unknown-deriver")).deriver is None
    assert NarInfo.parse(text(Deriver="")).deriver is None


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "does not end"),
        (text()[:-1], "does not end"),
        (text().replace(b"\n", b"\r\n"), "carriage return"),
        (text() + b"\n", "line 11"),
        (b"\n" + text(), "line 1 "),
        (text() + b"no colon\n", "line 11"),
        (text() + b"Key:value\n", "line 11"),
        (text() + b": value\n", "line 11"),
        (text() + b"\xff: x\n", "utf-8"),
        (text() + b"a: \0\n", "zero byte"),
        (text() + b"x: " + b"y" * MAX_SIZE + b"\n", "larger"),
        (text(drop="StorePath"), "StorePath is missing"),
        (text(drop="URL"), "URL is missing"),
        (text(drop="Compression"), "Compression is missing"),
        (text(drop="NarHash"), "NarHash is missing"),
        (text(drop="NarSize"), "NarSize is missing"),
        (text() + b"NarSize: 4096\n", "twice"),
        (text() + b"URL: nar/x.nar.zst\n", "twice"),
        (text(StorePath=PATH.base), "not below"),
        (text(StorePath=f"/gnu/store/{PATH.base}"), "not below"),
        (text(StorePath=f"{PATH}/bin"), "not a valid store name"),
        (text(URL="../x"), "not a valid key"),
        (text(URL="nar/../../x"), "not a valid key"),
        (text(URL="/etc/passwd"), "not a valid key"),
        (text(URL="https://elsewhere.example/x"), "not a valid key"),
        (text(Compression="xz"), "xz"),
        (text(NarHash="md5:abc"), "sha256"),
        (text(NarHash=f"sha256:{'z' * 64}"), "sha256"),
        (text(NarSize="0"), "not positive"),
        (text(NarSize="-1"), "not a size"),
        (text(NarSize="+1"), "not a size"),
        (text(NarSize=" 1"), "not a size"),
        (text(NarSize="1_0"), "not a size"),
        (text(NarSize="²"), "not a size"),
        (text(NarSize="9" * 19), "not a size"),
        (text(FileSize="x"), "not a size"),
        (text(References=str(PATH)), "full path"),
        (text(References="nonsense"), "not a store path"),
        (text(Deriver=f"{PATH}.drv"), "full path"),
        (text(Sig="no signature"), "not a signature"),
        (text(VzSig="no signature"), "not a signature"),
        (text(VzDrvHash=DrvHash.of(b"another").hex), "does not give this store path"),
        (text(VzDrvHash="abc"), "sha256"),
        (text(VzBuildKey=BuildKey.of(b"").hex.upper()), "sha256"),
        (text(VzOrigin=""), "sha256"),
    ],
)
def test_what_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(Damaged) as caught:
        NarInfo.parse(data)
    assert why in str(caught.value)


@given(st.binary(max_size=400) | st.text(max_size=200).map(str.encode))
def test_junk_is_refused_in_one_way(junk: bytes) -> None:
    with pytest.raises(Damaged):
        NarInfo.parse(junk)


@given(st.integers(0, len(FULL.render()) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_what_is_signed_or_nothing_that_matters(at: int, byte: int) -> None:
    """Only what says where and how the NAR is stored can change under valid signatures."""
    data = bytearray(FULL.render())
    data[at] = byte
    try:
        info = NarInfo.parse(bytes(data))
    except Damaged:
        return
    trusted = TrustedKeys([KEY.public])
    own = info.own_message
    if trusted.signers(info.fingerprint, info.signatures) and (
        own is None or trusted.signers(own, info.own_signatures)
    ):
        unsigned = {"url": "", "compression": "", "file_hash": None, "file_size": None, "deriver": None}
        blank = {**unsigned, "signatures": (), "own_signatures": ()}
        whole = replace(FULL, **blank)  # type: ignore[arg-type]
        found = replace(info, **blank)  # type: ignore[arg-type]
        assert found == whole


# --- signing ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_nixs() -> None:
    assert FULL.fingerprint.decode() == f"1;{PATH};{FULL.nar_hash.nix};4096;{','.join(sorted([str(OTHER), str(PATH)]))}"
    assert BARE.fingerprint.decode().endswith(";120;")


def test_signing_twice_adds_nothing_and_another_key_adds_its_own() -> None:
    other = SigningKey.generate("other")
    assert FULL.signed(KEY) == FULL
    both = FULL.signed(other)
    assert [text.partition(":")[0] for text in both.signatures] == ["golden-1", "other"]
    assert [text.partition(":")[0] for text in both.own_signatures] == ["golden-1", "other"]


def test_without_own_fields_there_is_no_own_signature() -> None:
    assert BARE.signed(KEY).own_signatures == ()


@pytest.mark.parametrize(
    "changed",
    [
        replace(FULL, build_key=BuildKey.of(b"x")),
        replace(FULL, build_key=None),
        replace(FULL, origin=None),
        replace(FULL, drv_hash=None),
        replace(FULL, nar_hash=NarHash.of(b"x")),
        replace(FULL, nar_size=1),
        replace(FULL, references=()),
        replace(FULL, path=OTHER),
    ],
)
def test_every_own_field_is_bound_to_the_rest(changed: NarInfo) -> None:
    assert changed.own_message != FULL.own_message


def test_a_key_that_cannot_be_one_is_not_taken() -> None:
    with pytest.raises(UsageError):
        SigningKey.parse("x")


# --- records beside narinfos ------------------------------------------------------------------------------------------


JUNK = st.recursive(
    st.sampled_from([None, True, -1, 1e400, 10**30, "", "a", "\ud800", "0" * 64, str(PATH)]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["nar_hash", "path", "a"]), inner),
    max_leaves=4,
)


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["build_key", "drv_hash", "path", "nar_hash", "nar_size"]), JUNK, max_size=2), JUNK
)
def test_any_build_record_is_read_or_damaged(changes: dict[str, object], signatures: object) -> None:
    made = {
        "build_key": "0" * 64,
        "drv_hash": DRV.hex,
        "path": str(PATH),
        "nar_hash": "0" * 64,
        "nar_size": 1,
        **changes,
    }
    with contextlib.suppress(Damaged):
        found = BuildRecord.parse(json.dumps({"realization": made, "signatures": signatures}).encode(), "here")
        assert found.realization.drv_hash == DRV


@settings(max_examples=100)
@given(
    st.dictionaries(st.sampled_from(["type", "path", "kept", "found"]), JUNK, max_size=2),
    st.dictionaries(
        st.sampled_from(["statement", "signatures", "entries", "payload", "payloadType"]), JUNK, max_size=2
    ),
)
def test_any_statement_beside_is_read_or_passed_over(inner: dict[str, object], outer: dict[str, object]) -> None:
    size = {"nar_hash": "0" * 64}
    statement = {"type": "not-deterministic", "path": str(PATH), "kept": size, "found": size, **inner}
    data = json.dumps({"statement": statement, "signatures": [], **outer}).encode()
    found = read_difference(data, PATH, TrustedKeys())
    assert found is None or not found.trusted
    assert all(isinstance(each, str) for each in read_index(data))
    with contextlib.suppress(UsageError):
        attestation_key(DRV, data)
