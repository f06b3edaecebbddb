"""A plugin of pytest that takes away what Linux has and macOS has not (`-p tests.taken_away`)."""

from __future__ import annotations

import ctypes
import os
import socket
from types import SimpleNamespace
from typing import Any

from vzrepro.base import disk
from vzrepro.guest.vm import dial

for module, names in (
    (os, ("copy_file_range", "sched_getaffinity", "sched_setaffinity", "listxattr", "getxattr", "setxattr")),
    (os, ("memfd_create", "pidfd_open", "eventfd", "splice", "posix_fallocate", "posix_fadvise")),
    (socket, ("AF_VSOCK", "VMADDR_CID_ANY")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)

_LINUX = ("renameat2", "syncfs")
_real = ctypes.CDLL


class _Library:
    def __init__(self, *args: Any, **options: Any) -> None:
        self._library = _real(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name in _LINUX:
            raise AttributeError(name)
        return getattr(self._library, name)


ctypes.CDLL = _Library  # type: ignore[misc, assignment]
for user in (disk, dial):
    user.sys = SimpleNamespace(platform="darwin")  # type: ignore[attr-defined]
