"""A stock Nix client reads what we write, and we read what it writes. Needs `nix` (Debian: nix-bin) and no network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vzrepro import nar
from vzrepro.cache import BinaryCache, DirectoryBackend, Kept, NarInfo, SigningKey, TrustedKeys
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.model import BuildKey, Derivation, DrvHash, FileHash, ObjectInfo, Outcome, canonical_json, store_path

KEY = SigningKey.generate("vzrepro-test-1")
STRANGER = SigningKey.generate("stranger-1")

if shutil.which("nix") is None:
    pytest.skip("nix is not installed: apt-get install -y --no-install-recommends nix-bin", allow_module_level=True)


class Nix:
    """The client, with a root of its own in `root`, trusting our key alone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("NIX_")},
            "HOME": str(root / "home"),
            "NIX_CONFIG": "\n".join(
                (
                    "experimental-features = nix-command",
                    f"trusted-public-keys = {KEY.public}",
                    "substituters =",
                    "build-users-group =",
                    "sandbox = false",
                )
            ),
        }

    def run(self, *args: object) -> subprocess.CompletedProcess[str]:
        (self.root / "home").mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            list(map(str, args)), env=self.environ, text=True, capture_output=True, check=False, timeout=120
        )

    def ok(self, *args: object) -> str:
        done = self.run(*args)
        assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path / "nix")


@pytest.fixture
def backend(tmp_path: Path) -> DirectoryBackend:
    return DirectoryBackend(tmp_path / "cache")


@pytest.fixture
def cache(backend: DirectoryBackend) -> BinaryCache:
    def fail(message: str) -> None:
        raise AssertionError(message)

    return BinaryCache(backend, TrustedKeys([KEY.public]), KEY, warn=fail)


def bundle(tmp_path: Path) -> tuple[ObjectInfo, Path, bytes]:
    """An object with everything a tree can have, larger than one zstd frame, that names itself."""
    drv = Derivation(name="container-bundle", builder="sandbox", env={"A": "1"})
    path = store_path(drv.drv_hash(), drv.name)
    tree = tmp_path / "tree"
    (tree / "bin" / "empty").mkdir(parents=True)
    (tree / "bin" / "run").write_text(f"#!{path}/bin/run\n")
    (tree / "bin" / "run").chmod(0o755)
    (tree / "vmlinux").write_bytes(os.urandom(1000) * 9000)
    (tree / "nothing").write_bytes(b"")
    (tree / "grüße").symlink_to("../nowhere")
    nar_hash, nar_size = nar.nar_hash(tree)
    key = BuildKey.of(b"key")
    info = ObjectInfo(path, nar_hash, nar_size, (path,), drv.drv_hash(), key, FileHash.of(b"origin"))
    return info, tree, canonical_json(drv.document())


def test_nix_copies_and_verifies_what_we_push(nix: Nix, cache: BinaryCache, tmp_path: Path) -> None:
    info, tree, derivation = bundle(tmp_path)
    log = tmp_path / "log"
    log.write_text("make vmlinux\n")
    assert cache.push(info, tree, derivation=derivation, log=log).kept is Kept.NEW

    described = nix.ok("nix", "path-info", "--store", cache.url, "--sigs", "--size", "-r", info.path)
    assert f"{info.path}\t" in described.replace(" ", "\t")
    assert "vzrepro-test-1:" in described

    nix.ok("nix", "copy", "--from", cache.url, "--to", nix.root, info.path)
    assert str(info.path) in nix.ok("nix", "path-info", "--store", nix.root, "-r", info.path)
    nix.ok("nix", "store", "verify", "--store", nix.root, "-r", "--sigs-needed", "1", info.path)
    arrived = nix.root / str(info.path).lstrip("/")
    assert nar.nar_hash(arrived) == (info.nar_hash, info.nar_size)
    assert nix.ok("nix", "log", "--store", cache.url, info.path) == "make vmlinux\n"
    assert nix.ok("nix", "store", "cat", "--store", cache.url, f"{info.path}/bin/run") == f"#!{info.path}/bin/run\n"

    # What Nix has left in the cache does not disturb us.
    assert cache.push(info, tree, derivation=derivation).kept is Kept.PRESENT


def test_nix_hashes_a_tree_as_we_do(nix: Nix, tmp_path: Path) -> None:
    info, tree, _ = bundle(tmp_path)
    assert nix.ok("nix-hash", "--type", "sha256", "--base32", tree).strip() == info.nar_hash.nix.removeprefix("sha256:")


def test_nix_refuses_what_is_not_signed_by_our_key(nix: Nix, backend: DirectoryBackend, tmp_path: Path) -> None:
    info, tree, _ = bundle(tmp_path)
    stranger = BinaryCache(backend, TrustedKeys([STRANGER.public]), STRANGER)
    stranger.push(info, tree)
    refused = nix.run("nix", "copy", "--from", stranger.url, "--to", nix.root, info.path)
    assert refused.returncode != 0
    assert "signature" in refused.stderr


def test_we_read_what_nix_copies_to_a_cache(nix: Nix, cache: BinaryCache, tmp_path: Path) -> None:
    info, tree, derivation = bundle(tmp_path)
    cache.push(info, tree, derivation=derivation)
    nix.ok("nix", "copy", "--from", cache.url, "--to", nix.root, info.path)

    back = DirectoryBackend(tmp_path / "back")
    nix.ok("nix", "copy", "--from", nix.root, "--to", f"{back.url}?compression=zstd", info.path)
    reading = BinaryCache(back, TrustedKeys([KEY.public]))
    found = reading.query(info.path)
    assert found is not None
    got = reading.fetch(found, tmp_path / "dest")
    # Nix keeps our signature and drops the fields it does not know.
    kept = replace(info, drv_hash=None, build_key=None, origin=None)
    assert got == replace(kept, outcome=Outcome.SUBSTITUTED, voucher=found.render())
    assert nar.nar_hash(tmp_path / "dest") == (info.nar_hash, info.nar_size)


def test_we_read_what_nix_signs_itself(nix: Nix, tmp_path: Path) -> None:
    """Nix's own fingerprint is the one that we verify."""
    key_file = tmp_path / "key"
    KEY.save(key_file)
    source = tmp_path / "dep"
    source.write_text("dep\n")
    dep = nix.ok("nix-store", "--store", nix.root, "--add", source).strip()
    back = DirectoryBackend(tmp_path / "back")
    nix.ok("nix", "copy", "--from", nix.root, "--to", f"{back.url}?compression=none&secret-key={key_file}", dep)
    (name,) = (entry.key for entry in back.list() if entry.key.endswith(".narinfo"))
    opened = back.get(name)
    assert opened is not None
    with opened as stream:
        info = NarInfo.parse(stream.read(1 << 20))
    assert TrustedKeys([KEY.public]).signers(info.fingerprint, info.signatures) == {KEY.public}
    reading = BinaryCache(back, TrustedKeys([KEY.public]))
    found = reading.query(info.path)
    assert found is not None
    reading.fetch(found, tmp_path / "dest")
    assert (tmp_path / "dest").read_text() == "dep\n"
    assert narinfo_key(info.path) == name


def test_store_paths_are_those_nix_computes(nix: Nix) -> None:
    """Nix hashes a derivation without inputs as its text with the outputs left blank: our formula does the rest."""
    expression = 'derivation { name = "hello-1.0"; system = "any"; builder = "/bin/sh"; args = [ "-c" "echo" ]; }'
    drv = nix.ok("nix-instantiate", "--store", nix.root, "-E", expression).strip().splitlines()[-1]
    text = (nix.root / drv.lstrip("/")).read_text()
    match = re.search(r"/nix/store/[0-9a-z]{32}-hello-1\.0(?=\")", text)
    assert match is not None
    inner = DrvHash.of(text.replace(match[0], "").encode())
    assert str(store_path(inner, "hello-1.0")) == match[0]


def test_nix_and_we_mean_the_same_key(nix: Nix, tmp_path: Path) -> None:
    text = nix.ok("nix", "key", "generate-secret", "--key-name", "made-by-nix")
    key = SigningKey.parse(text.strip())
    done = subprocess.run(
        ["nix", "key", "convert-secret-to-public"], input=key.text, env=nix.environ, text=True, capture_output=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(key.public)
