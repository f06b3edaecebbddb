"""What audits have found, on disk: every rebuild that was made, every report, every explanation of a difference.

Everything lies in `<store>/.vzrepro/audit/` (docs/formats.md). A rebuild is recorded when it ends, so an audit that is
interrupted goes on where it was, and an unchanged rebuild is not made twice. Whatever is read is distrusted: a record
that is damaged, or of another format, is as good as none, with a warning.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from vzrepro.base import disk
from vzrepro.base.errors import UsageError, VzreproError
from vzrepro.base.model import FORMAT, FileHash, canonical_json
from vzrepro.proof.audit.blame import Ending, Experiment, ExperimentResult
from vzrepro.proof.audit.model import AuditReport, Explanation, PastAudit
from vzrepro.store import OLD_SECS, LocalStore

ID_LENGTH = 12
"""Hex digits of a report's and a rebuild's id."""

_MAX_RECORD = 16 << 20
_ID = re.compile(rb'"([0-9a-f]{12,16})"')  # of a rebuild or an explanation, in JSON
_LAST = 5  # rebuilds whose median time is expected


@dataclass(frozen=True, slots=True)
class RebuildRequest:
    """What was asked of a rebuild: all that makes it this one. Another value in any field is another rebuild.

    Hashes are hex; `registered` is the NAR hash of the store's output, `builder` the signing key's id. `axes` and
    `held` map an axis to its version, so that one that is applied otherwise than it was is tried again. `tools` names
    what looked, where nothing was built: others may see more.
    """

    drv_hash: str
    build_key: str
    registered: str
    builder: str
    axes: Mapping[str, int]
    held: Mapping[str, int]
    round: int
    attempt: int
    builds: bool = True
    tools: str = ""

    @property
    def id(self) -> str:
        """The rebuild's id: the beginning of the sha256 of the canonical JSON."""
        fields: dict[str, Any] = _adapter(RebuildRequest).dump_python(self, mode="json")
        if not self.tools:
            del fields["tools"]
        return FileHash.of(canonical_json({"format": FORMAT, **fields})).hex[:ID_LENGTH]

    @property
    def experiment(self) -> Experiment:
        """The experiment, as `blame` knows it."""
        return Experiment(tuple(self.axes), tuple(self.held), self.round, self.attempt, self.builds)


@dataclass(frozen=True, slots=True)
class Record:
    """One rebuild: what was asked and what came out. Sizes are bytes, times RFC 3339 in UTC and milliseconds.

    `observed` is what the sandbox told of itself, `log` the output's last lines, `statement` the sha256 of the signed
    statement and `explanation` the id of one, once there are any; `tools` names what observed. Of a rebuild on another
    machine, `without` is what is observed there with nothing varied, and `excuses` says, of a look, which axes that
    machine does not have for this node, and why.
    """

    asked: RebuildRequest
    ending: Ending
    nar_hash: str | None
    nar_size: int | None
    started: str
    finished: str
    milliseconds: int
    reason: str | None = None
    observed: Mapping[str, str] | None = None
    log: tuple[str, ...] = ()
    statement: str | None = None
    explanation: str | None = None
    tools: str = ""
    without: Mapping[str, str] | None = None
    excuses: Mapping[str, str] | None = None
    format: int = FORMAT

    @property
    def result(self) -> ExperimentResult:
        """What `blame` judges by."""
        return ExperimentResult(self.ending, self.nar_hash, self.reason, self.observed, self.without)


@dataclass(frozen=True, slots=True)
class RemovedRecords:
    """What `Records.collect` has removed, or would: files relative to its directory, and the sum of their bytes."""

    files: tuple[str, ...]
    freed: int


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made when it is needed: that takes longer than most commands may."""
    return TypeAdapter(kind)


class Records:
    """The records below `root`, which is created by the first write. `warn` gets a line about each damaged one."""

    def __init__(self, root: Path, warn: Callable[[str], None]) -> None:
        self.root = root
        self._warn = warn

    @classmethod
    def beside(cls, store: LocalStore, warn: Callable[[str], None]) -> Records:
        """The records that are kept with `store`."""
        return cls(store.private / "audit", warn)

    # --- rebuilds

    def rebuilds(self, drv_hash: str) -> list[Record]:
        """All rebuilds of this derivation, by whomever."""
        return [record for file in _listed(self._folder(drv_hash)) if (record := self._read(file, Record)) is not None]

    def save(self, record: Record) -> None:
        """Keep a rebuild, in place of an earlier one of the same question. Raises VzreproError for a full disk."""
        file = self._folder(record.asked.drv_hash) / f"{record.asked.id}.json"
        _write(file, _adapter(Record).dump_json(record))

    def _folder(self, drv_hash: str) -> Path:
        return self.root / "rebuilds" / drv_hash

    # --- logs and explanations

    def keep_log(self, rebuild: str, log: Path) -> None:
        """Keep a rebuild's whole log."""
        if log.is_file():
            with _whole(self.log(rebuild)) as writer, log.open("rb") as reader:
                shutil.copyfileobj(reader, writer)

    def log(self, rebuild: str) -> Path:
        """Where a rebuild's whole log is, if it was kept: of those that did not reproduce."""
        return self.root / "logs" / f"{rebuild}.log"

    def keep_explanation(self, explanation: Explanation) -> None:
        """Keep why two outputs differ, under its id."""
        _write(self.root / "explanations" / f"{explanation.id}.json", _adapter(Explanation).dump_json(explanation))

    def explanation(self, explanation: str) -> Explanation | None:
        """The explanation of this id."""
        file = self.root / "explanations" / f"{explanation}.json"
        found: Explanation | None = self._read(file, Explanation) if file.is_file() else None
        return found

    # --- reports

    def new_id(self) -> str:
        """An id that no report has."""
        while (self._reports / (new := secrets.token_hex(ID_LENGTH // 2))).exists():
            pass
        return new

    def keep_report(self, report: AuditReport, page: str | None) -> Path:
        """Keep a report as report.json, `page` as index.html. Returns their directory."""
        folder = self._reports / report.id
        _write(folder / "report.json", report.encoded())
        if page is not None:
            _write(folder / "index.html", page.encode())
        # Last: a report without it is not listed.
        _write(folder / "summary.json", _adapter(PastAudit).dump_json(summary(report)))
        return folder

    def history(self) -> list[PastAudit]:
        """All audits that were kept, oldest first."""
        found = [
            past
            for folder in _listed(self._reports)
            if (file := folder / "summary.json").is_file() and (past := self._read(file, PastAudit)) is not None
        ]
        return sorted(found, key=lambda past: (past.finished, past.id))

    def find(self, prefix: str) -> Path:
        """The directory of the report whose id begins with `prefix`. Raises UsageError for none or several."""
        found = [folder for folder in _listed(self._reports) if prefix and folder.name.startswith(prefix)]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UsageError(f"no audit is called {prefix!r}", hint="list them with: vzrepro audit history")
        names = ", ".join(folder.name for folder in found[:5])
        raise UsageError(f"{prefix!r} is the beginning of {len(found)} audits' names", reason=f"among them: {names}")

    @property
    def _reports(self) -> Path:
        return self.root / "reports"

    # --- cleaning

    def collect(
        self, drv_hashes: Collection[str], *, dry_run: bool = False, now: float | None = None
    ) -> RemovedRecords:
        """Remove what nobody needs any more and is older than `OLD_SECS`; safe beside audits. `now` is for tests.

        Reports stay. Rebuilds stay while `drv_hashes`, those of the store's objects, have theirs; logs and
        explanations while a rebuild or a report names them. What killed writers have left goes.
        """
        before = (time.time() if now is None else now) - OLD_SECS
        gone: dict[Path, int] = {}
        named: set[bytes] = set()

        def look(folder: Path, is_kept: bool) -> None:
            """Have the old files of a folder go, or else what those that stay name be kept."""
            files = _with_status(folder)
            is_kept = is_kept or any(status.st_mtime >= before for status in files.values())
            for file, status in files.items():
                if status.st_mtime < before and (not is_kept or file.name.startswith(".")):
                    gone[file] = status.st_size
                elif file.suffix == ".json":
                    named.add(file.stem.encode())
                    with contextlib.suppress(FileNotFoundError):
                        named.update(_ID.findall(file.read_bytes()))

        for folder in _listed(self.root / "rebuilds"):
            look(folder, folder.name in drv_hashes)
        for folder in _listed(self._reports):
            look(folder, (folder / "summary.json").exists())
        for folder in (self.root / "logs", self.root / "explanations"):
            for file, status in _with_status(folder).items():
                if status.st_mtime < before and file.stem.encode() not in named:
                    gone[file] = status.st_size
        for file in () if dry_run else gone:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # there are others in it
                file.parent.rmdir()
        return RemovedRecords(tuple(sorted(str(file.relative_to(self.root)) for file in gone)), sum(gone.values()))

    def _read(self, file: Path, kind: Any) -> Any:
        """What `kind` is in a file; None, after a warning, when it is something else."""
        try:
            with file.open("rb") as opened:
                data = opened.read(_MAX_RECORD + 1)
            if len(data) > _MAX_RECORD:
                raise ValueError("it is too large")
            found = _adapter(kind).validate_json(data)
            if isinstance(found, Record) and (found.format != FORMAT or found.asked.id != file.stem):
                raise ValueError("it is of another format, or not what its name says")
        except (OSError, ValueError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            self._warn(f"{file} is damaged and not looked at: {why}")
            return None
        return found


def expected_secs(rebuilds: Iterable[Record]) -> float | None:
    """The median time of the newest of one node's rebuilds that gave an output; None without any."""
    built = [each for each in rebuilds if each.asked.builds and each.ending is Ending.BUILT]
    newest = sorted(built, key=lambda each: each.finished)[-_LAST:]
    return statistics.median(each.milliseconds / 1000 for each in newest) if newest else None


def summary(report: AuditReport) -> PastAudit:
    """A report's row of the history."""
    nodes = {str(verdict): count for verdict, count in report.counts.items()}
    return PastAudit(report.id, report.finished, report.targets, report.mode, report.verdict, nodes)


def _with_status(directory: Path) -> dict[Path, os.stat_result]:
    """All entries of a directory, unfinished ones as well; none without it."""
    found = {}
    for file in directory.iterdir() if directory.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            found[file] = file.lstat()
    return found


def _listed(directory: Path) -> list[Path]:
    """Entries that are whole, sorted; none without the directory."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    return []


def _write(file: Path, data: bytes) -> None:
    with _whole(file) as opened:
        opened.write(data)


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    with _explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole_file(file) as opened:
            yield opened


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VzreproError(
            f"{file} cannot be written",
            reason=error.strerror,
            hint="look at the space left and the rights of the store with: vzrepro doctor",
        ) from error
