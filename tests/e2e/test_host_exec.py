"""`docs/host-contract.md`, what hosts run through `Exec`: every command, by its absolute path and by its name, in a
guest whose root file system has no program of its own; and the ones that do more than print."""

from __future__ import annotations

import datetime
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.guests import needs_qemu
from tests.hosts import Hardware, Host, playing
from vzrepro.guest.vm.boot import HostPrograms

pytestmark = needs_qemu

# Command → a script that uses it (`$0` is the name or path it is called by) and what that prints, or a part of it. The
# scripts use the directory /x with a file `a`: "one", "two", "three", a line each.
COMMANDS = {
    "sh": ("$0 -c 'echo 1'; $0 -lc 'echo 2'", "1\n2\n"),
    "mount": ("mkdir -p /x/m; $0 -t tmpfs tmpfs /x/m && grep -c /x/m /proc/mounts; umount /x/m", "1\n"),
    "umount": ("mkdir -p /x/u; mount -t tmpfs tmpfs /x/u; $0 /x/u && mountpoint -q /x/u || echo gone", "gone\n"),
    "mountpoint": ("$0 /proc", "/proc is a mountpoint\n"),
    "mkdir": ("$0 -p /x/d/e && test -d /x/d/e && echo made", "made\n"),
    "rm": ("touch /x/r; $0 -rf /x/r; test -e /x/r || echo gone", "gone\n"),
    "cp": ("$0 /x/a /x/c && cat /x/c", "one\n"),
    "mv": ("echo moved > /x/v; $0 /x/v /x/w && cat /x/w", "moved\n"),
    "ln": ("$0 -sfn /x/a /x/l && cat /x/l", "one\n"),
    "cat": ("$0 /x/a", "one\ntwo\nthree\n"),
    "head": ("$0 -n 1 /x/a", "one\n"),
    "tail": ("$0 -n 1 /x/a", "three\n"),
    "grep": ("$0 -E 't(wo)' /x/a", "two\n"),
    "sed": ("$0 -n 's/two/2/p' /x/a", "2\n"),
    "awk": ("""$0 '{ n += length($1) } END { printf "%d %s\\n", n, $1 }' /x/a""", "11 three\n"),
    "tr": ("$0 a-z A-Z < /x/a", "ONE\n"),
    "wc": ("$0 -l < /x/a", "3\n"),
    "chmod": ("cp /x/a /x/h; $0 640 /x/h; stat -c %a /x/h", "640\n"),
    "tar": ("$0 -C /x -cpf - a | $0 -xpf - -O", "one\ntwo\n"),
    "sync": ("$0 && echo synced", "synced\n"),
    "sleep": ("$0 0.01 && echo slept", "slept\n"),
    "kill": ("sleep 1000 & $0 -9 $!; wait $!; echo $?", "137\n"),
    "echo": ("$0 said", "said\n"),
    "printf": ("$0 '%s-%03d\\n' a 7", "a-007\n"),
    "nohup": ("$0 sh -c 'echo up' 2>/dev/null | cat", "up\n"),
    "blkid": ("$0 /dev/vda", "ext2"),
    "mke2fs": ("$0 -F /dev/vda >/dev/null && blkid /dev/vda", "/dev/vda: "),
    "nsenter": (
        "$0 --mount=/proc/1/ns/mnt --net=/proc/1/ns/net --uts=/proc/1/ns/uts -- sh -c 'echo entered'",
        "entered\n",
    ),
    "ip": ("$0 addr show lo", "127.0.0.1/8"),
    "ifconfig": ("$0 lo", "inet addr:127.0.0.1"),
    "route": ("$0 -n", "Destination"),
    "udhcpc": ("$0 -f -n -q -i eth0 -s /bin/true 2>&1", "lease of 10.0.2.15"),
    "hostname": ("$0 changed; $0", "changed\n"),
    "unshare": ("$0 -m sh -c 'mount -t tmpfs t /mnt && echo apart'", "apart\n"),
    "chroot": ("$0 / /bin/busybox echo within", "within\n"),
    "ps": ("$0", "vz-guest-agent"),
    "top": ("$0 -b -n 1", "Mem:"),
    "dmesg": ("$0 | head -n 5", "Linux version"),
    "date": ("$0 -u +%Y", "20"),
    "env": ("$0 A=b sh -c 'echo $A'", "b\n"),
    "id": ("$0 -u", "0\n"),
    "which": ("$0 sh", "/sh\n"),
    "gzip": ("$0 -9 -c /x/a | gunzip", "one\ntwo\nthree\n"),
    "gunzip": ("gzip -c /x/a | $0", "one\ntwo\nthree\n"),
    "zcat": ("gzip -c /x/a > /x/z.gz; $0 /x/z.gz", "one\ntwo\nthree\n"),
    "md5sum": ("printf '' | $0", "d41d8cd98f00b204e9800998ecf8427e"),
    "sha256sum": ("printf '' | $0", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    "less": ("$0 /x/a", "one\ntwo\nthree\n"),
    "vi": ("$0 -c q! /x/a < /dev/null | tr -d '\\033' | grep -o three", "three\n"),
    "find": ("$0 /x -name a", "/x/a\n"),
    "xargs": ("echo 1 2 | $0 -n 1 echo", "1\n2\n"),
    "sort": ("$0 /x/a", "one\nthree\ntwo\n"),
    "uniq": ("printf 'a\\na\\nb\\n' | $0 -c", "2 a"),
    "cut": ("echo a:b | $0 -d: -f2", "b\n"),
    "stat": ("$0 -c %s /x/a", "14\n"),
    "du": ("$0 -s /x/a", "/x/a\n"),
    "df": ("$0 -k /", "Filesystem"),
    "free": ("$0 -m", "Mem:"),
    "uptime": ("$0", "load average"),
    "lsof": ("$0", "/dev/"),
    "netstat": ("$0 -an", "Active"),
    "nc": ("echo through | nc -l -p 5000 & until $0 127.0.0.1 5000 </dev/null 2>/dev/null; do :; done", "through\n"),
    "ping": ("$0 -c 1 127.0.0.1", "1 packets received"),
    "traceroute": ("$0 -n -m 1 127.0.0.1", "127.0.0.1"),
    "fdisk": ("$0 -l /dev/vda", "Disk /dev/vda"),
    "expr": ("$0 6 '*' 7", "42\n"),
    "swapon": ("$0 /x/a 2>&1; :", "swapon: "),  # there is no swap in the kernel, so all it can do is to say so
}


@pytest.fixture(scope="module")
def host(
    bundle: Path, programs: HostPrograms, busybox: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    place = tmp_path_factory.mktemp("exec")
    disk = place / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    (place / "share").mkdir()
    machine = Hardware(bundle / "vmlinux", bundle / "initramfs.img", disks=(disk,))
    with playing(bundle, programs, busybox, share=place / "share", hardware=machine) as host:
        host.main.shell("mkdir /x; printf 'one\\ntwo\\nthree\\n' > /x/a; mke2fs -F /dev/vda > /dev/null")
        yield host


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_list(host: Host, command: str) -> None:
    find = f"for dir in /bin /sbin; do if [ -x $dir/{command} ]; then echo $dir/{command}; break; fi; done"
    path = host.main.shell(find).strip()
    script, printed = COMMANDS[command]
    for word in (command, path):
        assert printed in host.main.text("/bin/busybox", "sh", "-c", script, word)


def test_busybox_has_all_of_them_as_applets(host: Host) -> None:
    assert {*COMMANDS, "wget"} <= set(host.main.text("/bin/busybox", "--list").split())


def test_sh_by_path_and_by_name(host: Host) -> None:
    for word in ("/bin/sh", "sh"):
        assert host.main.text(word, "-c", "echo $0 said", "it") == "it said\n"
    assert host.main.text("/bin/busybox", "sh", "-lc", "echo said") == "said\n"


def test_a_disk_that_the_host_formats_holds_volumes(host: Host) -> None:
    place = "/run/vz-oci/volumes"
    host.main.text("/bin/busybox", "mke2fs", "-F", "/dev/vda")
    host.main.text(
        "/bin/busybox", "sh", "-c", f"/bin/busybox mkdir -p {place} && /bin/busybox mount -t ext4 /dev/vda {place}"
    )
    assert "/dev/vda" in host.main.shell(f"mkdir {place}/data && echo kept > {place}/data/f && sync && df -k {place}")
    host.main.shell(f"umount {place} && mount -t ext4 /dev/vda {place}")
    assert host.main.shell(f"cat {place}/data/f; umount {place}") == "kept\n"


def _certificate(path: Path) -> None:
    """A key and a certificate of its own for the name 10.0.2.2, which is this host to the guest."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "10.0.2.2")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(plain + made.public_bytes(pem))


class _Hello(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the host\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_wget(host: Host, tmp_path: Path, scheme: str) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hello) as server:
        if scheme == "https":
            _certificate(tmp_path / "pem")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "pem")
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host.main.shell("until ip route | grep -q default; do sleep 0.1; done")
        url = f"{scheme}://10.0.2.2:{server.server_address[1]}/"
        for word in ("wget", "/bin/wget"):
            assert host.main.text("/bin/busybox", "sh", "-c", f"{word} -q --no-check-certificate -O - {url}").endswith(
                "hello from the host\n"
            )
        server.shutdown()
