"""`pypi_source`: a source distribution or a wheel of a package index."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from vzrepro.base.errors import RemoteError, UsageError, VzreproError
from vzrepro.base.model import FileHash
from vzrepro.recipe.graph import Want
from vzrepro.recipe.lock import SourcePin
from vzrepro.sources import simple
from vzrepro.sources.lookup import Lookup


def resolve(want: Want, old: SourcePin | None, lookup: Lookup) -> SourcePin:
    """Pin a `pypi_source` (`lookup.Resolver`): the file's sha256 is the index's. Raises UsageError, RemoteError."""
    del old
    wheel = None if want.ask["wheel"] is None else str(want.ask["wheel"])
    series = str(want.ask["series"])
    what = "source distribution" if wheel is None else f"wheel for {wheel}"
    everything = _published(want.name, lookup)
    files = [file for file in everything if (wheel in file.tags if wheel else not file.tags)]
    fitting = [file for file in files if _in_series(file.version, series)]
    taken = [file for file in fitting if not file.yanked]
    if not taken:
        versions = sorted({file.version for file in files})
        if fitting:
            reason = f"its publisher has withdrawn {', '.join(sorted({str(each.version) for each in fitting}))}"
        else:
            reason = f"the index has {', '.join(map(str, versions[-8:])) or f'no {what} of it'}"
        tags = sorted({tag for file in everything for tag in file.tags if _in_series(file.version, series)})
        raise UsageError(
            f"Python package {want.name} has no {what} in the series {series}",
            reason=reason,
            hint=f"the wheels of this series are for: {', '.join(tags[:12])}"
            if wheel and tags
            else "a pre-release is taken only where it is named in full",
        )
    # Of several files of one version the last by name, so that the order on the page does not count.
    best = max(taken, key=lambda file: (file.version, file.name))
    if best.sha256 is None:
        raise UsageError(
            f"the index has no sha256 of {best.name}", hint=f"take it by its URL: url_source(…, {best.url!r})"
        )
    project = simple.canonical(want.name)
    file, _path = lookup.download([f"mirror://pypi/{project}/{best.name}"], FileHash(best.sha256.hex))
    return SourcePin(want.request, str(best.version), file)


def _published(name: str, lookup: Lookup) -> tuple[simple.PythonFile, ...]:
    """The files of the first index that has the project."""
    failures = []
    for index in lookup.mirrors.python_indexes:
        page = simple.page_of(index, name)
        try:
            return simple.files(lookup.get(page, simple.MAX_PAGE, accept=simple.ACCEPT), page, name)
        except VzreproError as error:
            failures.append(error)
    raise RemoteError(
        f"no package index has {name}",
        reason="\n".join(error.in_a_line for error in failures),
        hint="name one that has it: export VZREPRO_MIRRORS='pypi=https://…/simple'",
    )


def _in_series(version: Version, series: str) -> bool:
    """Whether a version begins with the numbers of `series`; one that is no release is named in full."""
    try:
        if Version(series) == version and (version.local is None or "+" in series):
            return True
    except InvalidVersion:
        return False
    wanted = Version(series)
    if version.is_prerelease or version.local is not None or wanted.is_prerelease or wanted.is_postrelease:
        return False
    padded = version.release + (0,) * len(wanted.release)  # 1.2 and 1.2.0 are one version
    return version.epoch == wanted.epoch and padded[: len(wanted.release)] == wanted.release
