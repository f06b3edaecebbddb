"""A backend that writes into a directory and reads it through a real server: the contract over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vzrepro.cache import DirectoryBackend, Entry, Stream
from vzrepro.cache.http import HttpBackend
from vzrepro.cache.remote import Patience
from vzrepro.cache.serve import Server, serve


class Serving:
    """A server of `root`, which is made, on a free port of this machine, until the end of the `with`."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.server: Server = serve(root, "127.0.0.1", 0)
        self.url = self.server.url
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Serving:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.close()
        self._thread.join()


class ServedBackend:
    """See `Backend`."""

    def __init__(self, root: Path, url: str) -> None:
        self._directory = DirectoryBackend(root)
        self._http = HttpBackend(url, Patience(10.0))
        self.url = self._http.url

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        return self._http.get(key)

    def head(self, key: str) -> Entry | None:
        return self._http.head(key)

    def put(self, key: str, source: bytes | Path, **more: Any) -> bool:
        return self._directory.put(key, source, **more)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        return self._directory.list(prefix)

    def delete(self, keys: Collection[str]) -> None:
        self._directory.delete(keys)

    def refresh(self, key: str) -> bool:
        return self._directory.refresh(key)

    def now(self) -> float:
        return self._directory.now()

    def spool(self) -> AbstractContextManager[Path]:
        return self._directory.spool()

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        return self._directory.lock(exclusive=exclusive)
