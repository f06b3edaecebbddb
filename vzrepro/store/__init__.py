"""The local store (docs/store.md): `local` is its meaning, `database` its SQLite file, `examine` how it is verified."""

from vzrepro.store.database import ReadOnlyStore
from vzrepro.store.local import OLD_SECS, GcReport, LocalStore, StoreFinding, StoreRoot

__all__ = ["OLD_SECS", "GcReport", "LocalStore", "ReadOnlyStore", "StoreFinding", "StoreRoot"]
