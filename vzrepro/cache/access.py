"""What reading and writing a cache share: entries are asked for here, and here it is given up and complained of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vzrepro.base.errors import RemoteError, Untrusted, VzreproError
from vzrepro.base.model import STORE_DIR, StorePath
from vzrepro.base.signing import TrustedKeys
from vzrepro.cache.backend import CACHE_INFO, Backend, Damaged, read_whole
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.records import MAX_RECORD
from vzrepro.net import printable

_OUR_INFO = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: 40\n".encode()

Warn = Callable[[str], None]


def quiet(*_anything: object) -> None:
    """Take notice of nothing."""


class Access:
    """A cache behind a backend, as this machine trusts it, until it errs; usable from any thread.

    `trusted` are the keys whose objects are taken. `warn` gets at most one line in this object's life. `verified` are
    narinfos that were found and are vouched for, `wrong_nars` the keys of NARs of which this process knows that they
    are wrong, whatever the place says of them: the next push writes them anew.
    """

    def __init__(self, backend: Backend, trusted: TrustedKeys, warn: Warn = quiet) -> None:
        self.backend = backend
        self.trusted = trusted
        self.verified: dict[StorePath, NarInfo] = {}  # misses are not kept: another may push meanwhile
        self.wrong_nars: set[str] = set()
        self.is_broken = False
        self._warn = warn
        self._lock = threading.Lock()
        self._warned = False
        self._has_info: bool | None = None

    @property
    def url(self) -> str:
        """What a person calls the cache."""
        return self.backend.url

    def read(self, key: str, limit: int) -> bytes | None:
        """An entry's bytes; None when there is none. Raises RemoteError; Damaged when there are more than `limit`."""
        opened = self.backend.get(key)
        return None if opened is None else read_whole(opened, limit, f"{key} in {self.url}")

    def look(self, path: StorePath) -> tuple[NarInfo | None, bool]:
        """What the cache has under this path, trusted or not, and whether that is damaged.

        Damaged is what no reader can use, and so nobody's result: unreadable, for another path, not signed, or with
        a wrong signature by a key that is trusted here. Raises RemoteError when the cache fails.
        """
        data = self.read(narinfo_key(path), MAX_SIZE)
        if data is None:
            return None, False
        try:
            info = NarInfo.parse(data)
        except Damaged:
            return None, True
        if info.path != path or info.is_void(self.trusted):
            return None, True
        return info, False

    def reach(self) -> bool:
        """Whether the cache says which store it is for. Raises RemoteError when it cannot be asked, or that is not
        ours."""
        if self._has_info is None:
            try:
                data = self.read(CACHE_INFO, MAX_RECORD)
            except Damaged as error:
                # Whoever sends megabytes instead of a line or two would do so at every question.
                raise RemoteError(f"{self.url} is not a binary cache", reason=error.message) from error
            for line in (data or b"").decode(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == "StoreDir" and value.strip() != STORE_DIR:
                    raise RemoteError(
                        f"{self.url} is a cache for another store",
                        reason=f"its StoreDir is {value.strip()!r}, not {STORE_DIR}",
                        hint="remove it from the configured caches",
                    )
            self._has_info = data is not None
        return self._has_info

    def make_place(self) -> None:
        """Write nix-cache-info if there is none. Raises RemoteError when the cache fails or is another store's."""
        if not self.reach():
            self.backend.put(CACHE_INFO, _OUR_INFO, if_absent=True)
            self._has_info = True

    def may_ask(self) -> bool:
        """Whether the cache has not erred and is our store's. Raises RemoteError."""
        if not self.is_broken:
            self.reach()
        return not self.is_broken

    def disable(self, error: VzreproError) -> None:
        """Stop asking this cache, and say why, once."""
        self.is_broken = True
        self.complain(error)

    def complain(self, error: VzreproError) -> None:
        """Tell of the first thing that is wrong with the cache."""
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            what = printable(error.message)
            reason = f": {printable(error.reason)}" if error.reason else ""
            ending = "it is not asked again" if self.is_broken else "what is wrong there is built here"
            hint = f" ({error.hint})" if error.hint else ""
            self._warn(f"cache {self.url}: {what}{reason}; {ending}{hint}")

    @contextmanager
    def as_miss(self) -> Iterator[None]:
        """Have what is wrong with the cache end the block, told of, and no more: nothing is raised for it."""
        try:
            yield
        except (Untrusted, Damaged) as error:
            self.complain(error)
        except RemoteError as error:
            self.disable(error)
