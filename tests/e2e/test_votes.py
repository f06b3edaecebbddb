"""Several builders with keys and caches of their own, one of them lying: verify and challenge, through the CLI."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import make_bundle
from tests.caches import new_cache
from tests.e2e.conftest import Cli, make_small
from tests.servers import CREDENTIALS, S3Server, refusing
from vzrepro import nar
from vzrepro.base.model import DrvHash, StorePath, store_path
from vzrepro.cache import CacheWriter, SigningKey, TrustedKeys
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.places import open_backend
from vzrepro.cache.remote import Patience
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.statement import Statement, Subject, subjects_of

LIE = b"low\nThu Jan  1 00:00:01 UTC 2026\n"


@dataclass
class Crew:
    """Builders, each with a key and a cache: alice (a directory, also served by HTTP) and bob (S3) are honest, eve
    (a directory) has signed and put there other bytes for `high`; carol (a directory) only passes on what alice has."""

    place: Path
    root: Path
    urls: dict[str, str]
    high: StorePath
    drv_hash: DrvHash

    def key(self, name: str) -> SigningKey:
        file = self.place / f"{name}.key"
        if not file.exists():
            SigningKey.generate(f"{name}-1").save(file)
        return SigningKey.load(file)

    def cli(self, name: str, *urls: str, trusts: tuple[str, ...] = (), key: str | None = None) -> Cli:
        """Somebody with an own store, who takes from these caches what these have signed."""
        home = self.place / name
        env = {
            "VZREPRO_CACHES": " ".join(urls),
            "VZREPRO_MACHINE_CACHE": "false",
            "VZREPRO_KEY_DIR": str(home / "keys"),
            "VZREPRO_TRUSTED_KEYS": " ".join(str(self.key(each).public) for each in trusts),
            "XDG_CACHE_HOME": str(home / "xdg"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "VZREPRO_CACHE_PATIENCE_SECS": "2",
            **CREDENTIALS,
        }
        if key is not None:
            self.key(key)
            env["VZREPRO_UPLOAD_KEY"] = str(self.place / f"{key}.key")
        return Cli(self.root, home / "store", env)

    def cache(self, name: str) -> CacheWriter:
        """A builder's cache, which it can write."""
        key = self.key(name)
        return new_cache(open_backend(self.urls[name], Patience(), self.root), TrustedKeys([key.public]), key)

    def policy(
        self, file: Path, *names: str, threshold: int = 2, version: int = 1, tail: str = "", **keys: str
    ) -> Path:
        """Write a policy with these operators; `keys` are more words about the key of one of them."""
        lines = [f'name = "crew"\nversion = {version}\nthreshold = {threshold}']
        for name in names:
            rest = f", {keys[name]}" if name in keys else ""
            lines.append(f'[[operators]]\nname = "{name}"\nkeys = [{{ key = "{self.key(name).public}"{rest} }}]')
        file.write_text("\n".join([*lines, tail]))
        return file

    def statements(self, *names: str) -> bytes:
        """What these have signed about `high`, a line each."""
        return b"".join(data + b"\n" for name in names for data in self.cache(name).reader.attestations(self.drv_hash))


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory, seeded: Path, seaweed: S3Server) -> Iterator[Crew]:
    place = tmp_path_factory.mktemp("crew")
    root = make_small(place, seeded).root
    names = ("alice", "eve", "carol")
    urls = {name: str(place / f"{name}-cache") for name in names} | {"bob": seaweed.url("common", place.name)}
    crew = Crew(place, root, urls, StorePath("0" * 32, "high"), DrvHash("0" * 64))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("alice", "bob", "eve"):
            shutil.copytree(seeded, place / name / "store", symlinks=True)
            [high] = crew.cli(name, urls[name], key=name).realize("high")
        crew.high = StorePath.parse(high.name)
        shown = json.loads(crew.cli("alice").run("cache", "info", "high", "--cache", urls["alice"], "--json").stdout)
        crew.drv_hash = DrvHash(shown["drv_hash"])
        lie(crew, "eve")
        carol = crew.cli("carol", urls["alice"], trusts=("alice",), key="carol")
        carol.run("cache", "pull", "high")
        carol.run("cache", "push", "high", "--to", urls["carol"])
        with serving(crew) as url:
            crew.urls["http"] = url
            yield crew


def lie(crew: Crew, name: str) -> None:
    """Have other bytes in somebody's cache, and everything there signed accordingly."""
    cache, key = crew.cache(name), crew.key(name)
    info = cache.reader.query(crew.high)
    assert info is not None
    tree = crew.place / f"{name}-lie"
    tree.mkdir()
    (tree / "high").write_bytes(LIE)
    nar_hash, nar_size = nar.nar_hash(tree)
    taken = cache.reader.fetch(info, crew.place / f"{name}-taken")
    [honest] = cache.reader.attestations(crew.drv_hash)
    cache.access.backend.delete([narinfo_key(crew.high), *(each.key for each in cache.access.backend.list("attest/"))])
    cache.access.backend.delete([each.key for each in cache.access.backend.list("build/")])
    cache.push(replace(taken, nar_hash=nar_hash, nar_size=nar_size, voucher=None), tree)
    statement = Statement.of(dsse.parse(honest))
    cache.put_attestation(
        crew.drv_hash, replace(statement, subjects=subjects_of(crew.high, nar_hash, tree)).signed(key)
    )


class serving:
    """`vzrepro cache serve` of alice's cache for the length of a block."""

    def __init__(self, crew: Crew) -> None:
        self._process = crew.cli("server").start("cache", "serve", crew.urls["alice"], "--port", "0")

    def __enter__(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def user(crew: Crew, tmp_path: Path) -> Cli:
    """Somebody who has `high` from alice, and has never seen a policy."""
    cli = crew.cli("user", crew.urls["alice"], crew.urls["bob"], crew.urls["eve"], trusts=("alice",))
    cli = replace(cli, store=tmp_path / "store", env={**cli.env, "VZREPRO_KEY_DIR": str(tmp_path / "user" / "keys")})
    cli.run("cache", "pull", "high")
    return cli


def document(cli: Cli, *words: str, code: int = 0) -> dict[str, Any]:
    """The last line of `--json` that is no event."""
    lines = [json.loads(line) for line in cli.run(*words, "--json", code=code).stdout.splitlines()]
    found: dict[str, Any] = [line for line in lines if "event" not in line][-1]
    return found


# --- verify: objects --------------------------------------------------------------------------------------------------


def test_two_honest_builders_carry_it_and_the_liar_is_shown(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob", "eve"))
    found = document(user, "verify", "high", "--policy", policy)
    assert (found["result"], found["voters"], found["needed"]) == ("PASSED", ["alice", "bob"], 2)
    assert [list(each) for each in found["results"].values()] == [["alice", "bob"], ["eve"]]
    assert found["drv_hash"] == crew.drv_hash.hex
    said = user.run("verify", str(user.store / crew.high.base), "--policy", policy).stdout
    assert "verified, high" in said
    assert re.search(r"eve +\w{12} +provenance", said)
    assert "verified" in user.run("verify", str(crew.high), "--policy", policy).stdout


def test_statements_come_over_http_as_well(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    urls = ("--against", crew.urls["http"], "--against", crew.urls["bob"])
    assert document(user, "verify", "high", "--policy", policy, *urls)["voters"] == ["alice", "bob"]


def test_the_liars_bytes_are_caught(crew: Crew, user: Cli, tmp_path: Path) -> None:
    victim = crew.cli("victim", *(crew.urls[name] for name in ("eve", "alice", "bob")), trusts=("eve",))
    victim = replace(victim, store=tmp_path / "victim")
    victim.run("cache", "pull", "high")
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob", "eve"))
    refused = victim.run("verify", "high", "--policy", policy, code=102)
    assert "high is another one" in refused.stderr
    assert "which eve got" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_equal_numbers_on_both_sides_are_a_hard_stop(crew: Crew, user: Cli, tmp_path: Path) -> None:
    """A second liar: two operators for either result."""
    [lied] = crew.cache("eve").reader.attestations(crew.drv_hash)
    statement = Statement.of(dsse.parse(lied))
    mallory = crew.key("mallory")
    predicate = json.loads(json.dumps(statement.predicate).replace(crew.key("eve").public.id, mallory.public.id))
    (tmp_path / "more").mkdir()
    more = replace(statement, predicate=predicate).signed(mallory) + b"\n"
    (tmp_path / "more" / "all.intoto.jsonl").write_bytes(crew.statements("alice", "bob", "eve") + more)
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob", "eve", "mallory"))
    words = ("verify", "high", "--policy", policy, "--offline", str(tmp_path / "more"))
    refused = user.run(*words, code=104)
    assert "by alice, bob" in refused.stderr
    assert "by eve, mallory" in refused.stderr
    found = document(user, *words, code=104)
    assert (found["result"], found["voters"], len(found["results"])) == ("FAILED", [], 2)


def test_who_only_passes_on_has_no_vote(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "carol"))
    urls = ("--against", crew.urls["alice"], "--against", crew.urls["carol"])
    assert "2 must agree, and 1 does" in user.run("verify", "high", "--policy", policy, *urls, code=103).stderr


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('revoked = "stolen"', "revoked: stolen"),
        ("until = 2020-01-01", "counted until"),
        ("from = 2999-01-01", "counts from"),
    ],
)
def test_a_key_out_of_force_has_no_vote(crew: Crew, user: Cli, tmp_path: Path, change: str, says: str) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob", bob=change))
    done = user.run("verify", "high", "--policy", policy, code=103)
    assert says in done.stdout
    assert "too few votes" in done.stderr


def test_an_unknown_key_has_no_vote(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "somebody"))
    done = user.run("verify", "high", "--policy", policy, code=103)
    assert f"key {crew.key('bob').public.id}" in done.stdout


def test_an_older_policy_is_refused(crew: Crew, user: Cli, tmp_path: Path) -> None:
    new = str(crew.policy(tmp_path / "new.toml", "alice", "bob", version=2))
    old = str(crew.policy(tmp_path / "old.toml", "alice", "bob", "eve", threshold=1, version=1))
    twin = str(crew.policy(tmp_path / "twin.toml", "alice", "eve", version=2))
    user.run("verify", "high", "--policy", new)
    refused = user.run("verify", "high", "--policy", old, code=103)
    hint = re.search(r"rm (\S+) (\S+)", refused.stderr)
    assert hint is not None
    assert "two policies crew of version 2" in user.run("verify", "high", "--policy", twin, code=103).stderr
    elsewhere = replace(user, root=tmp_path, store=tmp_path / "another")
    assert "is an old one" in elsewhere.run("verify", ".", "--policy", old, code=103).stderr
    for file in hint.groups():
        Path(file).unlink()
    assert user.run("verify", "high", "--policy", old, code=104)


def test_an_exception_holds_until_its_date(crew: Crew, user: Cli, tmp_path: Path) -> None:
    nar_hash = nar.nar_hash(user.store / crew.high.base)[0].nix
    tail = f'[[exceptions]]\ntarget = "high"\naccept = "{nar_hash}"\nreason = "bob is on holiday"\nuntil = '
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "x", tail=tail + "2999-01-01"))
    found = document(user, "verify", "high", "--policy", policy)
    assert found["exception"]["reason"] == "bob is on holiday"
    assert "by an exception until 2999-01-02" in user.run("verify", "high", "--policy", policy).stdout
    policy = str(crew.policy(tmp_path / "q.toml", "alice", "x", version=2, tail=tail + "2020-01-01"))
    assert "has expired" in user.run("verify", "high", "--policy", policy, code=103).stderr


def test_a_broken_policy_stops_everything(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = crew.policy(tmp_path / "p.toml", "alice", "bob")
    alice, bob = (str(crew.key(name).public) for name in ("alice", "bob"))
    policy.write_text(policy.read_text().replace(bob, alice))
    refused = user.run("verify", "high", "--policy", str(policy), code=2)
    assert "belongs to two operators: alice and bob" in refused.stderr


def test_without_a_policy_the_trusted_keys_vote(crew: Crew, user: Cli) -> None:
    assert document(user, "verify", "high")["voters"] == ["alice-1"]
    assert (
        "too few builders are known: 2 must agree, known: 1"
        in user.run("verify", "high", "--threshold", "2", code=2).stderr
    )
    keys = [word for name in ("alice", "bob") for word in ("--key", str(crew.key(name).public))]
    assert document(user, "verify", "high", "--threshold", "2", *keys)["voters"] == ["alice-1", "bob-1"]


def test_a_cache_that_is_gone_is_told_of_and_the_others_are_asked(
    crew: Crew, user: Cli, gone: str, tmp_path: Path
) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    urls = ("--against", gone, "--against", crew.urls["alice"])
    done = user.run("verify", "high", "--policy", policy, *urls, code=103)
    assert f"{gone} could not be asked" in done.stderr
    assert user.run("verify", "high", "--policy", policy, *urls, "--against", crew.urls["bob"])


@pytest.fixture
def gone() -> Iterator[str]:
    """The URL of a server that is not there."""
    with refusing() as port:
        yield f"http://127.0.0.1:{port}"


# --- verify: directories ----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(crew: Crew, user: Cli, tmp_path: Path) -> Path:
    """A copy of `high` somewhere, with what alice and bob have signed in it."""
    place = tmp_path / "copy"
    shutil.copytree(user.store / crew.high.base, place)
    place.chmod(0o755)
    (place / "high").chmod(0o644)
    (place / "both.intoto.jsonl").write_bytes(crew.statements("alice", "bob"))
    (place / "archive.tar.gz.sha256").write_text("beside it\n")
    return place


def test_a_copy_is_verified_without_network_or_workspace(crew: Crew, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "nowhere").mkdir()
    policy = crew.policy(tmp_path / "p.toml", "alice", "bob")
    outside = replace(crew.cli("outside", "http://127.0.0.1:9"), root=tmp_path / "nowhere")
    words = ("verify", str(copy), "--target", "high", "--policy", str(policy), "--offline", str(copy))
    done = outside.run(*words)
    assert "verified, high" in done.stdout
    assert "could not be asked" not in done.stderr
    assert list((tmp_path / "nowhere").iterdir()) == []
    policy = crew.policy(tmp_path / "old.toml", "alice", "bob", "eve", version=1)
    assert outside.run("verify", str(copy), "--target", "high", "--policy", str(policy), code=103)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("high", b"tampered", "high is another one"),
        ("high", None, "high is missing"),
        ("extra", b"", "extra is not part of it"),
    ],
)
def test_every_file_must_be_right(
    crew: Crew, user: Cli, copy: Path, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    words = ("verify", str(copy), "--target", "high", "--policy", policy)
    user.run(*words)
    if content is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(content)
    assert says in user.run(*words, code=102).stderr


def test_lost_modes_are_told_of_and_no_fault(crew: Crew, user: Cli, copy: Path, tmp_path: Path) -> None:
    (copy / "high").chmod(0o755)
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    done = user.run("verify", str(copy), "--target", "high", "--policy", policy)
    assert "its modes are not" in done.stderr


def test_a_truncated_file_of_statements_lacks_a_vote(crew: Crew, user: Cli, copy: Path, tmp_path: Path) -> None:
    file = copy / "both.intoto.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    done = user.run("verify", str(copy), "--target", "high", "--policy", policy, "--offline", str(copy), code=103)
    assert "both.intoto.jsonl:2" in done.stdout
    assert "too few votes" in done.stderr


def test_a_directory_without_statements_says_where_to_take_some(crew: Crew, user: Cli, copy: Path) -> None:
    (copy / "both.intoto.jsonl").unlink()
    key = ("--key", str(crew.key("alice").public))
    done = user.run("verify", str(copy), "--target", "high", *key, "--offline", str(copy), code=103)
    assert "--offline DIR" in done.stderr
    # Inside a workspace the caches are asked about the target's derivation.
    assert document(user, "verify", str(copy), "--target", "high", *key)["voters"] == ["alice-1"]


def test_an_installed_bundle_is_verified_by_its_profile(crew: Crew, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "made", "container")
    (bundle / "youki").chmod(0o755)
    (tmp_path / "nowhere").mkdir()
    outside = replace(crew.cli("outside"), root=tmp_path / "nowhere")
    installed = Path(outside.run("bundle", "install", "--bundle-dir", str(bundle), "--install-dir", str(tmp_path / "i"),
                                 "--kernel-profile", "container").stdout.strip())  # fmt: skip
    # What the two builders would have signed: a derivation of that name, with this tree.
    template = Statement.of(dsse.parse(crew.statements("alice").splitlines()[0]))
    drv_hash = DrvHash(hashlib.sha256(b"a bundle").hexdigest())
    path = store_path(drv_hash, "container-bundle")
    subjects = subjects_of(path, nar.nar_hash(bundle)[0], bundle)
    lines = []
    for name in ("alice", "bob"):
        text = json.dumps(template.predicate).replace(crew.drv_hash.hex, drv_hash.hex)
        predicate = json.loads(text.replace(crew.key("alice").public.id, crew.key(name).public.id))
        lines.append(replace(template, subjects=subjects, predicate=predicate).signed(crew.key(name)))
    (tmp_path / "with").mkdir()
    (tmp_path / "with" / "vz-linux-container.intoto.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    words = ("verify", str(installed), "--policy", policy, "--offline", str(tmp_path / "with"))
    found = document(outside, *words)
    assert (found["result"], found["target"], found["modes_lost"]) == ("PASSED", "container-bundle", False)
    initramfs = installed / "initramfs.img"
    initramfs.chmod(0o644)
    initramfs.write_bytes(b"another\n")
    assert "initramfs.img is another one" in outside.run(*words, code=102).stderr
    # Under another name the same bytes are not what was signed.
    other = make_bundle(tmp_path / "developer", "developer")
    refused = outside.run("verify", str(other), "--policy", policy, "--offline", str(tmp_path / "with"), code=103)
    assert "developer-bundle" in refused.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("high", "--vsa", "x"), "belong together"),
        (("high", "--offline", ".", "--against", "y"), "asks no cache"),
        (("high", "--target", "low"), "--target is for a directory"),
        (("low",), "not in the store"),
        (("absent",), "no target is called"),
        (("./absent",), "is not a directory"),
        ((".",), "--target NAME"),
        (("high", "--key", "nonsense"), "not a public key"),
        (("high", "--policy", "/nonexistent/p.toml"), "cannot read the policy"),
        (("high", "--policy", "/dev/null", "--threshold", "1"), "the policy says"),
        (("high", "--offline", "/nonexistent"), "cannot be read"),
        (("high", "--vsa", "x", "--sign-with", "/nonexistent"), "cannot read the key file"),
    ],
)
def test_usage_is_explained(user: Cli, words: tuple[str, ...], says: str) -> None:
    done = user.run("verify", *words, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


# --- verify: the summary ----------------------------------------------------------------------------------------------


def test_a_signed_summary_tells_how_it_ended(crew: Crew, user: Cli, copy: Path, tmp_path: Path) -> None:
    file = crew.policy(tmp_path / "p.toml", "alice", "bob")
    release = crew.key("release")
    words = ("verify", str(copy), "--target", "high", "--policy", str(file))
    words = (*words, "--vsa", str(tmp_path / "s.json"), "--sign-with", str(tmp_path / "release.key"))
    shutil.copy(crew.place / "release.key", tmp_path)

    def summary() -> Statement:
        envelope = dsse.parse((tmp_path / "s.json").read_bytes())
        assert envelope.signers([release.public]) == {release.public}
        return Statement.of(envelope)

    user.run(*words)
    passed = summary()
    assert passed.predicate["verificationResult"] == "PASSED"
    assert passed.predicate["verifiedLevels"] == ["VZREPRO_BUILDERS_2"]
    assert passed.predicate["policy"]["digest"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    counted = {each["digest"]["sha256"] for each in passed.predicate["inputAttestations"]}
    assert counted == {hashlib.sha256(line).hexdigest() for line in crew.statements("alice", "bob").splitlines()}
    content = hashlib.sha256((copy / "high").read_bytes()).hexdigest()
    assert passed.output == (crew.high, nar.nar_hash(user.store / crew.high.base)[0])
    assert Subject("high", {"sha256": content}) in passed.subjects
    (copy / "high").write_bytes(b"tampered")
    user.run(*words, code=102)
    failed = summary()
    assert failed.predicate["verificationResult"] == "FAILED"
    assert failed.files["high"] == hashlib.sha256(b"tampered").hexdigest()


# --- challenge --------------------------------------------------------------------------------------------------------


def table(cli: Cli, *words: str, code: int = 0) -> tuple[dict[tuple[str, str], str], dict[str, Any]]:
    """(node, builder) → state, and the document at the end."""
    lines = [json.loads(line) for line in cli.run("challenge", *words, "--json", code=code).stdout.splitlines()]
    rows = {(line["node"], line["builder"]): line["state"] for line in lines if "state" in line}
    return rows, next((line for line in lines if "splits" in line), {})


def known(crew: Crew, *names: str) -> list[str]:
    return [word for name in names for word in ("--key", str(crew.key(name).public))]


def test_a_challenge_names_the_liar(crew: Crew, user: Cli) -> None:
    urls = [crew.urls[name] for name in ("alice", "bob", "eve")]
    keys = known(crew, "alice", "bob", "eve")
    rows, found = table(user, "high", "--against", *urls, *keys, code=104)
    assert [rows["high", name] for name in ("alice-1", "bob-1", "eve-1")] == ["same", "same", "different"]
    # Eve took `low` away with the rest of what she had signed about it.
    assert rows["low", "alice-1"] == rows["low", "bob-1"] == "same"
    [split] = found["splits"]
    assert (split["node"], split["files"], split["inherited"]) == ("high", ["high"], False)
    assert [sorted(each) for each in split["results"].values()] == [["alice-1", "bob-1", "this store"], ["eve-1"]]
    said = user.run("challenge", "high", "--against", *urls, *keys, code=104)
    assert re.search(r"high +eve-1 +\w{12} +different", said.stdout)
    assert "by eve-1" in said.stderr
    assert "vzrepro audit high" in said.stderr


def test_honest_builders_agree_wherever_their_caches_are(crew: Crew, user: Cli) -> None:
    urls = [crew.urls[name] for name in ("http", "bob", "carol")]
    rows, found = table(user, "high", "--against", *urls, *known(crew, "alice", "bob"))
    assert found["splits"] == []
    assert rows["high", "alice-1"] == rows["high", "bob-1"] == rows["high", "this store"] == "same"
    assert rows["image-tools", "nobody"] == "absent"


def test_strangers_are_shown_as_strangers(crew: Crew, user: Cli) -> None:
    rows, found = table(user, "high", "--against", crew.urls["alice"], crew.urls["eve"], code=104)
    assert rows["high", "alice-1"] == "same"
    assert rows["high", "eve-1 (unknown)"] == "different"
    assert len(found["splits"]) == 1


def test_a_cache_that_does_not_answer_is_a_row(crew: Crew, user: Cli, gone: str) -> None:
    rows, found = table(user, "high", "--against", gone, crew.urls["alice"])
    assert rows["-", "-"] == "unreachable"
    assert list(found["silent"]) == [gone]
    refused = user.run("challenge", "high", "--against", gone, "/nonexistent/cache", code=105)
    assert "there is no cache" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_where_nobody_has_anything_nothing_is_passed(crew: Crew, user: Cli, tmp_path: Path) -> None:
    user.run("cache", "init", str(tmp_path / "empty"))
    fresh = replace(user, store=tmp_path / "fresh")
    refused = fresh.run("challenge", "high", "--against", str(tmp_path / "empty"), code=1)
    assert "nothing was compared" in refused.stderr
    assert (
        "name some" in replace(fresh, env={**fresh.env, "VZREPRO_CACHES": ""}).run("challenge", "high", code=2).stderr
    )
    assert "one too many" in fresh.run("challenge", "high", "more", code=2).stderr


def test_a_damaged_entry_is_shown_and_no_crash(crew: Crew, user: Cli, tmp_path: Path) -> None:
    place = tmp_path / "damaged"
    shutil.copytree(crew.urls["alice"], place)
    backend = open_backend(str(place), Patience(), tmp_path)
    backend.put(narinfo_key(crew.high), b"nonsense\n")
    for entry in list(backend.list("attest/")):
        backend.put(entry.key, b"{")
    rows, _ = table(user, "high", "--against", str(place), crew.urls["bob"])
    assert rows["high", "damaged entry"] == "forged"


def test_nothing_is_built_and_no_docker_is_needed(crew: Crew, user: Cli, tmp_path: Path) -> None:
    policy = str(crew.policy(tmp_path / "p.toml", "alice", "bob"))
    before = sorted(user.store.iterdir())
    without = replace(user, env={**user.env, "DOCKER_HOST": "tcp://127.0.0.1:9", "PATH": "/nonexistent"})
    without.run("challenge", "high", "--against", crew.urls["alice"], crew.urls["bob"])
    without.run("verify", "high", "--policy", policy)
    assert sorted(user.store.iterdir()) == before
