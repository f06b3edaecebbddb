"""narinfo: the record that says what a store path holds, where its NAR is, and who vouches for it.

The format is Nix's (one `Key: value` per line); docs/cache.md says what is refused here although some Nix client
takes it, and describes the fields of our own, whose names start with `Vz`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vzrepro.base.errors import Untrusted, UsageError
from vzrepro.base.model import (
    FORMAT,
    STORE_DIR,
    BuildKey,
    DrvHash,
    FileHash,
    NarHash,
    ObjectInfo,
    Outcome,
    StorePath,
    canonical_json,
    store_path,
)
from vzrepro.base.signing import SigningKey, TrustedKeys, parse_signature
from vzrepro.cache.backend import Damaged, check_key

MAX_SIZE = 256 << 10
"""Bytes of the largest narinfo that is read: room for some 4,000 references."""

MAX_SIGNATURES = 64
"""Of either kind, in one narinfo. Real ones have one or two."""

COMPRESSIONS = ("zstd", "none")
"""What we read; we write zstd."""

_OTHERS = frozenset({"xz", "bzip2", "gzip", "br", "lz4", "lzip", "lzma", "compress", "grzip", "lrzip", "lzop"})

_NIX_FIELDS = ("StorePath", "URL", "Compression", "FileHash", "FileSize", "NarHash", "NarSize", "References", "Deriver")
_OWN_FIELDS = ("VzDrvHash", "VzBuildKey", "VzOrigin")
_REQUIRED = ("StorePath", "URL", "Compression", "NarHash", "NarSize")
_UNKNOWN_DERIVER = "unknown-deriver"  # what old Nix clients write for none


class OtherCompression(Damaged):
    """A narinfo that we have no use for, while some Nix client has: its NAR is compressed in a way we do not read."""


@dataclass(frozen=True, slots=True)
class NarInfo:
    """One narinfo. Sizes in bytes; `references` are sorted and may hold the path itself.

    `file_hash` and `file_size` are those of the compressed NAR at the key `url`; others may leave them out, and an HTTP
    cache's `url` may have a query (`nar/….nar?hash=…`). `deriver` is a base name. `drv_hash`, `build_key` and `origin`
    mean what they mean in `model.ObjectInfo`; `own_signatures` vouch for them, as `signatures` do for what a Nix client
    knows.
    """

    path: StorePath
    url: str
    compression: str
    nar_hash: NarHash
    nar_size: int
    file_hash: FileHash | None = None
    file_size: int | None = None
    references: tuple[StorePath, ...] = ()
    deriver: str | None = None
    drv_hash: DrvHash | None = None
    build_key: BuildKey | None = None
    origin: FileHash | None = None
    signatures: tuple[str, ...] = ()
    own_signatures: tuple[str, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> NarInfo:
        """Read a narinfo file. Raises Damaged, saying what is wrong; OtherCompression if that is all."""
        try:
            single, *signatures = _fields(data)
            other = single["Compression"] if single["Compression"] in _OTHERS else None
            info = _built(single if other is None else single | {"Compression": "none"}, *signatures)
        except (ValueError, UsageError) as error:
            reason = error.message if isinstance(error, UsageError) else str(error)
            raise Damaged("this is not a valid narinfo", reason=reason) from error
        if other is not None:
            raise OtherCompression("this narinfo is of no use here", reason=f"its NAR is compressed with {other}")
        return info

    def as_object(self, voucher: bytes | None) -> ObjectInfo:
        """What is registered of the object when it is taken from a cache, on the word of `voucher`."""
        return ObjectInfo(
            path=self.path,
            nar_hash=self.nar_hash,
            nar_size=self.nar_size,
            references=self.references,
            drv_hash=self.drv_hash,
            build_key=self.build_key,
            origin=self.origin,
            outcome=Outcome.SUBSTITUTED,
            voucher=voucher,
        )

    def render(self) -> bytes:
        """The file's bytes, fields in the order in which Nix writes them, ours at the end."""
        lines = [
            ("StorePath", str(self.path)),
            ("URL", self.url),
            ("Compression", self.compression),
            ("FileHash", self.file_hash and self.file_hash.nix),
            ("FileSize", self.file_size),
            ("NarHash", self.nar_hash.nix),
            ("NarSize", self.nar_size),
            ("References", " ".join(path.base for path in self.references)),
            ("Deriver", self.deriver),
            *(("Sig", text) for text in self.signatures),
            ("VzDrvHash", self.drv_hash),
            ("VzBuildKey", self.build_key),
            ("VzOrigin", self.origin),
            *(("VzSig", text) for text in self.own_signatures),
        ]
        return "".join(f"{name}: {value}\n" for name, value in lines if value is not None).encode()

    @property
    def fingerprint(self) -> bytes:
        """What `Sig` signs: Nix's `1;<path>;<NAR hash>;<NAR size>;<references>`."""
        references = ",".join(map(str, self.references))
        return f"1;{self.path};{self.nar_hash.nix};{self.nar_size};{references}".encode()

    @property
    def own_message(self) -> bytes | None:
        """What `VzSig` signs: the fields that the fingerprint lacks, bound to those it has; None when there are none.

        URL, file hash and file size are left out of both: the NAR's hash settles what arrives, and a NAR that was
        compressed anew needs no new signature.
        """
        if self.build_key is None and self.origin is None and self.drv_hash is None:
            return None
        document = {
            "format": FORMAT,
            "type": "narinfo",
            "path": str(self.path),
            "nar_hash": self.nar_hash.hex,
            "nar_size": self.nar_size,
            "references": [str(path) for path in self.references],
            "drv_hash": self.drv_hash and self.drv_hash.hex,
            "build_key": self.build_key and self.build_key.hex,
            "origin": self.origin and self.origin.hex,
        }
        return own_message(document)

    def verify(self, trusted: TrustedKeys, place: str) -> None:
        """Raise Untrusted unless enough trusted keys have signed what a Nix client knows, and all that we add to it.

        `place` is where it was found, for the message.
        """
        what = f"{self.path} in {place}"
        trusted.verify(self.fingerprint, self.signatures, what)
        own = self.own_message
        if own is not None:
            trusted.verify(own, self.own_signatures, f"the Vz fields of {what}")

    def is_trusted(self, trusted: TrustedKeys) -> bool:
        """Whether `verify` would have nothing against it."""
        try:
            self.verify(trusted, "the cache")
        except Untrusted:
            return False
        return True

    def is_void(self, trusted: TrustedKeys) -> bool:
        """Whether its signatures are of no use to anybody, so that it is nobody's result."""
        own = self.own_message
        return trusted.is_void(self.fingerprint, self.signatures) or (
            own is not None and trusted.is_void(own, self.own_signatures)
        )

    def signed(self, key: SigningKey) -> NarInfo:
        """The same with the key's signatures added."""
        own = self.own_message
        return replace(
            self,
            signatures=_with(self.signatures, key.sign(self.fingerprint)),
            own_signatures=() if own is None else _with(self.own_signatures, key.sign(own)),
        )


def own_message(document: dict[str, object]) -> bytes:
    """The bytes to sign for a document of our own: never mistakable for a Nix fingerprint, which starts with `1;`."""
    return b"vzrepro:" + canonical_json(document)


def deriver_of(drv: DrvHash, name: str) -> str:
    """The base name that `Deriver` and `log/` carry for one of our derivations; no such file need exist."""
    return store_path(drv, f"{name[:207]}.drv").base


def narinfo_key(path: StorePath) -> str:
    """The key of a path's narinfo in a cache."""
    return f"{path.hash_part}.narinfo"


def has_lost_trust(voucher: bytes, trusted: TrustedKeys) -> bool:
    """Whether an object that was taken on this narinfo's word was taken on the word of a key that is revoked since.

    One that enough other trusted keys have signed as well has not.
    """
    if not trusted.revoked:
        return False
    info = NarInfo.parse(voucher)
    own = info.own_message
    signed = [(info.fingerprint, info.signatures), *([] if own is None else [(own, info.own_signatures)])]
    if not any(trusted.revoked_signers(*each) for each in signed):
        return False
    return not info.is_trusted(trusted)


def _with(signatures: tuple[str, ...], new: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*signatures, new)))


def _fields(data: bytes) -> tuple[dict[str, str], list[str], list[str]]:
    """The single fields, the signatures, our own signatures. Raises ValueError."""
    if len(data) > MAX_SIZE:
        raise ValueError(f"it is larger than {MAX_SIZE} bytes")
    if not data.endswith(b"\n"):
        raise ValueError("its last line does not end")
    if b"\r" in data or b"\0" in data:
        raise ValueError("it has a carriage return or a zero byte")
    single: dict[str, str] = {}
    signatures: dict[str, list[str]] = {"Sig": [], "VzSig": []}
    for number, line in enumerate(data[:-1].decode().split("\n"), 1):
        name, colon, value = line.partition(": ")
        if not colon or not name:
            raise ValueError(f"line {number} is not `Key: value`")
        if name in signatures:
            signatures[name].append(value)
        elif name in _NIX_FIELDS or name in _OWN_FIELDS:
            if name in single:
                raise ValueError(f"{name} is there twice")
            single[name] = value
    for name in _REQUIRED:
        if not single.get(name):
            raise ValueError(f"{name} is missing")
    return single, signatures["Sig"], signatures["VzSig"]


def _built(single: dict[str, str], signatures: list[str], own_signatures: list[str]) -> NarInfo:
    """Turn fields into a NarInfo. Raises ValueError or UsageError."""
    if not single["StorePath"].startswith(f"{STORE_DIR}/"):
        raise ValueError(f"StorePath is not below {STORE_DIR}")
    path = StorePath.parse(single["StorePath"])
    if single["Compression"] not in COMPRESSIONS:
        raise ValueError(f"Compression is {single['Compression']}, not one of {', '.join(COMPRESSIONS)}")
    nar_size = _number(single, "NarSize")
    if not nar_size:
        raise ValueError("NarSize is not positive")
    deriver = single.get("Deriver") or None
    if deriver is not None and deriver != _UNKNOWN_DERIVER:
        _base_name(deriver)
    drv_hash = DrvHash(single["VzDrvHash"]) if "VzDrvHash" in single else None
    if drv_hash is not None and store_path(drv_hash, path.name) != path:
        raise ValueError("VzDrvHash does not give this store path")
    if max(len(signatures), len(own_signatures)) > MAX_SIGNATURES:
        raise ValueError(f"it has more than {MAX_SIGNATURES} signatures")
    for text in (*signatures, *own_signatures):
        parse_signature(text)
    return NarInfo(
        path=path,
        url=check_key(single["URL"]),
        compression=single["Compression"],
        nar_hash=NarHash.parse(single["NarHash"]),
        nar_size=nar_size,
        file_hash=FileHash.parse(single["FileHash"]) if "FileHash" in single else None,
        file_size=_number(single, "FileSize"),
        references=tuple(sorted({_base_name(text) for text in single.get("References", "").split(" ") if text})),
        deriver=None if deriver == _UNKNOWN_DERIVER else deriver,
        drv_hash=drv_hash,
        build_key=BuildKey(single["VzBuildKey"]) if "VzBuildKey" in single else None,
        origin=FileHash(single["VzOrigin"]) if "VzOrigin" in single else None,
        signatures=tuple(dict.fromkeys(signatures)),
        own_signatures=tuple(dict.fromkeys(own_signatures)),
    )


def _base_name(text: str) -> StorePath:
    if text.startswith("/"):
        raise ValueError(f"{text!r} is a full path where a base name belongs")
    return StorePath.parse(text)


def _number(single: dict[str, str], name: str) -> int | None:
    text = single.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"{name} is not a size")
    return int(text)
