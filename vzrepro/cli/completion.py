"""`vzrepro completion SHELL`: what makes a shell complete verbs, options and targets, by click's own scripts."""

from __future__ import annotations

import click

from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete verbs, options and targets.

    bash and zsh: eval "$(vzrepro completion bash)"; fish: vzrepro completion fish | source
    """
    from click.shell_completion import get_completion_class

    session: Session = ctx.obj
    made = get_completion_class(shell)
    assert made is not None  # click has all three
    session.console.print_text(made(ctx.find_root().command, {}, "vzrepro", "_VZREPRO_COMPLETE").source())
