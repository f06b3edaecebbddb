"""NAR, the archive form of a store object: pack, hash, unpack and copy trees; and the zstd frames it travels in.

The NAR format is Nix's ("Nix Archive (NAR) format" in the Nix manual): one tree has exactly one byte form, so its
SHA-256 names its content. The compressed form is a row of independent zstd frames (RFC 8878), which any Nix ≥ 2.4
reads and which are made and undone in parallel here. Memory is bounded whatever the object's size.

`packing` and `unpacking` hold the archive's two directions, `tokens` its words, `frames` the compression, `stream`
what carries bytes between them.
"""

from vzrepro.nar.frames import COMPRESSION_LEVEL, compress, decompress
from vzrepro.nar.packing import Inspect, hash_of_file, nar_hash, pack
from vzrepro.nar.stream import MalformedNar, Read, reader
from vzrepro.nar.tokens import MAX_DEPTH
from vzrepro.nar.unpacking import canonical_copy, unpack

__all__ = [
    "COMPRESSION_LEVEL",
    "MAX_DEPTH",
    "Inspect",
    "MalformedNar",
    "Read",
    "canonical_copy",
    "compress",
    "decompress",
    "hash_of_file",
    "nar_hash",
    "pack",
    "reader",
    "unpack",
]
