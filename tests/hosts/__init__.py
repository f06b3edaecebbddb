"""A host of the `vz` family, played: what boots our bundles elsewhere, as far as a guest can tell.

Nothing here is vzrepro's own client. The machine is put together as such a host does it (its shares and their tags, its
command line, its devices), the agent is called by stubs made of the agent's .proto over plain gRPC channels, each of
which numbers its own requests, and whole sequences are played as the host runs them. `docs/host-contract.md` has what
they rely on. `python -m tests.hosts` plays two of them and shows every step.
"""

from tests.hosts.host import Host, playing
from tests.hosts.machine import LIMIT_SECS, Hardware, Machine, booted, eventually
from tests.hosts.wire import Connection, Output, Refused, Running

__all__ = [
    "LIMIT_SECS",
    "Connection",
    "Hardware",
    "Host",
    "Machine",
    "Output",
    "Refused",
    "Running",
    "booted",
    "eventually",
    "playing",
]
