"""What a build saw before its command started, and what of it an axis is about.

The program that prints it is recipes/files/audit-tools/vary.c. The functions here give `Axis.seen` and
`Axis.differs`: text for people, None when it was not observed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

Observed = Mapping[str, str]
"""What a build saw: a name of recipes/files/audit-tools/vary.c → the value."""

ADDR_NO_RANDOMIZE = 0x0040000  # linux/personality.h

_PREFIX = "vzrepro-observed "
_DAY = 86400

# statfs(2), f_type
_FILE_SYSTEMS = {
    "1021994": "tmpfs",
    "ef53": "ext4",
    "9123683e": "btrfs",
    "58465342": "xfs",
    "2fc12fc1": "zfs",
    "794c7630": "overlayfs",
    "65735546": "fuse",
    "6a656a63": "virtiofs",
}


def parse(line: str) -> Observed | None:
    """What a line of a build's output says was observed; None for every other line."""
    if not line.startswith(_PREFIX):
        return None
    try:
        found = json.loads(line.removeprefix(_PREFIX))
    except (ValueError, RecursionError):  # a builder's own line that looks alike
        return None
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else None


def value(name: str) -> Callable[[Observed], str | None]:
    """One value as it is."""
    return lambda seen: seen.get(name)


def number(name: str) -> Callable[[Observed], str | None]:
    """One value, when it is a number."""
    return lambda seen: found if re.fullmatch("[0-9]{1,18}", found := seen.get(name, "")) else None


def text(template: str) -> Callable[[Observed], str | None]:
    """Values put into a template for `str.format`."""

    def text(seen: Observed) -> str | None:
        try:
            return template.format_map(seen)
        except KeyError:
            return None

    return text


def time_of_day(seen: Observed) -> str | None:
    """The time in UTC, RFC 3339 with nanoseconds."""
    if "time" not in seen:
        return None
    seconds, _, nanoseconds = seen["time"].partition(".")
    try:
        return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds}Z"
    except (ValueError, OverflowError, OSError):  # a builder's own line: see `parse`
        return None


def other_day(one: str, other: str) -> bool:
    """Whether two times are more than half a day apart."""
    days = [datetime.fromisoformat(text[:19]) for text in (one, other)]
    return abs((days[0] - days[1]).total_seconds()) > _DAY / 2


def addresses(seen: Observed) -> str | None:
    """Whether addresses are random, and one of them."""
    if "stack" not in seen or "personality" not in seen:
        return None
    try:
        fixed = int(seen["personality"], 16) & ADDR_NO_RANDOMIZE
    except ValueError:
        return None
    return f"{'fixed' if fixed else 'random'}, stack at {seen['stack']}"


def file_system_of(name: str, template: str) -> Callable[[Observed], str | None]:
    """Values put into a template, among them as `fs` the file system whose type is the value called `name`."""

    def text(seen: Observed) -> str | None:
        kind = seen.get(name)
        try:
            return kind and template.format_map({**seen, "fs": _FILE_SYSTEMS.get(kind, kind)})
        except KeyError:
            return None

    return text
