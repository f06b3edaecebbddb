"""A binary cache: store objects, signed, in Nix's layout, plus the records that early cutoff and `why` need.

Whatever comes out of a cache is distrusted: signatures and sizes before the first byte, hashes before the result is
used. A cache that errs is a miss, and not asked again in this process. docs/cache.md describes the layout.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from vzrepro import nar
from vzrepro.cache.backend import Backend, Damaged, Entry, Stream
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, deriver_of, narinfo_key, own_message
from vzrepro.cache.signing import SigningKey, TrustedKeys, parse_signature
from vzrepro.errors import HashMismatch, RemoteError, Untrusted, UsageError, VzreproError
from vzrepro.model import (
    FORMAT,
    STORE_DIR,
    BuildKey,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    Outcome,
    Realization,
    StorePath,
    canonical_json,
    store_path,
)

CACHE_INFO = "nix-cache-info"
_CACHE_INFO = f"StoreDir: {STORE_DIR}\nWantMassQuery: 1\nPriority: 40\n".encode()
_MAX_RECORD = 1 << 16
_MAX_LOG = 64 << 20
_PIECE = 1 << 20

Warn = Callable[[str], None]
Progress = Callable[[int, int | None], None]
"""Bytes of the compressed NAR that have arrived, and how many there are if that is known."""


def _quiet(*_anything: object) -> None:
    return


class Kept(enum.Enum):
    """What a push found in the cache and left there."""

    NEW = "new"
    """Nothing was there; the object is now."""
    PRESENT = "present"
    """The same object was there already, whole."""
    HEALED = "healed"
    """A damaged or half object was there and has been replaced, or our signature has joined others."""
    DIFFERENT = "different"
    """Another result was there and stays; a signed record of the difference has been written."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """How a push ended: what is in the cache now, how many bytes were written for it, and, when the cache keeps another
    result, its NAR hash and the key of the record that says so."""

    kept: Kept
    written_bytes: int
    other: NarHash | None = None
    record: str | None = None


class BinaryCache:
    """A cache behind a backend, as this machine trusts it; usable from any thread.

    `trusted` are the keys whose objects are taken; with a `signer`, objects can be pushed. `warn` gets at most one
    line in this object's life. `after_push` is called with the bytes that a push has written.
    """

    def __init__(
        self,
        backend: Backend,
        trusted: TrustedKeys,
        signer: SigningKey | None = None,
        *,
        warn: Warn = _quiet,
        after_push: Callable[[int], None] = _quiet,
    ) -> None:
        self.backend = backend
        self._trusted = trusted
        self._signer = signer
        self._warn = warn
        self._after_push = after_push
        self._lock = threading.Lock()
        self._warned = False
        self._broken = False
        self._place: bool | None = None

    @property
    def url(self) -> str:
        """What a person calls the cache."""
        return self.backend.url

    @property
    def writable(self) -> bool:
        """Whether `push` may be called: there is a key to sign with, and the cache has not erred."""
        return self._signer is not None and not self._broken

    def disable(self, error: VzreproError) -> None:
        """Stop asking this cache, and say why, once."""
        self._broken = True
        self._complain(error)

    # --- taking -------------------------------------------------------------------------------------------------------

    def query(self, path: StorePath) -> NarInfo | None:
        """What the cache has under this path, if a trusted key vouches for it; None for every kind of miss.

        The first thing that is wrong with the cache is reported through `warn`; a cache that cannot be reached or
        belongs to another store is not asked again. Never raises for anything the cache does.
        """
        with self._as_miss():
            if not self._may_ask():
                return None
            data = self._read(narinfo_key(path), MAX_SIZE)
            return None if data is None else self._trusted_info(data, path)
        return None

    def fetch(self, info: NarInfo, dest: Path, progress: Progress = _quiet) -> ObjectInfo:
        """Unpack a queried object at `dest`, which must not exist, in a directory private to the caller.

        Size and hash of the compressed NAR and of the NAR are all checked before this returns; when it raises,
        nothing is left at `dest`. Raises RemoteError, which the caller treats as a miss: Damaged when the entry is
        lost or not what was promised, else the cache has failed and is not asked again. OSError and other
        VzreproErrors are this machine's own.
        """
        if os.path.lexists(dest):
            raise FileExistsError(f"{dest} is there already")  # and not ours to remove
        try:
            self._unpack(info, dest, progress)
        except BaseException as error:
            _remove(dest)
            if isinstance(error, Damaged):
                self._complain(error)
            elif isinstance(error, RemoteError):
                self.disable(error)
            raise
        return ObjectInfo(
            path=info.path,
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            references=info.references,
            drv_hash=info.drv_hash,
            build_key=info.build_key,
            origin=info.origin,
            outcome=Outcome.SUBSTITUTED,
        )

    def by_build_key(self, key: BuildKey) -> Realization | None:
        """What building with exactly these inputs gave, if a trusted key says so; None for every kind of miss."""
        with self._as_miss():
            if not self._may_ask():
                return None
            data = self._read(build_record_key(key), _MAX_RECORD)
            if data is None:
                return None
            realization = self._verified_realization(data)
            if realization.build_key != key:
                raise Untrusted(f"the record {build_record_key(key)} is that of another build key")
            return realization
        return None

    def log(self, path: StorePath) -> bytes | None:
        """The log of this object's build, if the cache has object and log. Logs are plain text that nobody signs."""
        info = self.query(path)
        if info is None or info.deriver is None:
            return None
        with self._as_miss():
            return self._read(f"log/{info.deriver}", _MAX_LOG)
        return None

    # --- giving -------------------------------------------------------------------------------------------------------

    def push(
        self,
        info: ObjectInfo,
        tree: Path,
        *,
        derivation: bytes | None = None,
        log: Path | None = None,
        progress: Progress = _quiet,
    ) -> Pushed:
        """Have the valid object `info`, which lies at `tree`, in the cache: the NAR first, the narinfo last.

        `derivation` is the canonical JSON that hashes to `info.drv_hash`; `log` is the build log, a plain text file;
        `progress` counts bytes of the NAR. The first result wins: when the cache holds another one for this path that
        is sound, it stays.

        Raises RemoteError when the cache fails (it is then not asked again), UsageError when there is no key to sign
        with, HashMismatch when `tree` is not what `info` says, OSError when `tree` cannot be read.
        """
        if self._signer is None:
            raise UsageError(f"cannot push to {self.url}", reason="no key to sign with is configured")
        if derivation is not None and (info.drv_hash is None or DrvHash.of(derivation) != info.drv_hash):
            raise ValueError("the derivation is not the one that the object was made from")
        try:
            pushed = _Push(self, self._signer, info, tree, derivation, log, progress).run()
        except RemoteError as error:
            self.disable(error)
            raise
        self._after_push(pushed.written_bytes)
        return pushed

    def look(self, path: StorePath) -> tuple[NarInfo | None, bool]:
        """For a push: what the cache has under this path, trusted or not, and whether that is damaged.

        Damaged is what no reader can use, and so nobody's result: unreadable, for another path, not signed, or with
        a wrong signature by a key that is trusted here. Raises RemoteError when the cache fails.
        """
        data = self._read(narinfo_key(path), MAX_SIZE)
        if data is None:
            return None, False
        try:
            info = NarInfo.parse(data)
        except Damaged:
            return None, True
        if info.path != path:
            return None, True
        try:
            self._judge(info)
        except Untrusted:
            if not info.signatures or self._claims_trust(info):
                return None, True
        return info, False

    def is_trusted(self, info: NarInfo) -> bool:
        """Whether `query` would return this."""
        try:
            self._judge(info)
        except Untrusted:
            return False
        return True

    def make_place(self) -> None:
        """Write nix-cache-info if there is none. Raises RemoteError when the cache fails or is another store's."""
        if not self._has_info():
            self.backend.put(CACHE_INFO, _CACHE_INFO, if_absent=True)
            self._place = True

    # --- what both need -----------------------------------------------------------------------------------------------

    def _judge(self, info: NarInfo) -> None:
        """Raise Untrusted unless a trusted key has signed what a Nix client knows, and all that we add to it."""
        what = f"{info.path} in {self.url}"
        self._trusted.verify(info.fingerprint, info.signatures, what)
        own = info.own_message
        if own is not None:
            self._trusted.verify(own, info.own_signatures, f"the Vz fields of {what}")

    def _claims_trust(self, info: NarInfo) -> bool:
        """Whether a signature says, rightly or wrongly, that it is by a key which is trusted here."""
        ours = {key.name for key in self._trusted.keys}
        return any(parse_signature(text)[0] in ours for text in info.signatures)

    def _has_info(self) -> bool:
        """Whether the cache says which store it is for. Raises RemoteError when that is not ours."""
        if self._place is None:
            data = self._read(CACHE_INFO, _MAX_RECORD)
            for line in (data or b"").decode(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name == "StoreDir" and value.strip() != STORE_DIR:
                    raise RemoteError(
                        f"{self.url} is a cache for another store",
                        reason=f"its StoreDir is {value.strip()!r}, not {STORE_DIR}",
                        hint="remove it from the configured caches",
                    )
            self._place = data is not None
        return self._place

    def _may_ask(self) -> bool:
        if not self._broken:
            self._has_info()
        return not self._broken

    def _trusted_info(self, data: bytes, path: StorePath) -> NarInfo:
        info = NarInfo.parse(data)
        if info.path != path:
            raise Untrusted(f"{self.url} has {info.path} where {path} belongs")
        self._judge(info)
        return info

    def _verified_realization(self, data: bytes) -> Realization:
        """Read a `build/` record. Raises Untrusted when it is malformed or no trusted key has signed it."""
        try:
            document = json.loads(data)
            made = document["realization"]
            realization = Realization(
                build_key=BuildKey(made["build_key"]),
                drv_hash=DrvHash(made["drv_hash"]),
                path=StorePath.parse(made["path"]),
                nar_hash=NarHash(made["nar_hash"]),
                nar_size=int(made["nar_size"]),
            )
            signatures = [str(text) for text in document["signatures"]]
            message = _realization_message(realization)
            if store_path(realization.drv_hash, realization.path.name) != realization.path:
                raise ValueError("its path is not that of its derivation")
            self._trusted.verify(message, signatures, f"a build record in {self.url}")
        except (ValueError, KeyError, TypeError, UsageError, RecursionError) as error:
            raise Untrusted(f"a build record in {self.url} is malformed", reason=str(error)) from error
        return realization

    def _read(self, key: str, limit: int) -> bytes | None:
        opened = self.backend.get(key)
        if opened is None:
            return None
        pieces, size = [], 0
        with opened as stream:
            while size <= limit and (piece := stream.read(limit + 1 - size)):
                pieces.append(piece)
                size += len(piece)
        if size > limit:
            raise Damaged(f"{key} in {self.url} is larger than {limit} bytes")
        return b"".join(pieces)

    def _unpack(self, info: NarInfo, dest: Path, progress: Progress) -> None:
        opened = self.backend.get(info.url)
        if opened is None:
            raise Damaged(f"{self.url} has lost {info.url}", reason=f"it is the content of {info.path}")
        with opened as stream:
            source = _Counted(stream, info, progress)
            read: nar.Read = source.read
            try:
                if info.compression == "zstd":
                    read = nar.decompress(source.read, max_size=info.nar_size)
                nar_hash, nar_size = nar.unpack(read, dest, max_size=info.nar_size)
            except nar.MalformedNar as error:
                reason = f"{error.message}: {error.reason}" if error.reason else error.message
                raise Damaged(f"{self.url} has a malformed {info.path}", reason=reason) from error
            source.finish()
        if (nar_hash, nar_size) != (info.nar_hash, info.nar_size):
            raise Damaged(
                f"{self.url} has another {info.path} than it promises",
                reason=f"wanted NAR {info.nar_hash.nix} of {info.nar_size} bytes, "
                f"found {nar_hash.nix} of {nar_size} bytes",
            )

    @contextmanager
    def _as_miss(self) -> Iterator[None]:
        try:
            yield
        except (Untrusted, Damaged) as error:
            self._complain(error)
        except RemoteError as error:
            self.disable(error)

    def _complain(self, error: VzreproError) -> None:
        with self._lock:
            first, self._warned = not self._warned, True
        if first:
            reason = f": {error.reason}" if error.reason else ""
            ending = "it is not asked again" if self._broken else "what is wrong there is built here"
            self._warn(f"cache {self.url}: {error.message}{reason}; {ending}")


class _Counted:
    """A compressed NAR on its way in: its size is bounded, its size and hash are compared in the end."""

    def __init__(self, stream: Stream, info: NarInfo, progress: Progress) -> None:
        self._stream = stream
        self._info = info
        self._progress = progress
        self._digest = hashlib.sha256()
        self._size = 0

    def read(self, size: int) -> bytes:
        piece = self._stream.read(size)
        self._digest.update(piece)
        self._size += len(piece)
        if self._info.file_size is not None and self._size > self._info.file_size:
            raise self._mismatch("more")
        if piece:
            self._progress(self._size, self._info.file_size)
        return piece

    def finish(self) -> None:
        """Raise Damaged unless exactly what the narinfo announces has been read."""
        while self.read(_PIECE):
            pass  # the decoder need not have looked for the end
        if self._info.file_size is not None and self._size != self._info.file_size:
            raise self._mismatch(f"{self._size} bytes")
        found = FileHash(self._digest.hexdigest())
        if self._info.file_hash is not None and found != self._info.file_hash:
            raise self._mismatch(found.nix)

    def _mismatch(self, found: str) -> Damaged:
        info = self._info
        wanted = (
            f"{info.file_size} bytes" if info.file_hash is None else f"{info.file_hash.nix}, {info.file_size} bytes"
        )
        return Damaged(f"{info.url} is not what its narinfo says: wanted {wanted}, found {found}")


class _Push:
    """One push: what is in the cache decides what has to be written."""

    def __init__(
        self,
        cache: BinaryCache,
        signer: SigningKey,
        info: ObjectInfo,
        tree: Path,
        derivation: bytes | None,
        log: Path | None,
        progress: Progress,
    ) -> None:
        self._cache = cache
        self._backend = cache.backend
        self._signer = signer
        self._info = info
        self._tree = tree
        self._derivation = derivation
        self._log = log
        self._progress = progress
        self._written = 0

    def run(self) -> Pushed:
        with self._backend.lock(exclusive=False):
            self._cache.make_place()
            pushed = self._settled(*self._cache.look(self._info.path))
        if pushed is not None:
            return pushed
        # Compressing takes long: nothing is held meanwhile, so what is there is looked at again.
        with self._backend.spool() as spool:
            ready = self._compressed(spool)
            with self._backend.lock(exclusive=False):
                existing, damaged = self._cache.look(self._info.path)
                return self._settled(existing, damaged) or self._written_anew(ready, spool, existing, damaged)

    def _settled(self, existing: NarInfo | None, damaged: bool) -> Pushed | None:
        """The end of the push if what is in the cache makes the NAR unnecessary."""
        if existing is None or damaged:
            return None
        if existing.nar_hash != self._info.nar_hash:
            return self._different(existing)
        nar = self._backend.head(existing.url)
        if nar is None or not _is_announced(nar, existing):
            return None
        if not self._cache.is_trusted(existing):
            return self._cosigned(existing)
        self._records(existing)
        return Pushed(Kept.PRESENT, self._written)

    def _written_anew(self, ready: NarInfo, spool: Path, existing: NarInfo | None, damaged: bool) -> Pushed:
        there = self._backend.head(ready.url)
        if there is None or not _is_announced(there, ready):
            self._backend.put(ready.url, spool, sha256=ready.file_hash)
            self._written += ready.file_size or 0
        self._records(ready)
        if existing is not None:
            # The same bytes, whose NAR was lost: whoever vouched for them still does.
            ready = replace(ready, signatures=tuple(dict.fromkeys((*ready.signatures, *existing.signatures))))
        replaces = damaged or existing is not None
        if self._put(narinfo_key(ready.path), ready.render(), if_absent=not replaces):
            return Pushed(Kept.HEALED if replaces else Kept.NEW, self._written)
        # Somebody else was first, just now.
        return self._settled(*self._cache.look(self._info.path)) or Pushed(Kept.PRESENT, self._written)

    def _compressed(self, spool: Path) -> NarInfo:
        """Pack and compress the object into the spool file. Raises HashMismatch when it is not the one announced."""
        info = self._info
        digest, nar_digest, nar_size, file_size = hashlib.sha256(), hashlib.sha256(), 0, 0

        def counted() -> Iterator[bytes]:
            nonlocal nar_size
            for chunk in nar.pack(self._tree):
                nar_digest.update(chunk)
                nar_size += len(chunk)
                yield chunk
                self._progress(nar_size, info.nar_size)

        # Not buffered, so that closing has nothing left to write and to fail at.
        with spool.open("wb", buffering=0) as file:
            for piece in nar.compress(counted()):
                digest.update(piece)
                file_size += len(piece)
                self._write(file, piece)
        if (nar_digest.hexdigest(), nar_size) != (info.nar_hash.hex, info.nar_size):
            raise HashMismatch(
                f"{info.path} is damaged and was not pushed",
                reason=f"wanted NAR {info.nar_hash.nix}, found {NarHash(nar_digest.hexdigest()).nix}",
                hint="vzrepro store verify",
            )
        file_hash = FileHash(digest.hexdigest())
        return NarInfo(
            path=info.path,
            url=f"nar/{file_hash.nix.removeprefix('sha256:')}.nar.zst",
            compression="zstd",
            nar_hash=info.nar_hash,
            nar_size=info.nar_size,
            file_hash=file_hash,
            file_size=file_size,
            references=tuple(sorted(set(info.references))),
            deriver=None if info.drv_hash is None else deriver_of(info.drv_hash, info.path.name),
            drv_hash=info.drv_hash,
            build_key=info.build_key,
            origin=info.origin,
        ).signed(self._signer)

    def _write(self, file: FileIO, piece: bytes) -> None:
        left = memoryview(piece)
        try:
            while left:
                left = left[file.write(left) :]
        except OSError as error:
            raise RemoteError(f"cannot prepare an upload to {self._cache.url}", reason=error.strerror) from error

    def _records(self, info: NarInfo) -> None:
        """What goes with the narinfo and is written before it: derivation, log, build record."""
        if self._derivation is not None and info.drv_hash is not None:
            self._put(f"drv/{info.drv_hash}.json", self._derivation)
        if self._log is not None and info.deriver is not None and self._log.is_file():
            self._backend.put(f"log/{info.deriver}", self._log, if_absent=True)
        if self._info.build_key is not None and self._info.drv_hash is not None:
            realization = Realization(
                self._info.build_key, self._info.drv_hash, self._info.path, self._info.nar_hash, self._info.nar_size
            )
            signature = self._signer.sign(_realization_message(realization))
            record = {"format": FORMAT, "realization": realization.document(), "signatures": [signature]}
            self._put(build_record_key(self._info.build_key), canonical_json(record))

    def _cosigned(self, existing: NarInfo) -> Pushed:
        """Others, unknown here, have pushed the same bytes: vouch for them too, so that they are of use here."""
        info = self._info
        ours = replace(existing, drv_hash=info.drv_hash, build_key=info.build_key, origin=info.origin)
        if ours.own_message != existing.own_message:
            ours = replace(ours, own_signatures=())
        self._records(ours)
        self._put(narinfo_key(ours.path), ours.signed(self._signer).render(), if_absent=False)
        return Pushed(Kept.HEALED, self._written)

    def _different(self, existing: NarInfo) -> Pushed:
        """Record that the same derivation gave other bytes here."""
        info = self._info
        statement: dict[str, Any] = {
            "format": FORMAT,
            "type": "not-deterministic",
            "path": str(info.path),
            "drv_hash": info.drv_hash and info.drv_hash.hex,
            "build_key": info.build_key and info.build_key.hex,
            "kept": {
                "nar_hash": existing.nar_hash.hex,
                "nar_size": existing.nar_size,
                "signatures": list(existing.signatures),
            },
            "found": {"nar_hash": info.nar_hash.hex, "nar_size": info.nar_size},
        }
        signature = self._signer.sign(own_message(statement))
        record = canonical_json({"format": FORMAT, "statement": statement, "signatures": [signature]})
        subject = info.drv_hash.hex if info.drv_hash is not None else info.path.hash_part
        key = f"attest/{subject}/{self._signer.public.id}/{FileHash.of(record)}.json"
        self._put(key, record)
        return Pushed(Kept.DIFFERENT, self._written, existing.nar_hash, key)

    def _put(self, key: str, data: bytes, *, if_absent: bool = True) -> bool:
        written = self._backend.put(key, data, if_absent=if_absent)
        self._written += len(data) if written else 0
        return written


def _is_announced(entry: Entry, info: NarInfo) -> bool:
    """Whether what the place says of a NAR agrees with its narinfo."""
    return info.file_size in (None, entry.size) and entry.sha256 in (None, info.file_hash or entry.sha256)


def _remove(tree: Path) -> None:
    """Remove what a failed unpacking left; its directories may be read-only already."""
    if tree.is_symlink() or not tree.is_dir():  # a hostile NAR may be a link to anywhere: it is never followed
        tree.unlink(missing_ok=True)
        return
    for directory, _, _ in os.walk(tree):
        Path(directory).chmod(0o700)
    shutil.rmtree(tree)


def build_record_key(key: BuildKey) -> str:
    """The key of a build key's record in a cache."""
    return f"build/{key}.json"


def _realization_message(realization: Realization) -> bytes:
    return own_message({"format": FORMAT, "type": "realization", "realization": realization.document()})
