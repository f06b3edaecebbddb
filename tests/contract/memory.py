"""A backend that is a dictionary: the contract's simplest model, and a place where tests can break things."""

from __future__ import annotations

import io
import itertools
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from vzrepro.cache import Entry, Stream, check_key


class MemoryBackend:
    """See `Backend`. Time is a counter."""

    def __init__(self) -> None:
        self.url = "memory:"
        self.entries: dict[str, bytes] = {}
        self.used: dict[str, int] = {}
        self.log: list[tuple[str, str]] = []
        self._clock = itertools.count()
        self._lock = threading.Lock()

    def get(self, key: str) -> AbstractContextManager[Stream] | None:
        self.log.append(("get", check_key(key)))
        if key not in self.entries:
            return None
        self.used[key] = next(self._clock)
        return io.BytesIO(self.entries[key])

    def put(self, key: str, source: bytes | Path, *, if_absent: bool = False) -> bool:
        self.log.append(("put", check_key(key)))
        data = source if isinstance(source, bytes) else source.read_bytes()
        with self._lock:
            if if_absent and key in self.entries:
                return False
            self.entries[key] = data
            self.used[key] = next(self._clock)
        return True

    def head(self, key: str) -> int | None:
        self.log.append(("head", check_key(key)))
        return len(self.entries[key]) if key in self.entries else None

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for key, data in list(self.entries.items()):
            if key.startswith(prefix):
                yield Entry(key, len(data), float(self.used[key]))

    def delete(self, key: str) -> None:
        self.entries.pop(check_key(key), None)

    @contextmanager
    def spool(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory, "spool")

    def lock(self, *, exclusive: bool) -> AbstractContextManager[None]:
        return nullcontext()
