"""How tar archives that others made are read: by `tarfile`, whose headers are none of them trusted here.

Give `tarfile.open` the argument `tarinfo=TarHeader`; all that can be wrong with a header is a `tarfile.TarError` then.
"""

from __future__ import annotations

import tarfile
from typing import cast

_MAX_EXTENDED = 1 << 20
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


class TarHeader(tarfile.TarInfo):
    """A header that is not held in memory whatever it claims: `tarfile` reads names and pax records whole. What it
    raises as ValueError (a number that is none) or RecursionError (each header speaks of the next) is a ReadError."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> TarHeader:
        """The next header of the archive. Raises tarfile.TarError."""
        try:
            found = super().fromtarfile(archive)
        except RecursionError as error:
            raise tarfile.ReadError("its headers are nested too deeply") from error
        except ValueError as error:
            raise tarfile.ReadError(f"a header has a number that is none: {error}") from error
        if found.size < 0:
            raise tarfile.ReadError(f"{found.name[:200]!r} has {found.size} bytes")
        return found

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        # `tarfile`'s own comments name this method as one to override.
        if self.type in _EXTENDED and self.size > _MAX_EXTENDED:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return cast(tarfile.TarInfo, super()._proc_member(archive))  # type: ignore[misc]
