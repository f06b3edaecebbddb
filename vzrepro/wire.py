"""HTTP with the system's trust and proxies, and files, behind one small type of answer."""

from __future__ import annotations

import http.client
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers

from vzrepro.errors import VzreproError

JOBS = 6
"""Downloads at once, and so connections to one host."""

_PIECE = 1 << 18  # bytes read at once
_MAX_REDIRECTS = 10
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


class Failed(Exception):
    """An attempt at one URL came to nothing. `again` says whether another attempt at it may do better, `hint` what a
    person can do."""

    def __init__(
        self,
        why: str,
        *,
        again: bool,
        after: float = 0.0,
        missing: bool = False,
        found: str | None = None,
        stale: bool = False,
        hint: str | None = None,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.again = again
        self.after = after
        self.missing = missing
        self.found = found
        self.stale = stale
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Body:
    """An answer: from which byte on it is, how long the whole file is if that is known, its strong ETag, its bytes, and
    whether it is the answer to a range."""

    start: int
    total: int | None
    etag: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]
    partial: bool = False


class Http:
    """Connections that are kept open between downloads; safe to share between threads.

    Honours the proxy variables and the CA bundle of `environ` (SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE), else
    the system's.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._context = _tls(environ)
        self._proxies = _proxies(environ)
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def open(self, url: str, offset: int, etag: str | None, connect_secs: float, read_secs: float) -> Body:
        """Ask for `url` from byte `offset` on (only if it still has this ETag); timeouts in seconds.

        Redirects are followed to http and https only. Raises Failed.
        """
        timeout = urllib3.Timeout(connect=connect_secs, read=read_secs)
        for _ in range(_MAX_REDIRECTS):
            answer = self._request(url, offset, etag, timeout)
            location = answer.headers.get("Location")
            if answer.status not in (301, 302, 303, 307, 308) or location is None:
                return _body(answer, offset)
            _drop(answer)
            target = urljoin(url, location)
            if urlsplit(target).scheme not in ("http", "https"):
                raise Failed(f"redirects to {shown(target)}, which is not http or https", again=False)
            url = target
        raise Failed(f"redirects more than {_MAX_REDIRECTS} times", again=False)

    def _request(self, url: str, offset: int, etag: str | None, timeout: urllib3.Timeout) -> urllib3.BaseHTTPResponse:
        headers = {"Accept-Encoding": "identity", "User-Agent": "vzrepro"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if etag is not None:
                headers["If-Range"] = etag
        bare, auth = _without_auth(url)
        if auth is not None:
            headers |= make_headers(basic_auth=auth)
        try:
            return self._pool(bare).request(
                "GET",
                bare,
                headers=headers,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=timeout,
            )
        except (HTTPError, OSError, ValueError) as error:
            # A URL that cannot be parsed and a certificate that is not trusted stay so; anything else may pass.
            again = not isinstance(error, ValueError | urllib3.exceptions.SSLError)
            raise Failed(reason_of(error), again=again) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        parsed = urlsplit(url)
        proxy = self._proxies.get(parsed.scheme) or self._proxies.get("all")
        if _bypasses(parsed.hostname or "", self._proxies.get("no", "")):
            proxy = None
        with self._lock:
            if proxy not in self._pools:
                self._pools[proxy] = self._new_pool(proxy)
            return self._pools[proxy]

    def _new_pool(self, proxy: str | None) -> urllib3.PoolManager:
        if proxy is None:
            return urllib3.PoolManager(maxsize=JOBS, ssl_context=self._context)
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        bare, auth = _without_auth(proxy)
        headers = make_headers(proxy_basic_auth=auth) if auth is not None else None
        return urllib3.ProxyManager(
            bare, proxy_headers=headers, maxsize=JOBS, ssl_context=self._context, proxy_ssl_context=self._context
        )


def _tls(environ: Mapping[str, str]) -> ssl.SSLContext:
    bundle = environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE")
    try:
        if bundle:
            is_dir = Path(bundle).is_dir()
            return ssl.create_default_context(cafile=None if is_dir else bundle, capath=bundle if is_dir else None)
        context = ssl.create_default_context()
    except OSError as error:
        raise VzreproError(
            f"the CA bundle {bundle} cannot be read", reason=str(error), hint="correct or unset SSL_CERT_FILE"
        ) from error
    if not environ.get("SSL_CERT_DIR") and not context.cert_store_stats()["x509_ca"]:
        # A Python that was not built for this system looks for its certificates in places that are not there.
        for path in _SYSTEM_BUNDLES:
            if Path(path).is_file():
                context.load_verify_locations(path)
                break
    return context


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for upper in (True, False):  # lower-case names win, as in every client
        for name, value in environ.items():
            if name.lower().endswith("_proxy") and (name != name.lower()) is upper and value:
                found[name.lower().removesuffix("_proxy")] = value
    return found


def _bypasses(host: str, no_proxy: str) -> bool:
    """Whether `$no_proxy` names the host, a domain above it, or everything."""
    names = [name.strip().lstrip(".").lower() for name in no_proxy.split(",")]
    return any(name == "*" or (name and f".{host}".endswith(f".{name}")) for name in names)


def _body(answer: urllib3.BaseHTTPResponse, offset: int) -> Body:
    """Judge the answer's head. Raises Failed, having given the connection back, when it carries no usable body."""
    try:
        return _usable_body(answer, offset)
    except BaseException:
        _drop(answer)
        raise


def _usable_body(answer: urllib3.BaseHTTPResponse, offset: int) -> Body:
    status = answer.status
    if status == 416 and offset:
        raise Failed("has nothing after the part that is there", again=True, stale=True)
    if status not in (200, 206):
        why = f"answers {status} {answer.reason or ''}".rstrip()
        again = status in _TRANSIENT
        raise Failed(
            why,
            again=again,
            after=_retry_after(answer.headers.get("Retry-After")) if again else 0.0,
            missing=status in (404, 410),
        )
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isascii() and length.isdigit() else None
    start = 0
    if status == 206:
        start, total = _content_range(answer.headers.get("Content-Range", ""))
        if start != offset:
            raise Failed(f"answers from byte {start} on instead of {offset}", again=True, stale=True)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise Failed("answers with a content encoding nobody asked for", again=False)
    etag = answer.headers.get("ETag")

    def read() -> bytes:
        try:
            return answer.read1(_PIECE) or b""
        except (HTTPError, OSError) as error:
            raise Failed(reason_of(error), again=True) from error

    return Body(
        start, total, etag if etag and not etag.startswith("W/") else None, read, lambda: _drop(answer), status == 206
    )


def _drop(answer: urllib3.BaseHTTPResponse) -> None:
    """End the answer: its connection is closed unless it was read to the end."""
    answer.close()
    answer.release_conn()


def _content_range(text: str) -> tuple[int, int | None]:
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or not (total == "*" or total.isdigit()):
        raise Failed(f"answers with the impossible Content-Range {text!r}", again=True, stale=True)
    return int(first), None if total == "*" else int(total)


def _retry_after(text: str | None) -> float:
    if text is None:
        return 0.0
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0


def open_file(url: str, offset: int) -> Body:
    """The body of a `file:` URL, which never comes from a redirect."""
    parsed = urlsplit(url)
    path = Path(unquote(parsed.path))
    if parsed.netloc not in ("", "localhost") or not path.is_absolute():
        raise Failed("is not a file on this machine", again=False)
    try:
        source = path.open("rb")
        size = os.fstat(source.fileno()).st_size
        start = offset if offset <= size else 0
        source.seek(start)
    except FileNotFoundError as error:
        raise Failed("does not exist", again=False, missing=True) from error
    except OSError as error:
        raise Failed(reason_of(error), again=False) from error

    def read() -> bytes:
        try:
            return source.read(_PIECE)
        except OSError as error:
            raise Failed(reason_of(error), again=False) from error

    return Body(start, size, None, read, source.close)


def _without_auth(url: str) -> tuple[str, str | None]:
    parsed = urlsplit(url)
    auth, at, host = parsed.netloc.rpartition("@")
    return (urlunsplit(parsed._replace(netloc=host)), unquote(auth)) if at else (url, None)


def shown(url: str) -> str:
    """The URL without user and password."""
    return _without_auth(url)[0]


def reason_of(error: BaseException) -> str:
    """One line saying why the network or the disk refused."""
    kinds = urllib3.exceptions
    if isinstance(error, kinds.ProxyError):
        return f"the proxy: {reason_of(error.original_error)}"
    if isinstance(error, kinds.ProtocolError) and isinstance(error.args[-1], Exception):
        return reason_of(error.args[-1])
    if isinstance(error, http.client.IncompleteRead):
        return "breaks off in the middle"
    if isinstance(error, kinds.NameResolutionError):
        return "its host name cannot be resolved"
    # A refused connection is a kind of time-out to urllib3.
    if isinstance(error, kinds.ConnectTimeoutError) and not isinstance(error, kinds.NewConnectionError):
        return "does not take the connection in time"
    if isinstance(error, kinds.ReadTimeoutError):
        return "stalls"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^.*\[Errno \d+\] ", "", str(error)) or type(error).__name__
