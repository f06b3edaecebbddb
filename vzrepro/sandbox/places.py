"""Where the container engine has the directories behind a sandbox: on this machine's disk, or in a volume of its own.

A job whose directories are in a volume has a note of that in its scratch directory, for whoever opens a shell there or
removes it later.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import PurePath, PurePosixPath

from vzrepro.base import disk
from vzrepro.sandbox.job import Job

_NOTE = "volume.json"


@dataclass(frozen=True, slots=True)
class Places:
    """Paths as the engine knows them: behind /build, /out and /in; of the directory with what is mounted in /etc; of
    that with `Surroundings.files`, each called by its number there, which tells nothing."""

    build: PurePath
    out: PurePath
    inputs: PurePath
    etc: PurePath
    files: PurePath


@dataclass(frozen=True, slots=True)
class VolumeNote:
    """The container that keeps a job's volume, and where the engine has that."""

    container: str
    root: PurePosixPath


def places(job: Job) -> Places:
    """Where the job's directories are: in its volume, if it has one."""
    note = volume_of(job)
    if note is None:
        return Places(job.build, job.out, job.staged, job.scratch / "etc", job.scratch / "files")
    root = note.root
    return Places(root / "build", root / "out", root / "in", root / "etc", root / "files")


def volume_of(job: Job) -> VolumeNote | None:
    """What is noted of the job's volume; None when it has none."""
    try:
        found = json.loads((job.scratch / _NOTE).read_text())
    except FileNotFoundError:
        return None
    return VolumeNote(found["container"], PurePosixPath(found["root"]))


def note_volume(job: Job, note: VolumeNote) -> None:
    """Remember the job's volume."""
    text = json.dumps({"container": note.container, "root": str(note.root)})
    disk.write_file(job.scratch / _NOTE, text.encode(), durable=False)


def forget_volume(job: Job) -> None:
    """The job's volume is gone."""
    (job.scratch / _NOTE).unlink(missing_ok=True)
