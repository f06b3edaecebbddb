"""What is special about a bucket, with real servers: SeaweedFS honours all that we use, rclone less."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import botocore.auth
import botocore.session
import pytest
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests import faults, servers
from tests.servers import S3Server
from vzrepro.base.errors import Interrupted, RemoteError, UsageError
from vzrepro.base.model import FileHash, canonical_json
from vzrepro.cache.backend import PROBED
from vzrepro.cache.remote import PIECE, Patience
from vzrepro.cache.s3 import Quirks, S3Backend, backend, upload
from vzrepro.cache.s3.bucket import CONNECTIONS, Bucket, S3Access, S3Refused
from vzrepro.cache.s3.place import S3Place
from vzrepro.cache.s3.upload import PART, part_size
from vzrepro.net import AttemptFailed
from vzrepro.net.http import Answer, Http

ALL = Quirks(
    conditional_writes=True,
    ranges=True,
    pagination=True,
    multipart=True,
    resumable=True,
    metadata=True,
    path_addressing=True,
    virtual_addressing=False,
    anonymous_reads=True,
    clock_skew_secs=0,
)


class Counting(Http):
    """The real thing, which remembers what was asked; `before` and `after` a request something may happen."""

    def __init__(self) -> None:
        super().__init__({}, connections=CONNECTIONS)
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.before: Callable[[str], None] = lambda _request: None
        self.after: Callable[[str], None] = lambda _request: None

    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        connect_secs: float,
        read_secs: float,
        data: bytes | Iterable[bytes] | None = None,
    ) -> Answer:
        request = f"{method} {url}"
        self.asked.append(request)
        self.headers.append(headers)
        self.before(request)
        answer = super().send(method, url, headers, connect_secs, read_secs, data)
        self.after(request)
        return answer

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, each) is not None for each in self.asked)


@pytest.fixture
def http() -> Counting:
    return Counting()


@pytest.fixture
def place(seaweed: S3Server, bucket: str, credentials: None, http: Counting) -> S3Backend:
    """A bucket of its own on SeaweedFS."""
    made = S3Backend(seaweed.url(bucket), Patience(), http=http)
    assert made.create_bucket_if_missing()
    http.asked.clear()
    return made


def content(place: S3Backend, key: str) -> bytes | None:
    opened = place.get(key)
    if opened is None:
        return None
    with opened as stream:
        return b"".join(iter(lambda: stream.read(1 << 20), b""))


def client(server: S3Server) -> Any:
    """Amazon's own client."""
    session = botocore.session.Session()
    config = Config(s3={"addressing_style": "path"})
    return session.create_client("s3", region_name="us-east-1", endpoint_url=server.endpoint, config=config)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file of five parts, the last one short."""
    path = tmp_path / "big"
    path.write_bytes(random.Random(1).randbytes(4 * PART + 12345))
    return path


def digest(path: Path) -> FileHash:
    return FileHash.of(path.read_bytes())


# --- the URL ----------------------------------------------------------------------------------------------------------


def test_a_url_says_which_bucket_and_how_to_reach_it() -> None:
    url = (
        "s3://team/caches/one?endpoint=https%3A%2F%2Fs3.example.org:8333/&region=here&addressing=virtual&profile=my one"
    )
    place = S3Place.parse(url.replace(" ", "+"))
    assert (place.bucket, place.prefix) == ("team", "caches/one")
    assert (place.endpoint, place.region) == ("https://s3.example.org:8333", "here")
    assert (place.addressing, place.profile) == ("virtual", "my one")
    assert place.url == url.replace(" ", "+")
    bare = S3Place.parse("s3://team/")
    assert (bare.url, bare.prefix, bare.endpoint, bare.encryption) == ("s3://team", "", None, {})
    assert S3Place.parse("s3://team?sse=aws:kms&sse-key=arn:x").encryption == {
        "x-amz-server-side-encryption": "aws:kms",
        "x-amz-server-side-encryption-aws-kms-key-id": "arn:x",
    }


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s3:team", "not the URL of a bucket"),
        ("s3://", "not the URL of a bucket"),
        ("s3://x", "not the URL of a bucket"),
        ("s3://team/../other", "not the URL of a bucket"),
        ("s3://team/a b", "not the URL of a bucket"),
        ("s3://team#part", "not the URL of a bucket"),
        ("s3://team?endpoint", "not the URL of a bucket"),
        ("s3://team?endpoint=", "needs one value of endpoint"),
        ("s3://team?region=a&region=b", "needs one value of region"),
        ("s3://team?endpoint=s3.example.org", "not the address of an S3 server"),
        ("s3://team?endpoint=https://s3.example.org:x", "not the address of an S3 server"),
        ("s3://team?addressing=both", "path or virtual"),
        ("s3://team?scheme=http", "known are endpoint, region, addressing, profile, sse, sse-key"),
        ("s3://team?sse=rot13", "one of AES256, aws:kms, aws:kms:dsse"),
        ("s3://team?sse=AES256&sse-key=k", "sse-key is for sse=aws:kms"),
        ("s3://team?sse-key=k", "sse-key is for sse=aws:kms"),
        ("s3://me:secret@team", "must not hold credentials"),
        ("s3://team?endpoint=https://me:secret@s3.example.org", "without user and password"),
    ],
)
def test_other_urls_are_refused_and_give_no_secret_away(url: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        S3Backend(url, Patience())
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("s3://team?region=eu-central-1", "https://team.s3.eu-central-1.amazonaws.com/a%2Bb"),
        ("s3://team?region=cn-north-1", "https://team.s3.cn-north-1.amazonaws.com.cn/a%2Bb"),
        ("s3://te.am?region=eu-central-1", "https://s3.eu-central-1.amazonaws.com/te.am/a%2Bb"),
        ("s3://team?region=eu-central-1&addressing=path", "https://s3.eu-central-1.amazonaws.com/team/a%2Bb"),
        ("s3://team?endpoint=https://s3.example.org:8333", "https://s3.example.org:8333/team/a%2Bb"),
        ("s3://team?endpoint=https://s3.example.org:8333&addressing=virtual", "https://team.s3.example.org:8333/a%2Bb"),
    ],
)
def test_an_entry_has_the_address_that_the_server_gives_it(credentials: None, url: str, address: str) -> None:
    assert S3Access.find(S3Place.parse(url)).url("a+b", None) == address


def test_what_other_clients_are_told_counts_too(credentials: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://storage:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "here")
    access = S3Access.find(S3Place.parse("s3://team"))
    assert (access.url("a", {"uploads": ""}), access.region) == ("http://storage:9000/team/a?uploads=", "here")


def test_nothing_is_imported_before_a_bucket_is_named() -> None:
    code = "import sys, vzrepro.cache, vzrepro.cache.places; print('botocore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- what the servers do ----------------------------------------------------------------------------------------------


def test_seaweedfs_honours_everything(place: S3Backend) -> None:
    found = place.probe()
    assert replace(found, clock_skew_secs=0) == ALL
    # Of this machine's own clock, but told in whole seconds, and by an answer that may have been slow.
    assert abs(found.clock_skew_secs) < 30
    assert list(place.list()) == []
    assert place.abort_stale_uploads(-60) == 0


def test_rclone_accepts_conditions_and_does_not_honour_them(rclone: S3Server, bucket: str, credentials: None) -> None:
    place = S3Backend(rclone.url(bucket, "prefix"), Patience())
    place.create_bucket_if_missing()
    found = place.probe()
    assert not found.conditional_writes
    assert (found.ranges, found.pagination, found.multipart, found.metadata) == (True, True, True, True)
    assert list(place.list()) == []


def test_what_was_found_out_is_kept_as_canonical_json() -> None:
    data = canonical_json(ALL.document())
    assert Quirks.parse(data) == ALL
    for damage in (b"", b"[]", b"{}", data.replace(b"true", b"1"), data.replace(b'"format":1', b'"format":2')):
        with pytest.raises(ValueError):
            Quirks.parse(damage)


def test_signatures_are_checked_by_rclone_too(tmp_path: Path, credentials: None) -> None:
    with servers.rclone(tmp_path, signed=True) as server:
        place = S3Backend(server.url("bucket", "pre+fix=x"), Patience())
        place.create_bucket_if_missing()
        place.put("nar/a+b=c?d.nar", b"data")
        assert content(place, "nar/a+b=c?d.nar") == b"data"
        assert [entry.key for entry in place.list("nar/a+")] == ["nar/a+b=c?d.nar"]


def test_of_many_processes_that_put_if_absent_one_wins(place: S3Backend) -> None:
    place.put(PROBED, canonical_json(place.probe().document()))
    start = threading.Barrier(8)

    def put(number: int) -> bool:
        other = S3Backend(place.url, Patience())  # shares nothing with the others
        other.head("warm")
        start.wait()
        return other.put("build/x.json", str(number).encode() * 1000, if_absent=True)

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(put, range(8)))
        assert won.count(True) == 1
        assert content(place, "build/x.json") == str(won.index(True)).encode() * 1000
        place.delete(["build/x.json"])


@pytest.mark.parametrize("honoured", [True, False])
def test_a_put_asks_first_unless_the_condition_is_known_to_hold(
    place: S3Backend, http: Counting, honoured: bool
) -> None:
    if honoured:
        place.put(PROBED, canonical_json(ALL.document()))
    for number in range(3):
        place.put(f"drv/{number}.json", b"{}", if_absent=True)
    assert http.count(r"^HEAD .*/drv/") == (0 if honoured else 3)
    assert http.count(rf"^GET .*/{PROBED}") == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b" " * (2 << 20) + b"{}"], ids=["empty", "list", "other", "large"]
)
def test_what_is_no_record_of_the_server_is_as_good_as_none(place: S3Backend, http: Counting, content: bytes) -> None:
    place.put(PROBED, content)
    assert place.put("drv/a.json", b"{}", if_absent=True)
    assert not place.put("drv/a.json", b"{}", if_absent=True)
    assert http.count(r"^HEAD .*/drv/") == 2


@pytest.mark.parametrize(("status", "code"), [(501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_server_that_refuses_the_condition_is_not_bothered_with_it_again(
    place: S3Backend, http: Counting, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    refused: list[str] = []
    send = Counting.send

    def refuse(self: Counting, method: str, url: str, headers: dict[str, str], *rest: Any) -> Answer:
        if "If-None-Match" in headers:
            refused.append(url)
            # No server here does so: ask this one for what it refuses in the same way, and change the words.
            answer = send(self, "GET", url.rpartition("/")[0] + "/absent", {}, *rest[:2])
            answer.status = status
            error = f"<Error><Code>{code}</Code></Error>".encode()
            answer.content(1 << 20)
            monkeypatch.setattr(answer, "content", lambda _limit: error)
            return answer
        return send(self, method, url, headers, *rest)

    monkeypatch.setattr(Counting, "send", refuse)
    assert place.put("a", b"1", if_absent=True)
    assert not place.put("a", b"2", if_absent=True)
    assert place.put("b", b"3", if_absent=True)
    assert len(refused) == 1
    assert content(place, "a") == b"1"


def test_entries_say_what_they_are(place: S3Backend, seaweed: S3Server, bucket: str) -> None:
    types = {
        "x.narinfo": "text/x-nix-narinfo",
        "log/x.drv": "text/plain; charset=utf-8",
        "nix-cache-info": "text/plain; charset=utf-8",
        "build/x.json": "application/json",
        "nar/x": "application/octet-stream",  # SeaweedFS knows better what a .zst is
    }
    digest = FileHash.of(b"data")
    for key in types:
        place.put(key, b"data", sha256=digest)
    assert place.refresh("x.narinfo")
    for key, wanted in types.items():
        told = client(seaweed).head_object(Bucket=bucket, Key=key)
        assert (told["ContentType"], told["Metadata"]) == (wanted, {"sha256": digest.hex})
        entry = place.head(key)
        assert entry is not None
        assert entry.sha256 == digest


def test_the_clock_is_asked_once(place: S3Backend, http: Counting) -> None:
    fresh = S3Backend(place.url, Patience(), http=http)
    assert abs(fresh.now() - time.time()) < 30
    fresh.now()
    assert len(http.asked) == 1


# --- many entries -----------------------------------------------------------------------------------------------------


def test_more_than_a_page_of_entries_is_listed_and_deleted(seaweed: S3Server, bucket: str, place: S3Backend) -> None:
    inside = S3Backend(seaweed.url(bucket, "in/side"), Patience())
    wanted = [f"nar/{number:04}" for number in range(1103)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: inside.put(key, b"x"), wanted))
    place.put("in/sidestep", b"x")
    client(seaweed).put_object(Bucket=bucket, Key="in/side/not a key", Body=b"x")
    client(seaweed).put_object(Bucket=bucket, Key="in/side/.hidden", Body=b"x")
    assert sorted(entry.key for entry in inside.list()) == wanted
    assert sorted(entry.key for entry in inside.list("nar/00")) == wanted[:100]
    inside.delete([*wanted, "nar/absent"])
    assert list(inside.list()) == []
    assert [entry.key for entry in place.list()] == ["in/sidestep"]


def test_what_is_written_has_a_checksum(place: S3Backend, http: Counting, big: Path) -> None:
    small = big.with_name("small")
    small.write_bytes(b"small")
    http.headers.clear()
    assert place.put("a", b"one")
    assert place.put("empty", b"", if_absent=True)
    assert place.put("small", small, sha256=digest(small))
    assert place.put("nar/big", big, sha256=digest(big))
    sent = [headers for asked, headers in zip(http.asked, http.headers, strict=True) if asked.startswith("PUT")]
    assert [headers.get("Content-MD5") for headers in sent[:3]] == [
        base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode() for data in (b"one", b"", b"small")
    ]
    assert len(sent) == 3 + 5
    assert all("Content-MD5" in headers for headers in sent)
    assert content(place, "nar/big") == big.read_bytes()


@pytest.mark.parametrize(
    ("size", "time", "why"),
    [
        ("many", "2026-01-01T00:00:00Z", "a number that is none"),
        ("9" * 5000, "2026-01-01T00:00:00Z", "a number that is none"),
        ("", "2026-01-01T00:00:00Z", "a number that is none"),
        ("1", "yesterday", "a time that is none"),
    ],
)
def test_a_listing_that_means_nothing_is_the_servers_fault(
    credentials: None, monkeypatch: pytest.MonkeyPatch, size: str, time: str, why: str
) -> None:
    text = f"<L><Contents><Key>nar/x</Key><Size>{size}</Size><LastModified>{time}</LastModified></Contents></L>"
    monkeypatch.setattr(Bucket, "xml", lambda *_request, **_more: ElementTree.fromstring(text))
    with pytest.raises(RemoteError, match=f"s3://team.* answers with {why}"):
        list(S3Backend("s3://team?endpoint=http://s3.example", Patience()).list())


@pytest.mark.parametrize(
    ("method", "key", "query", "encrypts"),
    [
        ("PUT", "a", {}, True),
        ("POST", "a", {"uploads": ""}, True),
        ("PUT", "a", {"partNumber": "1", "uploadId": "x"}, False),
        ("POST", "a", {"uploadId": "x"}, False),
        ("GET", "a", {}, False),
        ("PUT", None, {}, False),
    ],
)
def test_what_makes_an_entry_says_how_to_encrypt_it(
    credentials: None, method: str, key: str | None, query: dict[str, str], encrypts: bool
) -> None:
    seen: list[dict[str, str]] = []

    class Deaf(Http):
        def send(self, _method: str, _url: str, headers: dict[str, str], *_rest: Any) -> Answer:
            seen.append(headers)
            raise AttemptFailed("hears nothing", again=False)

    place = S3Place.parse("s3://team?endpoint=http://s3.example&sse=aws:kms&sse-key=arn:x")
    with pytest.raises(AttemptFailed):
        Bucket(place, Patience(), Deaf({}, connections=1)).ask(method, key, query)
    (headers,) = seen
    assert (place.encryption.items() <= headers.items()) is encrypts
    assert ("x-amz-server-side-encryption" in headers.get("Authorization", "")) is encrypts


@pytest.mark.parametrize(
    ("more", "code", "method", "told"),
    [
        ("", "AccessDenied", "PUT", True),
        ("&sse=AES256", "AccessDenied", "PUT", False),
        ("", "SignatureDoesNotMatch", "PUT", False),
        ("", "AccessDenied", "GET", False),
    ],
)
def test_a_bucket_that_may_demand_encryption(credentials: None, more: str, code: str, method: str, told: bool) -> None:
    refusal = f"<Error><Code>{code}</Code><Message>Access Denied</Message></Error>".encode()
    with faults.FaultyProxy() as proxy:
        proxy.on("*", faults.replays(faults.Answer(403, {"content-length": str(len(refusal))}, refusal)))
        place = S3Place.parse(f"s3://team?endpoint={proxy.url}{more}")
        with pytest.raises(S3Refused, match="refuses: 403") as caught:
            Bucket(place, Patience(), Http({}, connections=1)).ask(method, "a")
    assert "check the credentials" in (caught.value.hint or "")
    assert ("sse=AES256 or sse=aws:kms" in (caught.value.hint or "")) is told


# --- big entries ------------------------------------------------------------------------------------------------------


def test_a_big_file_goes_in_parts_and_comes_in_pieces(place: S3Backend, http: Counting, big: Path) -> None:
    assert place.put("nar/big", big, sha256=digest(big))
    assert http.count(r"^PUT .*partNumber=") == 5
    entry = place.head("nar/big")
    assert entry is not None
    assert (entry.size, entry.sha256) == (big.stat().st_size, digest(big))
    assert content(place, "nar/big") == big.read_bytes()
    assert http.count(r"^GET .*/nar/big$") == -(-big.stat().st_size // PIECE)


def test_a_big_file_that_is_there_stays(place: S3Backend, http: Counting, big: Path) -> None:
    assert place.put("log/big", big, if_absent=True)
    sent = http.count("partNumber=")
    assert not place.put("log/big", big, if_absent=True)
    assert http.count("partNumber=") == sent
    assert place.abort_stale_uploads(-60) == 0


def test_of_two_big_files_at_once_the_second_is_dropped(place: S3Backend, http: Counting, big: Path) -> None:
    def overtake(request: str) -> None:
        if request.startswith("POST") and "uploadId=" in request:
            http.before = lambda _request: None
            S3Backend(place.url, Patience()).put("log/big", b"first")

    http.before = overtake
    assert not place.put("log/big", big, if_absent=True)
    assert content(place, "log/big") == b"first"
    assert place.abort_stale_uploads(-60) == 0


def interrupted(place: S3Backend, big: Path, parts: int, stop: threading.Event) -> int:
    """Upload with another process that is interrupted when so many parts are there; how many it has sent."""
    http = Counting()
    lock = threading.Lock()

    def after(request: str) -> None:
        with lock:
            if "partNumber=" in request and http.count("partNumber=") >= parts:
                stop.set()

    http.after = after
    other = S3Backend(place.url, Patience(stop=stop), http=http)
    with pytest.raises(Interrupted):
        other.put("nar/big", big, sha256=digest(big))
    return http.count("partNumber=")


def test_an_interrupted_upload_is_continued(place: S3Backend, http: Counting, big: Path) -> None:
    interrupted(place, big, 2, threading.Event())
    [left] = upload.unfinished(place._bucket, "nar/")
    there = client_parts(place, left)
    assert there
    assert place.head("nar/big") is None
    assert place.put("nar/big", big, sha256=digest(big))
    assert http.count("partNumber=") == 5 - there
    assert content(place, "nar/big") == big.read_bytes()
    assert place.abort_stale_uploads(-60) == 0


def client_parts(place: S3Backend, left: upload.UnfinishedUpload) -> int:
    """How many parts of an upload the server has."""
    [document] = upload.pages(place._bucket, left.key, {"uploadId": left.id}, lambda _document: {})
    return len(document.findall("{*}Part"))


def test_parts_of_another_file_are_not_kept(place: S3Backend, http: Counting, big: Path) -> None:
    interrupted(place, big, 2, threading.Event())
    big.write_bytes(random.Random(2).randbytes(2 * PART + 5))
    assert place.put("nar/big", big, sha256=digest(big))
    assert http.count("partNumber=") == 3
    assert content(place, "nar/big") == big.read_bytes()


def test_without_its_hash_a_file_starts_anew(place: S3Backend, http: Counting, big: Path) -> None:
    interrupted(place, big, 2, threading.Event())
    assert place.put("nar/big", big)
    assert http.count("partNumber=") == 5
    assert place.abort_stale_uploads(3600) == 0
    assert place.abort_stale_uploads(-60) == 1
    assert place.abort_stale_uploads(-60) == 0
    assert content(place, "nar/big") == big.read_bytes()


def test_parts_and_answers_that_get_lost_are_made_up_for(place: S3Backend, http: Counting, big: Path) -> None:
    lost: list[str] = []

    def lose(request: str) -> None:
        if request not in lost and not request.startswith(("HEAD", "GET")):
            lost.append(request)
            raise AttemptFailed("breaks off", again=True)

    http.after = lose
    assert place.put("nar/big", big, sha256=digest(big))
    assert content(place, "nar/big") == big.read_bytes()
    assert len(lost) == 7  # the begin, five parts, the end


def test_a_refused_upload_leaves_nothing(place: S3Backend, http: Counting, big: Path) -> None:
    def refuse(request: str) -> None:
        if "partNumber=3" in request:
            [left] = upload.unfinished(place._bucket, "nar/")
            http.before = lambda _request: None
            upload.abort(place._bucket, left.key, left.id)

    http.before = refuse
    with pytest.raises(RemoteError, match="NoSuchUpload"):
        place.put("nar/big", big, sha256=digest(big))
    assert place.abort_stale_uploads(-60) == 0


def test_parts_are_larger_where_there_would_be_too_many() -> None:
    assert part_size(1) == part_size(10_000 * PART) == PART
    for size in (10_000 * PART + 1, 1 << 40):
        assert part_size(size) > PART
        assert -(-size // part_size(size)) <= 10_000
        assert part_size(size) % (1 << 20) == 0


def test_an_entry_too_large_for_one_copy_is_refreshed_in_parts(
    place: S3Backend, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.put("nar/big", big, sha256=digest(big))
    before = place.head("nar/big")
    monkeypatch.setattr(backend, "_MAX_COPY", 1 << 20)
    monkeypatch.setattr(backend, "_COPY_PART", 1 << 25)
    time.sleep(1.1)  # dates are told in seconds
    assert place.refresh("nar/big")
    after = place.head("nar/big")
    assert before is not None
    assert after is not None
    assert after.mtime > before.mtime
    assert (after.size, after.sha256) == (before.size, before.sha256)
    assert content(place, "nar/big") == big.read_bytes()


MEMORY = """
import hashlib, re, sys
from pathlib import Path
from vzrepro.cache.remote import Patience
from vzrepro.cache.s3 import S3Backend
from vzrepro.base.model import FileHash

def peak():  # getrusage would begin with what the parent had
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

place, file = S3Backend(sys.argv[1], Patience()), Path(sys.argv[2])
place.head("nar/big")
before = peak()
digest = hashlib.sha256()
with file.open("rb") as source:
    while piece := source.read(1 << 20):
        digest.update(piece)
place.put("nar/big", file, sha256=FileHash(digest.hexdigest()))
up = peak() - before
found = hashlib.sha256()
with place.get("nar/big") as stream:
    while piece := stream.read(1 << 20):
        found.update(piece)
assert found.digest() == digest.digest()
print(up, peak() - before)
"""


def test_memory_is_bounded_whatever_the_size(place: S3Backend, tmp_path: Path) -> None:
    file = tmp_path / "huge"
    with file.open("wb") as out:
        piece = os.urandom(1 << 20)
        for number in range(600):
            out.write(number.to_bytes(4, "big") + piece[4:])
    command = [sys.executable, "-c", MEMORY, place.url, str(file)]
    up, down = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert up < 64, "MiB"
    assert down < 128, "MiB"


# --- what can be wrong ------------------------------------------------------------------------------------------------


USES: list[Callable[[S3Backend], object]] = [
    lambda place: place.get("a.narinfo"),
    lambda place: place.head("nar/a"),
    lambda place: place.put("a", b"x"),
    lambda place: place.put("a", b"x", if_absent=True),
    lambda place: list(place.list()),
    lambda place: place.delete(["a", "b"]),
    lambda place: place.refresh("a"),
]


@pytest.mark.parametrize("use", USES)
def test_a_missing_bucket_is_told_with_what_to_do(
    seaweed: S3Server, bucket: str, credentials: None, use: Callable[[S3Backend], object]
) -> None:
    place = S3Backend(seaweed.url(bucket), Patience())
    with pytest.raises(RemoteError, match=f"no bucket {bucket}") as caught:
        use(place)
    assert caught.value.exit_code == 105
    assert caught.value.hint == f"vzrepro cache init '{place.url}'"


@pytest.mark.parametrize("use", USES)
def test_wrong_credentials_are_told_at_once(
    place: S3Backend, monkeypatch: pytest.MonkeyPatch, use: Callable[[S3Backend], object]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    http = Counting()
    other = S3Backend(place.url, Patience(), http=http)
    with pytest.raises(RemoteError, match="refuses: 403") as caught:
        use(other)
    assert "check the credentials, which come from env" in str(caught.value)
    assert len(http.asked) <= 3


def test_without_credentials_a_public_bucket_is_read(
    place: S3Backend, monkeypatch: pytest.MonkeyPatch, big: Path
) -> None:
    place.put("nix-cache-info", b"StoreDir: /nix/store\n")
    place.put("nar/a", big)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    public = S3Backend(place.url, Patience())
    assert content(public, "nar/a") == big.read_bytes()
    assert public.get("absent.narinfo") is None
    assert public.head("absent.narinfo") is None
    with pytest.raises(RemoteError, match="no credentials were found"):
        public.put("a", b"x")


def test_an_unknown_profile_is_told(seaweed: S3Server, credentials: None) -> None:
    place = S3Backend(f"{seaweed.url('common')}&profile=absent", Patience())
    with pytest.raises(UsageError, match="absent"):
        place.head("a")


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [("http://127.0.0.1:{port}", "refused"), ("http://nowhere.invalid", "cannot be resolved")],
)
@pytest.mark.parametrize("use", USES)
def test_a_server_that_is_not_there_is_told(
    credentials: None, endpoint: str, why: str, use: Callable[[S3Backend], object]
) -> None:
    with servers.refusing() as port:
        place = S3Backend(f"s3://bucket?endpoint={endpoint.format(port=port)}", Patience(0.5))
        with pytest.raises(RemoteError, match=why) as caught:
            use(place)
    assert caught.value.exit_code == 105


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = directory / "cert.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def test_only_the_systems_bundle_vouches_for_a_server(
    tmp_path: Path, credentials: None, monkeypatch: pytest.MonkeyPatch, big: Path
) -> None:
    tls = certificate(tmp_path)
    with servers.rclone(tmp_path / "server", tls=tls) as server:
        with pytest.raises(RemoteError, match="certificate verify failed") as caught:
            S3Backend(server.url("bucket"), Patience()).head("a")
        assert "SSL_CERT_FILE" in str(caught.value)
        monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
        place = S3Backend(server.url("bucket"), Patience())
        place.create_bucket_if_missing()
        place.put("nar/big", big)
        assert content(place, "nar/big") == big.read_bytes()


def test_a_failing_server_is_asked_again(place: S3Backend, http: Counting) -> None:
    failures = [AttemptFailed("is busy", again=True)] * 3

    def fail(_request: str) -> None:
        if failures:
            raise failures.pop()

    http.before = fail
    assert place.put("a", b"data")
    assert content(place, "a") == b"data"


def test_a_bucket_that_is_there_is_not_made_again(place: S3Backend) -> None:
    assert not place.create_bucket_if_missing()


def test_a_clock_that_is_wrong_is_told(place: S3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server checks when a request was signed; nothing tells a person better than the clock itself."""
    place.put("a", b"")
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *some: now(*some) + timedelta(hours=2))
    with pytest.raises(RemoteError, match="clock") as caught:
        place.put("a", b"")
    assert caught.value.hint == "check the clock: date -u"
