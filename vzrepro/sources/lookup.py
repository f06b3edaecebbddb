"""What pinning a source may use: mirrors, a place for downloads, and somebody to tell."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vzrepro.base.model import FileHash
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import PinnedFile, SourcePin
from vzrepro.sources import fetch
from vzrepro.sources.fetch.mirroring import DownloadProgress, quiet


@dataclass(frozen=True, slots=True)
class Lookup:
    """One pin's view of the world.

    `root` is the workspace, `downloads` where a run looks for files before it downloads them. `max_bytes` is what a
    download of unknown size may have. `say` tells a line, `warn` one that a person should see.
    """

    mirrors: fetch.Mirrors
    root: Path
    downloads: Path
    max_bytes: int
    say: Callable[[str], None] = lambda _line: None
    warn: Callable[[str], None] = lambda _line: None
    progress: DownloadProgress = quiet
    cancel: threading.Event = field(default_factory=threading.Event)

    def get(self, url: str, max_size: int, *, accept: str | None = None) -> bytes:
        """A small file (`fetch.get`)."""
        return fetch.get(self.mirrors.urls(url), max_size, accept=accept, cancel=self.cancel)

    def download(self, places: Sequence[str], sha256: FileHash | None) -> tuple[PinnedFile, Path]:
        """The file at the first of `places` that has it, and where it is now. Raises as `fetch.download` does, all
        places being mirrors of one file."""
        urls = self.mirrors.urls_of_all(places)
        self.downloads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.downloads) as folder:
            got = Path(folder) / "file"
            found = fetch.download(
                urls, got, sha256=sha256, max_size=self.max_bytes, report=self.progress, cancel=self.cancel
            )
            file = PinnedFile(places[0], found, got.stat().st_size, tuple(places[1:]))
            kept = self.downloads / file.slot
            got.replace(kept)
        return file, kept


Resolver = Callable[[Want, SourcePin | None, Lookup], SourcePin]
"""Pins what one kind of source asks for; the second argument is how it is pinned now, if it is."""
