"""The tools of audits as a workspace that comes with vzrepro (`tools/`): its own recipe, and a lock of its own, so that
they are the same in every workspace and a cache that has them serves all."""

from __future__ import annotations

from pathlib import Path

from vzrepro.base.errors import UsageError
from vzrepro.recipe import lock as locks
from vzrepro.recipe.confined import evaluate
from vzrepro.recipe.graph import DrvGraph

TOOLS = Path(__file__).with_name("tools")
"""The workspace. `vzrepro -C vzrepro/proof/audit/tools lock --update` moves its pins; this project's own follow."""


def tools_graph(platform: str) -> tuple[DrvGraph, str | None]:
    """The tools' graph for a build platform, and its lock's snapshot time. Raises UsageError where there is none."""
    lock = locks.load(TOOLS / "lock.toml")
    known = sorted({on for _name, on in lock.images})
    if platform not in known:
        raise UsageError(f"audits have no tools for {platform}", reason=f"they are pinned for {', '.join(known)}")
    return evaluate(TOOLS, lock, platform), lock.snapshot()
