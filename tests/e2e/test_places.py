"""What hosts rely on in the agent's root (docs/guest.md): the places, and every program by its name."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import shutil
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.guests import LIMIT_SECS, Console, needs_qemu, shell
from tests.programs import PATH, USES
from vzrepro.guest.vm import boot, qemu
from vzrepro.guest.vm.agent import AgentClient

pytestmark = needs_qemu


@dataclass(frozen=True)
class Place:
    """A guest with all that hosts share with one, and the directories that it shares."""

    agent: AgentClient
    rootfs: Path
    volume: Path


@pytest.fixture(scope="module")
def place(bundle: Path, programs: boot.HostPrograms, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """The guest of a host that runs several containers: its root file system's share is empty at boot."""
    rootfs, volume, files = (tmp_path_factory.mktemp(name) for name in ("rootfs", "volume", "files"))
    (volume / "file").write_text("of the volume\n")
    disk = files / "disk.img"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    guest = boot.of_bundle(bundle)
    guest = replace(
        guest,
        command_line=f"{guest.command_line} vz.mount.0=/srv/volume",
        host_loopback=True,
        disks=(qemu.Disk(disk),),
        shares=(
            qemu.Share("rootfs", rootfs),
            qemu.Share("oci-runtime-bin", bundle, read_only=True),
            qemu.Share("vz-mount-0", volume),
            qemu.Share("vz-mount-1", volume, read_only=True),
        ),
    )
    console = Console()
    with boot.running(guest, programs=programs, timeout_secs=LIMIT_SECS, on_console=console) as vm:
        console.wait_for("vz-init: network: eth0 has")
        yield Place(vm.agent, rootfs, volume)
        vm.power_off()


def run(agent: AgentClient, script: str) -> str:
    """What a script prints in a directory of its own in the guest."""
    return shell(agent, f"export PATH={PATH}; cd $(mktemp -d) || exit; {script}")


@pytest.mark.parametrize("name", sorted(USES))
def test_a_program_that_hosts_run(place: Place, name: str) -> None:
    script, expected = USES[name]
    assert run(place.agent, script) == expected


def test_programs_are_found_by_every_way(place: Place) -> None:
    names = " ".join([*USES, "wget"])
    missing = (
        f"for a in {names}; do [ -x /bin/$a ] && which $a > /dev/null || echo $a; done; "
        f"for a in $(/bin/busybox --list); do [ -x /bin/$a ] || echo $a; done; "
        "for a in ip ifconfig route udhcpc mke2fs blkid fdisk swapon; do [ -x /sbin/$a ] || echo /sbin/$a; done"
    )
    assert run(place.agent, missing) == ""
    for name in ("awk", "mke2fs", "sh"):
        assert f"Usage: {name}" in run(place.agent, f"/bin/busybox {name} --help 2>&1")


def test_wget_with_and_without_encryption(place: Place, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("over the network\n")
    for scheme, context in (("http", None), ("https", server_context(tmp_path))):
        with served(tmp_path, context) as port:
            words = f"wget -q -O - {scheme}://10.0.2.2:{port}/file"
            assert "over the network\n" in run(place.agent, f"{words}; /bin/busybox {words}")


def test_what_the_host_adds_later_is_seen(place: Place) -> None:
    # Looked up in vain before, as a host or a container may have done.
    for path in ("/vz-rootfs/one", "/vz-rootfs/run/vz-oci/bundles/one", "/run/vz-oci/bundles/one"):
        assert run(place.agent, f"ls {path} 2> /dev/null || echo none") == "none\n"
    for bundle in ("one/run/vz-oci/bundles/one", "run/vz-oci/bundles/one"):
        (place.rootfs / bundle).mkdir(parents=True)
        (place.rootfs / bundle / "config.json").write_text(f"{bundle}\n")
    for place_in_guest in ("/vz-rootfs/one/run/vz-oci/bundles/one", "/run/vz-oci/bundles/one"):
        assert run(place.agent, f"cat {place_in_guest}/config.json").endswith("run/vz-oci/bundles/one\n")
    assert run(place.agent, "ls /run/vz-oci/bundles; echo 2 > /proc/sys/vm/drop_caches") == "one\n"
    shutil.rmtree(place.rootfs / "run/vz-oci/bundles/one")
    assert run(place.agent, "echo 2 > /proc/sys/vm/drop_caches; ls /run/vz-oci/bundles") == ""


def test_the_share_is_written_to_and_the_overlay_is_not(place: Place) -> None:
    run(place.agent, "echo guest > /vz-rootfs/made; mkdir -p /opt/made; echo guest > /opt/made/file")
    assert (place.rootfs / "made").read_text() == "guest\n"
    assert not (place.rootfs / "opt").exists()


def test_a_container_s_overlay_is_made_as_hosts_make_it(place: Place) -> None:
    (place.rootfs / "two/etc").mkdir(parents=True)
    (place.rootfs / "two/etc/os").write_text("of the container\n")
    own = "/run/vz-oci/containers/two"
    made = f"""
        set -e
        mkdir -p {own} && mount -t tmpfs tmpfs {own} && mkdir -p {own}/upper {own}/work {own}/merged
        mount -t overlay overlay -o lowerdir=/vz-rootfs/two,upperdir={own}/upper,workdir={own}/work {own}/merged
        mkdir -p /run/vz-oci/logs/two
        cat {own}/merged/etc/os
        cp /etc/resolv.conf {own}/merged/etc/resolv.conf && grep nameserver {own}/merged/etc/resolv.conf
        mknod {own}/merged/null c 1 3
    """
    gone = f"umount {own}/merged && umount {own} && rm -rf {own} && echo 2 > /proc/sys/vm/drop_caches"
    for _again in range(2):
        assert run(place.agent, f"{made}\n{gone}") == "of the container\nnameserver 10.0.2.3\n"
    assert [path.name for path in (place.rootfs / "two").rglob("*")] == ["etc", "os"]


def test_places(place: Place) -> None:
    said = run(
        place.agent,
        """
        cat /mnt/vz-mount-0/file /mnt/vz-mount-1/file /srv/volume/file
        ls /mnt
        echo new > /srv/volume/new
        (echo new > /mnt/vz-mount-1/other) 2> /dev/null || echo read-only
        for youki in /usr/local/bin/youki /run/vz-oci/bin/youki youki; do $youki --version | grep version; done
        /usr/local/bin/vz-guest-agent --version > /dev/null && echo agent
        stat -c %a /tmp
        ls -d /proc/1 /sys/kernel /dev/pts/ptmx /sys/fs/cgroup/cgroup.procs /etc/udhcpc.script
        echo mine > /run/file && cat /run/file
        grep nameserver /etc/resolv.conf
        """,
    )
    youki = [line for line in said.splitlines() if line.startswith("youki version: ")]
    assert len(youki) == 3
    assert [line for line in said.splitlines() if line not in youki] == [
        *(["of the volume"] * 3),
        *("vz-mount-0", "vz-mount-1", "read-only", "agent", "1777"),
        *("/dev/pts/ptmx", "/etc/udhcpc.script", "/proc/1", "/sys/fs/cgroup/cgroup.procs", "/sys/kernel"),
        *("mine", "nameserver 10.0.2.3"),
    ]
    assert (place.volume / "new").read_text() == "new\n"


def test_a_full_overlay_leaves_the_agent_and_the_hosts_places(place: Place) -> None:
    fill = "dd if=/dev/zero of=/fill bs=1M 2> /dev/null; echo x > /more 2> /dev/null || echo full"
    try:
        assert run(place.agent, fill) == "full\n"
        assert (
            run(place.agent, "mkdir -p /run/vz-oci/logs/late && echo x > /run/vz-oci/logs/late/log && echo kept")
            == "kept\n"
        )
        place.agent.ping(LIMIT_SECS)
    finally:
        run(place.agent, "rm -f /fill /more")


def server_context(directory: Path) -> ssl.SSLContext:
    """TLS with a certificate that nobody has signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "10.0.2.2")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("10.0.2.2"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    file = directory / "server.pem"
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain) + certificate.public_bytes(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


@contextlib.contextmanager
def served(directory: Path, context: ssl.SSLContext | None) -> Iterator[int]:
    """A web server for the files of a directory; its port."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: object) -> None:
            super().__init__(*given, directory=str(directory))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
