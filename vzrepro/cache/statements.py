"""The entries below `attest/`: what somebody states about a derivation, and the index of those for who cannot list."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import islice

from vzrepro.base.errors import UsageError
from vzrepro.cache.access import Access
from vzrepro.cache.backend import Backend, Damaged
from vzrepro.cache.layout import claim_of
from vzrepro.cache.parallel import WORKERS, in_order
from vzrepro.cache.records import (
    INDEX,
    MAX_ATTESTATION,
    MAX_ATTESTATIONS,
    differences_prefix,
    is_intact,
    read_index,
    statements_index,
)

_MAX_BYTES = 64 << 20  # that are read about one derivation, but for one entry


def statements(access: Access, subject: str) -> list[bytes]:
    """The intact entries about a derivation (`subject` as in `differences_prefix`), in no order; nobody has verified
    them. Raises RemoteError when the cache fails."""
    prefix = differences_prefix(subject)

    def small(key: str) -> bytes | None:
        with contextlib.suppress(Damaged):
            return access.read(key, MAX_ATTESTATION)
        return None

    try:
        listed = (entry.key for entry in access.backend.list(prefix) if entry.size <= MAX_ATTESTATION)
        keys = [key for key in islice(listed, MAX_ATTESTATIONS) if key != prefix + INDEX]
    except UsageError:  # over HTTP, nothing can be listed
        keys = [prefix + entry for entry in read_index(small(prefix + INDEX) or b"")[:MAX_ATTESTATIONS]]

    def read(key: str) -> bytes | None:
        data = small(key)
        return data if data is not None and is_intact(key, data) else None

    found, size = [], 0
    for data in in_order(read, keys, 1 if len(keys) < 2 else WORKERS):
        found += [] if data is None else [data]
        size += 0 if data is None else len(data)
        if size > _MAX_BYTES:
            break
    return found


def write_index(backend: Backend, key: str, others: Iterable[str] | None = None) -> None:
    """Have an entry below `attest/` in the list of those about its derivation, for who reads them over HTTP.

    `others` are the keys beside it; None: the place is asked. Two who write that at once may leave one's entry out,
    until somebody writes it again. Raises RemoteError.
    """
    prefix = claim_of(key)
    if others is None:
        others = (entry.key for entry in islice(backend.list(prefix), MAX_ATTESTATIONS))
    backend.put(prefix + INDEX, statements_index({each.removeprefix(prefix) for each in (key, *others)}))
