"""Rebuilds on other machines: the question that travels, the report that comes back signed, and both ends of it.

Whoever rebuilds has its own look at the sandbox with nothing varied, since what two machines see differs without any
axis. It signs the statement that everybody keeps (`statements`) and, for who asks, a report of the whole rebuild: an
envelope of REPORT_TYPE. An output that differs is put into the cache under a path of its own (`rebuilt_path`), so that
it can be compared here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from vzrepro import nar, sandbox
from vzrepro.base.errors import RemoteError, Untrusted, UsageError, first_fault
from vzrepro.base.model import (
    FORMAT,
    BuildKey,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    StorePath,
    canonical_json,
    store_path,
)
from vzrepro.base.signing import PublicKey, SigningKey
from vzrepro.cache.writer import CacheWriter
from vzrepro.proof.attest import dsse
from vzrepro.proof.audit import blame, changes
from vzrepro.proof.audit.axes import AXES, Axis
from vzrepro.proof.audit.blame import Ending
from vzrepro.proof.audit.changes import World
from vzrepro.proof.audit.observed import Observed
from vzrepro.proof.audit.rebuild import Compare, Rebuilder, memory_directory
from vzrepro.proof.audit.records import RebuildRequest, Record
from vzrepro.proof.audit.report import builder
from vzrepro.proof.audit.statements import StatementSigner
from vzrepro.realize.realizer import Realizer
from vzrepro.recipe.graph import Node
from vzrepro.recipe.plan import Step
from vzrepro.sandbox import Runtime

REPORT_TYPE = "application/vnd.vzrepro.rebuild+json"
"""The payload type of a signed report."""

MAX_REPORT = dsse.MAX_ENVELOPE
"""Bytes of the largest report that is read."""

_QUESTION = re.compile(r"([a-z0-9:,-]*)/([a-z0-9:,-]*)/(\d{1,4})/(\d{1,4})/([01])")


def question_of(asked: RebuildRequest) -> str:
    """What of a rebuild is asked, in a line: `AXES/HELD/ROUND/ATTEMPT/BUILDS`, each axis with its version. What it is
    compared with and who makes it are not: those are the answer's."""
    varied, held = (
        ",".join(f"{name}:{version}" for name, version in each.items()) for each in (asked.axes, asked.held)
    )
    return f"{varied}/{held}/{asked.round}/{asked.attempt}/{asked.builds:d}"


def asked_by(question: str, drv: DrvHash, key: BuildKey, registered: NarHash, builder: str) -> RebuildRequest:
    """The rebuild that a question asks for. Raises UsageError for none, and for axes that are others here."""
    match = _QUESTION.fullmatch(question)
    if match is None:
        raise UsageError("this is no question of an audit that this vzrepro understands", reason=question[:100])
    varied = _versions(match[1], {axis.name: axis.version for axis in AXES if axis.vary is not None})
    held = _versions(match[2], {axis.name: axis.version for axis in AXES if axis.hold is not None})
    count, attempt, builds = int(match[3]), int(match[4]), match[5] == "1"
    return RebuildRequest(drv.hex, key.hex, registered.hex, builder, varied, held, count, attempt, builds)


def _versions(text: str, known: Mapping[str, int]) -> dict[str, int]:
    """The axes of a question, each as it is known here. Raises UsageError for others."""
    found: dict[str, int] = {}
    for each in text.split(",") if text else []:
        name, _, version = each.partition(":")
        if name not in known or version != str(known[name]):
            raise UsageError(
                f"this vzrepro does not know the axis {each[:40]!r}",
                hint="have the same vzrepro on clients and workers",
            )
        found[name] = known[name]
    return found


def rebuilt_path(name: str, nar_hash: NarHash) -> StorePath:
    """The path of an output that differs, which no derivation has."""
    return store_path(DrvHash.of(b"rebuilt " + nar_hash.hex.encode()), f"rebuilt-{name}")


# --- who rebuilds -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Rebuilding:
    """Rebuilds for others, signing with `key`: on `runtime`, with `cores` for each. `tools` gives the directory of
    audit-tools, made when it is first needed; `warn` is told of what does not end a rebuild."""

    key: SigningKey
    runtime: Runtime
    cores: int
    tools: Callable[[], Path | None]
    warn: Callable[[str], None]
    _looks: dict[DrvHash, Record] = field(default_factory=dict)

    def rebuild(
        self,
        realizer: Realizer,
        cache: CacheWriter,
        node: Node,
        registered: ObjectInfo,
        question: str,
        *,
        say: Callable[[str], None],
        keep: Callable[[bytes | Path], str],
    ) -> str:
        """Rebuild a node whose inputs are in the realizer's store, and compare it with what is registered. `keep` puts
        something into the cache and returns its sha256; that of the report is returned.

        Raises as `Rebuilder.build`, HashMismatch for a corrupt input, UsageError for what this machine does not know.
        """
        inputs = realizer.graph.inputs(node)
        infos = realizer.store.query_many([each.path for each in inputs])
        build_key = node.drv.build_key({each.drv_hash: infos[each.path].nar_hash for each in inputs})
        asked = asked_by(question, node.drv_hash, build_key, registered.nar_hash, self.key.public.id)
        with realizer.store.scratch("engine") as scratch:
            sharing = sandbox.sharing_of(scratch, self.runtime)
        with memory_directory() as in_memory:
            unmounted = None if sharing.mounts else sharing.reason
            world = World(self.runtime, self.tools(), self.cores, in_memory, unmounted)
            rebuilder = Rebuilder(realizer, world, {axis.name: axis for axis in AXES})
            log: list[str] = []

            def compare(tree: Path, _scratch: Path, _seen: Observed | None, _without: Observed | None) -> None:
                rebuilder.verify(node, list(infos.values()))
                found, size = nar.nar_hash(tree)
                cache.push(ObjectInfo(rebuilt_path(node.drv.name, found), found, size), tree)

            def made(request: RebuildRequest) -> Record:
                return rebuilder.build(
                    node, request, say=say, keep_log=lambda _, file: log.append(keep(file)), compare=compare
                )

            look = self._look(rebuilder, node, asked, made)
            excuse = next((why for name in asked.axes if (why := (look.excuses or {}).get(name))), None)
            if not asked.builds and not asked.axes:
                record = replace(look, asked=asked)
            elif excuse is not None:
                now = look.finished
                record = Record(asked, Ending.LOST, None, None, now, now, 0, f"not to be had there: {excuse}")
            else:
                record = made(asked)
            if record.ending is Ending.FAILED:
                rebuilder.verify(node, list(infos.values()))
        record = replace(record, without=look.observed)
        if asked.builds:
            described = builder(self.key.public, self.runtime, self.cores)
            signer = StatementSigner(realizer.store, self.key, described, rebuilder.axes, [cache], self.warn)
            record = replace(record, statement=signer.state(registered, look.observed, record))
        document = {
            "format": FORMAT,
            "record": _RECORD.dump_python(record, mode="json"),
            "log": log[0] if log else None,
        }
        return keep(dsse.sign(REPORT_TYPE, canonical_json(document), self.key))

    def _look(
        self, rebuilder: Rebuilder, node: Node, asked: RebuildRequest, made: Callable[[RebuildRequest], Record]
    ) -> Record:
        """What the sandbox is like here with nothing varied: seen once, and again whenever that is asked."""
        known = self._looks.get(node.drv_hash)
        asks = asked.experiment == blame.LOOK
        if known is None or asks:
            known = made(replace(asked, axes={}, held={}, round=0, attempt=0, builds=False))
            # By now its image is in the engine, and can be looked into.
            excuses = {axis.name: why for axis in AXES if axis.vary and (why := rebuilder.excuse(axis, node))}
            self._looks[node.drv_hash] = known = replace(known, excuses=excuses)
        return known


# --- who asks ---------------------------------------------------------------------------------------------------------

Place = Callable[[Node, Mapping[StorePath, ObjectInfo], str, Callable[[str], None]], bytes]
"""Has a node rebuilt as a question says, its inputs being registered as given; tells of lines; returns the report."""


@dataclass(frozen=True, slots=True)
class RemoteRebuilds:
    """Rebuilds that others make, `jobs` at once (`engine.Rebuilds`): believed is what one of `keys` has signed.

    `cache` is where all is; `supply` has nodes in it, `place` has one rebuilt, and `kept` gives what a worker has kept
    there, by its node and sha256. `tools` is a name that no other audit has: workers look anew for each.
    """

    realizer: Realizer
    cache: CacheWriter
    keys: Sequence[PublicKey]
    jobs: int
    supply: Callable[[Sequence[Node]], Mapping[StorePath, ObjectInfo]]
    place: Place
    kept: Callable[[Node, str], bytes | None]
    tools: str
    axes: Mapping[str, Axis] = field(default_factory=lambda: {axis.name: axis for axis in AXES})
    _infos: dict[StorePath, ObjectInfo] = field(default_factory=dict)

    def prepare(self, nodes: Sequence[Node]) -> Mapping[StorePath, ObjectInfo]:
        """Have them and what they are made from in the cache."""
        for node in nodes:
            if node.drv.builder != "sandbox":
                raise UsageError(f"{node.target} is not built in a sandbox", hint="--deep is for audits on one machine")
        needed = {each.path: each for node in nodes for each in (*self.realizer.graph.inputs(node), node)}
        self._infos.update(self.supply(list(needed.values())))
        return self._infos

    def excuse(self, axis: Axis, node: Node) -> str | None:
        """What the recipe says; what a machine does not have it says when it has looked."""
        if node.drv.platform != changes.PLATFORM:
            return (
                f"it builds for {node.drv.platform}, and the program that varies and observes is for {changes.PLATFORM}"
            )
        return None

    def verify(self, node: Node, infos: Sequence[ObjectInfo]) -> None:
        """Nothing: who rebuilds has done so."""

    def build(
        self,
        node: Node,
        asked: RebuildRequest,
        *,
        say: Callable[[str], None],
        keep_log: Callable[[str, Path], None],
        compare: Compare,
    ) -> Record:
        """Have it made, and check what comes back. Raises Untrusted for what no key of ours has signed, or of another
        question, RemoteError, Interrupted."""
        record, log = self._read(node, asked, self.place(node, self._infos, question_of(asked), say))
        with self.realizer.store.scratch(node.target, stop=self.realizer.stop) as scratch:
            if log is not None and (text := self.kept(node, log)) is not None and FileHash.of(text).hex == log:
                (scratch / "log").write_bytes(text)
                keep_log(record.asked.id, scratch / "log")
            if record.nar_hash is not None and record.nar_hash != asked.registered:
                self._fetch(node, NarHash(record.nar_hash), scratch / "rebuilt")
                explanation = compare(scratch / "rebuilt", scratch, record.observed, record.without)
                record = replace(record, explanation=explanation)
        return record

    def _fetch(self, node: Node, nar_hash: NarHash, place: Path) -> None:
        """Have what was registered in the store, and what was rebuilt at `place`."""
        self.realizer.perform(Step(node, "substitute", "to be compared"), {})
        path = rebuilt_path(node.drv.name, nar_hash)
        info = self.cache.reader.ask(path)
        if info is None or info.nar_hash != nar_hash:
            raise RemoteError(f"{self.cache.url} has no {path.base}, which differs from what is registered")
        self.cache.reader.fetch(info, place)

    def _read(self, node: Node, asked: RebuildRequest, data: bytes) -> tuple[Record, str | None]:
        """A report's record, as an answer to this question, and the sha256 of the log that was kept."""
        envelope = dsse.parse(data)
        signers = envelope.signers(self.keys)
        if envelope.payload_type != REPORT_TYPE or len(signers) != 1:
            raise Untrusted(
                f"what was found of {node.target} is not signed by a trusted key",
                hint="name the public keys of all workers in trusted-keys",
            )
        [key] = signers
        document = dsse.load_object(envelope.payload, "a report")
        try:
            record: Record = _RECORD.validate_json(json.dumps(document.get("record")))
        except ValidationError as error:
            raise Untrusted(f"{key.name}'s report of {node.target} is malformed", reason=first_fault(error)) from error
        log = document.get("log")
        expected = replace(asked, builder=key.id, tools=record.asked.tools)
        if document.get("format") != FORMAT or record.asked != expected or not isinstance(log, str | None):
            raise Untrusted(f"{key.name}'s report is of another rebuild than {node.target} was asked for")
        return replace(record, asked=replace(asked, builder=key.id), explanation=None), log


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)
