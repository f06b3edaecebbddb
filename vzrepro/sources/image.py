"""Write a toolchain image: .debs in, one deterministic docker-archive out, nothing unpacked in between.

The archive is what `docker save` writes (Docker Image Specification v1.2: manifest.json, a config, one layer).
Its bytes are a function of the .debs' contents, the platform and the lists below, whatever the order, user or host.
Whatever replaces a package's maintainer scripts is here as data; docs/toolchains.md says why it suffices.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import queue
import re
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from vzrepro.base.errors import Interrupted, UsageError
from vzrepro.base.model import IMAGE_FORMAT, Digest
from vzrepro.sources import alternatives, deb
from vzrepro.sources.alternatives import Alternative
from vzrepro.sources.entries import CHUNK, ArchiveEntry

LINKS: Mapping[str, tuple[str, ...]] = {
    "usr/bin/awk": ("gawk", "mawk"),
    "usr/bin/c++": ("g++",),
    "usr/bin/c99": ("gcc",),
    "usr/bin/cc": ("gcc",),
    "usr/bin/sh": ("dash",),
    "usr/bin/yacc": ("bison.yacc",),
}
"""Links that `update-alternatives` or a postinst would make: path → siblings, the first that exists is linked to.

A path that a package ships itself stays as it is."""

DROP: tuple[str, ...] = (
    "usr/bin/*lto-dump*",
    "usr/lib/python3*/test/*",
    "usr/share/bash-completion/*",
    "usr/share/bug/*",
    "usr/share/doc/*",
    "usr/share/doc-base/*",
    "usr/share/doc-rust-web/*",
    "usr/share/info/*",
    "usr/share/lintian/*",
    "usr/share/locale/*",
    "usr/share/man/*",
    "usr/share/menu/*",
)
"""Path patterns (`*` crosses slashes) that no build reads: documentation, translations, tests, lto-dump (2 × 34 MB)."""

KEEP: tuple[str, ...] = ("usr/share/doc/*/copyright",)
"""Patterns that win over `DROP`: images are shared through caches, so the licences stay with the files."""

MAX_BYTES = 7 << 30
"""Default limit for everything that is unpacked; below 8 GiB, what a plain tar header can say of the layer."""

_FOLDED = ("bin", "lib", "lib64", "sbin")
_STANDARD_DIRS: Mapping[str, int] = {
    **dict.fromkeys(("build", "dev", "etc", "in", "out", "proc", "root", "run", "sys", "usr", "var"), 0o755),
    **{f"usr/{name}": 0o755 for name in _FOLDED},
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
_STANDARD_FILES: Mapping[str, str] = {
    "etc/group": "root:x:0:\nbuilder:x:1000:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/passwd": (
        "root:x:0:0:root:/root:/bin/sh\n"
        "builder:x:1000:1000:builder:/build:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n"
    ),
}
_CREATED = "1970-01-01T00:00:01Z"
_MTIME = 1
_BLOCK = 512
_THREADS = 4


class ImageId(Digest):
    """The hash of an image's config: what `docker load` names it by. `str()` gives `sha256:<hex>`."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"sha256:{self.hex}"


@dataclass(frozen=True, slots=True)
class _Body:
    """Where a regular file's bytes wait: `size` bytes at `offset` of a spool file."""

    spool: int
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        offset, end = self.offset, self.offset + self.size
        while offset < end:
            chunk = os.pread(self.spool, min(CHUNK, end - offset), offset)
            if not chunk:
                raise OSError("the spool file of an image became shorter while it was read")
            offset += len(chunk)
            yield chunk


@dataclass(frozen=True, slots=True)
class _Node:
    """One path of the image. Nodes that share one `_Body` object are hard links of each other."""

    kind: Literal["dir", "file", "symlink"]
    mode: int
    owner: str
    target: str = ""
    body: _Body | None = None


_Tree = dict[str, _Node]


def write_image(
    debs: Iterable[tuple[str, Path]],
    out: Path,
    *,
    platform: str,
    links: Mapping[str, Sequence[str]] = LINKS,
    env: Mapping[str, str] | None = None,
    drop: Sequence[str] = DROP,
    keep: Sequence[str] = KEEP,
    max_bytes: int = MAX_BYTES,
    stop: threading.Event | None = None,
) -> ImageId:
    """Write the docker-archive of the packages to the new file `out`; return the id it will have once loaded.

    `debs` are (name for errors, file), each name once; their order does not matter. `platform` is `os/arch`. Besides
    `links`, there are those that the derivation's `env` asks for: `links` (JSON: absolute path → what it leads to) and,
    with `alternatives`, those that the packages' scripts would have `update-alternatives` make.
    File bodies are spooled to nameless temporary files beside `out`; at most `max_bytes` in all are unpacked.
    Raises UsageError when a package is unsound (`deb.read_deb`) or two packages disagree about a path, OSError when
    the disk is full, Interrupted soon after `stop` was set. An `out` that could not be finished is removed.
    """
    stop = stop or threading.Event()
    asked = env or {}
    packages = sorted(debs)
    names = [name for name, _path in packages]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"package {twice[0]} is given twice", hint="name each package of an image once")
    os_name, _, architecture = platform.partition("/")
    with ExitStack() as stack:
        threads = min(_THREADS, os.cpu_count() or 1)
        spools = [stack.enter_context(tempfile.TemporaryFile(dir=out.parent)) for _thread in range(threads)]
        unpack = _Unpacking(drop, keep, max_bytes, spools, stop, "alternatives" in asked)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        try:
            trees = list(pool.map(unpack.tree, names, (path for _name, path in packages)))
        except BaseException:
            unpack.stop()
            raise
        tree = _merge(trees)
        _complete(tree, links, spools[0], json.loads(asked.get("links", "{}")), unpack.alternatives)
        with out.open("xb", buffering=CHUNK) as file:
            try:
                identity = _write_archive(tree, file, os_name, architecture, stop)
                file.flush()
            except BaseException:
                out.unlink()
                raise
        return identity


def image_id(archive: Path) -> ImageId:
    """The id of the image in a docker-archive, read from its manifest. Raises UsageError if there is none."""
    try:
        with tarfile.open(archive, "r:") as tar:
            member = tar.extractfile("manifest.json")
            config = json.loads(member.read(1 << 16))[0]["Config"] if member else ""
        return ImageId(str(config).removesuffix(".json"))
    except (tarfile.TarError, KeyError, IndexError, TypeError, ValueError, EOFError, RecursionError) as error:
        raise UsageError(f"{archive} is not a toolchain image", reason=str(error)) from error


def image_tag(identity: ImageId) -> str:
    """The name the image is loaded under. It keeps `docker image prune` away, and tells a person what this is."""
    return f"vzrepro-toolchain:{identity.hex[:16]}"


# --- reading packages ---------------------------------------------------------------------------------------------


class _Unpacking:
    """Reads packages, several at once: they share one limit of bytes and one stop."""

    def __init__(
        self,
        drop: Sequence[str],
        keep: Sequence[str],
        max_bytes: int,
        spools: Iterable[BinaryIO],
        interrupted: threading.Event,
        with_alternatives: bool,
    ) -> None:
        self._interrupted = interrupted
        self._with_alternatives = with_alternatives
        self.alternatives: list[Alternative] = []
        self._spools: queue.SimpleQueue[BinaryIO] = queue.SimpleQueue()
        for spool in spools:
            self._spools.put(spool)
        self._drop, self._keep = _pattern(drop), _pattern(keep)
        self._lock = threading.Lock()
        self._max = self._left = max_bytes
        self._stopped = False

    def stop(self) -> None:
        """Make the other threads end soon."""
        self._stopped = True

    def tree(self, name: str, path: Path) -> _Tree:
        """The kept paths of one package; its file bodies go to a spool file no other thread writes to."""
        spool = self._spools.get()
        try:
            return self._spool(name, path, spool)
        finally:
            self._spools.put(spool)

    def _spool(self, name: str, path: Path, spool: BinaryIO) -> _Tree:
        tree: _Tree = {}
        bodies: dict[str, _Body] = {}
        offset = spool.tell()
        with path.open("rb") as stream:
            if self._with_alternatives:
                script = deb.control_file(stream, name, "postinst") or b""
                self.alternatives += alternatives.read(script.decode("utf-8", "replace"))
                stream.seek(0)
            for entry in deb.read_deb(stream, name, max_bytes=self._max):
                self._spend(name, entry.size)
                where = _fold(entry, name)
                if where is None:
                    continue
                kept = not self._drop.match(where) or bool(self._keep.match(where))
                if entry.kind == "file":
                    # A dropped file's body is kept while another name may still come to mean it.
                    body = _Body(spool.fileno(), offset, entry.size)
                    for chunk in entry.body:
                        spool.write(chunk)
                    offset += entry.size
                    bodies[entry.path] = body
                if not kept:
                    continue
                node = _node(entry, bodies, name)
                tree[where] = _same(where, tree[where], node) if where in tree else node
        spool.flush()
        return tree

    def _spend(self, name: str, size: int) -> None:
        _check(self._interrupted)
        with self._lock:
            self._left -= size
            if self._left < 0 or self._stopped:
                raise UsageError(
                    f"the packages of the image unpack to more than {self._max} bytes",
                    reason=f"the limit was reached in {name}",
                    hint="ask for fewer packages, or raise the limit if the image is meant to be this large",
                )


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Interrupted("interrupted while an image was being written")


def _pattern(globs: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(glob) for glob in globs) or r"(?!)")


def _fold(entry: ArchiveEntry, name: str) -> str | None:
    """The entry's path with /bin, /lib, /lib64 and /sbin read as /usr/…; None for the links that say just that."""
    top, slash, rest = entry.path.partition("/")
    if entry.path.rpartition("/")[2].startswith(".wh."):
        raise UsageError(f"{name} holds {entry.path}", reason="Docker reads that name as an order to delete a file")
    if top not in _FOLDED:
        return entry.path
    if not slash and entry.kind != "dir":
        if entry.kind == "symlink" and entry.target.strip("/") == f"usr/{top}":
            return None
        raise UsageError(f"{name} ships /{top} as a {entry.kind}", reason=f"in the image it is a link to usr/{top}")
    return f"usr/{top}{slash}{rest}"


def _node(entry: ArchiveEntry, bodies: dict[str, _Body], name: str) -> _Node:
    """Modes are reduced to "may everyone run it": the builder is not root and must be able to read all of it."""
    match entry.kind:
        case "dir":
            return _Node("dir", 0o755, name)
        case "symlink":
            return _Node("symlink", 0o777, name, target=entry.target)
        case "file":
            return _Node("file", 0o755 if entry.mode & 0o111 else 0o644, name, body=bodies[entry.path])
        case "hardlink":
            return _Node("file", 0o755 if entry.mode & 0o111 else 0o644, name, body=bodies[entry.target])


# --- the image's tree ---------------------------------------------------------------------------------------------


def _merge(trees: Sequence[_Tree]) -> _Tree:
    merged: _Tree = {}
    for tree in trees:
        for path, node in tree.items():
            merged[path] = _same(path, merged[path], node) if path in merged else node
    return merged


def _same(path: str, first: _Node, second: _Node) -> _Node:
    """`first`, if `second` means the same. Raises UsageError when the two differ."""
    if replace(second, owner=first.owner, body=first.body) == first and _equal(first.body, second.body):
        return first
    raise UsageError(
        f"{first.owner} and {second.owner} both ship /{path}, and differ",
        hint="leave one of the two packages out of the image",
    )


def _equal(first: _Body | None, second: _Body | None) -> bool:
    if first is None or second is None:
        return first is second
    return first.size == second.size and all(a == b for a, b in zip(first.chunks(), second.chunks(), strict=True))


def _complete(
    tree: _Tree,
    links: Mapping[str, Sequence[str]],
    spool: BinaryIO,
    asked: Mapping[str, str],
    offered: Sequence[Alternative],
) -> None:
    """Add what maintainer scripts would have made, and the directories nobody ships; check that parents are such."""
    own = "the image itself"
    for path, mode in _STANDARD_DIRS.items():
        tree[path] = _Node("dir", mode, own)
    for name in _FOLDED:
        tree[name] = _Node("symlink", 0o777, own, target=f"usr/{name}")
    offset = spool.tell()
    for path, text in _STANDARD_FILES.items():
        data = text.encode()
        spool.write(data)
        tree[path] = _Node("file", 0o644, own, body=_Body(spool.fileno(), offset, len(data)))
        offset += len(data)
    spool.flush()
    for path, candidates in sorted(links.items()):
        siblings = [name for name in candidates if f"{path.rpartition('/')[0]}/{name}" in tree]
        if path not in tree and siblings:
            tree[path] = _Node("symlink", 0o777, own, target=siblings[0])
    for path, target in sorted(asked.items()):
        _link(tree, path, target)
    for path, target in sorted(alternatives.chosen(offered, lambda path: _folded(path) in tree).items()):
        if _folded(path) not in tree:
            tree[_folded(path)] = _Node("symlink", 0o777, own, target=_target(path, target))
    for path, node in list(tree.items()):
        parent = path.rpartition("/")[0]
        while parent and parent not in tree:
            tree[parent] = _Node("dir", 0o755, own)
            parent = parent.rpartition("/")[0]
        if parent and tree[parent].kind != "dir":
            raise UsageError(
                f"{node.owner} ships /{path}, but /{parent} is a {tree[parent].kind} ({tree[parent].owner})",
                hint="leave one of the two packages out of the image",
            )


def _link(tree: _Tree, path: str, target: str) -> None:
    """Make a link that the recipe asks for. Raises UsageError where something is there, or what it leads to is not."""
    where = _folded(path)
    if where in tree:
        raise UsageError(f"the link {path} cannot be made", reason=f"{tree[where].owner} ships it")
    if _folded(target) not in tree:
        raise UsageError(f"the link {path} would lead nowhere", reason=f"no package of the image ships {target}")
    tree[where] = _Node("symlink", 0o777, "the image itself", target=_target(path, target))


def _folded(path: str) -> str:
    """An absolute path as the tree has it."""
    top, slash, rest = path[1:].partition("/")
    return f"usr/{top}{slash}{rest}" if top in _FOLDED else path[1:]


def _target(path: str, target: str) -> str:
    """A link's text: the name alone beside what it leads to."""
    one, other = _folded(path), _folded(target)
    return other.rpartition("/")[2] if one.rpartition("/")[0] == other.rpartition("/")[0] else f"/{other}"


# --- writing ------------------------------------------------------------------------------------------------------


def _write_archive(tree: _Tree, file: BinaryIO, os_name: str, architecture: str, stop: threading.Event) -> ImageId:
    """layer.tar first, since the config needs its hash; its size is known before its bytes are."""
    entries = list(_layer_entries(tree))
    size = sum(len(header) + -(-(body.size if body else 0) // _BLOCK) * _BLOCK for header, body in entries) + 2 * _BLOCK
    file.write(_header(b"layer.tar", b"0", 0o644, size))
    digest = hashlib.sha256()
    for piece in _layer_bytes(entries):
        _check(stop)
        digest.update(piece)
        file.write(piece)
    config = _json(
        {
            "architecture": architecture,
            "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "WorkingDir": "/build"},
            "created": _CREATED,
            "history": [{"created": _CREATED, "created_by": f"vzrepro image format {IMAGE_FORMAT}"}],
            "os": os_name,
            "rootfs": {"diff_ids": [f"sha256:{digest.hexdigest()}"], "type": "layers"},
        }
    )
    identity = ImageId.of(config)
    manifest = _json([{"Config": f"{identity.hex}.json", "Layers": ["layer.tar"], "RepoTags": [image_tag(identity)]}])
    for name, data in ((f"{identity.hex}.json", config), ("manifest.json", manifest)):
        file.write(_header(name.encode(), b"0", 0o644, len(data)) + data + bytes(-len(data) % _BLOCK))
    file.write(bytes(2 * _BLOCK))
    return identity


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _json(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _layer_entries(tree: _Tree) -> Iterator[tuple[bytes, _Body | None]]:
    """Headers in byte order of the paths, so parents come first; of files that share a body the first carries it."""
    written: dict[int, bytes] = {}
    for path in sorted(tree, key=_bytes):
        node, name = tree[path], _bytes(path)
        if node.kind == "dir":
            yield _header(name + b"/", b"5", node.mode, 0), None
        elif node.kind == "symlink":
            yield _header(name, b"2", node.mode, 0, _bytes(node.target)), None
        elif (first := written.get(id(node.body))) is not None:
            yield _header(name, b"1", node.mode, 0, first), None
        else:
            assert node.body is not None
            written[id(node.body)] = name
            yield _header(name, b"0", node.mode, node.body.size), node.body


def _layer_bytes(entries: Sequence[tuple[bytes, _Body | None]]) -> Iterator[bytes]:
    """The layer in pieces of about a chunk: most files are small, and one hash call each would cost more than they."""
    pending = bytearray()
    for header, body in entries:
        pending += header
        if body is not None:
            for chunk in body.chunks():
                pending += chunk
                if len(pending) >= CHUNK:
                    yield bytes(pending)
                    pending.clear()
            pending += bytes(-body.size % _BLOCK)
    yield bytes(pending) + bytes(2 * _BLOCK)


def _header(name: bytes, flag: bytes, mode: int, size: int, target: bytes = b"") -> bytes:
    """A GNU tar header, written here so that its bytes do not hang on the Python version's tarfile."""
    long = b""
    for text, kind in ((target, b"K"), (name, b"L")):
        if len(text) > 100:
            data = text + b"\0"
            long += _header(b"././@LongLink", kind, 0, len(data)) + data + bytes(-len(data) % _BLOCK)
    fields = (
        name[:100].ljust(100, b"\0")
        + b"%07o\0" % mode
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"%011o\0" % _MTIME
        + b" " * 8
        + flag
        + target[:100].ljust(100, b"\0")
        + b"ustar  \0"
    ).ljust(_BLOCK, b"\0")
    return long + fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
