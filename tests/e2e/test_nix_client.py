"""Stock Nix clients read what we write, and we read what they write: this host's `nix`, and that of Debian's trixie in
a container. Needs `nix` (Debian: nix-bin), Docker, and for the container's packages the network, once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests import PATIENCE_SECS, faults, servers, trixie
from tests.caches import new_cache
from tests.contract.served import Serving
from tests.e2e.conftest import Cli
from tests.faults import FaultyProxy
from vzrepro import nar
from vzrepro.base import events
from vzrepro.base.model import (
    BuildKey,
    Derivation,
    DrvHash,
    FileHash,
    ObjectInfo,
    Outcome,
    StorePath,
    canonical_json,
    store_path,
)
from vzrepro.cache import (
    CacheReader,
    CacheWriter,
    Damaged,
    DirectoryBackend,
    NarInfo,
    PushOutcome,
    SigningKey,
    TrustedKeys,
)
from vzrepro.cache.narinfo import MAX_SIZE, narinfo_key
from vzrepro.cache.places import open_backend
from vzrepro.cache.remote import Patience
from vzrepro.realize.transfer import Pusher
from vzrepro.store import LocalStore

KEY = SigningKey.generate("vzrepro-test-1")
SECOND = SigningKey.generate("vzrepro-test-2")
STRANGER = SigningKey.generate("stranger-1")

DOCKER = os.environ.get("VZREPRO_DOCKER", "docker")
OLD_SECS = 40 * 24 * 3600


class Nix:
    """A client, started with the words `command`, with a root of its own in `root`, trusting our key alone."""

    def __init__(self, root: Path, command: Sequence[str] = ()) -> None:
        self.root = root
        self.command = command
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

    def run(self, *args: object, given: str = "") -> subprocess.CompletedProcess[str]:
        (self.root / "home").mkdir(parents=True, exist_ok=True)
        return subprocess.run(
            [*self.command, *map(str, args)],
            env=self.environ, input=given, text=True, capture_output=True, check=False, timeout=PATIENCE_SECS,
        )  # fmt: skip

    def ok(self, *args: object, given: str = "") -> str:
        done = self.run(*args, given=given)
        assert done.returncode == 0, f"{' '.join(map(str, args))}\n{done.stdout}{done.stderr}"
        return done.stdout

    def arrived(self, path: StorePath) -> Path:
        """Where its root has the object."""
        return self.root / str(path).lstrip("/")


@pytest.fixture(scope="session")
def trixie_nix() -> str:
    """The id of the image with trixie's client."""
    return str(trixie.nix_image())


@pytest.fixture(params=["host", "trixie"])
def nix(request: pytest.FixtureRequest, tmp_path: Path) -> Nix:
    if request.param == "host":
        if shutil.which("nix") is None:
            pytest.skip("nix is not installed: apt-get install -y --no-install-recommends nix-bin")
        return Nix(tmp_path / "nix")
    image = request.getfixturevalue("trixie_nix")
    seen = ("-v", f"{tmp_path}:{tmp_path}", "--env", "HOME", "--env", "NIX_CONFIG")
    who = ("--user", f"{os.getuid()}:{os.getgid()}", "--network", "host")
    return Nix(tmp_path / "nix", (DOCKER, "run", "--rm", "--interactive", "--pull", "never", *who, *seen, image))


# --- what there is to share -------------------------------------------------------------------------------------------


@pytest.fixture
def backend(tmp_path: Path) -> DirectoryBackend:
    return DirectoryBackend(tmp_path / "cache")


def fail(message: str) -> None:
    raise AssertionError(message)


def opened(backend: DirectoryBackend, signer: SigningKey | None = KEY) -> CacheWriter:
    """The cache as somebody sees it who trusts our key, and signs with `signer`."""
    return new_cache(backend, TrustedKeys([KEY.public]), signer, warn=fail)


@pytest.fixture
def cache(backend: DirectoryBackend) -> CacheWriter:
    return opened(backend)


@dataclass(frozen=True)
class Place:
    """A cache, and the URL by which a Nix client reads it."""

    cache: CacheWriter
    url: str


@pytest.fixture(params=["file", "http", "bucket"])
def place(request: pytest.FixtureRequest, backend: DirectoryBackend, tmp_path: Path) -> Iterator[Place]:
    if request.param == "file":
        yield Place(opened(backend), backend.url)
    elif request.param == "http":
        with Serving(tmp_path / "cache") as serving:
            yield Place(opened(backend), serving.url)
    else:
        request.getfixturevalue("credentials")
        server: servers.S3Server = request.getfixturevalue("seaweed")
        name = f"nix-{uuid.uuid4().hex}"
        servers.make_bucket(server, name)
        yield Place(opened(open_backend(server.url(name), Patience(), tmp_path)), f"{server.endpoint}/{name}")


@dataclass(frozen=True)
class Shop:
    """A store with two objects: a `bundle` with everything a tree can have, and the `agent` that it refers to."""

    store: LocalStore
    agent: ObjectInfo
    bundle: ObjectInfo

    def push_all(self, cache: CacheWriter) -> None:
        done = Pusher(self.store, events.ignore, threading.Event()).push_all(cache, [self.bundle, self.agent], jobs=2)
        assert set(done.kept[PushOutcome.NEW]) == {self.agent.path, self.bundle.path}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    with LocalStore(tmp_path / "store") as store:
        tree = tmp_path / "tree"
        tree.write_bytes(os.urandom(3000))
        agent = keep(store, tree, Derivation(name="guest-agent-1.0", builder="sandbox", env={"A": "1"}))
        tree.unlink()

        drv = Derivation(name="container-bundle", builder="sandbox", env={"A": "2"})
        path = store_path(drv.drv_hash(), drv.name)
        (tree / "bin" / "empty").mkdir(parents=True)
        (tree / "bin" / "run").write_text(f"#!{path}/bin/run\n{agent.path}\n")
        (tree / "bin" / "run").chmod(0o755)
        (tree / "vmlinux").write_bytes(os.urandom(1000) * 9000)  # more than one zstd frame
        (tree / "nothing").write_bytes(b"")
        (tree / "grüße").symlink_to("../nowhere")
        bundle = keep(store, tree, drv, agent.path, path)
        log = store.log_path(path)
        log.write_text("make vmlinux\n")
        yield Shop(store, agent, bundle)


def keep(store: LocalStore, tree: Path, drv: Derivation, *references: StorePath) -> ObjectInfo:
    """Put a tree into the store as what the derivation gave."""
    key = BuildKey.of(drv.name.encode())
    store.put_derivation(drv.drv_hash(), drv.name, canonical_json(drv.document()))
    with store.scratch("made") as scratch:
        nar_hash, nar_size, _ = nar.canonical_copy(tree, scratch / "tree")
        path = store_path(drv.drv_hash(), drv.name)
        info = ObjectInfo(path, nar_hash, nar_size, tuple(sorted(references)), drv.drv_hash(), key)
        return store.add(scratch / "tree", info)


def narinfo_of(backend: DirectoryBackend, path: StorePath) -> NarInfo:
    entry = backend.get(narinfo_key(path))
    assert entry is not None
    with entry as stream:
        return NarInfo.parse(stream.read(MAX_SIZE))


# --- what they read ---------------------------------------------------------------------------------------------------


def test_it_copies_a_closure_and_verifies_it(nix: Nix, shop: Shop, place: Place) -> None:
    shop.push_all(place.cache)
    agent, bundle = shop.agent.path, shop.bundle.path
    described = nix.ok("nix", "path-info", "--store", place.url, "--sigs", "--size", "-r", bundle)
    assert {line.split()[0] for line in described.splitlines()} == {str(agent), str(bundle)}
    assert described.count("\tvzrepro-test-1:") == 2

    nix.ok("nix", "copy", "--from", place.url, "--to", nix.root, bundle)
    nix.ok("nix", "store", "verify", "--store", nix.root, "-r", "--sigs-needed", "1", bundle)
    for info in (shop.agent, shop.bundle):
        assert nar.nar_hash(nix.arrived(info.path)) == (info.nar_hash, info.nar_size)
    assert nix.ok("nix-store", "--store", nix.root, "-q", "--references", bundle).split() == sorted(
        [str(agent), str(bundle)]
    )
    assert nix.ok("nix", "log", "--store", place.url, bundle) == "make vmlinux\n"
    run = f"#!{bundle}/bin/run\n{agent}\n"
    assert nix.ok("nix", "store", "cat", "--store", place.url, f"{bundle}/bin/run") == run


def test_substituters_and_a_key_are_all_it_needs(nix: Nix, shop: Shop, place: Place) -> None:
    shop.push_all(place.cache)
    substituting = ("--option", "substituters", place.url)
    nix.ok("nix-store", "--store", nix.root, *substituting, "--realise", shop.agent.path)
    assert nix.arrived(shop.agent.path).is_file()
    assert not nix.arrived(shop.bundle.path).exists()
    nix.ok("nix", "build", "--store", nix.root, *substituting, "--no-link", shop.bundle.path)
    assert nar.nar_hash(nix.arrived(shop.bundle.path)) == (shop.bundle.nar_hash, shop.bundle.nar_size)


def test_it_goes_on_where_a_connection_to_our_server_broke(
    nix: Nix, shop: Shop, backend: DirectoryBackend, tmp_path: Path
) -> None:
    shop.push_all(opened(backend))
    with Serving(tmp_path / "cache") as serving, FaultyProxy(serving.url) as proxy:
        proxy.on(f"/{narinfo_of(backend, shop.bundle.path).url}", faults.cuts(5000), faults.passes)
        nix.ok("nix", "copy", "--from", proxy.url, "--to", nix.root, shop.bundle.path)
        assert "bytes=5000-" in [seen.range for seen in proxy.requests]
    assert nar.nar_hash(nix.arrived(shop.bundle.path)) == (shop.bundle.nar_hash, shop.bundle.nar_size)


def test_it_hashes_a_tree_as_we_do(nix: Nix, shop: Shop) -> None:
    tree = shop.store.location(shop.bundle.path)
    found = nix.ok("nix-hash", "--type", "sha256", "--base32", tree).strip()
    assert found == shop.bundle.nar_hash.nix.removeprefix("sha256:")


def test_one_trusted_signature_of_two_suffices(nix: Nix, shop: Shop, backend: DirectoryBackend) -> None:
    both = TrustedKeys([KEY.public, SECOND.public])
    tree = shop.store.location(shop.agent.path)
    for signer, kept in ((SECOND, PushOutcome.NEW), (KEY, PushOutcome.HEALED)):
        assert new_cache(backend, both, signer).push(shop.agent, tree).kept is kept
    names = [text.partition(":")[0] for text in narinfo_of(backend, shop.agent.path).signatures]
    assert names == ["vzrepro-test-2", "vzrepro-test-1"]
    nix.ok("nix", "copy", "--from", backend.url, "--to", nix.root, shop.agent.path)
    nix.ok("nix", "store", "verify", "--store", nix.root, "--sigs-needed", "1", shop.agent.path)
    assert nix.run("nix", "store", "verify", "--store", nix.root, "--sigs-needed", "2", shop.agent.path).returncode


def test_it_takes_a_copy_by_its_new_name(nix: Nix, shop: Shop, cache: CacheWriter, backend: DirectoryBackend) -> None:
    """Early cutoff: another derivation with equal inputs, so the earlier NAR is named once more and never sent."""
    shop.push_all(cache)
    drv_hash = DrvHash.of(b"changed")
    renamed = store_path(drv_hash, shop.bundle.path.name)
    copied = replace(shop.bundle, path=renamed, drv_hash=drv_hash, outcome=Outcome.COPIED)
    assert cache.push(copied, shop.store.location(shop.bundle.path)).kept is PushOutcome.NEW
    assert narinfo_of(backend, renamed).url == narinfo_of(backend, shop.bundle.path).url
    nix.ok("nix", "copy", "--from", backend.url, "--to", nix.root, renamed)
    nix.ok("nix", "store", "verify", "--store", nix.root, "-r", "--sigs-needed", "1", renamed)
    assert nar.nar_hash(nix.arrived(renamed)) == (shop.bundle.nar_hash, shop.bundle.nar_size)


# --- what they refuse -------------------------------------------------------------------------------------------------


def test_it_refuses_what_a_stranger_signed(nix: Nix, shop: Shop, backend: DirectoryBackend) -> None:
    stranger = new_cache(backend, TrustedKeys([STRANGER.public]), STRANGER)
    stranger.push(shop.agent, shop.store.location(shop.agent.path))
    refused = nix.run("nix", "copy", "--from", backend.url, "--to", nix.root, shop.agent.path)
    assert refused.returncode != 0
    assert "signature" in refused.stderr
    assert not nix.arrived(shop.agent.path).exists()


@pytest.mark.parametrize("fault", ["other bytes", "cut off"])
def test_neither_side_takes_a_nar_that_was_tampered_with(
    nix: Nix, shop: Shop, cache: CacheWriter, backend: DirectoryBackend, tmp_path: Path, fault: str
) -> None:
    """By one who may write to the cache: the narinfo's unsigned fields are made to agree."""
    shop.push_all(cache)
    info = narinfo_of(backend, shop.agent.path)
    packed = bytearray(b"".join(nar.pack(shop.store.location(shop.agent.path))))
    packed[len(packed) // 2] ^= 1
    compressed = b"".join(nar.compress(iter([bytes(packed)])))
    if fault == "cut off":
        compressed = compressed[:-100]
    backend.put(info.url, compressed)
    forged = replace(info, file_hash=FileHash(hashlib.sha256(compressed).hexdigest()), file_size=len(compressed))
    backend.put(narinfo_key(info.path), forged.render())

    refused = nix.run("nix", "copy", "--from", backend.url, "--to", nix.root, info.path)
    assert refused.returncode != 0
    assert fault == "cut off" or "hash mismatch" in refused.stderr
    # What has been unpacked may lie there, but is nobody's.
    assert nix.run("nix-store", "--store", nix.root, "--check-validity", info.path).returncode != 0
    reading = CacheReader(backend, TrustedKeys([KEY.public]))
    found = reading.query(info.path)
    assert found is not None
    with pytest.raises(Damaged):
        reading.fetch(found, tmp_path / "dest")
    assert not (tmp_path / "dest").exists()


# --- what they write --------------------------------------------------------------------------------------------------


def test_we_read_what_it_copies_to_a_cache_and_add_our_fields_again(
    nix: Nix, shop: Shop, cache: CacheWriter, backend: DirectoryBackend, tmp_path: Path
) -> None:
    shop.push_all(cache)
    bundle = shop.bundle
    nix.ok("nix", "copy", "--from", cache.url, "--to", nix.root, bundle.path)
    back = DirectoryBackend(tmp_path / "back")
    nix.ok("nix", "copy", "--from", nix.root, "--to", f"{back.url}?compression=zstd", bundle.path)

    found = opened(back).reader.query(bundle.path)
    assert found is not None
    got = opened(back).reader.fetch(found, tmp_path / "dest")
    # Nix keeps our signature and drops the fields it does not know.
    kept = replace(bundle, drv_hash=None, build_key=None, origin=None)
    assert got == replace(kept, outcome=Outcome.SUBSTITUTED, voucher=found.render())
    assert nar.nar_hash(tmp_path / "dest") == (bundle.nar_hash, bundle.nar_size)

    tree = shop.store.location(bundle.path)
    assert opened(back).push(bundle, tree).kept is PushOutcome.HEALED
    healed = narinfo_of(back, bundle.path)
    assert healed.own_signatures == narinfo_of(backend, bundle.path).own_signatures
    assert healed.url == found.url
    assert opened(back).push(bundle, tree).kept is PushOutcome.PRESENT
    nix.ok("nix", "store", "verify", "--store", back.url, "-r", "--sigs-needed", "1", bundle.path)


def test_we_read_what_it_signs_itself(nix: Nix, tmp_path: Path) -> None:
    """Nix's own fingerprint is the one that we verify."""
    key_file = tmp_path / "key"
    KEY.save(key_file)
    source = tmp_path / "dep"
    source.write_text("dep\n")
    dep = StorePath.parse(nix.ok("nix-store", "--store", nix.root, "--add", source).strip())
    back = DirectoryBackend(tmp_path / "back")
    nix.ok("nix", "copy", "--from", nix.root, "--to", f"{back.url}?compression=none&secret-key={key_file}", dep)
    info = narinfo_of(back, dep)
    assert TrustedKeys([KEY.public]).signers(info.fingerprint, info.signatures) == {KEY.public}
    found = opened(back).reader.query(dep)
    assert found is not None
    opened(back).reader.fetch(found, tmp_path / "dest")
    assert (tmp_path / "dest").read_text() == "dep\n"


def test_we_live_with_what_it_leaves_in_a_cache(
    nix: Nix, shop: Shop, backend: DirectoryBackend, tmp_path: Path
) -> None:
    """Directories of its own when it only reads; objects in other forms and listings when it writes."""
    left = tmp_path / "cache"
    key_file = tmp_path / "key"
    KEY.save(key_file)
    (tmp_path / "workspace" / "recipes").mkdir(parents=True)
    settings = {
        "VZREPRO_CACHES": backend.url,
        "VZREPRO_TRUSTED_KEYS": str(KEY.public),
        "VZREPRO_UPLOAD_KEY": str(key_file),
        "VZREPRO_MACHINE_CACHE": "false",
    }
    cli = Cli(tmp_path / "workspace", shop.store.root, settings)
    cli.run("cache", "push", "--all")
    cli.run("cache", "root", "add", "release", str(shop.agent.path))
    nix.ok("nix", "copy", "--from", backend.url, "--to", nix.root, shop.bundle.path)
    assert (left / "log").is_dir()
    assert (left / "realisations").is_dir()

    STRANGER.save(tmp_path / "stranger")
    writing = f"{backend.url}?compression=zstd&write-nar-listing=1&secret-key={tmp_path}/stranger"
    source = tmp_path / "foreign"
    source.write_text("foreign\n")
    foreign = nix.ok("nix-store", "--store", nix.root, "--add", source).strip()
    nix.ok("nix", "copy", "--no-check-sigs", "--from", nix.root, "--to", writing, foreign)
    source.write_text("in a form that only Nix reads\n")
    packed = nix.ok("nix-store", "--store", nix.root, "--add", source).strip()
    nix.ok("nix", "copy", "--no-check-sigs", "--from", nix.root, "--to", f"{backend.url}?compression=xz", packed)
    (left / "realisations" / "sha256:00!out.doi").write_text("{}")
    assert "agent" in cli.run("cache", "ls").stdout
    cli.run("cache", "verify", "--deep")
    cli.run("cache", "verify", "--deep", "--repair")
    nix.ok("nix", "path-info", "--store", backend.url, packed)

    for entry in left.rglob("*"):
        if entry.is_file() and entry.parent.name != "roots":
            before = entry.stat().st_mtime - OLD_SECS
            os.utime(entry, (before, before))
    cli.run("cache", "gc", "--older-than", "30d")
    cli.run("cache", "verify", "--deep")
    assert [line.split()[0] for line in cli.run("cache", "ls").stdout.splitlines()[1:]] == [shop.agent.path.base]
    assert (left / "realisations" / "sha256:00!out.doi").is_file()
    fresh = Nix(tmp_path / "fresh", nix.command)
    fresh.ok("nix", "copy", "--from", backend.url, "--to", fresh.root, shop.agent.path)


# --- what both compute ------------------------------------------------------------------------------------------------


def test_store_paths_are_those_it_computes(nix: Nix) -> None:
    """Nix hashes a derivation without inputs as its text with the outputs left blank: our formula does the rest."""
    expression = 'derivation { name = "hello-1.0"; system = "any"; builder = "/bin/sh"; args = [ "-c" "echo" ]; }'
    drv = nix.ok("nix-instantiate", "--store", nix.root, "-E", expression).strip().splitlines()[-1]
    text = (nix.root / drv.lstrip("/")).read_text()
    match = re.search(r"/nix/store/[0-9a-z]{32}-hello-1\.0(?=\")", text)
    assert match is not None
    inner = DrvHash.of(text.replace(match[0], "").encode())
    assert str(store_path(inner, "hello-1.0")) == match[0]


def test_a_key_that_it_makes_is_one_of_ours(nix: Nix) -> None:
    key = SigningKey.parse(nix.ok("nix", "key", "generate-secret", "--key-name", "made-by-nix").strip())
    assert nix.ok("nix", "key", "convert-secret-to-public", given=key.text) == str(key.public)
