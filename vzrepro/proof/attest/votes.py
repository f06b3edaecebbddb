"""Counting who got what: of signed statements, which are votes, for which result, and whether enough agree.

A vote is one operator's word, by a key that a policy gives it, that it has built a derivation itself and what came out.
Signatures on narinfos are none: who copies an object signs it too. Counting is pure and does not depend on the order.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from vzrepro.base.errors import NotDeterministic, Untrusted
from vzrepro.base.model import BuildKey, DrvHash, NarHash, StorePath
from vzrepro.base.signing import PublicKey
from vzrepro.proof.attest.policy import Exemption, Policy

SHORT = 12
"""Hex digits of a hash that are shown to people."""


class VoteKind(StrEnum):
    """What kind of statement a vote is: of a build, or of a rebuild that an audit made."""

    PROVENANCE = "provenance"
    AUDIT = "audit"


@dataclass(frozen=True, slots=True)
class Vote:
    """One operator's word that building `drv_hash` gave `nar_hash`.

    `files` are the sha256 of the output's files in hex, by name and sorted, empty when it does not name them. `varied`
    says that the build was an experiment of an audit, its surroundings changed on purpose. `when` is what the builder's
    clock said in the end, if it is told, `sources` are the places where the statement was found, `envelope` the sha256
    of its envelope in hex, `machine` the build machine that the policy gives its key.
    """

    operator: str
    key: PublicKey
    kind: VoteKind
    path: StorePath
    drv_hash: DrvHash
    build_key: BuildKey | None
    nar_hash: NarHash
    files: tuple[tuple[str, str], ...]
    when: dt.datetime | None
    varied: bool
    sources: tuple[str, ...]
    envelope: str
    machine: str | None = None


@dataclass(frozen=True, slots=True)
class RefusedVote:
    """A statement that is no vote: who it is by, as far as that is known, and why it counts for nothing."""

    who: str
    why: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ResultStanding:
    """A result and the operators that got it, by name and sorted, each with the votes that say so. `weight` is how many
    of these are independent."""

    nar_hash: NarHash
    voters: Mapping[str, tuple[Vote, ...]]
    weight: int

    def files(self, needed: int) -> dict[str, str] | None:
        """The sha256 of each file by name, if `needed` operators say the same of them.

        A NAR hash settles what the files are, but who signs a right one can still name wrong files beside it.
        """
        lists: Counter[tuple[tuple[str, str], ...]] = Counter()
        for votes in self.voters.values():
            named = {vote.files for vote in votes if vote.files}
            if len(named) == 1:
                lists.update(named)
        agreed = [files for files, count in lists.items() if count >= needed]
        return dict(agreed[0]) if len(agreed) == 1 else None


@dataclass(frozen=True, slots=True)
class Contradiction:
    """An operator that votes for several results: none of its votes counts."""

    operator: str
    votes: tuple[Vote, ...]

    @property
    def results(self) -> tuple[NarHash, ...]:
        """The results that it votes for, sorted."""
        return tuple(sorted({vote.nar_hash for vote in self.votes}))


@dataclass(frozen=True, slots=True)
class Tally:
    """The count for one derivation: its results, those with most votes first, and what did not count."""

    target: str
    drv_hash: DrvHash
    needed: int
    standings: tuple[ResultStanding, ...]
    void: tuple[Contradiction, ...]

    @property
    def enough(self) -> tuple[ResultStanding, ...]:
        """The results that enough operators got."""
        return tuple(each for each in self.standings if each.weight >= self.needed)


@dataclass(frozen=True, slots=True)
class Decision:
    """The result that holds: `standing` with its voters, and the exception, if it holds by one."""

    standing: ResultStanding
    exception: Exemption | None = None


def count(votes: Iterable[Vote], policy: Policy, target: str, drv_hash: DrvHash) -> Tally:
    """Count the votes on one derivation; those on others are left out.

    An operator has one voice, however many keys and statements. What it built as the recipe says comes before its
    experiments: those count where it has nothing else, so that who looks for leaks does not contradict itself. Who then
    still has several results has none.
    """
    by_operator: defaultdict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.drv_hash == drv_hash:
            by_operator[vote.operator].append(vote)
    results: defaultdict[NarHash, dict[str, tuple[Vote, ...]]] = defaultdict(dict)
    void = []
    for operator, all_of_it in sorted(by_operator.items()):
        plain = [vote for vote in all_of_it if not vote.varied]
        its = tuple(sorted(plain or all_of_it, key=_order))
        hashes = {vote.nar_hash for vote in its}
        if len(hashes) == 1:
            results[its[0].nar_hash][operator] = its
        else:
            void.append(Contradiction(operator, its))
    standings = [
        ResultStanding(nar_hash, voters, _apart(voters) if policy.machines_differ else len(voters))
        for nar_hash, voters in results.items()
    ]
    standings.sort(key=lambda each: (-each.weight, -len(each.voters), each.nar_hash))
    return Tally(target, drv_hash, policy.votes_for(target), tuple(standings), tuple(void))


def _apart(voters: Mapping[str, tuple[Vote, ...]]) -> int:
    """How many of the operators can be given a machine of their own among those that they voted on: a matching, which
    grows along paths that lead from an operator without one to a machine that nobody has."""
    machines = {
        name: sorted({vote.machine for vote in votes if vote.machine is not None}) for name, votes in voters.items()
    }
    given: dict[str, str] = {}

    def gives(operator: str, tried: set[str]) -> bool:
        for machine in machines[operator]:
            if machine not in tried:
                tried.add(machine)
                if machine not in given or gives(given[machine], tried):
                    given[machine] = operator
                    return True
        return False

    return sum(gives(operator, set()) for operator in sorted(machines))


def unanimous(tally: Tally) -> ResultStanding | None:
    """The one result that there is; None when nobody has voted. Raises NotDeterministic when there are several."""
    if len(tally.standings) > 1 or tally.void:
        raise NotDeterministic(
            f"{tally.target} came out differently",
            reason="\n".join(_results(tally)),
            hint=f"find out why: vzrepro challenge {tally.target}, vzrepro audit {tally.target}",
        )
    return tally.standings[0] if tally.standings else None


def decide(tally: Tally, policy: Policy, now: dt.datetime) -> Decision:
    """The result that holds.

    Raises NotDeterministic when several results have enough votes, Untrusted when none has. In both cases an exception
    of the policy settles it, if it names one of the results, so one that somebody has voted for at least; where such an
    exception has expired, the error says so.
    """
    enough = tally.enough
    if len(enough) == 1:
        return Decision(enough[0])
    stood = {each.nar_hash: each for each in tally.standings}
    concerned = [each for each in policy.exceptions_for(tally.target) if each.accept in stood]
    holding = [each for each in concerned if each.holds(now)]
    if len(holding) == 1:
        return Decision(stood[holding[0].accept], holding[0])
    lines = _results(tally)
    if holding:
        lines.append("the policy has exceptions for several of these, so none of them holds")
    expired = [each for each in concerned if not each.holds(now)]
    lines += [f"the exception for {each.accept.hex[:SHORT]} expired on {each.until:%Y-%m-%d}" for each in expired]
    if enough:
        raise NotDeterministic(
            f"{tally.target} has {len(enough)} results with enough votes each, so none is taken",
            reason="\n".join(lines),
            hint=f"find out why: vzrepro challenge {tally.target}; if all are honest: vzrepro audit {tally.target}",
        )
    if expired and not holding:
        raise Untrusted(
            f"the exception for {tally.target} has expired, and too few operators agree: {tally.needed} must",
            reason="\n".join(lines),
            hint="have more operators build it, or renew the exception in a new version of the policy",
        )
    most = max((each.weight for each in tally.standings), default=0)
    raise Untrusted(
        f"{tally.target} has too few votes: {tally.needed} must agree, and {most} {'does' if most == 1 else 'do'}",
        reason="\n".join(lines) or "nobody who may vote has signed that it built this",
        hint=f"have another operator build it and push its statement: vzrepro realize {tally.target} --no-substitute",
    )


def _results(tally: Tally) -> list[str]:
    """A line for each result, and for each operator that has got several."""
    return [_told(each) for each in tally.standings] + [
        f"{each.operator} has got {len(each.results)} results, so its votes are void: "
        + ", ".join(result.hex[:SHORT] for result in each.results)
        for each in tally.void
    ]


def _told(standing: ResultStanding) -> str:
    return f"{standing.nar_hash.hex[:SHORT]} by {', '.join(standing.voters)}"


def _order(vote: Vote) -> tuple[str, str]:
    return vote.nar_hash.hex, vote.envelope
