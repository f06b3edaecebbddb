"""Where a user's containers and volumes are, and that nobody else made these places."""

from __future__ import annotations

import os
from pathlib import Path

from vzrepro.base import trust
from vzrepro.base.errors import Untrusted


def containers() -> Path:
    """$XDG_RUNTIME_DIR/vz, else ~/.vz/run. Raises Untrusted when somebody else could have made it."""
    return _own("XDG_RUNTIME_DIR", "vz", "run", "containers' state and the sockets of their guests are there")


def volumes() -> Path:
    """$XDG_DATA_HOME/vz/volumes, else ~/.vz/volumes. Raises Untrusted when somebody else could have made it."""
    return _own("XDG_DATA_HOME", "vz/volumes", "volumes", "what containers keep is there")


def _own(variable: str, name: str, name_at_home: str, why: str) -> Path:
    directory = os.environ.get(variable)
    # One that su or sudo left in the environment is another user's, who could put things there.
    own = directory and trust.doubt([directory], os.environ) is None
    found = Path(directory, name) if directory and own else Path.home() / ".vz" / name_at_home
    if (doubt := trust.doubt([str(found)], os.environ)) is not None:
        raise Untrusted(
            f"{doubt[0]} is not trusted: {doubt[1]}",
            reason=why,
            hint=doubt[2] or f"set {variable} to a directory of your own",
        )
    return found
