"""sbom.toml ⇄ `Fact`s: what was found inside pinned files, by their sha256.

A bill of materials must be the same on every machine, and most machines do not have the 300 MB of packages that the
licences stand in. So what was found is kept beside the lock, under version control: a pinned file never changes, and
neither does what is in it. The format is specified in docs/sbom.md.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from vzrepro.base.errors import UsageError, first_fault
from vzrepro.base.model import FileHash

FILE = "sbom.toml"
"""The name of the file, beside lock.toml."""

READER = 1
"""Raised when `vzrepro.proof.sbom.learn` finds something else in the same files: everything is then read again."""

_HINT = "restore it from version control, or write it again with: vzrepro sbom --learn"
_HEADER = "# Written by `vzrepro sbom --learn`: what pinned files say of themselves, by their sha256 (docs/sbom.md)."


@dataclass(frozen=True, slots=True)
class Fact:
    """What one pinned file says of itself. `file` is its name, for people.

    `license` is an SPDX expression, or None for the reason in `note`. Of a crate, `needs` are the crates that its own
    code uses (build and development dependencies are not among them), and `macro` says that it runs in the compiler.
    """

    file: str
    license: str | None = None
    note: str | None = None
    needs: tuple[str, ...] = ()
    macro: bool = False


Facts = Mapping[FileHash, Fact]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    file: str
    license: str | None = None
    note: str | None = None
    needs: str = ""
    macro: bool = False


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    reader: int
    files: dict[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")], _Line] = {}


def load(path: Path) -> Facts:
    """The facts in a file; none when there is no file, or another reader wrote it. Raises UsageError when damaged."""
    try:
        document = _Document.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValidationError as error:
        raise UsageError(f"{path}: {first_fault(error)}", hint=_HINT) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read", reason=str(error), hint=_HINT) from error
    if document.reader != READER:
        return {}
    return {
        FileHash(sha256): Fact(line.file, line.license, line.note, tuple(line.needs.split()), line.macro)
        for sha256, line in document.files.items()
    }


def render(facts: Facts) -> str:
    """The file that holds these facts: a line for each, sorted by name, so that two branches merge."""
    lines = [_HEADER, "", f"reader = {READER}", "", "[files]"]
    for sha256, fact in sorted(facts.items(), key=lambda item: (item[1].file, item[0])):
        values: dict[str, str | bool | None] = {
            "file": fact.file,
            "license": fact.license,
            "note": fact.note,
            "needs": " ".join(fact.needs) or None,
            "macro": fact.macro or None,
        }
        # A JSON string is a TOML string, but for DEL, which TOML wants escaped.
        pairs = (f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None)
        lines.append(f'"{sha256.hex}" = {{ {", ".join(pairs)} }}'.replace("\x7f", "\\u007f"))
    return "\n".join([*lines, ""])
