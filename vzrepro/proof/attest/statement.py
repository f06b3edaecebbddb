"""in-toto Statements, version 1: somebody's claim (the predicate) about outputs (the subjects).

The format is that of https://github.com/in-toto/attestation (`spec/v1/statement.md`). Ours name the output by its store
path and the hash of its NAR, and every file in it by its sha256, so that a file can be checked where only it is.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vzrepro.base.errors import UsageError
from vzrepro.base.model import NarHash, StorePath, canonical_json
from vzrepro.base.signing import SigningKey
from vzrepro.proof.attest import dsse
from vzrepro.proof.attest.dsse import Envelope, Malformed

PAYLOAD_TYPE = "application/vnd.in-toto+json"
"""The payload type of an envelope with a statement in it."""

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"

NAR_DIGEST = "narSha256"
"""The name, among a subject's digests, of the sha256 of its NAR, in hex."""

MAX_FILES = 64
"""Outputs with more regular files than this are named as a whole only."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Something that a statement is about: its name, and its digests in hex by the algorithm's name."""

    name: str
    digest: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """The subject as plain data."""
        return {"name": self.name, "digest": dict(self.digest)}


@dataclass(frozen=True, slots=True)
class Statement:
    """What is said (`predicate`, of which kind: `predicate_type`) about what."""

    subjects: tuple[Subject, ...]
    predicate_type: str
    predicate: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """The statement as plain data."""
        return {
            "_type": STATEMENT_TYPE,
            "subject": [subject.document() for subject in self.subjects],
            "predicateType": self.predicate_type,
            "predicate": dict(self.predicate),
        }

    def canonical(self) -> bytes:
        """Its canonical JSON: the payload that is signed."""
        return canonical_json(self.document())

    def signed(self, key: SigningKey) -> bytes:
        """The bytes of an envelope with this statement in it, signed by `key`."""
        return dsse.sign(PAYLOAD_TYPE, self.canonical(), key)

    @property
    def output(self) -> tuple[StorePath, NarHash] | None:
        """The one output that this is about, and the hash of its NAR; None when it names none, or several."""
        named = [subject for subject in self.subjects if NAR_DIGEST in subject.digest]
        if len(named) != 1:
            return None
        try:
            return StorePath.parse(named[0].name), NarHash(named[0].digest[NAR_DIGEST])
        except (UsageError, ValueError):
            return None

    @property
    def files(self) -> dict[str, str]:
        """The sha256, in hex, of each file that is named, by its name."""
        return {subject.name: subject.digest["sha256"] for subject in self.subjects if "sha256" in subject.digest}

    @classmethod
    def parse(cls, payload: bytes) -> Statement:
        """Read a payload. Raises Malformed when it is no statement of version 1, or names something twice."""
        document = dsse.load_object(payload, "an in-toto statement")
        if document.get("_type") != STATEMENT_TYPE:
            raise Malformed("this is not an in-toto statement of version 1", reason="its _type is another one")
        subjects, kind, predicate = (document.get(name) for name in ("subject", "predicateType", "predicate"))
        if not isinstance(subjects, list) or not subjects:
            raise Malformed("this in-toto statement is malformed", reason="it is about nothing")
        if not isinstance(kind, str) or not kind or not isinstance(predicate, dict):
            raise Malformed("this in-toto statement is malformed", reason="it says nothing about its subject")
        found = tuple(map(_subject, subjects))
        if len({subject.name for subject in found}) < len(found):
            raise Malformed("this in-toto statement is malformed", reason="two of its subjects have one name")
        return cls(found, kind, predicate)

    @classmethod
    def of(cls, envelope: Envelope) -> Statement:
        """The statement in an envelope. Raises Malformed, also when its payload is said to be something else.

        Who signed it is another question: `Envelope.signers`.
        """
        if envelope.payload_type != PAYLOAD_TYPE:
            raise Malformed("this envelope has no in-toto statement in it", reason=f"wanted {PAYLOAD_TYPE}")
        return cls.parse(envelope.payload)


def files_named(envelope: bytes) -> dict[str, str]:
    """The sha256, in hex, of each file that an unverified envelope's statement names; none where it is malformed."""
    try:
        return Statement.of(dsse.parse(envelope)).files
    except Malformed:
        return {}


def subjects_of(path: StorePath, nar_hash: NarHash, tree: Path | None) -> tuple[Subject, ...]:
    """The subjects of a statement about one output: the whole, then each regular file below `tree`, where it lies.

    Files are named by their path in the output, `/` between its parts; an output that is one file, by the store path's
    name. None are named where there is no tree, where there are more than MAX_FILES, or where a name is not UTF-8: the
    NAR hash covers them all. Raises OSError.
    """
    whole = Subject(str(path), {NAR_DIGEST: nar_hash.hex})
    return whole, *(() if tree is None else file_subjects(tree, path.name))


def file_subjects(tree: Path, name: str) -> tuple[Subject, ...]:
    """The subjects for the files of an output alone, as `subjects_of` has them. Raises OSError."""
    files: list[tuple[str, str]] = []
    for file in _files(os.fspath(tree)):
        if len(files) == MAX_FILES:
            return ()
        files.append((os.path.relpath(file, tree) if file != os.fspath(tree) else name, file))
    try:
        files.sort(key=lambda each: each[0].encode())
    except UnicodeEncodeError:
        return ()
    return tuple(Subject(name, {"sha256": _sha256(file)}) for name, file in files)


def _files(place: str) -> Iterator[str]:
    """The regular files at and below a place; links are neither named nor followed."""
    kind = os.lstat(place).st_mode
    if stat.S_ISREG(kind):
        yield place
    elif stat.S_ISDIR(kind):
        with os.scandir(place) as entries:
            below = [entry.path for entry in entries]
        for each in below:
            yield from _files(each)


def _sha256(file: str) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _subject(document: object) -> Subject:
    if isinstance(document, dict):
        name, digest = document.get("name", ""), document.get("digest")
        if isinstance(name, str) and isinstance(digest, dict) and digest and _all_texts(digest):
            return Subject(name, digest)
    raise Malformed("this in-toto statement is malformed", reason="a subject has no name or no digest")


def _all_texts(digest: dict[str, Any]) -> bool:
    return all(isinstance(value, str) and value for value in digest.values())
