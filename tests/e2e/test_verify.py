"""`vzrepro verify` of directories that somebody hands over, through the CLI: no workspace, no cache, no Docker."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import make_bundle
from tests.e2e.conftest import Cli
from vzrepro import nar
from vzrepro.base.model import BuildKey, DrvHash, store_path
from vzrepro.cache import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.provenance import Build
from vzrepro.proof.attest.statement import Statement, subjects_of

KEYS = {name: SigningKey.generate(f"{name}-1") for name in ("alice", "bob", "release")}


@dataclass(frozen=True)
class Desk:
    """Where somebody verifies: `cli` in an empty directory, a policy, and `signed`, a directory with statements."""

    place: Path
    cli: Cli
    policy: Path
    signed: Path

    def sign(self, bundle: Path, target: str, salt: str = "") -> None:
        """Alice and bob have built this bundle as `target`; `salt` tells derivations of one target apart."""
        drv_hash = DrvHash.of(f"{target}{salt}".encode())
        path, nar_hash = store_path(drv_hash, target), nar.nar_hash(bundle)[0]
        asked: dict[str, Any] = dict.fromkeys(("version", "platform", "source_date_epoch"))
        asked |= {"name": target, "builder": "sandbox", "command": ["true"], "env": {}}
        build = Build(target, path, drv_hash, BuildKey.of(b""), nar_hash, asked, (), 1_780_000_000, 1_780_000_100)
        lines = [
            build.statement(subjects_of(path, nar_hash, bundle), key.public).signed(key)
            for key in (KEYS["alice"], KEYS["bob"])
        ]
        (self.signed / f"{target}{salt}.intoto.jsonl").write_bytes(b"\n".join(lines) + b"\n")

    def verify(self, bundle: Path, *words: str, code: int = 0) -> str:
        """What is said on both streams."""
        offline = ("--policy", str(self.policy), "--offline", str(self.signed))
        done = self.cli.run("verify", str(bundle), *offline, *words, code=code)
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    for name in ("empty", "signed"):
        (tmp_path / name).mkdir()
    policy = tmp_path / "policy.toml"
    operators = [f'[[operators]]\nname = "{name}"\nkeys = [{{ key = "{KEYS[name].public}" }}]' for name in KEYS]
    policy.write_text("\n".join(['name = "p"\nversion = 1\nthreshold = 2', *operators[:2]]))
    KEYS["release"].save(tmp_path / "release.key")
    env = {name: str(tmp_path / name) for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    env["VZREPRO_KEY_DIR"] = str(tmp_path / "user" / "keys")
    return Desk(tmp_path, Cli(tmp_path / "empty", tmp_path / "store", env), policy, tmp_path / "signed")


@pytest.fixture
def bundle(desk: Desk) -> Path:
    """A container bundle that both have built."""
    made = make_bundle(desk.place / "bundle", "container")
    (made / "youki").chmod(0o755)
    desk.sign(made, "container-bundle")
    return made


def test_a_link_to_a_bundle_is_that_bundle(desk: Desk, bundle: Path) -> None:
    (desk.place / "current").symlink_to(bundle)
    said = desk.verify(desk.place / "current")
    assert "verified, container-bundle" in said
    assert "modes" not in said


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "payload").write_bytes(b"anything")


@pytest.mark.parametrize(
    ("name", "plant", "code", "says"),
    [
        ("more.sha256", a_folder, 102, "more.sha256/payload is not part of it"),
        ("more.sha256", lambda path: path.symlink_to("/etc/passwd"), 102, "links"),
        ("more", Path.mkdir, 102, "empty directories differ"),
        ("more", lambda path: path.symlink_to("vmlinux"), 102, "links"),
        ("more.sha256", os.mkfifo, 1, "cannot be part"),
        ("more.intoto.jsonl", os.mkfifo, 2, "is no file"),
        ("more.intoto.jsonl", lambda path: path.symlink_to("/dev/zero"), 2, "is no file"),
    ],
)
def test_whatever_is_there_in_addition_is_found(
    desk: Desk, bundle: Path, name: str, plant: Callable[[Path], None], code: int, says: str
) -> None:
    plant(bundle / name)
    assert says in desk.verify(bundle, code=code)


def test_a_fifo_as_version_json_is_not_waited_for(desk: Desk, bundle: Path) -> None:
    (bundle / "version.json").unlink()
    os.mkfifo(bundle / "version.json")
    assert "not known of what" in desk.verify(bundle, code=2)


def test_statements_of_several_bundles_do_not_mix(desk: Desk, bundle: Path) -> None:
    """In one directory lie those of another profile and of another version, by the same builders."""
    developer = make_bundle(desk.place / "developer", "developer", content={"vmlinux": b"another kernel\n"})
    newer = make_bundle(desk.place / "newer", "container", content={"initramfs.img": b"a newer one\n"})
    desk.sign(developer, "developer-bundle")
    desk.sign(newer, "container-bundle", "newer")
    for good in (bundle, developer, newer):
        assert "verified" in desk.verify(good)
    mixed = desk.place / "mixed"
    for foreign in (developer, newer):
        shutil.copytree(bundle, mixed)
        shutil.copy(foreign / ("vmlinux" if foreign is developer else "initramfs.img"), mixed)
        assert "is another one" in desk.verify(mixed, code=102)
        shutil.rmtree(mixed)
    # A good bundle, passed off as one of another target.
    assert "not what alice, bob built as container-bundle" in desk.verify(
        developer, "--target", "container-bundle", code=102
    )
    (desk.signed / "container-bundle.intoto.jsonl").unlink()
    assert "not what alice, bob built" in desk.verify(bundle, code=102)
    (desk.signed / "container-bundlenewer.intoto.jsonl").unlink()
    assert "nobody who may vote" in desk.verify(bundle, code=103)


def test_a_key_that_is_revoked_on_this_machine_votes_under_no_policy(desk: Desk, bundle: Path) -> None:
    """Who has revoked a key is not overridden by a policy that has not heard of it."""
    renamed = str(KEYS["bob"].public).replace("bob-1", "another-name")
    desk.cli.env["VZREPRO_REVOKED_KEYS"] = renamed
    said = desk.verify(bundle, code=103)
    assert "2 must agree, and 1 does" in said
    assert "revoked-keys" in said


def test_a_failed_summary_can_always_be_written(desk: Desk, bundle: Path) -> None:
    (bundle / os.fsdecode(b"\xff")).write_bytes(b"")
    file = desk.place / "s.json"
    words = ("--vsa", str(file), "--sign-with", str(desk.place / "release.key"))
    assert "not part of it" in desk.verify(bundle, *words, code=102)
    failed = Statement.of(dsse.parse(file.read_bytes()))
    assert failed.predicate["verificationResult"] == "FAILED"
    assert failed.predicate["resourceUri"].endswith("-container-bundle")


def test_who_names_another_target_has_no_say_in_the_summary(desk: Desk, bundle: Path) -> None:
    """Alice's statement is about the right derivation under another name, which would be first by alphabet."""
    [line, bob] = (desk.signed / "container-bundle.intoto.jsonl").read_bytes().splitlines()
    told = Statement.of(dsse.parse(line)).document()
    told["subject"][0]["name"] = str(store_path(DrvHash.of(b"container-bundle"), "another"))
    renamed = dsse.sign("application/vnd.in-toto+json", json.dumps(told).encode(), KEYS["alice"])
    (desk.signed / "container-bundle.intoto.jsonl").write_bytes(renamed + b"\n" + bob + b"\n")
    assert "too few votes" in desk.verify(bundle, code=103)


def test_a_summary_names_what_it_went_by(desk: Desk, bundle: Path) -> None:
    """SLSA's verification summary, version 1: the fields that are required, and what their values may be."""
    file = desk.place / "s.json"
    desk.verify(bundle, "--vsa", str(file), "--sign-with", str(desk.place / "release.key"))
    envelope = dsse.parse(file.read_bytes())
    assert envelope.signers([KEYS["release"].public])
    passed = Statement.of(envelope)
    assert passed.predicate_type == "https://slsa.dev/verification_summary/v1"
    said = passed.predicate
    assert {"verifier", "resourceUri", "policy", "verificationResult", "verifiedLevels"} <= set(said)
    assert said["verificationResult"] == "PASSED"
    assert all(not level.startswith("SLSA_") and level != "FAILED" for level in said["verifiedLevels"])
    # Both are URIs, and tell nothing of the verifier's disk.
    path = store_path(DrvHash.of(b"container-bundle"), "container-bundle")
    assert said["resourceUri"] == f"urn:vzrepro:object:{path}"
    assert said["policy"]["uri"] == f"urn:vzrepro:policy:{desk.policy.name}"
    assert said["policy"]["digest"]["sha256"] == hashlib.sha256(desk.policy.read_bytes()).hexdigest()
    assert len(said["inputAttestations"]) == 2
    assert passed.output is not None
    assert passed.output[1] == nar.nar_hash(bundle)[0]
