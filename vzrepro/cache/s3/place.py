"""Which bucket an `s3:` URL means, and how to reach it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from vzrepro.base.errors import UsageError
from vzrepro.cache.backend import is_key

_FORM = (
    "s3://BUCKET[/PREFIX]?endpoint=https://HOST&region=NAME&addressing=path|virtual&profile=NAME"
    "&sse=AES256|aws:kms|aws:kms:dsse&sse-key=ID"
)
_KNOWN = ("endpoint", "region", "addressing", "profile", "sse", "sse-key")
_SSE = ("AES256", "aws:kms", "aws:kms:dsse")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
_WORD = re.compile(r"[\x21-\x7e]+( [\x21-\x7e]+)*")


@dataclass(frozen=True, slots=True)
class S3Place:
    """A bucket, what all keys in it start with ("" or a key), and how to reach it, where that is said.

    `sse` is how the server is asked to encrypt what is written, `sse_key` the key of its key service to use.
    """

    url: str
    bucket: str
    prefix: str
    endpoint: str | None = None
    region: str | None = None
    addressing: str | None = None
    profile: str | None = None
    sse: str | None = None
    sse_key: str | None = None

    @property
    def encryption(self) -> dict[str, str]:
        """The headers of a request that makes an entry."""
        name = "x-amz-server-side-encryption"
        given = {name: self.sse, f"{name}-aws-kms-key-id": self.sse_key}
        return {header: value for header, value in given.items() if value is not None}

    @classmethod
    def parse(cls, url: str) -> S3Place:
        """Read `s3://BUCKET[/PREFIX]?endpoint=…&region=…&addressing=…&profile=…&sse=…&sse-key=…`; all parameters may be
        absent.

        Raises UsageError when it is something else, or holds user names or passwords, which it never needs: they come
        from where every S3 client on the machine looks.
        """
        try:
            parsed = urlsplit(url)
            parameters = parse_qsl(parsed.query, keep_blank_values=True, strict_parsing=bool(parsed.query))
        except ValueError as error:
            raise UsageError(f"{_bare(url)} is not the URL of a bucket", reason=str(error), hint=_FORM) from error
        if "@" in parsed.netloc:
            raise UsageError(
                f"{_bare(url)} must not hold credentials",
                hint="export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws: ?profile=NAME",
            )
        bucket, prefix = parsed.netloc, parsed.path.strip("/")
        if parsed.scheme != "s3" or not _BUCKET.fullmatch(bucket) or parsed.fragment or (prefix and not is_key(prefix)):
            raise UsageError(f"{_bare(url)} is not the URL of a bucket", hint=_FORM)
        given: dict[str, str] = {}
        for name, value in parameters:
            if name not in _KNOWN:
                raise UsageError(
                    f"{_bare(url)} has an unknown parameter: {name}",
                    reason=f"known are {', '.join(_KNOWN)}",
                    hint=_FORM,
                )
            if name in given or not _WORD.fullmatch(value):
                raise UsageError(f"{_bare(url)} needs one value of {name}", hint=_FORM)
            given[name] = value
        if given.get("addressing", "path") not in ("path", "virtual"):
            raise UsageError(f"addressing={given['addressing']} is unknown", reason="it is path or virtual", hint=_FORM)
        if given.get("sse", "AES256") not in _SSE:
            raise UsageError(f"sse={given['sse']} is unknown", reason=f"it is one of {', '.join(_SSE)}", hint=_FORM)
        if "sse-key" in given and not given.get("sse", "").startswith("aws:kms"):
            raise UsageError("sse-key is for sse=aws:kms and sse=aws:kms:dsse", hint=_FORM)
        if "endpoint" in given:
            given["endpoint"] = _endpoint(given["endpoint"])
        tail = f"/{prefix}" if prefix else ""
        query = f"?{parsed.query}" if parsed.query else ""
        fields = {name.replace("-", "_"): value for name, value in given.items()}
        return cls(f"s3://{bucket}{tail}{query}", bucket, prefix, **fields)


def _endpoint(text: str) -> str:
    try:
        parsed = urlsplit(text)
        sound = parsed.scheme in ("http", "https") and bool(parsed.hostname) and (parsed.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or "@" in parsed.netloc or parsed.query or parsed.fragment:
        raise UsageError(
            f"endpoint={_bare(text)} is not the address of an S3 server",
            hint="it looks like endpoint=https://s3.example.org, without user and password",
        )
    return text.rstrip("/")


def _bare(url: str) -> str:
    """Whatever it is, without what may be a password."""
    return url.rpartition("@")[2]
