"""A binary cache's entries as objects of a bucket, for any number of machines."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote_plus
from xml.etree import ElementTree

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import FileHash
from vzrepro.base.words import plural
from vzrepro.cache.backend import (
    CACHE_INFO,
    NARS,
    PROBED,
    Damaged,
    Entry,
    Sent,
    check_key,
    content_type,
    is_key,
    read_whole,
)
from vzrepro.cache.remote import Concealment, EntryStream, Patience
from vzrepro.cache.s3.bucket import CONNECTIONS, XMLNS, Bucket, Payload, S3Refused, Xml, tag
from vzrepro.cache.s3.place import S3Place
from vzrepro.cache.s3.quirks import Quirks, probe
from vzrepro.cache.s3.upload import (
    PART,
    LacksParts,
    abort,
    begin,
    complete,
    count,
    pages,
    refusal,
    seconds,
    unfinished,
    upload,
)
from vzrepro.net import AttemptFailed, Body
from vzrepro.net.http import Answer, Http

_PIECES = 8  # pieces of NARs that are on their way at once, in all
_SENDERS = 4  # parts that are being sent at once, in all
_BATCH = 1000  # keys that S3 deletes in one request
_MAX_COPY = 5 << 30  # bytes that S3 copies in one request
_COPY_PART = 1 << 30
_MAX_ANSWER = 1 << 20
_TURNS = 16
_LACKING = frozenset({400, 405, 501})  # what servers answer to what they do not know
_SHA256 = "x-amz-meta-sha256"


class S3Backend:
    """A `Backend` in a bucket, from as many threads as one likes.

    Credentials come from where every S3 client on the machine looks; without any, requests are not signed, and public
    buckets can be read. Raises UsageError when `url` is no `s3:` URL (`S3Place.parse`). Nothing is asked before the
    first use.
    """

    def __init__(self, url: str, patience: Patience, *, http: Http | None = None) -> None:
        self._place = S3Place.parse(url)
        self._patience = patience
        self._bucket = Bucket(self._place, patience, http or Http(connections=CONNECTIONS))
        self._readers = ThreadPoolExecutor(_PIECES, thread_name_prefix="cache-s3-read")
        self._senders = ThreadPoolExecutor(_SENDERS, thread_name_prefix="cache-s3-send")
        self._lock = threading.Lock()
        self._turns = [threading.Lock() for _ in range(_TURNS)]
        self._exists = False
        self._concealment = Concealment(self._reads_info)
        self._conditional: bool | None = None
        self._refuses_condition = False

    @property
    def url(self) -> str:
        """The bucket as it was named."""
        return self._place.url

    # --- reading ------------------------------------------------------------------------------------------------------

    def get(self, key: str) -> AbstractContextManager[EntryStream] | None:
        """See `Backend.get`. A NAR is asked for in pieces, anything else with one plain request."""
        check_key(key)
        ranged = key.startswith(NARS)

        def ask(start: int, end: int | None, _etag: str | None) -> Body | None:
            return self._opened(key, start, end if ranged else None)

        return EntryStream.open(self.url, self._patience, self._readers, ask)

    def head(self, key: str) -> Entry | None:
        """See `Backend.head`."""
        check_key(key)

        def once() -> Entry | None:
            answer = self._headers(key)
            return None if answer is None else _entry(key, answer)

        return self._bucket.do(once)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Backend.list`; a thousand entries are held at a time."""
        query = {"list-type": "2", "prefix": self._bucket.full(prefix), "encoding-type": "url"}
        first = None
        for document in pages(self._bucket, None, query, _next_page):
            contents = document.findall("{*}Contents")
            if contents:
                before, first = first, tag(contents[0], "Key")
                if first == before:
                    raise RemoteError(f"{self.url} lists without an end", reason="a page begins like the one before")
            for each in contents:
                key = self._bucket.own(_listed_key(document, each))
                if key is not None and key.startswith(prefix) and is_key(key):
                    yield self._listed(key, each)

    def _listed(self, key: str, each: Xml) -> Entry:
        try:
            return Entry(key, count(tag(each, "Size")), seconds(tag(each, "LastModified")))
        except AttemptFailed as failure:
            raise RemoteError(f"{self.url} {failure.why}") from failure

    def now(self) -> float:
        """See `Backend.now`: the server's clock, which is asked once."""
        return self._bucket.now()

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        sha256: FileHash | None = None,
        progress: Sent | None = None,
    ) -> bool:
        """See `Backend.put`. Large files go in parts, and where `sha256` is given, an interrupted upload is continued.

        When `if_absent` meets an entry that an attempt with a lost answer has written itself, it is somebody else's.
        Raises OSError when the file cannot be opened.
        """
        headers = {"Content-Type": content_type(check_key(key))}
        if sha256 is not None:
            headers[_SHA256] = sha256.hex
        if not if_absent:
            self._write(key, source, headers, {}, sha256, progress)
            return True
        return self._write_if_absent(key, source, headers, sha256)

    def delete(self, keys: Collection[str]) -> None:
        """See `Backend.delete`."""
        left = iter([check_key(key) for key in keys])
        while batch := list(islice(left, _BATCH)):
            if len(batch) == 1 or not self._delete_batch(batch):
                for key in batch:
                    self._delete_one(key)

    def refresh(self, key: str) -> bool:
        """See `Backend.refresh`: the server copies the entry onto itself."""

        def once() -> bool:
            found = self._headers(key)
            if found is None:
                return False
            self._copy(key, found)
            return True

        check_key(key)
        return self._bucket.do(once)

    @contextmanager
    def spool(self) -> Iterator[Path]:
        """See `Backend.spool`: where `$TMPDIR` says."""
        with tempfile.TemporaryDirectory(prefix="vzrepro-") as directory:
            yield Path(directory, "spool")

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        """See `Backend.lock`: always granted."""
        return nullcontext()

    # --- the bucket as a whole ----------------------------------------------------------------------------------------

    def create_bucket_if_missing(self) -> bool:
        """Have the bucket exist; whether it was made now. Raises RemoteError."""

        def once() -> bool:
            try:
                self._bucket.ask("HEAD", None).content(_MAX_ANSWER)
            except S3Refused as refused:
                if refused.status != 404:
                    raise
            else:
                return False
            try:
                self._bucket.ask("PUT", None, payload=self._bucket.creation()).content(_MAX_ANSWER)
            except S3Refused as refused:
                if refused.code != "BucketAlreadyOwnedByYou":
                    raise
            return True

        return self._bucket.do(once)

    def probe(self) -> Quirks:
        """Find out what the server really does, with entries that are removed again. Raises RemoteError."""
        return probe(self._bucket)

    def abort_stale_uploads(self, older_than_secs: float) -> int:
        """Remove what uploads of large files to this place have left that were begun so long ago; how many there were.

        Raises RemoteError.
        """
        before = self.now() - older_than_secs
        stale = [each for each in unfinished(self._bucket, "") if each.begun < before]
        for each in stale:
            abort(self._bucket, each.key, each.id)
        return len(stale)

    # --- reading, in detail -------------------------------------------------------------------------------------------

    def _opened(self, key: str, start: int, end: int | None) -> Body | None:
        """One answer with an entry's content, None for a missing one. Raises AttemptFailed."""
        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            answer = self._bucket.ask("GET", key, headers=headers)
        except S3Refused as refused:
            if refused.status == 416 and not start:
                return Body(0, 0, None, lambda: b"", lambda: None)  # an empty entry has no first byte
            # A NAR that a narinfo promises is not missing in a sound cache, so being refused one is worth telling.
            if self._is_missing(key, refused, hides=not key.startswith(NARS)):
                return None
            raise
        self._exists = True
        self._concealment.was_read(key)
        return answer.body(start)

    def _headers(self, key: str) -> Answer | None:
        """An entry's headers, None for a missing one. Raises AttemptFailed."""
        try:
            answer = self._bucket.ask("HEAD", key)
        except S3Refused as refused:
            if self._is_missing(key, refused, hides=True):
                return None
            raise
        answer.content(_MAX_ANSWER)
        self._exists = True
        return answer

    def _is_missing(self, key: str, refused: S3Refused, *, hides: bool) -> bool:
        """Whether a refusal says that there is no such entry, in a bucket that is there. Raises AttemptFailed."""
        if refused.status == 404 and refused.code != "NoSuchBucket":
            if not self._exists and not refused.code:
                self._require_bucket()
            self._exists = True
            return True
        return refused.status == 403 and hides and self._concealment.hides(key)

    def _require_bucket(self) -> None:
        """An answer to HEAD has no room for saying that even the bucket is missing."""
        try:
            self._bucket.ask("HEAD", None).content(_MAX_ANSWER)
        except S3Refused as refused:
            if refused.status == 404:
                raise self._bucket.missing() from refused
            if refused.status != 403:
                raise

    def _reads_info(self) -> bool:
        """For `Concealment`."""
        self._bucket.ask("GET", CACHE_INFO).content(_MAX_ANSWER)
        return True

    # --- writing, in detail -------------------------------------------------------------------------------------------

    def _write_if_absent(
        self, key: str, source: bytes | Path, headers: dict[str, str], sha256: FileHash | None
    ) -> bool:
        if self._honours_condition() and (isinstance(source, bytes) or source.stat().st_size <= PART):
            return self._write_conditionally(key, source, headers, sha256)
        # Between looking and writing there is a gap. The condition closes it where the server knows it after all, and
        # these locks at least among our own threads.
        with self._turns[hash(key) % _TURNS]:
            if self.head(key) is not None:
                return False
            return self._write_conditionally(key, source, headers, sha256)

    def _write_conditionally(
        self, key: str, source: bytes | Path, headers: dict[str, str], sha256: FileHash | None
    ) -> bool:
        """Write with the condition, where the server does not refuse that; whether nothing was there."""
        try:
            self._write(key, source, headers, {} if self._refuses_condition else {"If-None-Match": "*"}, sha256)
        except RemoteError as error:
            refused = refusal(error)
            if refused is None:
                raise
            if refused.status == 412:
                return False
            if self._refuses_condition or refused.status not in (400, 501):
                raise
            self._write(key, source, headers, {}, sha256)  # Raises when the condition was not what it disliked.
            self._refuses_condition, self._conditional = True, False
        return True

    def _honours_condition(self) -> bool:
        """Whether `vzrepro cache init` has seen that conditional writes are honoured here."""
        with self._lock:
            if self._conditional is None:
                self._conditional = self._read_quirks()
            return self._conditional

    def _read_quirks(self) -> bool:
        opened = self.get(PROBED)
        try:
            return opened is not None and Quirks.parse(read_whole(opened, _MAX_ANSWER, PROBED)).conditional_writes
        except (Damaged, ValueError):
            return False

    def _write(
        self,
        key: str,
        source: bytes | Path,
        headers: dict[str, str],
        condition: dict[str, str],
        sha256: FileHash | None,
        progress: Sent | None = None,
    ) -> None:
        """Raises RemoteError, whose cause is an S3Refused with status 412 when the condition does not hold."""
        if isinstance(source, bytes):
            self._send(key, Payload.of(source), headers | condition)
            return
        with source.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > PART:
                try:
                    upload(
                        self._bucket,
                        self._senders,
                        key,
                        file.fileno(),
                        size,
                        headers,
                        condition,
                        resume=sha256 is not None,
                        progress=progress,
                    )
                except LacksParts:
                    pass
                else:
                    return
            known = None if sha256 is None else sha256.hex
            payload = Payload.of_file(file.fileno(), 0, size, self._patience.check, known)
            self._send(key, payload, headers | condition)

    def _send(self, key: str, payload: Payload, headers: dict[str, str]) -> None:
        self._bucket.do(lambda: self._bucket.ask("PUT", key, headers=headers, payload=payload).content(_MAX_ANSWER))
        self._exists = True

    def _delete_batch(self, keys: Collection[str]) -> bool:
        """Delete with one request; False when the server does not know how. Raises RemoteError."""
        document = ElementTree.Element("Delete", xmlns=XMLNS)
        for key in keys:
            ElementTree.SubElement(ElementTree.SubElement(document, "Object"), "Key").text = self._bucket.full(key)
        ElementTree.SubElement(document, "Quiet").text = "true"
        payload = Payload.of(ElementTree.tostring(document))
        try:
            result = self._bucket.do(lambda: self._bucket.xml("POST", None, {"delete": ""}, payload=payload))
        except RemoteError as error:
            refused = refusal(error)
            if refused is not None and refused.status in _LACKING:
                return False
            raise
        failed = [each for each in result.iterfind("{*}Error") if tag(each, "Code") != "NoSuchKey"]
        if failed:
            first = failed[0]
            raise RemoteError(
                f"{self.url} has not deleted {len(failed)} of {plural(len(keys), 'entry', 'entries')}",
                reason=f"{tag(first, 'Key')}: {tag(first, 'Code')} {tag(first, 'Message')}".rstrip(),
                hint="check what the credentials may do in the bucket",
            )
        return True

    def _delete_one(self, key: str) -> None:
        def once() -> None:
            try:
                self._bucket.ask("DELETE", key).content(_MAX_ANSWER)
            except S3Refused as refused:
                if refused.status != 404 or refused.code == "NoSuchBucket":
                    raise

        self._bucket.do(once)

    def _copy(self, key: str, found: Answer) -> None:
        """Copy an entry with these headers onto itself, so that it keeps them. Raises AttemptFailed, RemoteError."""
        size = found.length or 0
        kept = {name: value for name, value in found.headers.items() if name.lower().startswith("x-amz-meta-")}
        kept["Content-Type"] = found.headers.get("Content-Type") or content_type(key)
        source = {"x-amz-copy-source": quote(f"/{self._place.bucket}/{self._bucket.full(key)}")}
        if etag := found.headers.get("ETag"):
            source["x-amz-copy-source-if-match"] = etag
        try:
            if size <= _MAX_COPY:
                headers = kept | source | {"x-amz-metadata-directive": "REPLACE"}
                self._bucket.xml("PUT", key, {}, headers=headers, slow_bytes=size)
                return
            upload_id = begin(self._bucket, key, kept)
            try:
                self._copy_parts(key, upload_id, size, source)
            except BaseException:
                with suppress(RemoteError):
                    abort(self._bucket, key, upload_id)
                raise
        except S3Refused as refused:
            if refused.status == 412:
                raise AttemptFailed(f"has changed {key} while it was refreshed", again=True) from refused
            raise

    def _copy_parts(self, key: str, upload_id: str, size: int, source: dict[str, str]) -> None:
        etags = {}
        for number, start in enumerate(range(0, size, _COPY_PART), 1):
            span = {"x-amz-copy-source-range": f"bytes={start}-{min(start + _COPY_PART, size) - 1}"}
            query = {"partNumber": str(number), "uploadId": upload_id}
            etags[number] = tag(
                self._bucket.xml("PUT", key, query, headers=source | span, slow_bytes=_COPY_PART), "ETag"
            )
        complete(self._bucket, key, upload_id, size, etags, {})


def _entry(key: str, answer: Answer) -> Entry:
    """What the headers say. Raises AttemptFailed."""
    if answer.length is None:
        raise AttemptFailed(f"does not say how large {key} is", again=False)
    try:
        sha256 = FileHash(answer.headers[_SHA256])
    except (KeyError, ValueError):
        sha256 = None
    return Entry(key, answer.length, answer.modified or 0.0, sha256)


def _next_page(document: Xml) -> dict[str, str]:
    """Servers that have only heard of S3's first way of listing go on after a key."""
    token = tag(document, "NextContinuationToken")
    if token:
        return {"continuation-token": token}
    last = document.findall("{*}Contents")[-1:]
    return {"start-after": _listed_key(document, last[0]) if last else ""}


def _listed_key(document: Xml, each: Xml) -> str:
    """A key of a listing, which is encoded where the server can do that, since XML has no words for all bytes."""
    key = tag(each, "Key")
    return unquote_plus(key) if tag(document, "EncodingType") == "url" else key
