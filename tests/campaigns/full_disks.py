"""A disk that becomes full at any write: of the store, its logs, a cache, a push's spool, the memo. As root on Linux.

Each round leaves a random amount free on a small file system, in memory (tmpfs) or of a real kind (ext4 on a loop
device), that holds one of these places, and runs one of the commands of `kills`. It must end well, or with an error
that says so; nothing may be lost or wrong then, and with room again the same command must end well. `frame` has the
options.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaigns.frame import Line, Round, Wrong, main
from tests.campaigns.kills import EVERY, VERBS, filled, learn
from tests.campaigns.mill import Mill
from tests.contract.memory import MemoryBackend
from vzrepro import noop
from vzrepro.base.errors import VzreproError

SIZE = 24 << 20
FAILED = 7  # exit code of a command that has said why
_NEEDED = {"store": 5_000_000, "log": 200_000, "cache": 3_000_000, "spool": 2_500_000, "memo": 40_000}
"""About the bytes that a command writes there."""

KINDS = ("tmpfs", "ext4")


def why_not() -> str | None:
    """Why no file systems can be mounted here; None when they can."""
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        return "mounting needs root on Linux, and loop devices"
    return None if shutil.which("mkfs.ext4") else "mkfs.ext4 is not installed"


@contextlib.contextmanager
def small_disk(kind: str, place: Path, image: Path) -> Iterator[None]:
    """Have an empty file system of `SIZE` at the directory `place`, until the end of the block."""
    place.mkdir(parents=True, exist_ok=True)
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    else:
        with image.open("wb") as file:
            file.truncate(SIZE)
        # Without a journal that would take most of it.
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", image], check=True)
        command = ["mount", "-o", "loop", str(image), str(place)]
    subprocess.run(command, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def full_but(place: Path, free: int) -> Iterator[None]:
    """Leave about so many bytes free at `place`, until the end of the block."""
    filler = place / "filler"
    status = os.statvfs(place)
    size = status.f_bavail * status.f_frsize - free
    with filler.open("wb") as file:
        if size > 0:
            with contextlib.suppress(OSError):  # what the file itself needs
                os.posix_fallocate(file.fileno(), 0, size)
    try:
        yield
    finally:
        filler.unlink()


def explained(run: Callable[[], None]) -> Callable[[], None]:
    """The work, which may fail as a command fails: with an error that says why."""

    def work() -> None:
        try:
            run()
        except VzreproError as error:
            print(error)
            os._exit(FAILED)
        except OSError as error:  # told in a line where nobody has more to say of it
            if error.errno != errno.ENOSPC:
                raise
            os._exit(FAILED)

    return work


def _play(round: Round, site: str, disk: Path, names: list[str], mill: Mill) -> None:
    learn(round)
    verb = VERBS[names[round.number % len(names)]]
    round.calmly(lambda: verb.prepare(mill), "preparing")
    with full_but(disk, _free(round, site)):
        begun = time.monotonic()
        code = round.child(explained(lambda: verb.run(mill)))
        round.tally.longest_secs = max(round.tally.longest_secs, time.monotonic() - begun)
        if code not in (0, FAILED):
            raise Wrong(f"exit code {code}\n{round.said()}")
        round.tally.faults += code != 0
        if code != 0 and site == "store":
            round.calmly(lambda: _make_room(mill), "gc on the full disk")
    if code != 0 and site == "store":  # what nothing kept is gone
        round.calmly(mill.realize, "realize, with room")
        round.calmly(lambda: mill.judge_store(EVERY, corrupt=("left",)), "after it")
        return
    round.calmly(lambda: verb.safe(mill), "after it")
    round.calmly(lambda: verb.run(mill), "the same command, with room")
    round.calmly(lambda: verb.done(mill), "after the same command")


def _make_room(mill: Mill) -> None:
    """What the error advises, and that it leaves what is right."""
    from vzrepro.store import LocalStore

    with LocalStore(mill.store) as store:
        store.gc()
    mill.judge_store(corrupt=("left",))


def _free(round: Round, site: str) -> int:
    return int(_NEEDED[site] * round.chance.random() ** 2)


def _store(round: Round, kind: str) -> None:
    disk = round.place / "disk"
    with small_disk(kind, disk, round.place / "image"):
        mill = Mill(disk / "store", round.place / "cache", round.place / "sources")
        _play(round, "store", disk, list(VERBS), mill)


def _log(round: Round, kind: str) -> None:
    mill = Mill.at(round.place)
    disk = mill.store / ".vzrepro" / "log"
    with small_disk(kind, disk, round.place / "image"):
        _play(round, "log", disk, ["realize", "audit"], mill)


def _cache(round: Round, kind: str) -> None:
    disk = round.place / "disk"
    with small_disk(kind, disk, round.place / "image"):
        mill = Mill(round.place / "store", disk / "cache", round.place / "sources")
        _play(round, "cache", disk, ["realize", "push", "gc", "repair"], mill)


def _spool(round: Round, kind: str) -> None:
    """Places that are no directories spool below `$TMPDIR`."""
    disk = round.place / "disk"
    learn(round)
    with small_disk(kind, disk, round.place / "image"):
        there = MemoryBackend()
        mill = Mill(round.place / "store", Path(), round.place / "sources", lambda: there)
        round.calmly(lambda: filled(mill), "preparing")
        free = _free(round, "spool")

        def push() -> None:
            tempfile.tempdir = str(disk)
            failed = False
            with full_but(disk, free):
                try:
                    mill.push()
                except VzreproError as error:
                    print(error)
                    failed = True
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    failed = True
            mill.judge_cache()
            if [path.name for path in disk.iterdir() if path.name != "lost+found"]:
                raise Wrong(f"left in TMPDIR: {list(disk.iterdir())}")
            mill.push()
            mill.judge_cache(EVERY)
            os._exit(FAILED if failed else 0)

        code = round.child(push)
        if code not in (0, FAILED):
            raise Wrong(f"exit code {code}\n{round.said()}")
        round.tally.faults += code != 0


def _memo(round: Round, kind: str) -> None:
    """The memo says what is so, or nothing; commands do not fail for its sake."""
    disk, root = round.place / "disk", round.place / "workspace"
    root.mkdir()
    reads = [root / f"{number}.py" for number in range(round.chance.randrange(1, 200))]
    for file in reads:
        file.touch()
    time.sleep(0.06)  # what was written just now is not trusted
    places = {f"t{number}": str(reads[0]) for number in range(round.chance.randrange(1, 50))}
    with small_disk(kind, disk, round.place / "image"):
        environ = {"XDG_CACHE_HOME": str(disk), "HOME": "/nonexistent"}
        there = Path(noop.memo_path(str(root), environ))

        def remember() -> None:
            noop.remember_realized(str(root), environ, time.time_ns(), map(str, reads), places)
            said = {target: noop._said([f"realize {target}"], str(root), environ) for target in places}
            if any(text != f"{place}\n" for text, place in zip(said.values(), places.values(), strict=True) if text):
                raise Wrong(f"the memo says {said}")
            left = [path.name for path in there.parent.iterdir() if path != there] if there.parent.is_dir() else []
            if left:
                raise Wrong(f"left beside the memo: {left}")
            os._exit(0 if all(said.values()) else FAILED)

        with full_but(disk, _free(round, "memo")):
            code = round.child(remember)
        if code not in (0, FAILED):
            raise Wrong(f"exit code {code}\n{round.said()}")
        round.tally.faults += code != 0
        if round.child(remember) != 0:
            raise Wrong(f"not remembered, with room\n{round.said()}")


SITES: dict[str, Callable[[Round, str], None]] = {
    "store": _store,
    "log": _log,
    "cache": _cache,
    "spool": _spool,
    "memo": _memo,
}


def _line(site: str, kind: str) -> Line:
    return lambda round: SITES[site](round, kind)


LINES: dict[str, Line] = {f"{site} on {kind}": _line(site, kind) for site in SITES for kind in KINDS}

if __name__ == "__main__":
    main(LINES, 100)
