"""A backend that is a dictionary: the contract's simplest model, and a place where tests can break things."""

from __future__ import annotations

import io
import itertools
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from vzrepro.base.model import FileHash
from vzrepro.cache import Entry, Stream, check_key
from vzrepro.cache.backend import Sent


class MemoryBackend:
    """See `Backend`. Time is a counter, unless there is a `clock`."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.url = "memory:"
        self.entries: dict[str, bytes] = {}
        self.told: dict[str, FileHash | None] = {}
        self.used: dict[str, float] = {}
        self.log: list[tuple[str, str]] = []
        count = itertools.count()
        self._clock = clock or (lambda: float(next(count)))
        self._lock = threading.Lock()

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        self.log.append(("get", check_key(key)))
        if key not in self.entries:
            return None
        self.used[key] = self._clock()
        return io.BytesIO(self.entries[key])

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        sha256: FileHash | None = None,
        progress: Sent | None = None,
    ) -> bool:
        self.log.append(("put", check_key(key)))
        data = source if isinstance(source, bytes) else source.read_bytes()
        with self._lock:
            if if_absent and key in self.entries:
                return False
            self.entries[key] = data
            self.told[key] = sha256
            self.used[key] = self._clock()
        return True

    def head(self, key: str) -> Entry | None:
        self.log.append(("head", check_key(key)))
        if key not in self.entries:
            return None
        return Entry(key, len(self.entries[key]), self.used[key], self.told[key])

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for key, data in list(self.entries.items()):
            if key.startswith(prefix):
                yield Entry(key, len(data), self.used[key])

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            self.entries.pop(check_key(key), None)

    def refresh(self, key: str) -> bool:
        if check_key(key) not in self.entries:
            return False
        self.used[key] = self._clock()
        return True

    def now(self) -> float:
        return self._clock()

    @contextmanager
    def spool(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory, "spool")

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        return nullcontext()
