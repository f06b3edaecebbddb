"""docs/events.md names every event, every field and every fixed value of vzrepro/base/events.py, and no other."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

from vzrepro.base import errors, events
from vzrepro.base.model import Outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "events.md"


def documented() -> dict[str, dict[str, str]]:
    """Kind → field → meaning, in the table's order."""
    kinds: dict[str, dict[str, str]] = {}
    for line in DOCUMENT.read_text().splitlines():
        row = re.fullmatch(r"\| (?:`(?P<kind>\w+)` )?\| (?:`(?P<field>\w+)` )?\| (?P<meaning>.+) \|", line)
        if row is None:
            continue
        if row["kind"]:
            fields = kinds.setdefault(row["kind"], {})
        elif row["field"]:
            fields[row["field"]] = row["meaning"]
    return kinds


def test_kinds_and_fields_are_those_of_the_code() -> None:
    coded = {kind.kind: [field.name for field in dataclasses.fields(kind)] for kind in typing.get_args(events.Event)}
    assert {kind: list(fields) for kind, fields in documented().items()} == coded


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([a-z-]+)`", text))


def test_fixed_values_are_those_of_the_code() -> None:
    kinds = documented()
    assert quoted(kinds["started"]["action"]) == set(typing.get_args(events.Action))
    assert quoted(kinds["finished"]["outcome"]) == {outcome.value for outcome in Outcome}
    assert quoted(kinds["notice"]["level"]) == set(typing.get_args(typing.get_type_hints(events.Notice)["level"]))


def test_exit_codes_are_those_of_the_code() -> None:
    kinds = [errors.VzreproError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    named = {int(code) for code in re.findall(r"\d+", documented()["error"]["exit_code"])}
    assert named == {kind.exit_code for kind in kinds if kind.__module__ == errors.__name__}
