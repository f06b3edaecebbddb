"""Big files on their way into a bucket: parts, in parallel, that an interrupted upload leaves for the next one."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from datetime import datetime
from xml.etree import ElementTree

from vzrepro.base.errors import RemoteError
from vzrepro.cache.backend import Sent
from vzrepro.cache.s3.bucket import XMLNS, Bucket, Payload, S3Refused, Xml, read_file, tag
from vzrepro.net import AttemptFailed

PART = 16 << 20
"""Bytes of a part; what is not larger is uploaded in one request."""

_MAX_PARTS = 10_000
_MIB = 1 << 20
_LISTED = ("Contents", "Upload", "Part")
_MOST_PAGES = 100_000  # of a listing: a hundred million entries
_EMPTY_PAGES = 100  # in a row: servers pass over what was deleted
_LACKING = frozenset({400, 404, 405, 501})  # what servers answer to what they have never heard of


class LacksParts(Exception):
    """The server knows no uploads in parts."""


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload that is not complete: to which key, its id, when it was begun (seconds since the epoch)."""

    key: str
    id: str
    begun: float


def upload(
    bucket: Bucket,
    senders: ThreadPoolExecutor,
    key: str,
    fd: int,
    size: int,
    headers: Mapping[str, str],
    last_headers: Mapping[str, str],
    *,
    resume: bool,
    progress: Sent | None = None,
) -> None:
    """Upload the open file of `size` bytes; `headers` are the entry's, `last_headers` those of the request that makes
    it appear.

    With `resume`, parts that an earlier upload has left are kept where they are the same. Whoever asks for it knows
    that the key always stands for the same content, so two that do it at once may well share an upload. An
    interruption and a server that cannot be reached leave the parts there; a refusal removes them. Raises LacksParts,
    and RemoteError, whose `__cause__` is an S3Refused when the server has refused.
    """
    part = part_size(size)
    found = _youngest(bucket, key) if resume else None
    etags: dict[int, str] = {}
    if found is not None:
        etags = _kept(bucket, key, found, fd, size, part)
    current = found or begin(bucket, key, headers)
    try:
        etags |= _send(bucket, senders, key, current, fd, size, part, etags, progress)
        complete(bucket, key, current, size, etags, last_headers)
    except RemoteError as error:
        if refusal(error) is not None:
            with contextlib.suppress(RemoteError):
                abort(bucket, key, current)
        raise


def part_size(size: int) -> int:
    """How large the parts of a file are, in bytes, the last one excepted: no more than 10,000 are allowed."""
    return max(PART, -(-size // (_MAX_PARTS * _MIB)) * _MIB)


def begin(bucket: Bucket, key: str, headers: Mapping[str, str]) -> str:
    """The id of a new upload. Raises LacksParts, RemoteError."""

    def once() -> str:
        try:
            return tag(bucket.xml("POST", key, {"uploads": ""}, headers=headers), "UploadId")
        except S3Refused as refused:
            if refused.status in _LACKING and refused.code != "NoSuchBucket" and not refused.again:
                raise LacksParts from refused
            raise

    return bucket.do(once)


def send_part(bucket: Bucket, key: str, upload_id: str, number: int, payload: Payload) -> str:
    """Upload one part, counted from 1; its ETag. Raises RemoteError."""

    def once() -> str:
        answer = bucket.ask("PUT", key, {"partNumber": str(number), "uploadId": upload_id}, payload=payload)
        answer.content(_MIB)
        etag = answer.headers.get("ETag")
        if etag is None:
            raise AttemptFailed("gives a part no ETag", again=False)
        return etag

    return bucket.do(once)


def complete(
    bucket: Bucket, key: str, upload_id: str, size: int, etags: Mapping[int, str], headers: Mapping[str, str]
) -> None:
    """Make an entry of `size` bytes of the parts. Raises RemoteError."""
    document = ElementTree.Element("CompleteMultipartUpload", xmlns=XMLNS)
    for number in sorted(etags):
        part = ElementTree.SubElement(document, "Part")
        ElementTree.SubElement(part, "PartNumber").text = str(number)
        ElementTree.SubElement(part, "ETag").text = etags[number]
    payload = Payload.of(ElementTree.tostring(document))

    def once() -> None:
        try:
            bucket.xml("POST", key, {"uploadId": upload_id}, headers=headers, payload=payload, slow_bytes=size)
        except S3Refused as refused:
            # Done before: by an attempt whose answer was lost, or by another that shared the parts.
            if refused.code != "NoSuchUpload" or not _is_there(bucket, key, size):
                raise

    bucket.do(once)


def abort(bucket: Bucket, key: str, upload_id: str) -> None:
    """Remove an unfinished upload and its parts, if it is still there. Raises RemoteError."""

    def once() -> None:
        try:
            bucket.ask("DELETE", key, {"uploadId": upload_id}).content(_MIB)
        except S3Refused as refused:
            if refused.status != 404:
                raise

    bucket.do(once)


def unfinished(bucket: Bucket, prefix: str) -> Iterator[UnfinishedUpload]:
    """The unfinished uploads to keys that start with `prefix`. Raises RemoteError."""
    start = bucket.full(prefix)
    for document in pages(bucket, None, {"uploads": "", "prefix": start}, _next_upload):
        for each in document.iterfind("{*}Upload"):
            key = bucket.own(tag(each, "Key"))
            if key is not None and key.startswith(prefix):
                try:
                    begun = seconds(tag(each, "Initiated"))
                except AttemptFailed as failure:
                    raise RemoteError(f"{bucket.place.url} {failure.why}") from failure
                yield UnfinishedUpload(key, tag(each, "UploadId"), begun)


def pages(
    bucket: Bucket, key: str | None, query: Mapping[str, str], following: Callable[[Xml], dict[str, str]]
) -> Iterator[Xml]:
    """The documents of a listing, one by one; `following` reads from one what asks for the next. Raises RemoteError,
    also for a listing that does not end."""
    where: dict[str, str] = {}
    empty = 0
    for _ in range(_MOST_PAGES):
        asked = {**query, **where}
        document = bucket.do(lambda asked=asked: bucket.xml("GET", key, asked))  # type: ignore[misc]
        yield document
        if tag(document, "IsTruncated") != "true":
            return
        before, where = where, following(document)
        if not any(where.values()) or where == before:
            raise RemoteError(f"{bucket.place.url} does not say how a listing goes on")
        empty = 0 if any(document.find(f"{{*}}{each}") is not None for each in _LISTED) else empty + 1
        if empty == _EMPTY_PAGES:
            break
    raise RemoteError(f"{bucket.place.url} lists without an end")


def seconds(text: str) -> float:
    """A time in S3's documents, in seconds since the epoch. Raises AttemptFailed."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError as error:
        raise AttemptFailed("answers with a time that is none", again=False) from error


def count(text: str) -> int:
    """A number of bytes, or of a part, in S3's documents. Raises AttemptFailed."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise AttemptFailed("answers with a number that is none", again=False)
    return int(text)


def refusal(error: RemoteError) -> S3Refused | None:
    """What the server said, when it was that which ended the attempts and not patience."""
    cause = error.__cause__
    return cause if isinstance(cause, S3Refused) and not cause.again else None


def _youngest(bucket: Bucket, key: str) -> str | None:
    """The unfinished upload to this key that was begun last, if the server tells."""
    try:
        found = [each for each in unfinished(bucket, key) if each.key == key]
    except RemoteError as error:
        refused = refusal(error)
        if refused is not None and refused.code != "NoSuchBucket":
            return None  # it does not know, or does not tell us
        raise
    return max(found, key=lambda each: each.begun).id if found else None


def _kept(bucket: Bucket, key: str, upload_id: str, fd: int, size: int, part: int) -> dict[int, str]:
    """The ETags of those parts of the upload that equal the file's, by number."""
    kept: dict[int, str] = {}
    for document in pages(bucket, key, {"uploadId": upload_id}, _next_part):
        for each in document.iterfind("{*}Part"):
            try:
                number, length = count(tag(each, "PartNumber")), count(tag(each, "Size"))
            except AttemptFailed:
                continue
            offset, etag = (number - 1) * part, tag(each, "ETag")
            if length == min(part, size - offset) and etag.strip('"') == _md5(bucket, fd, offset, length):
                kept[number] = etag
    return kept


def _send(
    bucket: Bucket,
    senders: ThreadPoolExecutor,
    key: str,
    upload_id: str,
    fd: int,
    size: int,
    part: int,
    kept: Mapping[int, str],
    progress: Sent | None,
) -> dict[int, str]:
    """Upload the parts that are not kept; their ETags, by number."""
    left = threading.Event()

    def check() -> None:
        bucket.patience.check()
        if left.is_set():
            raise AttemptFailed("is not sent any further", again=False)

    def send(number: int) -> str:
        offset = (number - 1) * part
        payload = Payload.of_file(fd, offset, min(part, size - offset), check)
        return send_part(bucket, key, upload_id, number, payload)

    futures: dict[Future[str], int] = {}
    try:
        for number in range(1, -(-size // part) + 1):
            if number not in kept:
                futures[senders.submit(send, number)] = number
        sent: dict[int, str] = {}
        for future in as_completed(futures):
            sent[futures[future]] = future.result()
            if progress is not None:
                progress(sum(min(part, size - (number - 1) * part) for number in (*kept, *sent)))
        return sent
    finally:
        # No part may arrive once the upload is removed, and nobody else read the file once it is closed.
        left.set()
        for future in futures:
            future.cancel()
        wait(futures)


def _is_there(bucket: Bucket, key: str, size: int) -> bool:
    try:
        answer = bucket.ask("HEAD", key)
    except S3Refused:
        return False
    answer.content(0)
    return answer.length == size


def _next_part(document: Xml) -> dict[str, str]:
    return {"part-number-marker": tag(document, "NextPartNumberMarker")}


def _next_upload(document: Xml) -> dict[str, str]:
    return {"key-marker": tag(document, "NextKeyMarker"), "upload-id-marker": tag(document, "NextUploadIdMarker")}


def _md5(bucket: Bucket, fd: int, offset: int, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for chunk in read_file(fd, offset, size, bucket.patience.check):
        digest.update(chunk)
    return digest.hexdigest()
