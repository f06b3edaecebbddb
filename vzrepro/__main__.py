"""Entry: answer at once what needs no more than the standard library, else run the CLI.

That is `vzrepro --version`, and what `vzrepro.noop` remembers. The start script leaves out Python's own `site`, which
takes a fifth of that time; the CLI cannot do without it.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run vzrepro with `sys.argv`; ends the process with the exit code of `vzrepro.base.errors`."""
    words = sys.argv[1:]
    text = _known(words)
    if text is not None and _say(text):
        return
    if sys.flags.no_site:
        import site

        site.main()
    from vzrepro import cli

    try:
        cli.main(words)
    except SystemExit as end:
        # Only the process itself may be left like this, and not whoever calls `cli.main` in one of theirs.
        if (farm := sys.modules.get("vzrepro.farm.temporal.server")) is not None:
            farm.leave(end.code)
        raise


def _known(words: list[str]) -> str | None:
    """What the command prints, as far as it is known without running it."""
    if words == ["--version"]:
        from vzrepro.base import version

        return f"vzrepro, version {version.full()}\n"
    from vzrepro import noop

    return noop.answer(words, os.environ, terminal=sys.stdout.isatty())


def _say(text: str) -> bool:
    """Print, unless stdout does not take it: the CLI then says why."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except (OSError, ValueError):
        return False
    return True


if __name__ == "__main__":
    main()
