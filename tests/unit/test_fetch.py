"""Downloads against a real HTTP server that misbehaves: right bytes or one clear error, never anything else."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vzrepro.errors import HashMismatch, Interrupted, RemoteError, VzreproError
from vzrepro.fetch import Download, Http, NotFound, Patience, download, download_all, get, served
from vzrepro.fetch.download import _Part
from vzrepro.model import FileHash

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA = FileHash.of(DATA)
ETAG = '"one"'


class Handler(BaseHTTPRequestHandler):
    """Hands each request to the site's behaviour for its path."""

    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.site.requests.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.site.behaviours[self.path](self)

    def log_message(self, format: str, *args: Any) -> None:
        return

    def head(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def reset(self) -> None:
        """End the connection the hard way: the client sees "connection reset"."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


class Server(ThreadingHTTPServer):
    """Says nothing of connections that clients, or our own faults, have broken."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        return


Behaviour = Callable[[Handler], None]


@dataclass
class Site:
    """A local server: path → what happens there; what was asked; the names of its URLs."""

    base: str = ""
    behaviours: dict[str, Behaviour] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)

    def serve(self, name: str, *behaviours: Behaviour) -> str:
        """The URL of a new place; the n-th request gets the n-th behaviour, later ones the last."""
        left = list(behaviours)

        def behave(handler: Handler) -> None:
            (left.pop(0) if len(left) > 1 else left[0])(handler)

        self.behaviours[f"/{name}"] = behave
        return f"{self.base}/{name}"

    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.requests]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Server, type[Handler]]]:
    kind = type("SiteHandler", (Handler,), {})
    with Server(("127.0.0.1", 0), kind) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield http, kind
        http.shutdown()
        thread.join()


@pytest.fixture
def site(server: tuple[Server, type[Handler]]) -> Site:
    http, kind = server
    kind.site = Site(f"http://127.0.0.1:{http.server_address[1]}")
    return kind.site


def good(data: bytes = DATA, etag: str | None = ETAG) -> Behaviour:
    """A server as it should be, with ranges."""

    def behave(handler: Handler) -> None:
        tags = () if etag is None else (("ETag", etag),)
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if match is None or handler.headers.get("If-Range", etag) != etag:
            handler.head(200, ("Content-Length", str(len(data))), *tags)
            handler.wfile.write(data)
            return
        start = int(match[1])
        if start >= len(data):
            handler.head(416, ("Content-Length", "0"))
            return
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.head(206, ("Content-Length", str(len(data) - start)), ("Content-Range", span), *tags)
        handler.wfile.write(data[start:])

    return behave


def rangeless(data: bytes = DATA) -> Behaviour:
    def behave(handler: Handler) -> None:
        handler.head(200, ("Content-Length", str(len(data))))
        handler.wfile.write(data)

    return behave


def breaks_after(count: int, data: bytes = DATA, etag: str | None = ETAG) -> Behaviour:
    """Sends `count` bytes of the rest, then resets the connection."""

    def behave(handler: Handler) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        span = ("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        tags = () if etag is None else (("ETag", etag),)
        handler.head(
            206 if match else 200, ("Content-Length", str(len(data) - start)), *tags, *([span] if match else [])
        )
        handler.wfile.write(data[start : start + count])
        handler.wfile.flush()
        handler.close_connection = True  # a clean end too early, so that what was sent is sure to arrive

    return behave


def resets(handler: Handler) -> None:
    handler.reset()


def status(code: int, *headers: tuple[str, str]) -> Behaviour:
    return lambda handler: handler.head(code, ("Content-Length", "0"), *headers)


def endless(handler: Handler) -> None:
    handler.head(200, ("Transfer-Encoding", "chunked"))
    for _ in range(1000):
        handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")


class Clock:
    """Time that passes only when asked to; each look costs `step` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now = 0.0
        self.step = step
        self.slept: list[float] = []

    def __call__(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, secs: float) -> None:
        self.slept.append(secs)
        self.now += secs


def patient(clock: Clock, **changes: Any) -> Patience:
    return Patience(clock=clock, sleep=clock.sleep, jitter=lambda _low, high: high, **changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def part_of(dest: Path) -> Path:
    return dest.with_name(dest.name + ".part")


def test_a_file_arrives_whole_and_progress_ends_at_its_size(site: Site, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    dest = tmp_path / "new" / SHA.hex
    download([site.serve("f", good())], dest, sha256=SHA, report=lambda done, total: seen.append((done, total)))
    assert dest.read_bytes() == DATA
    assert seen[0] == (0, len(DATA))
    assert seen[-1] == (len(DATA), len(DATA))
    assert not part_of(dest).exists()


def test_a_file_that_is_there_is_verified_and_not_asked_for(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(DATA)
    download([site.serve("f", good())], dest, sha256=SHA, size=len(DATA))
    assert site.requests == []


def test_a_wrong_file_that_is_there_is_replaced(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(b"x" + DATA[1:])
    download([site.serve("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA


def test_a_wrong_file_that_is_there_stays_when_nothing_better_comes(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(b"old")
    with pytest.raises(NotFound):
        download([site.serve("f", status(404))], dest, sha256=SHA)
    assert dest.read_bytes() == b"old"
    assert not part_of(dest).exists()


def test_a_part_is_gone_on_from(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    download([site.serve("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA
    assert site.requests == [("/f", "bytes=1000-", None)]


def test_a_complete_part_needs_no_request(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA)
    download([site.serve("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA
    assert site.requests == []


def test_a_connection_that_breaks_is_resumed_under_the_same_etag(site: Site, tmp_path: Path, clock: Clock) -> None:
    url = site.serve("f", breaks_after(1000), breaks_after(2000), good())
    download([url], tmp_path / "f", sha256=SHA, size=len(DATA), patience=patient(clock))
    assert (tmp_path / "f").read_bytes() == DATA
    assert site.requests == [("/f", None, None), ("/f", "bytes=1000-", ETAG), ("/f", "bytes=3000-", ETAG)]


def test_a_changed_etag_starts_over(site: Site, tmp_path: Path, clock: Clock) -> None:
    url = site.serve("f", breaks_after(1000, b"old" * 99999, etag='"old"'), good())
    download([url], tmp_path / "f", sha256=SHA, patience=patient(clock))
    assert (tmp_path / "f").read_bytes() == DATA
    assert site.requests[1] == ("/f", "bytes=1000-", '"old"')


def test_many_breaks_are_fine_as_long_as_bytes_come(site: Site, tmp_path: Path, clock: Clock) -> None:
    url = site.serve("f", *[breaks_after(100_000)] * 12)
    download([url], tmp_path / "f", sha256=SHA, size=len(DATA), patience=patient(clock, tries=2))
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_server_without_ranges_starts_over(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    download([site.serve("f", rangeless())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA), None])
@pytest.mark.parametrize("junk", [b"junk", b"x" * len(DATA), b"x" * (len(DATA) + 5)])
def test_a_part_with_other_bytes_costs_one_start_from_scratch(
    site: Site, tmp_path: Path, junk: bytes, size: int | None
) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(junk)
    download([site.serve("f", good())], dest, sha256=SHA, size=size)
    assert dest.read_bytes() == DATA
    assert site.ranges()[-1] is None
    assert len(site.requests) <= 2


def test_wrong_bytes_lead_to_the_next_mirror(site: Site, tmp_path: Path) -> None:
    wrong = site.serve("wrong", good(b"x" * len(DATA)))
    download([wrong, site.serve("right", good())], tmp_path / "f", sha256=SHA, size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA
    assert [path for path, _, _ in site.requests] == ["/wrong", "/right"]


def test_wrong_bytes_everywhere_name_wanted_found_and_every_url(site: Site, tmp_path: Path) -> None:
    other = b"x" * len(DATA)
    urls = [site.serve("wrong", good(other)), site.serve("none", status(404))]
    dest = tmp_path / "f"
    with pytest.raises(HashMismatch) as caught:
        download(urls, dest, sha256=SHA, size=len(DATA))
    text = str(caught.value)
    for part in (SHA.hex, hashlib.sha256(other).hexdigest(), *urls, "404", "VZREPRO_MIRRORS"):
        assert part in text
    assert caught.value.exit_code == 102
    assert not dest.exists()
    assert not part_of(dest).exists()


def test_another_size_is_seen_before_the_first_byte(site: Site, tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match=f"wanted {len(DATA)} bytes, found 5 bytes"):
        download([site.serve("f", good(b"short"))], tmp_path / "f", sha256=SHA, size=len(DATA))


def test_a_size_that_changes_under_a_range_keeps_the_part_for_other_mirrors(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    longer = site.serve("longer", good(DATA + b"more"))
    download([longer, site.serve("right", good())], dest, sha256=SHA, size=len(DATA))
    assert site.ranges() == ["bytes=1000-", "bytes=1000-"]


def test_an_endless_body_is_cut_at_the_size(site: Site, tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match="found more"):
        download([site.serve("f", endless)], tmp_path / "f", sha256=SHA, size=len(DATA))
    with pytest.raises(RemoteError, match="more than 100000 bytes"):
        get([site.serve("g", endless)], 100_000)


def test_a_truncated_body_without_length_is_not_taken_for_the_file(site: Site, tmp_path: Path, clock: Clock) -> None:
    def short(handler: Handler) -> None:
        handler.head(200, ("Connection", "close"))
        handler.wfile.write(DATA[:1000])

    with pytest.raises(RemoteError, match="cannot download") as caught:
        download([site.serve("f", short)], tmp_path / "f", sha256=SHA, size=len(DATA), patience=patient(clock))
    assert f"ends after 1000 of {len(DATA)} bytes" in str(caught.value)


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_later(site: Site, tmp_path: Path, clock: Clock, code: int) -> None:
    url = site.serve("f", status(code), status(code), good())
    download([url], tmp_path / "f", sha256=SHA, patience=patient(clock, backoff_secs=0.5))
    assert clock.slept == [0.5, 1.0]


def test_retry_after_is_honoured(site: Site, tmp_path: Path, clock: Clock) -> None:
    url = site.serve("f", status(503, ("Retry-After", "77")), good())
    download([url], tmp_path / "f", sha256=SHA, patience=patient(clock))
    assert clock.slept == [77.0]


def test_a_retry_after_beyond_the_deadline_ends_the_wait_at_once(site: Site, tmp_path: Path, clock: Clock) -> None:
    url = site.serve("f", status(503, ("Retry-After", "9999")))
    with pytest.raises(RemoteError, match="503"):
        download([url], tmp_path / "f", sha256=SHA, patience=patient(clock))
    assert clock.slept == []


def test_retries_end(site: Site, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(RemoteError, match="503"):
        download([site.serve("f", status(503))], tmp_path / "f", sha256=SHA, patience=patient(clock, tries=3))
    assert len(site.requests) == 3
    assert clock.slept == [0.5, 1.0]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_a_refusal_leads_to_the_next_mirror_at_once(site: Site, tmp_path: Path, clock: Clock, code: int) -> None:
    urls = [site.serve("no", status(code)), site.serve("yes", good())]
    download(urls, tmp_path / "f", sha256=SHA, patience=patient(clock))
    assert clock.slept == []
    assert len(site.requests) == 2


def test_a_reset_leads_to_the_next_mirror_at_once(site: Site, tmp_path: Path, clock: Clock) -> None:
    urls = [site.serve("no", resets), site.serve("yes", good())]
    download(urls, tmp_path / "f", sha256=SHA, patience=patient(clock))
    assert clock.slept == []


def test_the_next_mirror_goes_on_with_the_part_of_the_first(site: Site, tmp_path: Path, clock: Clock) -> None:
    urls = [site.serve("no", breaks_after(1000)), site.serve("yes", good(etag='"two"'))]
    download(urls, tmp_path / "f", sha256=SHA, size=len(DATA), patience=patient(clock))
    assert site.requests == [("/no", None, None), ("/yes", "bytes=1000-", None)]


def test_not_found_is_an_error_of_its_own(site: Site, tmp_path: Path) -> None:
    urls = [site.serve("a", status(404)), (tmp_path / "absent").as_uri()]
    with pytest.raises(NotFound) as caught:
        get(urls, 10)
    assert all(url in str(caught.value) for url in urls)
    with pytest.raises(RemoteError) as mixed:
        get([urls[0], site.serve("b", status(403))], 10)
    assert not isinstance(mixed.value, NotFound)


def test_no_network_is_explained(tmp_path: Path, clock: Clock) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/f"
        with pytest.raises(RemoteError) as caught:
            download([url], tmp_path / "f", sha256=SHA, patience=patient(clock))
    text = str(caught.value)
    assert f"{url} Connection refused" in text
    assert "VZREPRO_MIRRORS" in text
    assert caught.value.exit_code == 105


def test_no_candidate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="cannot download"):
        download([], tmp_path / "f", sha256=SHA)


def test_a_stalling_server_is_left(site: Site, tmp_path: Path, clock: Clock) -> None:
    done = threading.Event()

    def stalls(handler: Handler) -> None:
        handler.head(200, ("Content-Length", str(len(DATA))))
        handler.wfile.write(DATA[:1000])
        handler.wfile.flush()
        done.wait(60)

    urls = [site.serve("stalls", stalls), site.serve("good", good())]
    # Long enough for the good one to answer on a busy machine.
    download(urls, tmp_path / "f", sha256=SHA, size=len(DATA), patience=patient(clock, read_secs=2.0))
    done.set()
    assert site.ranges() == [None, "bytes=1000-"]


def slow(handler: Handler) -> None:
    """A body in pieces that arrive one by one."""
    handler.head(200, ("Content-Length", str(len(DATA))))
    for start in range(0, len(DATA), 65536):
        handler.wfile.write(DATA[start : start + 65536])
        handler.wfile.flush()


def test_a_crawling_server_is_left_for_the_next(site: Site, tmp_path: Path) -> None:
    crawling = Clock(step=100.0)  # each look at the clock takes long: 65536 bytes are too few for that time
    urls = [site.serve("slow", slow), site.serve("good", good())]
    patience = patient(crawling, total_secs=1e9, slow_secs=30.0, min_speed=1 << 20)
    with pytest.raises(RemoteError, match="bytes per second"):
        download(urls[:1], tmp_path / "f", sha256=SHA, size=len(DATA), patience=patience)
    assert part_of(tmp_path / "f").stat().st_size > 0


def test_the_deadline_ends_a_download_that_never_does(site: Site, tmp_path: Path) -> None:
    late = Clock(step=100.0)
    with pytest.raises(RemoteError, match="takes too long"):
        download([site.serve("f", slow)], tmp_path / "f", sha256=SHA, patience=patient(late, slow_secs=1e9))


def test_redirects_are_followed(site: Site, tmp_path: Path) -> None:
    url = site.serve("a", status(302, ("Location", "/b")))
    site.serve("b", status(307, ("Location", f"{site.base}/c")))
    site.serve("c", good())
    part_of(tmp_path / "f").write_bytes(DATA[:10])
    download([url], tmp_path / "f", sha256=SHA)
    assert site.requests[-1] == ("/c", "bytes=10-", None)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://x.example/x", "gopher://x.example"])
def test_redirects_lead_nowhere_but_to_http(site: Site, tmp_path: Path, target: str) -> None:
    with pytest.raises(RemoteError, match="not http or https"):
        get([site.serve("a", status(302, ("Location", target)))], 1 << 20)


def test_a_circle_of_redirects_ends(site: Site) -> None:
    with pytest.raises(RemoteError, match="more than 10 times"):
        get([site.serve("a", status(301, ("Location", "/a")))], 1 << 20)


def test_lying_ranges_are_not_believed(site: Site, tmp_path: Path) -> None:
    def lies(handler: Handler) -> None:
        if handler.headers.get("Range"):
            handler.head(206, ("Content-Length", "3"), ("Content-Range", f"bytes 5-7/{len(DATA)}"))
            handler.wfile.write(b"abc")
        else:
            good()(handler)

    part_of(tmp_path / "f").write_bytes(DATA[:1000])
    download([site.serve("f", lies)], tmp_path / "f", sha256=SHA, size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_part_longer_than_an_unsized_file_starts_over(site: Site, tmp_path: Path) -> None:
    part_of(tmp_path / "f").write_bytes(DATA + b"more")
    download([site.serve("f", good())], tmp_path / "f", sha256=SHA)
    assert site.ranges() == [f"bytes={len(DATA) + 4}-", None]


def test_file_urls_are_read_and_checked(tmp_path: Path) -> None:
    source = tmp_path / "a file"
    source.write_bytes(DATA)
    part_of(tmp_path / "f").write_bytes(DATA[:7])
    download([source.as_uri()], tmp_path / "f", sha256=SHA, size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA
    source.write_bytes(b"x" * len(DATA))
    with pytest.raises(HashMismatch):
        download([source.as_uri()], tmp_path / "g", sha256=SHA, size=len(DATA))
    with pytest.raises(RemoteError, match="not a file on this machine"):
        get(["file://elsewhere.example/x"], 10)


def test_get_never_joins_two_answers(site: Site, clock: Clock) -> None:
    url = site.serve("i", breaks_after(1000, b"old" * 1000, etag=None), good(b"new index"))
    assert get([url], 1 << 20, patience=patient(clock)) == b"new index"
    assert site.ranges() == [None, None]


def test_user_and_password_are_used_and_not_shown(site: Site, tmp_path: Path) -> None:
    sent: list[str | None] = []

    def guarded(handler: Handler) -> None:
        sent.append(handler.headers.get("Authorization"))
        status(401)(handler)

    url = site.serve("f", guarded).replace("http://", "http://user:s%40cret@")
    with pytest.raises(RemoteError) as caught:
        get([url], 10)
    assert sent == ["Basic dXNlcjpzQGNyZXQ="]
    assert "cret" not in str(caught.value)


def test_the_proxy_variables_are_honoured(site: Site) -> None:
    site.behaviours["http://far.example/f"] = good(b"through the proxy")
    proxy = {"http_proxy": site.base, "no_proxy": "127.0.0.1,.near.example"}
    assert get(["http://far.example/f"], 100, http=Http(proxy)) == b"through the proxy"
    direct = site.serve("f", good(b"direct"))
    assert get([direct], 100, http=Http(proxy)) == b"direct"


def test_a_ca_bundle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match=r"absent\.pem"):
        Http({"SSL_CERT_FILE": str(tmp_path / "absent.pem")})


def test_a_full_disk_is_told_as_such(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_part: object, _dest: object) -> None:
        raise AssertionError("nothing may be committed")

    class FullFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, _piece: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = _Part.__init__

    def init(self: _Part, file: Any, *rest: Any) -> None:
        real(self, FullFile(file), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_Part, "__init__", init)
    monkeypatch.setattr(_Part, "commit", full)
    with pytest.raises(VzreproError, match="disk is full") as caught:
        download([site.serve("f", good())], tmp_path / "f", sha256=SHA)
    assert "df -h" in str(caught.value)


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VzreproError, match="cannot write"):
        download(["http://x.example"], tmp_path / "file" / "f", sha256=SHA)


def test_a_second_one_waits_for_the_first_and_takes_its_file(site: Site, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    url = site.serve("f", good())
    with part_of(dest).open("wb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=download, args=([url], dest), kwargs={"sha256": SHA}, daemon=True)
        second.start()
        second.join(0.05)
        assert second.is_alive()
        first.write(DATA)
        first.flush()
        part_of(dest).rename(dest)
    second.join(10)
    assert not second.is_alive()
    assert site.requests == []
    assert not part_of(dest).exists()


def test_a_cancelled_download_keeps_its_part_and_goes_on_later(site: Site, tmp_path: Path) -> None:
    cancel = threading.Event()
    dest = tmp_path / "f"

    def report(done: int, _total: int | None) -> None:
        if done:
            cancel.set()

    url = site.serve("f", slow, good())
    with pytest.raises(Interrupted):
        download([url], dest, sha256=SHA, size=len(DATA), report=report, cancel=cancel)
    kept = part_of(dest).stat().st_size
    assert 0 < kept < len(DATA)
    download([url], dest, sha256=SHA, size=len(DATA))
    assert site.ranges() == [None, f"bytes={kept}-"]
    assert dest.read_bytes() == DATA


def test_many_files_arrive_and_progress_is_their_sum(site: Site, tmp_path: Path) -> None:
    items = []
    for number in range(20):
        data = DATA[: 1000 + number]
        url = site.serve(str(number), good(data))
        items.append(Download((url,), tmp_path / str(number), FileHash.of(data), len(data)))
    seen: list[tuple[int, int | None]] = []
    download_all(items, jobs=3, report=lambda done, total: seen.append((done, total)))
    assert [item.dest.read_bytes() for item in items] == [DATA[: 1000 + number] for number in range(20)]
    whole = sum(1000 + number for number in range(20))
    assert max(seen) == (whole, whole)


def test_no_files_are_no_work() -> None:
    download_all([])


def test_the_first_error_stops_the_others(site: Site, tmp_path: Path) -> None:
    started = threading.Event()

    def crawls(handler: Handler) -> None:
        handler.head(200, ("Content-Length", str(len(DATA))))
        for byte in range(1000):
            handler.wfile.write(DATA[byte : byte + 1])
            handler.wfile.flush()
            started.set()
            threading.Event().wait(0.01)

    def fails(handler: Handler) -> None:
        started.wait(10)
        status(404)(handler)

    items = [
        Download((site.serve("slow", crawls),), tmp_path / "slow", SHA, len(DATA)),
        Download((site.serve("gone", fails),), tmp_path / "gone", SHA),
        *(Download((site.serve(f"later-{i}", good()),), tmp_path / f"later-{i}", SHA) for i in range(5)),
    ]
    with pytest.raises(NotFound):
        download_all(items, jobs=2)
    assert {path for path, _, _ in site.requests} == {"/slow", "/gone"}
    assert part_of(tmp_path / "slow").exists()


def test_stopping_all_downloads_does_not_wait_for_a_silent_server(site: Site, tmp_path: Path) -> None:
    asked, release, cancel = threading.Event(), threading.Event(), threading.Event()

    def silent(_handler: Handler) -> None:
        asked.set()
        release.wait(10)

    item = Download((site.serve("silent", silent),), tmp_path / "f", SHA)

    def stop_when_asked() -> None:
        asked.wait(10)
        cancel.set()

    threading.Thread(target=stop_when_asked, daemon=True).start()
    try:
        with pytest.raises(Interrupted):
            download_all([item], cancel=cancel)
        assert not release.is_set()
    finally:
        release.set()


def test_what_was_being_downloaded_when_all_were_stopped_is_not_there(tmp_path: Path) -> None:
    """The last ones leave nothing waiting, and end as soon as they are told to."""
    (tmp_path / "source").write_bytes(DATA)
    cancel = threading.Event()

    def stop(_done: int, _total: int | None) -> None:
        cancel.set()
        threading.Event().wait(0.3)

    with pytest.raises(Interrupted):
        download_all(
            [Download(((tmp_path / "source").as_uri(),), tmp_path / "f", SHA, len(DATA))], report=stop, cancel=cancel
        )
    assert not (tmp_path / "f").exists()


def test_served_asks_without_reading(site: Site, tmp_path: Path) -> None:
    there, gone = site.serve("there", good()), site.serve("gone", status(404))
    assert served([gone, there])
    assert not served([gone])
    assert not served([(tmp_path / "nothing").as_uri(), gone])
    (tmp_path / "file").write_bytes(DATA)
    assert served([gone, (tmp_path / "file").as_uri()])


def test_a_place_that_cannot_be_asked_may_have_it(site: Site) -> None:
    assert served([site.serve("gone", status(404)), "http://127.0.0.1:9/file"])
