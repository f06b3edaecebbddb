"""Attesting, through the command line: what is built is attested, found by others, and shipped beside bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from tests.bundles import make_bundle
from tests.contract.served import Serving
from tests.e2e.conftest import Cli
from tests.e2e.test_cache import Team, team  # noqa: F401
from vzrepro.cache import PublicKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.statement import Statement

BUNDLES = """
from recipes.toolchain import TOOLS_IMAGE
from vzrepro import build, local

both = {
    f"{profile}-bundle": build(
        f"{profile}-bundle", image=TOOLS_IMAGE, command=["cp", "-R", f"/in/src/{profile}/.", "/out"],
        inputs={"src": local(profile)},
    )
    for profile in ("container", "developer")
}
build("bundles", image=TOOLS_IMAGE, command=["sh", "/in/src/all.sh"], inputs=both | {"src": local("all.sh")})
"""
ALL_SH = "for each in container developer; do cp -R /in/$each-bundle /out/$each; done\n"


def rows(cli: Cli, *words: str, code: int = 0) -> list[dict[str, Any]]:
    """The rows of the table that a command prints."""
    lines = [json.loads(line) for line in cli.run(*words, "--json", code=code).stdout.splitlines()]
    return [line for line in lines if "event" not in line]


def new_key(cli: Cli, name: str, place: Path) -> tuple[Path, PublicKey]:
    file = place / f"{name}.key"
    return file, PublicKey.parse(cli.run("key", "generate", name, "--out", str(file)).stdout.strip())


def test_a_build_is_attested_by_the_machine_that_made_it(small: Cli) -> None:
    low = small.realize("low")[0]
    [seen] = rows(small, "attest", "show", "low")
    assert (seen["kind"], seen["standing"], seen["ours"]) == ("provenance", "own", "yes")
    assert seen["by"].startswith("vzrepro-machine-")
    assert seen["where"].split()[0] == "here", "and in the machine's cache"
    assert len(seen["where"].split()) == 2
    assert seen["when"].startswith("20")
    printed = small.run("provenance", "low")
    assert "signed by vzrepro-machine-" in printed.stderr
    said = json.loads(printed.stdout)
    assert said["predicate"]["buildDefinition"]["externalParameters"]["command"] == ["sh", "/in/src/low.sh"]
    assert {"startedOn", "finishedOn"} == set(said["predicate"]["runDetails"]["metadata"])
    assert [each["name"] for each in said["subject"]] == [f"/nix/store/{low.name}", "low"]
    assert {each["annotations"]["input"] for each in said["predicate"]["buildDefinition"]["resolvedDependencies"]} == {
        "image",
        "/in/src",
    }


def test_attesting_signs_the_closure_and_again_changes_nothing(small: Cli, tmp_path: Path) -> None:
    small.env["VZREPRO_MACHINE_CACHE"] = "false"
    small.realize("high")
    unsigned = small.run("provenance", "high")
    assert "nobody known here has signed this" in unsigned.stderr
    assert "urn:vzrepro:unsigned" in unsigned.stdout
    assert "nobody has attested high" in small.run("attest", "show", "high", code=1).stderr
    file, key = new_key(small, "release-1", tmp_path)
    signed = {row["target"]: row["state"] for row in rows(small, "attest", "high", "--key", str(file))}
    assert (signed["low"], signed["high"]) == ("signed", "signed")
    again = {row["target"]: row["state"] for row in rows(small, "attest", "--key", str(file), "high")}
    assert again == {target: "present" if state == "signed" else state for target, state in signed.items()}
    [seen] = rows(small, "attest", "show", "high")
    assert (seen["by"], seen["key"], seen["standing"]) == (None, key.id, "unknown")
    small.env["VZREPRO_TRUSTED_KEYS"] = str(key)
    [seen] = rows(small, "attest", "show", "high")
    assert (seen["by"], seen["standing"]) == ("release-1", "trusted")
    [envelope] = (small.store / ".vzrepro/attest").glob(f"*/{key.id}/{seen['sha256']}.json")
    theirs = SSlibKey(key.id, "ed25519", "ed25519", {"public": key.raw.hex()})
    read = Envelope.from_dict(json.loads(envelope.read_bytes()))
    assert list(read.verify([theirs], 1)) == [key.id], "an independent library agrees"
    small.env["VZREPRO_REVOKED_KEYS"] = str(key)
    [seen] = rows(small, "attest", "show", "high")
    assert seen["standing"] == "revoked"
    assert "nobody known here has signed this" in small.run("provenance", "high").stderr


def test_what_was_substituted_is_not_attested(team: Team) -> None:  # noqa: F811
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("high")
    colleague = team.member("colleague", trusts=("team-1",))
    colleague.realize("high")
    refused = colleague.run("attest", "high", "--key", str(team.key("mine-1")), code=1)
    assert "nothing of high was built here" in refused.stderr
    states = {
        row["target"]: row["why"] for row in rows(colleague, "attest", "high", "--key", str(team.key("mine-1")), code=1)
    }
    assert (states["high"], states["low"]) == ("it was taken from a cache", "it is not in the store")
    assert not (colleague.store / ".vzrepro/attest").exists()
    [seen] = rows(colleague, "attest", "show", "high")
    assert (seen["by"], seen["standing"], seen["ours"]) == ("team-1", "trusted", "yes")
    assert seen["where"].startswith("s3://")
    assert "signed by team-1" in colleague.run("provenance", "high").stderr


def test_who_has_nothing_sees_what_others_attest(team: Team) -> None:  # noqa: F811
    team.member("builder", seeded=True, key="team-1", trusts=("team-1",)).realize("low")
    visitor = team.member("visitor")
    [seen] = rows(visitor, "attest", "show", "low", "--cache", team.url)
    assert (seen["by"], seen["standing"], seen["ours"]) == (None, "unknown", None)
    refused = visitor.run("provenance", "low", code=1)
    assert "no key that is known here has signed" in refused.stderr


def test_attestations_go_to_a_cache_and_are_read_over_http(small: Cli, tmp_path: Path) -> None:
    small.realize("low")
    file, key = new_key(small, "release-1", tmp_path)
    place = tmp_path / "shared"
    small.run("attest", "low", "--key", str(file), "--to", place.as_uri())
    small.env["VZREPRO_TRUSTED_KEYS"] = str(key)
    with Serving(place) as serving:
        seen = rows(small, "attest", "show", "low", "--cache", serving.url)
    assert [each["by"] for each in seen if serving.url in each["where"]] == ["release-1"]
    small.run("cache", "verify", "--deep", "--cache", place.as_uri())


def test_two_who_get_different_results_both_say_so(small: Cli, tmp_path: Path) -> None:
    (small.root / "recipes/small/low.sh").write_text("head -c 8 /dev/urandom > /out/low\n")
    small.realize("low")
    other = Cli(small.root, tmp_path / "other-store", {**small.env, "VZREPRO_KEY_DIR": str(tmp_path / "other-keys")})
    other.realize("image-tools")
    other.run("realize", "low", "--no-substitute")
    shared = (tmp_path / "shared").as_uri()
    for cli, name in ((small, "one-1"), (other, "two-1")):
        file, _ = new_key(cli, name, tmp_path)
        cli.run("attest", "low", "--key", str(file), "--to", shared)
    seen = {row["key"]: row["ours"] for row in rows(small, "attest", "show", "low", "--cache", shared)}
    assert sorted(each or "" for each in seen.values()) == ["no", "yes", "yes"], "the machine's own, one, two"


# --- beside bundles ---------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(small: Cli) -> Cli:
    """A workspace with two bundles of a few bytes."""
    small.write(bundle=BUNDLES)
    folder = small.root / "recipes/bundle"
    (folder / "all.sh").write_text(ALL_SH)
    for profile in ("container", "developer"):
        make_bundle(folder / profile, profile, content={"vmlinux": profile.encode()})
    return small


def statements(file: Path) -> list[Statement]:
    return [Statement.of(dsse.parse(line)) for line in file.read_bytes().splitlines()]


def test_an_exported_bundle_has_its_attestations_beside_it(shop: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    [archive] = rows(shop, "bundle", "export", "container-bundle", "--version", "1.0", "--out", str(out))
    assert archive["attestations"] == 1
    lines = out / "vz-linux-container-v1.0-arm64.intoto.jsonl"
    [said] = statements(lines)
    assert said.output is not None
    assert said.output[0].name == "container-bundle"
    assert set(said.files) == {"vmlinux", "initramfs.img", "youki", "version.json"}
    before = {path.name: path.read_bytes() for path in out.iterdir() if path != lines}
    file, key = new_key(shop, "release-1", tmp_path)
    shop.run("attest", "container-bundle", "--key", str(file))
    [archive] = rows(shop, "bundle", "export", "container-bundle", "--version", "1.0", "--out", str(out))
    assert (archive["state"], archive["attestations"]) == ("present", 2)
    assert lines.read_bytes().splitlines() == sorted(lines.read_bytes().splitlines())
    assert any(dsse.parse(line).signers([key]) for line in lines.read_bytes().splitlines())
    assert {path.name: path.read_bytes() for path in out.iterdir() if path != lines} == before


def test_each_bundle_of_a_set_has_its_own(shop: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shop.run("bundle", "export", "bundles", "--version", "1.0", "--out", str(out))
    found = {file.name: [each.output for each in statements(file)] for file in out.glob("*.jsonl")}
    names = {file: [output[0].name for output in outputs if output] for file, outputs in found.items()}
    assert names == {
        "vz-linux-container-v1.0-arm64.intoto.jsonl": ["container-bundle"],
        "vz-linux-developer-v1.0-arm64.intoto.jsonl": ["developer-bundle"],
        "vz-linux-v1.0-arm64.intoto.jsonl": ["developer-bundle"],
    }


def test_a_directory_that_no_store_knows_has_none(shop: Cli, tmp_path: Path) -> None:
    place = make_bundle(tmp_path / "plain", "container")
    done = shop.run("bundle", "export", f"{place}/", "--version", "1.0", "--out", str(tmp_path / "out"))
    assert "no attestations were looked for" in done.stderr
    assert not list((tmp_path / "out").glob("*.jsonl"))
    # The same object of the store by its directory: found.
    store = shop.realize("container-bundle")[0]
    [archive] = rows(shop, "bundle", "export", f"{store}", "--version", "2.0", "--out", str(tmp_path / "out"))
    assert archive["attestations"] == 1
