"""Turns what a user calls an image into a root directory: a directory as it is, an OCI layout or a docker-archive
unpacked, with every digest checked.

Formats: OCI image specification 1.1 (index, manifest, config, layers as plain, gzip or zstd tar) and what `docker
save` writes (Docker Image Specification 1.2: manifest.json). Either is a tar archive, a layout also a directory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from vzrepro import nar
from vzrepro.base import disk
from vzrepro.base.errors import HashMismatch, UsageError
from vzrepro.base.tar import TarHeader
from vzrepro.guest.vm.layer import MAX_BYTES, Unpacking

PLATFORM = ("linux", "arm64")
"""What the guest runs."""

_FORMAT = 1  # of the cache: raise it when the same image unpacks to something else
_UNUSED_SECS = 7 * 24 * 3600
_MAX_DOCUMENT = 8 << 20
_CHUNK = 1 << 20
_MAX_NESTING = 4
_REF_NAME = "org.opencontainers.image.ref.name"
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})")
_GZIP, _ZSTD, _ZSTD_SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYERS = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about how it wants to be run; nothing, for a bare root directory."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str = "/"
    user: str = ""
    exposed_ports: tuple[str, ...] = ()
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True, slots=True)
class Image:
    """A root directory, not to be written to, and how it wants to be run. `identity` is the digest of its config."""

    root: Path
    config: ImageConfig
    identity: str | None = None


@contextlib.contextmanager
def image_root(
    path: Path, *, cache: Path, tag: str | None = None, max_bytes: int = MAX_BYTES, now: Callable[[], float] = time.time
) -> Iterator[Image]:
    """The root directory of the image at `path`, there as long as the context lasts.

    An unpacked image is kept in `cache` under the digest of its config, so that the next run finds it; images that
    nobody used for a week are removed from there. `tag` chooses among several images in one layout or archive.
    Raises UsageError for what is no image, several images without a `tag`, another platform than linux/arm64, a layer
    that cannot be unpacked; HashMismatch when bytes are not those that a digest names.
    """
    if path.is_dir() and not _is_layout(path):
        yield Image(path.resolve(), ImageConfig())
        return
    with contextlib.ExitStack() as reading:
        files = _files(path, reading)
        try:
            source = _chosen(files, path, tag)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            _malformed(path, "a document in it", error)
        config = _image_config(source.config, path)
        identity = hashlib.sha256(source.config).hexdigest()
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        root = cache / f"{_FORMAT}-{identity}"
        lock = _lock(root.with_suffix(".lock"))
        try:
            if not root.is_dir():
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not root.is_dir():  # nobody else did it while we waited
                    _unpack(files, source, path, root, max_bytes)
                fcntl.flock(lock, fcntl.LOCK_SH)
            reading.close()
            os.utime(lock)
            _remove_unused(cache, now() - _UNUSED_SECS)
            yield Image(root, config, f"sha256:{identity}")
        finally:
            os.close(lock)


def _is_layout(directory: Path) -> bool:
    return (directory / "index.json").is_file() and (directory / "blobs").is_dir()


# --- the cache ----------------------------------------------------------------------------------------------------


def _lock(path: Path) -> int:
    """The descriptor of the file `path`, made if need be and locked with others; who removes it locks it alone."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        os.close(fd)


def _unpack(files: _Files, source: _Source, path: Path, root: Path, max_bytes: int) -> None:
    """Unpack beside `root`, which appears when all is there and right. The image's lock is held."""
    new = root.with_suffix(".new")
    disk.remove_tree(new)  # a killed run's
    try:
        new.mkdir(mode=0o755)
        if disk.same_name(new.parent, "a", "A"):
            raise UsageError(
                f"{path} cannot be unpacked to {new.parent}",
                reason="its file system ignores the case of names: of a file `a` and a file `A`, one would be lost",
                hint="set XDG_CACHE_HOME to a directory that tells them apart",
            )
        unpacking = Unpacking(new, str(path), max_bytes=max_bytes)
        for number, layer in enumerate(source.layers, 1):
            _apply(files, layer, unpacking, f"layer {number} of {len(source.layers)}", path, max_bytes)
        new.rename(root)
    except BaseException:
        disk.remove_tree(new)
        raise


def _remove_unused(cache: Path, before: float) -> None:
    for lock in cache.glob("*.lock"):
        with contextlib.suppress(FileNotFoundError):
            new = lock.with_suffix(".new")
            if lock.stat().st_mtime >= before and not new.exists():
                continue
            fd = disk.try_lock(lock, create=False)
            if fd is None:
                continue
            try:
                disk.remove_tree(new)
                if lock.stat().st_mtime < before:
                    disk.remove_tree(lock.with_suffix(""))
                    lock.unlink()
            finally:
                os.close(fd)


# --- files of an image ----------------------------------------------------------------------------------------------


class _Files(Protocol):
    """The files of a layout or an archive by their relative names."""

    def size(self, name: str) -> int | None:
        """In bytes; None when there is no such file."""

    def open(self, name: str) -> BinaryIO:
        """From the start."""


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def size(self, name: str) -> int | None:
        if name.startswith("/") or ".." in name.split("/"):  # somebody else's file
            return None
        try:
            found = (self._path / name).stat()
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for what no file can be called
            return None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def open(self, name: str) -> BinaryIO:
        return (self._path / name).open("rb")


class _Archive:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members = {member.name.removeprefix("./"): member for member in tar}

    def _member(self, name: str) -> tarfile.TarInfo | None:
        member = self._members.get(name)
        # `docker save` used to write a layer that two images share as a link.
        if member is not None and member.issym():
            return self._members.get(os.path.normpath(Path(name).parent / member.linkname))
        if member is not None and member.islnk():
            return self._members.get(member.linkname.removeprefix("./"))
        return member

    def size(self, name: str) -> int | None:
        member = self._member(name)
        return member.size if member is not None and member.isreg() else None

    def open(self, name: str) -> BinaryIO:
        member = self._member(name)
        file = None if member is None else self._tar.extractfile(member)
        assert file is not None, "size() said that it is there"
        return file  # type: ignore[return-value]


def _files(path: Path, stack: contextlib.ExitStack) -> _Files:
    """The files of the layout or archive at `path`, open until `stack` ends."""
    if path.is_dir():
        return _Directory(path)
    try:
        plain: BinaryIO = stack.enter_context(path.open("rb"))
        magic = plain.read(4)
        plain.seek(0)
        if magic.startswith(_GZIP) or _is_zstd(magic):
            # Its parts are needed in another order than they come in.
            spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            shutil.copyfileobj(_plain(plain), spool, _CHUNK)
            spool.seek(0)
            plain = spool
        return _Archive(stack.enter_context(tarfile.open(fileobj=plain, mode="r:", tarinfo=TarHeader)))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"there is no image {path}", hint=_LOOKED_FOR) from None
    except (tarfile.TarError, *_DAMAGED) as error:
        reason = f"it is not a whole tar archive: {error}"
        raise UsageError(f"{path} is no image", reason=reason, hint=_LOOKED_FOR) from error


_LOOKED_FOR = (
    "name a root file system directory, an OCI layout (a directory with index.json and blobs/), or what "
    "`docker save` writes (a tar archive with manifest.json)"
)
_DAMAGED = (EOFError, RecursionError, zlib.error, gzip.BadGzipFile, nar.MalformedNar)


def _is_zstd(magic: bytes) -> bool:
    """Whether a file that starts so is zstd: a frame, or one to skip, which pzstd writes first (RFC 8878, 3.1.2)."""
    return magic == _ZSTD or (magic[1:] == _ZSTD_SKIPPABLE and magic[0] >> 4 == 5)


def _plain(stream: BinaryIO) -> BinaryIO:
    """What the stream, at its start and perhaps compressed, unpacks to."""
    buffered = io.BufferedReader(_Raw(stream.read), _CHUNK)
    magic = buffered.peek(4)[:4]
    if magic.startswith(_GZIP):
        return gzip.GzipFile(fileobj=buffered, mode="rb")  # type: ignore[return-value]
    if _is_zstd(magic):
        return io.BufferedReader(_Raw(nar.decompress(buffered, max_size=1 << 60)), _CHUNK)
    return buffered


class _Raw(io.RawIOBase):
    """A raw stream over a function that reads."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Hashing:
    """Reads on, and hashes what it reads."""

    def __init__(self, stream: BinaryIO, algorithm: str, limit: int) -> None:
        self._stream, self._left, self._limit = stream, limit, limit
        self._digest = hashlib.new(algorithm)

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise UsageError(f"a layer unpacks to more than the allowed {self._limit} bytes")
        self._digest.update(data)
        return data

    def hexdigest(self) -> str:
        """Of the whole stream: the rest is read."""
        while self.read(_CHUNK):
            pass
        return self._digest.hexdigest()


# --- which image ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """`name` is its file; `digest` and `size` are those of the file where known, `diff_id` that of the unpacked tar."""

    name: str
    diff_id: str
    digest: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class _Source:
    """An image that was chosen: its config's bytes and its layers, the lowest first."""

    config: bytes
    layers: tuple[_Layer, ...]


def _chosen(files: _Files, path: Path, tag: str | None) -> _Source:
    # `docker save` since 25 writes both; its manifest.json knows the names that users gave.
    if files.size("manifest.json") is not None:
        return _of_docker(files, path, tag)
    if files.size("index.json") is not None:
        return _of_oci(files, path, tag)
    raise UsageError(
        f"{path} is no image", reason="it has neither index.json nor manifest.json at its top", hint=_LOOKED_FOR
    )


def _of_docker(files: _Files, path: Path, tag: str | None) -> _Source:
    images = _array(_json(files, "manifest.json", path), path, "manifest.json")
    names = [tuple(str(name) for name in image.get("RepoTags") or ()) for image in images]
    if tag is not None:
        images = [image for image, tags in zip(images, names, strict=True) if tag in tags]
    if len(images) != 1:
        _which(path, tag, [name for tags in names for name in tags], len(names))
    try:
        name, layer_names = str(images[0]["Config"]), [str(layer) for layer in images[0]["Layers"]]
    except (KeyError, TypeError) as error:
        _malformed(path, "manifest.json", error)
    config = _bytes(files, name, path)
    _check_platform(_parsed(config, name, path), path)
    diff_ids = _diff_ids(config, path)
    if len(diff_ids) != len(layer_names):
        _malformed(path, "manifest.json", f"{len(layer_names)} layers, but its config names {len(diff_ids)}")
    return _Source(config, tuple(_Layer(*pair) for pair in zip(layer_names, diff_ids, strict=True)))


def _of_oci(files: _Files, path: Path, tag: str | None) -> _Source:
    index = _json(files, "index.json", path)
    descriptors = _images(files, _array(index.get("manifests"), path, "index.json"), path)
    names = [str((each.get("annotations") or {}).get(_REF_NAME, "")) for each in descriptors]
    if tag is not None:
        descriptors = [each for each, name in zip(descriptors, names, strict=True) if name == tag]
    if not descriptors or (len(descriptors) > 1 and len(set(names)) > 1):
        _which(path, tag, [name for name in names if name], len(names))
    manifest = _manifest(files, descriptors, path, _MAX_NESTING)
    try:
        config = _blob(files, manifest["config"], path)
        _check_platform(_parsed(config, "its config", path), path)
        diff_ids = _diff_ids(config, path)
        layers = [
            _Layer(_blob_name(layer["digest"], path), diff_id, layer["digest"], int(layer["size"]))
            for layer, diff_id in zip(manifest["layers"], diff_ids, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        _malformed(path, "its manifest", error)
    return _Source(config, tuple(layers))


def _manifest(files: _Files, descriptors: Sequence[dict[str, Any]], path: Path, nesting: int) -> dict[str, Any]:
    """The image manifest for our platform, or the only one."""
    found = [each for each in descriptors if _platform(each) == PLATFORM]
    if not found:
        if len(descriptors) != 1:
            platforms = ", ".join(sorted({"/".join(_platform(each) or ("?",)) for each in descriptors})) or "nothing"
            raise UsageError(
                f"{path} has no image for {'/'.join(PLATFORM)}", reason=f"it has {platforms}", hint=_OTHER_PLATFORM
            )
        found = list(descriptors)
    try:
        document: dict[str, Any] = _parsed(_blob(files, found[0], path), str(found[0]["digest"]), path)
    except (KeyError, TypeError, ValueError) as error:
        _malformed(path, "its index", error)
    if "manifests" not in document:
        return document
    if nesting == 0:
        _malformed(path, "its index", "indexes within indexes")
    return _manifest(files, _images(files, _array(document["manifests"], path, "its index"), path), path, nesting - 1)


def _images(files: _Files, descriptors: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Those of an index's entries that are images. Signatures, attestations and bills of materials lie beside them, as
    manifests of their own; of a single entry nobody asks."""
    if len(descriptors) == 1:
        return descriptors
    found = [each for each in descriptors if _is_image(files, each, path)]
    return found or descriptors


def _is_image(files: _Files, descriptor: Mapping[str, Any], path: Path) -> bool:
    # Builders list attestations for the platform "unknown".
    if "artifactType" in descriptor or _platform(descriptor) == ("unknown", "unknown"):
        return False
    name = _blob_name(str(descriptor.get("digest")), path)
    if files.size(name) is None:
        return True  # of an image for several platforms, not all need be there
    manifest = _parsed(_bytes(files, name, path), name, path)
    layers, config = manifest.get("layers") or [], manifest.get("config") or {}
    kinds = [each.get("mediaType", _LAYERS[0]) for each in layers if isinstance(each, dict)]
    return (
        "artifactType" not in manifest
        and (not isinstance(config, dict) or config.get("mediaType", _IMAGE_CONFIGS[0]) in _IMAGE_CONFIGS)
        and all(str(kind).startswith(_LAYERS) for kind in kinds)
    )


def _platform(descriptor: Mapping[str, Any]) -> tuple[str, str] | None:
    platform = descriptor.get("platform")
    if not isinstance(platform, dict):
        return None
    return str(platform.get("os")), str(platform.get("architecture"))


_OTHER_PLATFORM = (
    "the guest is an arm64 Linux: get the image for that platform, e.g. docker pull --platform linux/arm64"
)


def _check_platform(config: Mapping[str, Any], path: Path) -> None:
    found = (config.get("os"), config.get("architecture"))
    if found != PLATFORM:
        raise UsageError(
            f"{path} is an image for {found[0]}/{found[1]}, not {'/'.join(PLATFORM)}", hint=_OTHER_PLATFORM
        )


def _which(path: Path, tag: str | None, names: Sequence[str], count: int) -> NoReturn:
    listed = ", ".join(names) or f"{count} without a name"
    if tag is None:
        raise UsageError(f"{path} holds {count} images", reason=f"they are {listed}", hint="say which: --tag NAME")
    raise UsageError(f"{path} holds no image that is called {tag!r}", reason=f"it has {listed}")


def _diff_ids(config: bytes, path: Path) -> list[str]:
    rootfs = _parsed(config, "its config", path).get("rootfs")
    ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(ids, list) or not all(isinstance(each, str) and _DIGEST.fullmatch(each) for each in ids):
        _malformed(path, "its config", "rootfs.diff_ids is no list of digests")
    return ids


def _blob_name(digest: str, path: Path) -> str:
    if not _DIGEST.fullmatch(digest):
        _malformed(path, "its manifest", f"{digest!r} is not a digest (sha256 and sha512 are known)")
    return f"blobs/{digest.replace(':', '/')}"


def _blob(files: _Files, descriptor: Mapping[str, Any], path: Path) -> bytes:
    """A small blob, checked."""
    digest = str(descriptor["digest"])
    data = _bytes(files, _blob_name(digest, path), path)
    algorithm = digest.partition(":")[0]
    found = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    if found != digest:
        _mismatch(path, f"blobs/{digest.replace(':', '/')}", digest, found)
    return data


def _bytes(files: _Files, name: str, path: Path) -> bytes:
    size = files.size(name)
    if size is None:
        raise UsageError(f"{path} is no whole image", reason=f"it has no {name}", hint="write or fetch it again")
    if size > _MAX_DOCUMENT:
        _malformed(path, name, f"it has {size} bytes")
    with files.open(name) as file:
        return file.read()


def _json(files: _Files, name: str, path: Path) -> Any:
    return _parsed(_bytes(files, name, path), name, path, dict if name == "index.json" else list)


def _parsed(data: bytes, name: str, path: Path, kind: type = dict) -> Any:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        _malformed(path, name, "it is nested too deeply" if isinstance(error, RecursionError) else error)
    if not isinstance(document, kind):
        _malformed(path, name, f"it is a JSON {type(document).__name__}, not a {kind.__name__}")
    return document


def _array(value: Any, path: Path, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        _malformed(path, name, "it lists no images")
    return value


def _malformed(path: Path, name: str, reason: object) -> NoReturn:
    raise UsageError(f"{path} is no image", reason=f"{name} is malformed: {reason}", hint=_LOOKED_FOR)


def _mismatch(path: Path, what: str, wanted: str, found: str) -> NoReturn:
    raise HashMismatch(
        f"{path}: {what} is not what the image names",
        reason=f"wanted {wanted}\nfound  {found}",
        hint="the image is damaged or truncated: write or fetch it again",
    )


# --- layers --------------------------------------------------------------------------------------------------------


def _apply(files: _Files, layer: _Layer, unpacking: Unpacking, what: str, path: Path, max_bytes: int) -> None:
    size = files.size(layer.name)
    if size is None:
        raise UsageError(f"{path} is no whole image", reason=f"it has no {layer.name}, {what}")
    if layer.size is not None and size != layer.size:
        _mismatch(path, what, f"{layer.size} bytes", f"{size} bytes")
    with files.open(layer.name) as file:
        algorithm = (layer.digest or layer.diff_id).partition(":")[0]
        packed = _Hashing(file, algorithm, size)
        unpacked = _plain(packed)  # type: ignore[arg-type]
        plain = _Hashing(unpacked, layer.diff_id.partition(":")[0], max_bytes)
        failure: Exception | None = None
        try:
            unpacking.apply(plain, what)  # type: ignore[arg-type]
            found = f"{layer.diff_id.partition(':')[0]}:{plain.hexdigest()}"
        except (tarfile.TarError, *_DAMAGED) as error:
            failure = error
        # Bytes that are not the right ones explain whatever went wrong with them.
        if layer.digest is not None and (digest := f"{algorithm}:{packed.hexdigest()}") != layer.digest:
            _mismatch(path, what, layer.digest, digest)
        if failure is not None:
            raise UsageError(f"{path}: {what} cannot be unpacked", reason=str(failure)) from failure
        if found != layer.diff_id:
            _mismatch(path, f"{what}, unpacked,", layer.diff_id, found)


# --- config --------------------------------------------------------------------------------------------------------


def _image_config(data: bytes, path: Path) -> ImageConfig:
    section = _parsed(data, "its config", path).get("config") or {}
    try:
        return ImageConfig(
            entrypoint=_words(section, "Entrypoint"),
            cmd=_words(section, "Cmd"),
            env=dict(_variables(_words(section, "Env"))),
            working_dir=str(section.get("WorkingDir") or "/"),
            user=str(section.get("User") or ""),
            exposed_ports=tuple(sorted(section.get("ExposedPorts") or {})),
            stop_signal=str(section.get("StopSignal") or "SIGTERM"),
        )
    except (AttributeError, TypeError, ValueError) as error:
        _malformed(path, "its config", error)


def _words(section: Mapping[str, Any], key: str) -> tuple[str, ...]:
    words = section.get(key) or []
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{key} is no list of words")
    return tuple(words)


def _variables(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value. A word without `=` sets nothing: programs look for one with it."""
    for word in words:
        name, equals, value = word.partition("=")
        if name and equals:
            yield name, value
