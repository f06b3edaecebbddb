"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


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


def signatures_option(function: F) -> F:
    """`--require-signatures`, which overrides the setting of that name."""
    text = "Trusted keys that must have signed what is taken."
    return click.option("--require-signatures", type=click.IntRange(1), help=text)(function)
