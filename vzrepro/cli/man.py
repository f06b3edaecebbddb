"""`vzrepro man`: the manual page, made from the help texts of all verbs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from vzrepro.base import version
from vzrepro.cli.options import DefaultVerb, json_option
from vzrepro.cli.session import Session


@click.command()
@json_option
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page of all verbs.

    To read it: vzrepro man | man -l -
    """
    session: Session = ctx.obj
    session.console.print_text("\n".join(page(ctx.find_root().command)))


def page(program: click.Command) -> Iterator[str]:
    """The lines of `program`'s page in man(7)'s language: what it does, and a section for each verb."""
    yield f'.TH VZREPRO 1 "" "vzrepro {_escaped(version.full())}"'
    about, *more = _paragraphs(program)
    yield from (".SH NAME", f"vzrepro \\- {about[:1].lower()}{about[1:].rstrip('.')}")
    yield from (".SH SYNOPSIS", ".B vzrepro", "[OPTIONS] COMMAND [ARGUMENTS]", ".SH DESCRIPTION")
    yield from _joined(more)
    yield ".SH OPTIONS"
    yield from _options(program, "vzrepro")
    yield ".SH COMMANDS"
    yield from _verbs(program, "vzrepro")


def _verbs(command: click.Command, path: str) -> Iterator[str]:
    if not isinstance(command, click.Group):
        return
    for name, verb in sorted(command.commands.items()):
        if isinstance(command, DefaultVerb) and name == command.default:
            continue  # its group stands for it
        below = f"{path} {name}"
        if not isinstance(verb, click.Group) or isinstance(verb, DefaultVerb):
            meant = verb.commands[verb.default] if isinstance(verb, DefaultVerb) else verb
            usage = " ".join(meant.collect_usage_pieces(click.Context(meant)))
            yield from (f".SS {_escaped(f'{below} {usage}')}", *_joined(_paragraphs(meant)))
            yield from _options(meant, below)
        yield from _verbs(verb, below)


def _options(command: click.Command, path: str) -> Iterator[str]:
    with click.Context(command, info_name=path) as context:
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if isinstance(parameter, click.Option) and record is not None:
                yield from (".TP", f".B {_escaped(record[0])}", _escaped(record[1]))


def _paragraphs(command: click.Command) -> list[str]:
    """Each paragraph of a command's help as one line."""
    return [_escaped(" ".join(text.split())) for text in re.split(r"\n\s*\n", (command.help or "").strip())]


def _joined(paragraphs: list[str]) -> Iterator[str]:
    for number, text in enumerate(paragraphs):
        yield from ((".PP", text) if number else (text,))


def _escaped(text: str) -> str:
    """`text` in man(7): ASCII, hyphens that can be copied, and no line that is taken for a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = "".join(each if each.isascii() else f"\\[u{ord(each):04X}]" for each in text)
    return f"\\&{text}" if text.startswith((".", "'")) else text
