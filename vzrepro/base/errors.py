"""Every error a user can cause: what happened, why, what to do next, and the exit code that scripts rely on.

Libraries raise these; only `vzrepro.cli` prints them and exits. Exit codes: 1 failed, 2 usage, 100 build failed,
101 timed out, 102 hash mismatch, 103 untrusted, 104 not deterministic, 105 cache or network, 130 interrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class VzreproError(Exception):
    """A failure with its explanation.

    `message` is one line saying what happened; `reason` says why (may be several lines); `hint` says what to do
    next, with a command to copy where there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, reason: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.message]
        if self.reason:
            parts.append(f"  reason: {self.reason}")
        if self.hint:
            parts.append(f"  hint: {self.hint}")
        return "\n".join(parts)

    @property
    def in_a_line(self) -> str:
        """What happened and why, as a part of another text."""
        return f"{self.message}: {self.reason}" if self.reason else self.message


class UsageError(VzreproError):
    """The request or a file the user wrote (recipe, lock, configuration) is wrong."""

    exit_code = 2


class BuildFailed(VzreproError):
    """A builder ended with an error."""

    exit_code = 100


class OutOfMemory(BuildFailed):
    """A builder needed more memory than it may have: with more, the same build may do."""


class TimedOut(VzreproError):
    """A time limit ended the work."""

    exit_code = 101


class HashMismatch(VzreproError):
    """Bytes are not the ones that were pinned; `message` names wanted and found."""

    exit_code = 102


class Untrusted(VzreproError):
    """A signature is missing, unknown or wrong."""

    exit_code = 103


class NotDeterministic(VzreproError):
    """The same inputs gave different bytes."""

    exit_code = 104


class RemoteError(VzreproError):
    """A mirror, an index or a cache could not be reached or did not answer properly."""

    exit_code = 105


class Interrupted(VzreproError):
    """The user stopped the work (Ctrl-C, SIGTERM)."""

    exit_code = 130


def first_fault(error: ValidationError) -> str:
    """What is wrong with a document that pydantic refuses: `key.path: what`. Of several faults an unknown key is told,
    since one that is misspelt is missing under its right name, too."""
    fault = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    where = ".".join(map(str, fault["loc"]))
    what = "there is no such key" if fault["type"] == "extra_forbidden" else fault["msg"]
    return f"{where}: {what}" if where else what
