"""Proves a kernel's final `.config` against what was asked: fragment, forbidden symbols, capabilities, lists.

Runs inside the build sandbox before the kernel is compiled, with the standard library alone. Kconfig silently drops
or overrides what it cannot grant; here every such request is an error, and all of them are listed at once.

    check_config.py --config .config --source DIR --requirements requirements.json --out DIR

`DIR` of `--source` holds the fragment and the lists that the requirements name: what hardening recommends, what hosts
ask for. On success `--out` gets `capabilities.json` (sorted names of the proven capabilities); on failure nothing, exit
code 1.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SET = re.compile(r"CONFIG_(\w+)=(.*)")
_UNSET = re.compile(r"# CONFIG_(\w+) is not set")
_LISTED = re.compile(r"(\w+)=(\S+)(?:\s+exception:\s+(\S.*))?")


@dataclass(frozen=True)
class Request:
    """One line of a fragment: `symbol` (without CONFIG_) shall have `value` (`n` for "is not set")."""

    line: int
    symbol: str
    value: str


@dataclass(frozen=True)
class Listed:
    """One line of the list `file`. A non-empty `exception` says why this profile differs."""

    file: str
    line: int
    symbol: str
    value: str
    exception: str


@dataclass(frozen=True)
class Verdict:
    """`problems` is one line of text each; when it is empty, `capabilities` are proven. `scores` has for each list how
    many of its lines hold, and how many there are."""

    problems: tuple[str, ...]
    capabilities: tuple[str, ...]
    scores: dict[str, tuple[int, int]]


def parse_config(text: str) -> dict[str, str]:
    """The symbols of a final `.config`, without CONFIG_; strings keep their quotes; "is not set" is `n`."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := _SET.fullmatch(line):
            found[match[1]] = match[2]
        elif match := _UNSET.fullmatch(line):
            found[match[1]] = "n"
    return found


def parse_fragment(name: str, text: str) -> tuple[list[Request], list[str]]:
    """The requests of the fragment `name`, and what is wrong with it: lines that are no request, repeated symbols."""
    requests: dict[str, Request] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.rstrip()
        if match := _SET.fullmatch(line):
            request = Request(number, match[1], match[2])
        elif match := _UNSET.fullmatch(line):
            request = Request(number, match[1], "n")
        elif not line or (line.startswith("#") and not re.match(r"#\s*CONFIG_", line)):
            continue
        else:
            problems.append(f"{name}:{number}: not a request: {line!r} (CONFIG_X=value or '# CONFIG_X is not set' are)")
            continue
        if earlier := requests.get(request.symbol):
            word = "repeats" if earlier.value == request.value else "contradicts"
            problems.append(
                f"{name}:{number}: CONFIG_{request.symbol}={request.value} {word} line {earlier.line}"
                f" (CONFIG_{earlier.symbol}={earlier.value})"
            )
        else:
            requests[request.symbol] = request
    return list(requests.values()), problems


def parse_list(name: str, text: str) -> tuple[list[Listed], list[str]]:
    """The list `name`: lines `SYMBOL=value`, or `SYMBOL=value  exception: why not`; and what is wrong with it."""
    wanted: dict[str, Listed] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LISTED.fullmatch(line)
        if match is None:
            problems.append(f"{name}:{number}: not a line of a list: {line!r} (SYMBOL=value [exception: why] is)")
        elif match[1] in wanted:
            problems.append(f"{name}:{number}: {match[1]} is already on line {wanted[match[1]].line}")
        else:
            wanted[match[1]] = Listed(name, number, match[1], match[2], match[3] or "")
    return list(wanted.values()), problems


def check(
    config: Mapping[str, str],
    requests: list[Request],
    listed: list[Listed],
    requirements: Mapping[str, Any],
) -> Verdict:
    """Compare `config` with everything asked for. `requirements` is what `capabilities.requirements` returns."""
    problems = [
        *_dropped_requests(config, requests, requirements["fragment"]),
        *(
            f"forbidden: CONFIG_{symbol}: wanted n, found {config[symbol]}"
            for symbol in requirements["forbidden"]
            if config.get(symbol, "n") != "n"
        ),
    ]
    proven = []
    for capability, symbols in sorted(requirements["capabilities"].items()):
        missing = [
            f"capability {capability}: CONFIG_{symbol}: wanted {wanted}, found {_found(config, symbol)}"
            for symbol, wanted in symbols.items()
            if config.get(symbol, "n") != wanted
        ]
        problems += missing
        if not missing:
            proven.append(capability)

    scores = dict.fromkeys(requirements["lists"], (0, 0))
    for line in listed:
        holds = config.get(line.symbol, "n") == line.value
        if line.exception and holds:
            problems.append(f"{line.file}:{line.line}: CONFIG_{line.symbol}={line.value} holds: drop its exception")
        elif not line.exception and not holds:
            found = _found(config, line.symbol)
            problems.append(f"{line.file}:{line.line}: CONFIG_{line.symbol}: wanted {line.value}, found {found}")
        hold, lines = scores[line.file]
        scores[line.file] = hold + holds, lines + 1
    return Verdict(tuple(problems), tuple(proven), scores)


def _dropped_requests(config: Mapping[str, str], requests: list[Request], fragment: str) -> Iterator[str]:
    for request in requests:
        if config.get(request.symbol, "n") == request.value:
            continue
        if request.symbol not in config:
            why = "no such symbol in this kernel, or a dependency is missing"
        elif request.value == "n":
            why = "another symbol selects it"
        else:
            why = "a dependency or another choice overrides it"
        yield (
            f"{fragment}:{request.line}: CONFIG_{request.symbol}: wanted {request.value},"
            f" found {_found(config, request.symbol)}: {why}"
        )


def _found(config: Mapping[str, str], symbol: str) -> str:
    return config.get(symbol, "n (absent)")


def main() -> int:
    """Check, write the reports, return the exit code."""
    parser = argparse.ArgumentParser(description="prove a kernel .config against its recipe")
    for option in ("--config", "--source", "--requirements", "--out"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args()

    requirements = json.loads(args.requirements.read_text(encoding="utf-8"))
    fragment = requirements["fragment"]
    requests, problems = parse_fragment(fragment, (args.source / fragment).read_text(encoding="utf-8"))
    listed: list[Listed] = []
    for name in requirements["lists"]:
        lines, wrong = parse_list(name, (args.source / name).read_text(encoding="utf-8"))
        listed += lines
        problems += wrong
    verdict = check(parse_config(args.config.read_text(encoding="utf-8")), requests, listed, requirements)

    problems += verdict.problems
    if problems:
        print(f"kernel profile {requirements['profile']}: {len(problems)} problem(s) in the final .config:")
        for problem in problems:
            print(f"  {problem}")
        return 1

    print(
        f"kernel profile {requirements['profile']}: {len(requests)} requests kept,"
        f" {len(requirements['forbidden'])} symbols absent, {len(verdict.capabilities)} capabilities proven"
        + "".join(f", {name} {hold}/{lines}" for name, (hold, lines) in verdict.scores.items())
    )
    _write(args.out / "capabilities.json", list(verdict.capabilities))
    return 0


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
