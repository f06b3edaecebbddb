"""Sources of every kind through the command line: locked, fetched, shared, explained; and each way to fail."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import tarfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import repositories
from tests.e2e.conftest import Cli
from tests.faults import FaultyProxy, redirects, serves, stalls, status
from tests.repositories import Repository
from tests.servers import refusing


def _tar(**files: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            header = tarfile.TarInfo(f"thing/{name}")
            header.size = len(text)
            archive.addfile(header, io.BytesIO(text.encode()))
    return buffer.getvalue()


THING = _tar(README="one", LICENSE="SPDX-License-Identifier: MIT\n")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """A workspace that needs no image, with a store, a machine cache and keys of its own."""
    root = tmp_path / "workspace"
    (root / "recipes").mkdir(parents=True)
    return Cli(
        root,
        tmp_path / "store",
        {
            "VZREPRO_MACHINE_CACHE_DIR": str(tmp_path / "cache"),
            "VZREPRO_KEY_DIR": str(tmp_path / "keys"),
            "XDG_CACHE_HOME": str(tmp_path / "xdg"),
            "VZREPRO_TRUSTED_WORKSPACES": "*",
        },
    )


@pytest.fixture
def server() -> Iterator[FaultyProxy]:
    with FaultyProxy() as found:
        yield found


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return repositories.make(tmp_path / "served/thing.git")


def declare(cli: Cli, *calls: str) -> None:
    names = "git_source, pypi_source, url_source"
    cli.write(a="\n".join([f"from vzrepro import {names}", *calls, ""]))


def lock(cli: Cli) -> dict[str, dict[str, str]]:
    sources: dict[str, dict[str, str]] = tomllib.loads((cli.root / "lock.toml").read_text())["source"]
    return sources


def outcomes(cli: Cli, *words: str) -> dict[str, str]:
    events = [json.loads(line) for line in cli.run("realize", *words, "--json").stdout.splitlines()]
    return {e["target"]: e["outcome"] for e in events if e["event"] == "finished" and e["action"] != "push"}


def test_a_url_from_lock_to_store(cli: Cli, server: FaultyProxy) -> None:
    place = server.serve_at("thing-1.0.tar.gz", serves(THING))
    declare(cli, f'url_source("thing", "{place}")', f'url_source("tree", "{place}", unpack=True)')
    err = cli.run("realize", "source-thing", code=2).stderr
    assert "lock.toml has no url-source 'thing'" in err
    assert "vzrepro lock" in err
    said = cli.run("lock")
    digest = hashlib.sha256(THING).hexdigest()
    assert f"thing: sha256 {digest}, {len(THING)} bytes, {place}" in said.stderr
    assert f"sha256 {digest}" in said.stdout
    assert lock(cli)["thing"]["sha256"] == digest
    cli.run("lock", "--check")
    file, tree = cli.realize("source-thing", "source-tree")
    assert file.name.endswith("-thing-1.0.tar.gz")
    assert file.read_bytes() == THING
    assert (tree / "README").read_text() == "one"
    # What `lock` had downloaded served both.
    assert len(server.of("/thing-1.0.tar.gz")) == 2
    shown = json.loads(cli.run("show", "source-tree").stdout)
    assert shown["derivation"]["env"] == {"unpack": "1"}
    assert shown["files"] == {"": {"url": place, "size": len(THING)}}
    cli.run("store", "verify")


def test_a_hash_in_the_recipe_needs_no_lock(cli: Cli, server: FaultyProxy) -> None:
    digest = hashlib.sha256(THING).hexdigest()
    gone = server.serve_at("gone/thing.tar.gz", status(404))
    moved = server.serve_at("old/thing.tar.gz", redirects("/new/thing.tar.gz"))
    server.serve_at("new/thing.tar.gz", serves(THING))
    declare(cli, f'url_source("thing", "{gone}", "{moved}", sha256="{digest}")')
    assert cli.realize("source-thing")[0].read_bytes() == THING
    cli.run("lock", "--check")


def test_a_wrong_hash(cli: Cli, server: FaultyProxy) -> None:
    place = server.serve_at("thing.tar.gz", serves(b"another"))
    declare(cli, f'url_source("thing", "{place}", sha256="{"0" * 64}")')
    err = cli.run("realize", "source-thing", code=102).stderr
    for told in ("0" * 64, hashlib.sha256(b"another").hexdigest(), place, "recipes/a/__init__.py:2"):
        assert told in err
    declare(cli, f'url_source("thing", "{place}")')
    cli.run("lock")
    shutil.rmtree(cli.store)
    server.heal()
    server.serve_at("thing.tar.gz", serves(b"a third"))
    err = cli.run("realize", "source-thing", code=102).stderr
    assert hashlib.sha256(b"a third").hexdigest() in err
    assert "vzrepro lock --update thing" in err
    said = cli.run("lock", "--update", "thing")
    assert "has changed: sha256 was" in said.stderr
    assert cli.realize("source-thing")[0].read_bytes() == b"a third"


def test_a_missing_hash_while_offline(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(THING)
    with refusing() as port:
        missing = f'url_source("thing", "http://127.0.0.1:{port}/thing.tar.gz")'
        declare(cli, missing)
        err = cli.run("lock", code=105).stderr
        assert "its hash is not known, so it must be seen once" in err
        assert not (cli.root / "lock.toml").exists()
        declare(cli, missing, f'url_source("other", "file://{tmp_path}/other")')
        err = cli.run("lock", code=105).stderr
    assert "its hash is not known, so it must be seen once" in err
    assert "lock.toml has the other pins" in err
    assert list(lock(cli)) == ["other"]


def test_a_new_url_under_the_old_hash_is_fetched_again(cli: Cli, server: FaultyProxy) -> None:
    digest = hashlib.sha256(THING).hexdigest()
    one = server.serve_at("1/thing.tar.gz", serves(THING))
    two = server.serve_at("2/thing.tar.gz", serves(b"another"))
    three = server.serve_at("3/thing.tar.gz", serves(THING))
    for options in ("", ", unpack=True"):
        declare(cli, f'url_source("thing", "{one}", sha256="{digest}"{options})')
        assert outcomes(cli, "source-thing") == {"source-thing": "fetched"}
        declare(cli, f'url_source("thing", "{two}", sha256="{digest}"{options})')
        assert "its URL changed while its hash did not" in cli.run("why", "source-thing").stdout
        assert digest in cli.run("realize", "source-thing", code=102).stderr
        declare(cli, f'url_source("thing", "{three}", sha256="{digest}"{options})')
        assert outcomes(cli, "source-thing") == {"source-thing": "fetched"}
        assert outcomes(cli, "source-thing") == {}


def test_a_hostile_archive_leaves_nothing(cli: Cli, server: FaultyProxy, tmp_path: Path) -> None:
    place = server.serve_at("evil.tar.gz", serves(_tar(**{"../../../evil": "x"})))
    declare(cli, f'url_source("evil", "{place}", unpack=True)')
    cli.run("lock")
    assert "leads upwards" in cli.run("realize", "source-evil", code=2).stderr
    assert not list(tmp_path.rglob("evil"))
    assert not list((cli.store / ".vzrepro/tmp").iterdir())


def test_git_from_lock_to_store(cli: Cli, repository: Repository) -> None:
    first = repository.commit({"a": b"1", "LICENSE": b"SPDX-License-Identifier: MIT\n"})
    repository.tag("v1.2", first)
    declare(cli, f'S = git_source("thing", "{repository.url}", tag="v1.*")', "assert S.version in ('0', '1.2', '1.10')")
    cli.run("lock")
    assert lock(cli)["thing"]["commit"] == first
    (tree,) = cli.realize("source-thing")
    assert tree.name.endswith("-thing-1.2")
    assert sorted(each.name for each in tree.iterdir()) == ["LICENSE", "a"]
    second = repository.commit({"a": b"2"}, parent=first)
    repository.tag("v1.10", second, annotated=True)
    cli.run("lock")
    assert lock(cli)["thing"]["commit"] == first
    assert cli.run("lock", "--update").stdout.split()[-3:] == ["thing", "1.2", "1.10"]
    changes = cli.run("why", "source-thing").stdout
    assert "1.2" in changes
    assert "1.10" in changes
    (tree,) = cli.realize("source-thing")
    assert (tree / "a").read_bytes() == b"2"
    shown = json.loads(cli.run("show", "source-thing").stdout)
    assert shown["checkout"] == {"url": repository.url, "commit": second}
    cli.run("store", "verify")


def test_history_that_was_rewritten(cli: Cli, repository: Repository, tmp_path: Path) -> None:
    """The commit is gone from the server; who has it gives it."""
    first = repository.commit({"a": b"1"})
    repository.tag("v1", first)
    declare(cli, f'git_source("thing", "{repository.url}", tag="v1")')
    cli.run("lock")
    old = cli.realize("source-thing")[0].name
    shutil.rmtree(repository.path)
    second = repositories.make(repository.path).commit({"a": b"2"})
    repository.tag("v1", second)
    other = Cli(cli.root, tmp_path / "other", cli.env)
    assert outcomes(other, "source-thing") == {"source-thing": "substituted"}
    assert (other.store / old / "a").read_bytes() == b"1"
    third = Cli(cli.root, tmp_path / "third", {**cli.env, "VZREPRO_MACHINE_CACHE_DIR": str(tmp_path / "none")})
    err = third.run("realize", "source-thing", code=105).stderr
    assert f"does not have the commit {first}" in err
    assert "vzrepro lock --update" in err
    said = cli.run("lock", "--update", "thing")
    assert f"the tag v1 of {repository.url} has moved: it was {first}, is {second}" in said.stderr
    assert f"commit {second}" in said.stdout
    assert (cli.realize("source-thing")[0] / "a").read_bytes() == b"2"


def test_an_interrupt_leaves_nothing(cli: Cli) -> None:
    with FaultyProxy() as server:
        server.on("*", stalls)
        declare(cli, f'git_source("thing", "{server.url}/thing.git", rev="{"0" * 40}")')
        process = cli.start("lock")
        while not server.requests:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=120)
        assert process.returncode == 130, err
        assert "Traceback" not in err
    assert list((cli.store / ".vzrepro/downloads").iterdir()) == []
    assert not [place for place in map(_link, Path("/proc").glob("[0-9]*/cwd")) if str(cli.store) in place]


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:  # a process that has ended
        return ""


def test_a_lock_that_names_another_tree(cli: Cli, repository: Repository) -> None:
    commit = repository.commit({"a": b"1"})
    declare(cli, f'git_source("thing", "{repository.url}", rev="{commit}")')
    cli.run("lock")
    pinned = lock(cli)["thing"]["sha256"]
    path = cli.root / "lock.toml"
    path.write_text(path.read_text().replace(pinned, "0" * 64))
    err = cli.run("realize", "source-thing", code=102).stderr
    assert f"commit {commit} of {repository.url} is not the tree that is pinned" in err
    assert "vzrepro lock --update thing" in err


def test_a_repository_that_moved_is_looked_at_again(cli: Cli, repository: Repository, tmp_path: Path) -> None:
    commit = repository.commit({"a": b"1"})
    declare(cli, f'git_source("thing", "{repository.url}", rev="{commit}")')
    cli.run("lock")
    cli.realize("source-thing")
    moved = repository.path.rename(tmp_path / "served/moved.git")
    declare(cli, f'git_source("thing", "file://{moved}", rev="{commit}")')
    assert "out of date" in cli.run("realize", "source-thing", code=2).stderr
    cli.run("lock")
    assert outcomes(cli, "source-thing") == {"source-thing": "fetched"}
    assert outcomes(cli, "source-thing") == {}


def test_limits_of_a_download(cli: Cli, repository: Repository, server: FaultyProxy) -> None:
    declare(cli, f'git_source("thing", "{repository.url}", tag="v1")')
    cli.env["VZREPRO_DOWNLOAD_GIB"] = "0"
    assert "VZREPRO_DOWNLOAD_GIB" in cli.run("lock", code=2).stderr


@pytest.mark.thorough
def test_a_build_is_made_of_them_and_made_again(small: Cli, repository: Repository, server: FaultyProxy) -> None:
    commit = repository.commit({"a": b"from git, ", "run!": b"#!/bin/sh\necho run,\n", "link@": b"a"})
    place = server.serve_at("thing-1.0.tar.gz", serves(THING))
    small.write(
        made="from recipes.toolchain import TOOLS_IMAGE\n"
        "from vzrepro import build, git_source, url_source\n"
        f'THING = url_source("thing", "{place}", version="1.0", unpack=True)\n'
        f'PLAIN = url_source("plain", "{place}")\n'
        f'REPO = git_source("repo", "{repository.url}", rev="{commit}")\n'
        'build("made", image=TOOLS_IMAGE, version=THING.version, inputs={"t": THING, "p": PLAIN, "r": REPO},\n'
        '    command=["sh", "-c", "{ cat /in/r/link; /in/r/run; cat /in/t/README; sha256sum < /in/p; } > /out/made"])\n'
    )
    small.run("lock")
    digest = hashlib.sha256(THING).hexdigest()
    (made,) = small.realize("made")
    assert (made / "made").read_text() == f"from git, run,\none{digest}  -\n"
    statement = json.loads(small.run("provenance", "made").stdout)
    named = {
        each["annotations"]["input"]: each["digest"]
        for each in statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert named["/in/p"]["sha256"] == named["/in/t"]["sha256"] == digest
    assert set(named["/in/r"]) == {"narSha256"}
    asked = len(server.of("/thing-1.0.tar.gz"))
    small.run("audit", "made", "--axes", "repeat", "--deep")
    assert len(server.of("/thing-1.0.tar.gz")) == asked + 2
    report = json.loads(next((small.store / ".vzrepro/audit/reports").glob("*/report.json")).read_text())
    verdicts = {node["target"]: node["verdict"] for node in report["nodes"]}
    assert {verdicts[f"source-{name}"] for name in ("thing", "plain", "repo")} == {"REPRODUCED"}


def test_bills_of_materials_know_the_kinds(cli: Cli, repository: Repository, server: FaultyProxy) -> None:
    commit = repository.commit({"LICENSE": b"SPDX-License-Identifier: MIT\n"})
    place = server.serve_at("thing-1.0.tar.gz", serves(THING))
    declare(
        cli,
        f'git_source("repo", "{repository.url}", rev="{commit}")',
        f'url_source("thing", "{place}", version="1.0", unpack=True)',
        f'url_source("plain", "{place}")',
        f'url_source("text", "{server.serve_at("notes.txt", serves(b"notes"))}")',
    )
    cli.run("lock")
    names = ["source-repo", "source-thing", "source-plain", "source-text"]
    cli.realize(*names)
    cli.run("sbom", "--learn", *names)
    assert "it is no tar archive" in (cli.root / "sbom.toml").read_text()
    found = {}
    for name in ("repo", "thing", "plain"):
        bill = json.loads(cli.run("sbom", f"source-{name}", "--format", "cyclonedx").stdout)
        found[name] = bill["metadata"]["component"]
        spdx = json.loads(cli.run("sbom", f"source-{name}", "--format", "spdx").stdout)
        expected = {"repo": f"git+{repository.url}@{commit}"}.get(name, place)
        assert [each["downloadLocation"] for each in spdx["packages"]] == [expected]
        assert found[name]["licenses"] == [{"expression": "MIT", "acknowledgement": "declared"}]
    assert found["repo"]["purl"].startswith(f"pkg:generic/repo@{commit[:12]}?vcs_url=git%2Bfile:")
    assert found["repo"]["externalReferences"] == [{"type": "vcs", "url": f"git+{repository.url}@{commit}"}]
    assert found["thing"]["purl"].startswith("pkg:generic/thing@1.0?checksum=sha256:")
    assert "download_url=http" in found["thing"]["purl"]
    assert found["plain"]["purl"].startswith("pkg:generic/plain?checksum=sha256:")
