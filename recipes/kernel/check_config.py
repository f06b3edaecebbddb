"""Proves a kernel's final `.config` against what was asked: fragment, forbidden symbols, capabilities, hardening.

Runs inside the build sandbox before the kernel is compiled, with the standard library alone. Kconfig silently drops
or overrides what it cannot grant; here every such request is an error, and all of them are listed at once.

    check_config.py --config .config --source DIR --requirements requirements.json --out DIR

`DIR` of `--source` holds the fragment and the hardening list that the requirements name. On success `--out` gets
`capabilities.json` (sorted names of the proven capabilities); on failure nothing, exit code 1.
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
_HARDENING = re.compile(r"(\w+)=(\S+)(?:\s+exception:\s+(\S.*))?")


@dataclass(frozen=True)
class Request:
    """One line of a fragment: `symbol` (without CONFIG_) shall have `value` (`n` for "is not set")."""

    line: int
    symbol: str
    value: str


@dataclass(frozen=True)
class Hardening:
    """One line of the hardening list. A non-empty `exception` says why this profile does without it."""

    line: int
    symbol: str
    value: str
    exception: str


@dataclass(frozen=True)
class Verdict:
    """`problems` is one line of text each; when it is empty, `capabilities` are proven and `hardening` is the score."""

    problems: tuple[str, ...]
    capabilities: tuple[str, ...]
    hardening: dict[str, object]


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


def parse_hardening(name: str, text: str) -> tuple[list[Hardening], list[str]]:
    """The hardening list `name`: lines `SYMBOL=value`, or `SYMBOL=value  exception: why not`; and what is wrong."""
    wanted: dict[str, Hardening] = {}
    problems: list[str] = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _HARDENING.fullmatch(line)
        if match is None:
            problems.append(f"{name}:{number}: not a hardening line: {line!r} (SYMBOL=value [exception: why] is)")
        elif match[1] in wanted:
            problems.append(f"{name}:{number}: {match[1]} is already on line {wanted[match[1]].line}")
        else:
            wanted[match[1]] = Hardening(number, match[1], match[2], match[3] or "")
    return list(wanted.values()), problems


def check(
    config: Mapping[str, str],
    requests: list[Request],
    hardening: list[Hardening],
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

    place = requirements["hardening"]
    exceptions = {}
    for line in hardening:
        holds = config.get(line.symbol, "n") == line.value
        if line.exception and holds:
            problems.append(f"{place}:{line.line}: CONFIG_{line.symbol}={line.value} holds: drop its exception")
        elif line.exception:
            exceptions[f"{line.symbol}={line.value}"] = line.exception
        elif not holds:
            found = _found(config, line.symbol)
            problems.append(f"{place}:{line.line}: CONFIG_{line.symbol}: wanted {line.value}, found {found}")
    score = {"checked": len(hardening), "hold": len(hardening) - len(exceptions), "exceptions": exceptions}
    return Verdict(tuple(problems), tuple(proven), score)


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
    fragment, hardening = requirements["fragment"], requirements["hardening"]
    requests, fragment_problems = parse_fragment(fragment, (args.source / fragment).read_text(encoding="utf-8"))
    wanted, hardening_problems = parse_hardening(hardening, (args.source / hardening).read_text(encoding="utf-8"))
    verdict = check(parse_config(args.config.read_text(encoding="utf-8")), requests, wanted, requirements)

    problems = [*fragment_problems, *hardening_problems, *verdict.problems]
    if problems:
        print(f"kernel profile {requirements['profile']}: {len(problems)} problem(s) in the final .config:")
        for problem in problems:
            print(f"  {problem}")
        return 1

    score = verdict.hardening
    print(
        f"kernel profile {requirements['profile']}: {len(requests)} requests kept,"
        f" {len(requirements['forbidden'])} symbols absent, {len(verdict.capabilities)} capabilities proven,"
        f" hardening {score['hold']}/{score['checked']}"
    )
    _write(args.out / "capabilities.json", list(verdict.capabilities))
    return 0


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
