"""Signed requests to one bucket, and what its refusals mean.

boto3 finds the credentials, the region and Amazon's endpoints, botocore signs; the requests go over `net.http`. A
call of boto3's client costs 1.1 to 1.5 ms of CPU, a request made here 0.4 to 0.5 ms, and a push is mostly small
requests. It also means the same deadlines, proxies, trust and words for what went wrong as for every other place.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree

import boto3
import botocore.exceptions
import botocore.session
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest

from vzrepro.base.errors import RemoteError, UsageError
from vzrepro.cache.remote import Patience
from vzrepro.cache.s3.place import S3Place
from vzrepro.net import TRANSIENT, AttemptFailed
from vzrepro.net.http import Answer, Http, ca_bundle

XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"

CONNECTIONS = 32
"""Connections to the server that are kept open."""

_CHUNK = 1 << 18  # bytes of a file sent at once; each may take as long as an answer may
_MAX_XML = 32 << 20
_MAX_ERROR = 1 << 16
_SLOWEST = 10e6  # bytes per second that a server surely copies and joins objects at
_TRANSIENT_CODES = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
    }
)
_DEFAULT_REGION = "us-east-1"

T = TypeVar("T")
Xml = ElementTree.Element


class S3Refused(AttemptFailed):
    """The server has said no; `status` and `code`, S3's word for the reason, say how ("" where it gives none)."""

    def __init__(self, why: str, status: int, code: str, *, again: bool, after: float = 0.0, hint: str | None = None):
        super().__init__(why, again=again, after=after, hint=hint, status=status, missing=status == 404)
        self.code = code


def _md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)


def _base64(digest: hashlib._Hash) -> str:
    return base64.b64encode(digest.digest()).decode()


@dataclass(frozen=True, slots=True)
class Payload:
    """What a request carries: how many bytes, their SHA-256 in hex, their MD5 in base64 (`Content-MD5`), and the bytes,
    as often as they are asked for."""

    size: int
    sha256: str
    md5: str
    chunks: Callable[[], bytes | Iterable[bytes]]

    @classmethod
    def of(cls, data: bytes) -> Payload:
        """These bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), _base64(_md5(data)), lambda: data)

    @classmethod
    def of_file(cls, fd: int, offset: int, size: int, check: Callable[[], None], sha256: str | None = None) -> Payload:
        """`size` bytes of a file from `offset` on, which are read twice; `sha256` is theirs, where it is known.

        `check` is called between chunks, and may raise to end the sending. Raises RemoteError when the file cannot be
        read.
        """
        digest, md5 = hashlib.sha256(), _md5()
        for chunk in read_file(fd, offset, size, check):
            md5.update(chunk)
            if sha256 is None:
                digest.update(chunk)
        found = sha256 or digest.hexdigest()
        return cls(size, found, _base64(md5), lambda: read_file(fd, offset, size, check))


NOTHING = Payload.of(b"")


class Bucket:
    """The bucket of `place`, to be asked from any thread.

    Credentials are looked for when they are first needed; where there are none, requests go unsigned, as public buckets
    allow.
    """

    def __init__(self, place: S3Place, patience: Patience, http: Http) -> None:
        self.place = place
        self.patience = patience
        self._http = http
        self._access: S3Access | None = None
        self._lock = threading.Lock()
        self._skew: float | None = None

    def ask(
        self,
        method: str,
        key: str | None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        payload: Payload = NOTHING,
        *,
        slow_bytes: int = 0,
        access: S3Access | None = None,
    ) -> Answer:
        """One attempt at one request: for an entry or, without `key`, for the bucket. Any 2xx is returned.

        The server has longer to answer where it works on `slow_bytes` first. Raises AttemptFailed, S3Refused in
        particular, and RemoteError when there can be no request at all.
        """
        access = access or self.access()
        url = access.url(None if key is None else self.full(key), query)
        sent = dict(headers or {})
        if payload is not NOTHING:
            # Buckets with Object Lock demand a checksum, and this is the one that every server knows.
            sent["Content-MD5"] = payload.md5
        writes = key is not None and _makes_an_entry(method, query or {})
        if writes:
            sent |= self.place.encryption
        access.sign(method, url, sent, payload.sha256)
        # Not signed, since proxies may change them.
        sent |= {"Accept-Encoding": "identity", "User-Agent": "vzrepro"}
        if payload.size:
            sent["Content-Length"] = str(payload.size)
        secs = self.patience.timeout_secs
        data = payload.chunks() if payload.size else None

        def send() -> Answer:
            return self._http.send(method, url, sent, secs, secs + slow_bytes / _SLOWEST, data)

        # How long it may take to receive bytes and to work on them is not known so well.
        answer = self.patience.answer(send) if method in ("GET", "HEAD") else send()
        if self._skew is None and (date := answer.date) is not None:
            self._skew = date + 0.5 - time.time()
        if 200 <= answer.status < 300:
            return answer
        content = answer.content(_MAX_ERROR)
        raise self._refusal(answer.status, answer.headers, content, answer.retry_after, writes=writes)

    def do(self, act: Callable[[], T]) -> T:
        """`Patience.attempt` for this bucket."""
        return self.patience.attempt(self.place.url, act)

    def xml(self, method: str, key: str | None, query: Mapping[str, str], **more: Any) -> Xml:
        """Ask as `ask` does, once, for a document. Raises AttemptFailed, also for an error that begins like a
        success."""
        content = self.ask(method, key, query, **more).content(_MAX_XML)
        try:
            document = parsed(content)
        except ValueError as error:
            raise AttemptFailed("answers with something that is not XML", again=False) from error
        if document.tag.rpartition("}")[2] == "Error":
            # Slow operations begin their answer before they know how they end.
            raise self._refusal(200, {}, content, 0.0)
        return document

    def now(self) -> float:
        """The server's clock, in seconds since the epoch, as told by the first answer. Raises RemoteError."""
        return time.time() + self.skew()

    def skew(self) -> float:
        """How many seconds the server's clock is ahead of this machine's. Raises RemoteError."""
        if self._skew is None:
            try:
                self.do(lambda: self.ask("HEAD", "nix-cache-info").content(0))
            except RemoteError:
                if self._skew is None:
                    raise
        return self._skew or 0.0

    def access(self) -> S3Access:
        """How this bucket is reached. Raises UsageError for an unknown profile, RemoteError without a way."""
        with self._lock:
            if self._access is None:
                self._access = S3Access.find(self.place)
            return self._access

    def anonymous(self) -> S3Access:
        """The same without credentials."""
        ours = self.access()
        return S3Access(ours.endpoint, ours.region, ours.bucket, ours.virtual, None)

    def addressed(self, virtual: bool) -> S3Access:
        """The same with the bucket's name in the host name, or in the path."""
        ours = self.access()
        return S3Access(ours.endpoint, ours.region, ours.bucket, virtual, ours.credentials)

    def full(self, key: str) -> str:
        """What the bucket knows the entry as, or what keys that start so start with there."""
        return f"{self.place.prefix}/{key}" if self.place.prefix else key

    def own(self, full: str) -> str | None:
        """The key of what the bucket knows as `full`; None when it is outside of our place."""
        start = f"{self.place.prefix}/" if self.place.prefix else ""
        return full[len(start) :] if full.startswith(start) else None

    def missing(self) -> S3Refused:
        """That there is no such bucket."""
        return S3Refused(
            f"does not exist: there is no bucket {self.place.bucket}",
            404,
            "NoSuchBucket",
            again=False,
            hint=f"vzrepro cache init '{self.place.url}'",
        )

    def creation(self) -> Payload:
        """What the request that makes the bucket says: where, since only Amazon's first region is nobody's choice."""
        region = self.access().region
        if region == _DEFAULT_REGION:
            return NOTHING
        document = ElementTree.Element("CreateBucketConfiguration", xmlns=XMLNS)
        ElementTree.SubElement(document, "LocationConstraint").text = region
        return Payload.of(ElementTree.tostring(document))

    def _refusal(
        self, status: int, headers: Mapping[str, str], content: bytes, after: float, *, writes: bool = False
    ) -> S3Refused:
        code, message = _error(content)
        said = ": ".join(filter(None, (f"{status} {code}".strip(), message)))
        if code == "NoSuchBucket":
            return self.missing()
        region = headers.get("x-amz-bucket-region", "")
        if status in (301, 307, 400) and region and region != self.access().region:
            joint = "&" if "?" in self.place.url else "?"
            return S3Refused(
                f"is in the region {region}", status, code, again=False, hint=f"{self.place.url}{joint}region={region}"
            )
        if code == "RequestTimeTooSkewed":
            why = "refuses, as this machine's clock differs too much from its own"
            return S3Refused(why, status, code, again=False, hint="check the clock: date -u")
        if status in (401, 403) or code == "ExpiredToken":
            hint = self.access().hint()
            if writes and code == "AccessDenied" and self.place.sse is None:
                # Servers do not say that it is this which a bucket's policy demands.
                hint += "; where the bucket demands encryption, its URL needs sse=AES256 or sse=aws:kms"
            return S3Refused(f"refuses: {said}", status, code, again=False, hint=hint)
        again = status in TRANSIENT or code in _TRANSIENT_CODES
        return S3Refused(f"answers {said}", status, code, again=again, after=after if again else 0.0)


def _makes_an_entry(method: str, query: Mapping[str, str]) -> bool:
    """Whether a request for a key begins an entry; what continues an upload in parts must not say how to encrypt it."""
    return (method == "PUT" and "partNumber" not in query) or (method == "POST" and "uploads" in query)


class _Signer(S3SigV4Auth):  # type: ignore[misc]
    """Takes the payload's hash as given, which may be that of a part of a file."""

    def payload(self, request: Any) -> Any:
        return request.context["sha256"]


@dataclass(frozen=True, slots=True)
class S3Access:
    """The server's address and region, how the bucket is named there, and botocore's credentials or None."""

    endpoint: str
    region: str
    bucket: str
    virtual: bool
    credentials: Any

    @classmethod
    def find(cls, place: S3Place) -> S3Access:
        """What the URL says and, for the rest, what botocore finds."""
        try:
            core = botocore.session.Session(profile=place.profile)
            if core.get_config_variable("ca_bundle") is None:
                core.set_config_variable("ca_bundle", ca_bundle())  # for the servers that give credentials
            session = boto3.Session(botocore_session=core)
            region = place.region or session.region_name or _DEFAULT_REGION
            # It knows all of Amazon's partitions, and $AWS_ENDPOINT_URL.
            endpoint = place.endpoint or session.client("s3", region_name=region).meta.endpoint_url
            credentials = session.get_credentials()
        except botocore.exceptions.ProfileNotFound as error:
            raise UsageError(
                f"there is no profile for {place.url}",
                reason=str(error),
                hint="see ~/.aws/config, or unset AWS_PROFILE",
            ) from error
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise RemoteError(f"cannot find how to reach {place.url}", reason=str(error)) from error
        # Only Amazon surely has names for all buckets; its certificates do not cover names with dots.
        amazons = ".amazonaws." in (urlsplit(endpoint).hostname or "")
        virtual = place.addressing == "virtual" or (place.addressing is None and amazons and "." not in place.bucket)
        return cls(endpoint.rstrip("/"), region, place.bucket, virtual, credentials)

    def url(self, key: str | None, query: Mapping[str, str] | None) -> str:
        """The address of an entry or of the bucket, with the query that S3 tells operations apart by."""
        if self.virtual:
            scheme, _, rest = self.endpoint.partition("://")
            base = f"{scheme}://{self.bucket}.{rest}"
        else:
            base = f"{self.endpoint}/{self.bucket}"
        path = f"/{quote(key)}" if key is not None else "/" if self.virtual else ""
        return f"{base}{path}?{urlencode(query, quote_via=quote, safe='')}" if query else f"{base}{path}"

    def sign(self, method: str, url: str, headers: dict[str, str], sha256: str) -> None:
        """Add what proves who asks. Raises AttemptFailed when credentials that expire cannot be renewed."""
        if self.credentials is None:
            return
        try:
            frozen = self.credentials.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise AttemptFailed(f"cannot be asked: {error}", again=False, hint=self.hint()) from error
        request = AWSRequest(method, url, headers=headers)
        request.context["sha256"] = sha256
        _Signer(frozen, "s3", self.region).add_auth(request)
        headers.update(request.headers.items())

    def hint(self) -> str:
        """What to check when the server refuses."""
        if self.credentials is None:
            return "no credentials were found; export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return f"check the credentials, which come from {self.credentials.method}, and what they may do in the bucket"


def parsed(content: bytes) -> Xml:
    """A document of the server's. Raises ValueError for what is no XML, or is in an encoding that nobody knows."""
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError) as error:
        raise ValueError(str(error)) from error


def tag(element: Xml, name: str) -> str:
    """The text of a child, in whatever namespace, or ""."""
    return element.findtext(f"{{*}}{name}") or ""


def _error(content: bytes) -> tuple[str, str]:
    """S3's word for what went wrong, and what it says about it."""
    try:
        document = parsed(content)
    except ValueError:
        return "", ""
    return _line(tag(document, "Code")), _line(tag(document, "Message"))


def _line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "�" for letter in text[:200])


def read_file(fd: int, offset: int, size: int, check: Callable[[], None]) -> Iterator[bytes]:
    """`size` bytes of a file from `offset` on, in chunks; `check` may raise between them. Raises RemoteError."""
    end = offset + size
    while offset < end:
        check()
        try:
            chunk = os.pread(fd, min(_CHUNK, end - offset), offset)
        except OSError as error:
            raise RemoteError("cannot read what is to be uploaded", reason=error.strerror) from error
        if not chunk:
            raise RemoteError("what is to be uploaded has become shorter")
        offset += len(chunk)
        yield chunk
