"""Whose word counts, and how many must agree: the policy file of a release, docs/policy.md.

A policy names operators (people or machines that build apart from each other), their keys and when each was theirs, how
many operators must have got the same result, and the few results that are taken for a stated reason and time although
they did not. Its version only ever rises: `PolicyMemory` refuses an older one, which somebody who keeps a lost key in
force would hand out.
"""

from __future__ import annotations

import datetime as dt
import fnmatch
import hashlib
import json
import os
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from vzrepro.base import disk
from vzrepro.base.errors import Untrusted, UsageError, first_fault
from vzrepro.base.model import FORMAT, NarHash, canonical_json
from vzrepro.base.signing import PublicKey

MAX_POLICY = 1 << 20
"""Bytes of the largest policy file that is read."""

_TURN_SECS = 0.02
_MAX_MEMORY = 4096
_DISTINCT = ("operator", "build-machine")
_WILD = re.compile(r"\[!?\]?[^\]]*\]|[*?]")


@dataclass(frozen=True, slots=True)
class OperatorKey:
    """A key and when it was its operator's: `since` ≤ time < `until`, None without an end. `revoked` says why it counts
    for nothing, whatever the time; None while it does. `machine` is the name of the build machine that has it."""

    key: PublicKey
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    revoked: str | None = None
    machine: str | None = None

    def refusal(self, when: dt.datetime | None) -> str | None:
        """Why a statement of this time by this key does not count; None when it does. One that tells no time counts
        where the key has neither beginning nor end."""
        if self.revoked is not None:
            return f"the key {self.key.name} is revoked: {self.revoked}"
        if when is None:
            bounded = self.since is not None or self.until is not None
            return f"the key {self.key.name} has its time, and this does not say when it was" if bounded else None
        if self.since is not None and when < self.since:
            return f"the key {self.key.name} counts from {_rfc3339(self.since)}, and this is of {_rfc3339(when)}"
        if self.until is not None and when >= self.until:
            return f"the key {self.key.name} counted until {_rfc3339(self.until)}, and this is of {_rfc3339(when)}"
        return None


@dataclass(frozen=True, slots=True)
class Operator:
    """One who builds: however many keys, one voice."""

    name: str
    keys: tuple[OperatorKey, ...]


@dataclass(frozen=True, slots=True)
class Threshold:
    """How many operators must agree on the targets that the glob `target` matches."""

    target: str
    votes: int


@dataclass(frozen=True, slots=True)
class Exemption:
    """A result of one target that is taken until a date although too few have voted for it, or as many for another."""

    target: str
    accept: NarHash
    reason: str
    until: dt.datetime

    def holds(self, now: dt.datetime) -> bool:
        """Whether its time has not passed."""
        return now < self.until


@dataclass(frozen=True, slots=True)
class Policy:
    """Who may vote, and what it takes. `name` is what its versions are compared under. With `machines_differ`, votes
    from one build machine are one, whosever they are."""

    name: str
    version: int
    threshold: int
    operators: tuple[Operator, ...]
    thresholds: tuple[Threshold, ...] = ()
    exceptions: tuple[Exemption, ...] = ()
    machines_differ: bool = False

    @classmethod
    def parse(cls, data: bytes, place: str) -> Policy:
        """Read a policy; `place` is what errors call it. Raises UsageError naming it and what is wrong with it."""
        if len(data) > MAX_POLICY:
            raise _wrong(place, f"it is larger than {MAX_POLICY} bytes")
        try:
            document = _File.model_validate(tomllib.loads(data.decode()))
        except ValidationError as error:
            raise _wrong(place, first_fault(error)) from error
        except (ValueError, RecursionError) as error:
            raise _wrong(place, f"it is not TOML: {error}") from error
        return _checked(document, place)

    @classmethod
    def of_keys(cls, keys: Iterable[PublicKey], *, revoked: Iterable[PublicKey] = (), threshold: int) -> Policy:
        """What holds without a file: each trusted key is an operator of its own, called like the key.

        Keys of one name stay apart, and one key under two names is one operator. Raises UsageError when there are fewer
        keys than must agree.
        """
        gone = {key.raw for key in revoked}
        found: dict[bytes, PublicKey] = {}
        for key in keys:
            if key.raw not in gone:
                found.setdefault(key.raw, key)
        names = Counter(key.name for key in found.values())
        operators = tuple(
            Operator(key.name if names[key.name] == 1 else f"{key.name} ({key.id})", (OperatorKey(key),))
            for key in found.values()
        )
        if len(operators) < threshold:
            raise UsageError(
                f"too few builders are known: {threshold} must agree, known: {len(operators)}",
                reason="without a policy, each trusted key is one builder",
                hint="name them: --key NAME:BASE64, trusted-keys in the configuration, or --policy FILE",
            )
        return cls("", 0, threshold, operators)

    @property
    def keys(self) -> tuple[PublicKey, ...]:
        """All keys that are named, those that are revoked or out of date as well."""
        return tuple(each.key for operator in self.operators for each in operator.keys)

    def owner(self, key: PublicKey) -> tuple[Operator, OperatorKey] | None:
        """Whose key these bytes are, whatever it is called; None when nobody's."""
        for operator in self.operators:
            for each in operator.keys:
                if each.key.raw == key.raw:
                    return operator, each
        return None

    def votes_for(self, target: str) -> int:
        """How many operators must agree on this target.

        Of the globs that match it the most specific one says so: no wildcard before any, then the one with more plain
        characters, then the one that asks for more.
        """
        fitting = [each for each in self.thresholds if fnmatch.fnmatchcase(target, each.target)]
        if not fitting:
            return self.threshold
        return max(fitting, key=lambda each: (*_specificity(each.target), each.votes)).votes

    def beside(self, keys: Iterable[PublicKey]) -> tuple[PublicKey, ...]:
        """The keys whose votes would add nothing to those by `keys`: these, the other ones of their operators and,
        where machines must differ, those on their machines."""
        taken = {key.raw for key in keys}
        operators = [operator for operator in self.operators if any(each.key.raw in taken for each in operator.keys)]
        known = [each for operator in self.operators for each in operator.keys]
        machines = {each.machine for each in known if each.key.raw in taken} if self.machines_differ else set()
        return tuple(
            each.key
            for operator in self.operators
            for each in operator.keys
            if each.revoked is None and (operator in operators or each.machine in machines - {None})
        )

    def exceptions_for(self, target: str) -> tuple[Exemption, ...]:
        """The exceptions of this target, expired ones as well."""
        return tuple(each for each in self.exceptions if each.target == target)

    def without(self, keys: Iterable[PublicKey], why: str) -> Policy:
        """The same policy with these keys revoked, whosever they are."""
        gone = {key.raw for key in keys}

        def judged(each: OperatorKey) -> OperatorKey:
            return replace(each, revoked=why) if each.key.raw in gone and each.revoked is None else each

        operators = tuple(replace(each, keys=tuple(map(judged, each.keys))) for each in self.operators)
        return replace(self, operators=operators)

    @property
    def digest(self) -> str:
        """The sha256, in hex, of what the policy says: comments and the order of its tables do not count."""
        document = {
            "name": self.name,
            "version": self.version,
            "threshold": self.threshold,
            "operators": sorted((_operator_document(each) for each in self.operators), key=lambda each: each["name"]),
            "thresholds": {each.target: each.votes for each in self.thresholds},
            "exceptions": sorted(
                [each.target, each.accept.hex, each.reason, _rfc3339(each.until)] for each in self.exceptions
            ),
        }
        if self.machines_differ:
            document["distinct"] = list(_DISTINCT)
        return hashlib.sha256(canonical_json(document)).hexdigest()


def read_file(path: Path) -> bytes:
    """The bytes of a policy file, for `Policy.parse`. Raises UsageError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_POLICY + 1)
    except OSError as error:
        raise UsageError(f"cannot read the policy {path}", reason=error.strerror) from error


class PolicyMemory:
    """The highest version of each policy that was seen on this machine, a file each in every one of `directories`."""

    def __init__(self, *directories: Path) -> None:
        self._directories = directories

    def admit(self, policy: Policy) -> None:
        """Remember the policy, or raise Untrusted: an older version than one that was seen, or the same version with
        other content. What one directory knows is enough for that; what is there and cannot be read is, too.

        Raises OSError when it can be remembered nowhere.
        """
        files = [directory / f"{policy.name}.json" for directory in self._directories]
        _compare(policy, files)
        failed = []
        for file in files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with _turn(file.parent):
                    seen = _remembered(file)
                    _compare(policy, [file])
                    if seen is None or policy.version > seen[0]:
                        document = {"format": FORMAT, "version": policy.version, "sha256": policy.digest}
                        disk.write_file(file, canonical_json(document) + b"\n")
            except OSError as error:
                failed.append(error)
        if len(failed) == len(files):
            raise failed[0]


def _compare(policy: Policy, files: Sequence[Path]) -> None:
    known = [(seen, file) for file in files if (seen := _remembered(file)) is not None]
    if not known:
        return
    version = max(seen[0] for seen, _ in known)
    forget = f"rm {' '.join(str(file) for _, file in known)}"
    if policy.version < version:
        raise Untrusted(
            f"version {policy.version} of the policy {policy.name} is an old one",
            reason=f"version {version} was seen on this machine; an old one may have keys that are revoked since",
            hint=f"get version {version} or a later one; if going back is meant, forget what was seen: {forget}",
        )
    if policy.version == version and any(seen[0] == version and seen[1] != policy.digest for seen, _ in known):
        raise Untrusted(
            f"there are two policies {policy.name} of version {version}",
            reason="one with other content was seen on this machine",
            hint=f"whoever changes a policy raises its version; if this one is right, forget the other: {forget}",
        )


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    while (fd := disk.try_lock(directory, create=False)) is None:
        time.sleep(_TURN_SECS)
    try:
        yield
    finally:
        os.close(fd)


def _remembered(file: Path) -> tuple[int, str] | None:
    """Version and digest. Raises Untrusted when something is there and is not that: it may be a newer version."""
    try:
        with file.open("rb") as opened:
            document = json.loads(opened.read(_MAX_MEMORY))
        version, digest = document["version"], document["sha256"]
        if type(version) is not int or not isinstance(digest, str):
            raise TypeError("a value of another type")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Untrusted(
            f"{file} cannot be read" if isinstance(error, OSError) else f"{file} is damaged",
            reason="it remembers which version of the policy was seen last",
            hint=f"make sure that your policy is the newest one, then: rm {file}",
        ) from error
    return version, digest


# --- the file ---------------------------------------------------------------------------------------------------------


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


_Text = Annotated[str, AfterValidator(_filled), Field(max_length=1000)]
_Votes = Annotated[int, Field(strict=True, ge=1, le=1000)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Key(_Model):
    key: _Text
    since: Any = Field(None, alias="from")
    until: Any = None
    revoked: _Text | None = None
    machine: _Text | None = None


class _Operator(_Model):
    name: Annotated[str, Field(pattern=r"^[!-~]([ -~]{0,126}[!-~])?$")]
    keys: Annotated[list[_Key], Field(min_length=1)]


class _Threshold(_Model):
    target: _Text
    threshold: _Votes


class _Exemption(_Model):
    target: _Text
    accept: _Text
    reason: _Text
    until: Any


class _File(_Model):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    version: Annotated[int, Field(strict=True, ge=1, le=10**12)]
    threshold: _Votes
    distinct: list[Literal["operator", "build-machine"]] = ["operator"]
    operators: Annotated[list[_Operator], Field(min_length=1)]
    thresholds: list[_Threshold] = []
    exceptions: list[_Exemption] = []


def _checked(document: _File, place: str) -> Policy:
    """What the file says, once its parts agree with each other."""
    operators = tuple(
        Operator(each.name, tuple(_key(key, f"operator {each.name}", place) for key in each.keys))
        for each in document.operators
    )
    _refuse_twice((each.name for each in operators), "two operators are called {}", place)
    owners: dict[bytes, str] = {}
    for operator in operators:
        for each in operator.keys:
            other = owners.setdefault(each.key.raw, operator.name)
            if other != operator.name:
                raise _wrong(place, f"the key {each.key.name} belongs to two operators: {other} and {operator.name}")
        _refuse_twice(
            (each.key.id for each in operator.keys), f"operator {operator.name} has the key {{}} twice", place
        )
    thresholds = tuple(Threshold(each.target, each.threshold) for each in document.thresholds)
    _refuse_twice((each.target for each in thresholds), "there are two thresholds for {}", place)
    machines_differ = _machines_differ(document.distinct, operators, place)
    machines = {each.machine for operator in operators for each in operator.keys}
    for what, votes in (("threshold", document.threshold), *((each.target, each.votes) for each in thresholds)):
        if votes > len(operators):
            raise _wrong(place, f"{what}: {votes} operators must agree, and {len(operators)} are named")
        if machines_differ and votes > len(machines):
            raise _wrong(place, f"{what}: {votes} must agree on as many machines, and {len(machines)} are named")
    exceptions = tuple(_exemption(each, place) for each in document.exceptions)
    _refuse_twice((f"{each.target} {each.accept}" for each in exceptions), "there are two exceptions for {}", place)
    return Policy(
        document.name, document.version, document.threshold, operators, thresholds, exceptions, machines_differ
    )


def _machines_differ(distinct: Sequence[str], operators: Sequence[Operator], place: str) -> bool:
    """Whether machines must: then every key has one."""
    if "operator" not in distinct:
        raise _wrong(place, 'distinct: operators always are: ["operator"], or ["operator", "build-machine"]')
    if "build-machine" not in distinct:
        return False
    for operator in operators:
        for each in operator.keys:
            if each.machine is None and each.revoked is None:
                raise _wrong(place, f"operator {operator.name}: the key {each.key.name} has no machine")
    return True


def _key(document: _Key, where: str, place: str) -> OperatorKey:
    try:
        key = PublicKey.parse(document.key)
    except UsageError as error:
        raise _wrong(place, f"{where}: {error.message}: {error.reason or error.hint}") from error
    since, until = (
        None if value is None else _moment(value, f"{where}: {name}", place, end=name == "until")
        for name, value in (("from", document.since), ("until", document.until))
    )
    if since is not None and until is not None and since >= until:
        raise _wrong(place, f"{where}: the key {key.name} ends before it begins")
    return OperatorKey(key, since, until, document.revoked, document.machine)


def _exemption(document: _Exemption, place: str) -> Exemption:
    where = f"the exception for {document.target}"
    try:
        accept = NarHash.parse(document.accept)
    except ValueError as error:
        raise _wrong(place, f"{where}: accept: {error}") from error
    return Exemption(
        document.target, accept, document.reason, _moment(document.until, f"{where}: until", place, end=True)
    )


def _moment(value: object, where: str, place: str, *, end: bool) -> dt.datetime:
    """A date or a time in UTC. As an end, a date is the last day that counts."""
    if isinstance(value, dt.datetime):
        if value.tzinfo is None:
            raise _wrong(place, f"{where}: {value} has no time zone; write {value.isoformat()}Z, or a date alone")
    elif not isinstance(value, dt.date):
        raise _wrong(place, f"{where}: wanted a date, such as 2027-12-31, without quotes")
    try:
        if isinstance(value, dt.datetime):
            return value.astimezone(dt.UTC)
        return dt.datetime.combine(value, dt.time(), dt.UTC) + dt.timedelta(days=end)
    except OverflowError as error:
        raise _wrong(place, f"{where}: {value} is too far away") from error


def _refuse_twice(names: Iterable[str], message: str, place: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise _wrong(place, message.format(name))


def _wrong(place: str, reason: str) -> UsageError:
    return UsageError(
        f"{place} is not a policy that can be used", reason=reason, hint="its form is told in docs/policy.md"
    )


def _specificity(glob: str) -> tuple[bool, int]:
    return _WILD.search(glob) is None, len(_WILD.sub("", glob))


def _operator_document(operator: Operator) -> dict[str, Any]:
    keys = [
        [
            each.key.raw.hex(),
            *(None if when is None else _rfc3339(when) for when in (each.since, each.until)),
            each.revoked,
            *([] if each.machine is None else [each.machine]),
        ]
        for each in sorted(operator.keys, key=lambda each: each.key.raw)
    ]
    return {"name": operator.name, "keys": keys}


def _rfc3339(when: dt.datetime) -> str:
    return when.isoformat(timespec="auto").removesuffix("+00:00") + "Z"
