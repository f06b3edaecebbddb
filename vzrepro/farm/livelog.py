"""The lines of a build that is under way, through the cache: short entries, numbered, which are gone when it has ended
and its whole log is there. Nobody signs them; they are shown and no more.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from types import TracebackType
from typing import Self

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import DrvHash
from vzrepro.cache.access import Access
from vzrepro.cache.backend import Backend, read_whole
from vzrepro.cache.narinfo import deriver_of
from vzrepro.cache.reader import MAX_LOG

TICK_SECS = 1.0
"""How often lines are written and looked for."""

_PIECE = 256 << 10  # bytes of lines in one entry; more within a tick is left to the whole log


def whole_key(drv: DrvHash, name: str, *, failed: bool = False) -> str:
    """The key of a build's whole log, which Nix knows too; that of a failed one is beside it."""
    return f"log/{deriver_of(drv, name)}{'.failed' if failed else ''}"


def piece_key(drv: DrvHash, name: str, stream: str, number: int) -> str:
    """The key of an entry with some lines, counted from 0."""
    return f"log/{deriver_of(drv, name)}.live/{stream}.{number}"


def report_key(drv: DrvHash, name: str, sha256: str) -> str:
    """The key of what a worker found when it built this again for an audit: its report, signed, or the log."""
    return f"log/{deriver_of(drv, name)}.audit/{sha256}"


def failed_log(access: Access, drv: DrvHash, name: str) -> bytes | None:
    """The whole log of a build that failed on a worker, if the cache has one."""
    with access.as_miss():
        return access.read(whole_key(drv, name, failed=True), MAX_LOG)
    return None


class LiveLog:
    """Writes lines while the block runs. What the cache does not take is left out: a build goes on without it."""

    def __init__(self, backend: Backend, drv: DrvHash, name: str) -> None:
        self.stream = secrets.token_hex(4)
        self.pieces = 0
        self._backend, self._drv, self._name = backend, drv, name
        self._lines: list[str] = []
        self._size = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="live-log", daemon=True)

    def line(self, text: str) -> None:
        """Show a line; from any thread."""
        with self._lock:
            if self._size < _PIECE:
                self._lines.append(text)
                self._size += len(text)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        keys = [piece_key(self._drv, self._name, self.stream, number) for number in range(self.pieces)]
        if keys:
            with contextlib.suppress(RemoteError, OSError):
                self._backend.delete(keys)

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECS):
            with self._lock:
                lines, self._lines, self._size = self._lines, [], 0
            if not lines:
                continue
            text = "".join(f"{line}\n" for line in lines).encode(errors="replace")
            with contextlib.suppress(RemoteError, OSError):
                self._backend.put(piece_key(self._drv, self._name, self.stream, self.pieces), text)
                self.pieces += 1


class LogReader:
    """Reads lines as they come, and in the end those that are left; each once."""

    def __init__(self, access: Access, drv: DrvHash, name: str) -> None:
        self._access, self._drv, self._name = access, drv, name
        self._stream = ""
        self._next = 0
        self._told = 0

    def live(self, stream: str, pieces: int) -> list[str]:
        """The lines of the entries up to `pieces` that were not read yet. Another stream begins from its beginning."""
        if stream != self._stream:
            self._stream, self._next, self._told = stream, 0, 0
        lines: list[str] = []
        while self._next < pieces and len(lines) < 10_000:
            data = self._read(piece_key(self._drv, self._name, stream, self._next), 2 * _PIECE)
            if data is None:
                break
            self._next += 1
            lines += data.decode(errors="replace").splitlines()
        self._told += len(lines)
        return lines

    def rest(self, *, failed: bool) -> list[str]:
        """The lines of the whole log behind those that were read."""
        data = self._read(whole_key(self._drv, self._name, failed=failed), MAX_LOG)
        return [] if data is None else data.decode(errors="replace").splitlines()[self._told :]

    def _read(self, key: str, limit: int) -> bytes | None:
        with contextlib.suppress(RemoteError):
            opened = self._access.backend.get(key)
            return None if opened is None else read_whole(opened, limit, key)
        return None
