"""Entry: answer `vzrepro realize TARGET…` at once when nothing changed (standard library only), else run the CLI."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run vzrepro with `sys.argv`; ends the process with the exit code of `vzrepro.errors`."""
    words = sys.argv[1:]
    if len(words) > 1 and words[0] == "realize" and not any(word.startswith("-") for word in words):
        from vzrepro import noop

        places = noop.answer(words[1:], os.environ)
        if places is not None:
            sys.stdout.write("".join(f"{place}\n" for place in places))
            return
    from vzrepro import cli

    cli.main(words)


if __name__ == "__main__":
    main()
