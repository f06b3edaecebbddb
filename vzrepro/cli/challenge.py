"""`vzrepro challenge`: who built what with which result, by what caches keep."""

from __future__ import annotations

import click

from vzrepro.base import words
from vzrepro.base.errors import UsageError
from vzrepro.base.signing import PublicKey
from vzrepro.cli.options import complete_targets, json_option
from vzrepro.cli.session import Session
from vzrepro.proof.attest.challenge import ResultState
from vzrepro.proof.attest.challenge import challenge as compared
from vzrepro.proof.attest.signers import Keys
from vzrepro.proof.attest.votes import SHORT

_MADE = ("sandbox", "image")


@click.command()
@click.argument("target", shell_complete=complete_targets)
@click.argument("more", metavar="[URL...]", nargs=-1)
@click.option(
    "--against", "first", multiple=True, metavar="URL", help="A cache to compare; by default those configured."
)
@click.option("--key", "keys", multiple=True, metavar="NAME:BASE64", help="A key to know besides the configured ones.")
@json_option
@click.pass_obj
def challenge(
    session: Session, target: str, more: tuple[str, ...], first: tuple[str, ...], keys: tuple[str, ...]
) -> None:
    """Compare what builders say they got for TARGET; build nothing. All that it is built from is compared, too.

    Any number of caches: --against URL URL…. Exit code 104 when results differ, 105 when no cache answers.
    """
    if more and not first:
        raise UsageError(f"{more[0]} is one too many", hint=f"vzrepro challenge {target} --against {more[0]}")
    urls = list(dict.fromkeys((*first, *more)))
    caches = [session.cache(url) for url in urls] if urls else session.shared_caches
    if not caches:
        raise UsageError("there is no cache to compare", hint="name some: --against URL URL…")
    nodes = [node for node in session.graph.closure([session.target(target)]) if node.drv.builder in _MADE]
    own = () if session.upload_key is None else (session.upload_key.public,)
    known = Keys(own, (*session.trusted.keys, *map(PublicKey.parse, keys)), session.trusted.revoked)
    have = session.store.query_many(node.path for node in nodes)
    ours = {str(path): info for path, info in have.items()}
    with session.long_work("check", words.plural(len(caches), "cache")) as work:
        found = compared(nodes, caches, known, ours, lambda node: work.line(node.target))
    rows = [
        (
            row.node,
            row.builder,
            " ".join(each.hex[:SHORT] for each in row.results) or None,
            row.state.value,
            " ".join(row.ways) or None,
            " ".join(row.places) or None,
        )
        for row in found.rows
    ]
    rows += [("-", "-", None, "unreachable", why, url) for url, why in found.silent.items()]
    session.console.print_table(("node", "builder", "result", "state", "by", "found in"), rows)
    for url, why in found.silent.items():
        session.warn(f"{url} does not answer: {why}")
    for row in found.rows:
        if row.state is ResultState.FORGED:
            session.warn(f"{row.node}: {row.builder}, in {', '.join(row.places)}: this is nobody's result")
    counts = {"nodes": len(nodes), "different": len(found.splits), "caches": len(caches) - len(found.silent)}
    asked = f"{words.plural(counts['nodes'], 'node')} in {words.plural(counts['caches'], 'cache')}"
    text = f"{asked} compared, different: {counts['different']}"
    document = {**counts, "splits": [each.document() for each in found.splits], "silent": dict(found.silent)}
    session.console.print_text(text, document)
    found.check(target)
