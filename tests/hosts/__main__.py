"""Plays a host on the realized container-bundle and shows every step: `python -m tests.hosts`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.guests import host_programs
from tests.hosts import playing

PROJECT = Path(__file__).parents[2]


def realize(*targets: str) -> list[Path]:
    """The directories of targets of this workspace."""
    command = [sys.executable, "-m", "vzrepro", "realize", *targets]
    said = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    return [Path(line) for line in said.split()]


def main() -> None:
    """One container from Create to Delete, then two networks with a service on both."""
    profile = sys.argv[1] if len(sys.argv) > 1 else "container"
    programs = host_programs(realize)
    bundle, busybox = realize(f"{profile}-bundle", "busybox")
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.2f}  {line}", flush=True)

    with (
        tempfile.TemporaryDirectory() as share,
        playing(bundle, programs, busybox, share=Path(share), say=say) as host,
    ):
        say("------ one container")
        pid = host.launch("web", command=["sleep", "1000"], log=True)
        host.inside(pid, "cat /etc/resolv.conf; ps; echo hello from the container")
        host.stop("web")
        say("------ two networks, `api` on both")
        members = [("db", "172.20.0.2/24", "back"), ("api", "172.20.0.3/24", "back"), ("api", "172.21.0.3/24", "front")]
        members.append(("web", "172.21.0.2/24", "front"))
        host.main.network_setup("shop", members)
        serve = ["sh", "-c", "while :; do hostname | nc -l -p 80; done"]
        pids = {
            name: host.launch(name, command=serve, network=f"/var/run/netns/{name}") for name in ("db", "api", "web")
        }
        for here, addresses in (("api", ("172.20.0.2", "172.21.0.2")), ("db", ("172.20.0.3",))):
            for address in addresses:
                host.inside(pids[here], f"ip addr show scope global; nc {address} 80 < /dev/null")
        for name in pids:
            host.main.oci_delete(name, force=True)
        host.main.network_teardown("shop", "db", "api", "web")


if __name__ == "__main__":
    main()
