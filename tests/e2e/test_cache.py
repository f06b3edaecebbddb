"""A team's shared cache, through the command line: one builds, the others take, nobody slips in a wrong byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from tests.caches import new_cache
from tests.e2e.conftest import LOW_SH, SMALL, Cli, interrupt_when
from tests.servers import S3Server
from vzrepro import nar
from vzrepro.base.model import DrvHash, StorePath, canonical_json
from vzrepro.cache import SigningKey, TrustedKeys
from vzrepro.cache.backend import read_whole
from vzrepro.cache.narinfo import narinfo_key
from vzrepro.cache.places import open_backend
from vzrepro.cache.remote import Patience

CONTENT = "low\nThu Jan  1 00:00:00 UTC 2026\n"


@dataclass
class Team:
    """A bucket (or directory) at `url` and a workspace; each member has a store of its own and no machine cache."""

    url: str
    root: Path
    seeded: Path
    place: Path

    def member(self, name: str, *, seeded: bool = False, key: str | None = None, trusts: tuple[str, ...] = ()) -> Cli:
        """Somebody with the tools image or without, who pushes with `key` and trusts the keys of these names."""
        home = self.place / name
        home.mkdir(exist_ok=True)
        if seeded and not (home / "store").exists():
            shutil.copytree(self.seeded, home / "store", symlinks=True)
        env = {
            "VZREPRO_CACHES": self.url,
            "VZREPRO_MACHINE_CACHE": "false",
            "VZREPRO_TRUSTED_KEYS": " ".join(self.public(each) for each in trusts),
            "XDG_CACHE_HOME": str(home / "xdg"),
            "XDG_CONFIG_HOME": str(home / "config"),
            "VZREPRO_CACHE_PATIENCE_SECS": "60",
        }
        if key is not None:
            env["VZREPRO_UPLOAD_KEY"] = str(self.key(key))
        return Cli(self.root, home / "store", env)

    def key(self, name: str) -> Path:
        file = self.place / f"{name}.key"
        if not file.exists():
            SigningKey.generate(name).save(file)
        return file

    def public(self, name: str) -> str:
        return str(SigningKey.load(self.key(name)).public)


@pytest.fixture
def team(tmp_path: Path, seeded: Path, small: Cli, seaweed: S3Server, credentials: None) -> Team:
    """A team whose cache is a place of its own in a SeaweedFS bucket."""
    return Team(seaweed.url("common", tmp_path.name.replace("_", "-")), small.root, seeded, tmp_path)


def actions(cli: Cli, *words: str) -> dict[str, str]:
    """Target → outcome of all that was done but pushed."""
    events = [json.loads(line) for line in cli.run(*words, "--json").stdout.splitlines()]
    return {e["target"]: e["outcome"] for e in events if e.get("event") == "finished" and e["action"] != "push"}


def pushes(cli: Cli, *words: str) -> dict[str, str]:
    events = [json.loads(line) for line in cli.run(*words, "--json").stdout.splitlines()]
    return {e["target"]: e["outcome"] for e in events if e.get("event") == "finished" and e["action"] == "push"}


def test_one_builds_and_the_others_take(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    assert pushes(builder, "realize", "high") == {"low": "new", "high": "new"}
    colleague = team.member("colleague", trusts=("team-1",))
    assert actions(colleague, "realize", "high") == {"high": "substituted"}
    assert (colleague.realize("high")[0] / "high").read_text() == CONTENT
    colleague.run("store", "verify")
    assert colleague.run("log", "low").stdout == "low\n"
    assert "builder" not in colleague.run("cache", "ls").stdout


def test_pull_takes_and_never_builds(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("low")
    colleague = team.member("colleague", trusts=("team-1",))
    low = Path(colleague.run("cache", "pull", "low").stdout.strip())
    assert (low / "low").read_text() == "low\n"
    refused = colleague.run("cache", "pull", "high", code=105)
    assert "no cache has high" in refused.stderr
    assert "vzrepro cache why-missing high" in refused.stderr


def test_pull_does_not_build_what_a_cache_failed_to_give(team: Team) -> None:
    team.member("builder", seeded=True, key="team-1", trusts=("team-1",)).realize("low")
    backend = open_backend(team.url, Patience(), team.root)
    for entry in backend.list("nar/"):
        backend.put(entry.key, bytes(entry.size))
    colleague = team.member("colleague", seeded=True, trusts=("team-1",))
    refused = colleague.run("cache", "pull", "low", code=105)
    assert "no cache has low" in refused.stderr
    assert "warning: cache s3://" in refused.stderr
    assert actions(colleague, "realize", "low")["low"] == "built"


def test_a_stranger_is_not_believed(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="evil-1", trusts=())
    builder.realize("low")
    colleague = team.member("colleague", seeded=True, trusts=("team-1",))
    refused = colleague.run("cache", "pull", "low", code=103)
    assert "evil-1" in refused.stderr
    assert "trusted-keys" in refused.stderr
    assert actions(colleague, "realize", "low") == {"files-small": "fetched", "low": "built"}
    done = colleague.run("cache", "why-missing", "low")
    assert "not signed by a trusted key" in done.stdout


def test_two_signatures_may_be_asked_for(team: Team) -> None:
    trusts = ("ci-1", "ci-2")
    team.member("one", seeded=True, key="ci-1", trusts=trusts).realize("low")
    colleague = team.member("colleague", seeded=True, trusts=trusts)
    once = colleague.run("realize", "low", "--require-signatures", "2", "--dry-run")
    assert "build" in once.stdout
    assert "too few trusted signatures" in once.stderr
    second = team.member("two", seeded=True, key="ci-2", trusts=trusts)
    assert pushes(second, "realize", "low", "--no-substitute")["low"] == "healed"
    assert actions(colleague, "realize", "low", "--require-signatures", "2") == {"low": "substituted"}


def test_a_revoked_key_loses_what_is_in_the_store_and_what_was_made_from_it(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("low")
    colleague = team.member("colleague", seeded=True, trusts=("team-1", "team-2"))
    assert actions(colleague, "realize", "low", "high") == {"low": "substituted", "script": "fetched", "high": "built"}
    assert actions(colleague, "realize", "high") == {}
    warned = replace(colleague, env={**colleague.env, "VZREPRO_REVOKED_KEYS": team.public("team-1")})
    done = warned.run("realize", "high")
    assert "key that vouched for it is revoked: low" in done.stderr
    assert "build low" in done.stderr
    # What was made here of `low` is good again, since `low` came out as it was: a copy, not a build.
    assert "high copied" in done.stderr
    assert actions(warned, "realize", "high") == {}
    warned.run("store", "verify")


def test_what_a_revoked_key_lied_about_is_replaced(team: Team) -> None:
    """The builder's `low` is a forgery: the right one takes its place, and what was made from it is made anew."""
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    low = builder.realize("low")[0]
    # Forge: another content under low's name, signed by the key, as one who has stolen it could.
    _forge(team, builder, low, b"evil\n")
    colleague = team.member("colleague", seeded=True, trusts=("team-1",))
    own = {"VZREPRO_MACHINE_CACHE": "true", "VZREPRO_KEY_DIR": str(team.place / "machine")}
    colleague.env |= own | {"VZREPRO_MACHINE_CACHE_DIR": str(team.place / "own")}
    first = colleague.realize("low", "high")
    assert (first[1] / "high").read_text().startswith("evil")
    warned = replace(colleague, env={**colleague.env, "VZREPRO_REVOKED_KEYS": team.public("team-1")})
    second = warned.realize("low", "high")
    assert second == first
    assert (second[0] / "low").read_text() == "low\n"
    assert (second[1] / "high").read_text() == CONTENT
    warned.run("store", "verify")
    # Nor has the machine's own cache kept what was made from it, for the next workspace.
    next_one = replace(warned, store=team.place / "next" / "store")
    assert actions(next_one, "realize", "high") == {"high": "substituted"}
    assert (next_one.realize("high")[0] / "high").read_text() == CONTENT


def _forge(team: Team, builder: Cli, low: Path, content: bytes) -> None:
    key = SigningKey.load(team.key("team-1"))
    backend = open_backend(team.url, Patience(), team.root)
    cache = new_cache(backend, TrustedKeys([key.public]), key)
    path = StorePath.parse(low.name)
    info = cache.reader.query(path)
    assert info is not None
    tree = team.place / "forged"
    tree.mkdir()
    (tree / "low").write_bytes(content)
    nar_hash, nar_size = nar.nar_hash(tree)
    taken = cache.reader.fetch(info, team.place / "taken")
    backend.delete([narinfo_key(path)])
    cache.push(replace(taken, nar_hash=nar_hash, nar_size=nar_size, voucher=None), tree)


def test_a_changed_but_equal_input_reuses_the_colleagues_object(team: Team) -> None:
    """Early cutoff across machines: `high` comes by copy under its new name, and only that name travels back."""
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("high")
    colleague = team.member("colleague", seeded=True, key="team-2", trusts=("team-1", "team-2"))
    (team.root / "recipes/small/low.sh").write_text("# a comment\n" + LOW_SH)
    before = _entries(colleague)
    done = colleague.run("realize", "high", "--json").stdout.splitlines()
    outcomes = [(e["action"], e["target"], e["outcome"]) for e in map(json.loads, done) if e["event"] == "finished"]
    assert ("build", "low", "built") in outcomes
    assert ("build", "high", "copied") in outcomes or ("copy", "high", "copied") in outcomes
    after = _entries(colleague)
    assert after["nar"] == before["nar"]
    assert after["narinfo"] == before["narinfo"] + 2
    third = team.member("third", trusts=("team-2",))
    assert actions(third, "realize", "high") == {"high": "substituted"}


def _entries(cli: Cli) -> dict[str, int]:
    rows = [json.loads(line) for line in cli.run("cache", "info", "--json").stdout.splitlines()]
    return {row["kind"]: row["entries"] for row in rows}


def test_a_second_result_is_recorded_and_shown(team: Team) -> None:
    team.root.joinpath("recipes/small/__init__.py").write_text(SMALL.replace("cat /in/low/low", "cat /proc/uptime"))
    trusts = ("team-1", "team-2")
    team.member("one", seeded=True, key="team-1", trusts=trusts).realize("high")
    second = team.member("two", seeded=True, key="team-2", trusts=trusts)
    assert pushes(second, "realize", "high", "--no-substitute")["high"] == "different"
    shown = json.loads(second.run("cache", "info", "high", "--json").stdout)
    assert [each["by"] for each in shown["differences"]] == ["team-2"]
    assert shown["signed_by"] == ["team-1"]
    assert "not deterministic: team-2 (trusted)" in second.run("cache", "info", "high").stdout


def test_why_missing_names_what_differs(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("high")
    colleague = team.member("colleague", trusts=("team-1",))
    assert "nothing is missing" in colleague.run("cache", "why-missing", "high").stdout
    (team.root / "recipes/small/low.sh").write_text("echo other > /out/low\n")
    text = colleague.run("cache", "why-missing", "high").stdout
    assert "inputs.low" in text
    assert "inputs.src" in text
    found = json.loads(colleague.run("cache", "why-missing", "high", "--json").stdout)
    assert [change["target"] for change in found["changes"]][:2] == ["high", "low"]
    assert "never saw a recipe called image-tools" in colleague.run("cache", "why-missing", "image-tools").stdout


def test_why_missing_is_not_fooled_by_entries_that_nobody_signed(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("high")
    backend = open_backend(team.url, Patience(), team.root)
    opened = [(entry.key, backend.get(entry.key)) for entry in backend.list("drv/")]
    known = [json.loads(read_whole(each, 1 << 20, key)) for key, each in opened if each is not None]
    [high] = [each for each in known if each["name"] == "high"]
    title, red = "\x1b]0;title\x07", "\x1b[31m"
    hostile = {**high, "command": [f"{title}\x1b[2J{red}nothing is missing"], "env": {"X": red}}
    backend.delete([entry.key for entry in backend.list() if entry.key.endswith(".narinfo")])
    backend.delete([entry.key for entry in backend.list("drv/")])
    for data in (b"not json", b'{"name": "high", "version": null}', canonical_json(hostile)):
        backend.put(f"drv/{DrvHash.of(data)}.json", data)
    told = team.member("colleague", trusts=("team-1",)).run("cache", "why-missing", "high")
    assert all(line.isprintable() for line in (told.stdout + told.stderr).splitlines())
    assert "\nhigh, compared with the nearest one in the cache:\n" in told.stdout
    assert "\n  env.X:  → absent\n" in told.stdout


def test_with_mirrors_gone_everything_is_realized_from_the_cache(team: Team) -> None:
    """Sources and toolchain images are in the cache as well: a fresh clone needs nothing else, even to build."""
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.run("realize", "high")
    # The packages from wherever this machine has them, so that the test needs no mirror a second time.
    apart = ("VZREPRO_MACHINE_CACHE", "XDG_CACHE_HOME")
    with_own = {name: value for name, value in builder.env.items() if name not in apart}
    replace(builder, env=with_own).run("realize", "debs-tools")
    builder.run("cache", "push", "high", "--with-inputs")
    cut = {"VZREPRO_MIRRORS": "debian=http://127.0.0.1:9 crates=http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    cut |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1,localhost"}
    fresh = team.member("fresh", trusts=("team-1",))
    fresh = replace(fresh, env=fresh.env | cut)
    assert actions(fresh, "realize", "high") == {"high": "substituted"}
    alone = team.member("alone", trusts=("team-1",))
    alone = replace(alone, env=alone.env | cut)
    done = actions(alone, "realize", "high", "--no-substitute", "--sources-from-cache")
    assert done == {
        "debs-tools": "substituted",
        "image-tools": "built",
        "files-small": "fetched",
        "low": "built",
        "script": "fetched",
        "high": "built",
    }
    alone.run("realize", "high", "--sources-from-cache", code=2)


def test_the_cache_is_kept_clean(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.run("realize", "high")
    assert "has no roots" in builder.run("cache", "gc", "--older-than", "30d", code=2).stderr
    builder.run("cache", "root", "add", "release-1", "high")
    assert "release-1" in builder.run("cache", "root", "list").stdout
    said = builder.run("cache", "gc", "--older-than", "30d", "--dry-run").stdout
    assert "would delete 0 objects" in said
    assert "release-1" in said
    assert "low" in builder.run("cache", "ls").stdout
    builder.run("cache", "verify")
    builder.run("cache", "verify", "--deep")
    builder.run("cache", "root", "remove", "release-1")
    assert "no root" in builder.run("cache", "root", "remove", "release-1", code=2).stderr
    builder.run("cache", "gc", "--older-than", "soon", code=2)
    builder.run("cache", "gc", "--older-than", "1h", code=2)


def test_pushing_again_sends_nothing(team: Team) -> None:
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("high")
    first = json.loads(builder.run("cache", "push", "--all", "--json").stdout.splitlines()[-1])
    assert first["objects"]["present"] == 2
    again = json.loads(builder.run("cache", "push", "--all", "--json").stdout.splitlines()[-1])
    assert again["written_bytes"] == 0
    assert set(again["objects"]) == {"present"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("cache", "push"), "name objects to push, or --all"),
        (("cache", "push", "absent"), "absent"),
        (("cache", "push", "high"), "not in the store"),
        (("cache", "push", "high", "--to", "ftp://example.invalid/x"), "is not the URL of a cache"),
        (("cache", "ls", "--cache", "ftp://example.invalid/x"), "is not the URL of a cache"),
        (("cache", "info", "--cache", "s3://"), "bucket"),
        (("cache", "init", "http://127.0.0.1:1/x"), "cannot be written"),
        (("cache", "serve", "/nonexistent/cache"), "no directory"),
        (("key", "public", "/nonexistent/key"), "cannot read the key file"),
        (("key", "generate", "a name", "--out", "/nonexistent/key"), "is not a name for a key"),
    ],
)
def test_usage_is_explained(team: Team, words: tuple[str, ...], says: str) -> None:
    done = team.member("somebody", seeded=True).run(*words, code=2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_cache_it_says_how_to_name_one(team: Team) -> None:
    nobody = team.member("nobody")
    nobody.env["VZREPRO_CACHES"] = ""
    assert "pyproject.toml" in nobody.run("cache", "ls", code=2).stderr


def test_keys_are_not_overwritten_nor_open_to_others(team: Team) -> None:
    key = team.place / "team-1.key"
    somebody = team.member("somebody")
    made = somebody.run("key", "generate", "team-1", "--out", str(key)).stdout
    assert made == somebody.run("key", "public", str(key)).stdout == f"{team.public('team-1')}\n"
    somebody = team.member("somebody", key="team-1")
    assert "there already" in somebody.run("key", "generate", "team-1", "--out", str(key), code=2).stderr
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert "chmod 600" in somebody.run("cache", "push", "--all", code=2).stderr
    confused = replace(somebody, env={"VZREPRO_TRUSTED_KEYS": "x:y"})
    assert "trusted-keys" in confused.run("cache", "ls", "--cache", "x", code=2).stderr


def test_settings_come_from_pyproject_the_users_file_and_the_environment(team: Team) -> None:
    member = team.member("member", key="team-1")
    url = member.env.pop("VZREPRO_CACHES")
    member.env.pop("VZREPRO_TRUSTED_KEYS")
    public = team.public("team-1")
    settings = f'[tool.vzrepro]\ncaches = ["file:///absent"]\ntrusted-keys = ["{public}"]\n'
    (team.root / "pyproject.toml").write_text(settings)
    assert "file:///absent" in member.run("cache", "pull", "high", code=105).stderr
    config = Path(member.env["XDG_CONFIG_HOME"], "vzrepro", "config.toml")
    config.parent.mkdir(parents=True)
    config.write_text(f'caches = ["{url}"]\n')
    assert url in member.run("cache", "pull", "high", code=105).stderr
    member.env["VZREPRO_CACHES"] = "file:///elsewhere"
    assert "file:///elsewhere" in member.run("cache", "pull", "high", code=105).stderr


# --- places that fail -------------------------------------------------------------------------------------------------


def test_init_makes_the_bucket_and_says_what_the_server_can_do(team: Team, seaweed: S3Server) -> None:
    url = seaweed.url(f"made-{team.place.name.replace('_', '-')}"[:60].rstrip("-").lower())
    member = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    refused = member.run("cache", "push", "image-tools", "--to", url, code=105)
    assert f"vzrepro cache init '{url}'" in refused.stderr
    found = json.loads(member.run("cache", "init", url, "--json").stdout.splitlines()[-1])
    assert (found["bucket_created"], found["conditional_writes"], found["multipart"]) == (True, True, True)
    again = json.loads(member.run("cache", "init", url, "--json").stdout.splitlines()[-1])
    assert again == {**found, "bucket_created": False, "clock_skew_secs": again["clock_skew_secs"]}
    assert url in member.run("cache", "init", url).stdout


@pytest.mark.parametrize(
    "url",
    [
        "s3://gone?endpoint=http://127.0.0.1:9",
        "http://127.0.0.1:9/cache",
        "https://cache.invalid/x",
        "file:///dev/null/x",
    ],
)
def test_a_cache_that_is_gone_costs_one_warning_and_the_build_goes_on(team: Team, url: str) -> None:
    member = team.member("somebody", seeded=True, key="team-1", trusts=("team-1",))
    member.env |= {"VZREPRO_CACHES": url, "VZREPRO_CACHE_PATIENCE_SECS": "1"}
    done = member.run("realize", "high")
    assert (Path(done.stdout.strip()) / "high").read_text() == CONTENT
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert len(warnings) <= 1, done.stderr
    assert member.run("cache", "pull", "low").stdout  # it is here already, so no cache is asked
    shutil.rmtree(member.store)
    assert "cache" in member.run("cache", "pull", "low", code=105).stderr


def test_wrong_credentials_are_named(team: Team) -> None:
    member = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    member.env["AWS_SECRET_ACCESS_KEY"] = "wrong"
    refused = member.run("cache", "push", "image-tools", code=105)
    assert "credentials" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_interrupted_push_goes_on_where_it_was(team: Team) -> None:
    member = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    process = member.start("cache", "push", "--all")
    _out, err = interrupt_when(process, "push image-tools")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "cache ls" not in err
    member.run("cache", "push", "--all")
    member.run("cache", "verify", "--deep")
    colleague = team.member("colleague", trusts=("team-1",))
    colleague.run("cache", "pull", "image-tools")
    colleague.run("store", "verify")


def test_a_wrong_blob_heals(team: Team) -> None:
    """Same size, other bytes: readers build, `verify --deep` finds it, whoever has the object mends it."""
    builder = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    builder.realize("low")
    url = json.loads(builder.run("cache", "info", "low", "--json").stdout)["nar"]
    backend = open_backend(team.url, Patience(), team.root)
    entry = backend.head(url)
    assert entry is not None
    backend.put(url, os.urandom(entry.size), sha256=entry.sha256)
    colleague = team.member("colleague", seeded=True, trusts=("team-1",))
    done = colleague.run("realize", "low")
    assert "low built" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "warning" in line]) == 1
    builder.run("cache", "verify")
    assert "damaged-nar" in builder.run("cache", "verify", "--deep", code=1).stdout
    builder.run("cache", "verify", "--deep", "--repair")
    builder.run("cache", "verify", "--deep")
    fresh = team.member("fresh", trusts=("team-1",))
    assert actions(fresh, "realize", "low") == {"low": "substituted"}


@pytest.mark.parametrize("words", [("realize", "low"), ("cache", "pull", "low"), ("cache", "verify"), ("cache", "ls")])
def test_ctrl_c_does_not_wait_for_a_silent_server(team: Team, words: tuple[str, ...]) -> None:
    """It would be waited for much longer than this test may take."""
    member = team.member("somebody", seeded=True, trusts=("team-1",))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"s3://silent?endpoint=http://127.0.0.1:{listening.getsockname()[1]}"
        member.env |= {"VZREPRO_CACHES": url, "VZREPRO_CACHE_PATIENCE_SECS": "3600"}
        process = member.start(*words)
        listening.settimeout(PATIENCE_SECS)
        connection, _ = listening.accept()
        with connection:
            assert connection.recv(1000)
            process.send_signal(signal.SIGINT)
            _out, err = process.communicate(timeout=PATIENCE_SECS)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_a_directory_is_served_to_a_lan(team: Team) -> None:
    member = team.member("builder", seeded=True, key="team-1", trusts=("team-1",))
    lan = team.place / "lan"
    member.realize("high")
    member.run("cache", "push", "high", "--to", lan.as_uri())
    server = member.start("cache", "serve", str(lan), "--port", "0", "--json")
    assert server.stdout is not None
    try:
        url = json.loads(server.stdout.readline())["url"]
        colleague = team.member("colleague", trusts=("team-1",))
        colleague.env["VZREPRO_CACHES"] = url
        assert actions(colleague, "realize", "high") == {"high": "substituted"}
        assert "nothing is missing" in colleague.run("cache", "why-missing", "high").stdout
        assert "cannot be listed" in colleague.run("cache", "ls", code=2).stderr
    finally:
        server.send_signal(signal.SIGINT)
        _out, err = server.communicate(timeout=PATIENCE_SECS)
    assert server.returncode == 0, err
    assert "Traceback" not in err
