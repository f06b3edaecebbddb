"""Whether the container engine can mount this machine's files, and if not, why.

It is found out once per engine, and kept beside the store's own files: a file with a random name is looked for through
a container's mount. The container is made of an empty image and is never started.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
import secrets
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from vzrepro.base import disk
from vzrepro.sandbox import engine

_EMPTY = "vzrepro-empty:latest"
_END_OF_TAR = bytes(1024)
_NOT_THERE = re.compile(r"bind source path does not exist|no such file or directory|mounts denied", re.IGNORECASE)

_known: dict[tuple[str | None, ...], Sharing] = {}
_asking = threading.Lock()


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whether builds have their directories mounted (`mounts`), or sent to the engine and fetched; and the reason."""

    mounts: bool
    reason: str


def sharing_of(directory: Path, runtime: engine.Runtime | None = None) -> Sharing:
    """How it is for files in `directory`, an existing private directory of a store. `runtime` is the engine, if it has
    been asked already. Raises VzreproError when the engine does not work."""
    place = _place(directory)
    key = (str(place), *engine.selected())
    with _asking:
        if key not in _known:
            runtime = runtime or engine.check()
            kept = place / f"engine-{runtime.identity}.json" if place.name == disk.PRIVATE else None
            _known[key] = _kept(kept, place) or _keep(kept, place, find_out(directory, runtime))
        return _known[key]


def forget(directory: Path) -> None:
    """Have it found out again: a mount did not work."""
    place = _place(directory)
    with _asking:
        _known.clear()
        if place.name == disk.PRIVATE:
            for kept in place.glob("engine-*.json"):
                kept.unlink(missing_ok=True)


def mount_failed(complaint: str) -> bool:
    """Whether the engine complains that it does not find what it should mount."""
    return "bind source path does not exist" in complaint


def find_out(directory: Path, runtime: engine.Runtime) -> Sharing:
    """As `sharing_of`, asked anew."""
    here = platform.uname()
    if here.system != "Linux" or (runtime.kernel and runtime.kernel != here.release):
        other = f"{runtime.kernel}, this machine {here.release}" if runtime.kernel else "another system"
        return Sharing(False, f"it runs on another kernel, so what it sees of files here is a slow share: {other}")
    if disk.same_name(directory, "a", "A"):
        return Sharing(False, f"the disk of {directory} ignores the case of names")
    if runtime.daemonless:
        return Sharing(True, "it sees what its client sees")
    return _looked_for(directory)


def _looked_for(directory: Path) -> Sharing:
    with tempfile.TemporaryDirectory(prefix="seen-", dir=directory) as folder:
        token = secrets.token_hex(16)
        (Path(folder) / token).write_text(token)
        name = engine.new_name()
        create = [
            *("create", "--name", name, "--label", f"vzrepro.host={engine.host_name()}", "--pull", "never"),
            *("--network", "none", "--mount", f"type=bind,src={folder},dst=/seen,readonly", _EMPTY, "nothing"),
        ]
        try:
            code, _, err = engine.docker(*create, checked=False)
            if code != 0 and engine.lacks_image(err):
                _import_empty()
                code, _, err = engine.docker(*create, checked=False)
            if code != 0 and not _NOT_THERE.search(err):
                raise engine.trouble(err)
            if code == 0:
                _, out, _ = engine.docker("cp", f"{name}:/seen/{token}", "-", checked=False)
                if out.count(token) == 2:  # its name and its content
                    return Sharing(True, "it sees this machine's files")
        except KeyboardInterrupt:
            # The client may have been left in the middle of creating the container.
            engine.remove(name, None)
            raise
        finally:
            engine.docker("rm", "--force", "--volumes", name, checked=False)
    return Sharing(False, "it does not see this machine's files")


def _import_empty() -> None:
    with tempfile.NamedTemporaryFile() as archive:
        archive.write(_END_OF_TAR)
        archive.flush()
        engine.docker("import", archive.name, _EMPTY)


# --- what is kept of it ---------------------------------------------------------------------------------------------


def _place(directory: Path) -> Path:
    """What the answer holds for: the private directory of the store around this one, or this one alone."""
    directory = directory.absolute()
    return next((each for each in directory.parents if each.name == disk.PRIVATE), directory)


def _kept(file: Path | None, place: Path) -> Sharing | None:
    if file is None:
        return None
    try:
        found = json.loads(file.read_bytes())
        if found["place"] == str(place) and found["host"] == engine.boot_name():
            return Sharing(bool(found["mounts"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _keep(file: Path | None, place: Path, found: Sharing) -> Sharing:
    if file is not None:
        what = {"place": str(place), "host": engine.boot_name(), "mounts": found.mounts, "reason": found.reason}
        with contextlib.suppress(OSError):  # then the next run asks again
            disk.write_file(file, json.dumps(what).encode(), durable=False)
    return found
