"""Notices of deletions: how those who rely on an old entry and those who delete it never miss each other.

Whoever deletes what looks old first writes a notice, then looks (at the roots, at the entry's age), deletes, and takes
the notice away. Whoever wants an old entry to stay first says so (adds a root, makes the entry young) and then looks
for notices. In a place where an entry that is written is seen by all who look afterwards, at least one of the two sees
the other: either the deletion is given up, or the other one waits until it is over and then sees what is left. Locks
do the same where all who write share a machine; shared places have none.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vzrepro.base.errors import RemoteError
from vzrepro.base.model import FORMAT, canonical_json
from vzrepro.cache.backend import Backend

NOTICES = "gc/"
"""Below which keys notices are."""

NOTICE_SECS = 300.0
"""A notice older than this is what a crash has left, and nobody waits for it."""

_ACT_SECS = 60.0  # a deletion starts this long after its notice at the latest; the rest is for requests on their way
_PAUSE_SECS = 0.5


class CollectionNotice:
    """A notice that is there. `check` is called right before every deletion that it is for."""

    def __init__(self, backend: Backend, since: float) -> None:
        self._backend = backend
        self._since = since

    def check(self) -> None:
        """Raise RemoteError when the notice is so old that others could soon take it for a crash's."""
        if self._backend.now() - self._since > _ACT_SECS:
            raise RemoteError(
                f"{self._backend.url} is too slow for anything to be deleted safely",
                reason=f"more than {_ACT_SECS:.0f} s have passed between a look and the deletion",
                hint="run it again; what was deleted so far is fine",
            )


@contextmanager
def announced(backend: Backend) -> Iterator[CollectionNotice]:
    """A notice is there meanwhile. Raises RemoteError when it cannot be written."""
    key = f"{NOTICES}{uuid.uuid4().hex}.json"
    since = backend.now()
    backend.put(key, canonical_json({"format": FORMAT, "type": "notice"}))
    try:
        yield CollectionNotice(backend, since)
    finally:
        # If it cannot be taken away, it ends by itself.
        with contextlib.suppress(RemoteError):
            backend.delete([key])


def settle(backend: Backend, *, pause: Callable[[float], object] = time.sleep) -> None:
    """Return when no deletion that was announced before this call can still be under way.

    For those who have just added a root or made old entries young: what is there afterwards stays, what is gone must be
    written again. One listing when nothing is being deleted; else the wait is that for a batch of deletions, seconds,
    and `NOTICE_SECS` when somebody has crashed. `pause` waits so many seconds. Raises RemoteError.
    """
    notices = {entry.key: entry.mtime for entry in backend.list(NOTICES)}
    while notices:
        now = backend.now()
        notices = {key: since for key, since in notices.items() if now - since <= NOTICE_SECS}
        if notices:
            pause(_PAUSE_SECS)
            notices = {key: since for key, since in notices.items() if backend.head(key) is not None}
