"""What a server says in S3's name is a document, or one error: it may be any server."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults import Exchange, Fault, FaultyProxy, serves
from vzrepro.base.errors import RemoteError
from vzrepro.cache.remote import Patience
from vzrepro.cache.s3 import S3Backend, upload
from vzrepro.cache.s3.bucket import parsed, tag
from vzrepro.cache.s3.upload import count, seconds
from vzrepro.net import AttemptFailed

LISTING = (
    b'<?xml version="1.0" encoding="utf-8"?><ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key>'
    b"<Size>7</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"
)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FaultyProxy:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    return FaultyProxy()


def listed(server: FaultyProxy, document: bytes) -> list[tuple[str, int, float]]:
    with server:
        server.on("*", serves(document))
        backend = S3Backend(f"s3://bucket?endpoint={server.url}&region=x", Patience(5.0))
        return [(entry.key, entry.size, entry.mtime) for entry in backend.list()]


def test_a_listing(server: FaultyProxy) -> None:
    assert listed(server, LISTING) == [("a", 7, 1767225600.0)]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"utf-8", b"nonsense", "not XML"),
        (b"utf-8", b"shift_jis", "not XML"),
        (b"</Contents>", b"", "not XML"),
        (b">7<", b">-7<", "a number that is none"),
        (b">7<", b">%s<" % (b"9" * 5000), "a number that is none"),
        (b"2026-01-01", b"2026-13-01", "a time that is none"),
        (b"2026-01-01T00:00:00Z", b"0001-01-01T00:00:00", "a time that is none"),
    ],
)
def test_what_is_no_listing(server: FaultyProxy, old: bytes, new: bytes, reason: str) -> None:
    with pytest.raises(RemoteError, match=reason):
        listed(server, LISTING.replace(old, new))


def endless(contents: str) -> Fault:
    """A listing that always has another page, called otherwise."""
    numbers = itertools.count()

    def fault(exchange: Exchange) -> None:
        number = next(numbers)
        more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{number}</NextContinuationToken>"
        serves(f"<ListBucketResult>{more}{contents.format(number)}</ListBucketResult>".encode())(exchange)

    return fault


ENTRY = "<Contents><Key>{}</Key><Size>7</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"


@pytest.mark.parametrize(
    ("contents", "pages"),
    [("", 100), (ENTRY, 300), (ENTRY.replace("{}", "a") + ENTRY, 2)],
    ids=["empty", "new", "again"],
)
def test_a_listing_that_never_ends(
    server: FaultyProxy, monkeypatch: pytest.MonkeyPatch, contents: str, pages: int
) -> None:
    monkeypatch.setattr(upload, "_MOST_PAGES", 300)
    with server:
        server.on("*", endless(contents))
        backend = S3Backend(f"s3://bucket?endpoint={server.url}&region=x", Patience(5.0))
        with pytest.raises(RemoteError, match="lists without an end"):
            list(backend.list())
    assert len(server.requests) == pages


@settings(max_examples=100)
@given(st.integers(0, len(LISTING) - 1), st.binary(max_size=12))
def test_any_document_is_read_or_refused(at: int, data: bytes) -> None:
    with contextlib.suppress(ValueError, AttemptFailed):
        for each in parsed(LISTING[:at] + data + LISTING[at + len(data) :]).iter():
            assert count(tag(each, "Size")) >= 0
            seconds(tag(each, "LastModified"))
