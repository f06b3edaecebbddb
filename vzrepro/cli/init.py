"""`vzrepro init DIR`: a new workspace with one small artifact, pinned to packages that vzrepro's own audits use."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

import vzrepro
from vzrepro.base.errors import UsageError
from vzrepro.cli.options import json_option
from vzrepro.cli.session import Session

_START = Path(__file__).with_name("start")
_NAMES = {"gitignore": ".gitignore"}  # under its own name it would decide what is packed with vzrepro


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
@click.pass_obj
def init(session: Session, folder: Path) -> None:
    """Make a workspace in DIR, with one small artifact. It is called hello, and builds and can be audited at once.

    DIR is new or empty. The packages that it is built with are those that came with vzrepro; for the newest of their
    Debian release, see: vzrepro lock --update
    """
    folder = session.start / folder
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if os.path.lexists(there) and not there.is_dir():
        what = f"a link to {there.readlink()}, which is no directory" if there.is_symlink() else "a file"
        raise UsageError(f"{there} is {what}, so no workspace can be made there", hint="name a new directory")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} is not empty, and a workspace is made in an empty directory only",
            hint="name a new one: vzrepro init DIR",
        )
    for source in sorted(path for path in _START.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        relative = source.relative_to(_START)
        place = folder / relative.with_name(_NAMES.get(relative.name, relative.name))
        place.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8").replace("@VERSION@", vzrepro.__version__)
        place.write_text(text, encoding="utf-8")
    pinned = _pin(folder)
    steps = [] if folder.resolve() == Path.cwd() else [f"cd {shlex.quote(str(folder))}"]
    steps += ["vzrepro realize hello", "vzrepro audit hello"] if pinned else ["vzrepro lock"]
    text = f"{folder} is a workspace; go on with: {' && '.join(steps)}"
    session.console.print_text(text, {"workspace": str(folder), "locked": pinned, "next": steps})


def _pin(folder: Path) -> bool:
    """Write lock.toml from the pins that came with vzrepro; False where they do not answer all that is asked for."""
    from vzrepro.base import config
    from vzrepro.proof.audit.toolbox import TOOLS
    from vzrepro.recipe import lock as locks
    from vzrepro.recipe.confined import evaluate
    from vzrepro.recipe.lock.writing import render

    platform = config.load(folder).platform
    known = locks.load(TOOLS / "lock.toml").images
    wants = evaluate(folder, locks.Lock(), platform, lenient=True).wants
    pins = {(want.name, platform): known.get((want.name, platform)) for want in wants}
    found = {key: pin for key, pin in pins.items() if pin is not None}
    if len(found) < len(pins) or any(found[want.name, platform].request != want.request for want in wants):
        return False
    (folder / "lock.toml").write_text(render(locks.Lock(images=found)), encoding="utf-8")
    return True
