"""`vzrepro attest …` and `vzrepro provenance`: sign what was built here, and see what others have signed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice, Started, working
from vzrepro.base.signing import SigningKey
from vzrepro.cache.places import is_writable
from vzrepro.cli.options import DefaultVerb, complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.proof.attest.dsse import parse
from vzrepro.proof.attest.provenance import NotBuiltHere, build_of
from vzrepro.proof.attest.review import ReviewedEnvelope, review
from vzrepro.proof.attest.signers import Keys, Signer, SignerStanding
from vzrepro.proof.attest.statement import Statement, subjects_of
from vzrepro.proof.attest.witness import attest as testify
from vzrepro.recipe.graph import Node

_PLACES = click.option("--cache", "url", metavar="URL", help="The cache to ask, instead of all that are configured.")


_BUILDERS = ("sandbox", "image")  # what else there is, is downloads and local files, which nobody builds


@click.group(cls=DefaultVerb, default="sign")
def attest() -> None:
    """Sign what was built here: vzrepro attest TARGET --key FILE. Show what is signed: vzrepro attest show TARGET."""


@attest.command()
@click.argument("targets", metavar="TARGET...", nargs=-1, required=True, shell_complete=complete_targets)
@click.option("--key", "file", type=click.Path(path_type=Path), required=True, help="The file of the secret key.")
@click.option("--to", "url", metavar="URL", help="Have the attestations in this cache as well.")
@json_option
@click.pass_obj
def sign(session: Session, targets: tuple[str, ...], file: Path, url: str | None) -> None:
    """Sign the provenance of what was built here. That is of TARGETs and all that they were made from.

    What was substituted is somebody else's to attest, and is skipped. The attestations are kept beside the
    store; signing again changes nothing.
    """
    key = SigningKey.load(file)
    if url is not None and not is_writable(url):
        raise UsageError(f"{url} cannot be written", hint="use s3://… or a directory; HTTP is for reading")
    place = None if url is None else session.writer(url, None)
    nodes = [
        node
        for node in session.graph.closure([session.target(name) for name in targets])
        if node.drv.builder in _BUILDERS
    ]
    session.store.hold([node.path for node in nodes])
    rows, skipped = [], 0
    for node in nodes:
        state, why, envelope = _signed(session, node, key)
        skipped += envelope is None
        if envelope is not None and place is not None:
            place.put_attestation(node.drv_hash, envelope)
        rows.append((node.target, state, why))
    session.console.print_table(("target", "state", "why"), rows)
    if skipped == len(rows):
        raise VzreproError(
            f"nothing of {', '.join(targets)} was built here, so there is nothing to sign",
            hint=f"build it again and sign what comes out: vzrepro audit {targets[0]} --quick --key {file}",
        )


def _signed(session: Session, node: Node, key: SigningKey) -> tuple[str, str | None, bytes | None]:
    """Sign one node's output: `signed`, `present` or `skipped`, why it was skipped, and the envelope."""
    info = session.store.query(node.path)
    if info is None:
        return "skipped", "it is not in the store", None
    with working(session.console.report, Started(node.target, str(node.path), "check")) as work:
        work.nar_size = info.nar_size
        try:
            made = testify(session.store, info, key)
        except NotBuiltHere as error:
            return "skipped", error.reason, None
    return "signed" if made.new else "present", None, made.envelope


@attest.command()
@click.argument("target", shell_complete=complete_targets)
@_PLACES
@json_option
@click.pass_obj
def show(session: Session, target: str, url: str | None) -> None:
    """Show what is attested of TARGET's output. That is who signed what, when, and whether it is the output we have.

    Looks beside the store and into the caches.
    """
    node = session.target(target)
    found = _reviewed(session, node, url)
    if not found:
        raise VzreproError(
            f"nobody has attested {node.target}",
            reason="there is nothing beside the store or in the caches",
            hint=f"vzrepro attest {node.target} --key FILE",
        )
    rows = [
        (
            seen.kind or "nothing",
            signer.name,
            signer.keyid,
            signer.standing.value,
            None if seen.result is None else seen.result.hex,
            _YES_NO[seen.agrees],
            seen.when,
            seen.wrong or seen.detail,
            " ".join(places),
            seen.sha256.hex,
        )
        for seen, _, places in found
        for signer in seen.signers or (Signer(None, "", SignerStanding.UNKNOWN),)
    ]
    session.console.print_table(_COLUMNS, rows)


_COLUMNS = ("kind", "by", "key", "standing", "result", "ours", "when", "detail", "where", "sha256")
_YES_NO = {True: "yes", False: "no", None: None}


@click.command()
@click.argument("target", shell_complete=complete_targets)
@_PLACES
@json_option
@click.pass_obj
def provenance(session: Session, target: str, url: str | None) -> None:
    """Print TARGET's provenance: of what it was made, and how. It is an in-toto statement with SLSA's predicate.

    The one that a key known here has signed; else, of what was built here, one that nobody has signed.
    """
    node = session.target(target)
    info = session.store.query(node.path)
    for seen, envelope, places in _reviewed(session, node, url):
        signer = next(
            (each for each in seen.signers if each.standing in (SignerStanding.OWN, SignerStanding.TRUSTED)), None
        )
        if seen.kind == "provenance" and seen.agrees is not False and signer is not None:
            session.console.report(Notice("info", f"signed by {signer.name}, found in {', '.join(places)}"))
            _print(session, Statement.of(parse(envelope)))
            return
    if info is None:
        raise VzreproError(
            f"{node.target} is not in the store, and no key that is known here has signed its provenance",
            hint=f"vzrepro realize {node.target}; who has signed it: vzrepro attest show {node.target}",
        )
    made = build_of(session.store, info)
    session.console.report(
        Notice("info", f"nobody known here has signed this; sign it: vzrepro attest {node.target} --key FILE")
    )
    _print(session, made.statement(subjects_of(info.path, info.nar_hash, session.store.location(info.path)), None))


def _print(session: Session, statement: Statement) -> None:
    document = statement.document()
    session.console.print_text(json.dumps(document, indent=2, ensure_ascii=False), document)


def _reviewed(session: Session, node: Node, url: str | None) -> list[tuple[ReviewedEnvelope, bytes, tuple[str, ...]]]:
    """What there is about a node's derivation, each with its envelope and its places: what agrees with our output and
    is signed by whom we know comes first."""
    info = session.store.query(node.path)
    keys = known_keys(session)
    envelopes = session.attestations(node.drv_hash, url)
    found = [(review(envelope, keys, info, node.path), envelope, places) for envelope, places in envelopes.items()]
    return sorted(found, key=lambda each: _order(each[0]))


def _order(seen: ReviewedEnvelope) -> tuple[Any, ...]:
    standing = min((_STANDINGS.index(each.standing) for each in seen.signers), default=len(_STANDINGS))
    return seen.kind != "provenance", seen.kind or "~", standing, seen.agrees is not True, seen.when or "", seen.sha256


_STANDINGS = list(SignerStanding)


def known_keys(session: Session) -> Keys:
    """The public keys that are known here: this machine's, the upload key, those that are trusted or revoked."""
    own = [key for cache in session.caches if cache.own for key in cache.access.trusted.keys]
    if session.upload_key is not None:
        own.append(session.upload_key.public)
    return Keys(tuple(own), session.trusted.keys, session.trusted.revoked)
