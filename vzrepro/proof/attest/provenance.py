"""SLSA provenance, version 1: what was built here, of what, and what came out (https://slsa.dev/spec/v1.0/provenance).

It is told only of what this machine has built itself: a substituted output is somebody else's word. A copy of an equal
object (early cutoff) that was built here counts as built: the same command was run on the same bytes. The inputs
are named with the content that was really fed in; that it is those is proved by the build key, which is computed from
them once more.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import vzrepro
from vzrepro.base.errors import VzreproError
from vzrepro.base.model import BuildKey, DrvHash, NarHash, ObjectInfo, Outcome, StorePath, canonical_json, store_path
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest.dsse import Malformed
from vzrepro.proof.attest.statement import NAR_DIGEST, Statement, Subject
from vzrepro.store import LocalStore

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"

BUILD_TYPE = "urn:vzrepro:build:v1"
"""What the parameters mean: docs/formats.md."""

UNSIGNED = "urn:vzrepro:unsigned"
"""The builder of provenance that nobody has signed."""


_MADE = (Outcome.BUILT, Outcome.COPIED)


class NotBuiltHere(VzreproError):
    """There is no provenance to tell of this object; the reason says why."""


@dataclass(frozen=True, slots=True)
class Material:
    """An input as it was fed in. `name` is where it was mounted, `/in/NAME`, or `image`; `file` is the sha256, in hex,
    of one that is a single downloaded file."""

    name: str
    path: StorePath
    drv_hash: DrvHash
    nar_hash: NarHash
    file: str | None = None

    def document(self) -> dict[str, Any]:
        """The input as an in-toto resource descriptor."""
        digest = {NAR_DIGEST: self.nar_hash.hex} | ({} if self.file is None else {"sha256": self.file})
        annotations = {"drvHash": self.drv_hash.hex, "input": self.name}
        return {"name": str(self.path), "digest": digest, "annotations": annotations}


@dataclass(frozen=True, slots=True)
class Build:
    """A build that was made here. `derivation` is the derivation's document, `target` the recipe's name; `started` and
    `finished` are seconds since 1970, None where that is not known."""

    target: str
    path: StorePath
    drv_hash: DrvHash
    build_key: BuildKey
    nar_hash: NarHash
    derivation: dict[str, Any]
    materials: tuple[Material, ...]
    started: int | None
    finished: int | None

    def statement(self, subjects: Sequence[Subject], builder: PublicKey | None) -> Statement:
        """The statement that `builder` is to sign; None: that nobody signs. `subjects` are those of the output
        (`statement.subjects_of`)."""
        asked = {name: self.derivation[name] for name in ("name", "version", "builder", "platform", "command", "env")}
        times = {"startedOn": self.started, "finishedOn": self.finished}
        predicate = {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "target": self.target,
                    **{name: value for name, value in asked.items() if value is not None},
                    "sourceDateEpoch": self.derivation["source_date_epoch"],
                },
                "internalParameters": {"drvHash": self.drv_hash.hex, "buildKey": self.build_key.hex},
                "resolvedDependencies": [each.document() for each in self.materials],
            },
            "runDetails": {
                "builder": {
                    "id": UNSIGNED if builder is None else builder_id(builder),
                    "version": {"vzrepro": vzrepro.__version__},
                },
                "metadata": {name: rfc3339(secs) for name, secs in times.items() if secs is not None},
            },
        }
        return Statement(tuple(subjects), PREDICATE_TYPE, predicate)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What matters of a provenance statement to who compares results. `finished` is RFC 3339, None if it is untold."""

    path: StorePath
    nar_hash: NarHash
    drv_hash: DrvHash
    build_key: BuildKey
    finished: str | None

    @classmethod
    def of(cls, statement: Statement) -> Provenance:
        """What a statement says. Raises Malformed when it is not the provenance of a build of ours, or names no output.

        Whether its builder is who signed it makes no difference: the key that signed it is.
        """
        if statement.predicate_type != PREDICATE_TYPE:
            raise Malformed("this is no provenance", reason=f"wanted {PREDICATE_TYPE}")
        output = statement.output
        if output is None:
            raise Malformed("this provenance is malformed", reason="it is not about one output")
        try:
            definition, metadata = statement.predicate["buildDefinition"], statement.predicate["runDetails"]["metadata"]
            if definition["buildType"] != BUILD_TYPE:
                raise ValueError(f"its build type is not {BUILD_TYPE}")
            inner, finished = definition["internalParameters"], metadata.get("finishedOn")
            drv_hash, build_key = DrvHash(inner["drvHash"]), BuildKey(inner["buildKey"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Malformed("this provenance is malformed", reason=str(error)) from error
        if store_path(drv_hash, output[0].name) != output[0]:
            raise Malformed("this provenance contradicts itself", reason="its subject is not its derivation's output")
        return cls(*output, drv_hash, build_key, finished if isinstance(finished, str) else None)


def builder_id(key: PublicKey) -> str:
    """How a builder is called in a statement: by the key that it signs with."""
    return f"urn:vzrepro:key:{key.id}"


def rfc3339(secs: int) -> str:
    """Seconds since 1970 as RFC 3339 in UTC."""
    return dt.datetime.fromtimestamp(secs, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def build_of(store: LocalStore, info: ObjectInfo) -> Build:
    """The build that made the valid object `info` here, as the store knows it.

    Raises NotBuiltHere: it came from elsewhere, its derivation or its inputs are not in the store any more, or they
    are not what it was built from.
    """
    if info.outcome not in _MADE or info.voucher is not None:
        raise NotBuiltHere(f"{info.path.name} was not built here", reason=_ORIGINS.get(info.outcome, "it is not known"))
    canonical = None if info.drv_hash is None else store.derivation(info.drv_hash)
    if info.drv_hash is None or info.build_key is None or canonical is None:
        raise NotBuiltHere(f"nothing is known of how {info.path.name} was built", reason="its derivation is not kept")
    derivation = json.loads(canonical)
    materials = _materials(store, info, derivation)
    target = store.target_of(info.drv_hash) or info.path.name
    started, finished = store.build_times(info.path, target)
    return Build(
        target=target,
        path=info.path,
        drv_hash=info.drv_hash,
        build_key=info.build_key,
        nar_hash=info.nar_hash,
        derivation=derivation,
        materials=materials,
        started=started,
        finished=finished,
    )


_ORIGINS = {
    Outcome.SUBSTITUTED: "it was taken from a cache",
    Outcome.COPIED: "it was copied from an object that came from elsewhere",
    Outcome.FETCHED: "it was downloaded, or is local files",
}


def _materials(store: LocalStore, info: ObjectInfo, derivation: dict[str, Any]) -> tuple[Material, ...]:
    """The image and the inputs, each with the content it has now, which is what it had then: the build key says so."""
    wanted = {} if derivation["image"] is None else {"image": derivation["image"]}
    wanted |= {f"/in/{name}": drv for name, drv in sorted(derivation["inputs"].items())}
    names: dict[str, StorePath] = {}
    files: dict[str, str | None] = {}
    for drv in set(wanted.values()):
        canonical = store.derivation(DrvHash(drv))
        if canonical is None:
            raise _gone(info)
        input_derivation = json.loads(canonical)
        names[drv] = store_path(DrvHash(drv), input_derivation["name"])
        is_file = input_derivation["builder"] == "fetch" and "git" not in input_derivation["env"]
        files[drv] = input_derivation["content"].get("") if is_file else None
    found = store.query_many(names.values())
    if len(found) < len(set(names.values())):
        raise _gone(info)
    fed = dict(derivation)
    fed["image"] = fed["image"] and found[names[fed["image"]]].nar_hash.hex
    fed["inputs"] = {name: found[names[drv]].nar_hash.hex for name, drv in derivation["inputs"].items()}
    if BuildKey.of(canonical_json(fed)) != info.build_key:
        raise NotBuiltHere(
            f"{info.path.name} was built from other inputs than those that are here now",
            reason="its build key is another one than theirs",
        )
    return tuple(
        Material(name, names[drv], DrvHash(drv), found[names[drv]].nar_hash, files[drv]) for name, drv in wanted.items()
    )


def _gone(info: ObjectInfo) -> NotBuiltHere:
    return NotBuiltHere(
        f"not all that {info.path.name} was built from is here any more",
        reason="so what was fed in cannot be named",
        hint=f"have it back: vzrepro realize {info.path.name}",
    )
