"""`vzrepro verify`: is this what enough builders have signed that they got?"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from vzrepro.base import disk, words
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice
from vzrepro.base.model import DrvHash, StorePath
from vzrepro.base.signing import PublicKey, SigningKey
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session
from vzrepro.guest import metadata
from vzrepro.proof.attest import policy as policies
from vzrepro.proof.attest.ballots import Ballots, FoundEnvelope, read
from vzrepro.proof.attest.policy import Policy, PolicyMemory
from vzrepro.proof.attest.shelf import Shelf, gather
from vzrepro.proof.attest.verify import VerificationResult, VerifyRequest, statements_in, verify
from vzrepro.proof.attest.votes import SHORT, Vote
from vzrepro.proof.attest.vsa import Summary, summary_statement

_FILE = click.Path(path_type=Path, dir_okay=False)
_DIRECTORY = click.Path(path_type=Path, file_okay=False)


@dataclass(frozen=True, slots=True)
class _Rules:
    """The policy, and the file it is from: its name and bytes; None when there was none."""

    policy: Policy
    file: tuple[str, bytes] | None


@click.command("verify")
@click.argument("subject", metavar="BUNDLE-DIR|PATH")
@click.option("--policy", "policy_file", type=_FILE, help="Who may vote, and how many must agree (docs/policy.md).")
@click.option(
    "--threshold", type=click.IntRange(1), metavar="K", help="Without a policy: trusted keys that must agree."
)
@click.option("--key", "keys", multiple=True, metavar="NAME:BASE64", help="Without a policy: a key to trust instead.")
@click.option("--offline", type=_DIRECTORY, help="Take statements from the *.intoto.jsonl here, and ask no cache.")
@click.option("--against", "urls", multiple=True, metavar="URL", help="A cache to ask, instead of the configured ones.")
@click.option("--target", metavar="NAME", help="Of what a directory is a copy. [default: its profile's bundle]")
@click.option("--vsa", type=_FILE, help="Write a signed summary of how it ended to this file.")
@click.option("--sign-with", type=_FILE, metavar="KEYFILE", help="The secret key for --vsa.")
@json_option
@click.pass_obj
def verify_output(
    session: Session,
    subject: str,
    policy_file: Path | None,
    threshold: int | None,
    keys: tuple[str, ...],
    offline: Path | None,
    urls: tuple[str, ...],
    target: str | None,
    vsa: Path | None,
    sign_with: Path | None,
) -> None:
    """Check that enough builders have signed what is here. Every byte is compared; nothing is built.

    It is a bundle's directory, wherever it came from, or a target, a store path or an object's directory. What the
    builders have signed comes from the caches, from this store, and from *.intoto.jsonl files in the directory.
    """
    if (vsa is None) != (sign_with is None):
        raise UsageError("--vsa and --sign-with belong together", hint="--vsa FILE --sign-with KEYFILE")
    if offline is not None and urls:
        raise UsageError("--offline asks no cache", hint="leave out --against")
    signer = None if sign_with is None else SigningKey.load(sign_with)
    inside = not session.do_without_workspace()
    rules = _rules(session, inside, policy_file, threshold, keys)
    asked, ask_about = _asked(session, inside, subject, target, offline=offline is not None)

    def failed(url: str, error: VzreproError) -> None:
        session.warn(f"{url} could not be asked for statements: {error.message}")

    found: list[FoundEnvelope] = []
    if asked.bare:
        found += statements_in(asked.tree)
    if offline is not None:
        found += statements_in(offline)
    else:
        caches = [session.cache(url) for url in urls] if urls else session.shared_caches
        for drv_hash in ask_about:
            with session.long_work("check", words.plural(len(caches), "cache")):
                there = gather(drv_hash, Shelf(session.store), caches, failed)
            found += [FoundEnvelope(place, envelope) for envelope, places in there.items() for place in places]
    now = dt.datetime.now(dt.UTC)
    ballots = read(found, rules.policy)
    done = verify(asked, ballots, rules.policy, now)
    _show(session, done, ballots)
    if vsa is not None and signer is not None:
        _write_summary(vsa, done, rules, signer, now)
        session.console.report(Notice("info", f"the signed summary is in {vsa}"))
    if done.error is not None:
        raise done.error


# --- what is asked, and by what rules ---------------------------------------------------------------------------------


def _rules(session: Session, inside: bool, file: Path | None, threshold: int | None, keys: Sequence[str]) -> _Rules:
    if file is None:
        trusted = session.trusted
        chosen = [PublicKey.parse(text) for text in keys] if keys else trusted.keys
        needed = session.config.require_signatures if threshold is None else threshold
        return _Rules(Policy.of_keys(chosen, revoked=trusted.revoked, threshold=needed), None)
    if threshold is not None or keys:
        raise UsageError("the policy says whose votes count and how many it takes", hint="leave out --threshold, --key")
    return _Rules(*read_policy(session, inside, file))


def read_policy(session: Session, inside: bool, file: Path) -> tuple[Policy, tuple[str, bytes]]:
    """The policy in a file, and the file's name and bytes. Raises UsageError, Untrusted for an older version than was
    seen."""
    data = policies.read_file(file)
    policy = Policy.parse(data, str(file))
    config = session.config
    # The user's memory is that of all workspaces, the store's that of all who use it.
    memories = [config.key_dir.parent / "policy", *([config.store / disk.PRIVATE / "policy"] if inside else [])]
    try:
        PolicyMemory(*memories).admit(policy)
    except OSError as error:
        session.warn(f"that version {policy.version} of the policy was seen cannot be kept: {error}")
    revoked = session.trusted.revoked
    return policy.without(revoked, "it is one of this machine's revoked-keys"), (file.name, data)


def _asked(
    session: Session, inside: bool, subject: str, target: str | None, *, offline: bool
) -> tuple[VerifyRequest, list[DrvHash]]:
    """What is to be verified, and the derivations that caches are to be asked about."""
    directory = _directory(session, inside, subject)
    if directory is None:
        if target is not None:
            raise UsageError("--target is for a directory", reason=f"{subject} is an object of the store")
        asked = _object(session, subject)
        return asked, [] if asked.drv_hash is None else [asked.drv_hash]
    if not directory.is_dir():
        raise UsageError(f"{subject} is not a directory", hint="name a bundle's directory, a target or a store path")
    try:
        wanted = target or f"{metadata.read(directory).kind}-bundle"
    except UsageError as error:
        raise UsageError(
            f"it is not known of what {subject} is a copy",
            reason=error.in_a_line,
            hint="say so: --target NAME",
        ) from error
    name, ask_about = wanted, []
    if inside and not offline and wanted in session.graph.targets:
        node = session.graph.targets[wanted]
        name, ask_about = node.path.name, [node.drv_hash]
    return VerifyRequest(subject, wanted, name, directory, bare=True), ask_about


def _directory(session: Session, inside: bool, subject: str) -> Path | None:
    """The directory that is meant, None for an object of the store."""
    place = Path(subject)
    if not inside:
        return place
    if subject.startswith("/nix/store/") or place.resolve().parent == session.store.root.resolve():
        return None
    if os.sep in subject or subject in (".", ".."):
        return place
    named = subject in session.graph.targets or _is_store_name(subject)
    return place if place.is_dir() and not named else None


def _is_store_name(text: str) -> bool:
    try:
        StorePath.parse(text)
    except UsageError:
        return False
    return True


def _object(session: Session, subject: str) -> VerifyRequest:
    # An out-link is named by its own name, the object by the one that it leads to.
    name = subject if subject in session.graph.targets else str(Path(subject).resolve().name)
    path = session.path(name)
    info = session.store.query(path)
    node = session.graph.at(path.base)
    if info is None:
        raise UsageError(
            f"{path.base} is not in the store",
            hint=f"take it from a cache: vzrepro cache pull {path.name if node is None else node.target}",
        )
    drv_hash = info.drv_hash if node is None else node.drv_hash
    if drv_hash is None:
        raise UsageError(f"it is not known which derivation {path.base} came from", reason="nobody has recorded it")
    target = path.name if node is None else node.target
    return VerifyRequest(subject, target, path.name, session.store.location(path), drv_hash)


# --- what came of it --------------------------------------------------------------------------------------------------


def _show(session: Session, done: VerificationResult, ballots: Ballots) -> None:
    void = {} if done.tally is None else {each.operator for each in done.tally.void}
    rows: list[tuple[str, str | None, str | None, str | None, str, str]] = []
    for vote in ballots.votes:
        if done.tally is None or vote.drv_hash != done.tally.drv_hash:
            continue
        counts = "no: it has several results" if vote.operator in void else "yes"
        when = None if vote.when is None else vote.when.strftime("%Y-%m-%d %H:%M")
        result = vote.nar_hash.hex[:SHORT]
        rows.append((vote.operator, result, vote.kind.value, when, counts, ", ".join(vote.sources)))
    refused: dict[tuple[str, str], list[str]] = {}
    for each in ballots.refused:
        refused.setdefault((each.who, each.why), []).extend(each.sources)
    rows += [(who, None, None, None, f"no: {why}", ", ".join(places)) for (who, why), places in refused.items()]
    if rows:
        session.console.print_table(("operator", "result", "by", "when", "counts", "found in"), rows)
    if done.lost:
        session.warn(f"every file of {done.asked.shown} is right, and its modes are not those of what was built")
    if done.error is not None:
        text = f"{done.asked.shown}: FAILED"
    else:
        assert done.tally is not None
        assert done.decision is not None
        by = f"{', '.join(done.voters)} ({done.tally.needed} needed)"
        text = f"{done.asked.shown}: verified, {done.asked.target}, {done.decision.standing.nar_hash.nix}, by {by}"
        text += f"\nderivation {done.tally.drv_hash}"
        exception = done.decision.exception
        if exception is not None:
            text += f"\nby an exception until {exception.until:%Y-%m-%d}: {exception.reason}"
    session.console.print_text(text, done.document())


def _write_summary(file: Path, done: VerificationResult, rules: _Rules, signer: SigningKey, now: dt.datetime) -> None:
    counted = {vote.envelope for votes in _carrying(done) for vote in votes}
    exception = done.decision is not None and done.decision.exception is not None
    summary = Summary(
        resource=str(done.path or done.asked.name),
        passed=done.error is None,
        verified=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        levels=("VZREPRO_EXCEPTION" if exception else f"VZREPRO_BUILDERS_{len(done.voters)}",),
        policy=rules.file,
        inputs=tuple(done.ballots.envelopes[each] for each in sorted(counted)),
    )
    envelope = summary_statement(summary, done.subjects(), signer.public).signed(signer)
    try:
        disk.write_file(file, envelope + b"\n", durable=False)
    except OSError as error:
        raise VzreproError(f"the summary cannot be written to {file}", reason=error.strerror) from error


def _carrying(done: VerificationResult) -> list[tuple[Vote, ...]]:
    return [] if done.decision is None else list(done.decision.standing.voters.values())
