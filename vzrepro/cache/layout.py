"""Which entries of a cache belong together, and which of them are ours: what collecting and checking go by."""

from __future__ import annotations

import hashlib
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from vzrepro.base.errors import UsageError
from vzrepro.base.model import StorePath
from vzrepro.cache.backend import Backend, Damaged, Stream, is_key, read_whole
from vzrepro.cache.directory import DirectoryBackend
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo
from vzrepro.cache.records import build_key_record, differences_prefix

EntryKind = Literal["narinfo", "nar", "drv", "log", "build", "attest"]

MAX_DERIVATION = 16 << 20
"""Bytes of the largest `drv/` record that is read."""

_NARINFO = re.compile(r"[0-9a-df-np-sv-z]{32}\.narinfo")
_FOLDERS: dict[str, EntryKind] = {"nar": "nar", "drv": "drv", "log": "log", "build": "build", "attest": "attest"}
_MERGE = 1 << 16


def kind_of(key: str) -> EntryKind | None:
    """What an entry of this key is in our layout; None for everything else, which is nobody's to delete.

    Roots, `nix-cache-info` and other things of ours that belong to no object are None as well.
    """
    if _NARINFO.fullmatch(key):
        return "narinfo"
    folder, slash, _ = key.partition("/")
    if not slash or not is_key(key) or key.endswith(".ls"):
        return None
    return _FOLDERS.get(folder)


def keys_of(info: NarInfo) -> tuple[str, ...]:
    """The keys of what goes with a narinfo, in the order in which it is removed: records if it may have them, its NAR.

    The narinfo's own key is not among them: it is removed before. NAR and build record may be other narinfos' too.
    """
    return (
        *(() if info.deriver is None else (f"log/{info.deriver}",)),
        *(() if info.drv_hash is None else (f"drv/{info.drv_hash}.json",)),
        *(() if info.build_key is None else (build_key_record(info.build_key),)),
        info.url,
    )


def open_entry(backend: Backend, key: str) -> AbstractContextManager[Stream] | None:
    """As `Backend.get`, but not counting as use where the place can tell that apart."""
    return backend.get(key, use=False) if isinstance(backend, DirectoryBackend) else backend.get(key)


def read_entry(backend: Backend, key: str, limit: int) -> bytes | None:
    """The whole entry, None when there is none; not counting as use, as `open_entry`.

    Raises Damaged when it has more than `limit` bytes, RemoteError when the place fails.
    """
    opened = open_entry(backend, key)
    return None if opened is None else read_whole(opened, limit, f"{key} in {backend.url}")


@dataclass(frozen=True, slots=True)
class Needs:
    """What a narinfo needs to stay whole: other paths, and the keys of NAR and records. Sizes in bytes; `nar_size` is
    that of the NAR as it travels, as far as the narinfo tells."""

    path: StorePath
    references: tuple[StorePath, ...]
    url: str
    nar_size: int
    keys: tuple[str, ...]
    narinfo_size: int


def needs_of(data: bytes, hash_part: str) -> Needs | None:
    """What the narinfo of `hash_part` needs; None when it does not say so, or is another path's.

    It need not be one that we would use: what some Nix client reads keeps its NAR, also when compressed otherwise.
    """
    try:
        info = NarInfo.parse(data)
    except Damaged:
        needs = _needs_of_foreign(data)
    else:
        subject = info.path.hash_part if info.drv_hash is None else info.drv_hash.hex
        keys = (*keys_of(info), differences_prefix(subject), differences_prefix(info.path.hash_part))
        size = info.nar_size if info.file_size is None else info.file_size
        needs = Needs(info.path, info.references, info.url, size, keys, len(data))
    return needs if needs is not None and needs.path.hash_part == hash_part else None


def _needs_of_foreign(data: bytes) -> Needs | None:
    lines = [line.partition(":") for line in data.decode(errors="replace").splitlines()]
    fields = {name: value.strip() for name, _, value in lines}
    url = fields.get("URL", "")
    try:
        path = StorePath.parse(fields.get("StorePath", ""))
        references = tuple(StorePath.parse(text) for text in fields.get("References", "").split())
    except UsageError:
        return None
    if not data.endswith(b"\n") or len(data) > MAX_SIZE or not is_key(url):
        return None
    size = fields.get("FileSize", "")
    deriver = f"log/{fields.get('Deriver', '')}"
    keys = (url, *((deriver,) if is_key(deriver) else ()), differences_prefix(path.hash_part))
    known = int(size) if size.isascii() and size.isdigit() and len(size) <= 18 else 0
    return Needs(path, references, url, known, keys, len(data))


def claim_of(key: str) -> str:
    """What an entry's key is looked up by among `Needs.keys`: `attest/` records go by their folder."""
    parts = key.split("/")
    return f"attest/{parts[1]}/" if parts[0] == "attest" and len(parts) > 2 else key


class KeySet:
    """A set of texts in 8 bytes each, whatever their length.

    By their hash: with a chance of about one in 2^64 for each text in it, it says that it has one that it has not. Who
    uses it must be able to afford that, as one who deletes what is *not* in it can.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._sorted = array("Q")
        self._recent: set[int] = set()
        self.update(texts)

    def update(self, texts: Iterable[str]) -> None:
        """Add all of `texts`."""
        self._recent.update(map(number_of, texts))
        if len(self._recent) > _MERGE:
            self._sorted = array("Q", sorted({*self._sorted, *self._recent}))
            self._recent = set()

    def __contains__(self, text: str) -> bool:
        number = number_of(text)
        at = bisect_left(self._sorted, number)
        return number in self._recent or (at < len(self._sorted) and self._sorted[at] == number)


def number_of(text: str) -> int:
    """64 bits of the text's hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
