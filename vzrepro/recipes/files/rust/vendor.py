"""Lays out a Cargo vendor directory from the crates a build reaches, with stubs for the others its lock names.

    vendor.py source SOURCE PROGRAM             SOURCE is a .crate or a directory, PROGRAM is written
    vendor.py vendor PROGRAM CRATES VENDOR      CRATES holds <name>-<version>.crate files, VENDOR is written
    vendor.py check NEW_LOCK OLD_LOCK           NEW_LOCK holds nothing that OLD_LOCK does not pin

Cargo's resolver wants a Cargo.toml for every package that any platform or feature could need, although it compiles
few of them. A crate that is not in CRATES becomes a stub: its name, its version, every feature somebody asks of it,
no dependency, and a source that does not compile. What only stubs would have needed then leaves the lock, and `check`
proves that this was all that changed. Each crate is checked against the lock's sha256 before it is unpacked.

Runs in the sandbox with Python's standard library alone. Ends with exit code 1 and one line on any failure.
"""

import hashlib
import json
import re
import shutil
import sys
import tarfile
import tomllib
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

STUB = 'compile_error!("{name} {version} is not among the fetched crates: run `vzrepro lock`");\n'

NAME = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.+-]*")
"""Of a package and of its version: a part of a path."""

BROKEN = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, RecursionError, TypeError, ValueError),
    *(tarfile.TarError, zlib.error),
)
"""What reading a file of another shape than the expected one ends in."""


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Whatever is wrong with a file becomes one line that names it."""
    try:
        yield
    except BROKEN as error:
        fail(f"{file}: {type(error).__name__}: {' '.join(str(error).split())}")


def source(given: Path, program: Path) -> None:
    """Write `program`, a package's directory, from its published crate or from a directory of ours."""
    if given.is_dir():
        shutil.copytree(given, program, copy_function=shutil.copyfile)
        for path in (program, *program.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)  # what comes from a store is read-only
    else:
        extract(given, program)


def vendor_all(program: Path, crates: Path, vendor: Path) -> None:
    """Write `vendor`: one directory per package of `program`'s lock that comes from a registry."""
    stubs = []
    manifests = {"Cargo.toml": document(program / "Cargo.toml")}
    vendor.mkdir()
    for package in packages(program / "Cargo.lock"):
        name, version, checksum = package["name"], package["version"], package.get("checksum")
        if checksum is None:
            continue
        crate = crates / f"{name}-{version}.crate"
        if not crate.exists():
            stubs.append((name, version, checksum))
            continue
        data = crate.read_bytes()
        if (found := hashlib.sha256(data).hexdigest()) != checksum:
            fail(f"{crate.name}: the lock wants sha256 {checksum}, found {found}")
        target = vendor / f"{name}-{version}"
        extract(crate, target)
        checksum_file(target, checksum)
        manifests[f"Cargo.toml of {target.name}"] = document(target / "Cargo.toml")
    asked = features_asked(manifests)
    for name, version, checksum in stubs:
        stub(vendor / f"{name}-{version}", name, version, sorted(asked[name]))
        checksum_file(vendor / f"{name}-{version}", checksum)


def check(new: Path, old: Path) -> None:
    """Fail unless every package of `new` is in `old` with the same checksum."""
    pinned = {(p["name"], p["version"], p.get("checksum")) for p in packages(old)}
    for package in packages(new):
        if (package["name"], package["version"], package.get("checksum")) not in pinned:
            fail(f"Cargo resolved {package['name']} {package['version']}, which the lock does not pin")


def packages(lock: Path) -> list[dict[str, Any]]:
    """The packages of a lock, formats 1 to 4, each with the `checksum` it has.

    Format 1 has the checksums in [metadata], and its oldest files the package itself in [root].
    """
    read = document(lock)
    with reading(lock.name):
        apart = read.get("metadata", {})
        listed: list[dict[str, Any]] = [*([read["root"]] if "root" in read else []), *read.get("package", [])]
        for package in listed:
            for part in (package["name"], package["version"]):
                if not NAME.fullmatch(part):
                    fail(f"{lock.name}: {part!r} is no name or version of a package")
            key = "checksum {name} {version} ({source})".format_map({"source": None, **package})
            if "checksum" not in package and apart.get(key, "<none>") != "<none>":
                package["checksum"] = apart[key]
        return listed


def document(path: Path) -> dict[str, Any]:
    """A TOML file; a byte order mark before it is Windows' editors', and cargo passes over it."""
    with reading(str(path)):
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))


def extract(crate: Path, target: Path) -> None:
    """Unpack regular files below the crate's one top directory into `target`, with modes every user can read."""
    top = None
    with reading(crate.name), tarfile.open(crate, "r:gz") as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            top = top or path.parts[:1]
            if path.is_absolute() or ".." in path.parts or path.parts[:1] != top:
                fail(f"{crate.name}: unsafe path {member.name!r}")
            if member.isdir():
                continue
            if not member.isreg() or len(path.parts) < 2:
                fail(f"{crate.name}: {member.name!r} is not a file in the crate's directory")
            reader = archive.extractfile(member)
            assert reader is not None  # a regular file always has one
            out = target.joinpath(*path.parts[1:])
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("wb") as file:
                shutil.copyfileobj(reader, file)
            out.chmod(0o755 if member.mode & 0o100 else 0o644)


def checksum_file(target: Path, checksum: str) -> None:
    """What a directory source needs: the package's checksum is compared with Cargo.lock, single files are not."""
    (target / ".cargo-checksum.json").write_text(json.dumps({"files": {}, "package": checksum}))


def features_asked(manifests: dict[str, dict[str, Any]]) -> defaultdict[str, set[str]]:
    """Package name → every feature that some manifest, by what it is called, asks of it, in a dependency or in a
    feature."""
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for called, manifest in manifests.items():
        names: defaultdict[str, set[str]] = defaultdict(set)
        with reading(called):
            for key, dependency in dependencies(manifest):
                table = {} if isinstance(dependency, str) else dependency
                name = table.get("package", key)
                names[key].add(name)
                asked[name].update(table.get("features", ()))
            for values in manifest.get("features", {}).values():
                for value in values:
                    key, slash, feature = value.partition("/")
                    if slash:
                        for name in names[key.removesuffix("?")]:
                            asked[name].add(feature)
    return asked


def dependencies(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for table in (manifest, *manifest.get("target", {}).values()):
        for kind in (
            "dependencies",
            "build-dependencies",
            "dev-dependencies",
            "build_dependencies",
            "dev_dependencies",
        ):
            yield from table.get(kind, {}).items()


def stub(target: Path, name: str, version: str, features: list[str]) -> None:
    """A package that resolves and never compiles."""
    (target / "src").mkdir(parents=True)
    (target / "src" / "lib.rs").write_text(STUB.format(name=name, version=version))
    lines = ["[package]", f'name = "{name}"', f'version = "{version}"', 'edition = "2021"', "", "[features]"]
    lines += [f"{json.dumps(feature)} = []" for feature in features]
    (target / "Cargo.toml").write_text("\n".join(lines) + "\n")


def fail(message: str) -> None:
    sys.exit(f"vendor.py: {message}")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["source", given, program]:
            source(Path(given), Path(program))
        case ["vendor", program, crates, vendor]:
            vendor_all(Path(program), Path(crates), Path(vendor))
        case ["check", new, old]:
            check(Path(new), Path(old))
        case _:
            fail("usage: vendor.py source SOURCE PROGRAM | vendor PROGRAM CRATES VENDOR | check NEW_LOCK OLD_LOCK")


if __name__ == "__main__":
    main(sys.argv[1:])
