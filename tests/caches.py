"""Binary caches for tests."""

from __future__ import annotations

from collections.abc import Callable

from vzrepro.cache import Backend, CacheReader, CacheWriter, SigningKey, TrustedKeys


def new_cache(
    backend: Backend,
    trusted: TrustedKeys,
    signer: SigningKey | None = None,
    *,
    warn: Callable[[str], None] = lambda _message: None,
) -> CacheWriter:
    """The cache behind `backend`, to take from (`reader`) and to push to."""
    return CacheWriter(CacheReader(backend, trusted, warn=warn), signer)
