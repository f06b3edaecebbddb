"""The HTTP client: urllib3 with the system's trust and proxies, and limits to how long anything may take."""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers

from vzrepro.base.errors import VzreproError
from vzrepro.net import CONNECTED, JOBS, PIECE, TRANSIENT, AttemptFailed, Body, printable, refusal, shown, without_auth

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_DRAINED = 1 << 16  # bytes read of an answer that is not wanted, to keep its connection
_MAX_REDIRECTS = 10
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


class Answer:
    """What a server says to one request: status and headers are here, the content is still to be read, with `body` or
    `content`, which give the connection back."""

    def __init__(self, answer: urllib3.BaseHTTPResponse, read_secs: float) -> None:
        self._answer = answer
        self._read_secs = read_secs
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers

    @property
    def retry_after(self) -> float:
        """How many seconds the server asks to be left alone."""
        return _retry_after(self.headers.get("Retry-After"))

    @property
    def date(self) -> float | None:
        """The time by the server's clock, in whole seconds since the epoch."""
        return _date(self.headers.get("Date", ""))

    @property
    def modified(self) -> float | None:
        """When what was asked for was last changed, in seconds since the epoch."""
        return _date(self.headers.get("Last-Modified", ""))

    @property
    def length(self) -> int | None:
        """The size of what was asked for in bytes, if that is known."""
        return _number(self.headers.get("Content-Length", ""))

    def body(self, offset: int, *, head: bool = False) -> Body:
        """The content, asked for from byte `offset` on, as `Http.open` gives it. Raises AttemptFailed."""
        return _body(self._answer, offset, self._read_secs, head)

    def content(self, limit: int) -> bytes:
        """All of the content. Raises AttemptFailed when it takes longer than one read may, or has more than `limit`
        bytes."""
        held, until = bytearray(), time.monotonic() + self._read_secs
        try:
            while piece := self._answer.read1(PIECE):
                held += piece
                if len(held) > limit or time.monotonic() > until:
                    raise AttemptFailed("stalls" if len(held) <= limit else f"says more than {limit} bytes", again=True)
        except (HTTPError, OSError) as error:
            raise AttemptFailed(reason_of(error), again=True) from error
        finally:
            _drop(self._answer)
        return bytes(held)


class Http:
    """Connections that are kept open between downloads, `connections` of them to one host; safe to share between
    threads.

    Honours the proxy variables and the CA bundle of `environ` (SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE), else
    the system's.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ, *, connections: int = JOBS) -> None:
        self._connections = connections
        self._context = _tls(environ)
        self._proxies = _proxies(environ)
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def open(
        self,
        url: str,
        offset: int,
        etag: str | None,
        connect_secs: float,
        read_secs: float,
        *,
        end: int | None = None,
        head: bool = False,
        accept: str | None = None,
    ) -> Body:
        """Ask for `url` from byte `offset` on (only if it still has this ETag), up to, without, byte `end`; with `head`
        for nothing but what is said of it; with `accept` for one of these media types.

        Timeouts in seconds: for the connection; and for the answer's head, then for each read, however slowly bytes
        come. Redirects are followed to http and https only. Raises AttemptFailed.
        """
        headers = {"Accept-Encoding": "identity", "User-Agent": "vzrepro"}
        if accept is not None:
            headers["Accept"] = accept
        if offset or end is not None:
            headers["Range"] = f"bytes={offset}-{'' if end is None else end - 1}"
            if etag is not None:
                headers["If-Range"] = etag
        timeout = urllib3.Timeout(connect=connect_secs, read=read_secs)
        for _ in range(_MAX_REDIRECTS):
            answer = self._request("HEAD" if head else "GET", url, headers, timeout)
            location = answer.headers.get("Location")
            if answer.status not in (301, 302, 303, 307, 308) or location is None:
                return _body(answer, offset, read_secs, head)
            try:
                _drain(answer, read_secs)
            finally:
                _drop(answer)
            url = _redirected(url, location)
        raise AttemptFailed(f"redirects more than {_MAX_REDIRECTS} times", again=False)

    def send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        connect_secs: float,
        read_secs: float,
        data: bytes | Iterable[bytes] | None = None,
    ) -> Answer:
        """One request as it stands, redirects not followed; timeouts as in `open`, and for each piece of `data`.

        Pieces need a Content-Length among the headers. Raises AttemptFailed when there is no answer, whatever it is.
        """
        timeout = urllib3.Timeout(connect=connect_secs, read=read_secs)
        return Answer(self._request(method, url, headers, timeout, data), read_secs)

    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        timeout: urllib3.Timeout,
        data: bytes | Iterable[bytes] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        try:
            bare, auth = without_auth(url)
            return self._pool(bare).request(
                method,
                bare,
                body=data,
                headers=headers if auth is None else headers | make_headers(basic_auth=auth),
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
                timeout=timeout,
            )
        except (HTTPError, OSError, ValueError) as error:
            # A URL that cannot be parsed and a certificate that is not trusted stay so; anything else may pass.
            again = not isinstance(error, ValueError | urllib3.exceptions.SSLError) or _ends_tls(error)
            distrusted = error.args and isinstance(error.args[0], ssl.SSLCertVerificationError)
            hint = (
                "SSL_CERT_FILE can name the bundle of the authority that vouches for the server" if distrusted else None
            )
            unreachable = isinstance(error, urllib3.exceptions.ConnectTimeoutError)  # also refused, unresolved
            raise AttemptFailed(reason_of(error), again=again, hint=hint, unreachable=unreachable) from error

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
        manager: urllib3.PoolManager
        if proxy is None:
            manager = urllib3.PoolManager(maxsize=self._connections, ssl_context=self._context)
        else:
            bare, auth = without_auth(proxy if "://" in proxy else f"http://{proxy}")
            manager = urllib3.ProxyManager(
                bare,
                proxy_headers=None if auth is None else make_headers(proxy_basic_auth=auth),
                maxsize=self._connections,
                ssl_context=self._context,
                proxy_ssl_context=self._context,
            )
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
        return manager


class _Timed(io.RawIOBase):
    """A socket's incoming bytes, with a limit to how long they may take in all until `start` is called again: a
    socket's own timeout starts anew with every byte."""

    def __init__(self, sock: socket.socket, raw: io.RawIOBase) -> None:
        CONNECTED.add(sock)
        self._sock = sock
        self._raw = raw
        self._secs = sock.gettimeout()
        self.start()

    def start(self) -> None:
        self._until = None if self._secs is None else time.monotonic() + self._secs

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        if self._until is not None:
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Answer(http.client.HTTPResponse):
    """An answer whose head, and then each of whose reads, takes no longer than the connection's timeout."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(sock, self.fp.detach())
        self.fp = io.BufferedReader(self._timed)

    def read1(self, n: int = -1) -> bytes:
        self._timed.start()
        return super().read1(n)


class _Connection(HTTPConnection):
    response_class = _Answer


class _TlsConnection(HTTPSConnection):
    response_class = _Answer


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


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


def ca_bundle(environ: Mapping[str, str] = os.environ) -> str | None:
    """The file or directory with the certificates that `Http` trusts, for those who need a name."""
    paths = ssl.get_default_verify_paths()
    named = environ.get("SSL_CERT_FILE") or environ.get("REQUESTS_CA_BUNDLE") or paths.cafile
    return named or next((path for path in _SYSTEM_BUNDLES if Path(path).is_file()), paths.capath)


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


def _redirected(url: str, location: str) -> str:
    """Where an answer sends us. Raises AttemptFailed."""
    try:
        target = urljoin(url, location)
        scheme = urlsplit(target).scheme
    except ValueError as error:
        raise AttemptFailed(f"redirects to the impossible {printable(location)}", again=False) from error
    if scheme not in ("http", "https"):
        raise AttemptFailed(f"redirects to {printable(shown(target))}, which is not http or https", again=False)
    return target


def _body(answer: urllib3.BaseHTTPResponse, offset: int, read_secs: float, head: bool) -> Body:
    """Judge the answer's head. Raises AttemptFailed, having given the connection back, when it carries no usable
    body."""
    try:
        if head or answer.status not in (200, 206):
            _drain(answer, read_secs)
        return _usable_body(answer, offset, head)
    except BaseException:
        _drop(answer)
        raise


def _usable_body(answer: urllib3.BaseHTTPResponse, offset: int, head: bool) -> Body:
    status = answer.status
    span = answer.headers.get("Content-Range", "")
    if status == 416 and not offset and span == "bytes */0":
        _drop(answer)
        return Body(0, 0, None, lambda: b"", lambda: None, True)  # an empty file has no first byte
    if status == 416:
        raise AttemptFailed("has nothing after the part that is there", again=True, stale=True)
    if status not in (200, 206):
        again = status in TRANSIENT
        raise AttemptFailed(
            f"answers {status} {printable(answer.reason or '')}".rstrip(),
            again=again,
            after=_retry_after(answer.headers.get("Retry-After")) if again else 0.0,
            missing=status in (404, 410),
            status=status,
        )
    total = _number(answer.headers.get("Content-Length", ""))
    start = 0
    partial = status == 206 or bool(span)  # rclone's S3 server answers 200 to ranges
    if partial:
        start, total = _content_range(span)
        if start != offset:
            raise AttemptFailed(f"answers from byte {start} on instead of {offset}", again=True, stale=True)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise AttemptFailed("answers with a content encoding nobody asked for", again=False)
    etag = answer.headers.get("ETag")

    def read() -> bytes:
        try:
            return answer.read1(PIECE) or b""
        except (HTTPError, OSError) as error:
            raise AttemptFailed(reason_of(error), again=True) from error

    return Body(
        start,
        total,
        etag if etag and not etag.startswith("W/") else None,
        read,
        lambda: _drop(answer),
        partial,
        _date(answer.headers.get("Last-Modified", "")) if head else None,
    )


def _drain(answer: urllib3.BaseHTTPResponse, secs: float) -> None:
    """Read an answer that nobody wants to its end if that is near, so that its connection serves again.

    Raises AttemptFailed when it does not come: it is part of the answer.
    """
    until, left = time.monotonic() + secs, _DRAINED
    try:
        while left > 0 and (piece := answer.read1(left)):
            left -= len(piece)
            if time.monotonic() > until:
                raise AttemptFailed("stalls", again=True)
    except (HTTPError, OSError) as error:
        raise AttemptFailed(reason_of(error), again=True) from error


def _drop(answer: urllib3.BaseHTTPResponse) -> None:
    """End the answer: its connection is closed unless it was read to the end."""
    answer.close()
    answer.release_conn()


def _content_range(text: str) -> tuple[int, int | None]:
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first, size = _number(span.partition("-")[0]), _number(total)
    if unit != "bytes" or first is None or (size is None and total != "*"):
        raise AttemptFailed(f"answers with the impossible Content-Range {printable(text)!r}", again=True, stale=True)
    return first, size


def _retry_after(text: str | None) -> float:
    if text is None:
        return 0.0
    secs = _number(text.strip())
    date = _date(text)
    return float(secs) if secs is not None else 0.0 if date is None else max(0.0, date - time.time())


def _number(text: str) -> int | None:
    """A size as headers spell it, of at most 18 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _date(text: str) -> float | None:
    """An HTTP date in seconds since the epoch."""
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError, TypeError):
        return None


def reason_of(error: BaseException) -> str:
    """One line saying why the network or the disk refused."""
    kinds = urllib3.exceptions
    if isinstance(error, kinds.ProxyError):
        return f"the proxy: {reason_of(error.original_error)}"
    if isinstance(error, kinds.ProtocolError) and isinstance(error.args[-1], Exception):
        return reason_of(error.args[-1])
    if isinstance(error, http.client.IncompleteRead | urllib3.exceptions.IncompleteRead):
        return "breaks off in the middle"
    if isinstance(error, http.client.RemoteDisconnected):
        return "closes the connection without an answer"
    if isinstance(error, http.client.HTTPException):
        return "answers with something that is not HTTP"
    if isinstance(error, kinds.NameResolutionError):
        return "its host name cannot be resolved"
    if _ends_tls(error):
        return "ends the connection before TLS is agreed on"
    # A refused connection is a kind of time-out to urllib3.
    if isinstance(error, kinds.ConnectTimeoutError) and not isinstance(error, kinds.NewConnectionError):
        return "does not take the connection in time"
    if isinstance(error, kinds.ReadTimeoutError):
        return "stalls"
    return refusal(error)


def _ends_tls(error: BaseException) -> bool:
    """Whether a connection has ended in the middle of TLS, which is like any other break."""
    kinds = ssl.SSLEOFError | ssl.SSLZeroReturnError
    return isinstance(error, urllib3.exceptions.SSLError) and isinstance(error.args[0], kinds)
