"""Downloads: from candidate URLs to a file whose sha256 and size were checked, resumed and retried on the way.

A download is written to `<dest>.part`, which survives interruption and which the next attempt goes on from; only
bytes with the right hash ever get the name `dest`. TLS trusts what the system trusts.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies_environment, proxy_bypass_environment

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import make_headers

from vzrepro.errors import HashMismatch, Interrupted, RemoteError, VzreproError
from vzrepro.model import FileHash

PART = ".part"
"""What is added to a file's name while it is incomplete."""

JOBS = 6
"""Downloads at once."""

MAX_UNKNOWN_SIZE = 2 << 30
"""Bytes: where a download without known size is cut off."""

_PIECE = 1 << 18
_MAX_REDIRECTS = 10
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_SYSTEM_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

Report = Callable[[int, int | None], None]
"""Called with bytes that are there and bytes in all (None: not known); from any thread, also with fewer than before
when a download starts over."""


def _quiet(_done: int, _total: int | None) -> None:
    return


class NotFound(RemoteError):
    """Every place answered that it does not have the file."""


@dataclass(frozen=True, slots=True)
class Download:
    """One file to get: candidate URLs, best first; where to; its hash and, if known, its size in bytes."""

    urls: tuple[str, ...]
    dest: Path
    sha256: FileHash
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try; seconds. Tests replace the clock and the dice.

    An attempt that brought bytes starts the count of `tries` and the backoff anew; what ends a download that crawls
    is `total_secs`, to which a file of known size adds its transfer time at `min_speed` (bytes per second), and
    `min_speed` itself, measured over `slow_secs`.
    """

    tries: int = 4
    backoff_secs: float = 0.5
    backoff_max_secs: float = 20.0
    connect_secs: float = 15.0
    read_secs: float = 30.0
    total_secs: float = 600.0
    slow_secs: float = 30.0
    min_speed: int = 16 << 10
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] | None = None
    jitter: Callable[[float, float], float] = random.uniform

    def deadline(self, size: int | None) -> float:
        """When to give up, on `clock`."""
        return self.clock() + self.total_secs + (size or 0) / self.min_speed

    def delay(self, failures: int) -> float:
        """Full jitter: anything up to an exponentially growing bound."""
        return self.jitter(0.0, min(self.backoff_max_secs, self.backoff_secs * 2.0**failures))


class _Failed(Exception):
    """An attempt at one URL came to nothing. `again` says whether another attempt at it may do better."""

    def __init__(
        self,
        why: str,
        *,
        again: bool,
        after: float = 0.0,
        missing: bool = False,
        found: str | None = None,
        stale: bool = False,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.again = again
        self.after = after
        self.missing = missing
        self.found = found
        self.stale = stale


# --- the wire ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Body:
    """An answer: from which byte on it is, how long the whole file is if that is known, its strong ETag, its bytes."""

    start: int
    total: int | None
    etag: str | None
    read: Callable[[], bytes]
    close: Callable[[], None]


class Http:
    """Connections that are kept open between downloads; safe to share between threads.

    Honours the proxy variables and the CA bundle of `environ` (SSL_CERT_FILE, SSL_CERT_DIR, REQUESTS_CA_BUNDLE), else
    the system's.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._context = _tls(environ)
        # urllib.request reads the process's environment; hand it ours.
        self._proxies = getproxies_environment() if environ is os.environ else _proxies(environ)
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def open(self, url: str, offset: int, etag: str | None, patience: Patience) -> _Body:
        """Ask for `url` from byte `offset` on; follows redirects to http and https only."""
        for _ in range(_MAX_REDIRECTS):
            answer = self._request(url, offset, etag, patience)
            location = answer.headers.get("Location")
            if answer.status not in (301, 302, 303, 307, 308) or location is None:
                return _body(answer, offset)
            _drop(answer)
            target = urljoin(url, location)
            if urlsplit(target).scheme not in ("http", "https"):
                raise _Failed(f"redirects to {_shown(target)}, which is not http or https", again=False)
            url = target
        raise _Failed(f"redirects more than {_MAX_REDIRECTS} times", again=False)

    def _request(self, url: str, offset: int, etag: str | None, patience: Patience) -> urllib3.BaseHTTPResponse:
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
                timeout=urllib3.Timeout(connect=patience.connect_secs, read=patience.read_secs),
            )
        except (HTTPError, OSError, ValueError) as error:
            # A URL that cannot be parsed and a certificate that is not trusted stay so; anything else may pass.
            again = not isinstance(error, ValueError | urllib3.exceptions.SSLError)
            raise _Failed(_reason(error), again=again) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        parsed = urlsplit(url)
        proxy = self._proxies.get(parsed.scheme) or self._proxies.get("all")
        if proxy is not None and proxy_bypass_environment(parsed.hostname or "", self._proxies):
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


@cache
def _shared_http() -> Http:
    return Http()


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


def _body(answer: urllib3.BaseHTTPResponse, offset: int) -> _Body:
    """Judge the answer's head. Raises _Failed, having given the connection back, when it carries no usable body."""
    try:
        return _usable_body(answer, offset)
    except BaseException:
        _drop(answer)
        raise


def _usable_body(answer: urllib3.BaseHTTPResponse, offset: int) -> _Body:
    status = answer.status
    if status == 416 and offset:
        raise _Failed("has nothing after the part that is there", again=True, stale=True)
    if status not in (200, 206):
        why = f"answers {status} {answer.reason or ''}".rstrip()
        again = status in _TRANSIENT
        raise _Failed(
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
            raise _Failed(f"answers from byte {start} on instead of {offset}", again=True, stale=True)
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise _Failed("answers with a content encoding nobody asked for", again=False)
    etag = answer.headers.get("ETag")

    def read() -> bytes:
        try:
            return answer.read1(_PIECE) or b""
        except (HTTPError, OSError) as error:
            raise _Failed(_reason(error), again=True) from error

    return _Body(start, total, etag if etag and not etag.startswith("W/") else None, read, lambda: _drop(answer))


def _drop(answer: urllib3.BaseHTTPResponse) -> None:
    """End the answer: its connection is closed unless it was read to the end."""
    answer.close()
    answer.release_conn()


def _content_range(text: str) -> tuple[int, int | None]:
    unit, _, rest = text.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    if unit != "bytes" or not first.isdigit() or not (total == "*" or total.isdigit()):
        raise _Failed(f"answers with the impossible Content-Range {text!r}", again=True, stale=True)
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


def _open_file(url: str, offset: int) -> _Body:
    """The body of a `file:` URL, which never comes from a redirect."""
    parsed = urlsplit(url)
    path = Path(unquote(parsed.path))
    if parsed.netloc not in ("", "localhost") or not path.is_absolute():
        raise _Failed("is not a file on this machine", again=False)
    try:
        source = path.open("rb")
        size = os.fstat(source.fileno()).st_size
        start = offset if offset <= size else 0
        source.seek(start)
    except FileNotFoundError as error:
        raise _Failed("does not exist", again=False, missing=True) from error
    except OSError as error:
        raise _Failed(_reason(error), again=False) from error

    def read() -> bytes:
        try:
            return source.read(_PIECE)
        except OSError as error:
            raise _Failed(_reason(error), again=False) from error

    return _Body(start, size, None, read, source.close)


def _without_auth(url: str) -> tuple[str, str | None]:
    parsed = urlsplit(url)
    auth, at, host = parsed.netloc.rpartition("@")
    return (urlunsplit(parsed._replace(netloc=host)), unquote(auth)) if at else (url, None)


def _shown(url: str) -> str:
    """The URL without user and password."""
    return _without_auth(url)[0]


def _reason(error: BaseException) -> str:
    """One line saying why the network or the disk refused."""
    kinds = urllib3.exceptions
    if isinstance(error, kinds.ProxyError):
        return f"the proxy: {_reason(error.original_error)}"
    if isinstance(error, kinds.ProtocolError) and isinstance(error.args[-1], Exception):
        return _reason(error.args[-1])
    if isinstance(error, kinds.NameResolutionError):
        return "its host name cannot be resolved"
    if isinstance(error, kinds.ConnectTimeoutError):
        return "does not take the connection in time"
    if isinstance(error, kinds.ReadTimeoutError):
        return "stalls"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return re.sub(r"^.*\[Errno \d+\] ", "", str(error)) or type(error).__name__


# --- where bytes go ---------------------------------------------------------------------------------------------------


class _Sink(Protocol):
    """Takes a download's bytes. `size` is how many it holds; a new attempt goes on from there if it `resumes`."""

    size: int
    resumes: bool

    def restart(self) -> None:
        """Forget what is there."""

    def write(self, piece: bytes) -> None:
        """Append."""

    def verify(self) -> None:
        """Raise _Failed when what is there is not what was asked for."""


class _Memory:
    """Bytes whose hash nobody knows beforehand: an attempt never goes on where another one ended."""

    resumes = False

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def restart(self) -> None:
        self.size, self._pieces = 0, []

    def write(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self.size += len(piece)

    def verify(self) -> None:
        return

    def bytes(self) -> bytes:
        return b"".join(self._pieces)


class _Part:
    """The open, locked `.part` file of a download with a known hash. It is not buffered: what is counted is there."""

    resumes = True

    def __init__(self, file: FileIO, path: Path, wanted: FileHash, cap: int) -> None:
        self._file = file
        self._path = path
        self._wanted = wanted
        self._digest = hashlib.sha256()
        self.size = 0
        with _local(path):
            if os.fstat(file.fileno()).st_size > cap:
                file.truncate(0)
            while piece := file.read(_PIECE):
                self._digest.update(piece)
                self.size += len(piece)

    def restart(self) -> None:
        with _local(self._path):
            self._file.seek(0)
            self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, piece: bytes) -> None:
        left = memoryview(piece)
        with _local(self._path):
            while left:
                left = left[self._file.write(left) :]
        self._digest.update(piece)
        self.size += len(piece)

    def verify(self) -> None:
        found = self._digest.hexdigest()
        if found != self._wanted.hex:
            raise _Failed(f"has other content, sha256 {found}", again=False, stale=True, found=f"sha256 {found}")

    def commit(self, dest: Path) -> None:
        """Give the verified file its name, durably."""
        with _local(dest):
            os.fsync(self._file.fileno())
            os.replace(self._path, dest)
            directory = os.open(dest.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Turn the local file system's refusals into errors a person can act on."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise VzreproError(
            f"the disk is full while downloading to {path}" if full else f"cannot write the download {path}",
            reason=error.strerror or str(error),
            hint=f"df -h {path.parent}" if full else f"ls -ld {path.parent}",
        ) from error


# --- attempts ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Source:
    """What became of one candidate URL so far."""

    url: str
    tries: int = 0
    etag: str | None = None
    failure: _Failed | None = None
    alive: bool = True


class _Transfer:
    """Tries candidate URLs in rounds until the sink is content: the next one at once, the same one after a pause."""

    def __init__(
        self,
        urls: Sequence[str],
        sink: _Sink,
        *,
        size: int | None,
        cap: int,
        report: Report,
        cancel: threading.Event,
        patience: Patience,
        http: Http,
    ) -> None:
        self._sources = [_Source(url) for url in dict.fromkeys(urls)]
        self._sink = sink
        self._size = size
        self._cap = cap
        self._report = report
        self._cancel = cancel
        self._patience = patience
        self._http = http
        self._deadline = patience.deadline(size)
        self._failures = 0

    def run(self) -> list[_Source] | None:
        """None when the sink has what was asked for, else every source with its failure."""
        while True:
            pause = 0.0
            for source in self._sources:
                if not source.alive:
                    continue
                before = self._sink.size
                try:
                    self._once_or_afresh(source)
                except _Failed as failure:
                    source.failure = failure
                    if self._sink.size > before:
                        source.tries = self._failures = 0
                    source.tries += 1
                    source.alive = failure.again and source.tries < self._patience.tries
                    pause = max(pause, failure.after) if source.alive else pause
                else:
                    return None
            if not any(source.alive for source in self._sources):
                return self._sources
            pause = max(pause, self._patience.delay(self._failures))
            self._failures += 1
            if self._patience.clock() + pause >= self._deadline:
                return self._sources
            self._sleep(pause)

    def _once_or_afresh(self, source: _Source) -> None:
        """One attempt; if what was there before it may be to blame for its failure, one more from the first byte."""
        resumed = self._sink.size > 0
        try:
            self._once(source)
        except _Failed as failure:
            if not failure.stale:
                raise
            self._sink.restart()
            if not resumed:
                raise
            try:
                self._once(source)
            except _Failed as second:
                if second.stale:
                    self._sink.restart()
                raise

    def _once(self, source: _Source) -> None:
        self._check_cancel()
        sink = self._sink
        if not sink.resumes:
            sink.restart()
        if self._size is not None and sink.size == self._size and sink.size:
            sink.verify()
            return
        if source.url.startswith("file:"):
            body = _open_file(source.url, sink.size)
        else:
            body = self._http.open(source.url, sink.size, source.etag, self._patience)
        with closing(body):
            source.etag = body.etag
            if self._size is not None and body.total is not None and body.total != self._size:
                raise _Failed(
                    f"has {body.total} bytes instead of {self._size}", again=False, found=f"{body.total} bytes"
                )
            if body.start != sink.size:
                sink.restart()
            self._copy(body)
        if self._size is not None and sink.size < self._size:
            raise _Failed(f"ends after {sink.size} of {self._size} bytes", again=True)
        sink.verify()

    def _copy(self, body: _Body) -> None:
        sink, patience = self._sink, self._patience
        total = self._size if self._size is not None else body.total
        self._report(sink.size, total)
        window_end, window_size = patience.clock() + patience.slow_secs, sink.size
        while piece := body.read():
            self._check_cancel()
            if sink.size + len(piece) > self._cap:
                raise _Failed(f"has more than {self._cap} bytes", again=False, stale=True, found="more")
            sink.write(piece)
            self._report(sink.size, total)
            now = patience.clock()
            if now > self._deadline:
                raise _Failed("takes too long", again=False)
            if now >= window_end:
                if sink.size - window_size < patience.min_speed * patience.slow_secs:
                    raise _Failed(f"sends fewer than {patience.min_speed} bytes per second", again=True)
                window_end, window_size = now + patience.slow_secs, sink.size

    def _sleep(self, secs: float) -> None:
        if self._patience.sleep is not None:
            self._patience.sleep(secs)
        else:
            self._cancel.wait(secs)
        self._check_cancel()

    def _check_cancel(self) -> None:
        if self._cancel.is_set():
            raise Interrupted("the download was stopped", hint="run the same command again: it goes on where it was")


def _explained(sources: Sequence[_Source], name: str, wanted: FileHash | None, size: int | None) -> VzreproError:
    """The error for a download that no source could satisfy."""
    tried = [(source, source.failure) for source in sources if source.failure is not None]
    reason = "\n".join(f"{_shown(source.url)} {failure.why}" for source, failure in tried)
    for source, failure in tried:
        if failure.found is not None and wanted is not None:
            pinned = f"sha256 {wanted}" if failure.found.startswith("sha256") else f"{size} bytes"
            return HashMismatch(
                f"{_shown(source.url)} is not the file that is pinned: wanted {pinned}, found {failure.found}",
                reason=reason,
                hint="name a mirror that has the right file in VZREPRO_MIRRORS, or, if the file was meant to change, "
                "run: vzrepro lock --update",
            )
    if tried and all(failure.missing for _, failure in tried):
        return NotFound(
            f"no place has {name}", reason=reason, hint="export VZREPRO_MIRRORS='<name>=https://…' with one that has it"
        )
    return RemoteError(
        f"cannot download {name}",
        reason=reason or "no place to download it from is known",
        hint="check the network, or name a mirror that can be reached: export VZREPRO_MIRRORS='<name>=https://…'",
    )


# --- the public functions ---------------------------------------------------------------------------------------------


def get(
    urls: Sequence[str],
    max_size: int,
    *,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> bytes:
    """The content of the first of `urls` that has it: for indexes, whose hash nobody knows beforehand.

    Raises NotFound when every place says that it has no such file, RemoteError when none of them gives it in at most
    `max_size` bytes, Interrupted when `cancel` is set.
    """
    sink = _Memory()
    failed = _Transfer(
        urls,
        sink,
        size=None,
        cap=max_size,
        report=_quiet,
        cancel=cancel or threading.Event(),
        patience=patience or Patience(),
        http=http or _shared_http(),
    ).run()
    if failed is not None:
        raise _explained(failed, _shown(urls[0]) if urls else "a file", None, None)
    return sink.bytes()


def download(
    urls: Sequence[str],
    dest: Path,
    *,
    sha256: FileHash,
    size: int | None = None,
    report: Report = _quiet,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> None:
    """Have the file with this hash (and size in bytes, if known) at `dest`, from the first of `urls` that gives it.

    A file that is there is verified, not trusted; a wrong one is replaced once the right one is complete. What is
    there of `<dest>.part` is used. Processes that want the same `dest` wait for each other.

    Raises HashMismatch when a place has other content and none has the right one; NotFound, RemoteError as `get`;
    Interrupted when `cancel` is set (the part is kept); VzreproError when the disk is full or cannot be written.
    """
    if _is_there(dest, sha256, report):
        return
    with _local(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
    cancel = cancel or threading.Event()
    part = dest.with_name(dest.name + PART)
    cap = MAX_UNKNOWN_SIZE if size is None else size
    with _locked(part, cancel) as file:
        if _is_there(dest, sha256, report):
            part.unlink()
            return
        sink = _Part(file, part, sha256, cap)
        failed = _Transfer(
            urls,
            sink,
            size=size,
            cap=cap,
            report=report,
            cancel=cancel,
            patience=patience or Patience(),
            http=http or _shared_http(),
        ).run()
        if failed is not None:
            raise _explained(failed, _shown(urls[0]) if urls else dest.name, sha256, size)
        sink.commit(dest)


def _is_there(dest: Path, sha256: FileHash, report: Report) -> bool:
    try:
        with dest.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256.hex:
                return False
            report(file.tell(), file.tell())
            return True
    except OSError:
        return False


@contextmanager
def _locked(part: Path, cancel: threading.Event) -> Iterator[FileIO]:
    """The part file, opened and locked against other processes and threads; the kernel undoes the lock with us."""
    while True:
        with _local(part):
            file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644), "r+")
        with file:
            while not _try_lock(file, part):
                if cancel.wait(0.1):
                    raise Interrupted("the download was stopped while another process downloads the same file")
            if _is_same(file, part):
                yield file
                return
        # Whoever had the lock has renamed or removed the file that we waited for.


def _try_lock(file: FileIO, part: Path) -> bool:
    with _local(part):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_same(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def download_all(
    items: Sequence[Download],
    *,
    jobs: int = JOBS,
    report: Report = _quiet,
    cancel: threading.Event | None = None,
    patience: Patience | None = None,
    http: Http | None = None,
) -> None:
    """`download` every item, `jobs` at once; `report` gets sums over all of them.

    The first error stops the others, which keep their parts, and is raised. Raises as `download` does; an interrupt
    of the calling thread stops all of them too, and does not wait for a server that is silent.
    """
    _Crew(items, jobs, report, cancel or threading.Event(), patience, http).run()


@dataclass(slots=True)
class _Crew:
    """The threads of one `download_all`."""

    items: Sequence[Download]
    jobs: int
    report: Report
    cancel: threading.Event
    patience: Patience | None
    http: Http | None
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)
    error: BaseException | None = None
    running: int = 0

    def run(self) -> None:
        waiting = deque(enumerate(self.items))
        done = [0] * len(self.items)
        sizes = [item.size for item in self.items]
        self.running = min(self.jobs, len(self.items))
        # Daemons: one that waits for a silent server must not keep the process from ending.
        for number in range(self.running):
            threading.Thread(
                target=self._work, args=(waiting, done, sizes), name=f"fetch-{number}", daemon=True
            ).start()
        try:
            with self.changed:
                while self.running and self.error is None and not self.cancel.is_set():
                    self.changed.wait(0.1)
        finally:
            self.stop.set()
            with self.changed:
                self.changed.wait_for(lambda: not self.running, timeout=2)
        if self.error is not None:
            raise self.error
        if self.cancel.is_set() and (waiting or self.running):
            raise Interrupted("the downloads were stopped", hint="run the same command again: it goes on where it was")

    def _work(self, waiting: deque[tuple[int, Download]], done: list[int], sizes: list[int | None]) -> None:
        try:
            while not self.stop.is_set():
                try:
                    number, item = waiting.popleft()
                except IndexError:
                    return
                download(
                    item.urls,
                    item.dest,
                    sha256=item.sha256,
                    size=item.size,
                    report=self._reporter(number, done, sizes),
                    cancel=self.stop,
                    patience=self.patience,
                    http=self.http,
                )
        except BaseException as error:
            with self.changed:
                self.error = self.error or (None if self.stop.is_set() else error)
                self.stop.set()
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def _reporter(self, number: int, done: list[int], sizes: list[int | None]) -> Report:
        def report(item_done: int, item_total: int | None) -> None:
            with self.changed:
                done[number] = item_done
                sizes[number] = item_total
                known = [size for size in sizes if size is not None]
                sum_done, sum_total = sum(done), sum(known) if len(known) == len(sizes) else None
            self.report(sum_done, sum_total)

        return report
