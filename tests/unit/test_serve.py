"""`cache serve` to clients that are good, odd, hostile and slow, over raw sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import PATIENCE_SECS
from tests.contract.served import Serving
from vzrepro.base.errors import UsageError
from vzrepro.cache import serve as module
from vzrepro.cache.serve import serve

SMALL = b"StorePath: /nix/store/x\n"
BIG = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "cache"
    for key, data in {
        "nix-cache-info": b"StoreDir: /nix/store\n",
        "a.narinfo": SMALL,
        "empty": b"",
        "nar/big.nar.zst": BIG,
        "log/x-y.drv": b"make\n",
        "build/k.json": b"{}",
        ".vzrepro/lock": b"",
        "nar/.hidden": b"no",
    }.items():
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(data)
    (tmp_path / "secret").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "within").symlink_to("a.narinfo")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def serving(root: Path) -> Iterator[Serving]:
    with Serving(root) as serving:
        yield serving


class Client:
    """A raw connection."""

    def __init__(self, serving: Serving) -> None:
        host, _, port = serving.url.removeprefix("http://").partition(":")
        self.sock = socket.create_connection((host, int(port)), timeout=PATIENCE_SECS)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()
        self.sock.close()

    def send(self, *lines: str) -> None:
        self.sock.sendall("\r\n".join((*lines, "", "")).encode("latin-1"))

    def take(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers in lower case, body."""
        status = int(self.file.readline().split()[1])
        told = {}
        while (line := self.file.readline().decode().strip()) != "":
            name, _, value = line.partition(":")
            told[name.lower()] = value.strip()
        return status, told, self.file.read(int(told.get("content-length", 0))) if body else b""

    def ended(self) -> bool:
        """Whether the server has closed the connection, without another byte."""
        with contextlib.suppress(ConnectionResetError):
            return self.file.read(1) == b""
        return True


@pytest.fixture
def client(serving: Serving) -> Iterator[Client]:
    with Client(serving) as client:
        yield client


def test_entries_are_served_with_their_types(client: Client) -> None:
    for key, data, kind in (
        ("a.narinfo", SMALL, "text/x-nix-narinfo"),
        ("nix-cache-info", b"StoreDir: /nix/store\n", "text/plain; charset=utf-8"),
        ("log/x-y.drv", b"make\n", "text/plain; charset=utf-8"),
        ("build/k.json", b"{}", "application/json"),
        ("nar/big.nar.zst", BIG, "application/octet-stream"),
        ("empty", b"", "application/octet-stream"),
        ("nar/big%2Enar.zst?query=is&ignored", BIG, "application/octet-stream"),
    ):
        client.send(f"GET /{key} HTTP/1.1", "Host: x")
        status, told, body = client.take()
        assert (status, body, told["content-type"]) == (200, data, kind)
        assert told["accept-ranges"] == "bytes"
        client.send(f"HEAD /{key} HTTP/1.1", "Host: x")
        status, again, _ = client.take(body=False)
        assert (status, again["content-length"], again["etag"]) == (200, str(len(data)), told["etag"])


@pytest.mark.parametrize(
    "path",
    [
        "/", "/absent", "/nar", "/nar/", "/nar/big.nar.zst/", "/nar/.hidden", "/.vzrepro/lock", "//a.narinfo",
        "/../secret", "/nar/../../secret", "/%2e%2e/secret", "/nar/%2e%2e/%2e%2e/secret", "/%2Fetc/passwd",
        "/link", "/within", "/out/secret", "/fifo", "/a.narinfo%00", "/%ff", "/a%20b",
        "/" + "a" * 5000, "/nar/" + "b/" * 500 + "c",
        "a.narinfo", "*", "http://x", "file:///etc/passwd",
    ],
)  # fmt: skip
def test_anything_else_is_not_there(client: Client, path: str) -> None:
    client.send(f"GET {path} HTTP/1.1")
    status, _, body = client.take()
    assert (status, body) == (404, b"Not Found\n")
    client.send(f"HEAD {path} HTTP/1.1")
    assert client.take(body=False)[0] == 404
    client.send("GET http://any.host/a.narinfo HTTP/1.1")  # and the connection goes on
    assert client.take()[2] == SMALL


@pytest.mark.parametrize("key", ["a.narinfo", "nar/big.nar.zst"])
def test_parts(client: Client, key: str) -> None:
    data = BIG if key.startswith("nar/") else SMALL
    size = len(data)
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=3-7", 3, 8),
        ("bytes=5-", 5, size),
        (f"bytes=2-{size * 2}", 2, size),
        ("bytes=-4", size - 4, size),
        (f"bytes=-{size * 2}", 0, size),
    ):
        client.send(f"GET /{key} HTTP/1.1", f"Range: {asked}")
        status, told, body = client.take()
        assert (status, body) == (206, data[start:end])
        assert told["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for asked in (f"bytes={size}-", "bytes=999999999999-", "bytes=-0"):
        client.send(f"GET /{key} HTTP/1.1", f"Range: {asked}")
        status, told, _ = client.take()
        assert (status, told["content-range"]) == (416, f"bytes */{size}")
    for asked in ("bytes=5-3", "bytes=0-1,3-4", "bytes=-", "lines=1-2", "bytes=a-b", "bytes=²-", "bytes=" + "9" * 5000):
        client.send(f"GET /{key} HTTP/1.1", f"Range: {asked}")
        assert (client.take()[0::2]) == (200, data)


@pytest.mark.parametrize("key", ["a.narinfo", "nar/big.nar.zst"])
def test_etags(client: Client, root: Path, key: str) -> None:
    client.send(f"GET /{key} HTTP/1.1")
    _, told, data = client.take()
    etag = told["etag"]
    for condition in (etag, f'"x", W/{etag}', "*"):
        client.send(f"GET /{key} HTTP/1.1", f"If-None-Match: {condition}")
        status, told, body = client.take()
        assert (status, told["etag"], body) == (304, etag, b"")
    client.send(f"GET /{key} HTTP/1.1", 'If-None-Match: "x"')
    assert client.take()[0] == 200
    client.send(f"GET /{key} HTTP/1.1", "Range: bytes=1-", f"If-Range: {etag}")
    assert client.take()[0::2] == (206, data[1:])
    for other in ('"x"', f"W/{etag}", "Sat, 01 Jan 2000 00:00:00 GMT"):
        client.send(f"GET /{key} HTTP/1.1", "Range: bytes=1-", f"If-Range: {other}")
        assert client.take()[0::2] == (200, data)
    new = root / "new"
    new.write_bytes(data[::-1])
    new.replace(root / key)
    client.send(f"GET /{key} HTTP/1.1", "Range: bytes=1-", f"If-Range: {etag}")
    assert client.take()[0::2] == (200, data[::-1])


def test_use_is_remembered_and_leaves_the_etag_alone(client: Client, root: Path) -> None:
    tags = set()
    for key in ("a.narinfo", "nar/big.nar.zst"):
        os.utime(root / key, (1, 1))
        client.send(f"HEAD /{key} HTTP/1.1")
        told = client.take(body=False)[1]
        assert told["last-modified"] == "Thu, 01 Jan 1970 00:00:01 GMT"
        tags.add(told["etag"])
        assert (root / key).stat().st_mtime == 1
        client.send(f"GET /{key} HTTP/1.1")
        tags.add(client.take()[1]["etag"])
        assert (root / key).stat().st_mtime > 1
        client.send(f"GET /{key} HTTP/1.1")
        tags.add(client.take()[1]["etag"])
    assert len(tags) == 2


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "CONNECT", "get"])
def test_nothing_else_can_be_done(client: Client, root: Path, method: str) -> None:
    client.send(f"{method} /a.narinfo HTTP/1.1", "Content-Length: 5000")
    client.sock.sendall(b"x" * 5000)
    status, told, _ = client.take()
    assert (status, told["allow"]) == (405, "GET, HEAD")
    assert client.ended()
    assert (root / "a.narinfo").read_bytes() == SMALL


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET /a.narinfo\r\n\r\n",
        b"GET /a.narinfo HTTP/2.0\r\n\r\n",
        b"GET  /a.narinfo HTTP/1.1\r\n\r\n",
        b"GET /a.narinfo HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /a.narinfo HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET /a.narinfo HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET /a.narinfo HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
        b"GET /a.narinfo HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello",
        b"GET /a.narinfo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_not_well_formed_is_refused(client: Client, data: bytes) -> None:
    client.sock.sendall(data)
    assert client.take()[0] == 400
    assert client.ended()


@pytest.mark.parametrize(
    "head", ["GET /" + "a" * 40_000 + " HTTP/1.1", "GET /a.narinfo HTTP/1.1\r\nA: " + "b" * 40_000]
)
def test_a_large_head_is_refused(client: Client, head: str) -> None:
    client.sock.sendall(head.encode())  # its end never comes
    assert client.take()[0] == 431
    assert client.ended()


def test_requests_may_be_sent_ahead_and_in_pieces(client: Client) -> None:
    client.sock.sendall(b"GET /a.narinfo HTTP/1.1\r\n\r\n" * 3 + b"GET /nar/big.nar")
    for _ in range(3):
        assert client.take()[2] == SMALL
    client.sock.sendall(b".zst HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert client.take()[2] == BIG
    assert client.ended()


def test_old_clients_get_one_answer(client: Client) -> None:
    client.send("GET /a.narinfo HTTP/1.0")
    assert client.take()[2] == SMALL
    assert client.ended()


def test_slow_and_vanished_clients_hold_nobody_up(serving: Serving) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Client(serving)) for _ in range(40)]
        for number, each in enumerate(slow):
            each.sock.sendall(b"GET /nar/big.nar.zst HTTP/1.1\r\n\r\n"[: None if number % 2 else 20])
        for _ in range(20):
            with Client(serving) as rude:
                rude.send("GET /nar/big.nar.zst HTTP/1.1")
                rude.sock.shutdown(socket.SHUT_RDWR)
        with Client(serving) as client:
            client.send("GET /nar/big.nar.zst HTTP/1.1")
            assert client.take()[2] == BIG


def test_a_head_that_drips_is_ended(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEAD_SECS", 0.2)
    with Client(serving) as client:
        with contextlib.suppress(OSError):
            for _ in range(2000):
                client.sock.sendall(b"x")
                time.sleep(0.01)
            raise AssertionError("goes on for ever")
        assert client.ended()


def test_too_many_connections_are_sent_away(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_CONNECTIONS", 2)
    with Client(serving) as first, Client(serving) as second:
        for each in (first, second):
            each.send("GET /a.narinfo HTTP/1.1")
            assert each.take()[0] == 200
        with Client(serving) as third:
            status, told, _ = third.take()
            assert (status, told["retry-after"]) == (503, "1")
            assert third.ended()
        second.sock.shutdown(socket.SHUT_RDWR)
        assert second.ended()
        for _ in range(500):
            with Client(serving) as fourth, contextlib.suppress(OSError):
                fourth.send("GET /a.narinfo HTTP/1.1")
                if fourth.take()[0] == 200:
                    break
            time.sleep(0.02)
        else:
            raise AssertionError("a connection that has ended still counts")


def test_a_file_that_shrinks_ends_the_connection(serving: Serving, root: Path) -> None:
    size = 64 << 20
    path = root / "nar" / "shrinks"
    with path.open("wb") as file:
        file.truncate(size)
    with Client(serving) as client:
        client.send("GET /nar/shrinks HTTP/1.1")
        client.file.read(1000)
        os.truncate(path, 1 << 20)
        assert len(client.file.read()) < size


def test_a_cache_that_cannot_be_read_says_so(client: Client, root: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (root / "a.narinfo").chmod(0)
    client.send("GET /a.narinfo HTTP/1.1")
    assert client.take()[0] == 500


def test_addresses(root: Path) -> None:
    with serve(root, "localhost", 0) as server:
        assert server.url.startswith(("http://127.0.0.1:", "http://[::1]:"))
    with serve(root, "0.0.0.0", 0) as server:
        assert server.url.startswith("http://localhost:")
    if socket.has_ipv6:
        with contextlib.suppress(UsageError), serve(root, "::1", 0) as server:
            assert server.url.startswith("http://[::1]:")


def test_what_cannot_be_served_is_explained(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        serve(tmp_path / "absent", "127.0.0.1", 0)
    with serve(root, "127.0.0.1", 0) as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}") as caught:
            serve(root, "127.0.0.1", port)
        assert "--port" in str(caught.value)
    for host, number in (("no.such.host.invalid", 0), ("127.0.0.1", 99999), ("203.0.113.1", 0), ("x" * 300, 0)):
        with pytest.raises(UsageError, match="cannot listen"):
            serve(root, host, number)


def test_closing_ends_connections_and_gives_the_address_back(root: Path) -> None:
    server = serve(root, "127.0.0.1", 0)
    port = int(server.url.rpartition(":")[2])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECS) as idle:
        idle.sendall(b"GET /a.narinfo HTTP/1.1\r\n\r\n")
        assert idle.recv(10)
        server.close()
        server.close()
        thread.join(PATIENCE_SECS)
        assert not thread.is_alive()
        with contextlib.suppress(OSError):
            while idle.recv(1 << 16):
                pass
    server.serve_forever()  # closed: ends at once
    with serve(root, "127.0.0.1", port):
        pass
