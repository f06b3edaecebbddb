"""Runs kernel-hardening-checker over a guest's kernel, command line and sysctls, and demands a reason for each failure.

    check.py --checker DIR --config FILE --command-line FILE --sysctl FILE… --reasons FILE --out FILE

`DIR` is the checker's source tree. `--out` gets the report: the score and each check with its result; a check that
fails carries the reason from `--reasons`. Exit code 1, and no report, when a failure has no reason, or a reason no
failure.
Runs inside the build sandbox with the standard library alone.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_REASON = re.compile(r"(kconfig|cmdline|sysctl) (\S+) = (.+?): (\S.*)")

Key = tuple[str, str, str]
"""A check: its type (`kconfig`, `cmdline` or `sysctl`), its option and the wanted value."""


def parse_reasons(name: str, text: str) -> tuple[dict[Key, str], list[str]]:
    """The reasons in the file `name`, lines `TYPE OPTION = WANTED VALUE: why not`; and what is wrong with it."""
    reasons: dict[Key, str] = {}
    problems = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _REASON.fullmatch(line)
        if match is None:
            problems.append(f"{name}:{number}: not a reason: {line!r} (TYPE OPTION = WANTED VALUE: why not is)")
        elif (match[1], match[2], match[3]) in reasons:
            problems.append(f"{name}:{number}: {match[2]} = {match[3]} has a reason already")
        else:
            reasons[match[1], match[2], match[3]] = match[4]
    return reasons, problems


def judge(results: Sequence[dict[str, Any]], reasons: dict[Key, str]) -> tuple[dict[str, Any], list[str]]:
    """The report of the checker's `results` (its JSON), and one line for each failure or reason that stands alone."""
    checks, problems, used = [], [], set()
    for result in results:
        key = (result["type"], result["option_name"], result["desired_val"])
        check = {
            "type": key[0],
            "option": key[1],
            "wanted": key[2],
            "result": result["check_result"],
            "holds": result["check_result_bool"],
        }
        if not result["check_result_bool"]:
            used.add(key)
            if key in reasons:
                check["reason"] = reasons[key]
            else:
                problems.append(f"{key[0]} {key[1]} = {key[2]}: {check['result']}, and no reason")
        checks.append(check)
    unused = reasons.keys() - used
    problems += [f"{kind} {option} = {wanted}: does not fail; drop its reason" for kind, option, wanted in unused]
    hold = sum(check["holds"] for check in checks)
    return {"checked": len(checks), "hold": hold, "fail": len(checks) - hold, "checks": checks}, sorted(problems)


def settings(texts: Sequence[str]) -> dict[str, str]:
    """The sysctls of files of lines `key = value`, comments left out. A later line wins."""
    lines = [line for text in texts for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _run(checker: Path, config: Path, command_line: Path, sysctls: dict[str, str]) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile("w", suffix=".sysctl") as file:
        file.writelines(f"{key} = {value}\n" for key, value in sysctls.items())
        file.flush()
        arguments = ["-m", "json", "-c", str(config), "-l", str(command_line), "-s", file.name]
        done = subprocess.run(
            [sys.executable, str(checker / "bin/kernel-hardening-checker"), *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def main() -> int:
    """Check, write the report, return the exit code."""
    parser = argparse.ArgumentParser(description="demand a reason for each hardening check that fails")
    for option in ("--checker", "--config", "--command-line", "--reasons", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--sysctl", type=Path, required=True, nargs="+")
    args = parser.parse_args()

    sysctls = settings([path.read_text(encoding="utf-8") for path in args.sysctl])
    reasons, wrong = parse_reasons(args.reasons.name, args.reasons.read_text(encoding="utf-8"))
    report, alone = judge(_run(args.checker, args.config, args.command_line, sysctls), reasons)
    if problems := [*wrong, *alone]:
        print(f"hardening: {len(problems)} problem(s):")
        for problem in problems:
            print(f"  {problem}")
        return 1
    print(f"hardening: {report['hold']} of {report['checked']} checks hold, the rest have their reasons")
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
