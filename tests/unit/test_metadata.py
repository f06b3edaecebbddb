"""version.json: what is read, what is refused and how it is named, and that what recipes say is what hosts expect."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError
from vzrepro.guest import metadata
from vzrepro.guest.metadata import KernelProfile

ROOT = Path(__file__).parents[2]
DOCUMENT: dict[str, Any] = {
    "kernel": "6.12.107",
    "profile": "container",
    "security_profile": "container-hardened",
    "busybox": "1.37.0",
    "agent": "0.1.0",
    "agent_protocol_revision": 1,
    "youki": "0.7.0",
    "built": "2026-01-01T00:00:00Z",
    "sha256_vmlinux": "a" * 64,
    "sha256_initramfs": "b" * 64,
    "sha256_youki": "c" * 64,
    "capabilities": ["netns", "vsock"],
}


def parse(document: object) -> metadata.Metadata:
    return metadata.parse(json.dumps(document).encode(), "here/version.json")


def test_every_key_becomes_a_field() -> None:
    found = parse(DOCUMENT)
    assert {name: getattr(found, name) for name in DOCUMENT} == {**DOCUMENT, "capabilities": ("netns", "vsock")}
    assert found.built_secs == 1767225600
    assert found.checksums() == {"vmlinux": "a" * 64, "initramfs.img": "b" * 64, "youki": "c" * 64}


def test_rendered_is_the_contract_byte_for_byte() -> None:
    assert metadata.render(parse(DOCUMENT)) == (json.dumps(DOCUMENT, indent=2) + "\n").encode()
    shuffled = dict(sorted(DOCUMENT.items(), reverse=True))
    assert metadata.render(parse(shuffled)) == metadata.render(parse(DOCUMENT))


def test_unknown_keys_are_ignored() -> None:
    assert parse({**DOCUMENT, "signature": {"by": "somebody"}, "7": None}) == parse(DOCUMENT)


def test_an_older_bundle_counts_as_having_four_capabilities_and_may_lack_checksums() -> None:
    old = {name: value for name, value in DOCUMENT.items() if name != "capabilities" and "sha256" not in name}
    found = parse(old)
    assert found.capabilities == ("ext4_root", "hvc0_serial", "virtiofs", "vsock")
    assert found.checksums() == {}
    assert parse(json.loads(metadata.render(found))) == found


def test_profiles_and_the_revision_may_be_missing() -> None:
    """As hosts read it; older bundles have none of them."""
    optional = ("profile", "security_profile", "agent_protocol_revision")
    old = {name: value for name, value in DOCUMENT.items() if name not in optional}
    found = parse(old)
    assert (found.profile, found.security_profile, found.agent_protocol_revision) == (None, None, None)
    assert found.kind == KernelProfile.DEVELOPER
    assert parse({**old, **dict.fromkeys(optional)}) == found
    assert parse(json.loads(metadata.render(found))) == found
    assert parse(DOCUMENT).kind == "container"


def test_checksums_are_what_hosts_compare() -> None:
    """In any case; what no file can have is a matter of the file, not of version.json."""
    found = parse({**DOCUMENT, "sha256_vmlinux": "AB" * 32, "sha256_youki": " none \t"[:-1]})
    assert found.sha256_vmlinux == "ab" * 32
    assert found.checksums()["youki"] == "none"


def test_capabilities_named_as_none_are_none() -> None:
    assert parse({**DOCUMENT, "capabilities": []}).capabilities == ()


@pytest.mark.parametrize("name", ["kernel", "busybox", "agent", "youki", "built"])
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse({key: value for key, value in DOCUMENT.items() if key != name})
    assert caught.value.message == f"here/version.json lacks {name}"


def test_all_missing_keys_are_named_at_once() -> None:
    with pytest.raises(UsageError, match="lacks kernel, busybox, agent, youki, built"):
        parse({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kernel", 6.12),
        ("profile", ""),
        ("busybox", "1.37\n2"),
        ("youki", None),
        ("agent_protocol_revision", "1"),
        ("agent_protocol_revision", True),
        ("agent_protocol_revision", -1),
        ("agent_protocol_revision", 1.0),
        ("profile", "x/../../evil"),
        ("profile", ".."),
        ("profile", "a b"),
        ("built", "yesterday"),
        ("built", "2026-01-01T00:00:00"),
        ("built", "2026-01-01T00:00:00+02:00"),
        ("built", "2026-13-01T00:00:00Z"),
        ("built", "0001-01-01T00:00:00Z"),
        ("security_profile", 7),
        ("sha256_youki", 7),
        ("sha256_youki", "a\nb"),
        ("capabilities", "vsock"),
        ("capabilities", ["vsock", 7]),
        ("capabilities", ["vsock", ""]),
        ("capabilities", {"vsock": True}),
    ],
)
def test_a_wrong_value_is_shown(name: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        parse({**DOCUMENT, name: value})
    assert f"here/version.json has a wrong {name}" in caught.value.message
    assert repr(value)[:40] in (caught.value.reason or "")
    assert caught.value.hint


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b"not json", b"[" * 100_000], ids=["empty", "cut", "utf-16", "text", "deep"]
)
def test_what_is_not_json_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(UsageError, match="is not JSON"):
        metadata.parse(content, "here/version.json")


@pytest.mark.parametrize("document", [[], "text", 7, None])
def test_json_that_is_no_object(document: object) -> None:
    with pytest.raises(UsageError, match="is not a JSON object"):
        parse(document)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(sorted(DOCUMENT)),
        st.sampled_from([None, True, -1, 1e400, 10**30, "", "a", "\ud800", "\n", "0001-01-01T00:00:00Z", [], [1], {}]),
        max_size=3,
    )
)
def test_any_value_is_read_or_shown(changes: dict[str, Any]) -> None:
    try:
        found = parse(DOCUMENT | changes)
    except UsageError as error:
        assert "here/version.json" in error.message
    else:
        assert metadata.parse(metadata.render(found), "again") == found
        assert found.built_secs >= 0


def test_reading_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a boot bundle"):
        metadata.read(tmp_path)
    with pytest.raises(UsageError, match="is not a boot bundle"):
        metadata.read(tmp_path / "nowhere")
    (tmp_path / "version.json").write_text(json.dumps(DOCUMENT))
    assert metadata.read(tmp_path) == parse(DOCUMENT)
    (tmp_path / "version.json").write_bytes(b" " * (metadata.MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        metadata.read(tmp_path)
    (tmp_path / "version.json").unlink()
    os.mkfifo(tmp_path / "version.json")  # which must not be waited for
    with pytest.raises(UsageError, match="is not a boot bundle"):
        metadata.read(tmp_path)


# --- that this module and the recipes say the same


def test_the_agent_is_the_one_that_is_built_here() -> None:
    crate = ROOT / "recipes/guest-agent"
    assert tomllib.loads((crate / "Cargo.toml").read_text())["package"]["version"] == metadata.AGENT_VERSION
    declared = re.search(r"AGENT_PROTOCOL_REVISION: u32 = (\d+);", (crate / "src/lib.rs").read_text())
    assert declared
    assert int(declared[1]) == metadata.AGENT_PROTOCOL_REVISION


def test_profiles_promise_what_their_kernels_are_built_for() -> None:
    path = ROOT / "recipes/kernel/capabilities.py"
    spec = importlib.util.spec_from_file_location("capabilities_of_the_recipes", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    recipes = {profile.name: {item.name for item in profile.capabilities} for profile in module.PROFILES}
    assert recipes.keys() <= set(KernelProfile)
    for name, capabilities in recipes.items():
        assert capabilities <= metadata.KNOWN_SINCE.keys()
        unknown = metadata.unknown_to(capabilities, metadata.OLDEST_HOST)
        assert capabilities - set(unknown) == KernelProfile(name).default_capabilities


# --- hosts


def test_what_the_oldest_host_knows() -> None:
    """All but what has come since; a host whose release is not known to take a name is not given it."""
    new = {"device_mapper", "dm_crypt", "memory_reclaim", "snapshot_safe"}
    assert {name for name, since in metadata.KNOWN_SINCE.items() if since is None} == new
    assert set(metadata.unknown_to(metadata.KNOWN_SINCE, metadata.OLDEST_HOST)) == new
    assert set(metadata.unknown_to(metadata.KNOWN_SINCE, (9, 0))) == new
    assert metadata.unknown_to(["vsock", "to_come", "dm_crypt"], metadata.OLDEST_HOST) == ("dm_crypt", "to_come")


@pytest.mark.parametrize(
    ("text", "version"), [("0.3.15", (0, 3, 15)), ("v0.3.15", (0, 3, 15)), ("0.4", (0, 4)), ("1.0.0.2", (1, 0, 0, 2))]
)
def test_versions_of_hosts(text: str, version: tuple[int, ...]) -> None:
    assert metadata.host_version(text) == version


@pytest.mark.parametrize("text", ["", "15", "0.3.x", "0.3.15-rc1", " 0.3.15", "vv0.3.15", "0.3.15\n", "9" * 9 + ".1"])
def test_what_is_no_version_of_a_host(text: str) -> None:
    with pytest.raises(UsageError, match="is not the version of a host"):
        metadata.host_version(text)


@pytest.mark.parametrize("text", ["0.3.14", "v0.3", "0.2.99"])
def test_hosts_that_are_too_old(text: str) -> None:
    with pytest.raises(UsageError, match=f"nothing is known of hosts as old as {text}") as caught:
        metadata.host_version(text)
    assert "0.3.15" in (caught.value.reason or "")


def test_leaving_capabilities_out_changes_nothing_else() -> None:
    content = (json.dumps({**DOCUMENT, "a new key": ["é"]}, indent=2) + "\n").encode()
    assert metadata.without(content, ()) == content
    assert json.loads(metadata.without(content, ("netns",))) == {
        **DOCUMENT,
        "a new key": ["é"],
        "capabilities": ["vsock"],
    }
