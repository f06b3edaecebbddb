"""Runs `attach.run` as a process of its own, with its own terminal and signals.

    python -m tests.contract.attached TARGET pty|pipes COMMAND [ARGUMENT]…

Ends with the command's exit code; 1 and the error on stderr when there is none, 130 when it was interrupted.
"""

from __future__ import annotations

import sys

from vzrepro.base.errors import VzreproError
from vzrepro.guest.vm import attach
from vzrepro.guest.vm.agent import AgentClient


def main(target: str, kind: str, command: str, *arguments: str) -> int:
    with AgentClient(target) as client:
        try:
            return attach.run(
                client,
                command,
                arguments,
                pty=kind == "pty",
                stdin=sys.stdin.buffer,
                stdout=sys.stdout.buffer,
                stderr=sys.stderr.buffer,
            )
        except VzreproError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
