"""diffoscope, in the sandbox: looks at pairs of files that differ, under limits of time, memory and disk.

What it prints is parsed as what a stranger has sent, since it has read files that a stranger may have made. Its JSON
format is that of its `presenters/json.py`, version 1. diffoscope itself runs in `looker`.
"""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vzrepro import sandbox
from vzrepro.base.errors import Interrupted, TimedOut, VzreproError
from vzrepro.proof.audit.inside import ContentPlace
from vzrepro.realize.realizer import Realizer
from vzrepro.sources import image

IMAGE = "image-diffoscope"
"""The target of `toolbox` whose image diffoscope is in (`vzrepro.recipes.diffoscope_image`)."""

SAME = "it sees no difference"
"""Why diffoscope says nothing of a file that differs: all it knows of the format is equal."""

_GRACE_SECS = 150.0
_MAX_RESULT = 64 << 20
_MAX_PLACES = 200
_OPTIONS = ("--no-progress", "--diff-context", "2", "--max-diff-block-lines-saved", "1000")
_COMPRESSED = (".gz", ".xz", ".zst", ".bz2", ".lz4", ".lzma")
_SAFE = re.compile(r"[^A-Za-z0-9._+-]")
_SECTION = re.compile(r"--(?:section|hex-dump|string-dump)[= ](\S+)")
_READELF = re.compile(r"readelf .*--(?P<what>[a-z-]+)(?: \{\})?$")


@dataclass(frozen=True, slots=True)
class ComparisonLimits:
    """Bounds on a comparison.

    `seconds`, `memory_bytes` and `disk_bytes` are for diffoscope, which is ended there. `files` is how many differing
    files are looked into, `details` how many places are told of in all, `excerpt_bytes` how long each excerpt is.
    `look_bytes` is the largest file that is looked into without diffoscope.
    """

    seconds: float = 600.0
    memory_bytes: int = 2 << 30
    disk_bytes: int = 4 << 30
    files: int = 200
    details: int = 400
    excerpt_bytes: int = 4096
    look_bytes: int = 128 << 20


LIMITS = ComparisonLimits()
"""What is good for one comparison at a time on an ordinary machine."""


@dataclass(frozen=True, slots=True)
class Look:
    """What diffoscope found: `places` per file; `missed` says of a file why there is nothing; `page` is its HTML."""

    tool: str
    places: Mapping[str, tuple[ContentPlace, ...]]
    missed: Mapping[str, str]
    page: str | None = None


def look(
    pairs: Mapping[str, tuple[Path, Path]],
    *,
    realizer: Realizer,
    scratch: Path,
    limits: ComparisonLimits,
    page: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Look:
    """Have diffoscope look at pairs of regular files, the small ones first.

    `scratch` is an existing directory of the caller's. `page` asks for the HTML page: `sources` (the names of both
    sides) and `details` in diffoscope's format, of which those with `pair` (a key of `pairs`) are completed. `say`
    gets a line per file. Raises VzreproError when diffoscope cannot be run at all, Interrupted when `stop` is set; of
    a run that took too long, what was finished by then counts.
    """
    node = realizer.graph.find(IMAGE)
    sandbox.check()
    [archive] = (realizer.store.location(info.path) for info in realizer.realize([node]))
    image_id = str(image.image_id(archive))
    sandbox.load_image(archive, image_id)
    files = sorted(pairs, key=lambda file: (max(each.stat().st_size for each in pairs[file]), file))
    names = [_SAFE.sub("_", PurePosixPath(file or "file").name)[-64:].lstrip("-") or "file" for file in files]
    scratch.mkdir(exist_ok=True)
    for side in (0, 1):
        for number, (file, name) in enumerate(zip(files, names, strict=True)):
            _stage(pairs[file][side], scratch / "ab"[side] / str(number) / name)
    task = {
        "seconds": limits.seconds,
        "disk_bytes": limits.disk_bytes,
        "options": _OPTIONS,
        "names": names,
        "page": None if page is None else _numbered(page, files),
    }
    (scratch / "task.json").write_text(json.dumps(task))
    job = sandbox.Job(
        label="the comparison",
        image=image_id,
        command=("python3", "/in/looker.py"),
        scratch=scratch / "sandbox",
        log=scratch / "log",
        source_date_epoch=0,
        cores=realizer.config.build_cores(),
        env={
            "LIBARCHIVE": "libarchive.so.13",  # found by ldconfig's cache otherwise, which the image has not
            "PYTHONPYCACHEPREFIX": "/build/python",
            "COLUMNS": "120",
        },
        inputs={
            **{side: scratch / side for side in "ab"},
            "looker.py": Path(__file__).with_name("looker.py"),
            "task.json": scratch / "task.json",
        },
        memory_bytes=realizer.config.memory_bytes(limits.memory_bytes),
        disk_bytes=realizer.config.disk_bytes(None),
        timeout_secs=limits.seconds + _GRACE_SECS,
        platform=node.drv.platform or "",
    )
    job.scratch.mkdir(mode=0o700)
    heard = _Heard(files, say)
    try:
        try:
            sandbox.run(job, on_line=heard.line, stop=realizer.stop)
        except TimedOut:
            heard.ended = f"after {limits.seconds:.0f} s"
        except Interrupted:
            raise
        except VzreproError:
            if not heard.tool:  # it did not even start
                raise
            heard.ended = "the comparison was ended, most likely for the memory it needs"
        numbers = {file: number for number, file in enumerate(files)}
        found = {file: parse(_read(job.out / f"{numbers[file]}.json")) for file in heard.differing}
        html = _read(job.out / "page.html") if page is not None else b""
        return Look(
            heard.tool or "diffoscope",
            {file: places for file, places in found.items() if places},
            heard.missed(),
            html.decode(errors="replace") or None,
        )
    finally:
        sandbox.discard(job)


def _stage(source: Path, target: Path) -> None:
    """Have the file where the sandbox's user may read it: linked if it may already, copied otherwise."""
    target.parent.mkdir(parents=True)
    if source.stat().st_mode & stat.S_IROTH:
        try:
            target.hardlink_to(source)
        except OSError:  # another file system, too many links
            pass
        else:
            return
    shutil.copyfile(source, target)
    target.chmod(0o644)


def _numbered(page: Mapping[str, Any], files: Sequence[str]) -> dict[str, Any]:
    numbers = {file: number for number, file in enumerate(files)}
    details = [
        {**detail, "pair": numbers[detail["pair"]]} if "pair" in detail else detail for detail in page["details"]
    ]
    return {**page, "details": details}


class _Heard:
    """What `looker` has said."""

    def __init__(self, files: Sequence[str], say: Callable[[str], None]) -> None:
        self.tool = ""
        self.ended: str | None = None
        self.differing: list[str] = []
        self._files = files
        self._say = say
        self._told: dict[str, str] = {}

    def line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "tool":
            self.tool = rest[:60]
            return
        number, _, why = rest.partition(" ")
        if not number.isdecimal() or int(number) >= len(self._files):
            return
        file = self._files[int(number)]
        if word == "differs":
            self.differing.append(file)
        elif word == "same":
            why = SAME
        self._told[file] = why
        self._say(f"{word} {file}{f': {why}' if why else ''}")

    def missed(self) -> dict[str, str]:
        """File → why diffoscope has nothing to say of it."""
        return {
            file: self._told.get(file) or self.ended or "it did not come to it"
            for file in self._files
            if file not in self.differing
        }


# --- reading what it wrote ----------------------------------------------------------------------------------------


def _read(file: Path) -> bytes:
    """A file that was written in the sandbox; empty when there is none, or it is nothing to be read."""
    try:
        found = file.lstat()
        return file.read_bytes() if stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_RESULT else b""
    except OSError:
        return b""


def parse(data: bytes) -> tuple[ContentPlace, ...]:
    """The places in diffoscope's JSON of one pair of files; none in what is something else."""
    try:
        document = json.loads(data)
        found: list[ContentPlace] = []
        for place in _places(document, (), ""):
            found.append(place)
            if len(found) >= _MAX_PLACES:
                break
        return tuple(found)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return ()


def _places(node: Mapping[str, Any], member: tuple[str, ...], name: str) -> Iterator[ContentPlace]:
    diff = node["unified_diff"]
    source = str(node["source1"])
    if diff:
        yield ContentPlace(member, _kind(node, source), None, None, _clean(str(diff)).rstrip("\n"))
    for child in node.get("details") or ():
        label = str(child["source1"])
        yield from _places(child, (*member, *_step(name or source, label)), label)


def _clean(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _step(parent: str, label: str) -> tuple[str, ...]:
    """The part of a member's path that a level adds: a section, an archive's member; nothing for what is only another
    view of the same thing, such as what a compressed file holds."""
    if match := _SECTION.search(label):
        return (match[1],)
    if label.startswith("strings "):
        return ("strings",)
    if match := _READELF.match(label):
        return (match["what"],)
    if label in ("file list", "filetype from file(1)", "metadata", "symlink"):
        return ()
    base = parent.rpartition("/")[2]
    stems = [base.removesuffix(ending) for ending in _COMPRESSED if base.endswith(ending)]
    if label in stems or label == f"{base}-content":
        return ()
    if label.endswith("{}"):
        return (label.split(" ", 1)[0],)
    return (_clean(label),)


def _kind(node: Mapping[str, Any], source: str) -> str:
    if _SECTION.search(source):
        return "ELF section"
    if source in ("file list", "filetype from file(1)", "metadata") or source.endswith("{}"):
        return "listing" if source == "file list" else "metadata"
    return "bytes" if node.get("has_internal_linenos") else "text line"
