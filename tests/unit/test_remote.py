"""What failures of a remote place may cost, and entries that arrive in pieces: over a server with faults."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from pathlib import Path

import pytest

from tests import PATIENCE_SECS, faults
from tests.contract.served import Serving
from tests.faults import FaultyProxy
from vzrepro.base.errors import Interrupted, RemoteError, UsageError
from vzrepro.cache import remote
from vzrepro.cache.http import HttpBackend
from vzrepro.cache.places import is_writable, open_backend
from vzrepro.cache.remote import PIECE, EntryStream, Patience
from vzrepro.net import AttemptFailed, Body
from vzrepro.net.engine import MIN_SPEED

BIG = os.urandom(1000) * (5 * PIECE // 1000) + b"end"  # more than the pieces that are on their way at once
SMALL = b"StorePath: /nix/store/x\n"


class Clock(threading.Event):
    """Time that passes only when it is waited for, and the event that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.slept: list[float] = []
        self.hook: Callable[[], object] | None = None

    def __call__(self) -> float:
        return self.now

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()
            return self.is_set()
        self.slept.append(timeout)
        self.now += timeout
        return self.is_set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def patient(clock: Clock, secs: float = 30.0) -> Patience:
    """Waits as long as the jitter ever lets it."""
    return Patience(secs, stop=clock, clock=clock, jitter=lambda _low, high: high)


def failing(times: int, failure: AttemptFailed | None = None) -> Callable[[], str]:
    """Fails so often, then gives "done"."""
    left = [failure or AttemptFailed("is busy", again=True)] * times

    def act() -> str:
        if left:
            raise left.pop()
        return "done"

    return act


# --- patience ---------------------------------------------------------------------------------------------------------


def test_pauses_grow_to_a_limit(clock: Clock) -> None:
    assert patient(clock, 100).attempt("place", failing(8)) == "done"
    assert clock.slept == [0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]


def test_pauses_are_drawn_from_all_between_nothing_and_the_limit(clock: Clock) -> None:
    drawn: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    Patience(30, stop=clock, clock=clock, jitter=jitter).attempt("place", failing(3))
    assert drawn == [(0.0, 0.4), (0.0, 0.8), (0.0, 1.6)]
    assert clock.slept == [0.0, 0.0, 0.0]


def test_a_server_that_says_when_is_asked_then(clock: Clock) -> None:
    failure = AttemptFailed("is busy", again=True, after=7.5)
    assert patient(clock).attempt("place", failing(2, failure)) == "done"
    assert clock.slept == [7.5, 7.5]


def test_what_takes_longer_than_patience_lasts_is_not_waited_for(clock: Clock) -> None:
    with pytest.raises(RemoteError, match=r"^place is busy$"):
        patient(clock).attempt("place", failing(9, AttemptFailed("is busy", again=True, after=31)))
    assert clock.slept == []


def test_what_cannot_get_better_is_not_tried_again(clock: Clock) -> None:
    with pytest.raises(RemoteError) as caught:
        patient(clock).attempt("place", failing(1, AttemptFailed("refuses", again=False, hint="log in")))
    assert (caught.value.message, caught.value.hint, clock.slept) == ("place refuses", "log in", [])


def test_patience_ends_and_stays_ended(clock: Clock) -> None:
    patience = patient(clock, 10)
    with pytest.raises(RemoteError):
        patience.attempt("place", failing(1000))
    assert sum(clock.slept) <= 10
    for _ in range(10):
        with pytest.raises(RemoteError):
            patience.attempt("place", failing(1000))
    assert 9 < sum(clock.slept) < 10.01


def test_time_that_an_attempt_itself_takes_counts(clock: Clock) -> None:
    tries = 0

    def stall() -> None:
        nonlocal tries
        tries += 1
        clock.now += 10
        raise AttemptFailed("stalls", again=True)

    with pytest.raises(RemoteError):
        patient(clock, 30).attempt("place", stall)
    assert tries == 3


def test_time_between_failures_that_nobody_waits_in_does_not_count(clock: Clock) -> None:
    patience = patient(clock, 10)
    for _ in range(5):
        assert patience.attempt("place", failing(2)) == "done"
        clock.now += 3600
        with pytest.raises(RemoteError):
            patience.attempt("place", failing(1, AttemptFailed("refuses", again=False)))
        clock.now += 3600
    assert sum(clock.slept) == pytest.approx(6.0)


def test_the_sum_over_many_entries_is_what_ends(clock: Clock) -> None:
    patience = patient(clock, 10)
    with pytest.raises(RemoteError):
        for _ in range(100):
            patience.attempt("place", failing(2))  # 1.2 seconds each
    assert 8 < sum(clock.slept) < 10.01


def test_threads_share_one_patience(clock: Clock) -> None:
    patience = patient(clock, 10)

    def one(_number: int) -> None:
        with pytest.raises(RemoteError):
            patience.attempt("place", failing(1000))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert sum(clock.slept) <= 10 + 8 * 5  # one last pause each, which all have found that patience still has


def test_a_success_elsewhere_ends_the_count_of_an_attempt_that_began_before(clock: Clock) -> None:
    patience = patient(clock, 10)
    outcomes = iter([AttemptFailed("breaks off", again=True), "done"])

    def slow() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, AttemptFailed):
            clock.now += 100  # a long download, during which others succeed
            patience.attempt("place", lambda: None)
            raise outcome
        return outcome

    assert patience.attempt("place", slow) == "done"


def test_stopping_ends_the_waiting(clock: Clock) -> None:
    def act() -> None:
        clock.set()
        raise AttemptFailed("is busy", again=True)

    with pytest.raises(Interrupted):
        patient(clock).attempt("place", act)
    with pytest.raises(Interrupted):
        patient(clock).attempt("place", failing(0))


def test_stopping_ends_a_real_wait() -> None:
    stop = threading.Event()
    patience = Patience(1000, stop=stop, jitter=lambda _low, _high: 900.0)
    threading.Timer(0.05, stop.set).start()
    with pytest.raises(Interrupted):
        patience.attempt("place", failing(1000))


def trickle(clock: Clock, pieces: list[tuple[float, bytes]]) -> Body:
    """A body whose pieces take so many seconds each."""
    left = iter(pieces)

    def read() -> bytes:
        secs, data = next(left, (0.0, b""))
        clock.now += secs
        return data

    return Body(0, None, None, read, lambda: None)


def test_a_body_that_crawls_is_a_failure(clock: Clock) -> None:
    held = bytearray()
    with pytest.raises(AttemptFailed, match="fewer than 4096 bytes per second"):
        patient(clock).read_into(held, trickle(clock, [(1.0, b"x" * 100)] * 1000), 1 << 20)
    assert len(held) == 1000  # for ten seconds, a third of the patience


def test_a_slow_body_is_none(clock: Clock) -> None:
    held = bytearray()
    assert not patient(clock).read_into(held, trickle(clock, [(1.0, b"x" * 17_000)] * 60), 2 << 20)
    assert len(held) == 1_020_000


def test_what_came_in_good_time_is_not_lost_time_when_it_breaks_off(clock: Clock) -> None:
    patience = patient(clock, 10)
    bodies = iter([[(1.0, b"x" * 20_000)] * 60, [(1.0, b"x" * 20_000)] * 40])
    held = bytearray()

    def act() -> None:
        body = next(bodies)
        if not patience.read_into(held, trickle(clock, body), 2_000_000):
            raise AttemptFailed("breaks off", again=True)

    patience.attempt("place", act)
    assert len(held) == 2_000_000
    assert clock.slept == [0.4]


@pytest.mark.parametrize("size", [5_000, 16_000])
def test_what_comes_slowly_costs_patience(clock: Clock, size: int) -> None:
    """All the time that it takes longer than it would at 16 KiB/s: what the place is left for has cost no more."""
    patience, begun, held = patient(clock, 10), clock.now, bytearray()
    with pytest.raises(AttemptFailed, match="too slow") as caught:
        patience.read_into(held, trickle(clock, [(1.0, b"x" * size)] * 1000), 1 << 30)
    assert not caught.value.again
    assert 10 < clock.now - begun - len(held) / MIN_SPEED < 11
    with pytest.raises(RemoteError, match="too slow"):
        patience.attempt("place", lambda: patience.read_into(held, trickle(clock, [(2.0, b"x")]), 1 << 30))


def test_answers_that_come_slowly_cost_patience_beyond_a_second_each(clock: Clock) -> None:
    patience = patient(clock, 10)

    def ask(secs: float) -> None:
        patience.attempt("place", lambda: patience.answer(lambda: clock.wait(secs)))

    for _ in range(1000):
        ask(0.9)
    with pytest.raises(RemoteError, match="too slow"):
        for _ in range(12):
            ask(2.0)


def test_bodies_that_come_at_once_are_judged_together(clock: Clock) -> None:
    """Eight that share a slow line."""
    patience = patient(clock, 10)
    bodies = [patience.pieces(trickle(clock, [(0.125, b"x" * 4096)] * 100)) for _ in range(8)]
    for pieces in zip(*bodies, strict=True):
        assert pieces == (b"x" * 4096,) * 8
    assert clock.now > 1099


# --- entries in pieces ------------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[FaultyProxy]:
    root = tmp_path / "cache"
    (root / "nar").mkdir(parents=True)
    (root / "nar" / "big").write_bytes(BIG)
    (root / "nar" / "piece").write_bytes(BIG[:PIECE])
    (root / "nar" / "empty").write_bytes(b"")
    (root / "log").mkdir()
    (root / "log" / "big").write_bytes(BIG)
    (root / "nix-cache-info").write_bytes(b"StoreDir: /nix/store\n")
    (root / "a.narinfo").write_bytes(SMALL)
    with Serving(root) as serving, FaultyProxy(serving.url) as proxy:
        yield proxy


@pytest.fixture
def backend(proxy: FaultyProxy, clock: Clock) -> HttpBackend:
    return HttpBackend(proxy.url, patient(clock))


def content(backend: HttpBackend, key: str, size: int = 1 << 20) -> bytes | None:
    opened = backend.get(key)
    if opened is None:
        return None
    with opened as stream:
        return b"".join(iter(lambda: stream.read(size), b""))


def test_a_small_entry_is_one_plain_request(backend: HttpBackend, proxy: FaultyProxy) -> None:
    assert content(backend, "a.narinfo") == SMALL
    assert content(backend, "b.narinfo") is None
    assert [(seen.method, seen.range) for seen in proxy.requests] == [("GET", None)] * 2


def test_a_large_one_comes_in_pieces(backend: HttpBackend, proxy: FaultyProxy) -> None:
    assert content(backend, "nar/big", 100_000) == BIG
    spans = [f"bytes={start}-{min(start + PIECE, len(BIG)) - 1}" for start in range(0, len(BIG), PIECE)]
    assert proxy.requests[0].range == f"bytes=0-{PIECE - 1}"
    assert {seen.range for seen in proxy.requests[1:]} == set(spans[1:])


@pytest.mark.parametrize(("key", "size"), [("nar/piece", PIECE), ("nar/empty", 0)])
def test_what_fits_into_one_piece_is_one_request(backend: HttpBackend, proxy: FaultyProxy, key: str, size: int) -> None:
    assert content(backend, key) == BIG[:size]
    assert len(proxy.requests) == 1


def test_a_log_is_read_in_order_from_one_answer(backend: HttpBackend, proxy: FaultyProxy) -> None:
    assert content(backend, "log/big") == BIG
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("key", ["nar/big", "log/big"])
@pytest.mark.parametrize("fault", [faults.ignores_ranges, faults.without_lengths])
def test_a_server_without_ranges_serves_as_well(
    backend: HttpBackend, proxy: FaultyProxy, key: str, fault: faults.Fault
) -> None:
    proxy.on("*", fault)
    assert content(backend, key) == BIG
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("key", ["nar/big", "log/big"])
@pytest.mark.parametrize("fault", [faults.cuts(70_001), faults.resets_after(PIECE // 2), faults.status(503)])
def test_an_entry_goes_on_where_it_broke_off(
    backend: HttpBackend, proxy: FaultyProxy, clock: Clock, key: str, fault: faults.Fault
) -> None:
    proxy.on("*", fault, faults.passes, fault, fault, faults.passes)
    assert content(backend, key) == BIG
    assert clock.slept


def test_what_has_arrived_is_not_asked_for_again(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("/log/big", faults.cuts(PIECE + 5), faults.passes)
    assert content(backend, "log/big") == BIG
    assert [seen.range for seen in proxy.requests] == [None, f"bytes={PIECE + 5}-"]


def test_without_ranges_what_is_there_already_is_skipped(backend: HttpBackend, proxy: FaultyProxy) -> None:
    def cut(exchange: faults.Exchange) -> None:
        answer = exchange.ask(drop=["range", "if-range"]).but(etag=None)
        exchange.send(answer.head, answer.body[: 2 * PIECE + 7])

    proxy.on("*", cut, faults.ignores_ranges)
    assert content(backend, "nar/big") == BIG
    assert len(proxy.requests) == 2


def test_pieces_that_come_whole_are_not_read_for_ever(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("*", faults.passes, faults.ignores_ranges)
    with pytest.raises(RemoteError, match="whole entry"):
        content(backend, "nar/big")


@pytest.mark.parametrize("key", ["nar/big", "log/big"])
def test_an_entry_that_changes_underway_is_refused(backend: HttpBackend, proxy: FaultyProxy, key: str) -> None:
    proxy.on("*", faults.cuts(PIECE // 2), faults.headers(etag='"another"'))
    with pytest.raises(RemoteError, match="changed an entry"):
        content(backend, key)


@pytest.mark.parametrize("key", ["nar/big", "log/big"])
def test_an_entry_that_is_lost_underway_is_an_error(backend: HttpBackend, proxy: FaultyProxy, key: str) -> None:
    first = faults.passes if key == "nar/big" else faults.cuts(PIECE + 1)
    proxy.on("*", first, faults.status(404))
    with pytest.raises(RemoteError, match="lost an entry"):
        content(backend, key)


def test_another_part_than_the_one_asked_for_is_refused(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("*", faults.shifts_ranges)
    with pytest.raises(RemoteError, match="from byte 1 on instead of 0"):
        content(backend, "nar/big")


@pytest.mark.parametrize("span", ["bytes 0-9/*", "bytes 0-4194303/*"])
def test_a_part_of_an_unknown_whole_is_refused(backend: HttpBackend, proxy: FaultyProxy, span: str) -> None:
    proxy.on("*", faults.headers(content_range=span))
    with pytest.raises(RemoteError, match="how long"):
        content(backend, "nar/big")


def test_an_entry_nobody_reads_on_is_left_alone(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("*", faults.passes, faults.status(503))
    opened = backend.get("nar/big")
    assert opened is not None
    with opened as stream:
        assert stream.read(10) == BIG[:10]
    assert len(proxy.requests) == 1  # reading ahead begins when the first piece is used up


def test_stopping_ends_a_body(proxy: FaultyProxy) -> None:
    stop = threading.Event()
    proxy.on("*", faults.drips(0.01))
    backend = HttpBackend(proxy.url, Patience(600, stop=stop))
    threading.Timer(0.1, stop.set).start()
    with pytest.raises(Interrupted):
        backend.get("log/big")


def test_no_more_than_a_few_pieces_are_held(backend: HttpBackend, proxy: FaultyProxy) -> None:
    opened = backend.get("nar/big")
    assert opened is not None
    with opened as stream:
        while proxy.requests[1:] == []:
            stream.read(1 << 16)
        until = time.monotonic() + PATIENCE_SECS
        while len(proxy.requests) < 1 + remote._AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(proxy.requests) == 1 + remote._AHEAD


# --- reading over HTTP ------------------------------------------------------------------------------------------------


def test_retry_after_reaches_the_patience(backend: HttpBackend, proxy: FaultyProxy, clock: Clock) -> None:
    date = formatdate(time.time() + 25, usegmt=True)
    proxy.on("*", faults.status(503, retry_after="3"), faults.status(429, retry_after=date), faults.passes)
    assert content(backend, "a.narinfo") == SMALL
    assert clock.slept[0] == 3.0
    assert 15 < clock.slept[1] <= 25


@pytest.mark.parametrize("after", ["²", "9" * 5000, "-1", "soon", "Mon, 00 Foo", "Sat, 01 Jan 0001 00:00:00 -0000"])
def test_an_odd_retry_after_is_none(backend: HttpBackend, proxy: FaultyProxy, clock: Clock, after: str) -> None:
    proxy.on("*", faults.status(503, retry_after=after), faults.passes)
    assert content(backend, "a.narinfo") == SMALL
    assert clock.slept == [0.4]


def test_connections_are_kept(proxy: FaultyProxy, backend: HttpBackend) -> None:
    """Also after a miss, a HEAD, a refusal, a redirect and a piece: each would cost a handshake."""
    connections = set()

    def watch(exchange: faults.Exchange) -> None:
        connections.add(exchange.sock.getpeername())
        faults.passes(exchange)

    def busy(exchange: faults.Exchange) -> None:
        connections.add(exchange.sock.getpeername())
        faults.status(503)(exchange)

    proxy.on("/c.narinfo", busy, faults.redirects("/a.narinfo"))
    proxy.on("*", watch)
    for key in ("a.narinfo", "b.narinfo", "c.narinfo", "nar/piece", "a.narinfo", "nar/empty"):
        content(backend, key)
        backend.head(key)
    assert len(proxy.requests) > 12
    assert len(connections) == 1


def test_a_refused_key_is_a_miss_where_other_keys_are_served(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("/a.narinfo", faults.status(403))
    assert content(backend, "a.narinfo") is None
    assert content(backend, "a.narinfo") is None
    assert backend.head("a.narinfo") is None
    assert len(proxy.of("/nix-cache-info")) == 1


def test_a_refused_nar_is_an_error(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("/nar/*", faults.status(403))
    with pytest.raises(RemoteError, match="answers 403") as caught:
        backend.get("nar/big")
    assert "user and password" in str(caught.value)


@pytest.mark.parametrize("code", [401, 403])
def test_a_place_that_refuses_everything_is_an_error(backend: HttpBackend, proxy: FaultyProxy, code: int) -> None:
    proxy.on("*", faults.status(code))
    for key in ("nix-cache-info", "a.narinfo"):
        with pytest.raises(RemoteError, match=f"answers {code}") as caught:
            backend.get(key)
        assert "user and password" in str(caught.value)


def test_without_a_cache_info_a_refusal_tells_nothing(backend: HttpBackend, proxy: FaultyProxy) -> None:
    proxy.on("/a.narinfo", faults.status(403))
    proxy.on("/nix-cache-info", faults.status(404))
    with pytest.raises(RemoteError, match="answers 403"):
        backend.get("a.narinfo")


def test_user_and_password_are_sent_and_never_shown(proxy: FaultyProxy, clock: Clock) -> None:
    sent = []

    def look(exchange: faults.Exchange) -> None:
        sent.append(exchange.headers.get("authorization"))
        faults.passes(exchange)

    proxy.on("/b.narinfo", faults.status(500, retry_after="99"))
    proxy.on("*", look)
    backend = HttpBackend(proxy.url.replace("://", "://me:s%3Acret@") + "/", patient(clock))
    assert content(backend, "a.narinfo") == SMALL
    assert sent == ["Basic bWU6czpjcmV0"]
    with pytest.raises(RemoteError) as caught:
        backend.get("b.narinfo")
    with pytest.raises(UsageError) as refused:
        backend.put("a", b"")
    for text in (backend.url, str(caught.value), str(refused.value)):
        assert "cret" not in text
        assert proxy.url in text


def test_a_password_does_not_follow_a_redirect_to_another_host(proxy: FaultyProxy, clock: Clock) -> None:
    sent = []

    def look(exchange: faults.Exchange) -> None:
        sent.append(exchange.headers.get("authorization"))
        faults.passes(exchange)

    proxy.on("*", look)
    with FaultyProxy(proxy.url) as first:
        first.on("*", faults.redirects(f"{proxy.url}/a.narinfo"))
        backend = HttpBackend(first.url.replace("://", "://me:secret@"), patient(clock))
        assert content(backend, "b.narinfo") == SMALL
    assert sent == [None]


def test_what_writes_or_lists_is_refused(backend: HttpBackend) -> None:
    uses: list[Callable[[], object]] = [
        lambda: backend.put("a", b""),
        lambda: backend.delete(["a"]),
        lambda: backend.refresh("a"),
        backend.spool,
        lambda: backend.lock(exclusive=False),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="is read-only") as caught:
            use()
        assert "push to s3:// or file://" in str(caught.value)
    with pytest.raises(UsageError, match="cannot be listed"):
        list(backend.list())


def test_keys_travel_as_they_are(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "a+b?c=d_e-1.drv").write_bytes(b"odd")
    with Serving(tmp_path) as serving:
        assert content(HttpBackend(serving.url, patient(clock)), "log/a+b?c=d_e-1.drv") == b"odd"


@pytest.mark.parametrize(
    "url",
    ["", "cache", "ftp://host/x", "http://", "http://[::1", "http://host:port", "https://me:secret@:1", "http://h?a=b"],
)
def test_what_is_no_prefix_is_refused(url: str, clock: Clock) -> None:
    with pytest.raises(UsageError, match="not the address of a cache") as caught:
        HttpBackend(url, patient(clock))
    assert "secret" not in str(caught.value)


def test_an_entry_stream_needs_an_entry(clock: Clock) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert EntryStream.open("place", patient(clock), pool, lambda _start, _end, _etag: None) is None


def test_a_server_that_is_asked_too_much_is_left_in_peace_by_all(clock: Clock) -> None:
    """One thread is throttled: what the others would ask waits as well."""
    patience = patient(clock)
    busy = AttemptFailed("answers 503 Slow Down", again=True, status=503, after=4.0)
    asked: list[float] = []

    def other() -> str:
        asked.append(clock.now)
        return "done"

    def throttled() -> str:
        if not asked:
            # Meanwhile, before this one's pause is over, another thread asks.
            clock.hook = lambda: patience.attempt("place", other)
            raise busy
        return "done"

    begun = clock.now
    assert patience.attempt("place", throttled) == "done"
    assert asked == [begun + 4.0]


def test_what_cannot_even_be_connected_to_is_given_up_sooner(clock: Clock) -> None:
    gone = AttemptFailed("Connection refused", again=True, unreachable=True)
    patience = patient(clock)
    begun = clock.now
    with pytest.raises(RemoteError):
        patience.attempt("place", failing(99, gone))
    assert clock.now - begun <= 6.0
    known = patient(clock)
    known.attempt("place", failing(0))
    begun = clock.now
    with pytest.raises(RemoteError):
        known.attempt("place", failing(99, gone))
    assert 20.0 < clock.now - begun <= 30.0


def test_the_query_of_a_nars_url_is_sent_as_one(backend: HttpBackend, proxy: FaultyProxy) -> None:
    seen = []

    def look(exchange: faults.Exchange) -> None:
        seen.append(exchange.path)
        exchange.keep = True
        exchange.give(exchange.ask(exchange.path.partition("?")[0]))

    proxy.on("*", look)
    assert content(backend, "nar/piece?hash=abc+d") == BIG[:PIECE]
    assert seen[0].endswith("/nar/piece?hash=abc%2Bd")


@pytest.mark.parametrize("url", ["http://[", "s3://[", "file://[x", "ftp://x.example"])
def test_what_is_no_url_of_a_cache(url: str, tmp_path: Path) -> None:
    assert not is_writable(url)
    with pytest.raises(UsageError, match="is not the URL of a cache"):
        open_backend(url, Patience(), tmp_path)
