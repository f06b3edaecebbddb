"""Groups of verbs: one that lists them with their whole summaries, and one that loads a verb when it is called."""

from __future__ import annotations

import importlib
from collections import UserDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Verbs(click.Group):
    """A group whose help tells each verb's first sentence whole, on two lines if need be; click cuts it off."""

    group_class = type  # groups made by a decorator of this group are of its class

    def summaries(self) -> Iterable[tuple[str, str]]:
        """Each verb's name and first sentence, by name."""
        return ((name, summary(command)) for name, command in sorted(self.commands.items()))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs, a definition each."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.summaries()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The verbs and the options that begin so."""
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=text) for name, text in self.summaries() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


def summary(command: click.Command) -> str:
    """The first sentence of what a command says of itself."""
    return command.get_short_help_str(limit=1000)


class Card(NamedTuple):
    """What is known of a verb before it is loaded: `module:name` of its command, and the command's `summary`."""

    place: str
    summary: str


class LazyVerbs(Verbs):
    """A group that imports a verb when it is called, and for its help and completion only reads `cards`."""

    def __init__(self, name: str | None = None, *, cards: Mapping[str, Card], **settings: Any) -> None:
        super().__init__(name, commands=_Loading(cards), **settings)
        self.cards = cards

    def summaries(self) -> Iterable[tuple[str, str]]:
        """Each verb's name and first sentence, by name."""
        return ((name, card.summary) for name, card in sorted(self.cards.items()))


class _Loading(UserDict[str, Any]):
    """Commands by name; a card becomes its command when it is first asked for."""

    def __getitem__(self, name: str) -> click.Command:
        if isinstance(self.data[name], Card):
            module, _, attribute = self.data[name].place.partition(":")
            self.data[name] = getattr(importlib.import_module(module), attribute)
        found: click.Command = self.data[name]
        return found
