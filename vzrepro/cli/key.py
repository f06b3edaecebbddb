"""`vzrepro key …`: the keys that sign what is pushed to a shared cache."""

from __future__ import annotations

from pathlib import Path

import click

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.events import Notice
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session
from vzrepro.cli.verbs import Verbs


@click.group(cls=Verbs)
def key() -> None:
    """Make and show ed25519 keys, in the form that Nix uses too."""


@key.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new file for the secret key.")
@json_option
@click.pass_obj
def generate(session: Session, name: str, out: Path) -> None:
    """Make a key called NAME and print its public half. Its secret half is written to a new file (mode 0600).

    NAME goes into every signature: say whose key it is, and number it, such as team-1.
    """
    from vzrepro.base.signing import SigningKey

    made = SigningKey.generate(name)
    try:
        saved = made.save(out)
    except OSError as error:
        raise VzreproError(f"the key file {out} cannot be written", reason=error.strerror) from error
    if not saved:
        raise UsageError(
            f"{out} is there already", reason="a key that is lost cannot be made again", hint="name another"
        )
    session.console.report(Notice("info", f"secret key: {out} (mode 0600); the public key follows, for trusted-keys"))
    session.console.print_text(str(made.public), {"public": str(made.public), "id": made.public.id, "file": str(out)})


@key.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def public(session: Session, file: Path) -> None:
    """Print the public half of the secret key in FILE."""
    from vzrepro.base.signing import SigningKey

    found = SigningKey.load(file).public
    session.console.print_text(str(found), {"public": str(found), "id": found.id})
