"""Commits become trees: by git itself, from real repositories and its own HTTP server, whoever filled them."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests import repositories
from tests.faults import Fault, FaultyProxy, hangs_up, redirects, refuses, says, stalls, status
from tests.repositories import GitServer, Repository
from vzrepro import nar
from vzrepro.base.errors import Interrupted, RemoteError, UsageError, VzreproError
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedTree, SourcePin
from vzrepro.sources import fetch, git
from vzrepro.sources.lookup import Lookup

GIB = 1 << 30


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return repositories.make(tmp_path / "served/thing.git")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    with repositories.serving(tmp_path / "served") as found:
        yield found


Checkout = Callable[..., Path]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    count = iter(range(99))

    def run(url: str, commit: str, *more: str, max_bytes: int = GIB, submodules: bool = False) -> Path:
        tree = tmp_path / f"out{next(count)}" / "tree"
        tree.parent.mkdir()
        git.checkout([url, *more], commit, tree, max_bytes=max_bytes, submodules=submodules)
        assert [each.name for each in tree.parent.iterdir()] == ["tree"]
        return tree

    return run


def content(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in tree.rglob("*")
        if path.is_symlink() or path.is_file()
    }


FILES = {"a": b"A\r\n", "run!": b"#!/bin/sh\n", "d/e": b"E", "link@": b"d/e", "empty": b""}
FOUND = {"a": b"A\r\n", "run": b"#!/bin/sh\n", "d/e": b"E", "link": b"d/e", "empty": b""}


def test_a_commit(repository: Repository, checkout: Checkout) -> None:
    tree = checkout(repository.url, repository.commit(FILES))
    assert content(tree) == FOUND
    assert tree.joinpath("run").stat().st_mode & 0o111
    assert not tree.joinpath("a").stat().st_mode & 0o111
    assert (tree / "link").is_symlink()


def test_over_http_alone_and_from_a_moved_host(repository: Repository, server: GitServer, checkout: Checkout) -> None:
    old = repository.commit({"old": os.urandom(1 << 20)})
    commit = repository.commit(FILES, parent=old)
    assert content(checkout(f"{server.url}/thing.git", commit)) == FOUND
    server.redirect["moved"] = f"{server.url}/thing.git"
    assert content(checkout(f"{server.url}/moved", commit)) == FOUND
    # Not what came before the commit: that alone has a mebibyte.
    assert content(checkout(f"{server.url}/thing.git", commit, max_bytes=100_000)) == FOUND


def test_attributes_and_filters_have_no_say(repository: Repository, checkout: Checkout) -> None:
    files = {
        ".gitattributes": b"* text=auto eol=crlf ident export-subst filter=x working-tree-encoding=UTF-16\n"
        b"secret export-ignore\n",
        "a": b"one\ntwo\r\n$Id$ $Format:%H$\n",
        "secret": b"kept",
    }
    assert content(checkout(repository.url, repository.commit(files))) == files


def test_nothing_of_the_user_is_used(
    repository: Repository, checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "hooks").mkdir(parents=True)
    hook = home / "hooks/post-checkout"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    for name in ("reference-transaction", "post-index-change"):
        (home / "hooks" / name).symlink_to(hook)
    config = (
        f'[core]\n\thooksPath = {home}/hooks\n\tautocrlf = true\n[url "file:///nowhere/"]\n\tinsteadOf = file:///\n'
    )
    (home / ".gitconfig").write_text(config)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.autocrlf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", f"touch {tmp_path}/ran")
    assert content(checkout(f"file://{repository.path}", _committed(repository))) == FOUND
    assert not (tmp_path / "ran").exists()


def _committed(repository: Repository) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GIT_CONFIG_COUNT", "GIT_DIR"):
            patch.delenv(name)
        return repository.commit(FILES)


def test_a_server_that_asks_for_a_password_is_not_answered(
    repository: Repository, server: GitServer, checkout: Checkout
) -> None:
    commit = repository.commit(FILES)
    server.forbidden.add("thing.git")
    with pytest.raises(RemoteError, match="git fetch failed") as caught:
        checkout(f"{server.url}/thing.git", commit, f"{server.url}/nowhere.git")
    # Which place has said what; and what git says of its settings is nothing that a user has set.
    one, other = (caught.value.reason or "").splitlines()
    assert "could not read Username" in one
    assert other.startswith(f"git fetch failed for {server.url}/nowhere.git: fatal: repository ")
    assert "the server asks for a password" in (caught.value.hint or "")


def test_a_server_that_is_overloaded_for_a_moment(
    repository: Repository, server: GitServer, checkout: Checkout
) -> None:
    commit = repository.commit(FILES)
    server.fail_once = 1
    assert content(checkout(f"{server.url}/thing.git", commit)) == FOUND


def test_a_server_without_the_modern_protocol(repository: Repository, checkout: Checkout, server: GitServer) -> None:
    """Before version 2, commits that no branch or tag leads to are not given by their id: all is fetched instead."""
    commit = repository.commit(FILES)
    repository.commit({"later": b""}, parent=commit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(git, "_SETTINGS", {**git._SETTINGS, "protocol.version": "0"})
        assert content(checkout(f"{server.url}/thing.git", commit)) == FOUND


def test_a_repository_that_is_only_files(repository: Repository, checkout: Checkout, tmp_path: Path) -> None:
    """What any web server can give (git-update-server-info(1)), which cannot give a commit alone."""
    commit = repository.commit(FILES)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(repository.path.parent))) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{http.server_address[1]}/thing.git"
        with pytest.raises(RemoteError, match="not found") as caught:
            checkout(url, commit)
        assert "git update-server-info" in (caught.value.hint or "")
        repository.git("update-server-info")
        assert content(checkout(url, commit)) == FOUND
        with pytest.raises(fetch.NotFound, match="does not have the commit") as gone:
            checkout(url, "0" * 40)
        assert gone.value.reason == "no branch or tag leads to it any more"
        http.shutdown()


def test_the_first_place_that_has_it(repository: Repository, checkout: Checkout, tmp_path: Path) -> None:
    empty = repositories.make(tmp_path / "empty.git")
    commit = repository.commit(FILES)
    assert content(checkout(f"file://{tmp_path}/nowhere", commit, empty.url, repository.url)) == FOUND


def test_a_commit_that_is_gone(repository: Repository, checkout: Checkout) -> None:
    for url in (repository.url, repositories.make(repository.path.parent / "empty.git").url):
        with pytest.raises(fetch.NotFound, match="does not have the commit 0000") as caught:
            checkout(url, "0" * 40)
        (line,) = (caught.value.reason or "").splitlines()  # which both sides say
        assert "not our ref" in line
        assert "vzrepro lock --update" in (caught.value.hint or "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to another user")
def test_a_repository_of_another_user(repository: Repository, checkout: Checkout) -> None:
    commit = repository.commit(FILES)
    os.chown(repository.path, 65534, 65534)
    with pytest.raises(RemoteError, match="git fetch failed") as caught:
        checkout(repository.url, commit)
    (line,) = (caught.value.reason or "").splitlines()  # without git's advice, which would not help
    assert "dubious ownership" in line
    assert "chown" in (caught.value.hint or "")


def test_an_id_of_something_else(repository: Repository, checkout: Checkout) -> None:
    commit = repository.commit(FILES)
    repository.tag("v1", commit, annotated=True)
    for object_id, kind in (
        (repository.git("rev-parse", "v1"), "tag"),
        (repository.git("rev-parse", f"{commit}:"), "tree"),
        (repository.git("rev-parse", f"{commit}:a"), "blob"),
    ):
        with pytest.raises(VzreproError) as caught:
            checkout(repository.url, object_id)
        assert f"is a {kind}, not a commit" in str(caught.value) or "not our ref" in str(caught.value)


def test_sha256_repositories(tmp_path: Path, checkout: Checkout) -> None:
    repository = repositories.make(tmp_path / "new.git", "--object-format=sha256")
    assert content(checkout(repository.url, repository.commit(FILES))) == FOUND


def test_a_repository_that_is_too_large(repository: Repository, checkout: Checkout) -> None:
    commit = repository.commit({"big": os.urandom(8 << 20)})
    with pytest.raises(RemoteError, match="sends more than 1000000 bytes") as caught:
        checkout(repository.url, commit, max_bytes=1_000_000)
    assert "VZREPRO_DOWNLOAD_GIB" in (caught.value.hint or "")


def test_git_is_not_installed(checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VzreproError, match="git is not installed") as caught:
        checkout("https://example.org/x", "0" * 40)
    assert "apt-get install git" in (caught.value.hint or "")


def test_a_server_that_says_nothing(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git, "_STALL_SECS", 0.5)
    with FaultyProxy() as proxy:
        proxy.on("*", stalls)
        with pytest.raises(RemoteError, match="stalls"):
            checkout(f"{proxy.url}/thing.git", "0" * 40)
        assert len(proxy.requests) == 1


@pytest.mark.parametrize("where", ["file:///etc/", "ftp://127.0.0.1/", "ext::touch% /tmp/vz-evil"])
def test_a_server_that_sends_the_client_elsewhere(checkout: Checkout, where: str) -> None:
    with FaultyProxy() as proxy:
        proxy.on("*", redirects(where))
        with pytest.raises(RemoteError, match="git fetch failed"):
            checkout(f"{proxy.url}/thing.git", "0" * 40)


@pytest.mark.parametrize("fault", [says(b"\xff" * 100_000), status(200), status(404), status(500), refuses, hangs_up])
def test_a_server_that_is_no_git_server(checkout: Checkout, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(git._Tries, "sleep", lambda _self, _secs: None)
    with FaultyProxy() as proxy:
        proxy.on("*", fault)
        with pytest.raises(RemoteError) as caught:
            checkout(f"{proxy.url}/thing.git", "0" * 40)
    assert caught.value.reason
    assert caught.value.reason.replace("\n", "").isprintable()


def test_what_git_has_removed_meanwhile_has_no_size(tmp_path: Path) -> None:
    (tmp_path / "pack").write_bytes(b"four")
    assert [git._size(tmp_path / name) for name in ("pack", "tmp_rev_gone")] == [4, 0]


def test_progress_and_interrupt(repository: Repository, tmp_path: Path) -> None:
    commit = repository.commit({"big": os.urandom(8 << 20)})
    stop = threading.Event()
    seen: list[int] = []

    def report(done: int, _total: int | None) -> None:
        seen.append(done)
        stop.set()

    with pytest.raises(Interrupted):
        git.checkout([repository.url], commit, tmp_path / "tree", max_bytes=GIB, report=report, cancel=stop)
    assert seen[0] > 0
    assert not (tmp_path / "tree").exists()


# --- trees that somebody made to hurt ---------------------------------------------------------------------------------


def test_names_that_are_not_utf8(repository: Repository, checkout: Checkout) -> None:
    tree = repository.tree(("100644", repository.blob(b"x"), b"\xff\xfe"))
    assert [os.fsencode(each.name) for each in checkout(repository.url, repository.commit(tree)).iterdir()] == [
        b"\xff\xfe"
    ]


def test_links_outwards_are_text(repository: Repository, checkout: Checkout) -> None:
    files = {"a@": b"/etc/passwd", "b@": b"../../../../x", "c@": b"\xff"}
    assert content(checkout(repository.url, repository.commit(files))) == {
        "a": b"/etc/passwd",
        "b": b"../../../../x",
        "c": b"\xff",
    }


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([("100644", b".git")], "no git would write"),
        ([("100644", b".GiT")], "no git would write"),
        ([("100644", b"..")], "leads upwards"),
        ([("100644", b"a"), ("100644", b"a")], "holds a twice"),
        ([("120000", b"a"), ("100644", b"a/b")], "which is a symlink"),
        ([("100644", b"a/../../b")], "leads upwards"),
        ([("100644", b"x" * 300)], "too long"),
        ([("120000", b"empty")], "is a symlink to ''"),
    ],
)
def test_trees_that_no_directory_can_hold(
    repository: Repository, checkout: Checkout, rows: list[tuple[str, bytes]], complaint: str
) -> None:
    blobs = {b"empty": repository.blob(b"")}
    tree = repository.tree(*((mode, blobs.get(name) or repository.blob(b"/tmp"), name) for mode, name in rows))
    with pytest.raises(VzreproError) as caught:
        checkout(repository.url, repository.commit(tree))
    assert complaint.lower() in str(caught.value).lower()


def test_a_directory_called_like_gits_own(repository: Repository, checkout: Checkout) -> None:
    inside = repository.tree(("100755", repository.blob(b"#!"), b"post-checkout"))
    hooks = repository.tree(("40000", inside, b"hooks"))
    with pytest.raises(UsageError, match="cannot become a source") as caught:
        checkout(repository.url, repository.commit(repository.tree(("40000", hooks, b".git"))))
    assert ".git/hooks/post-checkout" in (caught.value.reason or "")


def test_a_tree_of_trees_that_has_no_end(
    repository: Repository, checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git, "_MAX_LISTING", 1 << 20)
    tree = repository.tree(("100644", repository.blob(b"x" * 100), b"f"))
    for _ in range(10):
        tree = repository.tree(*(("40000", tree, f"d{number}".encode()) for number in range(10)))
    with pytest.raises(UsageError) as caught:
        checkout(repository.url, repository.commit(tree))
    assert "its names take more than 1048576 bytes" in (caught.value.reason or "")


def test_one_blob_many_times_counts_each_time(
    repository: Repository, checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git, "MAX_UNPACKED", 10 << 20)
    blob = repository.blob(bytes(1 << 20))
    tree = repository.tree(*(("100644", blob, f"{number:02}".encode()) for number in range(20)))
    with pytest.raises(UsageError) as caught:
        checkout(repository.url, repository.commit(tree))
    assert "its files have 20971520 bytes" in (caught.value.reason or "")


def test_lfs_is_refused(repository: Repository, checkout: Checkout) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    with pytest.raises(UsageError, match=r"keeps big\.bin with Git LFS") as caught:
        checkout(repository.url, repository.commit({"big.bin": pointer, "a": b"A"}))
    assert "url_source" in (caught.value.hint or "")


def test_an_empty_commit(repository: Repository, checkout: Checkout) -> None:
    assert content(checkout(repository.url, repository.commit({}))) == {}


def test_what_git_knows_no_size_of() -> None:
    """As older ones say of an object that is not there; its content, which git does not give either, ends it."""
    assert git._row(b"100644 blob " + b"1" * 40 + b"     BAD\tx") == git._Row("100644", "1" * 40, 0, "x")


# --- submodules -------------------------------------------------------------------------------------------------------


def _with_submodule(repository: Repository, commit: str, modules: bytes) -> str:
    return repository.commit(
        repository.tree(
            ("100644", repository.blob(modules), b".gitmodules"),
            ("100644", repository.blob(b"own"), b"own"),
            ("160000", commit, b"sub"),
        )
    )


@pytest.mark.parametrize("over_http", [False, True])
def test_submodules(repository: Repository, server: GitServer, checkout: Checkout, over_http: bool) -> None:
    other = repositories.make(repository.path.parent / "other.git")
    inner = repositories.make(repository.path.parent / "inner.git")
    deep = inner.commit({"deep": b"D"})
    commit = _with_submodule(other, deep, b'[submodule "x"]\n\tpath = sub\n\turl = ../inner.git\n')
    commit = _with_submodule(repository, commit, b'[submodule "x"]\n\tpath = sub\n\turl = ./../other.git\n')
    url = f"{server.url}/thing.git" if over_http else repository.url
    assert (checkout(url, commit) / "sub").is_dir()
    found = content(checkout(url, commit, submodules=True))
    assert found["own"] == found["sub/own"] == b"own"
    assert found["sub/sub/deep"] == b"D"


@pytest.mark.parametrize(
    ("modules", "complaint"),
    [
        (b"", "a submodule sub without a URL"),
        (b'[submodule "x"]\n\tpath = other\n\turl = ../other.git\n', "a submodule sub without a URL"),
        (b"[nonsense", "a submodule sub without a URL"),
        (b'[submodule "x"]\n\tpath = sub\n\turl = ext::sh -c "touch /tmp/vz-evil"\n', "only lead to http"),
        (b'[submodule "x"]\n\tpath = sub\n\turl = --upload-pack=touch\n', "only lead to http"),
        (b'[submodule "x"]\n\tpath = sub\n\turl = git@example.com:x\n', "only lead to http"),
        (b'[submodule "x"]\n\tpath = sub\n\turl = file:///etc\n', "only lead to http"),
        (b'[submodule "x"]\n\tpath = sub\n\turl = http://[\n', "only lead to http"),
    ],
)
def test_submodules_that_lead_elsewhere(
    repository: Repository, server: GitServer, checkout: Checkout, modules: bytes, complaint: str
) -> None:
    commit = _with_submodule(repository, "1" * 40, modules)
    with pytest.raises(UsageError) as caught:
        checkout(f"{server.url}/thing.git", commit, submodules=True)
    assert complaint in str(caught.value)


def test_a_submodule_that_is_gone(repository: Repository, checkout: Checkout) -> None:
    repositories.make(repository.path.parent / "other.git")
    for url, complaint in (("other", "other.git does not have the commit 1111"), ("none", "git fetch failed for")):
        modules = f'[submodule "x"]\n\tpath = sub\n\turl = ../{url}.git\n'
        commit = _with_submodule(repository, "1" * 40, modules.encode())
        with pytest.raises(RemoteError) as caught:
            checkout(repository.url, commit, submodules=True)
        assert caught.value.message.startswith(f"the submodule sub of {repository.url} cannot be had: ")
        assert complaint in caught.value.message
        assert ("submodules=True" in (caught.value.hint or "")) == (url == "other")


# --- pinning ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def said() -> list[str]:
    return []


Resolve = Callable[..., SourcePin]


@pytest.fixture
def resolve(tmp_path: Path, said: list[str]) -> Resolve:
    def run(url: str, old: SourcePin | None = None, **ask: object) -> SourcePin:
        want = Want("git-source", "thing", "here", {"url": url, "rev": None, "tag": None, "submodules": False, **ask})
        lookup = Lookup(fetch.Mirrors({}), tmp_path, tmp_path / "downloads", GIB, said.append, said.append)
        return git.resolve(want, old, lookup)

    return run


def _tree(pin: SourcePin) -> PinnedTree:
    assert isinstance(pin.file, PinnedTree)
    return pin.file


def test_a_revision(repository: Repository, resolve: Resolve, checkout: Checkout) -> None:
    commit = repository.commit(FILES)
    pin = resolve(repository.url, rev=commit)
    assert (pin.version, _tree(pin).commit) == (commit[:12], commit)
    assert (_tree(pin).nar_hash, _tree(pin).size) == nar.nar_hash(checkout(repository.url, commit))


def test_the_hash_of_a_commits_tree_is_a_format(repository: Repository, resolve: Resolve) -> None:
    """Another value means another `GIT_FORMAT`: every locked commit is held by it."""
    pin = resolve(repository.url, rev=repository.commit(FILES))
    assert _tree(pin).nar_hash.hex == "7f3b86ac675a16c99208d9781e10d896d0930651f87ec21c7de53adec8eed74c"


def test_a_mirror_of_repositories(repository: Repository, tmp_path: Path) -> None:
    commit = repository.commit(FILES)
    mirrors = fetch.Mirrors({"ours": [f"file://{tmp_path}/none", f"file://{repository.path.parent}"]})
    ask = {"url": "mirror://ours/thing.git", "rev": commit, "tag": None, "submodules": False}
    lookup = Lookup(mirrors, tmp_path, tmp_path / "downloads", GIB)
    pin = git.resolve(Want("git-source", "thing", "here", ask), None, lookup)
    assert _tree(pin).place == f"git+mirror://ours/thing.git@{commit}"


def test_tags_and_patterns(repository: Repository, resolve: Resolve) -> None:
    commits = {}
    for number, name in enumerate(("v1.2", "v1.9", "v1.10", "v1.11-rc1", "v2.0", "other-3")):
        commits[name] = repository.commit({"version": str(number).encode()})
        repository.tag(name, commits[name], annotated=number % 2 == 0)
    for pattern, name, version in (
        ("v1.*", "v1.10", "1.10"),
        ("v*", "v2.0", "2.0"),
        ("v1.2", "v1.2", "1.2"),
        ("v1.11-rc*", "v1.11-rc1", "1.11-rc1"),
        ("other-*", "other-3", "3"),
    ):
        pin = resolve(repository.url, tag=pattern)
        assert (pin.version, _tree(pin).commit) == (version, commits[name])


def test_a_tag_that_is_not_there(repository: Repository, resolve: Resolve) -> None:
    with pytest.raises(UsageError, match="has no tag v1") as caught:
        resolve(repository.url, tag="v1")
    assert "no tags at all" in (caught.value.reason or "")
    repository.tag("v2", repository.commit(FILES))
    with pytest.raises(UsageError, match=r"has no tag v1\.\*") as caught:
        resolve(repository.url, tag="v1.*")
    assert "it has v2" in (caught.value.reason or "")


def test_a_tag_that_moved(repository: Repository, resolve: Resolve, said: list[str]) -> None:
    one = repository.commit({"a": b"1"})
    repository.tag("v1", one)
    old = resolve(repository.url, tag="v1")
    two = repository.commit({"a": b"2"})
    repository.tag("v1", two)
    new = resolve(repository.url, old, tag="v1")
    assert _tree(new).commit == two
    assert any(f"the tag v1 of {repository.url} has moved: it was {one}, is {two}" in line for line in said)


def test_a_tag_of_no_commit(repository: Repository, resolve: Resolve) -> None:
    commit = repository.commit(FILES)
    repository.tag("v1", f"{commit}^{{tree}}", annotated=True)
    with pytest.raises(VzreproError) as caught:
        resolve(repository.url, tag="v1")
    assert "is a tree, not a commit" in str(caught.value) or "not our ref" in str(caught.value)


def test_a_tag_of_a_tag(repository: Repository, resolve: Resolve) -> None:
    commit = repository.commit(FILES)
    repository.tag("inner", commit, annotated=True)
    repository.tag("v1", "refs/tags/inner", annotated=True)
    assert _tree(resolve(repository.url, tag="v1")).commit == commit


def test_modes_are_those_of_git_whatever_the_umask(
    repository: Repository, resolve: Resolve, checkout: Checkout
) -> None:
    pin = resolve(repository.url, rev=repository.commit(FILES))
    before = os.umask(0o077)
    try:
        tree = checkout(repository.url, _tree(pin).commit)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tree / "run").stat().st_mode) & 0o100
    assert nar.nar_hash(tree)[0] == _tree(pin).nar_hash


def test_submodules_that_are_left_out_are_told(repository: Repository, resolve: Resolve, said: list[str]) -> None:
    commit = _with_submodule(repository, "1" * 40, b"")
    resolve(repository.url, rev=commit)
    assert "thing: its submodules are left out (sub); submodules=True takes them" in said
    said.clear()
    resolve(repository.url, rev=repository.commit(FILES))
    assert not any("submodules" in line for line in said)
