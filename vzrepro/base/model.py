"""The frozen types every part of vzrepro shares, and the hashing that turns them into names.

Formats (canonical JSON, drv hash, store path, build key) are specified in docs/formats.md and held by the golden
files in tests/golden/. Nothing here does I/O.
"""

from __future__ import annotations

import base64
import binascii
import enum
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

from vzrepro.base.errors import UsageError

STORE_DIR = "/nix/store"
"""The logical store directory: part of every store path's hash, so that a stock Nix client accepts our objects."""

FORMAT = 1
"""Version of the canonical JSON of derivations and records; every such document carries it."""

IMAGE_FORMAT = 1
"""Raise this with every change that gives the same .debs other image bytes: it enters the image's derivation."""

UNPACK_FORMAT = 1
"""Raise this with every change that gives the same archive another tree: it enters the unpacked source's derivation."""

GIT_FORMAT = 1
"""The same for what is made of a commit."""

SOURCE_DATE_EPOCH = 1_767_225_600
"""2026-01-01T00:00:00Z in seconds: the date builders see unless a recipe says otherwise."""

_NIX32 = "0123456789abcdfghijklmnpqrsvwxyz"
_NIX32_VALUE = {char: value for value, char in enumerate(_NIX32)}
_NAME = re.compile(r"[A-Za-z0-9+\-_?=][A-Za-z0-9+\-._?=]{0,210}")


def nix32(data: bytes) -> str:
    """Nix's base 32 of `data`: digits `0-9a-z` without `e o t u`, least significant bits last (20 bytes → 32)."""
    length = (len(data) * 8 + 4) // 5
    number = int.from_bytes(data, "little")
    return "".join(_NIX32[(number >> (5 * i)) & 31] for i in range(length - 1, -1, -1))


def from_nix32(text: str, size: int) -> bytes:
    """The `size` bytes that `text` spells in Nix's base 32.

    Raises ValueError when `text` has another length, a foreign character or set padding bits.
    """
    if len(text) != (size * 8 + 4) // 5:
        raise ValueError(f"{text!r} is not the nix32 form of {size} bytes")
    number = 0
    for char in text:
        if char not in _NIX32_VALUE:
            raise ValueError(f"{text!r} has {char!r}, which nix32 does not use")
        number = number << 5 | _NIX32_VALUE[char]
    if number >> (size * 8):
        raise ValueError(f"{text!r} does not fit {size} bytes")
    return number.to_bytes(size, "little")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A SHA-256, as 64 lower-case hex digits. Each meaning has a type of its own below; they never mix."""

    hex: str

    def __post_init__(self) -> None:
        # Of JSON that others wrote anything may come, also 64 digits in a list.
        if not isinstance(self.hex, str) or len(self.hex) != 64 or not set(self.hex) <= set("0123456789abcdef"):
            raise ValueError(f"{self.hex!r} is not a sha256 in lower-case hex")

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The digest of `data`."""
        return cls(hashlib.sha256(data).hexdigest())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `sha256:<nix32 or hex>`, SRI `sha256-<base64>` or bare hex, as Nix clients write them.

        Raises ValueError for anything else.
        """
        if text.startswith("sha256-"):
            try:
                raw = base64.b64decode(text[7:], validate=True)
            except binascii.Error as error:
                raise ValueError(f"{text!r} is not an SRI sha256") from error
            return cls(raw.hex())
        body = text.removeprefix("sha256:")
        return cls(from_nix32(body, 32).hex()) if len(body) == 52 else cls(body)

    @property
    def bytes(self) -> bytes:
        """The 32 raw bytes."""
        return bytes.fromhex(self.hex)

    @property
    def nix(self) -> str:
        """`sha256:` and 52 nix32 characters, the form narinfo files carry."""
        return f"sha256:{nix32(self.bytes)}"

    def __str__(self) -> str:
        return self.hex


class DrvHash(Digest):
    """What was asked: hash of a derivation, inputs by their drv hash."""

    __slots__ = ()


class BuildKey(Digest):
    """What is really fed in: hash of a derivation, inputs by their NAR hash."""

    __slots__ = ()


class NarHash(Digest):
    """What came out: hash of an object's NAR serialisation."""

    __slots__ = ()


class FileHash(Digest):
    """Hash of a plain file: a download, a compressed NAR."""

    __slots__ = ()


def check_name(name: str) -> str:
    """Return `name` if it may stand in a store path, else raise UsageError saying what may.

    Nix's rule: 1–211 of ``A-Za-z0-9+-._?=``, not starting with a dot.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a valid store name",
            hint="use 1 to 211 of A-Z a-z 0-9 + - . _ ? =, not starting with a dot",
        )
    return name


def store_name(text: str) -> str:
    """`text`, which holds a version or a file's name from outside, as the name of a store object.

    What may not stand there becomes `_`, and what is too long ends early: Debian has versions such as `1.7.24~ds1`.
    Two texts may give one name; their objects differ in their hashes.
    """
    return re.sub(r"[^A-Za-z0-9+\-._?=]|^\.", "_", text)[:211]


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A store path: `hash_part` is 32 nix32 characters, `name` follows Nix's rule for names."""

    hash_part: str
    name: str

    @classmethod
    def parse(cls, text: str) -> StorePath:
        """Read `<hash>-<name>` or the same below `/nix/store/`. Raises UsageError when it is neither."""
        base = text.removeprefix(STORE_DIR + "/")
        hash_part, dash, name = base.partition("-")
        try:
            from_nix32(hash_part, 20)
        except ValueError as error:
            raise UsageError(f"{text!r} is not a store path", reason=str(error)) from error
        if not dash:
            raise UsageError(f"{text!r} is not a store path", reason="no name follows the hash")
        return cls(hash_part, check_name(name))

    @property
    def base(self) -> str:
        """`<hash>-<name>`: the file name in the store."""
        return f"{self.hash_part}-{self.name}"

    def __str__(self) -> str:
        return f"{STORE_DIR}/{self.base}"


def store_path(drv: DrvHash, name: str) -> StorePath:
    """The store path of a derivation's output, by Nix's formula (Nix manual, "Store Path Specification").

    sha256 over `output:out:sha256:<hex>:/nix/store:<name>`, folded to 160 bits by xor, nix32.
    """
    fingerprint = f"output:out:sha256:{drv.hex}:{STORE_DIR}:{check_name(name)}"
    digest = hashlib.sha256(fingerprint.encode()).digest()
    folded = bytearray(20)
    for i, byte in enumerate(digest):
        folded[i % 20] ^= byte
    return StorePath(nix32(bytes(folded)), name)


def canonical_json(document: Mapping[str, Any]) -> bytes:
    """The one byte form of a document: UTF-8, sorted keys, no spaces, no floats.

    Raises TypeError for floats and for anything JSON does not have.
    """
    _refuse_floats(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _refuse_floats(value: object) -> None:
    if isinstance(value, float):
        raise TypeError("canonical JSON has no floats")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"canonical JSON keys are strings, not {key!r}")
            _refuse_floats(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_floats(item)


Builder = Literal["sandbox", "fetch", "local", "image"]
"""How an output comes about: in the Docker sandbox · downloaded, pinned by sha256 · copied from the workspace,
pinned by its own content · a toolchain image written from .debs."""


@dataclass(frozen=True, slots=True)
class Derivation:
    """Everything that can change an output, and nothing else.

    `inputs` maps the name under `/in/` to the drv hash of what is mounted there. `content` pins fixed-output data:
    for `fetch`, relative file name → sha256 of that file ("" alone for a single file), or, with `git` in `env`,
    "" → NAR hash of the tree; for `local`, "" → NAR hash of the tree. `image` is the toolchain image's derivation.
    `platform` is the build platform, `os/arch`.
    """

    name: str
    builder: Builder
    version: str | None = None
    platform: str | None = None
    image: DrvHash | None = None
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, DrvHash] = field(default_factory=dict)
    content: Mapping[str, Digest] = field(default_factory=dict)
    source_date_epoch: int | None = None

    def document(self, resolve: Mapping[DrvHash, Digest] | None = None) -> dict[str, Any]:
        """The derivation as plain data; with `resolve`, every input's drv hash is replaced by what it maps to."""

        def of(drv: DrvHash) -> str:
            return (resolve[drv] if resolve is not None else drv).hex

        return {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "builder": self.builder,
            "platform": self.platform,
            "image": None if self.image is None else of(self.image),
            "command": list(self.command),
            "env": dict(self.env),
            "inputs": {name: of(drv) for name, drv in self.inputs.items()},
            "content": {name: digest.hex for name, digest in self.content.items()},
            "source_date_epoch": self.source_date_epoch,
        }

    @classmethod
    def parse(cls, canonical: bytes) -> Derivation:
        """Read a derivation's canonical JSON. Raises ValueError unless it is exactly that."""
        try:
            fields = json.loads(canonical)
            image = fields["image"]
            found = cls(
                name=fields["name"],
                builder=fields["builder"],
                version=fields["version"],
                platform=fields["platform"],
                image=None if image is None else DrvHash(image),
                command=tuple(fields["command"]),
                env=dict(fields["env"]),
                inputs={name: DrvHash(each) for name, each in fields["inputs"].items()},
                content={name: Digest(each) for name, each in fields["content"].items()},
                source_date_epoch=fields["source_date_epoch"],
            )
            texts = [found.name, *found.command, *found.env.values()]
            texts += [each for each in (found.version, found.platform) if each is not None]
            epoch = found.source_date_epoch
            sound = all(isinstance(each, str) for each in texts) and (epoch is None or type(epoch) is int)
            sound = sound and found.builder in get_args(Builder) and canonical_json(found.document()) == canonical
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("this is not a derivation") from error
        if not sound:
            raise ValueError("this is not a derivation")
        return found

    def dependencies(self) -> tuple[DrvHash, ...]:
        """The image's and the inputs' drv hashes, without repetition."""
        image = () if self.image is None else (self.image,)
        return tuple(dict.fromkeys((*image, *self.inputs.values())))

    def drv_hash(self) -> DrvHash:
        """sha256 of the canonical JSON."""
        return DrvHash.of(canonical_json(self.document()))

    def build_key(self, nar_hashes: Mapping[DrvHash, NarHash]) -> BuildKey:
        """sha256 of the canonical JSON with each input's drv hash replaced by its NAR hash.

        The name is left in: it is what the builder may write into its output.
        Raises KeyError when `nar_hashes` lacks a dependency.
        """
        return BuildKey.of(canonical_json(self.document(nar_hashes)))


class Outcome(enum.Enum):
    """How a store object came to be there, or why it did not."""

    ALREADY_VALID = "already-valid"
    BUILT = "built"
    COPIED = "copied"
    FETCHED = "fetched"
    SUBSTITUTED = "substituted"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """A valid store object: what its name promises and what it holds.

    `nar_size` is bytes of the NAR; `references` are the store paths named inside it; `origin` is, for downloads,
    the digest of the URLs it was verified from (`origin_digest`), so that a changed URL is noticed. `voucher` is, for
    what came from elsewhere, the signed narinfo on whose word it was taken (for a copy: the original's); None for what
    was made here.
    """

    path: StorePath
    nar_hash: NarHash
    nar_size: int
    references: tuple[StorePath, ...] = ()
    drv_hash: DrvHash | None = None
    build_key: BuildKey | None = None
    origin: FileHash | None = None
    outcome: Outcome = Outcome.BUILT
    voucher: bytes | None = None


def origin_digest(urls: Mapping[str, str]) -> FileHash:
    """The digest of where a download's files come from: relative file name → URL path, mirrors unresolved."""
    return FileHash.of(canonical_json({"format": FORMAT, "urls": dict(urls)}))


@dataclass(frozen=True, slots=True)
class Realization:
    """The record that a build key gave an output: what early cutoff looks up, here and across machines."""

    build_key: BuildKey
    drv_hash: DrvHash
    path: StorePath
    nar_hash: NarHash
    nar_size: int

    def document(self) -> dict[str, Any]:
        """The record as plain data, ready for `canonical_json`."""
        return {
            "format": FORMAT,
            "build_key": self.build_key.hex,
            "drv_hash": self.drv_hash.hex,
            "path": str(self.path),
            "nar_hash": self.nar_hash.hex,
            "nar_size": self.nar_size,
        }
