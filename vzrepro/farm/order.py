"""What travels through a queue: an order, its answer, and how a build failed; plain documents of less than a KiB (a
failure's: of 16 KiB), read as what a stranger wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vzrepro.base.errors import (
    BuildFailed,
    HashMismatch,
    Interrupted,
    NotDeterministic,
    OutOfMemory,
    RemoteError,
    TimedOut,
    Untrusted,
    UsageError,
    VzreproError,
)
from vzrepro.base.model import BuildKey, DrvHash, NarHash, StorePath, canonical_json, check_name
from vzrepro.base.signing import SigningKey, TrustedKeys
from vzrepro.recipe.graph import Node

SizeClass = Literal["small", "large"]
"""How much of a machine a build takes: `large` is what asks for more than every recipe gets, an hour and 8 GiB of
memory."""

SIZES: tuple[SizeClass, ...] = ("small", "large")

PLATFORMS = ("linux/amd64", "linux/arm64")
"""The platforms whose queues are looked at when nobody names one."""

MAX_BUILDERS = 8
"""How many may have to build one thing."""

MAX_APART = 16
"""How many keys an order may leave out."""

FORMAT = 3
"""Version of the documents; another one is refused."""

_LARGE_SECS = 3600
_LARGE_BYTES = 8 << 30
_LONGEST_SECS = 24 * 3600
_PLATFORM = re.compile(r"[a-z0-9]{1,16}/[a-z0-9_]{1,16}")
_WORKER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_KEY_ID = re.compile(r"[0-9a-f]{16}")
_QUESTION = re.compile(r"[a-z0-9:,/-]{1,480}")
_REPORT = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[!-9;-~]{1,128}:[A-Za-z0-9+/]{86}==")
_LINE, _TEXT = 1000, 7000  # characters of a failure's message and hint, and of its reason

KINDS: Mapping[str, type[VzreproError]] = {
    each.__name__: each
    for each in (
        BuildFailed,
        HashMismatch,
        Interrupted,
        NotDeterministic,
        OutOfMemory,
        RemoteError,
        TimedOut,
        Untrusted,
        UsageError,
        VzreproError,
    )
}
"""The kinds of failures by their names; a plain VzreproError is trouble of the worker's own machine."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be built: the derivation, and with which inputs (the build key).

    `name`, `platform` are the derivation's own, for people and for placing it; the limits are the recipe's (seconds,
    bytes), None where it has none. `signature` is the client's.

    `turn` is 0 where it does not matter who builds it, or whether anybody does. Where several are to get the same, it
    counts them from 1: it is built whatever is there, by a worker that has none of the keys `apart_from`
    (`PublicKey.id`).

    With a `question` it is a rebuild for an audit, which says what of it is to be varied; it is built whatever is
    there, and answered with a report.
    """

    drv: DrvHash
    key: BuildKey
    name: str
    platform: str
    size: SizeClass = "small"
    timeout_secs: int | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    turn: int = 0
    apart_from: tuple[str, ...] = ()
    question: str | None = None
    signature: str | None = None

    @classmethod
    def of(
        cls, node: Node, key: BuildKey, *, turn: int = 0, apart_from: Sequence[str] = (), question: str | None = None
    ) -> Order:
        """The order for a node whose inputs are known."""
        return cls(
            drv=node.drv_hash,
            key=key,
            name=node.drv.name,
            platform=node.drv.platform or "",
            size=size_class(node),
            timeout_secs=node.timeout_secs,
            memory_bytes=node.memory_bytes,
            disk_bytes=node.disk_bytes,
            turn=turn,
            apart_from=tuple(apart_from),
            question=question,
        )

    @classmethod
    def parse(cls, document: object) -> Order:
        """Read an order. Raises UsageError when it is something else, or of another version."""
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, dict) else None
            raise UsageError(
                "this is not an order that this vzrepro understands",
                reason=f"wanted format {FORMAT}, found {str(found)[:40]}",
                hint="have the same vzrepro on clients and workers",
            )
        try:
            if set(document) != _FIELDS:
                raise ValueError("it has other fields")
            if document["size"] not in SIZES or not _PLATFORM.fullmatch(document["platform"]):
                raise ValueError("size or platform is unknown")
            limits = {name: _limit(document[name]) for name in ("timeout_secs", "memory_bytes", "disk_bytes")}
            turn, apart_from = document["turn"], document["apart_from"]
            if type(turn) is not int or not 0 <= turn <= MAX_BUILDERS:
                raise ValueError("its turn is none")
            if not isinstance(apart_from, list) or len(apart_from) > MAX_APART:
                raise ValueError("it names too many keys")
            if not all(_KEY_ID.fullmatch(each) for each in apart_from):
                raise ValueError("it names what is no key")
            question = document["question"]
            if question is not None and (turn or apart_from or not _QUESTION.fullmatch(question)):
                raise ValueError("its question is none")
            signature = document["signature"]
            if signature is not None and not _SIGNATURE.fullmatch(signature):
                raise ValueError("its signature is none")
            return cls(
                drv=DrvHash(document["drv"]),
                key=BuildKey(document["key"]),
                name=check_name(document["name"]),
                platform=document["platform"],
                size=document["size"],
                turn=turn,
                apart_from=tuple(apart_from),
                question=question,
                signature=signature,
                **limits,
            )
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise UsageError("this order is malformed", reason=str(error)[:200]) from error

    def document(self) -> dict[str, Any]:
        """The order as plain data."""
        return {
            "format": FORMAT,
            "drv": self.drv.hex,
            "key": self.key.hex,
            "name": self.name,
            "platform": self.platform,
            "size": self.size,
            "timeout_secs": self.timeout_secs,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "turn": self.turn,
            "apart_from": list(self.apart_from),
            "question": self.question,
            "signature": self.signature,
        }

    @property
    def id(self) -> str:
        """What makes two orders one build: the build key behind a name that people read, and which of several it is,
        or what an audit asks."""
        asked = "" if self.question is None else f"-audit-{hashlib.sha256(self.question.encode()).hexdigest()[:12]}"
        return f"{self.name}-{self.key}" + (f"-{self.turn}" if self.turn else asked)

    @property
    def longest_secs(self) -> int:
        """After which time the build is given up, whatever the recipe says: a day."""
        return min(self.timeout_secs or _LONGEST_SECS, _LONGEST_SECS)

    @property
    def most_secs(self) -> int:
        """How long it may take with what is varied in it: some of that makes a build slower."""
        return self.longest_secs * (1 if self.question is None else 2)

    def signed(self, key: SigningKey) -> Order:
        """The same, signed by who wants it."""
        return replace(self, signature=key.sign(self._message))

    def check_client(self, clients: TrustedKeys) -> None:
        """Raise Untrusted unless one of these keys has signed this order. The size may change on its way: a build that
        ran out of memory is tried once more on a larger machine."""
        clients.verify(self._message, () if self.signature is None else (self.signature,), f"the order for {self.name}")

    @property
    def _message(self) -> bytes:
        document = self.document()
        del document["signature"], document["size"]
        return canonical_json({"type": "vzrepro-order", **document})


_FIELDS = frozenset(Order(DrvHash("0" * 64), BuildKey("0" * 64), "x", "x/x").document())


@dataclass(frozen=True, slots=True)
class OrderAnswer:
    """What a worker says of a build that is done; the cache has the signed word for it. `outcome` as in `Outcome`.

    Of a rebuild for an audit `report` is the sha256 of what is signed (`livelog.report_key`), in hex, and `nar_hash`
    what it was compared with.
    """

    path: StorePath
    nar_hash: NarHash
    worker: str
    outcome: str
    report: str | None = None

    @classmethod
    def parse(cls, document: object) -> OrderAnswer:
        """Read an answer. Raises RemoteError when it is something else."""
        try:
            if not isinstance(document, dict) or document["format"] != FORMAT:
                raise ValueError("it is of another format")
            report = document.get("report")
            if report is not None and not _REPORT.fullmatch(report):
                raise ValueError("its report is none")
            return cls(
                StorePath.parse(_short(document["path"])),
                NarHash(document["nar_hash"]),
                worker_name(document["worker"]),
                _short(document["outcome"]),
                report,
            )
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise RemoteError("the farm's answer is malformed", reason=str(error)[:200]) from error

    def document(self) -> dict[str, Any]:
        """The answer as plain data."""
        return {
            "format": FORMAT,
            "path": str(self.path),
            "nar_hash": self.nar_hash.hex,
            "worker": self.worker,
            "outcome": self.outcome,
            "report": self.report,
        }


def size_class(node: Node) -> SizeClass:
    """How much of a machine a node's build takes."""
    large = (node.timeout_secs or 0) > _LARGE_SECS or (node.memory_bytes or 0) > _LARGE_BYTES
    return "large" if large else "small"


def worker_name(text: object) -> str:
    """`text` if it may name a worker, else UsageError."""
    if not isinstance(text, str) or not _WORKER.fullmatch(text):
        raise UsageError(
            f"{str(text)[:80]!r} is no name for a worker",
            hint="use 1 to 63 of A-Z a-z 0-9 . _ -, beginning with a letter or digit",
        )
    return text


def kind_of(error: BaseException) -> str:
    """The name under which a failure travels: the nearest of `KINDS`."""
    return next((each.__name__ for each in type(error).__mro__ if each.__name__ in KINDS), VzreproError.__name__)


def failure_document(error: BaseException, worker: str) -> dict[str, Any]:
    """What is told of a failure."""
    known = error if isinstance(error, VzreproError) else VzreproError(str(error) or type(error).__name__)
    return {
        "kind": kind_of(error),
        "message": known.message[:_LINE],
        "reason": known.reason[-_TEXT:] if known.reason else None,
        "hint": known.hint[:_LINE] if known.hint else None,
        "worker": worker,
    }


def failure_of(document: object) -> VzreproError:
    """The error that a document tells of; whatever it is, there is one."""
    if not isinstance(document, dict):
        return VzreproError("the build failed, and the farm does not say why")
    texts = {name: document.get(name) for name in ("message", "reason", "hint", "worker")}
    said = {name: text[:_TEXT] for name, text in texts.items() if isinstance(text, str)}
    kind = KINDS.get(str(document.get("kind")), VzreproError)
    by = f"{said['worker'][:63]}: " if "worker" in said else ""
    return kind(f"{by}{said.get('message', 'the build failed')}", reason=said.get("reason"), hint=said.get("hint"))


def _limit(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 0 < value < 1 << 53:
        raise ValueError("a limit is a positive number")
    return value


def _short(value: object) -> str:
    if not isinstance(value, str) or len(value) > 300:
        raise ValueError("it has too long a text")
    return value
