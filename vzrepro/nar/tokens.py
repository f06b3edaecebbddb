"""The words that a NAR is made of, as bytes, alone and in the combinations that follow each other most often."""

from __future__ import annotations

MAX_DEPTH = 200
"""Directories inside directories; deeper trees are refused, because each level holds a file descriptor."""

NAME_MAX = 255
TARGET_MAX = 4095


def number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def string(data: bytes) -> bytes:
    """Length, text, and zeros up to a multiple of 8 bytes."""
    return number(len(data)) + data + PADDING[len(data) % 8]


def _words(*words: bytes) -> bytes:
    return b"".join(map(string, words))


PADDING = tuple(bytes(-size % 8) for size in range(8))
"""What follows a text, by its size modulo 8."""

MAGIC = _words(b"nix-archive-1")
REGULAR = _words(b"(", b"type", b"regular", b"contents")
EXECUTABLE = _words(b"(", b"type", b"regular", b"executable", b"", b"contents")
SYMLINK = _words(b"(", b"type", b"symlink", b"target")
DIRECTORY = _words(b"(", b"type", b"directory")
ENTRY = _words(b"entry", b"(", b"name")
NODE = _words(b"node")
CLOSE = _words(b")")

# By the size modulo 8 of the name or contents before them:
THEN_NODE = tuple(padding + NODE for padding in PADDING)
THEN_REGULAR = tuple(padding + NODE + REGULAR for padding in PADDING)
THEN_EXECUTABLE = tuple(padding + NODE + EXECUTABLE for padding in PADDING)
THEN_CLOSE = tuple(padding + CLOSE for padding in PADDING)
THEN_CLOSE_ENTRY = tuple(padding + CLOSE + CLOSE for padding in PADDING)
