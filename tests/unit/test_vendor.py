"""The vendor directory that Rust builds in the sandbox see: real crates, stubs, and nothing a crate smuggles in."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "vzrepro/recipes/files/rust/vendor.py"


@pytest.fixture(scope="module")
def vendor() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vendor", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def member(
    name: str, data: bytes = b"", mode: int = 0o644, kind: bytes = tarfile.REGTYPE
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.type = len(data), mode, kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info, data


def crate(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> str:
    """Write a crate; its sha256 in hex."""
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(path: Path, packages: dict[str, str | None]) -> Path:
    """Write a lock of `name version` → checksum, None for the package itself."""
    lines = ["version = 4"]
    for package, checksum in packages.items():
        name, version = package.split()
        lines += ["[[package]]", f'name = "{name}"', f'version = "{version}"']
        lines += [] if checksum is None else ['source = "registry+https://example.org/i"', f'checksum = "{checksum}"']
    path.write_text("\n".join(lines))
    return path


ROOT = """
[package]
name = "root"
version = "1.0.0"
[features]
extra = ["renamed/from-a-feature", "gone?/weak", "dep:gone", "plain"]
plain = []
[dependencies]
a = "1"
renamed = { package = "gone", version = "1", optional = true, features = ["from-a-dependency"] }
[target.'cfg(windows)'.dependencies]
gone = { version = "1", features = ["windows-only"], optional = true }
[dev-dependencies]
tool = { version = "2", features = ["dev"] }
"""

A = '[package]\nname = "a"\nversion = "1.0.0"\n[build-dependencies]\ngone = { version = "1", features = ["build"] }\n'


def test_crates_are_unpacked_and_the_others_become_stubs(vendor: ModuleType, tmp_path: Path) -> None:
    crates, out = tmp_path / "crates", tmp_path / "vendor"
    crates.mkdir()
    checksum = crate(
        crates / "a-1.0.0.crate",
        member("a-1.0.0/", mode=0o700, kind=tarfile.DIRTYPE),
        member("a-1.0.0/Cargo.toml", A.encode(), 0o600),
        member("a-1.0.0/src/lib.rs", b"//!", 0o400),
        member("a-1.0.0/build.sh", b"#!", 0o4775),
    )
    (tmp_path / "Cargo.toml").write_text(ROOT)
    lock(
        tmp_path / "Cargo.lock",
        {"root 1.0.0": None, "a 1.0.0": checksum, "gone 1.4.0": "1" * 64, "tool 2.0.0+x": "2" * 64},
    )
    vendor.main(["vendor", str(tmp_path), str(crates), str(out)])

    assert sorted(path.name for path in out.iterdir()) == ["a-1.0.0", "gone-1.4.0", "tool-2.0.0+x"]
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (out / "a-1.0.0").rglob("*") if path.is_file()}
    assert modes == {"Cargo.toml": 0o644, "lib.rs": 0o644, "build.sh": 0o755, ".cargo-checksum.json": 0o644}
    for name, expected in {"a-1.0.0": checksum, "gone-1.4.0": "1" * 64}.items():
        assert json.loads((out / name / ".cargo-checksum.json").read_text()) == {"files": {}, "package": expected}

    stub = tomllib.loads((out / "gone-1.4.0" / "Cargo.toml").read_text())
    assert (stub["package"]["name"], stub["package"]["version"]) == ("gone", "1.4.0")
    assert "dependencies" not in stub
    wanted = {"from-a-feature", "weak", "from-a-dependency", "windows-only", "build"}
    assert set(stub["features"]) == wanted
    assert tomllib.loads((out / "tool-2.0.0+x" / "Cargo.toml").read_text())["features"] == {"dev": []}
    assert "compile_error!" in (out / "gone-1.4.0" / "src" / "lib.rs").read_text()


@pytest.mark.parametrize(
    ("hostile", "why"),
    [
        (member("a-1.0.0/../../x", b"x"), "unsafe path"),
        (member("/a-1.0.0/x", b"x"), "unsafe path"),
        (member("b-1.0.0/x", b"x"), "unsafe path"),
        (member("a-1.0.0", b"x"), "not a file in"),
        (member("a-1.0.0/link", kind=tarfile.SYMTYPE), "not a file in"),
        (member("a-1.0.0/link", kind=tarfile.LNKTYPE), "not a file in"),
        (member("a-1.0.0/device", kind=tarfile.CHRTYPE), "not a file in"),
    ],
)
def test_a_hostile_crate_ends_the_build(
    vendor: ModuleType, tmp_path: Path, hostile: tuple[tarfile.TarInfo, bytes], why: str
) -> None:
    (tmp_path / "crates").mkdir()
    checksum = crate(tmp_path / "crates" / "a-1.0.0.crate", member("a-1.0.0/Cargo.toml", A.encode()), hostile)
    lock(tmp_path / "Cargo.lock", {"a 1.0.0": checksum})
    (tmp_path / "Cargo.toml").write_text(ROOT)
    with pytest.raises(SystemExit, match=why):
        vendor.vendor_all(tmp_path, tmp_path / "crates", tmp_path / "vendor")
    assert {path.name for path in tmp_path.iterdir()} == {"crates", "vendor", "Cargo.lock", "Cargo.toml"}


def test_a_crate_with_another_checksum_ends_the_build(vendor: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "crates").mkdir()
    found = crate(tmp_path / "crates" / "a-1.0.0.crate", member("a-1.0.0/Cargo.toml", A.encode()))
    lock(tmp_path / "Cargo.lock", {"a 1.0.0": "0" * 64})
    (tmp_path / "Cargo.toml").write_text(ROOT)
    with pytest.raises(SystemExit, match=f"wants sha256 {'0' * 64}, found {found}"):
        vendor.vendor_all(tmp_path, tmp_path / "crates", tmp_path / "vendor")


def test_a_program_comes_from_its_crate_or_from_a_directory(vendor: ModuleType, tmp_path: Path) -> None:
    crate(tmp_path / "source", member("p-1.0.0/Cargo.toml", b"c", 0o400), member("p-1.0.0/src/main.rs", b"m", 0o600))
    vendor.main(["source", str(tmp_path / "source"), str(tmp_path / "published")])
    local = tmp_path / "local"
    (local / "src").mkdir(parents=True)
    for name, text in {"Cargo.toml": "c", "src/main.rs": "m"}.items():
        (local / name).write_text(text)
        (local / name).chmod(0o444)
    (local / "src").chmod(0o555)
    vendor.main(["source", str(local), str(tmp_path / "ours")])
    (local / "src").chmod(0o755)
    for program in (tmp_path / "published", tmp_path / "ours"):
        assert {path.relative_to(program).as_posix(): path.read_text() for path in program.rglob("*.*")} == {
            "Cargo.toml": "c",
            "src/main.rs": "m",
        }
        assert {path.stat().st_mode & 0o777 for path in program.rglob("*.*")} == {0o644}
        assert (program / "src").stat().st_mode & 0o200


def test_a_smaller_lock_passes_and_a_different_one_does_not(vendor: ModuleType, tmp_path: Path) -> None:
    pinned = lock(tmp_path / "old", {"root 1.0.0": None, "a 1.0.0": "1" * 64, "b 1.0.0": "2" * 64})
    vendor.check(lock(tmp_path / "new", {"root 1.0.0": None, "b 1.0.0": "2" * 64}), pinned)
    for other in ({"b 1.0.0": "3" * 64}, {"b 1.0.1": "2" * 64}, {"c 1.0.0": "2" * 64}, {"b 1.0.0": None}):
        with pytest.raises(SystemExit, match="the lock does not pin"):
            vendor.check(lock(tmp_path / "new", dict(other)), pinned)


@pytest.mark.parametrize("root", ['[root]\nname = "root"\nversion = "1.0.0"\n', ""])
def test_a_lock_of_format_1_has_its_checksums_apart(vendor: ModuleType, tmp_path: Path, root: str) -> None:
    crates, registry = tmp_path / "crates", "registry+https://example.org/i"
    crates.mkdir()
    found = crate(crates / "a-1.0.0.crate", member("a-1.0.0/Cargo.toml", b"\xef\xbb\xbf" + A.encode()))
    text = root + "".join(
        f'[[package]]\nname = "{name}"\nversion = "1.0.0"\nsource = "{registry}"\n' for name in ("a", "gone")
    )
    sums = {"a": found, "gone": "1" * 64}
    text += "[metadata]\n" + "".join(
        f'"checksum {name} 1.0.0 ({registry})" = "{checksum}"\n' for name, checksum in sums.items()
    )
    (tmp_path / "Cargo.lock").write_text("\ufeff" + text, encoding="utf-8")
    (tmp_path / "Cargo.toml").write_text("\ufeff" + ROOT, encoding="utf-8")
    vendor.vendor_all(tmp_path, crates, tmp_path / "vendor")
    for name, checksum in sums.items():
        place = tmp_path / "vendor" / f"{name}-1.0.0"
        assert json.loads((place / ".cargo-checksum.json").read_text())["package"] == checksum
        assert (place / "src/lib.rs").exists() == (name == "gone")  # a stub
    # Cargo writes it in today's format, and pins the same.
    newer = lock(tmp_path / "new", {"a 1.0.0": found, "gone 1.0.0": "1" * 64})
    vendor.check(newer, tmp_path / "Cargo.lock")
    (tmp_path / "Cargo.lock").write_text(text.replace(found, "0" * 64))
    with pytest.raises(SystemExit, match="the lock does not pin"):
        vendor.check(newer, tmp_path / "Cargo.lock")


def test_wrong_words_are_refused(vendor: ModuleType) -> None:
    with pytest.raises(SystemExit, match="usage"):
        vendor.main(["vendor", "one"])


@pytest.mark.parametrize(
    ("manifest", "why"),
    [
        ("[dependencies]\na = 5\n", "Cargo.toml: AttributeError"),
        ('dependencies = "a"\n', "Cargo.toml: AttributeError"),
        ('[dependencies]\na = { version = "1", features = 7 }\n', "Cargo.toml: TypeError"),
        ('[dependencies]\na = { package = ["b"] }\n', "Cargo.toml: TypeError"),
        ("[features]\nx = [1]\n", "Cargo.toml: AttributeError"),
        ("target = 3\n", "Cargo.toml: AttributeError"),
        ("a = " + "[" * 100_000, "Cargo.toml: RecursionError"),
        ("[package\n", "Cargo.toml: TOMLDecodeError"),
    ],
)
def test_a_manifest_of_another_shape_is_named(vendor: ModuleType, tmp_path: Path, manifest: str, why: str) -> None:
    (tmp_path / "crates").mkdir()
    lock(tmp_path / "Cargo.lock", {"gone 1.0.0": "1" * 64})
    (tmp_path / "Cargo.toml").write_text(manifest)
    with pytest.raises(SystemExit, match=why) as refused:
        vendor.vendor_all(tmp_path, tmp_path / "crates", tmp_path / "vendor")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("package = 5\n", "TypeError"),
        ("[[package]]\nversion = '1'\n", "KeyError: 'name'"),
        ("[[package]]\nname = '../x'\nversion = '1'\n", "'../x' is no name"),
        ("[[package]]\nname = 'x'\nversion = '1/..'\n", "'1/..' is no name or version"),
        ("[[package]]\nname = 'x'\nversion = 1\n", "TypeError"),
        ("metadata = []\n[[package]]\nname = 'x'\nversion = '1'\n", "AttributeError"),
    ],
)
def test_a_lock_of_another_shape_is_named(vendor: ModuleType, tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "Cargo.lock").write_text(text)
    with pytest.raises(SystemExit, match=f"Cargo.lock: .*{why}"):
        vendor.check(tmp_path / "Cargo.lock", tmp_path / "Cargo.lock")


def test_a_crate_that_is_damaged_anywhere_is_named(vendor: ModuleType, tmp_path: Path) -> None:
    """As it is fetched a crate is what the lock says; a lock may have been made of a broken one."""
    path = tmp_path / "a-1.0.0.crate"
    crate(path, member("a-1.0.0/Cargo.toml", A.encode()), member("a-1.0.0/src/lib.rs", bytes(3000)))
    packed = path.read_bytes()
    plain = gzip.decompress(packed)
    damaged = [packed[:length] for length in range(0, len(packed), 7)]
    damaged += [gzip.compress(plain[:place] + b"\xff" + plain[place + 1 :]) for place in range(0, 512, 3)]
    told = 0
    for count, data in enumerate(damaged):
        path.write_bytes(data)
        try:
            vendor.extract(path, tmp_path / str(count))
        except SystemExit as refused:
            assert str(refused).startswith("vendor.py: a-1.0.0.crate: ")
            assert "\n" not in str(refused)
            told += 1
    assert told > len(damaged) // 2
