"""`docs/host-contract.md`, networks: services on one and on two of them, and containers that join by path."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guests import needs_qemu
from tests.hosts import Host, playing
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu

SERVICES = [
    ("db", "172.20.0.2/24", "back"),
    ("api", "172.20.0.3/24", "back"),
    ("api", "172.21.0.3/24", "front"),
    ("web", "172.21.0.2/24", "front"),
]
SERVE = ["sh", "-c", "while :; do hostname | nc -l -p 80; done"]


@pytest.fixture(scope="module", params=["container", "developer"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    bundle: Path = request.getfixturevalue("bundle_of")(request.param)
    programs: HostPrograms = request.getfixturevalue("programs")
    busybox: Path = request.getfixturevalue("busybox")
    with playing(bundle, programs, busybox, share=tmp_path_factory.mktemp("stack")) as host:
        yield host


@pytest.fixture(scope="module")
def shop(host: Host) -> Iterator[dict[str, int]]:
    """Three services on two networks, each a container that joins by path: name → process id in the guest."""
    host.main.network_setup("shop", SERVICES)
    names = ("db", "api", "web")
    yield {name: host.launch(name, command=SERVE, network=f"/var/run/netns/{name}") for name in names}
    for name in names:
        host.main.oci_delete(name, force=True)
    host.main.network_teardown("shop", *names)


def ask(host: Host, pid: int, address: str) -> str:
    """Who answers there; waits for a listener."""
    return host.inside(pid, f"until nc -w 5 {address} 80 < /dev/null 2>/dev/null; do sleep 0.05; done").strip()


def test_a_service_on_two_networks_has_an_interface_for_each_in_order(host: Host, shop: dict[str, int]) -> None:
    shown = host.inside(shop["api"], "ip -o -4 addr show scope global")
    found = [(line.split()[1], line.split()[3]) for line in shown.splitlines()]
    assert found == [("eth0", "172.20.0.3/24"), ("eth1", "172.21.0.3/24")]
    shown = host.inside(shop["web"], "ip -o -4 addr show scope global")
    assert [line.split()[1::2][:2] for line in shown.splitlines()] == [["eth0", "172.21.0.2/24"]]


def test_services_of_a_network_talk_and_those_of_another_do_not(host: Host, shop: dict[str, int]) -> None:
    assert ask(host, shop["api"], "172.20.0.2") == "db"
    assert ask(host, shop["api"], "172.21.0.2") == "web"
    assert ask(host, shop["db"], "172.20.0.3") == "api"
    assert ask(host, shop["web"], "172.21.0.3") == "api"
    apart = "nc -w 2 172.21.0.2 80 < /dev/null || echo nobody"
    assert host.inside(shop["db"], apart).endswith("nobody\n")


def test_the_namespaces_are_at_iproute2s_place(host: Host, shop: dict[str, int]) -> None:
    assert host.main.shell("ls /var/run/netns").split() == ["api", "db", "web"]
    assert "172.21.0.3/24" in host.main.text("/bin/busybox", "nsenter", "--net=/var/run/netns/api", "ip", "addr")


def test_a_published_port_reaches_a_service_by_its_address(host: Host, shop: dict[str, int]) -> None:
    for address in ("172.20.0.3", "172.21.0.3"):
        with host.connect() as connection, connection.forward(80, address) as forward:
            forward.end()
            assert forward.received() == b"api\n"


def test_setup_again_and_teardown_leave_nothing(host: Host) -> None:
    services = [("a", "10.9.0.2/24", "one"), ("a", "10.8.0.2/24", "two"), ("b", "10.8.0.3/24", "two")]
    before = host.main.shell("ip -o link | wc -l; ls /var/run/netns")
    for _ in range(2):
        host.main.network_setup("other", services)
        host.main.network_setup("other", services)
        host.main.network_teardown("other", "b")
        there = host.main.shell("ls /var/run/netns").split()
        assert ("a" in there, "b" in there) == (True, False)
        host.main.network_teardown("other", "a", "b")
        assert host.main.shell("ip -o link | wc -l; ls /var/run/netns") == before
