"""What an S3 server really does, found out by doing it: many accept what they do not honour."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import FORMAT
from vzrepro.cache.s3.bucket import Bucket, Payload, S3Access, S3Refused, tag
from vzrepro.cache.s3.upload import LacksParts, abort, begin, complete, refusal, send_part, unfinished
from vzrepro.net import AttemptFailed
from vzrepro.net.http import Answer

_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Quirks:
    """What a bucket's server honours.

    `conditional_writes`: of two writers, `If-None-Match: *` stops the second; `ranges`: parts of an entry can be read;
    `pagination`: listings come in pages that go on; `multipart`: uploads in parts, `resumable` ones that can be found
    again; `metadata`: what is said of an entry on writing is kept; `path_addressing` and `virtual_addressing`: where
    the bucket's name may be; `anonymous_reads`: entries can be read without credentials; `clock_skew_secs`: how far the
    server's clock is ahead of this machine's.
    """

    conditional_writes: bool
    ranges: bool
    pagination: bool
    multipart: bool
    resumable: bool
    metadata: bool
    path_addressing: bool
    virtual_addressing: bool
    anonymous_reads: bool
    clock_skew_secs: int

    def document(self) -> dict[str, Any]:
        """What `parse` reads once it is canonical JSON."""
        return {"format": FORMAT, "type": "s3-quirks", **asdict(self)}

    @classmethod
    def parse(cls, data: bytes) -> Quirks:
        """Read the entry. Raises ValueError when it is none."""
        try:
            document = json.loads(data)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(document, dict) or (document.get("format"), document.get("type")) != (FORMAT, "s3-quirks"):
            raise ValueError("it is not a record of what an S3 server honours")
        values: dict[str, Any] = {field.name: document.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if type(value) is not (int if name == "clock_skew_secs" else bool):
                raise ValueError(f"{name} is {value!r}")
        return cls(**values)


def probe(bucket: Bucket) -> Quirks:
    """Try everything with entries below `vzrepro-probe/`, which are removed again.

    Raises RemoteError when the bucket cannot even be written, read and cleaned.
    """
    return _Probe(bucket).run()


class _Probe:
    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._base = f"vzrepro-probe/{uuid.uuid4().hex}"
        self._keys = [f"{self._base}/{letter}" for letter in "abc"]

    def run(self) -> Quirks:
        try:
            for key in self._keys:
                self._must("PUT", key, payload=Payload.of(b"0123456789"), headers={"x-amz-meta-sha256": "ab" * 32})
            multipart, resumable = self._multipart()
            return Quirks(
                conditional_writes=self._conditional_writes(),
                ranges=self._tried(self._ranges),
                pagination=self._tried(self._pagination),
                multipart=multipart,
                resumable=resumable,
                metadata=self._must("HEAD", self._keys[0]).headers.get("x-amz-meta-sha256") == "ab" * 32,
                path_addressing=self._readable(self._bucket.addressed(virtual=False)),
                virtual_addressing=self._readable(self._bucket.addressed(virtual=True)),
                anonymous_reads=self._readable(self._bucket.anonymous()),
                clock_skew_secs=round(self._bucket.skew()),
            )
        finally:
            for key in (*self._keys, f"{self._base}/d", f"{self._base}/e"):
                self._bucket.do(lambda key=key: self._delete(key))  # type: ignore[misc]

    def _must(self, method: str, key: str, **more: Any) -> Answer:
        def once() -> Answer:
            answer = self._bucket.ask(method, key, **more)
            answer.content(_MAX)
            return answer

        return self._bucket.do(once)

    def _delete(self, key: str) -> None:
        try:
            self._bucket.ask("DELETE", key).content(_MAX)
        except S3Refused as refused:
            if refused.status != 404:
                raise

    def _tried(self, act: Callable[[], bool]) -> bool:
        """What `act` finds out; a refusal says no."""
        try:
            return self._bucket.do(act)
        except RemoteError as error:
            if refusal(error) is None:
                raise
            return False

    def _conditional_writes(self) -> bool:
        def once() -> bool:
            for payload in (b"first", b"second"):
                try:
                    self._bucket.ask(
                        "PUT", f"{self._base}/d", headers={"If-None-Match": "*"}, payload=Payload.of(payload)
                    ).content(_MAX)
                except S3Refused as refused:
                    if refused.status == 412:
                        return True
                    raise
            return False

        return self._tried(once)

    def _ranges(self) -> bool:
        answer = self._bucket.ask("GET", self._keys[0], headers={"Range": "bytes=3-4"})
        return answer.content(_MAX) == b"34"

    def _pagination(self) -> bool:
        full = [self._bucket.full(key) for key in self._keys]
        query = {"list-type": "2", "prefix": full[0].removesuffix("a"), "max-keys": "2"}
        first = self._bucket.xml("GET", None, query)
        token = tag(first, "NextContinuationToken")
        if tag(first, "IsTruncated") != "true" or not token:
            return False
        second = self._bucket.xml("GET", None, {**query, "continuation-token": token})
        return [tag(each, "Key") for page in (first, second) for each in page.iterfind("{*}Contents")][:3] == full

    def _multipart(self) -> tuple[bool, bool]:
        """Whether a file can be uploaded in parts, and whether its upload can be found before it is complete."""
        key, content = f"{self._base}/e", b"a part"
        try:
            upload_id = begin(self._bucket, key, {})
        except LacksParts:
            return False, False
        try:
            etags = {1: send_part(self._bucket, key, upload_id, 1, Payload.of(content))}
            try:
                resumable = any(each.id == upload_id for each in unfinished(self._bucket, key))
            except RemoteError as error:
                if refusal(error) is None:
                    raise
                resumable = False
            complete(self._bucket, key, upload_id, len(content), etags, {})
            return self._tried(lambda: self._bucket.ask("GET", key).content(_MAX) == content), resumable
        except RemoteError as error:
            if refusal(error) is None:
                raise
            abort(self._bucket, key, upload_id)
            return False, False

    def _readable(self, access: S3Access) -> bool:
        """Whether an entry can be read so; a host name that does not exist is as good as a refusal."""
        try:
            answer = self._bucket.ask("GET", self._keys[0], access=access)
            return answer.content(_MAX) == b"0123456789"
        except AttemptFailed:
            return False
