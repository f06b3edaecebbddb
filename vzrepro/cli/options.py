"""Options that several verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from vzrepro.base.errors import UsageError
from vzrepro.cli.verbs import Verbs

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from vzrepro.cli.session import Session

F = TypeVar("F", bound=Callable[..., Any])


class DefaultVerb(Verbs):
    """A group that does something itself, too: `attest TARGET` is its verb `default`, whose name need not be said."""

    def __init__(self, *args: Any, default: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb's name before what is none; only help is the group's own."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The verbs, and what the default verb takes."""
        meant = self.commands[self.default]
        found = super().shell_complete(ctx, incomplete) + click.Command.shell_complete(meant, ctx, incomplete)
        argument = next((each for each in meant.params if isinstance(each, click.Argument)), None)
        found += argument.shell_complete(ctx, incomplete) if argument else []
        return list({each.value: each for each in found}.values())

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default verb's, which is the one that is meant."""
        words = self.commands[self.default].collect_usage_pieces(ctx)
        formatter.write_usage(ctx.command_path, " ".join(words))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The default verb's options, and the verbs."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def complete_targets(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The targets that begin so; files, where it is a path (`shell_complete` of an argument that names targets)."""
    from click.shell_completion import CompletionItem

    if incomplete.startswith(("/", ".", "~")):
        return [CompletionItem(incomplete, type="file")]
    return [CompletionItem(name) for name in _names(ctx) if name.startswith(incomplete)]


def complete_pins(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The pins of sources and images that begin so."""
    from click.shell_completion import CompletionItem

    kinds = ("source-", "image-")
    pins = {name.removeprefix(kind) for kind in kinds for name in _names(ctx) if name.startswith(kind)}
    return [CompletionItem(name) for name in sorted(pins) if name.startswith(incomplete)]


def _names(ctx: click.Context) -> list[str]:
    session: Session = ctx.obj
    # While a shell asks, no command runs, also not the one that looks at -C.
    session.start = Path(ctx.find_root().params["directory"])
    return session.names()


def json_option(function: F) -> F:
    """`--json`, which `cli.main` has already acted upon when the verb runs."""
    return click.option(
        "--json", is_flag=True, expose_value=False, help="Print one JSON object per line (docs/events.md)."
    )(function)


def cache_option(function: F) -> F:
    """`--cache URL`, which `Session.chosen_cache` completes."""
    return click.option("--cache", "url", metavar="URL", help="The cache; by default the one that is pushed to.")(
        function
    )


def host_loopback_option(function: F) -> F:
    """`--host-loopback`, for what boots a guest."""
    text = "Let the guest reach what listens at the host's loopback, as 10.0.2.2."
    return click.option("--host-loopback", is_flag=True, help=text)(function)


def signatures_option(function: F) -> F:
    """`--require-signatures`, which overrides the setting of that name."""
    text = "Trusted keys that must have signed what is taken."
    return click.option("--require-signatures", type=click.IntRange(1), help=text)(function)


def variables(words: Sequence[str]) -> dict[str, str]:
    """What several `--env NAME[=VALUE]` mean: a name alone takes over our own variable, if there is one."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise UsageError(f"--env {word}: a variable has a name", hint="--env NAME=VALUE, or --env NAME")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found
