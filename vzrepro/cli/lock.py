"""`vzrepro lock`: pin everything that recipes ask for. The only verb that talks to an index."""

from __future__ import annotations

import click

from vzrepro.base import disk, words
from vzrepro.base.errors import UsageError
from vzrepro.base.events import Notice
from vzrepro.cli.options import complete_pins, json_option
from vzrepro.cli.session import Session


@click.command()
@click.argument("names", nargs=-1, shell_complete=complete_pins)
@click.option(
    "--check", is_flag=True, help="Offline: compare lock.toml with the recipes, evaluate twice; exit 2 on a difference."
)
@click.option("--update", is_flag=True, help="Move the pins NAMES (all of them, if none is named) within their series.")
@click.option("--allow-expired", is_flag=True, help="Accept an index past its Valid-Until; signatures still count.")
@json_option
@click.pass_obj
def lock(session: Session, names: tuple[str, ...], check: bool, update: bool, allow_expired: bool) -> None:
    """Pin what recipes ask for and lock.toml lacks. Prints what changed, old → new."""
    if names and not update:
        raise UsageError("names only go with --update", hint=f"vzrepro lock --update {' '.join(names)}")
    if check:
        if update:
            raise UsageError("--check and --update exclude each other")
        _check(session)
        return
    from vzrepro.realize import pin
    from vzrepro.recipe.lock.writing import render

    previous = session.lock_file.read_text() if session.lock_file.is_file() else ""
    before = session.lock
    moving = (names or None) if update else ()
    pinner = session.pinner(moving, allow_expired=allow_expired)
    after = pinner.resolve(before)
    failure = pin.failure(pinner.unpinned)
    text = render(after, previous)
    if text != previous and (failure is None or after != before):
        disk.write_file(session.lock_file, text.encode())
    moves = pin.moves(before, after)
    if moves:
        session.console.print_table(("pin", "old", "new"), [(move.what, move.before, move.after) for move in moves])
    elif failure is None:
        session.console.report(Notice("info", "lock.toml is up to date"))
    if failure is not None:
        if after != before:
            session.console.report(Notice("info", "lock.toml has the other pins"))
        raise failure


def _check(session: Session) -> None:
    count, faults = session.check_lock()
    if faults:
        raise UsageError("lock.toml does not match the recipes", reason="\n    ".join(faults), hint="run: vzrepro lock")
    session.check_repeatable()
    session.console.report(Notice("info", f"lock.toml answers {words.plural(count, 'request')}"))
