"""The roots of a cache: store paths that a collection keeps, with everything they refer to, each set by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.model import FORMAT, STORE_DIR, StorePath, canonical_json
from vzrepro.cache.backend import FRESH_SECS, Backend, Damaged, Entry, is_key
from vzrepro.cache.layout import read_entry
from vzrepro.cache.narinfo import MAX_SIZE, NarInfo, narinfo_key
from vzrepro.cache.notice import settle
from vzrepro.cache.parallel import WORKERS, in_order

ROOTS = "roots/"
"""Below which keys roots are."""

_SUFFIX = ".json"
_MAX_ROOT = 64 << 20
_SHOWN = 10  # paths that an error names


class Lacking(VzreproError):
    """The cache lacks objects that a root should keep; `paths` names them."""

    def __init__(self, url: str, name: str, paths: tuple[StorePath, ...]) -> None:
        shown = [*map(str, paths[:_SHOWN]), *([f"{len(paths) - _SHOWN} more"] if len(paths) > _SHOWN else [])]
        super().__init__(
            f"{url} lacks {len(paths)} of the objects that the root {name} should keep",
            reason="\n".join(shown),
            hint=f"vzrepro cache push {paths[0]}; then add the root again (it is there, and keeps what is there)",
        )
        self.paths = paths


@dataclass(frozen=True, slots=True)
class CacheRoot:
    """A named set of store paths that stay. `made` is when, in seconds since the epoch by the place's clock; `paths`
    are sorted, at least one; what they refer to stays with them."""

    name: str
    made: int
    paths: tuple[StorePath, ...]

    @classmethod
    def parse(cls, data: bytes, name: str) -> CacheRoot:
        """Read the entry of the root `name`. Raises ValueError, saying what is wrong."""
        try:
            document = json.loads(data)
        except RecursionError as error:
            raise ValueError("it is nested too deeply") from error
        if not isinstance(document, dict) or document.get("type") != "root":
            raise ValueError("it is not a root")
        if document.get("format") != FORMAT:
            raise ValueError(f"its format is {document.get('format')!r}, which a newer vzrepro may know")
        if set(document) != {"format", "type", "name", "made", "paths"}:
            raise ValueError(f"its fields are {', '.join(sorted(document))}")
        made, texts = document["made"], document["paths"]
        if document["name"] != name:
            raise ValueError(f"it is the root {document['name']!r}")
        if type(made) is not int or not isinstance(texts, list) or not texts:
            raise ValueError("`made` or `paths` is not what it should be")
        if not all(isinstance(text, str) and text.startswith(f"{STORE_DIR}/") for text in texts):
            raise ValueError(f"a path is not below {STORE_DIR}")
        try:
            return cls(name, made, tuple(sorted({StorePath.parse(text) for text in texts})))
        except UsageError as error:
            raise ValueError(error.message) from error

    def render(self) -> bytes:
        """The entry's bytes, canonical JSON."""
        paths = [str(path) for path in self.paths]
        return canonical_json({"format": FORMAT, "type": "root", "name": self.name, "made": self.made, "paths": paths})


def root_key(name: str) -> str:
    """The key of a root. Raises UsageError when `name` is not one part of a key."""
    if "/" in name or not is_key(f"{name}{_SUFFIX}"):
        raise UsageError(
            f"{name!r} is not a name for a root",
            hint="use up to 250 of A-Z a-z 0-9 + - . _ ? =, not starting with a dot",
        )
    return f"{ROOTS}{name}{_SUFFIX}"


def add_root(
    backend: Backend,
    name: str,
    paths: Iterable[StorePath],
    *,
    workers: int = WORKERS,
    pause: Callable[[float], object] = time.sleep,
) -> CacheRoot:
    """Have `paths` and all they refer to stay, under `name`; a root of that name is replaced.

    When this returns, the whole closure is there and no collection that runs meanwhile, or later, takes any of it.
    Raises Lacking when the cache does not have all of it; the root is there all the same and keeps what there is.
    Raises UsageError for a bad name or no paths, RemoteError when the place fails. `pause` waits so many seconds.
    """
    key = root_key(name)
    root = CacheRoot(name, int(backend.now()), tuple(sorted(set(paths))))
    if not root.paths:
        raise UsageError(f"the root {name} needs a path to keep")
    with backend.lock(exclusive=False):
        backend.put(key, root.render())
    # First said, then looked: a collection that has not seen the root is waited for, and may have taken something.
    settle(backend, pause=pause)
    with backend.lock(exclusive=False):
        lacking = _lacking(backend, root.paths, workers)
    if lacking:
        raise Lacking(backend.url, name, lacking)
    return root


def remove_root(backend: Backend, name: str) -> bool:
    """Take the root away; whether it was there. Raises UsageError for a bad name, RemoteError when the place fails."""
    key = root_key(name)
    with backend.lock(exclusive=False):
        there = backend.head(key) is not None
        backend.delete([key])
    return there


def read_roots(backend: Backend, *, workers: int = WORKERS) -> list[CacheRoot]:
    """All roots, by name.

    Raises Damaged, naming the key, when anything below `roots/` is not a root that is understood: what it was meant to
    keep is not known. Raises RemoteError when the place fails.
    """
    found = in_order(lambda entry: _read_root(backend, entry), backend.list(ROOTS), workers)
    return sorted((root for root in found if root is not None), key=lambda root: root.name)


def _read_root(backend: Backend, entry: Entry) -> CacheRoot | None:
    """None when it has been removed since it was listed."""
    name = entry.key.removeprefix(ROOTS).removesuffix(_SUFFIX)
    try:
        if not entry.key.endswith(_SUFFIX) or root_key(name) != entry.key:
            raise ValueError("its key is not that of a root")
        data = read_entry(backend, entry.key, _MAX_ROOT)
        return None if data is None else CacheRoot.parse(data, name)
    except (ValueError, UsageError) as error:
        raise Damaged(
            f"{entry.key} in {backend.url} is not a root that this vzrepro understands",
            reason=str(error.message if isinstance(error, UsageError) else error),
            hint="add the root of that name again, remove it, or update vzrepro; nothing is deleted until then",
        ) from error


def _lacking(backend: Backend, paths: Iterable[StorePath], workers: int) -> tuple[StorePath, ...]:
    """What of the paths' closure is not there, whole; what is there has been made young."""
    stale = backend.now() - FRESH_SECS
    lacking: list[StorePath] = []
    level = list(paths)
    seen = set(level)
    while level:
        following = []
        for path, info in zip(level, in_order(lambda path: _whole(backend, path, stale), level, workers), strict=True):
            if info is None:
                lacking.append(path)
            else:
                new = [reference for reference in info.references if reference not in seen]
                seen.update(new)
                following += new
        level = following
    return tuple(sorted(lacking))


def _whole(backend: Backend, path: StorePath, stale: float) -> NarInfo | None:
    """The path's narinfo if that and its NAR are there; they are made young if they were last written before `stale`,
    the NAR first, as in a push."""
    key = narinfo_key(path)
    entry = backend.head(key)
    try:
        data = None if entry is None else read_entry(backend, key, MAX_SIZE)
        info = None if data is None else NarInfo.parse(data)
    except Damaged:
        return None
    if entry is None or info is None or info.path != path:
        return None
    nar = backend.head(info.url)
    if nar is None or info.file_size not in (None, nar.size):
        return None
    return info if all(backend.refresh(each.key) for each in (nar, entry) if each.mtime < stale) else None
