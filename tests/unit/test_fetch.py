"""Downloads against a real HTTP server that misbehaves: right bytes or one clear error, never anything else."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import PATIENCE_SECS, faults
from tests.faults import Answer, Exchange, Fault, FaultyProxy
from vzrepro.base.errors import HashMismatch, Interrupted, RemoteError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.net.http import Http
from vzrepro.sources.fetch import Download, NotFound, RetryPolicy, download, download_all, get, served
from vzrepro.sources.fetch.part import Part

DATA = bytes(range(256)) * 4096  # 1 MiB
SHA = FileHash.of(DATA)
ETAG = '"one"'


@pytest.fixture
def site() -> Iterator[FaultyProxy]:
    with FaultyProxy() as site:
        yield site


def asked(site: FaultyProxy) -> list[tuple[str, str | None, str | None]]:
    """Path, range and condition of each request."""
    return [(seen.path, seen.range, seen.if_range) for seen in site.requests]


def ranges(site: FaultyProxy) -> list[str | None]:
    return [seen.range for seen in site.requests]


def good(data: bytes = DATA, etag: str | None = ETAG) -> Fault:
    """A server as it should be, with ranges."""
    return faults.serves(data, etag)


def rangeless(data: bytes = DATA) -> Fault:
    return lambda exchange: exchange.give(Answer(200, {"content-length": str(len(data))}, data))


def breaks_after(count: int, data: bytes = DATA, etag: str | None = ETAG) -> Fault:
    """Sends `count` bytes of the rest, then ends the connection: cleanly, so that what was sent is sure to arrive."""

    def fault(exchange: Exchange) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", exchange.headers.get("range", ""))
        start = int(match[1]) if match else 0
        told = {"content-length": str(len(data) - start)} | ({} if etag is None else {"etag": etag})
        if match:
            told["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        exchange.send(Answer(206 if match else 200, told, b"").head, data[start : start + count])

    return fault


def endless(exchange: Exchange) -> None:
    exchange.send(Answer(200, {"transfer-encoding": "chunked"}, b"").head)
    for _ in range(1000):
        exchange.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")


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


def patient(clock: Clock, **changes: Any) -> RetryPolicy:
    return RetryPolicy(clock=clock, sleep=clock.sleep, jitter=lambda _low, high: high, **changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def part_of(dest: Path) -> Path:
    return dest.with_name(dest.name + ".part")


def test_a_file_arrives_whole_and_progress_ends_at_its_size(site: FaultyProxy, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    dest = tmp_path / "new" / SHA.hex
    download([site.serve_at("f", good())], dest, sha256=SHA, report=lambda done, total: seen.append((done, total)))
    assert dest.read_bytes() == DATA
    assert seen[0] == (0, len(DATA))
    assert seen[-1] == (len(DATA), len(DATA))
    assert not part_of(dest).exists()


def test_a_file_that_is_there_is_verified_and_not_asked_for(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(DATA)
    download([site.serve_at("f", good())], dest, sha256=SHA, size=len(DATA))
    assert asked(site) == []


def test_a_wrong_file_that_is_there_is_replaced(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(b"x" + DATA[1:])
    download([site.serve_at("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA


def test_a_wrong_file_that_is_there_stays_when_nothing_better_comes(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    dest.write_bytes(b"old")
    with pytest.raises(NotFound):
        download([site.serve_at("f", faults.status(404))], dest, sha256=SHA)
    assert dest.read_bytes() == b"old"
    assert not part_of(dest).exists()


def test_a_part_is_gone_on_from(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    download([site.serve_at("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA
    assert asked(site) == [("/f", "bytes=1000-", None)]


def test_a_complete_part_needs_no_request(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA)
    download([site.serve_at("f", good())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA
    assert asked(site) == []


def test_a_connection_that_breaks_is_resumed_under_the_same_etag(
    site: FaultyProxy, tmp_path: Path, clock: Clock
) -> None:
    url = site.serve_at("f", breaks_after(1000), breaks_after(2000), good())
    download([url], tmp_path / "f", sha256=SHA, size=len(DATA), policy=patient(clock))
    assert (tmp_path / "f").read_bytes() == DATA
    assert asked(site) == [("/f", None, None), ("/f", "bytes=1000-", ETAG), ("/f", "bytes=3000-", ETAG)]


def test_a_changed_etag_starts_over(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    url = site.serve_at("f", breaks_after(1000, b"old" * 99999, etag='"old"'), good())
    download([url], tmp_path / "f", sha256=SHA, policy=patient(clock))
    assert (tmp_path / "f").read_bytes() == DATA
    assert asked(site)[1] == ("/f", "bytes=1000-", '"old"')


def test_many_breaks_are_fine_as_long_as_bytes_come(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    url = site.serve_at("f", *[breaks_after(100_000)] * 12)
    download([url], tmp_path / "f", sha256=SHA, size=len(DATA), policy=patient(clock, tries=2))
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_server_without_ranges_starts_over(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    download([site.serve_at("f", rangeless())], dest, sha256=SHA, size=len(DATA))
    assert dest.read_bytes() == DATA


@pytest.mark.parametrize("size", [len(DATA), None])
@pytest.mark.parametrize("junk", [b"junk", b"x" * len(DATA), b"x" * (len(DATA) + 5)])
def test_a_part_with_other_bytes_costs_one_start_from_scratch(
    site: FaultyProxy, tmp_path: Path, junk: bytes, size: int | None
) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(junk)
    download([site.serve_at("f", good())], dest, sha256=SHA, size=size)
    assert dest.read_bytes() == DATA
    assert ranges(site)[-1] is None
    assert len(asked(site)) <= 2


def test_wrong_bytes_lead_to_the_next_mirror(site: FaultyProxy, tmp_path: Path) -> None:
    wrong = site.serve_at("wrong", good(b"x" * len(DATA)))
    download([wrong, site.serve_at("right", good())], tmp_path / "f", sha256=SHA, size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA
    assert [seen.path for seen in site.requests] == ["/wrong", "/right"]


def test_wrong_bytes_everywhere_name_wanted_found_and_every_url(site: FaultyProxy, tmp_path: Path) -> None:
    other = b"x" * len(DATA)
    urls = [site.serve_at("wrong", good(other)), site.serve_at("none", faults.status(404))]
    dest = tmp_path / "f"
    with pytest.raises(HashMismatch) as caught:
        download(urls, dest, sha256=SHA, size=len(DATA))
    text = str(caught.value)
    for part in (SHA.hex, hashlib.sha256(other).hexdigest(), *urls, "404", "VZREPRO_MIRRORS"):
        assert part in text
    assert caught.value.exit_code == 102
    assert not dest.exists()
    assert not part_of(dest).exists()


def test_another_size_is_seen_before_the_first_byte(site: FaultyProxy, tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match=f"wanted {len(DATA)} bytes, found 5 bytes"):
        download([site.serve_at("f", good(b"short"))], tmp_path / "f", sha256=SHA, size=len(DATA))


def test_a_size_that_changes_under_a_range_keeps_the_part_for_other_mirrors(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    part_of(dest).write_bytes(DATA[:1000])
    longer = site.serve_at("longer", good(DATA + b"more"))
    download([longer, site.serve_at("right", good())], dest, sha256=SHA, size=len(DATA))
    assert ranges(site) == ["bytes=1000-", "bytes=1000-"]


def test_an_endless_body_is_cut_at_the_size(site: FaultyProxy, tmp_path: Path) -> None:
    with pytest.raises(HashMismatch, match="found more"):
        download([site.serve_at("f", endless)], tmp_path / "f", sha256=SHA, size=len(DATA))
    with pytest.raises(RemoteError, match="more than 100000 bytes"):
        get([site.serve_at("g", endless)], 100_000)


def test_a_truncated_body_without_length_is_not_taken_for_the_file(
    site: FaultyProxy, tmp_path: Path, clock: Clock
) -> None:
    def short(exchange: Exchange) -> None:
        exchange.send(Answer(200, {"connection": "close"}, b"").head, DATA[:1000])

    with pytest.raises(RemoteError, match="cannot download") as caught:
        download([site.serve_at("f", short)], tmp_path / "f", sha256=SHA, size=len(DATA), policy=patient(clock))
    assert f"ends after 1000 of {len(DATA)} bytes" in str(caught.value)


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_later(site: FaultyProxy, tmp_path: Path, clock: Clock, code: int) -> None:
    url = site.serve_at("f", faults.status(code), faults.status(code), good())
    download([url], tmp_path / "f", sha256=SHA, policy=patient(clock, backoff_secs=0.5))
    assert clock.slept == [0.5, 1.0]


def test_retry_after_is_honoured(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    url = site.serve_at("f", faults.status(503, retry_after="77"), good())
    download([url], tmp_path / "f", sha256=SHA, policy=patient(clock))
    assert clock.slept == [77.0]


def test_a_retry_after_beyond_the_deadline_ends_the_wait_at_once(
    site: FaultyProxy, tmp_path: Path, clock: Clock
) -> None:
    url = site.serve_at("f", faults.status(503, retry_after="9999"))
    with pytest.raises(RemoteError, match="503"):
        download([url], tmp_path / "f", sha256=SHA, policy=patient(clock))
    assert clock.slept == []


def test_retries_end(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(RemoteError, match="503"):
        download([site.serve_at("f", faults.status(503))], tmp_path / "f", sha256=SHA, policy=patient(clock, tries=3))
    assert len(asked(site)) == 3
    assert clock.slept == [0.5, 1.0]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 501])
def test_a_refusal_leads_to_the_next_mirror_at_once(site: FaultyProxy, tmp_path: Path, clock: Clock, code: int) -> None:
    urls = [site.serve_at("no", faults.status(code)), site.serve_at("yes", good())]
    download(urls, tmp_path / "f", sha256=SHA, policy=patient(clock))
    assert clock.slept == []
    assert len(asked(site)) == 2


def test_a_reset_leads_to_the_next_mirror_at_once(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    urls = [site.serve_at("no", faults.refuses), site.serve_at("yes", good())]
    download(urls, tmp_path / "f", sha256=SHA, policy=patient(clock))
    assert clock.slept == []


def test_the_next_mirror_goes_on_with_the_part_of_the_first(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    urls = [site.serve_at("no", breaks_after(1000)), site.serve_at("yes", good(etag='"two"'))]
    download(urls, tmp_path / "f", sha256=SHA, size=len(DATA), policy=patient(clock))
    assert asked(site) == [("/no", None, None), ("/yes", "bytes=1000-", None)]


def test_not_found_is_an_error_of_its_own(site: FaultyProxy, tmp_path: Path) -> None:
    urls = [site.serve_at("a", faults.status(404)), (tmp_path / "absent").as_uri()]
    with pytest.raises(NotFound) as caught:
        get(urls, 10)
    assert all(url in str(caught.value) for url in urls)
    with pytest.raises(RemoteError) as mixed:
        get([urls[0], site.serve_at("b", faults.status(403))], 10)
    assert not isinstance(mixed.value, NotFound)


def test_no_network_is_explained(tmp_path: Path, clock: Clock) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/f"
        with pytest.raises(RemoteError) as caught:
            download([url], tmp_path / "f", sha256=SHA, policy=patient(clock))
    text = str(caught.value)
    assert f"{url} Connection refused" in text
    assert "VZREPRO_MIRRORS" in text
    assert caught.value.exit_code == 105


def test_no_candidate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="cannot download"):
        download([], tmp_path / "f", sha256=SHA)


def test_a_stalling_server_is_left(site: FaultyProxy, tmp_path: Path, clock: Clock) -> None:
    def stalls(exchange: Exchange) -> None:
        exchange.send(Answer(200, {"content-length": str(len(DATA))}, b"").head, DATA[:1000])
        exchange.proxy.over.wait()

    urls = [site.serve_at("stalls", stalls), site.serve_at("good", good())]
    # Long enough for the good one to answer on a busy machine.
    download(urls, tmp_path / "f", sha256=SHA, size=len(DATA), policy=patient(clock, read_secs=2.0))
    assert ranges(site) == [None, "bytes=1000-"]


def slow(exchange: Exchange) -> None:
    """A body in pieces that arrive one by one."""
    exchange.send(Answer(200, {"content-length": str(len(DATA))}, b"").head)
    for start in range(0, len(DATA), 65536):
        exchange.send(DATA[start : start + 65536])


def test_a_crawling_server_is_left_for_the_next(site: FaultyProxy, tmp_path: Path) -> None:
    crawling = Clock(step=100.0)  # each look at the clock takes long: 65536 bytes are too few for that time
    urls = [site.serve_at("slow", slow), site.serve_at("good", good())]
    policy = patient(crawling, total_secs=1e9, slow_secs=30.0, min_speed=1 << 20)
    with pytest.raises(RemoteError, match="bytes per second"):
        download(urls[:1], tmp_path / "f", sha256=SHA, size=len(DATA), policy=policy)
    assert part_of(tmp_path / "f").stat().st_size > 0


def test_the_deadline_ends_a_download_that_never_does(site: FaultyProxy, tmp_path: Path) -> None:
    late = Clock(step=100.0)
    with pytest.raises(RemoteError, match="takes too long"):
        download([site.serve_at("f", slow)], tmp_path / "f", sha256=SHA, policy=patient(late, slow_secs=1e9))


def test_redirects_are_followed(site: FaultyProxy, tmp_path: Path) -> None:
    url = site.serve_at("a", faults.redirects("/b"))
    site.serve_at("b", faults.status(307, location=f"{site.url}/c"))
    site.serve_at("c", good())
    part_of(tmp_path / "f").write_bytes(DATA[:10])
    download([url], tmp_path / "f", sha256=SHA)
    assert asked(site)[-1] == ("/c", "bytes=10-", None)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://x.example/x", "gopher://x.example"])
def test_redirects_lead_nowhere_but_to_http(site: FaultyProxy, tmp_path: Path, target: str) -> None:
    with pytest.raises(RemoteError, match="not http or https"):
        get([site.serve_at("a", faults.redirects(target))], 1 << 20)


def test_a_circle_of_redirects_ends(site: FaultyProxy) -> None:
    with pytest.raises(RemoteError, match="more than 10 times"):
        get([site.serve_at("a", faults.status(301, location="/a"))], 1 << 20)


def test_lying_ranges_are_not_believed(site: FaultyProxy, tmp_path: Path) -> None:
    def lies(exchange: Exchange) -> None:
        if "range" in exchange.headers:
            told = {"content-length": "3", "content-range": f"bytes 5-7/{len(DATA)}"}
            exchange.give(Answer(206, told, b"abc"))
        else:
            good()(exchange)

    part_of(tmp_path / "f").write_bytes(DATA[:1000])
    download([site.serve_at("f", lies)], tmp_path / "f", sha256=SHA, size=len(DATA))
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_part_longer_than_an_unsized_file_starts_over(site: FaultyProxy, tmp_path: Path) -> None:
    part_of(tmp_path / "f").write_bytes(DATA + b"more")
    download([site.serve_at("f", good())], tmp_path / "f", sha256=SHA)
    assert ranges(site) == [f"bytes={len(DATA) + 4}-", None]


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


@pytest.mark.parametrize("url", ["http://[", "file://[x", "http://user:secret@[/", "file:///a%00b", "http://h:99999/"])
def test_what_is_no_url_is_one_error(url: str) -> None:
    with pytest.raises(RemoteError, match="cannot download") as caught:
        get([url], 10)
    assert "secret" not in str(caught.value)


def test_get_never_joins_two_answers(site: FaultyProxy, clock: Clock) -> None:
    url = site.serve_at("i", breaks_after(1000, b"old" * 1000, etag=None), good(b"new index"))
    assert get([url], 1 << 20, policy=patient(clock)) == b"new index"
    assert ranges(site) == [None, None]


def test_user_and_password_are_used_and_not_shown(site: FaultyProxy, tmp_path: Path) -> None:
    sent: list[str | None] = []

    def guarded(exchange: Exchange) -> None:
        sent.append(exchange.headers.get("authorization"))
        faults.status(401)(exchange)

    url = site.serve_at("f", guarded).replace("http://", "http://user:s%40cret@")
    with pytest.raises(RemoteError) as caught:
        get([url], 10)
    assert sent == ["Basic dXNlcjpzQGNyZXQ="]
    assert "cret" not in str(caught.value)


def test_the_proxy_variables_are_honoured(site: FaultyProxy) -> None:
    site.on("http://far.example/f", good(b"through the proxy"))
    proxy = {"http_proxy": site.url, "no_proxy": "127.0.0.1,.near.example"}
    assert get(["http://far.example/f"], 100, http=Http(proxy)) == b"through the proxy"
    direct = site.serve_at("f", good(b"direct"))
    assert get([direct], 100, http=Http(proxy)) == b"direct"


def test_a_ca_bundle_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(VzreproError, match=r"absent\.pem"):
        Http({"SSL_CERT_FILE": str(tmp_path / "absent.pem")})


def test_a_full_disk_is_told_as_such(site: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_part: object, _dest: object) -> None:
        raise AssertionError("nothing may be committed")

    class FullFile:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, _piece: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = Part.__init__

    def init(self: Part, file: Any, *rest: Any) -> None:
        real(self, FullFile(file), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Part, "__init__", init)
    monkeypatch.setattr(Part, "commit", full)
    with pytest.raises(VzreproError, match="disk is full") as caught:
        download([site.serve_at("f", good())], tmp_path / "f", sha256=SHA)
    assert "df -h" in str(caught.value)


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(VzreproError, match="cannot write"):
        download(["http://x.example"], tmp_path / "file" / "f", sha256=SHA)


def test_a_second_one_waits_for_the_first_and_takes_its_file(site: FaultyProxy, tmp_path: Path) -> None:
    dest = tmp_path / "f"
    url = site.serve_at("f", good())
    with part_of(dest).open("wb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=download, args=([url], dest), kwargs={"sha256": SHA}, daemon=True)
        second.start()
        second.join(0.05)
        assert second.is_alive()
        first.write(DATA)
        first.flush()
        part_of(dest).rename(dest)
    second.join(PATIENCE_SECS)
    assert not second.is_alive()
    assert asked(site) == []
    assert not part_of(dest).exists()


def test_a_cancelled_download_keeps_its_part_and_goes_on_later(site: FaultyProxy, tmp_path: Path) -> None:
    cancel = threading.Event()
    dest = tmp_path / "f"

    def report(done: int, _total: int | None) -> None:
        if done:
            cancel.set()

    url = site.serve_at("f", slow, good())
    with pytest.raises(Interrupted):
        download([url], dest, sha256=SHA, size=len(DATA), report=report, cancel=cancel)
    kept = part_of(dest).stat().st_size
    assert 0 < kept < len(DATA)
    download([url], dest, sha256=SHA, size=len(DATA))
    assert ranges(site) == [None, f"bytes={kept}-"]
    assert dest.read_bytes() == DATA


def test_many_files_arrive_and_progress_is_their_sum(site: FaultyProxy, tmp_path: Path) -> None:
    items = []
    for number in range(20):
        data = DATA[: 1000 + number]
        url = site.serve_at(str(number), good(data))
        items.append(Download((url,), tmp_path / str(number), FileHash.of(data), len(data)))
    seen: list[tuple[int, int | None]] = []
    download_all(items, jobs=3, report=lambda done, total: seen.append((done, total)))
    assert [item.dest.read_bytes() for item in items] == [DATA[: 1000 + number] for number in range(20)]
    whole = sum(1000 + number for number in range(20))
    assert max(seen) == (whole, whole)


def test_no_files_are_no_work() -> None:
    download_all([])


def test_the_first_error_stops_the_others(site: FaultyProxy, tmp_path: Path) -> None:
    started = threading.Event()

    def crawls(exchange: Exchange) -> None:
        exchange.send(Answer(200, {"content-length": str(len(DATA))}, b"").head, DATA[:1])
        started.set()
        exchange.drip(DATA[1:1000], 0.01)

    def fails(exchange: Exchange) -> None:
        started.wait(PATIENCE_SECS)
        faults.status(404)(exchange)

    items = [
        Download((site.serve_at("slow", crawls),), tmp_path / "slow", SHA, len(DATA)),
        Download((site.serve_at("gone", fails),), tmp_path / "gone", SHA),
        *(Download((site.serve_at(f"later-{i}", good()),), tmp_path / f"later-{i}", SHA) for i in range(5)),
    ]
    with pytest.raises(NotFound):
        download_all(items, jobs=2)
    assert {seen.path for seen in site.requests} == {"/slow", "/gone"}
    assert part_of(tmp_path / "slow").exists()


def test_stopping_all_downloads_does_not_wait_for_a_silent_server(site: FaultyProxy, tmp_path: Path) -> None:
    asked, release, cancel = threading.Event(), threading.Event(), threading.Event()

    def silent(_exchange: Exchange) -> None:
        asked.set()
        release.wait(PATIENCE_SECS)

    item = Download((site.serve_at("silent", silent),), tmp_path / "f", SHA)

    def stop_when_asked() -> None:
        asked.wait(PATIENCE_SECS)
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


def test_served_asks_without_reading(site: FaultyProxy, tmp_path: Path) -> None:
    there, gone = site.serve_at("there", good()), site.serve_at("gone", faults.status(404))
    assert served([gone, there])
    assert not served([gone])
    assert not served([(tmp_path / "nothing").as_uri(), gone])
    (tmp_path / "file").write_bytes(DATA)
    assert served([gone, (tmp_path / "file").as_uri()])


def test_a_place_that_cannot_be_asked_may_have_it(site: FaultyProxy) -> None:
    assert served([site.serve_at("gone", faults.status(404)), "http://127.0.0.1:9/file"])
