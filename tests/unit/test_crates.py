"""The walk from a Cargo.lock to the crates a Linux build reaches: hand-made locks, one rule of Cargo's per test."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.sources.cfg import linux_cfg
from vzrepro.sources.crates import LINUX_TARGETS, Crate, index_entries, lock_of, manifest_of, reached

Packages = Mapping[str, tuple[str, Sequence[str]]]
"""`name version` → the manifest's text below [package], and the `dependencies` of its lock entry."""


PUBLIC = "registry+https://github.com/rust-lang/crates.io-index"


def checksum(package: str) -> str:
    return hashlib.sha256(package.encode()).hexdigest()


def lock(packages: Packages) -> str:
    parts = ["version = 4"]
    for package, (_, edges) in packages.items():
        name, version = package.split()
        parts += ["[[package]]", f'name = "{name}"', f'version = "{version}"']
        if name != "root":
            parts += [f'source = "{PUBLIC}"', f'checksum = "{checksum(package)}"']
        parts.append(f"dependencies = {list(edges)}")
    return "\n".join(parts)


def manifest(package: str, body: str) -> str:
    name, version = package.split()
    return f'[package]\nname = "{name}"\nversion = "{version}"\n{body}'


def walk(
    packages: Packages,
    features: Sequence[str] = (),
    default_features: bool = True,
    targets: Sequence[str] = ("aarch64-unknown-linux-gnu", "x86_64-unknown-linux-gnu"),
) -> set[str]:
    """`name version` of what is reached; asserts that each manifest is asked for once, and only when reached."""
    asked: list[str] = []

    def get(wave: Sequence[Crate]) -> dict[Crate, str]:
        asked.extend(f"{crate.name} {crate.version}" for crate in wave)
        return {crate: manifest(f"{crate.name} {crate.version}", packages[asked_for(crate)][0]) for crate in wave}

    crates = reached(
        lock(packages),
        manifest("root 1.0.0", packages["root 1.0.0"][0]),
        get,
        features=features,
        default_features=default_features,
        targets=targets,
    )
    names = [asked_for(crate) for crate in crates]
    assert sorted(asked) == sorted(set(asked)) == sorted(names)
    assert [crate.sha256.hex for crate in crates] == [checksum(name) for name in names]
    return set(names)


def asked_for(crate: Crate) -> str:
    return f"{crate.name} {crate.version}"


def test_dependencies_of_dependencies_are_reached_and_others_are_not() -> None:
    packages = {
        "root 1.0.0": ('[dependencies]\na = "1"', ["a"]),
        "a 1.2.0": ('[dependencies.b]\nversion = "0.3"', ["b"]),
        "b 0.3.1": ("", []),
        "c 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.2.0", "b 0.3.1"}


def test_build_dependencies_count_and_dev_dependencies_do_not() -> None:
    packages = {
        "root 1.0.0": ('[build-dependencies]\na = "1"\n[dev-dependencies]\nb = "1"', ["a", "b"]),
        "a 1.0.0": ('[build_dependencies]\nc = "1"\n[dev-dependencies]\nb = "1"', ["c"]),
        "b 1.0.0": ("", []),
        "c 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0", "c 1.0.0"}


def test_an_optional_dependency_needs_its_feature() -> None:
    packages = {
        "root 1.0.0": (
            '[features]\ndefault = ["with-a"]\nwith-a = ["dep:a"]\n'
            '[dependencies]\na = { version = "1", optional = true }\nb = { version = "1", optional = true }',
            ["a", "b"],
        ),
        "a 1.0.0": ("", []),
        "b 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0"}
    assert walk(packages, default_features=False) == set()
    # `b` is a feature by itself, because no feature says `dep:b`.
    assert walk(packages, features=["b"]) == {"a 1.0.0", "b 1.0.0"}


def test_features_of_one_crate_unify_over_all_that_ask() -> None:
    packages = {
        "root 1.0.0": (
            '[dependencies]\na = { version = "1", default-features = false }\nb = "1"',
            ["a", "b"],
        ),
        "a 1.0.0": (
            '[features]\ndefault = ["big"]\nbig = ["dep:huge"]\nneat = ["dep:small"]\n'
            '[dependencies]\nhuge = { version = "1", optional = true }\nsmall = { version = "1", optional = true }',
            ["huge", "small"],
        ),
        "b 1.0.0": ('[dependencies]\na = { version = "1", default-features = false, features = ["neat"] }', ["a"]),
        "huge 1.0.0": ("", []),
        "small 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0", "b 1.0.0", "small 1.0.0"}


def test_a_feature_may_be_asked_for_after_the_crate_was_read() -> None:
    packages = {
        "root 1.0.0": ('[dependencies]\na = "1"\nb = "1"', ["a", "b"]),
        "a 1.0.0": ('[dependencies]\nlate = { version = "1", optional = true }', ["late"]),
        "b 1.0.0": ('[dependencies]\nc = "1"', ["c"]),
        "c 1.0.0": ('[dependencies]\na = { version = "1", features = ["late"] }', ["a"]),
        "late 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0", "b 1.0.0", "c 1.0.0", "late 1.0.0"}


@pytest.mark.parametrize(
    ("value", "others", "expected"),
    [
        ("a/extra", (), {"a 1.0.0", "x 1.0.0"}),
        ("a?/extra", (), set()),
        ("a?/extra", ("a",), {"a 1.0.0", "x 1.0.0"}),
    ],
)
def test_slash_enables_the_dependency_and_question_mark_does_not(
    value: str, others: Sequence[str], expected: set[str]
) -> None:
    packages = {
        "root 1.0.0": (
            f'[features]\nf = ["{value}"]\n[dependencies]\na = {{ version = "1", optional = true }}',
            ["a"],
        ),
        "a 1.0.0": ('[features]\nextra = ["dep:x"]\n[dependencies]\nx = { version = "1", optional = true }', ["x"]),
        "x 1.0.0": ("", []),
    }
    assert walk(packages, features=["f", *others]) == expected
    assert walk(packages, features=[*others, "f"]) == expected


def test_slash_also_enables_the_feature_of_that_name() -> None:
    packages = {
        "root 1.0.0": (
            '[features]\nf = ["a/extra"]\na = ["dep:a", "dep:b"]\n'
            '[dependencies]\na = { version = "1", optional = true }\nb = { version = "1", optional = true }',
            ["a", "b"],
        ),
        "a 1.0.0": ("[features]\nextra = []", []),
        "b 1.0.0": ("", []),
    }
    assert walk(packages, features=["f"]) == {"a 1.0.0", "b 1.0.0"}


def test_renamed_dependencies_are_found_by_their_package() -> None:
    packages = {
        "root 1.0.0": (
            '[features]\ndefault = ["new/f"]\n'
            '[dependencies]\nold = { package = "a", version = "0.1" }\nnew = { package = "a", version = "0.2" }',
            ["a 0.1.7", "a 0.2.0"],
        ),
        "a 0.1.7": ('[features]\nf = ["dep:x"]\n[dependencies]\nx = { version = "1", optional = true }', ["x"]),
        "a 0.2.0": ('[features]\nf = ["dep:y"]\n[dependencies]\ny = { version = "1", optional = true }', ["y"]),
        "x 1.0.0": ("", []),
        "y 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 0.1.7", "a 0.2.0", "y 1.0.0"}


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("1", "a 1.9.3"),
        ("^1.2", "a 1.9.3"),
        ("0.2", "a 0.2.5"),
        ("~0.3.1", "a 0.3.4"),
        ("=0.0.7", "a 0.0.7"),
        ("0.0.8", "a 0.0.8"),
        ("0.3.*", "a 0.3.4"),
        (">=0.3, <0.4", "a 0.3.4"),
        (">1", "a 2.0.0-rc.1"),
        (">0.3, <=1.9", "a 1.9.3"),
        ("<0.0.8", "a 0.0.7"),
        ("2.0.0-rc.1", "a 2.0.0-rc.1"),
    ],
)
def test_the_requirement_tells_versions_apart(requirement: str, expected: str) -> None:
    versions = ("0.0.7", "0.0.8", "0.2.5", "0.3.4", "1.9.3", "2.0.0-rc.1")
    packages: dict[str, tuple[str, Sequence[str]]] = {f"a {version}": ("", []) for version in versions}
    # One package whose lock entry lists all versions, as a crate does that depends on several under other names.
    packages["root 1.0.0"] = (f'[dependencies]\na = "{requirement}"', [f"a {version}" for version in versions])
    assert walk(packages) == {expected}


def test_any_version_takes_all_that_are_listed() -> None:
    packages = {
        "root 1.0.0": ('[dependencies]\na = "*"', ["a 1.0.0", "a 2.0.0"]),
        "a 1.0.0": ("", []),
        "a 2.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0", "a 2.0.0"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cfg(unix)", True),
        ("cfg(windows)", False),
        ("cfg(not(windows))", True),
        ('cfg(target_os = "linux")', True),
        ('cfg(target_os="macos")', False),
        ('cfg(any(target_os = "macos", target_arch = "aarch64",))', True),
        ('cfg(all(target_arch = "aarch64", target_os = "macos"))', False),
        ('cfg(all(unix, not(target_env = "musl")))', True),
        ("cfg(all())", True),
        ("cfg(any())", False),
        ('cfg(all(target_pointer_width = "64", target_endian = "little"))', True),
        # The build host's architecture counts: build scripts run there.
        ('cfg(target_arch = "x86_64")', True),
        ('cfg(target_arch = "wasm32")', False),
        # What depends on flags is kept, with `not` and without.
        ('cfg(target_feature = "crt-static")', True),
        ('cfg(not(target_feature = "crt-static"))', True),
        ("cfg(not(debug_assertions))", True),
        ('cfg(all(windows, target_feature = "sse2"))', False),
        # A name nobody passes with --cfg.
        ("cfg(tokio_unstable)", False),
        ("aarch64-unknown-linux-gnu", True),
        ("x86_64-pc-windows-msvc", False),
    ],
)
def test_platform_tables(target: str, expected: bool) -> None:
    packages = {
        "root 1.0.0": (f"[target.'{target}'.dependencies]\na = \"1\"", ["a"]),
        "a 1.0.0": ("", []),
    }
    assert walk(packages) == ({"a 1.0.0"} if expected else set())


def test_one_platform_does_not_mix_with_another() -> None:
    packages = {
        "root 1.0.0": ('[target.\'cfg(target_arch = "x86_64")\'.dependencies]\na = "1"', ["a"]),
        "a 1.0.0": ("", []),
    }
    assert walk(packages, targets=["aarch64-unknown-linux-gnu"]) == set()


def test_features_follow_a_dependency_in_a_platform_table() -> None:
    packages = {
        "root 1.0.0": (
            '[dependencies]\na = { version = "1", default-features = false }\n'
            '[target.\'cfg(unix)\'.dependencies]\na = { version = "1", features = ["f"] }\n'
            '[target.\'cfg(windows)\'.dependencies]\na = { version = "1", features = ["g"] }',
            ["a"],
        ),
        "a 1.0.0": (
            '[features]\nf = ["x"]\ng = ["y"]\n'
            '[dependencies]\nx = { version = "1", optional = true }\ny = { version = "1", optional = true }',
            ["x", "y"],
        ),
        "x 1.0.0": ("", []),
        "y 1.0.0": ("", []),
    }
    assert walk(packages) == {"a 1.0.0", "x 1.0.0"}


def test_circles_end() -> None:
    packages = {
        "root 1.0.0": ('[features]\ndefault = ["p"]\np = ["q"]\nq = ["p", "a/f"]\n[dependencies]\na = "1"', ["a"]),
        "a 1.0.0": ('[features]\nf = ["b/f"]\n[dependencies]\nb = "1"', ["b"]),
        "b 1.0.0": ('[features]\nf = ["a/f"]\n[dependencies]\na = { version = "1", optional = true }', ["a"]),
    }
    assert walk(packages) == {"a 1.0.0", "b 1.0.0"}


def test_a_long_chain_needs_no_deep_stack() -> None:
    names = [f"c{number:04}" for number in range(3000)]
    packages: dict[str, tuple[str, Sequence[str]]] = {"root 1.0.0": (f'[dependencies]\n{names[0]} = "1"', [names[0]])}
    for name, following in zip(names, [*names[1:], None], strict=True):
        body = "" if following is None else f'[dependencies]\n{following} = "1"'
        packages[f"{name} 1.0.0"] = (body, [] if following is None else [following])
    features = "\n".join(f'f{number} = ["f{number + 1}"]' for number in range(3000))
    packages["root 1.0.0"] = (f"{packages['root 1.0.0'][0]}\n[features]\n{features}\nf3000 = []", [names[0]])
    assert len(walk(packages, features=["f0"])) == 3000


@given(st.sets(st.sampled_from(["f", "g", "h"])), st.sets(st.sampled_from(["f", "g", "h"])))
def test_more_features_never_reach_less(some: set[str], more: set[str]) -> None:
    packages = {
        "root 1.0.0": (
            '[features]\nf = ["dep:a"]\ng = ["a?/x"]\nh = ["b/y", "f"]\n'
            '[dependencies]\na = { version = "1", optional = true }\nb = { version = "1", optional = true }',
            ["a", "b"],
        ),
        "a 1.0.0": ('[features]\nx = ["dep:c"]\n[dependencies]\nc = { version = "1", optional = true }', ["c"]),
        "b 1.0.0": ('[features]\ny = ["dep:c"]\n[dependencies]\nc = { version = "1", optional = true }', ["c"]),
        "c 1.0.0": ("", []),
    }
    assert walk(packages, features=sorted(some)) <= walk(packages, features=sorted(some | more))


def test_a_lock_of_another_manifest_is_refused() -> None:
    packages: Packages = {"root 1.0.0": ('[dependencies]\na = "1"', [])}
    with pytest.raises(UsageError, match="lacks a, which root"):
        walk(packages)
    with pytest.raises(UsageError, match=r"does not have root 2\.0\.0"):
        reached(lock(packages), manifest("root 2.0.0", ""), lambda wave: {})


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(UsageError, match="no feature 'nope'"):
        walk({"root 1.0.0": ("", [])}, features=["nope"])


def test_a_package_without_checksum_cannot_be_fetched() -> None:
    text = lock({"root 1.0.0": ("", ["a"])}) + (
        '\n[[package]]\nname = "a"\nversion = "1.0.0"\nsource = "git+https://example.org/a#0123"\n'
    )
    with pytest.raises(UsageError, match=r"no checksum for a 1\.0\.0"):
        reached(text, manifest("root 1.0.0", '[dependencies]\na = "1"'), lambda wave: {})


@pytest.mark.parametrize(
    "body",
    [
        "[dependencies]\na = { workspace = true }",
        "[target.'cfg(any(unix'.dependencies]\na = \"1\"",
        "[target.'cfg(frob(unix))'.dependencies]\na = \"1\"",
        "[target.'cfg(unix) x'.dependencies]\na = \"1\"",
        "[dependencies",
        "[dependencies]\na = 7",
    ],
)
def test_a_manifest_that_cannot_be_read_is_an_error(body: str) -> None:
    with pytest.raises(UsageError):
        walk({"root 1.0.0": (body, ["a"]), "a 1.0.0": ("", [])})


@pytest.mark.parametrize(
    "text",
    [
        '[[package]]\nname = "a"\nversion = "1.0.0"\nchecksum = "zz"',
        "[[package",
        '[[package]]\nname = "a"',
        'package = "a"',
    ],
)
def test_a_lock_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(UsageError):
        reached(text, manifest("root 1.0.0", ""), lambda wave: {})


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match="x86_64-pc-windows-msvc"):
        walk({"root 1.0.0": ("", [])}, targets=["x86_64-pc-windows-msvc"])


def crate_file(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_manifest_and_lock_are_read_from_a_crate() -> None:
    crate = crate_file({"a-1.0.0/vendor/Cargo.toml": b"no", "a-1.0.0/Cargo.toml": b"toml", "a-1.0.0/Cargo.lock": b"l"})
    assert (manifest_of(crate), lock_of(crate)) == ("toml", "l")
    with pytest.raises(VzreproError, match=r"no Cargo\.lock"):
        lock_of(crate_file({"a-1.0.0/Cargo.toml": b""}))


def test_a_broken_crate_is_an_error() -> None:
    whole = crate_file({"a-1.0.0/Cargo.toml": bytes(range(256)) * 64})
    damaged = bytearray(whole)
    damaged[12] ^= 0xFF  # within the deflate stream's first block
    for broken in (b"", b"not gzip", whole[:-40], bytes(damaged), gzip.compress(b"not tar" * 200)):
        with pytest.raises(VzreproError):
            manifest_of(broken)


def test_a_crate_whose_manifest_claims_gigabytes_is_an_error() -> None:
    header = tarfile.TarInfo("a-1.0.0/Cargo.toml")
    header.size = 1 << 40
    with pytest.raises(VzreproError, match="claims"):
        manifest_of(gzip.compress(header.tobuf(tarfile.GNU_FORMAT)))


@pytest.mark.parametrize("size", range(12))
def test_a_crate_that_ends_in_its_first_bytes_is_an_error(size: int) -> None:
    whole = gzip.compress(b"", 1)
    for data in (whole[:size], whole[:3] + b"\xff" + whole[4:size]):
        with pytest.raises(VzreproError):
            manifest_of(data)


@settings(max_examples=100)
@given(st.binary(max_size=64), st.integers(0, 511))
def test_any_header_of_a_crate_is_read_or_an_error(data: bytes, at: int) -> None:
    raw = bytearray(gzip.decompress(crate_file({"a-1.0.0/Cargo.toml": b"toml"})))
    raw[at : at + len(data)] = data
    raw[148:156] = b"%06o\0 " % (sum(raw[:148]) + sum(raw[156:512]) + 8 * 0x20)
    with contextlib.suppress(VzreproError):
        assert isinstance(manifest_of(gzip.compress(bytes(raw), 1)), str)


@settings(max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["vers", "cksum", "yanked", "x"]), st.sampled_from(["1.0.0", "0" * 64, 1, None, []])
    ),
    st.binary(max_size=40),
)
def test_any_line_of_an_index_is_read_or_passed_over(fields: dict[str, object], junk: bytes) -> None:
    good = {"vers": "1.0.0", "cksum": "0" * 64}
    lines = [json.dumps(good).encode(), json.dumps(good | fields).encode(), junk.replace(b"\n", b"")]
    found = index_entries(b"\n".join(lines), "a")
    assert found[0].version.text == "1.0.0"
    assert len(found) <= 2


def test_a_cfg_that_is_nested_too_deeply_is_an_error() -> None:
    with pytest.raises(UsageError, match="not a cfg expression"):
        linux_cfg(LINUX_TARGETS[0]).may_match("cfg(" + "not(" * 5000)


def test_file_names_are_cargos() -> None:
    assert Crate("a", "1.0.0", FileHash.of(b"")).file_name == "a-1.0.0.crate"


# --- documents of every kind ------------------------------------------------------------------------------------------


def crates_of(lock_text: str, manifest_text: str) -> list[str]:
    def get(wave: Sequence[Crate]) -> dict[Crate, str]:
        return {crate: manifest(f"{crate.name} {crate.version}", "") for crate in wave}

    return [asked_for(crate) for crate in reached(lock_text, manifest_text, get)]


def test_a_lock_of_format_1_has_its_checksums_in_metadata() -> None:
    text = f"""
[root]
name = "root"
version = "1.0.0"
dependencies = ["a 1.0.0 ({PUBLIC})"]
[[package]]
name = "a"
version = "1.0.0"
source = "{PUBLIC}"
[[package]]
name = "unused"
version = "1.0.0"
source = "git+https://example.org/x#0"
[metadata]
"checksum a 1.0.0 ({PUBLIC})" = "{"0" * 64}"
"checksum unused 1.0.0 (git+https://example.org/x#0)" = "<none>"
"""
    needs_a = manifest("root 1.0.0", '[dependencies]\na = "1"')
    assert crates_of(text, needs_a) == ["a 1.0.0"]
    with pytest.raises(UsageError, match=r"no checksum for a 1\.0\.0"):
        crates_of(text.partition("[metadata]")[0], needs_a)
    with pytest.raises(UsageError, match=r"the checksum of a 1\.0\.0 is none"):
        crates_of(text.replace("0" * 64, "00"), needs_a)


@pytest.mark.parametrize(
    "source",
    [
        "registry+https://crates.example/index",
        "sparse+https://crates.example/index/",
        f"{PUBLIC}.example/",
        "registry+file:///srv/index",
    ],
)
def test_a_private_registrys_crate_is_asked_of_nobody(source: str) -> None:
    packages = {"root 1.0.0": ('[dependencies]\na = "1"', ["a"]), "a 1.0.0": ("", [])}

    def get(wave: Sequence[Crate]) -> dict[Crate, str]:
        raise AssertionError(wave)

    with pytest.raises(UsageError, match=r"a 1\.0\.0 is of the registry") as caught:
        reached(lock(packages).replace(PUBLIC, source), manifest("root 1.0.0", packages["root 1.0.0"][0]), get)
    assert source in caught.value.message


@pytest.mark.parametrize(
    ("before", "version"),
    [
        ('[workspace.package]\nversion = "0.3.0"\n[package]\nversion.workspace = true', "0.3.0"),
        ("[package]", "0.0.0"),
        ('\ufeff[package]\nversion = "0.3.0"', "0.3.0"),
        ('[project]\nversion = "0.3.0"', "0.3.0"),
    ],
)
def test_where_a_package_may_have_its_version(before: str, version: str) -> None:
    packages = {f"root {version}": ("", ["a"]), "a 1.0.0": ("", [])}
    assert crates_of("\ufeff" + lock(packages), f'{before}\nname = "root"\n[dependencies]\na = "1"') == ["a 1.0.0"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("version.workspace = true", "inherits its version from a workspace that is in another file"),
        ("version = 1", "cannot be read"),
        ("version = { path = 'x' }", "cannot be read"),
        ("version = '1.0.0'\n[features]\nx = 'y'", "cannot be read"),
        ("version = '1.0.0'\n[dependencies]\na = { version = 1 }", "cannot be read"),
        ("version = '1.0.0'\n[dependencies]\na = '" + "9" * 5000 + "'", "not a version requirement"),
        ("version = '1.0.0'\n[dependencies]\na = '1.2.3.4'", "not a version requirement"),
        ("version = '1.0.0'\nedition = " + "9" * 5000, "cannot be read"),
        ("version = '1.0.0'\nx = " + "[" * 5000, "cannot be read"),
    ],
)
def test_a_manifest_of_another_shape_is_an_error(body: str, why: str) -> None:
    text = lock({"root 1.0.0": ("", ["a"]), "a 1.0.0": ("", [])})
    with pytest.raises(UsageError, match=why):
        crates_of(text, f'[package]\nname = "root"\n{body}')


VALUES = st.recursive(
    st.sampled_from(["1.0.0", "a", "a 1.0.0", "1.0", "", PUBLIC, "0" * 64, "x/y", "dep:a", "^1", "é", 1, True]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["workspace", "version", "features", "optional", "package", "a"]), inner)
    ),
    max_leaves=4,
)


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)


@given(st.dictionaries(st.sampled_from(["name", "version", "source", "checksum", "dependencies"]), VALUES, max_size=2))
def test_any_package_of_a_lock_is_read_or_an_error(fields: dict[str, object]) -> None:
    package = {"name": "a", "version": "1.0.0", "source": PUBLIC, "checksum": "0" * 64, **fields}
    body = "\n".join(f"{key} = {toml(value)}" for key, value in package.items())
    text = lock({"root 1.0.0": ("", ["a"])}) + f"\n[[package]]\n{body}\n"
    try:
        found = crates_of(text, manifest("root 1.0.0", '[dependencies]\na = "1"'))
    except UsageError:
        return
    assert [name.partition(" ")[0] for name in found] == ["a"]


@given(
    st.dictionaries(
        st.sampled_from(["package", "features", "dependencies", "build-dependencies", "target", "workspace"]),
        VALUES,
        max_size=3,
    )
)
def test_any_manifest_is_read_or_an_error(tables: dict[str, object]) -> None:
    text = lock({"root 1.0.0": ("", ["a"]), "a 1.0.0": ("", [])})
    body = {"package": {"name": "root", "version": "1.0.0"}, **tables}
    try:
        found = crates_of(text, "\n".join(f"{key} = {toml(value)}" for key, value in body.items()))
    except UsageError:
        return
    assert found in ([], ["a 1.0.0"])
