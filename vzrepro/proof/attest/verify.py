"""Is this what enough builders got? Files on this disk against what operators have signed; nothing is built.

The bytes decide. A tree whose NAR hash enough operators voted for is theirs. Where modes were lost on the way, as in
some archives, each file must have the sha256 that enough of them name, and no file may be missing or there in addition.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import HashMismatch, NotDeterministic, Untrusted, UsageError, VzreproError
from vzrepro.base.model import DrvHash, NarHash, StorePath, store_path
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.ballots import Ballots, FoundEnvelope
from vzrepro.proof.attest.policy import Policy
from vzrepro.proof.attest.statement import MAX_FILES, NAR_DIGEST, Subject
from vzrepro.proof.attest.votes import Decision, Tally, Vote, count, decide

STATEMENTS = ".intoto.jsonl"
"""How the names of files with envelopes end, one in each line."""

_BESIDE = (STATEMENTS, ".sha256")
_MAX_STATEMENTS = 256 << 20
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What is to be verified. `shown` is what the user calls it, `target` what a policy does, `name` the store path's
    name; `tree` is where it lies. `drv_hash` is the one derivation it must come from, None for any of that name.
    `bare` says that files that belong beside it, with statements and checksums, may be in it."""

    shown: str
    target: str
    name: str
    tree: Path
    drv_hash: DrvHash | None = None
    bare: bool = False


class FileTree:
    """Files on the disk. Reading raises OSError, or VzreproError for what no store object can hold."""

    def __init__(self, place: Path, name: str, *, bare: bool) -> None:
        self._place = place.resolve() if bare else place  # a store object may itself be a link
        self._name = name
        self._bare = bare

    @cached_property
    def nar_hash(self) -> NarHash:
        """The hash of the tree's NAR."""
        return nar.nar_hash(self._place, without=self._is_beside if self._bare else None)[0]

    @cached_property
    def files(self) -> dict[str, str]:
        """The sha256 of every regular file in hex, by its name in the tree, sorted; a tree that is one file has the
        store path's name."""
        return {name: _sha256(path) for name, path in self._walk() if stat.S_ISREG(path.lstat().st_mode)}

    @cached_property
    def others(self) -> tuple[str, ...]:
        """The names of what no list of files has: what is neither file nor directory, and empty directories."""
        return tuple(name for name, path in self._walk() if not stat.S_ISREG(path.lstat().st_mode))

    def subjects(self, path: StorePath | None) -> tuple[Subject, ...]:
        """The tree as the subject of a statement, by the store path or, if there is none, the name."""
        whole = Subject(str(path or self._name), {NAR_DIGEST: self.nar_hash.hex})
        named = self.files if len(self.files) <= MAX_FILES and all(map(_is_text, self.files)) else {}
        return whole, *(Subject(name, {"sha256": digest}) for name, digest in named.items())

    def _is_beside(self, name: bytes) -> bool:
        """Whether this entry of the tree is a file that belongs beside a bundle, not a part of it."""
        if not os.fsdecode(name).endswith(_BESIDE):
            return False
        return stat.S_ISREG((self._place / os.fsdecode(name)).lstat().st_mode)

    def _walk(self) -> list[tuple[str, Path]]:
        if not self._place.is_dir():
            return [(self._name, self._place)]
        found = []
        for below, folders, files in disk.walk(self._place, _raise):
            links = [name for name in folders if (below / name).is_symlink()]
            paths = [
                below / name
                for name in (*files, *links)
                if not (self._bare and below == self._place and self._is_beside(os.fsencode(name)))
            ]
            paths += [] if files or folders or below == self._place else [below]
            found += [(path.relative_to(self._place).as_posix(), path) for path in paths]
        return sorted(found)


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """How a verification ended: `error` is None when the tree is what enough operators got.

    `tally` and `decision` are those of the derivation that it was judged by, None where there was none. `lost` says
    that every file is right and the modes are not.
    """

    asked: VerifyRequest
    nar_hash: NarHash
    ballots: Ballots
    tally: Tally | None = None
    decision: Decision | None = None
    error: VzreproError | None = None
    lost: bool = False

    @property
    def path(self) -> StorePath | None:
        """The store path that it was judged by."""
        return None if self.tally is None else store_path(self.tally.drv_hash, self.asked.name)

    def subjects(self) -> tuple[Subject, ...]:
        """What a summary of this is about. Raises HashMismatch when the tree is not what was verified any more."""
        tree = FileTree(self.asked.tree, self.asked.name, bare=self.asked.bare)
        _ = tree.files  # read before the whole is hashed once more, so that both are of the same tree
        if tree.nar_hash != self.nar_hash:
            raise HashMismatch(
                f"{self.asked.shown} was changed while it was verified",
                reason=f"before: {self.nar_hash.nix}\nnow:    {tree.nar_hash.nix}",
                hint="verify it once more when nobody writes to it",
            )
        return tree.subjects(self.path)

    @property
    def voters(self) -> tuple[str, ...]:
        """The operators whose votes carry the result."""
        return () if self.decision is None else tuple(self.decision.standing.voters)

    def document(self) -> dict[str, Any]:
        """The result as plain data for JSON."""
        exception = None if self.decision is None else self.decision.exception
        return {
            "subject": self.asked.shown,
            "result": "FAILED" if self.error else "PASSED",
            "target": self.asked.target,
            "path": None if self.path is None else str(self.path),
            "drv_hash": None if self.tally is None else self.tally.drv_hash.hex,
            "nar_hash": self.nar_hash.hex,
            "needed": None if self.tally is None else self.tally.needed,
            "voters": list(self.voters),
            "results": {} if self.tally is None else {str(r.nar_hash): list(r.voters) for r in self.tally.standings},
            "void": [] if self.tally is None else [each.operator for each in self.tally.void],
            "exception": exception and {"reason": exception.reason, "until": exception.until.isoformat()},
            "modes_lost": self.lost,
        }


def verify(asked: VerifyRequest, ballots: Ballots, policy: Policy, now: dt.datetime) -> VerificationResult:
    """Judge a tree by votes. What is wrong with it or with them is the result's `error`; raises OSError, and
    VzreproError for a tree that cannot be read."""
    tree = FileTree(asked.tree, asked.name, bare=asked.bare)
    nar_hash = tree.nar_hash
    about = [vote for vote in ballots.votes if vote.path.name == asked.name]
    candidates = [asked.drv_hash] if asked.drv_hash is not None else sorted({vote.drv_hash for vote in about})
    judged = [_judged(asked, ballots, about, policy, now, tree, drv_hash) for drv_hash in candidates]
    if not judged:
        error = Untrusted(
            f"nobody who may vote has signed that they built {asked.name}",
            reason=f"statements that were found and do not count: {len(ballots.refused)}" if ballots.refused else None,
            hint="name a directory with statements (--offline DIR), or a cache that has some (--against URL)",
        )
        return VerificationResult(asked, nar_hash, ballots, error=error)
    return min(judged, key=lambda each: _severity(each, nar_hash))


def _judged(
    asked: VerifyRequest,
    ballots: Ballots,
    votes: Sequence[Vote],
    policy: Policy,
    now: dt.datetime,
    tree: FileTree,
    drv_hash: DrvHash,
) -> VerificationResult:
    tally = count(votes, policy, asked.target, drv_hash)
    decision, lost = None, False
    try:
        decision = decide(tally, policy, now)
        lost = _compare(asked, tree, tally, decision)
    except VzreproError as error:
        return VerificationResult(asked, tree.nar_hash, ballots, tally, decision, error)
    return VerificationResult(asked, tree.nar_hash, ballots, tally, decision, None, lost)


def _severity(each: VerificationResult, nar_hash: NarHash) -> tuple[int, int]:
    """Which derivation to speak of, where several have the name: one that the tree is of, then one with more votes."""
    assert each.tally is not None
    concerned = any(standing.nar_hash == nar_hash for standing in each.tally.standings)
    votes = max((standing.weight for standing in each.tally.standings), default=0)
    match each.error:
        case None:
            rank = 0
        case NotDeterministic() if concerned:
            rank = 1
        case Untrusted() if concerned:
            rank = 2
        case HashMismatch():
            rank = 3
        case _:
            rank = 4
    return rank, -votes


def _compare(asked: VerifyRequest, tree: FileTree, tally: Tally, decision: Decision) -> bool:
    """Whether only modes differ from what was decided. Raises HashMismatch when anything else does."""
    standing = decision.standing
    if tree.nar_hash == standing.nar_hash:
        return False
    # An exception is about one hash: what a few voters say of single files does not stand in for it.
    agreed = standing.files(tally.needed) if decision.exception is None else None
    named = agreed or standing.files(1)
    faults = [] if named is None else list(_faults(tree, named))
    if agreed is not None and not faults and not tree.others:
        return True
    by = ", ".join(standing.voters)
    lines = faults[:_SHOWN] or ["links, modes or empty directories differ" if named else "no voter names its files"]
    lines += [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    lines.append(f"wanted: {standing.nar_hash.nix}, by {by}\nfound:  {tree.nar_hash.nix}{_whose(tree, tally)}")
    raise HashMismatch(
        f"{asked.shown} is not what {by} built as {asked.target}",
        reason="\n".join(lines),
        hint="do not use it; take another copy, or see who got what: vzrepro challenge " + asked.target,
    )


def _faults(tree: FileTree, named: dict[str, str]) -> Iterator[str]:
    for name, wanted in named.items():
        found = tree.files.get(name)
        if found is None:
            yield f"{name} is {'something else than a file' if name in tree.others else 'missing'}"
        elif found != wanted:
            yield f"{name} is another one: wanted sha256 {wanted}, found {found}"
    for name in tree.files:
        if name not in named:
            yield f"{name} is not part of it"


def _whose(tree: FileTree, tally: Tally) -> str:
    got = [each for each in tally.standings if each.nar_hash == tree.nar_hash]
    return "".join(f", which {', '.join(each.voters)} got" for each in got)


# --- statements in files ----------------------------------------------------------------------------------------------


def statements_in(directory: Path) -> list[FoundEnvelope]:
    """The envelopes in the `*.intoto.jsonl` files of a directory, each line one; what is in them is not looked at.

    Raises UsageError when the directory or a file cannot be read, is no regular file, or they are larger than 256 MiB.
    """
    found: list[FoundEnvelope] = []
    left = _MAX_STATEMENTS
    try:
        for file in sorted(path for path in directory.iterdir() if path.name.endswith(STATEMENTS)):
            left = _read_lines(file, left, found)
        return found
    except OSError as error:
        raise UsageError(
            f"the statements in {directory} cannot be read", reason=f"{error.filename}: {error.strerror}"
        ) from error


def _read_lines(file: Path, left: int, found: list[FoundEnvelope]) -> int:
    """Add a file's lines to `found`; how many of the `left` bytes may still be read then."""
    fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits for who writes into a fifo
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{file} is no file", reason=f"what is called *{STATEMENTS} is read for statements")
        if status.st_size > left:
            raise _too_large(file.parent)
        with open(fd, "rb", closefd=False) as opened:
            number = 0
            # One byte more than an envelope may have, so that what is cut here is refused as too large.
            while line := opened.readline(dsse.MAX_ENVELOPE + 2):
                number += 1
                left -= len(line)
                if left < 0:
                    raise _too_large(file.parent)
                if line.strip():
                    found.append(FoundEnvelope(f"{file.name}:{number}", line.strip()))
    finally:
        os.close(fd)
    return left


def _too_large(directory: Path) -> UsageError:
    return UsageError(
        f"the statements in {directory} are too large", reason=f"at most {_MAX_STATEMENTS >> 20} MiB are read"
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _raise(error: OSError) -> None:
    raise error
