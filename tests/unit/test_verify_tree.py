"""Files on the disk against votes: what is verified, what is at fault, and what of statements in files is read."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vzrepro import nar
from vzrepro.base.errors import HashMismatch, NotDeterministic, Untrusted, UsageError, VzreproError
from vzrepro.base.model import DrvHash, NarHash, store_path
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest.ballots import Ballots, FoundEnvelope, read
from vzrepro.proof.attest.policy import Exemption, Operator, OperatorKey, Policy
from vzrepro.proof.attest.statement import subjects_of
from vzrepro.proof.attest.verify import FileTree, VerificationResult, VerifyRequest, statements_in, verify
from vzrepro.proof.attest.votes import Vote, VoteKind

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
ONE, TWO = DrvHash("1" * 64), DrvHash("2" * 64)
KEY = PublicKey("k", bytes(32))


def policy(threshold: int = 2, exceptions: tuple[Exemption, ...] = ()) -> Policy:
    key = OperatorKey(KEY)
    return Policy("test", 1, threshold, tuple(Operator(name, (key,)) for name in "abcd"), (), exceptions)


def vote(operator: str, nar_hash: NarHash, files: dict[str, str] | None = None, drv: DrvHash = ONE) -> Vote:
    named = tuple(sorted((files or {}).items()))
    path = store_path(drv, "thing")
    return Vote(operator, KEY, VoteKind.PROVENANCE, path, drv, None, nar_hash, named, NOW, False, ("here",), operator)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    place = tmp_path / "thing"
    (place / "sub").mkdir(parents=True)
    (place / "program").write_bytes(b"#!/bin/sh\n")
    (place / "program").chmod(0o755)
    (place / "sub" / "data").write_bytes(b"data\n")
    return place


def judged(tree: Path, *votes: Vote, rules: Policy | None = None, drv: DrvHash | None = None) -> VerificationResult:
    asked = VerifyRequest("it", "thing", "thing", tree, drv, bare=True)
    return verify(asked, Ballots(votes, (), {}), rules or policy(), NOW)


def named(tree: Path) -> dict[str, str]:
    return FileTree(tree, "thing", bare=True).files


def test_a_tree_is_named_as_statements_name_it(tree: Path) -> None:
    path = store_path(ONE, "thing")
    assert FileTree(tree, "thing", bare=False).subjects(path) == subjects_of(path, nar.nar_hash(tree)[0], tree)
    file = tree / "program"
    assert FileTree(file, "thing", bare=False).subjects(path) == subjects_of(path, nar.nar_hash(file)[0], file)


def test_what_lies_beside_a_bundle_is_left_out_at_the_top_only(tree: Path) -> None:
    before = nar.nar_hash(tree)[0]
    (tree / "x.intoto.jsonl").write_text("")
    (tree / "x.sha256").write_text("")
    assert FileTree(tree, "thing", bare=True).nar_hash == before
    assert set(FileTree(tree, "thing", bare=True).files) == {"program", "sub/data"}
    assert FileTree(tree, "thing", bare=False).nar_hash != before
    (tree / "sub" / "y.sha256").write_text("")
    assert FileTree(tree, "thing", bare=True).nar_hash != before
    assert "sub/y.sha256" in named(tree)


@pytest.mark.parametrize("name", ["evil.sha256", "evil.intoto.jsonl"])
def test_only_files_lie_beside_a_bundle(tree: Path, name: str) -> None:
    """A directory, a link or a fifo of that name is something else than a checksum, and would not be looked into."""
    right, files = nar.nar_hash(tree)[0], named(tree)
    votes = vote("a", right, files), vote("b", right, files)
    (tree / name).mkdir()
    (tree / name / "payload").write_bytes(b"anything")
    assert f"{name}/payload is not part of it" in str(judged(tree, *votes).error)
    (tree / name / "payload").unlink()
    assert isinstance(judged(tree, *votes).error, HashMismatch), "an empty directory is not what was built, either"
    (tree / name).rmdir()
    (tree / name).symlink_to("program")
    assert isinstance(judged(tree, *votes).error, HashMismatch)
    (tree / name).unlink()
    os.mkfifo(tree / name)
    with pytest.raises(VzreproError, match="cannot be part"):
        judged(tree, *votes)
    (tree / name).unlink()
    assert judged(tree, *votes).error is None


def test_an_empty_directory_more_is_no_lost_mode(tree: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    (tree / "sub" / "empty").mkdir()
    done = judged(tree, vote("a", right, files), vote("b", right, files))
    assert isinstance(done.error, HashMismatch)
    assert "empty directories differ" in str(done.error)


def test_a_link_to_a_bundle_is_that_bundle(tree: Path, tmp_path: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    link = tmp_path / "current"
    link.symlink_to(tree)
    done = judged(link, vote("a", right, files), vote("b", right, files))
    assert (done.error, done.lost) == (None, False)


def test_a_summary_is_about_what_was_verified(tree: Path) -> None:
    right = nar.nar_hash(tree)[0]
    done = judged(tree, vote("a", right), vote("b", right))
    assert done.subjects() == FileTree(tree, "thing", bare=True).subjects(store_path(ONE, "thing"))
    (tree / "program").write_bytes(b"evil\n")
    with pytest.raises(HashMismatch, match="changed while"):
        done.subjects()


def test_a_name_that_is_no_text_can_be_told_of(tree: Path) -> None:
    """Signed statements are UTF-8; that file is still covered by the hash of the whole."""
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff")).write_bytes(b"")
    done = judged(tree, vote("a", NarHash("f" * 64)), vote("b", NarHash("f" * 64)))
    assert isinstance(done.error, HashMismatch)
    [whole] = done.subjects()
    assert whole.digest == {"narSha256": nar.nar_hash(tree)[0].hex}


def test_a_voter_cannot_have_another_name_verified(tree: Path) -> None:
    """The path in a statement is of its derivation and of any name; only the one that was asked for counts."""
    right = nar.nar_hash(tree)[0]
    renamed = replace(vote("a", right), path=store_path(ONE, "another"))
    assert "too few votes" in str(judged(tree, renamed, vote("b", right), drv=ONE).error)
    done = judged(tree, renamed, vote("b", right), vote("c", right))
    assert (done.error, done.path, done.voters) == (None, store_path(ONE, "thing"), ("b", "c"))


def test_enough_votes_for_the_whole_are_enough(tree: Path) -> None:
    right = nar.nar_hash(tree)[0]
    done = judged(tree, vote("a", right), vote("b", right), vote("c", NarHash("f" * 64)))
    assert (done.error, done.voters, done.lost) == (None, ("a", "b"), False)
    assert done.document()["result"] == "PASSED"
    assert done.path == store_path(ONE, "thing")


def test_a_file_that_differs_is_named_with_both_hashes(tree: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    (tree / "sub" / "data").write_bytes(b"date\n")
    (tree / "program").unlink()
    (tree / "more").write_bytes(b"")
    error = judged(tree, vote("a", right, files), vote("b", right, files)).error
    assert isinstance(error, HashMismatch)
    reason = str(error.reason)
    assert f"sub/data is another one: wanted sha256 {files['sub/data']}" in reason
    assert "program is missing" in reason
    assert "more is not part of it" in reason


def test_only_what_enough_operators_name_stands_in_for_lost_modes(tree: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    (tree / "program").chmod(0o644)
    done = judged(tree, vote("a", right, files), vote("b", right, files))
    assert (done.error, done.lost) == (None, True)
    # One of the two names none, or others: then it is one operator's word that these files are the tree.
    for other in (None, {"program": "0" * 64}):
        assert isinstance(judged(tree, vote("a", right, files), vote("b", right, other)).error, HashMismatch)


def test_a_wrong_list_beside_a_right_hash_passes_nothing(tree: Path) -> None:
    """A liar votes with the honest for the hash and names its own files."""
    right, files = nar.nar_hash(tree)[0], named(tree)
    (tree / "program").write_bytes(b"evil\n")
    done = judged(tree, vote("a", right, files), vote("d", right, named(tree)))
    assert isinstance(done.error, HashMismatch)


def test_links_are_not_covered_by_lists_of_files(tree: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    (tree / "link").symlink_to("/etc/passwd")
    error = judged(tree, vote("a", right, files), vote("b", right, files)).error
    assert isinstance(error, HashMismatch)
    (tree / "link").unlink()
    (tree / "program").unlink()
    (tree / "program").symlink_to("/bin/sh")
    error = judged(tree, vote("a", right, files), vote("b", right, files)).error
    assert "program is something else than a file" in str(error)
    (tree / "folder").symlink_to("/")
    assert "folder" in FileTree(tree, "thing", bare=True).others


def test_an_exception_is_about_one_hash(tree: Path) -> None:
    right, files = nar.nar_hash(tree)[0], named(tree)
    exception = Exemption("thing", right, "because", NOW + dt.timedelta(days=1))
    done = judged(tree, vote("a", right, files), rules=policy(exceptions=(exception,)))
    assert done.error is None
    assert done.document()["exception"]["reason"] == "because"
    (tree / "program").chmod(0o644)
    done = judged(tree, vote("a", right, files), rules=policy(exceptions=(exception,)))
    assert isinstance(done.error, HashMismatch)


def test_of_several_derivations_the_one_it_is_of_is_told(tree: Path) -> None:
    right, other = nar.nar_hash(tree)[0], NarHash("f" * 64)
    foreign = [vote("a", other, drv=TWO), vote("b", other, drv=TWO), vote("c", other, drv=TWO)]
    done = judged(tree, *foreign, vote("a", right), vote("b", right))
    assert done.error is None
    assert done.tally is not None
    assert done.tally.drv_hash == ONE
    assert isinstance(judged(tree, *foreign, vote("a", right), vote("b", right), drv=TWO).error, HashMismatch)
    assert isinstance(judged(tree, *foreign, vote("a", right)).error, Untrusted)
    split = [vote("a", right), vote("b", right), vote("c", other), vote("d", other)]
    assert isinstance(judged(tree, *foreign, *split).error, NotDeterministic)


def test_votes_under_another_name_are_not_about_it(tree: Path) -> None:
    right = nar.nar_hash(tree)[0]
    asked = VerifyRequest("it", "other", "other", tree, None, bare=True)
    done = verify(asked, Ballots((vote("a", right), vote("b", right)), (), {}), policy(), NOW)
    assert isinstance(done.error, Untrusted)
    assert done.document()["drv_hash"] is None


def test_statements_are_read_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "b.intoto.jsonl").write_bytes(b'{"a": 1}\n\n  \n{"b"')
    (tmp_path / "a.intoto.jsonl").write_bytes(b"x\r\n")
    (tmp_path / "other.json").write_bytes(b"{}\n")
    assert statements_in(tmp_path) == [
        FoundEnvelope("a.intoto.jsonl:1", b"x"),
        FoundEnvelope("b.intoto.jsonl:1", b'{"a": 1}'),
        FoundEnvelope("b.intoto.jsonl:4", b'{"b"'),
    ]


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.intoto.jsonl").write_bytes(b"[" * (3 << 20) + b"\n" + json.dumps({}).encode())
    found = statements_in(tmp_path)
    assert max(len(each.data) for each in found) < 2 << 20
    assert found[-1].data == b"{}"
    assert all("too large" in each.why or "not an" in each.why or "malformed" in each.why
               for each in read(found, policy()).refused)  # fmt: skip


@pytest.mark.parametrize("sizes", [((256 << 20) + 1,), (1, 256 << 20)])
def test_too_many_bytes_are_refused(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    for number, size in enumerate(sizes):
        with (tmp_path / f"{number}.intoto.jsonl").open("wb") as file:
            file.truncate(size)
    with pytest.raises(UsageError, match="too large"):
        statements_in(tmp_path)


@pytest.mark.parametrize(
    "plant",
    [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("nowhere")],
)
def test_what_is_no_file_of_statements_is_not_waited_for(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    """Whoever made the directory would have the verifier wait, or read, for ever."""
    plant(tmp_path / "a.intoto.jsonl")
    with pytest.raises(UsageError, match=r"a\.intoto\.jsonl"):
        statements_in(tmp_path)
