"""Hashes and names: golden bytes, and properties that every derivation must have."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError
from vzrepro.base.model import (
    Derivation,
    DrvHash,
    FileHash,
    NarHash,
    StorePath,
    canonical_json,
    from_nix32,
    nix32,
    store_path,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "derivations"

LOCAL = Derivation(name="src", builder="local", content={"build.sh": NarHash.of(b"script")})
FETCH = Derivation(name="linux.tar.xz", builder="fetch", version="6.12.117", content={"": FileHash.of(b"tarball")})
UNPACKED = Derivation(
    name="lz4-1.10.0",
    builder="fetch",
    version="1.10.0",
    env={"unpack": "1"},
    content={"": FileHash.of(b"tarball")},
)
COMMIT = Derivation(
    name="lz4-1.10.0",
    builder="fetch",
    version="1.10.0",
    env={"git": "1"},
    content={"": NarHash.of(b"tree")},
)
IMAGE = Derivation(
    name="image-c",
    builder="image",
    platform="linux/amd64",
    env={"image_format": "1"},
    inputs={"debs": FETCH.drv_hash()},
)
SANDBOX = Derivation(
    name="kernel-container-6.12.117",
    builder="sandbox",
    version="6.12.117",
    platform="linux/amd64",
    image=IMAGE.drv_hash(),
    command=("sh", "/in/src/build.sh"),
    env={"ARCH": "arm64", "GREETING": "grüß dich"},
    inputs={"src": LOCAL.drv_hash(), "linux.tar.xz": FETCH.drv_hash()},
    source_date_epoch=1_767_225_600,
)


@pytest.mark.parametrize(
    ("name", "drv"),
    [
        ("local", LOCAL),
        ("fetch", FETCH),
        ("fetch-unpack", UNPACKED),
        ("fetch-git", COMMIT),
        ("image", IMAGE),
        ("sandbox", SANDBOX),
    ],
)
def test_canonical_bytes_are_golden(name: str, drv: Derivation) -> None:
    """Accept new bytes, on purpose only, with VZREPRO_ACCEPT=1: every store path changes with them."""
    document = {
        "canonical": canonical_json(drv.document()).decode(),
        "drv_hash": drv.drv_hash().hex,
        "build_key": drv.build_key({dep: NarHash.of(dep.bytes) for dep in drv.dependencies()}).hex,
        "store_path": str(store_path(drv.drv_hash(), drv.name)),
    }
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("VZREPRO_ACCEPT"):
        golden.write_text(text)
    assert text == golden.read_text()


def test_store_path_is_what_nix_computes() -> None:
    """Computed a second way; tests/e2e/test_nix_client.py asks the real client."""
    inner = DrvHash.of(b"vzrepro")
    path = store_path(inner, "hello-1.0")
    digest = hashlib.sha256(f"output:out:sha256:{inner.hex}:/nix/store:hello-1.0".encode()).digest()
    folded = bytes(a ^ b for a, b in zip(digest[:20], digest[20:] + bytes(8), strict=True))
    bits = int.from_bytes(folded, "little")
    expected = "".join("0123456789abcdfghijklmnpqrsvwxyz"[bits >> (5 * i) & 31] for i in reversed(range(32)))
    assert path.hash_part == expected


@given(st.binary(min_size=0, max_size=64))
def test_nix32_round_trip(data: bytes) -> None:
    assert from_nix32(nix32(data), len(data)) == data


@pytest.mark.parametrize("text", ["", "e" * 52, "z" * 52, "1" * 51])
def test_nix32_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        from_nix32(text, 32)


@pytest.mark.parametrize("form", ["hex", "prefixed hex", "nix32", "sri"])
def test_digest_forms(form: str) -> None:
    digest = NarHash.of(b"x")
    text = {
        "hex": digest.hex,
        "prefixed hex": f"sha256:{digest.hex}",
        "nix32": digest.nix,
        "sri": "sha256-" + base64.b64encode(digest.bytes).decode(),
    }[form]
    assert NarHash.parse(text) == digest


def test_digest_kinds_do_not_mix() -> None:
    assert NarHash.of(b"x") != FileHash.of(b"x")


@pytest.mark.parametrize(
    "text",
    ["", "x", "/nix/store/abc-x", "/nix/store/" + "e" * 32 + "-x", "0" * 32, f"{'0' * 32}-.x", f"{'0' * 32}-a/b"],
)
def test_store_path_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        StorePath.parse(text)


def test_store_path_round_trip() -> None:
    path = store_path(SANDBOX.drv_hash(), SANDBOX.name)
    assert StorePath.parse(str(path)) == path == StorePath.parse(path.base)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "kernel-container-6.12.118"},
        {"version": "6.12.118"},
        {"builder": "local"},
        {"platform": "linux/arm64"},
        {"image": LOCAL.drv_hash()},
        {"command": ("sh", "-x", "/in/src/build.sh")},
        {"env": {"ARCH": "arm64"}},
        {"env": {**SANDBOX.env, "ARCH": "arm"}},
        {"inputs": {"src": LOCAL.drv_hash()}},
        {"inputs": {"source": LOCAL.drv_hash(), "linux.tar.xz": FETCH.drv_hash()}},
        {"inputs": {"src": FETCH.drv_hash(), "linux.tar.xz": LOCAL.drv_hash()}},
        {"content": {"a": FileHash.of(b"")}},
        {"source_date_epoch": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_changes_the_hash(change: dict[str, object]) -> None:
    assert dataclasses.replace(SANDBOX, **change).drv_hash() != SANDBOX.drv_hash()  # type: ignore[arg-type]


names = st.text("abcxyz-", min_size=1, max_size=5)
derivations = st.builds(
    Derivation,
    name=names,
    builder=st.just("sandbox"),
    version=st.none() | names,
    command=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    env=st.dictionaries(names, st.text(max_size=5), max_size=3),
    inputs=st.dictionaries(names, st.binary(max_size=4).map(DrvHash.of), max_size=3),
    source_date_epoch=st.none() | st.integers(0, 2**40),
)


@given(derivations, derivations)
def test_equal_hash_means_equal_derivation(a: Derivation, b: Derivation) -> None:
    assert (a.drv_hash() == b.drv_hash()) == (a == b)


@given(derivations)
def test_order_of_mappings_does_not_matter(drv: Derivation) -> None:
    turned = dataclasses.replace(drv, env=dict(reversed(drv.env.items())), inputs=dict(reversed(drv.inputs.items())))
    assert turned.drv_hash() == drv.drv_hash()


@given(derivations)
def test_build_key_sees_content_not_names_of_inputs(drv: Derivation) -> None:
    same = {dep: NarHash.of(b"same") for dep in drv.dependencies()}
    renamed = dataclasses.replace(
        drv, inputs={name: DrvHash.of(b"other" + dep.bytes) for name, dep in drv.inputs.items()}
    )
    again = {dep: NarHash.of(b"same") for dep in renamed.dependencies()}
    assert drv.build_key(same) == renamed.build_key(again)
    if drv.inputs:
        other = {dep: NarHash.of(b"other") for dep in drv.dependencies()}
        assert drv.build_key(other) != drv.build_key(same)


@pytest.mark.parametrize("document", [{"a": 1.0}, {"a": [1, {"b": 0.5}]}, {1: "a"}, {"a": {1, 2}}])
def test_canonical_json_refuses(document: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        canonical_json(document)
