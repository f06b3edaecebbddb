"""What hatchling does not know by itself: the commit that sdist and wheel are of, and its time for every file in them.

`vzrepro/COMMIT` (`<commit> <seconds since 1970>`) is in both, for `vzrepro --version`, and for the wheel that is made
from an sdist, where there is no git.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it packs an sdist or a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        known = root / "vzrepro/COMMIT"
        if known.is_file():
            text = known.read_text(encoding="ascii")
        elif not (root / ".git").exists():  # a downloaded tree: no commit is known, and times are hatchling's own
            return
        else:
            commit = _git(root, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
            text = f"{commit} {_git(root, 'log', '-1', '--format=%ct')}\n"
            made = Path(self.directory) / "COMMIT"
            made.parent.mkdir(parents=True, exist_ok=True)
            made.write_text(text, encoding="ascii")
            build_data["force_include"][str(made)] = "vzrepro/COMMIT"
        os.environ.setdefault("SOURCE_DATE_EPOCH", text.split()[1])

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "COMMIT").unlink(missing_ok=True)


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", root, *words], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
